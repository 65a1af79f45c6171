"""The command that moves rows."""

from dataclasses import asdict
from pathlib import Path

import click

from pipeline import options
from pipeline.cli.observing import observed
from pipeline.cli.parameters import (
    conflict_option,
    ends_options,
    env_file_option,
    ignore_option,
    json_option,
    rounding_option,
    workers_option,
)
from pipeline.events import CopyDone, Retried
from pipeline.settings import Settings

MEGABYTE = 1_000_000


@click.command()
@ends_options
@env_file_option
@workers_option("Slices moved at the same time, each on two connections.")
@click.option(
    "--slice-size",
    type=click.IntRange(1, 1024),
    default=options.DEFAULT_SLICE_BYTES // 2**20,
    show_default=True,
    metavar="MIB",
    help="Aim at this many mebibytes a slice. A run keeps the slices that it was planned with.",
)
@click.option(
    "--deadline",
    type=click.FloatRange(0, 86_400),
    default=options.DEFAULT_DEADLINE_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="Try again for this long after a lost connection.",
)
@click.option(
    "--stall",
    type=click.FloatRange(0.5, 86_400),
    default=options.DEFAULT_STALL_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="Count a connection as lost when no byte moves through it for this long.",
)
@click.option(
    "--restart", is_flag=True, help="Give the unfinished run up and begin a new one, with what it brought in place."
)
@conflict_option
@click.option("--quarantine", is_flag=True, help="Set rows aside that cannot be carried, instead of refusing to begin.")
@click.option(
    "--settle",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="ROWS",
    help="After the load, bring what changed until a pass brings no more than so many rows.",
)
@click.option(
    "--max-rate", type=click.FloatRange(0.001), metavar="MB/S", help="Move at most this many megabytes a second."
)
@click.option(
    "--index-memory",
    type=click.IntRange(1, 1024 * 1024),
    metavar="MIB",
    help="maintenance_work_mem for building indexes.  [default: what the graph needs, up to 1 GiB]",
)
@click.option(
    "--index-workers",
    type=click.IntRange(0, 1024),
    metavar="N",
    help="Parallel processes for building indexes, beside the first.  [default: the server's own setting]",
)
@click.option("--dry-run", is_flag=True, help="Check everything and show the plan; write nothing.")
@ignore_option
@rounding_option
@json_option
def copy(
    source: str,
    target: str,
    env_files: tuple[Path, ...],
    workers: int,
    slice_size: int,
    deadline: float,
    stall: float,
    restart: bool,
    on_conflict: options.OnConflict,
    quarantine: bool,
    settle: int,
    max_rate: float | None,
    index_memory: int | None,
    index_workers: int | None,
    dry_run: bool,
    ignore_columns: tuple[str, ...],
    rounding: bool,
    as_json: bool,
) -> None:
    """Move all rows from one server to the other, each exactly once.

    Stopped at any point, by whatever means, the same command goes on where it was. Legacy is only
    read. Main gets the rows; the secondary indexes of an empty table are dropped first and built again
    afterwards. Rows that main has already stay, and its indexes with them.
    """
    from pipeline.move.copy import copy as engine_copy
    from pipeline.move.plan import preview
    from pipeline.show.plain import print_json, print_text
    from pipeline.show.words import copy_summary, preview_lines

    route = Settings.load(env_files).route(source, target, ignore_columns, rounding=rounding)
    chosen = options.CopyOptions(
        workers=workers,
        slice_bytes=slice_size * 2**20,
        deadline_seconds=deadline,
        stall_seconds=stall,
        restart=restart,
        max_bytes_per_second=None if max_rate is None else max_rate * MEGABYTE,
        index_bytes=None if index_memory is None else index_memory * 2**20,
        index_workers=index_workers,
        quarantine=quarantine,
        on_conflict=on_conflict,
        settle_rows=settle,
    )
    if dry_run:
        plan = preview(route, chosen)
        if as_json:
            print_json({"plan": asdict(plan)})
        else:
            print_text(preview_lines(plan, workers))
        return
    (done,) = observed(engine_copy(route, chosen), CopyDone)
    if as_json:
        print_json({"copy": asdict(done)})
    else:
        print_text(copy_summary(done))


@click.command()
@ends_options
@env_file_option
@click.option("--retry", "is_retry", is_flag=True, help="Bring the rows that can be carried by now.")
@conflict_option
@ignore_option
@rounding_option
@json_option
def quarantine(
    source: str,
    target: str,
    env_files: tuple[Path, ...],
    is_retry: bool,
    on_conflict: options.OnConflict,
    ignore_columns: tuple[str, ...],
    rounding: bool,
    as_json: bool,
) -> None:
    """Show the rows that a copy set aside (copy --quarantine), with key and reason.

    They lie in pipeline.quarantine on main, each with its values as texts. Corrected on legacy, or made
    room for on main, they are brought by --retry.
    """
    from pipeline.move.quarantine import retry
    from pipeline.show.plain import print_json, print_text
    from pipeline.show.quarantine import print_quarantine, retried_line
    from pipeline.status import read_quarantine_state

    route = Settings.load(env_files).route(source, target, ignore_columns, rounding=rounding)
    if is_retry:
        (done,) = observed(retry(route, options.CopyOptions(on_conflict=on_conflict)), Retried)
        if as_json:
            print_json({"retried": asdict(done)})
        else:
            print_text(retried_line(done))
        return
    found = read_quarantine_state(route)
    if as_json:
        print_json({"quarantine": asdict(found)})
    else:
        print_quarantine(found)
