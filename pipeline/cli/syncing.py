"""Commands that make one side equal to the other, and that list what differs."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import click

from pipeline import options
from pipeline.cli.observing import observed
from pipeline.cli.parameters import (
    ends_options,
    env_file_option,
    ignore_option,
    json_option,
    rounding_option,
    settle_option,
    workers_option,
)
from pipeline.errors import EXIT_DIFFERENCES, EXIT_OK
from pipeline.events import Differing, Event, SyncDone
from pipeline.settings import Route, Settings

_deep = click.option("--deep", is_flag=True, help="Compare every row, also where it is known which were written since.")
_workers = workers_option("Sessions that read each side while all rows are compared.", default=1)


def _write_differences(event: Event) -> None:
    """Write differences to stdout, a line of JSON each."""
    if isinstance(event, Differing):
        for kind, key, columns, deed in event.rows:
            line: dict[str, Any] = {"kind": kind, "key": list(key)}
            if columns:
                line["columns"] = list(columns)
            if deed:
                line["sync"] = deed
            sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")


def _list(route: Route, chosen: options.SyncOptions, ends: str, *, for_sync: bool) -> NoReturn:
    """List what differs on stdout, its numbers on stderr, and end."""
    from pipeline.move.listing import list_differences
    from pipeline.show.words import sync_summary

    (done,) = observed(list_differences(route, chosen, for_sync=for_sync), SyncDone, seen=_write_differences)
    sys.stdout.flush()
    sys.stderr.write(sync_summary(done, ends) + "\n")
    sys.exit(EXIT_OK if done.equal else EXIT_DIFFERENCES)


@click.command()
@ends_options
@env_file_option
@_deep
@_workers
@settle_option
@ignore_option
@rounding_option
def diff(
    source: str,
    target: str,
    env_files: tuple[Path, ...],
    deep: bool,
    workers: int,
    settle: float,
    ignore_columns: tuple[str, ...],
    rounding: bool,
) -> None:
    """List the rows that differ: a line of JSON each on stdout, with kind, key and columns.

    Both sides are only read. Only rows are looked at that were written since a copy, a sync or a verify
    found both sides equal, on either of them; all rows where there was no such pass, or with --deep. Ends
    with exit code 3 where anything differs.
    """
    route = Settings.load(env_files).route(source, target, ignore_columns, rounding=rounding)
    chosen = options.SyncOptions(deep=deep, workers=workers, settle_seconds=settle)
    _list(route, chosen, _ends(source, target), for_sync=False)


@click.command()
@ends_options
@env_file_option
@_deep
@click.option("--delete", is_flag=True, help="Delete rows that only the target has, also those that no run brought.")
@click.option(
    "--on-conflict",
    type=click.Choice(["keep", "overwrite"]),
    default="keep",
    show_default=True,
    help="What becomes of a row of the target that somebody else wrote, with other content than the source's.",
)
@click.option("--dry-run", is_flag=True, help="List what would be written, a line of JSON each; write nothing.")
@click.option("--init-target", is_flag=True, help="Make the ledger (schema pipeline) on the target first.")
@_workers
@click.option("--restart", is_flag=True, help="Begin an interrupted comparison anew.")
@ignore_option
@rounding_option
@json_option
def sync(
    source: str,
    target: str,
    env_files: tuple[Path, ...],
    deep: bool,
    delete: bool,
    on_conflict: options.OnConflict,
    dry_run: bool,
    init_target: bool,
    workers: int,
    restart: bool,
    ignore_columns: tuple[str, ...],
    rounding: bool,
    as_json: bool,
) -> None:
    """Make the target's rows equal to the source's, in either direction.

    Only rows are looked at that were written since both sides were equal; all rows where that is not
    known, or with --deep. Nothing is written where nothing differs. A row that only the target has goes if
    a copy or a sync brought it and nobody has written it since; others stay, and are told. Interrupted, it
    is run again. Ends with exit code 3 where something stays different, or the source still changes.
    """
    from pipeline.move.sync import sync as engine_sync
    from pipeline.show.plain import print_json, print_text
    from pipeline.show.words import sync_summary

    settings = Settings.load(env_files)
    route = settings.route(source, target, ignore_columns, rounding=rounding)
    chosen = options.SyncOptions(deep=deep, delete=delete, on_conflict=on_conflict, workers=workers, restart=restart)
    if dry_run:
        _list(route, chosen, _ends(source, target), for_sync=True)
    if init_target:
        from pipeline.install import install_ledger

        install_ledger(route.target, settings)
    (done,) = observed(engine_sync(route, chosen), SyncDone)
    if as_json:
        print_json({"sync": asdict(done)})
    else:
        print_text(sync_summary(done, _ends(source, target)))
    sys.exit(EXIT_OK if done.equal else EXIT_DIFFERENCES)


def _ends(source: str, target: str) -> str:
    """Return the ends as the next command has to name them: not at all where they are the usual ones."""
    return "" if (source, target) == ("legacy", "main") else f" --from {source} --to {target}"
