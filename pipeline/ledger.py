"""The ledger: runs, slices, deferred indexes and verdicts, in schema ``pipeline`` on the target.

Alembic makes the tables and nothing else does. Every function works inside the caller's transaction,
so that record and work commit together.
"""

import hashlib
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from psycopg2 import sql
from psycopg2.extras import execute_values

from pipeline import __version__
from pipeline.errors import BusyError, RefusedError, StatementError
from pipeline.events import CheckDone
from pipeline.postgres.database import Cursor, Session
from pipeline.postgres.indexes import Index
from pipeline.postgres.slices import Slice
from pipeline.postgres.tables import Table

# The revision of alembic/versions that this code is written for.
REVISION = "0004"
# A copier renews its lease every few seconds; one that is silent for this long has lost it.
LEASE_SECONDS = 30
RENEW_SECONDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One copy of one table. ``generation`` is the lease's: who holds another one commits nothing."""

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


def check_revision(session: Session) -> None:
    """Raise RefusedError unless the target's ledger is at the revision that this code knows."""
    with session.transaction(read_only=True) as cursor:
        cursor.execute(
            "SELECT pg_catalog.to_regclass('pipeline.alembic_version') IS NOT NULL,"
            " pg_catalog.to_regclass('pipeline.run') IS NOT NULL"
        )
        row = cursor.fetchone()
        if row is None or not row[0]:
            raise RefusedError(f"{session.label} has no ledger (schema pipeline)", "run: alembic upgrade head")
        cursor.execute("SELECT version_num FROM pipeline.alembic_version")
        found = [version for (version,) in cursor.fetchall()]
    if found != [REVISION] or not row[1]:
        raise RefusedError(
            f"the ledger of {session.label} is at revision {', '.join(found) or 'none'},"
            f" this pipeline needs {REVISION}",
            "run: alembic upgrade head, with the checkout that this pipeline was installed from",
        )


def fingerprint(source: Table, target: Table, columns: Sequence[str]) -> str:
    """Return a digest of what binds a run to its plan: both tables, and the columns with their types.

    The boundaries of the slices are not in it: a run keeps those that it was planned with.
    """
    parts = [
        source.server.system_identifier,
        source.server.database_oid,
        source.oid,
        target.oid,
        [[name, getattr(source.column(name), "type", None)] for name in columns],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


_RUN_COLUMNS = sql.SQL("""
    id, source_label, target_label, source_system, source_schema || '.' || source_table,
    target_schema || '.' || target_table, fingerprint, slice_bytes, lease_generation,
    started_at, loaded_at, finished_at, source_horizon, target_horizon, reconciled_rows
""")


def latest_run(cursor: Cursor, target: Table) -> Run | None:
    """Return the unfinished run into a table, else its last finished one; abandoned ones do not count."""
    cursor.execute(
        sql.SQL(
            "SELECT {} FROM pipeline.run WHERE target_schema = %s AND target_table = %s AND abandoned_at IS NULL"
            " ORDER BY finished_at IS NULL DESC, id DESC LIMIT 1"
        ).format(_RUN_COLUMNS),
        (target.schema, target.name),
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
) -> Run:
    """Record a run and its slices. Raises BusyError where another one was recorded just now.

    ``horizons`` are the source's and the target's, taken before anything was read.
    """
    cursor.execute(
        sql.SQL(
            "INSERT INTO pipeline.run (source_label, target_label, source_system, source_database, source_schema,"
            " source_table, source_oid, target_schema, target_table, target_oid, column_names, column_types,"
            " key_columns, slice_bytes, fingerprint, source_horizon, target_horizon, tool_version)"
            " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
            " ON CONFLICT DO NOTHING RETURNING {}"
        ).format(_RUN_COLUMNS),
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
        ),
    )
    row = cursor.fetchone()
    if row is None:
        raise BusyError(f"another copy into {target.qualified} began at this moment", "pipeline status shows it")
    run = _run(row)
    execute_values(
        cursor,
        "INSERT INTO pipeline.slice (run_id, ordinal, kind, lower, upper) VALUES %s",
        [(run.id, part.ordinal, "pages", part.lower, part.upper) for part in slices],
    )
    return run


def _run(row: Sequence[Any]) -> Run:
    return Run(**dict(zip((field.name for field in fields(Run)), row, strict=True)))


def abandon_run(cursor: Cursor, run: Run) -> None:
    """Mark an unfinished run as given up; its slices and definitions stay to be read."""
    cursor.execute(
        "UPDATE pipeline.run SET abandoned_at = pg_catalog.clock_timestamp() WHERE id = %s AND finished_at IS NULL",
        (run.id,),
    )


# ---------------------------------------------------------------- lease


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a lease, whether that session is still there, and for how many seconds it holds."""

    owner: str
    alive: bool
    seconds: float


def owner() -> str:
    """Return this process as an operator would look for it: host and process id."""
    return f"{socket.gethostname()} pid {os.getpid()}"


def read_holder(cursor: Cursor, run: Run) -> Holder | None:
    """Return the lease's holder, or None where it is free or ran out.

    The holder's own backend tells at once that a killed copier is gone. Behind a transaction pooler
    the backend is the pooler's and lives on: there the lease has to run out.
    """
    cursor.execute(
        "SELECT r.lease_owner, a.pid IS NOT NULL,"
        " EXTRACT(epoch FROM r.lease_until - pg_catalog.clock_timestamp())::pg_catalog.float8"
        " FROM pipeline.run r LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = r.lease_backend"
        " WHERE r.id = %s AND r.lease_owner IS NOT NULL AND r.lease_until > pg_catalog.clock_timestamp()",
        (run.id,),
    )
    row = cursor.fetchone()
    return None if row is None else Holder(owner=row[0], alive=row[1], seconds=row[2])


def take_lease(cursor: Cursor, run: Run) -> int | None:
    """Take the lease if it is free, ran out, or its holder's session is gone; return the generation.

    FOR UPDATE waits for every slice transaction of the old generation (they hold FOR KEY SHARE): when
    this returns, none of them can commit any more. Raises ConflictError after the lock timeout.
    """
    cursor.execute("SELECT id FROM pipeline.run WHERE id = %s FOR UPDATE", (run.id,))
    holder = read_holder(cursor, run)
    if holder is not None and holder.alive:
        return None
    cursor.execute(
        "UPDATE pipeline.run SET lease_generation = lease_generation + 1, lease_owner = %s,"
        " lease_backend = pg_catalog.pg_backend_pid(),"
        " lease_until = pg_catalog.clock_timestamp() + pg_catalog.make_interval(secs => %s)"
        " WHERE id = %s RETURNING lease_generation",
        (owner(), LEASE_SECONDS, run.id),
    )
    row = cursor.fetchone()
    assert row is not None
    return int(row[0])


def renew_lease(cursor: Cursor, run_id: int, generation: int) -> None:
    """Hold the lease for longer. Raises BusyError where somebody else has taken it over."""
    cursor.execute(
        "UPDATE pipeline.run SET lease_backend = pg_catalog.pg_backend_pid(),"
        " lease_until = pg_catalog.clock_timestamp() + pg_catalog.make_interval(secs => %s)"
        " WHERE id = %s AND lease_generation = %s",
        (LEASE_SECONDS, run_id, generation),
    )
    if cursor.rowcount != 1:
        raise lease_lost()


def release_lease(cursor: Cursor, run_id: int, generation: int) -> None:
    """Give the lease back, if it is still ours."""
    cursor.execute(
        "UPDATE pipeline.run SET lease_owner = NULL, lease_backend = NULL, lease_until = NULL"
        " WHERE id = %s AND lease_generation = %s",
        (run_id, generation),
    )


# Sent with BEGIN of every transaction that writes rows: while it is open, nobody can take the lease over.
GUARD_SQL = "SELECT id FROM pipeline.run WHERE id = {} AND lease_generation = {} FOR KEY SHARE"


def check_guard(cursor: Cursor) -> None:
    """Raise BusyError unless the guard, sent with BEGIN, found our generation."""
    if cursor.rowcount != 1:
        raise lease_lost()


def lease_lost() -> BusyError:
    """Return the error of a copier whose lease somebody else holds now."""
    return BusyError("another copy took this run over; nothing more was written here", "pipeline status shows it")


# ---------------------------------------------------------------- slices and indexes


def read_slices(cursor: Cursor, run_id: int) -> tuple[Slice, ...]:
    """Return the run's slices in order, as they were cut when it was planned."""
    cursor.execute(
        "SELECT ordinal, lower, upper, rows FROM pipeline.slice WHERE run_id = %s ORDER BY ordinal", (run_id,)
    )
    return tuple(
        Slice(
            ordinal=ordinal,
            lower=None if lower is None else int(lower),
            upper=None if upper is None else int(upper),
            rows=rows,
        )
        for ordinal, lower, upper, rows in cursor.fetchall()
    )


def slice_mark(cursor: Cursor, run_id: int, ordinal: int) -> tuple[int, int] | None:
    """Return rows and bytes of a slice that is done, else None: read after a lost COMMIT, never guessed."""
    cursor.execute(
        "SELECT rows, bytes FROM pipeline.slice WHERE run_id = %s AND ordinal = %s AND finished_at IS NOT NULL",
        (run_id, ordinal),
    )
    row = cursor.fetchone()
    return None if row is None else (row[0], row[1])


def finish_slice(cursor: Cursor, run_id: int, part: Slice, rows: int, size: int, attempts: int) -> None:
    """Set a slice's mark, in the transaction that brought its rows.

    Raises StatementError where it is set already: then that transaction must not commit.
    """
    cursor.execute(
        "UPDATE pipeline.slice SET rows = %s, bytes = %s, attempts = attempts + %s,"
        " finished_at = pg_catalog.clock_timestamp()"
        " WHERE run_id = %s AND ordinal = %s AND finished_at IS NULL",
        (rows, size, attempts, run_id, part.ordinal),
    )
    if cursor.rowcount != 1:
        raise StatementError(f"slice {part.ordinal} was finished by somebody else", "pipeline status")


def add_reconciled(cursor: Cursor, run_id: int, rows: int) -> None:
    """Count rows that a reconcile added (or, negative, took away), in the transaction that did it.

    So the rows of the slices and these are the rows that the run brought, at every commit.
    """
    cursor.execute("UPDATE pipeline.run SET reconciled_rows = reconciled_rows + %s WHERE id = %s", (rows, run_id))


def move_horizon(cursor: Cursor, run_id: int, source_horizon: int) -> None:
    """Record that everything before a source horizon was looked at, after the pass that did it."""
    cursor.execute("UPDATE pipeline.run SET source_horizon = %s WHERE id = %s", (source_horizon, run_id))


def rows_brought(cursor: Cursor, run_id: int) -> int:
    """Return how many rows of the target's table the run brought, by its own books."""
    cursor.execute(
        "SELECT reconciled_rows + (SELECT coalesce(sum(s.rows), 0) FROM pipeline.slice s WHERE s.run_id = r.id)"
        " FROM pipeline.run r WHERE r.id = %s",
        (run_id,),
    )
    row = cursor.fetchone()
    assert row is not None
    return int(row[0])


def mark_loaded(cursor: Cursor, run_id: int) -> None:
    """Record that every slice is done. The database refuses to finish a run before."""
    cursor.execute(
        "UPDATE pipeline.run SET loaded_at = pg_catalog.clock_timestamp() WHERE id = %s AND loaded_at IS NULL"
        " AND NOT EXISTS (SELECT 1 FROM pipeline.slice s WHERE s.run_id = run.id AND s.finished_at IS NULL)",
        (run_id,),
    )


def mark_finished(cursor: Cursor, run_id: int) -> None:
    """Record the run's end, and give the lease back."""
    cursor.execute(
        "UPDATE pipeline.run SET finished_at = pg_catalog.clock_timestamp(), lease_owner = NULL,"
        " lease_backend = NULL, lease_until = NULL WHERE id = %s",
        (run_id,),
    )


def defer_index(cursor: Cursor, run_id: int, index: Index) -> None:
    """Record an index's definition; the caller drops it in the same transaction."""
    cursor.execute(
        "INSERT INTO pipeline.deferred_index (run_id, index_schema, index_name, definition, comment)"
        " VALUES (%s, %s, %s, %s, %s) ON CONFLICT (run_id, index_schema, index_name) DO UPDATE"
        " SET definition = EXCLUDED.definition, comment = EXCLUDED.comment, rebuilt_at = NULL",
        (run_id, index.schema, index.name, index.definition, index.comment),
    )


def indexes_to_rebuild(cursor: Cursor, target: Table) -> tuple[Index, ...]:
    """Return the table's deferred indexes that do not stand again yet, of whichever run."""
    cursor.execute(
        "SELECT DISTINCT ON (d.index_schema, d.index_name) d.index_schema, d.index_name, d.definition, d.comment"
        " FROM pipeline.deferred_index d JOIN pipeline.run r ON r.id = d.run_id"
        " WHERE r.target_schema = %s AND r.target_table = %s AND d.rebuilt_at IS NULL"
        " ORDER BY d.index_schema, d.index_name, d.run_id DESC",
        (target.schema, target.name),
    )
    return tuple(
        Index(schema=schema, name=name, definition=definition, comment=comment)
        for schema, name, definition, comment in cursor.fetchall()
    )


def mark_rebuilt(cursor: Cursor, index: Index) -> None:
    """Record that a deferred index stands again."""
    cursor.execute(
        "UPDATE pipeline.deferred_index SET rebuilt_at = pg_catalog.clock_timestamp()"
        " WHERE index_schema = %s AND index_name = %s AND rebuilt_at IS NULL",
        (index.schema, index.name),
    )


def record_verdict(
    cursor: Cursor, result: CheckDone, target: Table, labels: tuple[str, str], horizons: tuple[int, int]
) -> None:
    """Store a check's verdict with the horizons that it speaks of."""
    cursor.execute(
        "INSERT INTO pipeline.verdict (run_id, source_label, target_label, target_schema, target_table,"
        " check_name, verdict, figures, source_horizon, target_horizon)"
        " VALUES ((SELECT pg_catalog.max(id) FROM pipeline.run WHERE target_schema = %s AND target_table = %s),"
        " %s, %s, %s, %s, %s, %s, %s, %s, %s)",
        (
            target.schema,
            target.name,
            *labels,
            target.schema,
            target.name,
            result.name,
            result.verdict,
            json.dumps({"summary": result.summary, "seconds": round(result.seconds, 3), **result.figures}),
            *horizons,
        ),
    )
