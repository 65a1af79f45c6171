"""Deferred indexes: recorded and dropped before the load, and standing again after it."""

import threading
from contextlib import suppress

from psycopg2 import sql

from pipeline.endpoints import Endpoint
from pipeline.errors import PipelineError, StatementError
from pipeline.events import IndexBuilt, IndexDeferred, IndexProgress, Warned
from pipeline.failpoints import failpoint
from pipeline.ledger import leases, marks
from pipeline.move.lease import Lease
from pipeline.options import CopyOptions
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Session, clock
from pipeline.postgres.indexes import (
    BuildPlan,
    Index,
    build_state,
    comment_sql,
    drop_sql,
    plan_build,
    read_progress,
    secondary_indexes,
)
from pipeline.postgres.tables import Table
from pipeline.settings import Route

PROGRESS_SECONDS = 0.5


def defer_indexes(session: Session, table: Table, lease: Lease) -> list[IndexDeferred]:
    """Record and drop the table's secondary indexes in one transaction."""
    with session.transaction(read_only=True, single=True) as cursor:
        if not secondary_indexes(cursor, table.oid):
            return []
    with session.transaction(then=lease.guard) as cursor:
        leases.check_guard(cursor)
        indexes = secondary_indexes(cursor, table.oid)
        for index in indexes:
            marks.defer_index(cursor, lease.run_id, index)
            cursor.execute(drop_sql(index.schema, index.name))
    failpoint("after_defer")
    return [IndexDeferred(name=index.name, definition=index.definition) for index in indexes]


def rebuild_indexes(
    crew: Crew, session: Session, route: Route, table: Table, options: CopyOptions, lease: Lease
) -> tuple[str, ...]:
    """Build every deferred index that does not stand, one after the other; return the names of all.

    A second connection watches the build.
    """
    with session.transaction(read_only=True, single=True) as cursor:
        indexes = marks.indexes_to_rebuild(cursor, table)
    for index in indexes:
        started = clock()
        _build(crew, session, route, table, index, options, lease)
        crew.emit(IndexBuilt(name=index.name, seconds=clock() - started))
    return tuple(index.name for index in indexes)


def _build(
    crew: Crew, session: Session, route: Route, table: Table, index: Index, options: CopyOptions, lease: Lease
) -> None:
    plan = _plan(session, table, route.dimensions, options)
    done = threading.Event()
    watcher = crew.start(_watch, crew, route.target, session.connection.get_backend_pid(), index.name, done)
    try:
        try:
            _build_once(session, index, plan, lease)
        except StatementError as error:
            # A parallel build keeps its graph in shared memory, of which a container has 64 MB.
            if "shared memory" not in error.fact or plan.workers == 0:
                raise
            crew.emit(Warned(fact=f"{error.fact}; index {index.name} is built by one process instead"))
            _build_once(session, index, BuildPlan(memory_bytes=plan.memory_bytes, workers=0), lease)
    finally:
        done.set()
    watcher.result()
    for notice in session.notices:
        if "no longer fits" in notice:
            crew.emit(
                Warned(
                    fact=f"index {index.name}: {notice.strip().splitlines()[0].removeprefix('NOTICE:').strip()}",
                    hint="raise maintenance_work_mem on the target for faster builds",
                )
            )
    session.notices.clear()


def _build_once(session: Session, index: Index, plan: BuildPlan, lease: Lease) -> None:
    """Build in one transaction with the mark, so that neither a half index nor a half record can stay."""
    with session.transaction(then=lease.guard) as cursor:
        leases.check_guard(cursor)
        state = build_state(cursor, index.schema, index.name)
        if state == "invalid":
            cursor.execute(drop_sql(index.schema, index.name))
        if state != "valid":
            cursor.execute(
                "SELECT pg_catalog.set_config('maintenance_work_mem', %s, true),"
                " pg_catalog.set_config('max_parallel_maintenance_workers', %s, true)",
                (f"{plan.memory_bytes // 1024}kB", str(plan.workers)),
            )
            cursor.execute(sql.SQL(index.definition))
            failpoint("in_index_build")
            cursor.execute(comment_sql(index))
        marks.mark_rebuilt(cursor, index)


def _plan(session: Session, table: Table, dimensions: int, options: CopyOptions) -> BuildPlan:
    ((memory, workers),) = session.rows(
        "SELECT (SELECT setting::pg_catalog.int8 * 1024 FROM pg_catalog.pg_settings"
        " WHERE name = 'maintenance_work_mem'),"
        " pg_catalog.current_setting('max_parallel_maintenance_workers')::pg_catalog.int4"
    )
    ((rows,),) = session.rows(sql.SQL("SELECT pg_catalog.count(*) FROM ONLY {}").format(table.identifier))
    assert table.extension is not None
    return plan_build(
        rows,
        dimensions,
        table.extension,
        BuildPlan(memory_bytes=memory, workers=workers),
        options.index_bytes,
        options.index_workers,
    )


def _watch(crew: Crew, target: Endpoint, backend: int, name: str, done: threading.Event) -> None:
    """Emit the build's progress from a second connection; a build goes on without one."""
    started = clock()
    with suppress(PipelineError), crew.session(target, "progress") as session:
        while not done.wait(PROGRESS_SECONDS):
            with session.transaction(read_only=True, single=True) as cursor:
                progress = read_progress(cursor, backend)
            if progress is not None:
                crew.emit(IndexProgress(name=name, phase=progress[0], fraction=progress[1], seconds=clock() - started))


def analyze(session: Session, table: Table) -> None:
    """Refresh the planner's statistics: an index on a table without them is not chosen."""
    with session.transaction(single=True) as cursor:
        cursor.execute(sql.SQL("ANALYZE {}").format(table.identifier))
