"""What a side must offer for a copy to begin at all: a server that takes writes, and room for the sessions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from pipeline.check.preflight import Finding, Severity
from pipeline.endpoints import Endpoint
from pipeline.postgres.database import Session
from pipeline.postgres.facts import ServerIdentity, identity
from pipeline.wording import counted

Limit = Literal["server", "role", "database"]
# Beside two sessions of every worker (a lost one may linger while its successor is at work): the lease,
# the step under way, and the one that watches.
SESSIONS_BESIDE_WORKERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """How many sessions something takes on the source and on the target; with fewer than the least it does not end.

    It takes more with more ``workers``; where it has none, the least is all that it takes.
    """

    what: str
    least: tuple[int, int]
    most: tuple[int, int]
    workers: int = 0


def copy_need(workers: int) -> Need:
    """Return what a copy takes. Workers that find no room stay away.

    The pass over changed rows takes two sessions on each side, beside the lease and ANALYZE on the target.
    """
    most = 2 * workers + SESSIONS_BESIDE_WORKERS
    return Need(what="a copy", least=(2, 4), most=(most, most), workers=workers)


# As many as there are at a time at the most: forward with a backup, back, and in rehearsals.
CUTOVER_NEED = Need(what="a cutover", least=(5, 8), most=(5, 8))


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How many sessions are free by one limit."""

    limit: Limit
    free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Footing:
    """One side's server, and what it allows to ``role``; ``read_only`` is the role's default here.

    The texts that begin with ``quoted`` are names as a person types them in SQL.
    """

    endpoint: Endpoint
    server: ServerIdentity
    role: str
    quoted_role: str
    quoted_database: str
    in_recovery: bool
    read_only: bool
    rooms: tuple[Room, ...]

    @classmethod
    def found(
        cls,
        endpoint: Endpoint,
        system: int,
        started: str,
        database: int,
        role: str,
        quoted_role: str,
        quoted_database: str,
        in_recovery: bool,
        read_only: bool,
        *rooms: int | None,
    ) -> Self:
        """Make it of the row of FOOTING_SQL."""
        limits: tuple[Limit, ...] = ("server", "role", "database")
        return cls(
            endpoint=endpoint,
            server=identity(system, started, database),
            role=role,
            quoted_role=quoted_role,
            quoted_database=quoted_database,
            in_recovery=in_recovery,
            read_only=read_only,
            rooms=tuple(
                Room(limit=limit, free=free) for limit, free in zip(limits, rooms, strict=True) if free is not None
            ),
        )

    @property
    def room(self) -> Room:
        """Return the tightest limit."""
        return min(self.rooms, key=lambda room: room.free)

    def shares(self, limit: Limit, other: "Footing") -> bool:
        """Return whether a limit holds for both sides together."""
        mine, theirs = self.server, other.server
        return (
            (mine.system_identifier, mine.started) == (theirs.system_identifier, theirs.started)
            and (limit != "role" or self.role == other.role)
            and (limit != "database" or mine.database_oid == theirs.database_oid)
        )


# Limits of the role and the database do not bind a superuser, who may take the reserved sessions too.
# Whose a session is, and what it calls itself, shows to every role; what kind of backend it is does not.
# Sessions that only look are gone before a copy's workers come. Our own SET LOCAL does not show in reset_val.
FOOTING_SQL = """
WITH s AS (SELECT datid, usesysid FROM pg_catalog.pg_stat_activity
           WHERE datid IS NOT NULL AND pid <> pg_catalog.pg_backend_pid()
             AND application_name NOT IN
                 ('pipeline preflight', 'pipeline copy', 'pipeline cutover', 'pipeline lease')
             AND coalesce(backend_type, 'client backend') = 'client backend')
SELECT (SELECT system_identifier FROM pg_catalog.pg_control_system()),
       pg_catalog.pg_postmaster_start_time()::pg_catalog.text, d.oid::pg_catalog.int8, r.rolname,
       pg_catalog.quote_ident(r.rolname), pg_catalog.quote_ident(d.datname), pg_catalog.pg_is_in_recovery(),
       (SELECT reset_val = 'on' FROM pg_catalog.pg_settings WHERE name = 'default_transaction_read_only'),
       (SELECT pg_catalog.sum(CASE WHEN name = 'max_connections' THEN setting::pg_catalog.int4
                                   WHEN r.rolsuper THEN 0 ELSE - setting::pg_catalog.int4 END)
        FROM pg_catalog.pg_settings
        WHERE name IN ('max_connections', 'superuser_reserved_connections', 'reserved_connections'))::pg_catalog.int4
       - (SELECT pg_catalog.count(*) FROM s),
       CASE WHEN r.rolconnlimit >= 0 AND NOT r.rolsuper
            THEN r.rolconnlimit - (SELECT pg_catalog.count(*) FROM s WHERE usesysid = r.oid) END,
       CASE WHEN d.datconnlimit >= 0 AND NOT r.rolsuper
            THEN d.datconnlimit - (SELECT pg_catalog.count(*) FROM s WHERE datid = d.oid) END
FROM pg_catalog.pg_roles r, pg_catalog.pg_database d
WHERE r.rolname = CURRENT_USER AND d.datname = pg_catalog.current_database()
"""


def read_footing(session: Session) -> Footing:
    """Read a side's footing, by one query. Raises PipelineError."""
    (row,) = session.rows(FOOTING_SQL)
    return Footing.found(session.endpoint, *row)


def check_footings(source: Footing | None, target: Footing | None, *, need: Need) -> tuple[Finding, ...]:
    """Judge both sides, as far as they were seen; no query."""
    sides = [side for side in (source, target) if side is not None]
    return (
        *(_check_writes(target) if target is not None else ()),
        *(_check_standby(source) if source is not None else ()),
        *_check_rooms(sides, target, need),
    )


def _finding(severity: Severity, fact: str, hint: str = "") -> Finding:
    return Finding(severity=severity, fact=fact, hint=hint)


def _check_writes(target: Footing) -> list[Finding]:
    name = f"{target.endpoint.name} ({target.endpoint.label})"
    if target.in_recovery:
        return [_finding("refuse", f"{name} is a standby and takes no writes", "name the primary")]
    if target.read_only:
        return [
            _finding(
                "refuse",
                f"{name} takes no writes: default_transaction_read_only is on for the role {target.role}",
                "find out who set it (\\drds in psql), and end its read-only mode",
            )
        ]
    return []


def _check_standby(source: Footing) -> list[Finding]:
    if not source.in_recovery:
        return []
    name = source.endpoint.name
    return [_finding("note", f"{name} is a standby; a read that its replay cancels is tried again")]


def _check_rooms(sides: Sequence[Footing], target: Footing | None, need: Need) -> Iterable[Finding]:
    """Judge whether all sessions find room; a limit that binds both sides has to hold both.

    Of the limits that bind the same sides, the one that most is missing from is told.
    """
    tightest: dict[tuple[int, ...], tuple[int, Finding]] = {}
    for side in sides:
        for room in side.rooms:
            places = tuple(place for place, other in enumerate(sides) if side.shares(room.limit, other))
            bound = [sides[place] for place in places]
            free = min(one.free for other in bound for one in other.rooms if one.limit == room.limit)
            least, most = (sum(sessions[other is target] for other in bound) for sessions in (need.least, need.most))
            if free < most and (places not in tightest or most - free > tightest[places][0]):
                tightest[places] = (
                    most - free,
                    _crowded(bound, Room(limit=room.limit, free=free), least, most, need),
                )
    return [finding for _, finding in tightest.values()]


def _crowded(bound: Sequence[Footing], room: Room, least: int, most: int, need: Need) -> Finding:
    where, last = " and ".join(side.endpoint.name for side in bound), bound[-1]
    there = f"on {last.endpoint.name}"
    whose, raised = {
        "server": ("the server", f"end sessions {there}, or raise its max_connections"),
        "role": (
            f"the role {last.role}",
            f"{there}, as an administrator: ALTER ROLE {last.quoted_role} CONNECTION LIMIT {most}",
        ),
        "database": (
            "the database",
            f"{there}, as an administrator: ALTER DATABASE {last.quoted_database} CONNECTION LIMIT {most}",
        ),
    }[room.limit]
    has = f"{whose} has {max(0, room.free)} free{' for both' if len(bound) > 1 else ''}"
    if room.free < least:
        return _finding("refuse", f"{where}: {need.what} takes {counted(least, 'session')} at least, and {has}", raised)
    fitting = (room.free // len(bound) - SESSIONS_BESIDE_WORKERS) // 2
    return _finding(
        "warn",
        f"{where}: {need.what} with {counted(need.workers, 'worker')} takes up to {counted(most, 'session')},"
        f" and {has}",
        f"pipeline copy --workers {fitting}" if fitting >= 1 else raised,
    )
