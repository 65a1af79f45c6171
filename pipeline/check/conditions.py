"""The conditions that a server offers a move: transport, timeouts, encoding, who else is at work."""

from dataclasses import dataclass

from pipeline.check.footing import Footing, read_footing
from pipeline.check.preflight import Finding, Severity
from pipeline.endpoints import Endpoint
from pipeline.postgres.database import Session
from pipeline.wording import counted

LISTED_TRANSACTIONS = 3
# The longest pause that a session of ours makes between two transactions, doubled.
SHORTEST_IDLE_MILLISECONDS = 60_000
_TIMEOUTS = ("statement_timeout", "transaction_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
_SETTINGS = (*_TIMEOUTS, "idle_session_timeout")


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
    transactions, those that are set. ``hidden_sessions`` do not show this role what they do.
    """

    footing: Footing
    version: str
    tls: str | None
    tls_at_server: bool | None
    pooled: bool
    encoding: str
    collation: str
    defaults: dict[str, str]
    transactions: tuple[Transaction, ...]
    prepared: tuple[Transaction, ...]
    hidden_sessions: int

    @property
    def endpoint(self) -> Endpoint:
        """Return where the server was reached."""
        return self.footing.endpoint


def read_conditions(session: Session, old_seconds: float) -> Conditions:
    """Read the conditions in a few read-only transactions. Raises PipelineError."""
    ((version, encoding, collation, encrypted),) = session.rows(_FACTS_SQL)
    defaults = session.rows(
        # Our own SET LOCAL do not show in reset_val.
        "SELECT name, reset_val FROM pg_catalog.pg_settings WHERE name = ANY (%s) AND reset_val <> '0' ORDER BY name",
        (list(_SETTINGS),),
    )
    info = session.connection.info
    return Conditions(
        footing=read_footing(session),
        version=version,
        tls=(info.ssl_attribute("protocol") or "TLS") if info.ssl_in_use else None,
        tls_at_server=encrypted,
        pooled=_is_pooled(session),
        encoding=encoding,
        collation=collation,
        defaults=dict(defaults),
        transactions=_transactions(session, _ACTIVE_SQL, old_seconds),
        prepared=_transactions(session, _PREPARED_SQL, 0),
        hidden_sessions=session.rows(_HIDDEN_SQL)[0][0],
    )


_FACTS_SQL = """
SELECT pg_catalog.current_setting('server_version'), pg_catalog.pg_encoding_to_char(d.encoding), d.datcollate,
       (SELECT ssl FROM pg_catalog.pg_stat_ssl WHERE pid = pg_catalog.pg_backend_pid())
FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()
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


def check_conditions(conditions: Conditions) -> tuple[Finding, ...]:
    """Judge a server's conditions; no query. What a copy cannot begin without is its footing's."""
    return (
        *_check_transport(conditions),
        *_check_defaults(conditions),
        *_check_encoding(conditions),
        *check_transactions(conditions),
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
                _verifying(endpoint),
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


def _verifying(endpoint: Endpoint) -> str:
    """Return what makes a connection verified: a mode given outright goes before the certificate."""
    where = f"set {_variable(endpoint, 'SSLROOTCERT')} to the file of the host's certificate authority"
    mode = "the URL's sslmode to verify-full" if endpoint.name == "url" else f"{_variable(endpoint, 'SSL')} to true"
    return f"{where}, and {mode}"


def _variable(endpoint: Endpoint, part: str) -> str:
    match endpoint.name:
        case "main":
            return f"DB_{part}"
        case "legacy":
            return f"PGVECTOR_{part} (or LEGACY_{part})"
    return f"the URL's {part.lower()}"


def _check_defaults(conditions: Conditions) -> list[Finding]:
    name, role, defaults = conditions.endpoint.name, conditions.footing.role, conditions.defaults
    found = []
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
                f"on {name}, as an administrator: ALTER ROLE {conditions.footing.quoted_role}"
                " SET idle_session_timeout = 0",
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


def check_transactions(conditions: Conditions) -> list[Finding]:
    """Judge the transactions of others that have been open for long, and prepared ones; no query."""
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
                f" transaction does not show to the role {conditions.footing.role}",
                f"on {name}, to see it: GRANT pg_read_all_stats TO {conditions.footing.quoted_role}",
            )
        )
    return found


def _age(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
