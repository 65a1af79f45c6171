"""Before the first row: the run found, continued or recorded."""

from dataclasses import dataclass

from psycopg2 import sql

from pipeline.check.pair import Pair, read_pair
from pipeline.errors import RefusedError
from pipeline.ledger import marks, runs
from pipeline.move.lease import end_lapsed_generations
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Cursor, Session
from pipeline.postgres.slices import Slice, plan
from pipeline.postgres.tables import Table
from pipeline.settings import Route
from pipeline.wording import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a copy is about: the route, both tables as they were found, the run and its slices."""

    route: Route
    pair: Pair
    run: runs.Run
    resumed: bool
    slices: tuple[Slice, ...]


def prepare(crew: Crew, route: Route, slice_bytes: int, restart: bool) -> Job:
    """Check everything, then continue the unfinished run, find the finished one, or record a new one."""
    with crew.session(route.source, "copy") as source, crew.session(route.target, "copy") as target:
        runs.check_revision(target)
        end_lapsed_generations(target)
        pair = read_pair(source, target, route, to_write=True)
        with target.transaction() as cursor:
            run = _standing_run(cursor, target, pair, restart)
            resumed = run is not None
            if run is None:
                slices = plan(pair.source.pages, pair.source.bytes, slice_bytes)
                run = runs.create_run(
                    cursor, pair.source, pair.target, route.labels, pair.columns, slices, slice_bytes, pair.horizons
                )
            slices = marks.read_slices(cursor, run.id)
    return Job(route=route, pair=pair, run=run, resumed=resumed, slices=slices)


def _standing_run(cursor: Cursor, session: Session, pair: Pair, restart: bool) -> runs.Run | None:
    """Return the run to go on with, or None where a new one is to begin, into an empty table.

    Raises RefusedError where the run is bound to another plan, or where a table without one holds rows.
    """
    run = runs.latest_run(cursor, pair.target)
    empty = _is_empty(cursor, pair.target)
    if run is not None and run.finished is None and restart:
        runs.abandon_run(cursor, run)
        run = None
    if run is not None and run.finished is not None and empty:
        run = None
    if run is None:
        if not empty:
            raise _not_empty(cursor, session, pair.target)
        return None
    if run.fingerprint != runs.fingerprint(pair.source, pair.target, pair.columns):
        raise _other_plan(run, session, pair.source)
    return run


def check_foreign_rows(session: Session, job: Job) -> None:
    """Refuse to go on where the target's table holds other rows than the run's books say.

    One scan of the heap, under the lease: nobody else writes rows for this run now.
    """
    with session.transaction(read_only=True) as cursor:
        found = count_rows(cursor, job.pair.target)
        brought = runs.rows_brought(cursor, job.run.id)
    where = f"{session.label}'s {job.pair.target.qualified}"
    if found > brought:
        raise RefusedError(
            f"{where} holds {counted(found - brought, 'row')} that this run did not bring",
            "see what wrote them; take them out, or TRUNCATE the table and run: pipeline copy --restart",
        )
    if found < brought:
        raise RefusedError(
            f"{where} has lost {brought - found:,} of the {counted(brought, 'row')} that this run brought",
            f"TRUNCATE {job.pair.target.qualified}, then run: pipeline copy --restart",
        )


def count_rows(cursor: Cursor, table: Table) -> int:
    """Return the number of rows that this transaction sees."""
    cursor.execute(sql.SQL("SELECT pg_catalog.count(*) FROM ONLY {}").format(table.identifier))
    row = cursor.fetchone()
    assert row is not None
    return int(row[0])


def _is_empty(cursor: Cursor, table: Table) -> bool:
    cursor.execute(sql.SQL("SELECT NOT EXISTS (SELECT 1 FROM ONLY {})").format(table.identifier))
    row = cursor.fetchone()
    return bool(row and row[0])


def _not_empty(cursor: Cursor, session: Session, table: Table) -> RefusedError:
    rows = counted(count_rows(cursor, table), "row")
    return RefusedError(
        f"{session.label}'s {table.qualified} is not empty: {rows} that no run brought",
        f"copy fills an empty table; if these rows may go: TRUNCATE {table.qualified}",
    )


def _other_plan(run: runs.Run, session: Session, source: Table) -> RefusedError:
    state = "finished" if run.finished else "unfinished"
    what = (
        "that was another server"
        if run.source_system != source.server.system_identifier
        else "one of the tables was made anew since, or its columns have changed"
    )
    return RefusedError(
        f"the {state} run {run.id} into {run.target_table} copied {run.source_table} of {run.source_label}: {what}",
        f"empty {run.target_table} on {session.endpoint.name} and run: pipeline copy --restart",
    )
