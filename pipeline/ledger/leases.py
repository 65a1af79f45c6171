"""The lease of a run: one copier at a time, and a generation without which nothing commits."""

import os
import socket
from dataclasses import dataclass

from psycopg2 import sql

from pipeline.errors import BusyError
from pipeline.ledger.runs import Run
from pipeline.postgres.database import Cursor

# A copier renews its lease every few seconds; one that is silent for this long has lost it.
LEASE_SECONDS = 30
RENEW_SECONDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a lease, whether that copier may still be there, and for how many seconds it holds."""

    owner: str
    alive: bool
    seconds: float


def owner() -> str:
    """Return this process as an operator would look for it: host and process id."""
    return f"{socket.gethostname()} pid {os.getpid()}"


def read_holder(cursor: Cursor, run: Run) -> Holder | None:
    """Return the lease's holder, or None where it is free or ran out.

    The holder's own backend tells at once that a killed copier is gone. Behind a transaction pooler no
    backend is its own, and none is written down: there the lease has to run out.
    """
    cursor.execute(
        "SELECT r.lease_owner, r.lease_backend IS NULL OR a.pid IS NOT NULL,"
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
    # Looked at before as well: behind a copier that lives, the lock would be waited for in vain.
    for lock in (False, True):
        if lock:
            cursor.execute("SELECT id FROM pipeline.run WHERE id = %s FOR UPDATE", (run.id,))
        holder = read_holder(cursor, run)
        if holder is not None and holder.alive:
            return None
    return _take(cursor, run, sql.SQL("true"))


def take_first_lease(cursor: Cursor, run: Run) -> int | None:
    """Take the lease of a run that was recorded just now, by one statement; None where somebody was faster."""
    return _take(cursor, run, sql.SQL("lease_generation = 0"))


def _take(cursor: Cursor, run: Run, condition: sql.Composable) -> int | None:
    cursor.execute(
        sql.SQL(
            "UPDATE pipeline.run SET lease_generation = lease_generation + 1, lease_owner = %s,"
            " lease_backend = CASE WHEN pg_catalog.pg_backend_pid() = %s THEN pg_catalog.pg_backend_pid() END,"
            " lease_until = pg_catalog.clock_timestamp() + pg_catalog.make_interval(secs => %s)"
            " WHERE id = %s AND {} RETURNING lease_generation"
        ).format(condition),
        (owner(), _announced(cursor), LEASE_SECONDS, run.id),
    )
    row = cursor.fetchone()
    return None if row is None else int(row[0])


def _announced(cursor: Cursor) -> int:
    """Return the process id that was announced when the connection was made; a pooler announces one of its own."""
    return int(cursor.connection.get_backend_pid())


def renew_lease(cursor: Cursor, run_id: int, generation: int) -> None:
    """Hold the lease for longer. Raises BusyError where somebody else has taken it over."""
    cursor.execute(
        "UPDATE pipeline.run SET"
        " lease_backend = CASE WHEN pg_catalog.pg_backend_pid() = %s THEN pg_catalog.pg_backend_pid() END,"
        " lease_until = pg_catalog.clock_timestamp() + pg_catalog.make_interval(secs => %s)"
        " WHERE id = %s AND lease_generation = %s",
        (_announced(cursor), LEASE_SECONDS, run_id, generation),
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
# The same where no answer can be read, because a COPY follows in the same round trip: it raises instead.
LEASE_LOST_STATE = "ZL001"
RAISING_GUARD_SQL = """
DO $guard$ BEGIN
    PERFORM id FROM pipeline.run WHERE id = {} AND lease_generation = {} FOR KEY SHARE;
    IF NOT FOUND THEN RAISE EXCEPTION 'the lease is lost' USING ERRCODE = 'ZL001'; END IF;
END $guard$;
"""


def check_guard(cursor: Cursor) -> None:
    """Raise BusyError unless the guard, sent with BEGIN, found our generation."""
    if cursor.rowcount != 1:
        raise lease_lost()


def lease_lost() -> BusyError:
    """Return the error of a copier whose lease somebody else holds now."""
    return BusyError("another copy took this run over; nothing more was written here", "pipeline status shows it")
