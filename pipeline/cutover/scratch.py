"""A rehearsal on scratch copies: both tables and the files are copied, and everything is done to the copies."""

import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from psycopg2 import sql

from pipeline.check.verify import verify
from pipeline.cutover.engine import REHEARSED, cutover, find_under_way, run_of
from pipeline.cutover.forward import refuse_differences
from pipeline.cutover.work import PURPOSE, Tools, begin, keep
from pipeline.endpoints import Endpoint
from pipeline.errors import RefusedError
from pipeline.events import CopyDone, CutoverDone, Event, StepDone, StepStarted, VerifyDone
from pipeline.ledger import cutovers
from pipeline.move.copy import copy
from pipeline.move.lease import Lease
from pipeline.options import DEFAULT_DEADLINE_SECONDS, CopyOptions, CutoverOptions, VerifyOptions
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import clock
from pipeline.postgres.fence import lift_fence
from pipeline.postgres.tables import describe
from pipeline.settings import MAX_IDENTIFIER_BYTES, Route, Settings, TableMapping, check_identifier

SUFFIX = "_scratch"
# By its comment a copy of ours is told from somebody's table of that name.
COMMENT = "A copy that pipeline cutover --rehearse --scratch works on; it may be dropped."
# Long enough to see that the watch works.
WATCH_SECONDS = 3.0
_OF_THE_LEDGER = ("run", "pass", "verdict", "comparison", "baseline", "cutover")


def rehearse_on_scratch(
    route: Route, settings: Settings, options: CutoverOptions, tools: Tools, stamp: str
) -> Generator[Event, None, None]:
    """Copy both tables, take every step with the copies, drop them; end with CutoverDone.

    The tables themselves and the .env files are only read. How long each step took is kept for the next plan.
    Needs room for a second table on either side, and the right to create one. Raises PipelineError.
    """
    copies = replace(route, table=_scratch_table(route.table))
    with Crew() as crew:
        found_under_way, _ = crew.call(find_under_way, crew, route)
    if found_under_way is not None:
        raise RefusedError(
            f"{found_under_way.kind} {found_under_way.id} of {route.table.qualified} has not ended",
            "end that first: pipeline cutover --execute goes on with a cutover, pipeline rollback --execute goes back",
        )
    with TemporaryDirectory(prefix="pipeline-scratch-") as folder, _dropped_at_the_end(copies):
        yield StepStarted(name="scratch", title="both tables are copied", number=1, steps=2)
        started = clock()
        yield from _fill(route, copies)
        yield StepDone(name="scratch", summary=f"{copies.table.qualified} on both sides", seconds=clock() - started)
        chosen = replace(
            options,
            env_files=tuple(_file_copies(options.env_files, Path(folder))),
            backup_folder=Path(folder, "backups"),
            after_switch=(),
            until=None,
            watch_seconds=min(options.watch_seconds, WATCH_SECONDS),
        )
        found: list[CutoverDone] = []
        for event in keep(cutover(copies, settings, chosen, tools, stamp), CutoverDone, found):
            if not isinstance(event, CutoverDone):
                yield event
        with Crew() as crew:
            crew.call(_keep_times, crew, route, found[0])
    yield replace(found[0], kind="rehearsal", outcome="rehearsed")


def _scratch_table(table: TableMapping) -> TableMapping:
    name = f"{table.table}{SUFFIX}"
    if wrong := check_identifier(name):
        raise RefusedError(
            f"the name of a copy, {name}, {wrong}",
            f"names have at most {MAX_IDENTIFIER_BYTES} bytes; leave --scratch out",
        )
    return replace(table, table=name)


def _file_copies(files: tuple[Path, ...], folder: Path) -> Iterator[Path]:
    """Copy the files, each with its mode, into a folder that only we read."""
    for number, file in enumerate(files):
        place = folder / f"{number}{file.name}"
        shutil.copy(file, place)
        yield place


@contextmanager
def _dropped_at_the_end(copies: Route) -> Iterator[None]:
    """Drop the copies, and what the ledger says of them, whatever happens."""
    with Crew() as crew:
        crew.call(_drop, crew, copies)
    try:
        yield
    finally:
        with Crew() as crew:
            crew.call(_drop, crew, copies)


def _drop(crew: Crew, copies: Route) -> None:
    for endpoint in (copies.source, copies.target):
        _drop_copy(crew, endpoint, copies.table)
    with crew.session(copies.target, PURPOSE) as session, session.transaction() as cursor:
        for name in _OF_THE_LEDGER:
            cursor.execute(
                sql.SQL("DELETE FROM {} WHERE target_schema = %s AND target_table = %s").format(
                    sql.Identifier("pipeline", name)
                ),
                (copies.table.schema, copies.table.table),
            )


def _drop_copy(crew: Crew, endpoint: Endpoint, copy_table: TableMapping) -> None:
    """Drop a copy of ours, its fence first. Raises RefusedError for somebody else's table of that name."""
    with crew.session(endpoint, PURPOSE) as session:
        found = session.rows(
            "SELECT pg_catalog.obj_description(c.oid, 'pg_class') FROM pg_catalog.pg_class c"
            " JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s",
            (copy_table.schema, copy_table.table),
        )
        if not found:
            return
        if found != [(COMMENT,)]:
            raise RefusedError(
                f"{session.label} has a table {copy_table.qualified} already, which is no copy of ours",
                "rename it, or rehearse without --scratch",
            )
        lift_fence(crew, session, describe(session, copy_table))
        with session.transaction() as cursor:
            cursor.execute(sql.SQL("DROP TABLE {}").format(sql.Identifier(copy_table.schema, copy_table.table)))


def _fill(route: Route, copies: Route) -> Generator[Event, None, None]:
    """Make both copies: legacy's by its server, main's by a copy of that one; then compare them."""
    with Crew() as crew:
        for endpoint, filled in ((route.source, True), (route.target, False)):
            made = crew.start(_make, crew, endpoint, route.table, copies.table, filled)
            yield from crew.follow([made])
    yield from _without(copy(copies, CopyOptions()), CopyDone)
    found: list[VerifyDone] = []
    yield from _without(keep(verify(copies, VerifyOptions()), VerifyDone, found), VerifyDone)
    refuse_differences(found[0], "the copies do not pass what a cutover asks for")


def _make(crew: Crew, endpoint: Endpoint, table: TableMapping, copy_table: TableMapping, filled: bool) -> None:
    names = {
        "copy": sql.Identifier(copy_table.schema, copy_table.table),
        "table": sql.Identifier(table.schema, table.table),
        "comment": sql.Literal(COMMENT),
    }
    with crew.session(endpoint, PURPOSE) as session:
        columns = [column.name for column in describe(session, table).columns if not column.generated]
        listed = sql.SQL(", ").join(map(sql.Identifier, columns))
        with session.transaction() as cursor:
            cursor.execute(sql.SQL("CREATE TABLE {copy} (LIKE {table} INCLUDING ALL)").format(**names))
            cursor.execute(sql.SQL("COMMENT ON TABLE {copy} IS {comment}").format(**names))
            if filled:
                cursor.execute(
                    sql.SQL(
                        "INSERT INTO {copy} ({columns}) OVERRIDING SYSTEM VALUE SELECT {columns} FROM {table}"
                    ).format(columns=listed, **names)
                )


def _without(events: Generator[Event, None, None], kind: type[Event]) -> Iterator[Event]:
    return (event for event in events if not isinstance(event, kind))


def _keep_times(crew: Crew, route: Route, done: CutoverDone) -> None:
    """Write down how long the steps took, as a rehearsal of the table itself."""
    lease = Lease(crew, route.target, run_of(crew, route), DEFAULT_DEADLINE_SECONDS)
    made = begin(crew, route, lease, "rehearsal", {"scratch": True})
    with crew.session(route.target, PURPOSE) as session, session.transaction(then=lease.guard) as cursor:
        for name, summary, seconds in done.steps:
            if name in REHEARSED:
                cutovers.intend_step(cursor, made.id, name, {"scratch": True})
                cutovers.finish_step(cursor, made.id, name, {"summary": summary, "seconds": seconds})
        cutovers.mark_ended(cursor, made.id, "rehearsed")
    lease.release()
