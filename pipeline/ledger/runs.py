"""Runs: found, recorded, bound to their plan, and closed."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from psycopg2 import sql

from pipeline import __version__
from pipeline.errors import BusyError, RefusedError, StatementError
from pipeline.ledger.marks import insert_slices_sql
from pipeline.postgres.database import Cursor, Session
from pipeline.postgres.slices import Slice
from pipeline.postgres.tables import Table
from pipeline.settings import TableMapping

# The revision of alembic/versions that this code is written for.
REVISION = "0007"
# SQLSTATE of a schema and of a table that does not exist.
_NOT_THERE = frozenset({"3F000", "42P01"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One copy of one table. ``generation`` is the lease's: who holds another one commits nothing.

    ``rows_before`` is how many rows the target's table had when the run was planned; more than none
    means that it is in use, and not only the run's.
    """

    id: int
    source_label: str
    target_label: str
    source_system: int
    source_table: str
    target_table: str
    fingerprint: str
    slice_bytes: int
    generation: int
    started: datetime
    loaded: datetime | None
    finished: datetime | None
    source_horizon: int
    target_horizon: int
    reconciled_rows: int
    rows_before: int


def check_revision(session: Session) -> None:
    """Raise RefusedError unless the target's ledger is at the revision that this code knows."""
    try:
        rows = session.rows(
            "SELECT version_num, pg_catalog.to_regclass('pipeline.run') IS NOT NULL FROM pipeline.alembic_version"
        )
    except StatementError as error:
        if error.sqlstate not in _NOT_THERE:
            raise
        raise RefusedError(
            f"{session.label} has no ledger (schema pipeline)",
            "run: alembic upgrade head"
            if session.endpoint.name == "main"
            else "a sync makes it by --init-target; else point DB_* at this server, and run: alembic upgrade head",
        ) from error
    found = [version for version, _ in rows]
    if rows != [(REVISION, True)]:
        raise RefusedError(
            f"the ledger of {session.label} is at revision {', '.join(found) or 'none'},"
            f" this pipeline needs {REVISION}",
            "run: alembic upgrade head, with the checkout that this pipeline was installed from",
        )


def fingerprint(source: Table, target: Table, columns: Sequence[str]) -> str:
    """Return a digest of what binds a run to its plan: both tables, and the columns with their types.

    A table's partitions are in it, since slices name them. The boundaries of the slices are not: a run
    keeps those that it was planned with.
    """
    parts = [
        source.server.system_identifier,
        source.server.database_oid,
        source.oid,
        [heap.oid for heap in source.heaps],
        target.oid,
        [[name, *(getattr(table.column(name), "type", None) for table in (source, target))] for name in columns],
        list(target.key),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


_RUN_COLUMNS = sql.SQL("""
    id, source_label, target_label, source_system, source_schema || '.' || source_table AS source,
    target_schema || '.' || target_table AS target, fingerprint, slice_bytes, lease_generation,
    started_at, loaded_at, finished_at, source_horizon, target_horizon, reconciled_rows,
    rows_before
""")


def latest_run(cursor: Cursor, target: TableMapping, kind: str = "copy") -> Run | None:
    """Return the unfinished run into a table, else its last finished one; abandoned ones do not count.

    ``kind`` is ``copy``, or ``sync`` for what keeps the books of rows that came by their keys alone.
    """
    cursor.execute(
        sql.SQL(
            "SELECT {} FROM pipeline.run WHERE target_schema = %s AND target_table = %s AND abandoned_at IS NULL"
            " AND kind = %s ORDER BY finished_at IS NULL DESC, id DESC LIMIT 1"
        ).format(_RUN_COLUMNS),
        (target.schema, target.table, kind),
    )
    row = cursor.fetchone()
    return None if row is None else _run(row)


def create_run(
    cursor: Cursor,
    source: Table,
    target: Table,
    labels: tuple[str, str],
    columns: Sequence[str],
    slices: Sequence[Slice],
    slice_bytes: int,
    horizons: tuple[int, int],
    rows_before: int,
    kind: str = "copy",
) -> Run:
    """Record a run and its slices, by one statement. Raises BusyError where another one was recorded just now.

    ``horizons`` are the source's and the target's, taken before anything was read. A run of kind ``sync`` has
    no slices, and nothing to finish.
    """
    cursor.execute(
        sql.SQL(
            "WITH new AS (INSERT INTO pipeline.run (source_label, target_label, source_system, source_database,"
            " source_schema, source_table, source_oid, target_schema, target_table, target_oid, column_names,"
            " column_types, key_columns, slice_bytes, fingerprint, source_horizon, target_horizon, tool_version,"
            " rows_before, kind, loaded_at, finished_at) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s,"
            " %s, %s, %s, %s, %s, %s, %s, {ended}, {ended})"
            " ON CONFLICT DO NOTHING RETURNING {run}), parts AS ({parts}) SELECT * FROM new"
        ).format(
            run=_RUN_COLUMNS,
            parts=insert_slices_sql("new", slices),
            ended=sql.SQL("pg_catalog.clock_timestamp()" if kind == "sync" else "NULL"),
        ),
        (
            *labels,
            source.server.system_identifier,
            labels[0].rsplit("/", 1)[-1],
            source.schema,
            source.name,
            source.oid,
            target.schema,
            target.name,
            target.oid,
            list(columns),
            [getattr(source.column(name), "type", "") for name in columns],
            list(target.key),
            slice_bytes,
            fingerprint(source, target, columns),
            *horizons,
            __version__,
            rows_before,
            kind,
        ),
    )
    row = cursor.fetchone()
    if row is None:
        raise BusyError(f"another copy into {target.qualified} began at this moment", "pipeline status shows it")
    return _run(row)


def _run(row: Sequence[Any]) -> Run:
    return Run(**dict(zip((field.name for field in fields(Run)), row, strict=True)))


def abandon_run(cursor: Cursor, run: Run) -> None:
    """Mark an unfinished run as given up; its slices and definitions stay to be read."""
    cursor.execute(
        "UPDATE pipeline.run SET abandoned_at = pg_catalog.clock_timestamp() WHERE id = %s AND finished_at IS NULL",
        (run.id,),
    )


def add_reconciled(cursor: Cursor, run_id: int, rows: int) -> None:
    """Count rows that a reconcile added (or, negative, took away), in the transaction that did it.

    So the rows of the slices and these are the rows that the run brought, at every commit; and the
    transaction is known for one of the run's.
    """
    cursor.execute(
        "UPDATE pipeline.run SET reconciled_rows = reconciled_rows + %s, reconciled_xids = reconciled_xids"
        " OPERATOR(pg_catalog.||) pg_catalog.pg_current_xact_id()::pg_catalog.text::pg_catalog.int8 WHERE id = %s",
        (rows, run_id),
    )


def move_horizon(cursor: Cursor, run_id: int, generation: int, source_horizon: int) -> None:
    """Record that everything before a source horizon was looked at; whoever has lost the lease changes nothing."""
    cursor.execute(
        "UPDATE pipeline.run SET source_horizon = %s WHERE id = %s AND lease_generation = %s",
        (source_horizon, run_id, generation),
    )


# How many rows of the target's table the run brought, by its own books.
ROWS_BROUGHT_SQL = """
SELECT r.reconciled_rows + (SELECT coalesce(pg_catalog.sum(s.rows), 0) FROM pipeline.slice s WHERE s.run_id = r.id)
FROM pipeline.run r WHERE r.id = %(run)s
"""


def mark_loaded(cursor: Cursor, run_id: int) -> None:
    """Record that every slice is done. The database refuses to finish a run before."""
    cursor.execute(
        "UPDATE pipeline.run SET loaded_at = pg_catalog.clock_timestamp() WHERE id = %s AND loaded_at IS NULL"
        " AND NOT EXISTS (SELECT 1 FROM pipeline.slice s WHERE s.run_id = run.id AND s.finished_at IS NULL)",
        (run_id,),
    )


def mark_finished(
    cursor: Cursor,
    run_id: int,
    generation: int,
    timelines: tuple[int | None, int | None],
    *,
    covered: bool,
    equal: bool,
) -> int:
    """Record the run's end and its pass, and give the lease back; return how many rows it brought, by its own books.

    ``timelines`` are those of the source and the target, ``covered`` and ``equal`` as of a pass. Whoever has lost
    the lease changes nothing.
    """
    cursor.execute(
        "WITH done AS (UPDATE pipeline.run SET finished_at = pg_catalog.clock_timestamp(), lease_owner = NULL,"
        " lease_backend = NULL, lease_until = NULL WHERE id = %s AND lease_generation = %s RETURNING *, reconciled_rows"
        " + (SELECT coalesce(pg_catalog.sum(s.rows), 0)::pg_catalog.int8 FROM pipeline.slice s"
        " WHERE s.run_id = run.id) AS rows_brought),"
        " noted AS (INSERT INTO pipeline.pass (kind, run_id, source_label, target_label, target_schema, target_table,"
        " fingerprint, covered, equal, source_horizon, target_horizon) SELECT 'copy', id, source_label, target_label,"
        " target_schema, target_table, fingerprint, %s, %s,"
        " pg_catalog.jsonb_build_object('horizon', source_horizon, 'timeline', %s::pg_catalog.int8),"
        " pg_catalog.jsonb_build_object('horizon', target_horizon, 'timeline', %s::pg_catalog.int8,"
        " 'rows', CASE WHEN rows_before = 0 THEN rows_brought END) FROM done)"
        " SELECT rows_brought FROM done",
        (run_id, generation, covered, equal, *timelines),
    )
    row = cursor.fetchone()
    return 0 if row is None else int(row[0])
