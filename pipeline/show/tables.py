"""Results as tables on stdout, plain where it is no terminal."""

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.events import CheckDone
from pipeline.settings import Origin
from pipeline.show.figures import duration, plural, printable, size
from pipeline.status import State

SCHEMA_VERSION = 1
_STYLES = {"pass": "green", "fail": "bold red", "partial": "bold yellow", "done": "green", "interrupted": "yellow"}


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document, with the version of its schema."""
    text = json.dumps({"schema_version": SCHEMA_VERSION, **document}, ensure_ascii=False, indent=2, default=_encode)
    sys.stdout.write(text + "\n")


def _encode(value: object) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    raise TypeError(type(value).__name__)


def print_text(text: str) -> None:
    """Print plain words on stdout."""
    sys.stdout.write(printable(text) + "\n")


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> None:
    console = Console(highlight=False, soft_wrap=False)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell), style=_STYLES.get(cell, "")) for cell in row))
    console.print(table)


def print_settings(origins: Sequence[Origin], endpoints: dict[str, str]) -> None:
    """Print every variable with its value and place, then what the two endpoints resolve to."""
    _print_table(("variable", "value", "from"), [(o.variable, o.shown, o.where) for o in origins])
    print_text("")
    for name, label in endpoints.items():
        print_text(f"{name:<7} {label}")


def print_checks(results: Sequence[CheckDone]) -> None:
    """Print verdicts, the keys that differ, and the queries that disagree."""
    _print_table(
        ("check", "verdict", "what was found", "time"),
        [(r.name, r.verdict, r.summary, duration(r.seconds)) for r in results],
        right=("time",),
    )
    for result in results:
        keys = result.figures.get("keys")
        if isinstance(keys, list) and keys:
            total = result.figures.get("differing_rows")
            print_text("")
            title = f"differing keys ({len(keys)} of {total:,}):" if isinstance(total, int) else "differing keys:"
            print_text(title)
            _print_table(("difference", "key"), [(str(k["kind"]), str(k["key"])) for k in keys])
        disagreements = result.figures.get("disagreements")
        if isinstance(disagreements, list) and disagreements:
            print_text("")
            print_text("queries answered differently:")
            _print_table(("query", "reason"), [(str(d["query"]), str(d["reason"])) for d in disagreements])


def print_state(state: State) -> None:
    """Print runs and verdicts."""
    if not state.runs:
        print_text("no run yet. next: pipeline copy --from legacy --to main")
        return
    _print_table(
        ("run", "table", "phase", "slices", "rows", "size", "indexes", "began", "from"),
        [
            (
                str(run.id),
                run.table,
                run.phase,
                f"{run.slices_done}/{run.slices}",
                f"{run.rows:,}",
                size(run.bytes),
                f"{run.indexes_missing} to build"
                if run.indexes_missing
                else plural(run.indexes_deferred, "built").rstrip("s"),
                _moment(run.started),
                run.source,
            )
            for run in state.runs
        ],
        right=("run", "slices", "rows", "size"),
    )
    for run in state.runs:
        if run.holder:
            print_text(f"run {run.id} is held by {run.holder}")
    if state.verdicts:
        print_text("")
        _print_table(
            ("check", "verdict", "what was found", "at"),
            [(v.check, v.verdict, v.summary, _moment(v.at)) for v in state.verdicts],
        )


def _moment(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
