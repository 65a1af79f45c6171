"""What was measured, as a table for people and as plain values for JSON."""

import os
import platform
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version

from rich.console import Console
from rich.table import Table

from link import PassRate
from pipeline import __version__
from pipeline.postgres.tables import read_extension
from pipeline.show.figures import size
from pipeline.wording import counted
from studies import LedgerCost, MemoryCase, PassCost
from testbed import RELEASES, SERVER_SETTINGS, Testbed
from turns import Result

SCHEMA_VERSION = 2
# Wide enough for the table where stdout is a file or a pipe.
PLAIN_WIDTH = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far the servers were: milliseconds asked for, a SELECT as measured, and what the proxy alone passes."""

    latency_ms: float
    select_ms: float
    passes: PassRate


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that a run measured. None: not asked for."""

    bed: Testbed
    machine: dict[str, object]
    rounds: int
    cold: bool
    results: tuple[Result, ...]
    distance: Distance | None = None
    memory: tuple[MemoryCase, ...] | None = None
    ledger: LedgerCost | None = None
    changes: PassCost | None = None


def document(report: Report) -> dict[str, object]:
    """Return the report as one JSON document."""
    bed = report.bed
    found: dict[str, object] = {
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": report.machine,
        "data": {
            "rows": bed.content.rows,
            "digest": bed.content.digest,
            "dimensions": int(bed.environment["EMBEDDING_DIMENSIONS"]),
            "stream_bytes": bed.stream_bytes,
            "table_bytes": bed.table_bytes,
        },
        "server_settings": SERVER_SETTINGS,
        "rounds": report.rounds,
        "cold": report.cold,
        "contenders": [_entry(bed, result, report.results) for result in report.results],
    }
    if report.distance is not None:
        found["distance"] = asdict(report.distance)
    if report.memory is not None:
        found["memory"] = [asdict(case) for case in report.memory]
    if report.ledger is not None:
        found["ledger"] = {
            "second_per_slice": report.ledger.second_per_slice,
            "share": report.ledger.share,
            "copies": [
                {"name": one.contender.name, "slices": one.slices, "median_seconds": one.seconds}
                for one in report.ledger.results
            ],
        }
    if report.changes is not None:
        found["changes"] = asdict(report.changes)
    return found


def _entry(bed: Testbed, result: Result, results: Sequence[Result]) -> dict[str, object]:
    base = result.base(results)
    return {
        "name": result.contender.name,
        "what": result.contender.what,
        "kind": result.contender.kind,
        "median_seconds": result.seconds,
        "median_cpu_seconds": result.cpu_seconds,
        "peak_bytes": result.peak_bytes,
        "bytes_per_second": bed.stream_bytes / result.seconds,
        "ratio": result.seconds / base.seconds,
        "ratio_to": base.contender.name,
        "slices": result.slices,
        "left": asdict(result.left),
        "equal": result.left == bed.content,
        "rounds": [asdict(one) for one in result.measurements],
    }


def read_machine(bed: Testbed) -> dict[str, object]:
    """Return what the figures depend on, the load by others before the first turn included; not the name."""
    servers = {}
    for name, server in (("legacy", bed.legacy), ("main", bed.main)):
        with closing(bed.connect(server)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT pg_catalog.current_setting('server_version')")
            ((release,),) = cursor.fetchall()
            extension = read_extension(cursor)
            servers[name] = {"postgresql": release, "pgvector": extension.text if extension else None}
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average_1_min": os.getloadavg()[0],
        "python": platform.python_version(),
        "psycopg2": version("psycopg2-binary"),
        "pipeline": __version__,
        "servers": servers,
    }


def print_report(report: Report) -> None:
    """Write the tables to stdout."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    console.print(_speed_table(report))
    for lines in (_facts(report), _distance_lines(report.distance), _pass_lines(report.changes)):
        for line in lines:
            console.print(line)
    if report.memory is not None:
        console.print(_memory_table(report.memory))
    if report.ledger is not None:
        console.print(_ledger_table(report.ledger))
        console.print(
            f"A slice costs {report.ledger.second_per_slice * 1000:.1f} ms (finest against largest), those of the"
            f" default {report.ledger.share:.1%} of its time."
        )


def _new_table(*columns: str, what: str = "what") -> Table:
    """Return a table of a name, figures, and words about it."""
    first, *figures = columns
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column(first)
    for column in figures:
        table.add_column(column, justify="right")
    table.add_column(what)
    return table


def _speed_table(report: Report) -> Table:
    table = _new_table("contender", "seconds", "least", "most", "MB/s", "ratio", "CPU s", "memory")
    for result in report.results:
        base = result.base(report.results)
        wall = [one.seconds for one in result.measurements]
        table.add_row(
            result.contender.name,
            *(f"{seconds:.2f}" for seconds in (result.seconds, min(wall), max(wall))),
            f"{report.bed.stream_bytes / result.seconds / 1e6:.0f}",
            f"{result.seconds / base.seconds:.2f} x {base.contender.name}",
            f"{result.cpu_seconds:.2f}",
            size(result.peak_bytes),
            result.contender.what,
        )
    return table


def _facts(report: Report) -> list[str]:
    bed, machine = report.bed, report.machine
    source = (
        "Legacy cold: restarted before every turn, its files dropped from the page cache; main warm."
        if report.cold
        else "Legacy warm."
    )
    return [
        f"\n{counted(bed.content.rows, 'row')}, {size(bed.stream_bytes)} as binary COPY,"
        f" {size(bed.table_bytes)} on disk; {counted(report.rounds, 'round')}, medians. {source}",
        "Count and digest of all rows were equal after each contender's last round.",
        f"{machine['cores']} cores, kernel {machine['kernel']}, PostgreSQL {' to '.join(RELEASES)},"
        f" load average before {machine['load_average_1_min']:.1f}.",
    ]


def _distance_lines(distance: Distance | None) -> list[str]:
    if distance is None:
        return []
    return [
        f"Both servers {distance.latency_ms:g} ms away by a proxy: a SELECT takes {distance.select_ms:.1f} ms. One"
        f" connection passes {size(distance.passes.undelayed)}/s of the proxy alone without delay,"
        f" {size(distance.passes.delayed)}/s with it."
    ]


def _pass_lines(cost: PassCost | None) -> list[str]:
    if cost is None:
        return []
    return [
        f"The pass that finds and brings {counted(cost.changed_rows, 'changed row')} of {cost.rows:,}"
        f" takes {cost.pass_seconds:.2f} s, one that finds none {cost.quiet_pass_seconds:.2f} s; the load before it"
        f" {cost.load_seconds:.2f} s. As the copy itself does it, by its own events."
    ]


def _memory_table(cases: Sequence[MemoryCase]) -> Table:
    table = _new_table("\nmemory of", "\nrows", "\nCOPY", "\npeak", what="\nratio")
    for case in cases:
        ratio = f"{case.peak_bytes / cases[0].peak_bytes:.2f} x {cases[0].what}"
        table.add_row(case.what, f"{case.rows:,}", size(case.stream_bytes), size(case.peak_bytes), ratio)
    return table


def _ledger_table(cost: LedgerCost) -> Table:
    table = _new_table("\nslices", "\ncount", "\nseconds", "\nratio", what="\nwhat")
    largest = cost.results[0]
    for one in cost.results:
        ratio = f"{one.seconds / largest.seconds:.2f}"
        table.add_row(one.contender.name, str(one.slices), f"{one.seconds:.2f}", ratio, one.contender.what)
    return table
