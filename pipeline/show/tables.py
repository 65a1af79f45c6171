"""Results as tables on stdout, plain where it is no terminal."""

import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.events import CheckDone
from pipeline.settings import Origin
from pipeline.show.figures import duration, printable, size
from pipeline.show.plain import print_text
from pipeline.status import CutoverState, RunState, State
from pipeline.wording import counted


class Found(Protocol):
    """What a search returns, as far as it is shown."""

    @property
    def content(self) -> str | None:
        """Return the row's text."""

    @property
    def distance(self) -> float:
        """Return the distance from the query."""


_WIDTH_OF_FILES = 200
_WIDTH_OF_PASSAGES = 110
_STYLES = {"pass": "green", "fail": "bold red", "partial": "bold yellow", "done": "green", "interrupted": "yellow"}


def _console() -> Console:
    """Return a console as wide as the terminal; a file or pipe gets lines that are not folded."""
    wide = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else _WIDTH_OF_FILES
    return Console(highlight=False, width=wide)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print a table without lines, as wide as its place; ``right`` are the columns that end at the same edge."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell), style=_STYLES.get(cell, "")) for cell in row))
    with (console := _console()).capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        sys.stdout.write(line.rstrip() + "\n")


def print_settings(origins: Sequence[Origin], endpoints: dict[str, str]) -> None:
    """Print every variable with its value and place, then what the two endpoints resolve to."""
    print_table(("variable", "value", "from"), [(o.variable, o.shown, o.where) for o in origins])
    print_text("")
    for name, label in endpoints.items():
        print_text(f"{name:<7} {label}")


def print_checks(results: Sequence[CheckDone]) -> None:
    """Print verdicts, the keys that differ, and the queries that disagree."""
    print_table(
        ("check", "verdict", "what was found", "time"),
        [(r.name, r.verdict, r.summary, duration(r.seconds)) for r in results],
        right=("time",),
    )
    failed = [result.name for result in results if result.verdict != "pass"]
    print_text("")
    print_text(f"verdict: fail ({', '.join(failed)})" if failed else "verdict: pass")
    for result in results:
        _print_keys(result)
        _print_disagreements(result)
    _print_advice(results)


def _records(result: CheckDone, name: str) -> list[dict[str, object]]:
    """Return a figure that is a list of records; a check that has none has an empty one."""
    found = result.figures.get(name)
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _print_keys(result: CheckDone) -> None:
    keys = _records(result, "keys")
    if not keys:
        return
    total = result.figures.get("differing_rows")
    print_text("")
    print_text(f"differing keys ({len(keys)} of {total:,}):" if isinstance(total, int) else "differing keys:")
    rows = []
    for one in keys:
        columns = one.get("columns")
        rows.append((str(one["kind"]), str(one["key"]), ", ".join(columns) if isinstance(columns, list) else ""))
    print_table(("difference", "key", "in"), rows)


def _print_disagreements(result: CheckDone) -> None:
    disagreements = _records(result, "disagreements")
    if disagreements:
        print_text("")
        print_text("queries answered differently:")
        print_table(("query", "reason"), [(str(d["query"]), str(d["reason"])) for d in disagreements])


def _print_advice(results: Sequence[CheckDone]) -> None:
    """Print what checks have noticed beside their verdicts: facts, and what to type."""
    lines = []
    for result in results:
        for one in _records(result, "findings"):
            hint = f" ({one['hint']})" if one.get("hint") else ""
            lines.append(f"{result.name}, {one['severity']}: {one['fact']}{hint}")
        advice = result.figures.get("advice")
        texts = advice if isinstance(advice, list) else []
        lines += [f"{result.name}, note: {text}" for text in texts if str(text) not in result.summary]
    if lines:
        print_text("")
        for line in lines:
            print_text(line)


def print_state(state: State) -> None:
    """Print runs, verdicts, and where the cutover stands."""
    if not state.runs:
        print_text("no run yet. next: pipeline copy --from legacy --to main")
        return
    print_table(
        ("run", "phase", "slices", "rows", "size", "indexes", "began", "table"),
        [
            (
                str(run.id),
                run.phase,
                f"{run.slices_done}/{run.slices}",
                f"{run.rows:,}",
                size(run.bytes),
                _indexes(run),
                moment(run.started),
                run.table,
            )
            for run in state.runs
        ],
        right=("run", "slices", "rows", "size"),
    )
    print_text("")
    for run in state.runs:
        held = f", held by {run.holder}" if run.holder else ""
        aside = f", {counted(run.quarantined, 'row')} in quarantine" if run.quarantined else ""
        print_text(f"run {run.id}: {run.source} -> {run.target}{held}{aside}")
        if run.phase == "interrupted":
            if run.indexes_missing:
                print_text(f"until it has ended, {run.table} is without {counted(run.indexes_missing, 'index')}")
            print_text("next: pipeline copy --from legacy --to main, which goes on where it was")
    latest = state.runs[0]
    if latest.finished is not None and not any(verdict.at > latest.finished for verdict in state.verdicts):
        print_text("next: pipeline verify; it has not been run since")
    if state.verdicts:
        print_text("")
        print_table(
            ("check", "verdict", "what was found", "at"),
            [
                (v.check, f"{v.verdict}, stale" if v.stale else v.verdict, v.summary, moment(v.at))
                for v in state.verdicts
            ],
        )
        if any(verdict.stale for verdict in state.verdicts):
            print_text(
                "\nstale: one of the tables was written since. next: pipeline verify --incremental, or all of it"
            )
        elif any(verdict.stale is None for verdict in state.verdicts):
            print_text("\nwhether the tables were written since is not known: a side did not answer, or does not tell")
    if state.cutover is not None:
        _print_cutover(state.cutover)


def _print_cutover(cutover: CutoverState) -> None:
    """Print the cutover's steps and what can be done next."""
    print_text("")
    print_table(
        ("step", "state", "what was seen", "at"),
        [(step.name, step.state, step.summary, moment(step.at)) for step in cutover.steps],
    )
    name = f"{cutover.kind} {cutover.id} of {cutover.table}"
    if cutover.outcome is not None and cutover.ended is not None:
        print_text(f"{name}: {cutover.outcome} {moment(cutover.ended)}")
    elif cutover.back is not None:
        print_text(f"{name}: on its way back. next: pipeline rollback --execute")
    elif cutover.kind == "rehearsal":
        print_text(f"{name}: it came to no end. next: pipeline cutover --rehearse, or pipeline rollback --execute")
    elif cutover.next_step is None:
        print_text(f"{name}: switched. next: pipeline finalize, or pipeline rollback")
    else:
        where = "main is open, legacy is closed" if cutover.opened is not None else "nothing is switched yet"
        print_text(f"{name}: {where}; {cutover.next_step} comes next")
        print_text("next: pipeline cutover --execute, which goes on; or pipeline rollback --execute")


def _indexes(run: RunState) -> str:
    if run.indexes_missing:
        return f"{run.indexes_missing} to build"
    return f"{run.indexes_deferred} built" if run.indexes_deferred else "-"


def print_hits(hits: Sequence[Found]) -> None:
    """Print what a search found: distance, source, and the beginning of the text."""
    if not hits:
        print_text("nothing found")
        return
    # Two lines a passage on a terminal; a file gets no more.
    width = min(_console().width, _WIDTH_OF_PASSAGES)
    for place, hit in enumerate(hits, 1):
        text = " ".join((hit.content or "").split())
        print_text(
            f"{place}. {hit.distance:.4f}  {textwrap.shorten(text, width=max(40, 2 * width - 14), placeholder=' …')}"
        )


def moment(at: datetime) -> str:
    """Return a moment in UTC, to the second."""
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")
