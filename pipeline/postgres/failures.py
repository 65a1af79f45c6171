"""The driver's errors as ours: by the connection's state and the code, never with the content of a row."""

import re

import psycopg2

from pipeline.endpoints import Endpoint
from pipeline.errors import (
    ConflictError,
    CrowdedError,
    DuplicateKeyError,
    PipelineError,
    RefusedError,
    RejectedError,
    StatementError,
    StoppedError,
    UnreachableError,
)

CONNECT_TIMEOUT_SECONDS = 10

# What libpq and the server write, by the part that is the same in every release; the fact; the hint.
_CONNECT_FACTS: tuple[tuple[str, type[PipelineError], str, str], ...] = (
    ("could not translate host name", UnreachableError, "the host {host!r} is unknown", "check {HOST}"),
    (
        "Connection refused",
        UnreachableError,
        "nothing answers at {host} port {port}",
        "check {HOST} and {PORT}, and that the server runs",
    ),
    (
        "timeout expired",
        UnreachableError,
        "{host} port {port} did not answer within {timeout} seconds",
        "check {HOST}, {PORT} and the firewall between",
    ),
    (
        # With scram a server says the same of a role that it does not have.
        "password authentication failed",
        RejectedError,
        "the password of {user!r} was refused, or there is no such role",
        "check {PASSWORD} (or ~/.pgpass) and {USER}",
    ),
    (
        "no password supplied",
        RejectedError,
        "a password is needed for {user}",
        "set {PASSWORD}, or add a line to ~/.pgpass (mode 0600)",
    ),
    ("no pg_hba.conf entry", RejectedError, "pg_hba.conf lets {user} not in from here", "ask for an entry"),
    (r'database ".*" does not exist', RejectedError, "there is no database {database!r}", "check {DB}"),
    (r'role ".*" does not exist', RejectedError, "there is no role {user!r}", "check {USER}"),
    (
        r'role ".*" is not permitted to log in',
        RejectedError,
        "the role {user!r} may not log in",
        "check {USER}, or ask an administrator for ALTER ROLE with LOGIN",
    ),
    (
        "root certificate file",
        RejectedError,
        "the file of certificate authorities is missing or unreadable",
        "check {SSLROOTCERT}",
    ),
    (
        "does not support SSL|SSL is not enabled",
        RejectedError,
        "the server offers no TLS, and {sslmode} asks for it",
        "check {SSL}",
    ),
    (
        "weak sslmode",
        RejectedError,
        "with the system's certificate authorities only verify-full proves anything, and {sslmode} is set",
        "set {SSL} to verify-full",
    ),
    (
        "channel binding",
        RejectedError,
        "PGCHANNELBINDING asks for a proof that nobody stands between, which this server does not give",
        "connect to the server itself, with TLS, or unset PGCHANNELBINDING",
    ),
    (
        "certificate verify failed|server certificate for|SSL error",
        RejectedError,
        "the server's TLS certificate was not accepted (mode {sslmode})",
        "check {SSL} and {SSLROOTCERT}",
    ),
    (
        "closed the connection unexpectedly|Connection reset by peer",
        UnreachableError,
        "{host} port {port} takes the connection and closes it at once",
        "look into the server's log, or whether a proxy stands in between; then run the command again",
    ),
    (
        "too many clients|remaining connection slots|too many connections",
        CrowdedError,
        "the server has no connection free",
        "lower --workers, or wait",
    ),
    (
        "starting up|shutting down|not yet accepting|in recovery mode",
        UnreachableError,
        "the server is starting or stopping",
        "wait, and run the command again",
    ),
)


def _places(name: str) -> dict[str, str]:
    """Return where each part of an endpoint is set, as a hint names it."""
    parts = ("HOST", "PORT", "USER", "DB", "PASSWORD", "SSL", "SSLROOTCERT")
    if name == "main":
        return {part: f"DB_{part}" for part in parts} | {"DB": "DB_NAME"}
    if name == "legacy":
        return {part: f"PGVECTOR_{part} (or LEGACY_{part})" for part in parts}
    return {part: f"the URL's {part.lower()}" for part in parts} | {
        "DB": "the URL's database",
        "PASSWORD": "PGPASSWORD",
        "SSL": "the URL's sslmode",
    }


def connect_error(endpoint: Endpoint, text: str) -> PipelineError:
    """Turn libpq's words about a connection that was not made into ours."""
    words = _places(endpoint.name) | {
        "host": endpoint.host,
        "port": str(endpoint.port),
        "user": endpoint.user,
        "database": endpoint.database,
        "sslmode": endpoint.sslmode,
        "timeout": str(CONNECT_TIMEOUT_SECONDS),
    }
    for pattern, kind, fact, hint in _CONNECT_FACTS:
        if re.search(pattern, text):
            return kind(f"{endpoint.name} ({endpoint.label}): {fact.format(**words)}", hint.format(**words))
    # The keywords are not a string, so libpq quotes nothing of them but host, port, user and database.
    line = text.strip().split("\n")[0]
    if endpoint.password is not None:
        line = line.replace(endpoint.password.reveal(), "********")
    return UnreachableError(f"{endpoint.name} ({endpoint.label}): {line}", "pipeline settings shows what is used")


# What a fence (postgres/fence.py) raises: its message is ours, and holds nothing of a row.
FENCE_STATE = "PF001"
_CONFLICT_CODES = frozenset({"40001", "40P01"})
# Data and constraint errors, and what a function raises: their messages quote values of the row.
_TELLING_CLASSES = frozenset({"22", "23", "38", "39", "P0"})
_PASSING_CODES = frozenset({"57P01", "57P02", "57P03", "53300", "53400", "08000", "08003", "08006"})


def translate(
    error: psycopg2.Error, where: str, *, lost: bool, cancelled: bool, blockers: str | None = None
) -> PipelineError:
    """Turn a driver's error into ours, without the row content that the server puts into messages.

    A lost connection is known by the connection, not by a code: a terminated backend, a timeout of
    the server and a stopped server all arrive without one. ``blockers`` are those who held the lock.
    """
    code = error.pgcode or ""
    if cancelled:
        return StoppedError(f"{where}: the statement was cancelled", "run the command again to go on")
    if code in _PASSING_CODES:
        return UnreachableError(f"{where}: the server ended the connection ({code})", "run the command again")
    # A server that crashes in the middle of an answer leaves the driver with an error that has no code, of
    # a class that every error has, and for a moment with a connection that it takes for open.
    broken = not code and type(error) in (psycopg2.OperationalError, psycopg2.DatabaseError)
    if lost or broken:
        return UnreachableError(f"{where}: the connection was lost", "run the command again to go on")
    if code == "55P03":
        return ConflictError(
            f"{where}: a lock was waited for in vain; it is held by {blockers or 'another transaction'}",
            "end that transaction, or wait for it; then run the command again",
        )
    if code in _CONFLICT_CODES and "recovery" in str(error.diag.message_primary):
        return ConflictError(
            f"{where}: the standby cancelled the statement, to replay what its primary did ({code})",
            "set hot_standby_feedback = on there, or raise max_standby_streaming_delay; then run the command again",
        )
    if code in _CONFLICT_CODES:
        return ConflictError(f"{where}: another transaction stood in the way ({code})", "run the command again")
    message = _safe_message(error)
    if code == "23505":
        return DuplicateKeyError(f"{where}: {message}", "pipeline verify names the rows")
    if code == "57014":
        return StatementError(f"{where}: {message}", "somebody, or a timeout, cancelled it; run the command again")
    if code == FENCE_STATE:
        hint = "pipeline status shows how far the cutover is, and which side takes writes"
        return RefusedError(f"{where}: {message}", hint, code)
    if code == "42501":
        return RefusedError(f"{where}: {message}", "grant the right, or use a role that has it")
    if code == "25006":
        return RefusedError(f"{where} takes no writes: {message}", "name the primary, or end its read-only mode")
    if code == "53100":
        return StatementError(f"{where}: the disk is full ({message})", "free space, then run the command again")
    return StatementError(f"{where}: {message} (SQLSTATE {code or 'none'})", sqlstate=code)


def _safe_message(error: psycopg2.Error) -> str:
    """Return the primary message; for data errors only what is known to hold no row content."""
    primary = str(error.diag.message_primary or "the statement failed").split("\n")[0]
    code = error.pgcode or ""
    if code[:2] not in _TELLING_CLASSES or re.fullmatch(r"expected \d+ dimensions, not \d+", primary):
        return primary
    named = [
        f"{what} {name}"
        for what, name in (
            ("table", error.diag.table_name),
            ("column", error.diag.column_name),
            ("constraint", error.diag.constraint_name),
        )
        if name
    ]
    return " ".join([type(error).__name__, *named])
