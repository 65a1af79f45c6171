"""One connection to one server: transactions with our own settings, and the driver's errors translated."""

import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psycopg2
import psycopg2.extensions
from psycopg2 import sql

from pipeline.endpoints import Endpoint
from pipeline.errors import (
    ConflictError,
    DuplicateKeyError,
    PipelineError,
    RefusedError,
    RejectedError,
    StatementError,
    StoppedError,
    UnreachableError,
)

CONNECT_TIMEOUT_SECONDS = 10
STREAM_ROWS = 2_000
Cursor = psycopg2.extensions.cursor
Query = str | sql.Composable


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerIdentity:
    """What tells two servers apart, whatever they are called.

    ``system_identifier`` is shared by a primary, its standbys and every clone of its files;
    ``started`` is not, so both together name one running server.
    """

    system_identifier: int
    started: str
    database_oid: int


class Session:
    """A connection, in autocommit, whose every transaction begins with settings of its own.

    Settings are SET LOCAL: behind a transaction pooler a session's settings are somebody else's.
    One thread uses a session at a time; ``cancel`` and ``abort`` may be called from any thread.
    """

    def __init__(self, endpoint: Endpoint, purpose: str) -> None:
        """Connect. ``purpose`` becomes part of application_name. Raises Unreachable- or RejectedError."""
        self.endpoint = endpoint
        self._pid = os.getpid()
        self._cancelled = False
        self.connection = _connect(endpoint, purpose)
        self.connection.autocommit = True
        self.version = self.connection.server_version
        self.notices: list[str] = []
        self.connection.notices = self.notices

    @property
    def label(self) -> str:
        """Return the endpoint's name and address."""
        return f"{self.endpoint.name} ({self.endpoint.label})"

    @property
    def lost(self) -> bool:
        """Return whether the connection is gone."""
        return self.connection.closed != 0

    @contextmanager
    def transaction(self, *, read_only: bool = False, then: Query = "") -> Iterator[Cursor]:
        """Yield a cursor in a transaction, committed at the end and rolled back by any exception.

        A read-only transaction sees one snapshot. ``then`` is one more statement sent in the same
        round trip as BEGIN; the cursor holds its result. Raises PipelineError.
        """
        if os.getpid() != self._pid:
            raise RuntimeError("a session was carried across a fork")
        with self.translated(), self.connection.cursor() as cursor:
            cursor.execute(sql.SQL(_begin_sql(self.version, read_only)) + _composable(then))
            try:
                yield cursor
            except BaseException:
                self._rollback()
                raise
            cursor.execute("COMMIT")

    def rows(self, query: Query, arguments: Sequence[Any] | None = None) -> list[tuple[Any, ...]]:
        """Return all rows of one query, in a read-only transaction of its own."""
        with self.transaction(read_only=True) as cursor:
            cursor.execute(query, arguments)
            return cursor.fetchall()

    def stream(self, query: Query, arguments: Sequence[Any] | None = None) -> Iterator[list[tuple[Any, ...]]]:
        """Yield the rows of one query in batches, from one snapshot, in bounded memory."""
        declare = sql.SQL("SET LOCAL cursor_tuple_fraction = 1; DECLARE pipeline_rows NO SCROLL CURSOR FOR ")
        with self.transaction(read_only=True) as cursor:
            cursor.execute(declare + _composable(query), arguments)
            while True:
                cursor.execute("FETCH %s FROM pipeline_rows", (STREAM_ROWS,))
                if not (batch := cursor.fetchall()):
                    return
                yield batch

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Translate the driver's errors inside into PipelineErrors that name this endpoint."""
        try:
            yield
        except psycopg2.Error as error:
            raise translate(error, self.label, lost=self.lost, cancelled=self._cancelled) from error

    def cancel(self) -> None:
        """Ask the server to cancel the statement under way. May block while the network is dead."""
        self._cancelled = True
        with suppress(psycopg2.Error):
            self.connection.cancel()

    def abort(self) -> None:
        """Cut the connection under whatever waits on it; its thread sees a lost connection at once."""
        self._cancelled = True
        with suppress(psycopg2.Error, OSError), socket.socket(fileno=os.dup(self.connection.fileno())) as wire:
            wire.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; a transaction under way is rolled back by the server."""
        with suppress(psycopg2.Error):
            self.connection.close()

    def _rollback(self) -> None:
        with suppress(psycopg2.Error):
            if not self.lost:
                with self.connection.cursor() as cursor:
                    cursor.execute("ROLLBACK")

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def identify(cursor: Cursor) -> ServerIdentity:
    """Return the identity of the server and database behind the cursor."""
    cursor.execute(
        "SELECT (SELECT system_identifier FROM pg_catalog.pg_control_system()),"
        " pg_catalog.pg_postmaster_start_time()::pg_catalog.text,"
        " (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())"
    )
    row = cursor.fetchone()
    assert row is not None
    # The catalog shows the unsigned identifier as a signed number.
    return ServerIdentity(system_identifier=row[0] % 2**64, started=row[1], database_oid=row[2])


def horizon(cursor: Cursor) -> int:
    """Return the oldest transaction (64-bit id) that a snapshot taken now may not see.

    On a standby it is the primary's, as far as it was replayed. Works from version 10 on.
    """
    modern = cursor.connection.server_version >= 130000
    cursor.execute(
        "SELECT pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())::pg_catalog.text::pg_catalog.int8"
        if modern
        else "SELECT pg_catalog.txid_snapshot_xmin(pg_catalog.txid_current_snapshot())"
    )
    row = cursor.fetchone()
    assert row is not None
    return int(row[0])


def _composable(query: Query) -> sql.Composable:
    return sql.SQL(query) if isinstance(query, str) else query


def _begin_sql(version: int, read_only: bool) -> str:
    """Return BEGIN and the settings of our transactions, as one round trip."""
    settings = {
        "search_path": "''",
        "row_security": "off",
        "statement_timeout": "0",
        "lock_timeout": "'5s'",
        "idle_in_transaction_session_timeout": "'60s'",
        "client_encoding": "'UTF8'",
        "timezone": "'UTC'",
        "datestyle": "'ISO, YMD'",
        "intervalstyle": "'postgres'",
        "extra_float_digits": "1",
        "bytea_output": "'hex'",
    }
    if version >= 170000:
        settings["transaction_timeout"] = "0"
    if version >= 150000:
        # A backend whose client was killed gives up within this time, also in the middle of a
        # statement. 14 knows it too, but refuses it outside Linux.
        settings["client_connection_check_interval"] = "'1s'"
    if not read_only:
        # A role's default of off would lose acknowledged slices in a crash of the server.
        settings["synchronous_commit"] = "'on'"
    # Not READ WRITE: that would overrule a database that somebody, or a full disk, made read-only.
    mode = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY" if read_only else "BEGIN"
    return "".join([mode, ";", *(f"SET LOCAL {name} = {value};" for name, value in settings.items())])


def _connect(endpoint: Endpoint, purpose: str) -> psycopg2.extensions.connection:
    keywords: dict[str, Any] = {
        "host": endpoint.host,
        "port": endpoint.port,
        "user": endpoint.user,
        "dbname": endpoint.database,
        "sslmode": endpoint.sslmode,
        "connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "application_name": f"pipeline {purpose}"[:63],
        "client_encoding": "UTF8",
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 30_000,
    }
    if endpoint.sslrootcert:
        keywords["sslrootcert"] = endpoint.sslrootcert
    if endpoint.password is not None:
        keywords["password"] = endpoint.password.reveal()
    try:
        connection: psycopg2.extensions.connection = psycopg2.connect(**keywords)
        return connection
    except psycopg2.OperationalError as error:
        text = str(error)
    except (psycopg2.Error, UnicodeError) as error:
        text = type(error).__name__
    # Raised outside the handler, without the driver's exception as its context: a traceback of
    # that one would show the keywords.
    raise _connect_error(endpoint, text)


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
        "certificate verify failed|server certificate for|SSL error",
        RejectedError,
        "the server's TLS certificate was not accepted (mode {sslmode})",
        "check {SSL} and {SSLROOTCERT}",
    ),
    (
        "too many clients|remaining connection slots|too many connections",
        UnreachableError,
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


def _connect_error(endpoint: Endpoint, text: str) -> PipelineError:
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


_CONFLICT_CODES = frozenset({"40001", "40P01", "55P03"})
# Data and constraint errors, and what a function raises: their messages quote values of the row.
_TELLING_CLASSES = frozenset({"22", "23", "38", "39", "P0"})
_PASSING_CODES = frozenset({"57P01", "57P02", "57P03", "53300", "53400", "08000", "08003", "08006"})


def translate(error: psycopg2.Error, where: str, *, lost: bool, cancelled: bool) -> PipelineError:
    """Turn a driver's error into ours, without the row content that the server puts into messages.

    A lost connection is known by the connection, not by a code: a terminated backend, a timeout of
    the server and a stopped server all arrive without one.
    """
    code = error.pgcode or ""
    if cancelled:
        return StoppedError(f"{where}: the statement was cancelled", "run the command again to go on")
    if code in _PASSING_CODES:
        return UnreachableError(f"{where}: the server ended the connection ({code})", "run the command again")
    if lost:
        return UnreachableError(f"{where}: the connection was lost", "run the command again to go on")
    if code in _CONFLICT_CODES:
        return ConflictError(f"{where}: another transaction stood in the way ({code})", "run the command again")
    message = _safe_message(error)
    if code == "23505":
        return DuplicateKeyError(f"{where}: {message}", "pipeline verify names the rows")
    if code == "57014":
        return StatementError(f"{where}: {message}", "somebody, or a timeout, cancelled it; run the command again")
    if code == "42501":
        return RefusedError(f"{where}: {message}", "grant the right, or use a role that has it")
    if code == "25006":
        return RefusedError(f"{where} takes no writes: {message}", "name the primary, or end its read-only mode")
    if code == "53100":
        return StatementError(f"{where}: the disk is full ({message})", "free space, then run the command again")
    return StatementError(f"{where}: {message} (SQLSTATE {code or 'none'})")


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


def clock() -> float:
    """Return seconds on a clock that never jumps, for durations; never for decisions between hosts."""
    return time.monotonic()
