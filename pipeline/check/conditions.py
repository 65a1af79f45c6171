"""The conditions that a server offers a move: transport, room for sessions, timeouts, who else is at work."""

from dataclasses import dataclass

from pipeline.check.preflight import Finding, Severity
from pipeline.endpoints import Endpoint
from pipeline.postgres.database import Session
from pipeline.wording import counted

# Beside two sessions of every worker (one more each while it tries again): the lease, the step under
# way, and the one that watches an index.
SESSIONS_BESIDE_WORKERS = 3
LISTED_TRANSACTIONS = 3
# The longest pause that a session of ours makes between two transactions, doubled.
SHORTEST_IDLE_MILLISECONDS = 60_000
_TIMEOUTS = ("statement_timeout", "transaction_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
_SETTINGS = (*_TIMEOUTS, "idle_session_timeout", "default_transaction_read_only")


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How many sessions are free by one limit: the server's, the role's or the database's."""

    limit: str
    free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Transaction:
    """A transaction of somebody else, or a prepared one (``application`` is None)."""

    seconds: float
    role: str
    application: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What one server offers. Times in milliseconds where not said otherwise.

    ``tls`` is the protocol of our own connection, ``tls_at_server`` whether the server sees one: behind
    something that ends TLS the two differ. ``defaults`` are the role's settings outside of our
    transactions, those that differ from none. ``hidden_sessions`` do not show this role what they do.
    """

    endpoint: Endpoint
    version: str
    role: str
    tls: str | None
    tls_at_server: bool | None
    pooled: bool
    in_recovery: bool
    encoding: str
    collation: str
    rooms: tuple[Room, ...]
    defaults: dict[str, str]
    transactions: tuple[Transaction, ...]
    prepared: tuple[Transaction, ...]
    hidden_sessions: int

    @property
    def room(self) -> Room:
        """Return the tightest limit."""
        return min(self.rooms, key=lambda room: room.free)


def read_conditions(session: Session, old_seconds: float) -> Conditions:
    """Read the conditions in a few read-only transactions. Raises PipelineError."""
    (facts,) = session.rows(_FACTS_SQL)
    version, role, recovery, encoding, collation, encrypted, *rooms = facts
    defaults = session.rows(
        # Our own SET LOCAL do not show in reset_val.
        "SELECT name, reset_val FROM pg_catalog.pg_settings WHERE name = ANY (%s) AND reset_val NOT IN ('0', 'off')"
        " ORDER BY name",
        (list(_SETTINGS),),
    )
    info = session.connection.info
    return Conditions(
        endpoint=session.endpoint,
        version=version,
        role=role,
        tls=(info.ssl_attribute("protocol") or "TLS") if info.ssl_in_use else None,
        tls_at_server=encrypted,
        pooled=_is_pooled(session),
        in_recovery=recovery,
        encoding=encoding,
        collation=collation,
        rooms=tuple(
            Room(limit=limit, free=free)
            for limit, free in zip(("server", "role", "database"), rooms, strict=True)
            if free is not None
        ),
        defaults=dict(defaults),
        transactions=_transactions(session, _ACTIVE_SQL, old_seconds),
        prepared=_transactions(session, _PREPARED_SQL, 0),
        hidden_sessions=session.rows(_HIDDEN_SQL)[0][0],
    )


# Limits of the role and the database do not bind a superuser, who may take the reserved sessions too.
# Whose a session is shows to every role; what kind of backend it is does not.
_FACTS_SQL = """
WITH s AS (SELECT datid, usesysid FROM pg_catalog.pg_stat_activity
           WHERE datid IS NOT NULL AND pid <> pg_catalog.pg_backend_pid()
             AND coalesce(backend_type, 'client backend') = 'client backend')
SELECT pg_catalog.current_setting('server_version'), r.rolname, pg_catalog.pg_is_in_recovery(),
       pg_catalog.pg_encoding_to_char(d.encoding), d.datcollate,
       (SELECT ssl FROM pg_catalog.pg_stat_ssl WHERE pid = pg_catalog.pg_backend_pid()),
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

_ACTIVE_SQL = """
SELECT extract(epoch FROM pg_catalog.clock_timestamp() - xact_start)::pg_catalog.float8 AS age, usename,
       coalesce(application_name, '')
FROM pg_catalog.pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_catalog.pg_backend_pid() AND xact_start
      < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => %s) ORDER BY 1 DESC
"""
_PREPARED_SQL = """
SELECT extract(epoch FROM pg_catalog.clock_timestamp() - prepared)::pg_catalog.float8 AS age, owner, NULL
FROM pg_catalog.pg_prepared_xacts
WHERE prepared <= pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => %s) ORDER BY 1 DESC
"""
_HIDDEN_SQL = """
SELECT pg_catalog.count(*) FROM pg_catalog.pg_stat_activity WHERE datid IS NOT NULL AND backend_type IS NULL
"""


def _transactions(session: Session, query: str, seconds: float) -> tuple[Transaction, ...]:
    return tuple(
        Transaction(seconds=age, role=role, application=application)
        for age, role, application in session.rows(query, (seconds,))
    )


def _is_pooled(session: Session) -> bool:
    """Return whether something between us and the server hands out its sessions.

    A pooler makes up the process id that it announces, and may give each transaction to another one.
    """
    seen = {session.rows("SELECT pg_catalog.pg_backend_pid()")[0][0] for _ in range(2)}
    return seen != {session.connection.get_backend_pid()}


def check_conditions(conditions: Conditions, *, workers: int, writes: bool) -> tuple[Finding, ...]:
    """Judge a server's conditions; no query. ``writes`` says that it is the target."""
    return (
        *_check_transport(conditions),
        *_check_room(conditions, workers, writes),
        *_check_defaults(conditions, writes),
        *_check_encoding(conditions),
        *_check_transactions(conditions),
    )


def _finding(severity: Severity, fact: str, hint: str = "") -> Finding:
    return Finding(severity=severity, fact=fact, hint=hint)


def _check_transport(conditions: Conditions) -> list[Finding]:
    endpoint, found = conditions.endpoint, []
    verified = endpoint.sslmode in ("verify-ca", "verify-full") or (
        endpoint.sslmode == "require" and endpoint.sslrootcert
    )
    if not endpoint.is_local and not (conditions.tls and verified):
        how = f"by {conditions.tls}, but nothing verified whose it is" if conditions.tls else "without TLS"
        found.append(
            _finding(
                "warn",
                f"{endpoint.name} ({endpoint.label}) is reached {how}",
                f"set {_variable(endpoint, 'SSLROOTCERT')} to the file of the host's certificate authority",
            )
        )
    if conditions.tls and conditions.tls_at_server is False:
        found.append(
            _finding("note", f"TLS ends before {endpoint.name}'s server: something between the two reads along")
        )
    if conditions.pooled:
        found.append(
            _finding(
                "warn",
                f"{endpoint.name} is reached through a pooler, which can move a session between servers' processes",
                f"set {_variable(endpoint, 'HOST')} and {_variable(endpoint, 'PORT')} to the server itself",
            )
        )
    return found


def _variable(endpoint: Endpoint, part: str) -> str:
    match endpoint.name:
        case "main":
            return f"DB_{part}"
        case "legacy":
            return f"PGVECTOR_{part} (or LEGACY_{part})"
    return f"the URL's {part.lower()}"


def _check_room(conditions: Conditions, workers: int, writes: bool) -> list[Finding]:
    """Return whether the sessions of a copy find room: one for each worker at least, two at most."""
    name, room = conditions.endpoint.name, conditions.room
    least, most = (workers * times + SESSIONS_BESIDE_WORKERS for times in (1, 2))
    if room.free >= most:
        return []
    fitting = (room.free - SESSIONS_BESIDE_WORKERS) // 2
    whose = {"server": "the server", "role": f"the role {conditions.role}", "database": "the database"}[room.limit]
    return [
        _finding(
            "refuse" if room.free < least else "warn",
            f"{name}: a copy with {counted(workers, 'worker')} takes up to {counted(most, 'session')}, and"
            f" {whose} has {max(0, room.free)} free",
            f"pipeline copy --workers {fitting}" if fitting >= 1 else f"end sessions on {name}, or raise the limit",
        )
    ]


def _check_defaults(conditions: Conditions, writes: bool) -> list[Finding]:
    name, role, defaults = conditions.endpoint.name, conditions.role, conditions.defaults
    found = []
    if conditions.in_recovery and writes:
        found.append(_finding("refuse", f"{name} is a standby and takes no writes", "name the primary"))
    elif conditions.in_recovery:
        found.append(_finding("note", f"{name} is a standby; a read that its replay cancels is tried again"))
    elif writes and "default_transaction_read_only" in defaults:
        found.append(
            _finding(
                "refuse",
                f"{name} takes no writes: default_transaction_read_only is on for the role {role}",
                "find out who set it (\\drds in psql), and end it",
            )
        )
    if ours := [f"{key} = {_span(defaults[key])}" for key in _TIMEOUTS if key in defaults]:
        found.append(
            _finding(
                "note", f"{name} sets {', '.join(ours)} for the role {role}; every transaction of ours sets its own"
            )
        )
    idle = defaults.get("idle_session_timeout")
    if idle is not None and int(idle) < SHORTEST_IDLE_MILLISECONDS:
        found.append(
            _finding(
                "warn",
                f"{name} ends sessions of the role {role} that rest for {_span(idle)}; that cannot be set from inside"
                " a transaction",
                f"on {name}, as an administrator: ALTER ROLE ... SET idle_session_timeout = 0",
            )
        )
    return found


def _span(milliseconds: str) -> str:
    return f"{int(milliseconds) / 1000:g} s"


def _check_encoding(conditions: Conditions) -> list[Finding]:
    name = conditions.endpoint.name
    if conditions.encoding != "SQL_ASCII":
        return []
    return [
        _finding(
            "warn",
            f"{name}'s database has the encoding SQL_ASCII: it keeps bytes, and never checked that they are text",
            "leave the census on: it looks for texts that are not UTF-8, which stop a copy",
        )
    ]


def _check_transactions(conditions: Conditions) -> list[Finding]:
    name, found = conditions.endpoint.name, []
    hint = f"see in pg_stat_activity on {name} what it is; end it, or wait: the copy cannot settle what it still holds"
    for one in conditions.transactions[:LISTED_TRANSACTIONS]:
        by = f"{one.application!r} of the role {one.role}" if one.application else f"the role {one.role}"
        found.append(_finding("warn", f"{name}: a transaction of {by} is open for {_age(one.seconds)}", hint))
    if conditions.prepared:
        oldest = conditions.prepared[0]
        found.append(
            _finding(
                "warn",
                f"{name}: {counted(len(conditions.prepared), 'prepared transaction')}, the oldest for"
                f" {_age(oldest.seconds)}, of the role {oldest.role}",
                "COMMIT PREPARED or ROLLBACK PREPARED it; SELECT gid FROM pg_prepared_xacts names it",
            )
        )
    if conditions.hidden_sessions:
        found.append(
            _finding(
                "note",
                f"{name}: how long {counted(conditions.hidden_sessions, 'session')} of other roles are in a"
                f" transaction does not show to the role {conditions.role}",
                "to see it: GRANT pg_read_all_stats",
            )
        )
    return found


def _age(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
