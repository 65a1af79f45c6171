"""Before the first row: both sides described and checked, and the run found, continued or recorded."""

from dataclasses import dataclass, replace

from psycopg2 import sql

from pipeline import ledger
from pipeline.check.preflight import (
    carried_columns,
    check_tables,
    check_vector_dimensions,
    refuse_if_needed,
)
from pipeline.endpoints import Endpoint
from pipeline.errors import RefusedError
from pipeline.move.lease import end_lapsed_generations
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Cursor, Session, horizon
from pipeline.postgres.slices import Slice, plan
from pipeline.postgres.tables import Table, describe
from pipeline.settings import TableMapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a copy is about: both ends as they were found, the columns, the run and its slices."""

    source: Endpoint
    target: Endpoint
    mapping: TableMapping
    dimensions: int
    source_table: Table
    target_table: Table
    columns: tuple[str, ...]
    run: ledger.Run
    resumed: bool
    slices: tuple[Slice, ...]

    @property
    def tables(self) -> tuple[Table, Table]:
        """Return both descriptions, the source's first."""
        return self.source_table, self.target_table


def read_pair(
    source: Session, target: Session, mapping: TableMapping, dimensions: int
) -> tuple[Table, Table, tuple[str, ...]]:
    """Describe and check both tables; return them, the source's key in the target's order, and the columns.

    Raises RefusedError with everything that stands in the way. Nothing is written.
    """
    there = describe(target, mapping)
    here = describe(source, mapping)
    names = (source.endpoint.name, target.endpoint.name)
    refuse_if_needed(check_tables(here, there, mapping, dimensions, names))
    refuse_if_needed(check_vector_dimensions(source, here, mapping, dimensions))
    return replace(here, key=there.key), there, carried_columns(here, there)


def prepare(
    crew: Crew,
    source: Endpoint,
    target: Endpoint,
    mapping: TableMapping,
    dimensions: int,
    slice_bytes: int,
    restart: bool,
) -> Job:
    """Check everything, then continue the unfinished run, find the finished one, or record a new one."""
    with crew.session(source, "copy") as here, crew.session(target, "copy") as there:
        ledger.check_revision(there)
        end_lapsed_generations(there)
        source_table, target_table, columns = read_pair(here, there, mapping, dimensions)
        # Taken before anything is read: what a later transaction changes is found from here.
        with here.transaction(read_only=True) as cursor:
            source_horizon = horizon(cursor)
        with there.transaction() as cursor:
            run = ledger.latest_run(cursor, target_table)
            if run is not None and restart and run.finished is None:
                ledger.abandon_run(cursor, run)
                run = None
            empty = _is_empty(cursor, target_table)
            if run is not None and run.finished is not None and empty:
                run = None
            resumed = run is not None
            if run is None:
                if not empty:
                    raise _not_empty(cursor, there, target_table)
                run = ledger.create_run(
                    cursor,
                    source_table,
                    target_table,
                    (source.label, target.label),
                    columns,
                    plan(source_table.pages, source_table.bytes, slice_bytes),
                    slice_bytes,
                    (source_horizon, horizon(cursor)),
                )
            elif run.fingerprint != ledger.fingerprint(source_table, target_table, columns):
                raise _other_plan(run, there, source_table)
            slices = ledger.read_slices(cursor, run.id)
    return Job(
        source=source,
        target=target,
        mapping=mapping,
        dimensions=dimensions,
        source_table=source_table,
        target_table=target_table,
        columns=columns,
        run=run,
        resumed=resumed,
        slices=slices,
    )


def check_foreign_rows(session: Session, job: Job) -> None:
    """Refuse to go on where the target's table holds other rows than the run's books say.

    One scan of the heap, under the lease: nobody else writes rows for this run now.
    """
    with session.transaction(read_only=True) as cursor:
        found = count_rows(cursor, job.target_table)
        brought = ledger.rows_brought(cursor, job.run.id)
    where = f"{session.label}'s {job.target_table.qualified}"
    if found > brought:
        raise RefusedError(
            f"{where} holds {found - brought} rows that this run did not bring",
            "see what wrote them; take them out, or TRUNCATE the table and run: pipeline copy --restart",
        )
    if found < brought:
        raise RefusedError(
            f"{where} has lost {brought - found} of the {brought} rows that this run brought",
            f"TRUNCATE {job.target_table.qualified}, then run: pipeline copy --restart",
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
    return RefusedError(
        f"{session.label}'s {table.qualified} is not empty: {count_rows(cursor, table)} rows that no run brought",
        f"copy fills an empty table; if these rows may go: TRUNCATE {table.qualified}",
    )


def _other_plan(run: ledger.Run, session: Session, source: Table) -> RefusedError:
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
