"""What a preflight found, for people: both sides beside each other, the findings, what the copy will take."""

import os
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.check.census import Census
from pipeline.check.inspection import Inspected, Side
from pipeline.check.preflight import Severity
from pipeline.check.sizing import Estimate
from pipeline.show.figures import duration, printable, rate, size
from pipeline.wording import counted

_NOUNS: tuple[tuple[Severity, str], ...] = (("refuse", "refusal"), ("warn", "warning"), ("note", "note"))
_STYLES = {"refuse": "bold red", "warn": "yellow", "note": "dim"}
_WIDTH_OF_FILES = 200
_UNKNOWN = "-"


def print_inspection(found: Inspected) -> None:
    """Print the sides, every finding with what to type, the estimate, and what comes next."""
    console = Console(
        highlight=False, width=None if sys.stdout.isatty() or os.environ.get("COLUMNS") else _WIDTH_OF_FILES
    )
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("", found.source.name, found.target.name):
        table.add_column(heading, overflow="fold")
    for row in _side_rows(found.source, found.target):
        table.add_row(*(printable(cell) for cell in row))
    _print_table(console, table)
    for finding in found.findings:
        line = Text.assemble((f"{finding.severity:<6}", _STYLES[finding.severity]), "  ", _on_one_line(finding.fact))
        # Not folded: a hint is there to be copied.
        console.print(line, soft_wrap=True)
        for hint in finding.hint.splitlines():
            console.print(Text(f"        {printable(hint)}"), soft_wrap=True)
    if found.findings:
        console.print()
    if found.estimate is not None:
        for text in _estimate_lines(found.estimate, found.target.name):
            console.print(Text(text), soft_wrap=True)
        console.print()
    console.print(Text(_last_words(found)), soft_wrap=True)


def _print_table(console: Console, table: Table) -> None:
    """Print without the blanks that fill the last column."""
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        sys.stdout.write(line.rstrip() + "\n")
    sys.stdout.write("\n")


def _on_one_line(text: str) -> str:
    return " ".join(printable(text).split("\n"))


def _side_rows(source: Side, target: Side) -> Iterator[tuple[str, str, str]]:
    for name, of_side in _SIDE_ROWS:
        yield name, of_side(source), of_side(target)
    if source.census is not None or target.census is not None:
        for name, of_census in _CENSUS_ROWS:
            mine, theirs = (of_census(side.census) if side.census else _UNKNOWN for side in (source, target))
            yield name, mine, theirs


def _server(side: Side) -> str:
    return f"PostgreSQL {side.server}, {side.encoding}" if side.server else _UNKNOWN


def _identity(side: Side) -> str:
    return f"{side.system_identifier}, up since {(side.started or '')[:19]}" if side.server else _UNKNOWN


def _pgvector(side: Side) -> str:
    return f"{side.pgvector} in schema {side.pgvector_schema}" if side.pgvector else _UNKNOWN


def _connection(side: Side) -> str:
    if side.server is None:
        return _UNKNOWN
    way = "through a pooler" if side.pooled else "direct"
    return f"{way}, {side.tls or 'no TLS'}, {counted(side.sessions_free or 0, 'session')} free"


def _table(side: Side) -> str:
    if side.bytes is None:
        return _UNKNOWN
    key = f"key {', '.join(side.key)}" if side.key else "no key"
    return f"{side.table}, {side.kind}, {key}, {size(side.bytes)}"


def _rows(census: Census) -> str:
    return f"{census.rows:,}" + (f", {census.null_embeddings:,} without an embedding" if census.null_embeddings else "")


def _dimensions(census: Census) -> str:
    if len(census.dimensions) == 1:
        return f"{census.dimensions[0][0]:,}"
    return ", ".join(f"{dimension:,} ({counted(rows, 'row')})" for dimension, rows in census.dimensions) or _UNKNOWN


def _norms(census: Census) -> str:
    if (norms := census.norms) is None:
        return _UNKNOWN
    share = f"{norms.normalised:.0%} normalised"
    return f"{norms.minimum:.4g} to {norms.maximum:.4g}, median {norms.median:.4g}, {share}"


def _duplicates(census: Census) -> str:
    if not census.duplicate_groups:
        return "none"
    return f"{counted(census.duplicate_rows, 'row')} in {counted(census.duplicate_groups, 'group')}"


_SIDE_ROWS: tuple[tuple[str, Callable[[Side], str]], ...] = (
    ("address", lambda side: side.address),
    ("server", _server),
    ("identity", _identity),
    ("pgvector", _pgvector),
    ("connection", _connection),
    ("table", _table),
)
_CENSUS_ROWS: tuple[tuple[str, Callable[[Census], str]], ...] = (
    ("rows", _rows),
    ("dimensions", _dimensions),
    ("lengths", _norms),
    ("duplicates", _duplicates),
)


def _estimate_lines(estimate: Estimate, target: str) -> Iterator[str]:
    """Yield what the copy will take, and what the figures leave out."""
    if estimate.read_seconds is None:
        yield "reading   nothing could be timed"
    else:
        yield (
            f"reading   about {duration(estimate.read_seconds)} by one stream, by a sample of"
            f" {size(estimate.sample_bytes)} at {rate(estimate.sample_bytes, estimate.sample_seconds)};"
            f" how fast {target} writes is not in it"
        )
    index = f", {size(estimate.index_bytes)} of them for the HNSW index" if estimate.index_bytes else ""
    yield (
        f"disk      about {size(estimate.disk_bytes)} on {target}{index}, and {size(estimate.wal_bytes)} of WAL"
        f" meanwhile; {_free(estimate)}"
    )
    if estimate.index_bytes:
        yield f"memory    {size(estimate.graph_bytes)} for the HNSW graph of {counted(estimate.rows, 'row')}"


def _free(estimate: Estimate) -> str:
    if estimate.free_bytes is None:
        return "how much is free there does not show from here"
    return f"{size(estimate.free_bytes)} are free there"


def _last_words(found: Inspected) -> str:
    severities = [finding.severity for finding in found.findings]
    summed = ", ".join(counted(severities.count(severity), noun) for severity, noun in _NOUNS)
    if found.verdict == "refused":
        return f"{summed}. A copy would be refused; nothing was changed."
    names = (found.source.name, found.target.name)
    ends = "with the same --from and --to" if "url" in names else "--from {} --to {}".format(*names)
    return f"{summed}. next: pipeline copy {ends}"
