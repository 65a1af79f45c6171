"""Locks on a table that others hold: who they are, and how ours is waited for without holding up the rest.

A request for a lock makes all later ones wait behind it. So each wait is short, and a pause follows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pipeline.errors import ConflictError, RefusedError
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Cursor, Session, clock

T = TypeVar("T")
# What waits out writers alone, and what waits out everybody.
WRITERS, EVERYBODY = "SHARE ROW EXCLUSIVE", "ACCESS EXCLUSIVE"
PAUSE_SECONDS = 0.5
_WRITING = (
    *("RowExclusiveLock", "ShareUpdateExclusiveLock", "ShareLock"),
    *("ShareRowExclusiveLock", "ExclusiveLock", "AccessExclusiveLock"),
)
_IN_THE_WAY = {WRITERS: _WRITING, EVERYBODY: (*_WRITING, "AccessShareLock", "RowShareLock")}
# Others' state and kind are hidden from a plain role; a worker of the server is known by having no role of its own.
_HOLDERS_SQL = """
SELECT held.pid, COALESCE(NULLIF(a.application_name, ''), a.usename::pg_catalog.text, 'no name'), a.state,
       a.pid IS NOT NULL AND (a.usesysid IS NULL OR a.backend_type = 'autovacuum worker'),
       (SELECT p.gid FROM pg_catalog.pg_locks x JOIN pg_catalog.pg_prepared_xacts p ON p.transaction = x.transactionid
        WHERE held.pid IS NULL AND x.pid IS NULL AND x.virtualtransaction = held.virtualtransaction LIMIT 1)
FROM (SELECT DISTINCT l.pid, l.virtualtransaction FROM pg_catalog.pg_locks l
      WHERE l.locktype = 'relation' AND l.granted AND l.mode = ANY (%(modes)s)
        AND l.relation = ANY (%(oids)s::pg_catalog.oid[])
        AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())
        AND l.pid IS DISTINCT FROM pg_catalog.pg_backend_pid()) AS held
LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = held.pid
ORDER BY held.pid
"""
_DEADLOCK_SQL = (
    "SELECT setting::pg_catalog.int8 / 1000.0::pg_catalog.float8 FROM pg_catalog.pg_settings"
    " WHERE name = 'deadlock_timeout'"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a lock: a server process, or the prepared transaction ``gid``, which has none."""

    pid: int | None
    name: str
    state: str | None
    vacuums: bool
    gid: str | None

    def __str__(self) -> str:
        if self.pid is None:
            return f"prepared transaction {self.gid or 'without a name'}"
        return f"pid {self.pid} ({', '.join(filter(None, (self.name, self.state)))})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Waited:
    """How a lock was come by: attempts, seconds until the last of them, and seconds that this one took."""

    attempts: int = 0
    waited_seconds: float = 0.0
    last_seconds: float = 0.0


def read_holders(session: Session, oids: Sequence[int], mode: str) -> tuple[Holder, ...]:
    """Return who holds a lock on one of the tables, of this database, that stands in the way of ``mode``."""
    rows = session.rows(_HOLDERS_SQL, {"oids": list(oids), "modes": list(_IN_THE_WAY[mode])})
    return tuple(
        Holder(pid=pid, name=name, state=state, vacuums=vacuums, gid=gid) for pid, name, state, vacuums, gid in rows
    )


def named(holders: Sequence[Holder]) -> str:
    """Return the holders for people."""
    return ", ".join(map(str, holders)) or "another transaction, which has ended since"


def check_prepared(session: Session, oids: Sequence[int], what: str) -> None:
    """Raise RefusedError where a prepared transaction wrote one of the tables: it ends by hand alone."""
    gids = [one.gid or "" for one in read_holders(session, oids, WRITERS) if one.pid is None]
    if gids:
        fact = f"{session.label}: the prepared transaction {', '.join(map(repr, gids))} holds a lock on {what}"
        raise RefusedError(fact, "there, end it: COMMIT PREPARED 'name' or ROLLBACK PREPARED 'name'")


def under_lock(
    crew: Crew,
    session: Session,
    oids: Sequence[int],
    mode: str,
    work: Callable[[Cursor, float], T],
    *,
    what: str,
    wait_seconds: float,
    deadline_seconds: float,
) -> tuple[T, Waited]:
    """Do ``work``, which begins by locking, in one transaction; again after a pause while others are in the way.

    ``work`` gets how many seconds it may wait for a lock. One attempt is made also where the deadline is zero.
    Raises ConflictError with those who hold the lock at the deadline; StoppedError.
    """
    started = clock()
    attempts, seconds = 0, wait_seconds
    while True:
        attempts += 1
        crew.check()
        attempted = clock()
        try:
            with session.transaction() as cursor:
                done = work(cursor, seconds)
            return done, Waited(attempts=attempts, waited_seconds=attempted - started, last_seconds=clock() - attempted)
        except ConflictError as error:
            holders = read_holders(session, oids, mode)
            if clock() - started >= deadline_seconds:
                waited = f"{session.label}: {what} could not be locked within {deadline_seconds:g} seconds"
                fact = f"{waited}; in the way: {named(holders)}"
                raise ConflictError(fact, "end that transaction, or wait for it; then run the command again") from error
        # The server ends an autovacuum for us, but only after we waited for as long as it takes to suspect a deadlock.
        seconds = wait_seconds
        if any(one.vacuums for one in holders):
            ((deadlock,),) = session.rows(_DEADLOCK_SQL)
            seconds = max(wait_seconds, deadlock + wait_seconds)
        crew.pause(PAUSE_SECONDS)
