"""One connection to one server: transactions with our own settings, and the driver's errors translated."""

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psycopg2
import psycopg2.extensions
from psycopg2 import sql

from pipeline.endpoints import DEFAULT_PASS, Endpoint
from pipeline.errors import UnreachableError
from pipeline.postgres.failures import CONNECT_TIMEOUT_SECONDS, connect_error, translate
from pipeline.postgres.pulse import PulsingConnection, PulsingCursor

STREAM_ROWS = 2_000
Cursor = psycopg2.extensions.cursor
Query = str | sql.Composable


class Session:
    """A connection, in autocommit, whose every transaction begins with settings of its own.

    Settings are SET LOCAL: behind a transaction pooler a session's settings are somebody else's.
    One thread uses a session at a time; ``cancel`` and ``abort`` may be called from any thread.
    """

    def __init__(self, endpoint: Endpoint, purpose: str) -> None:
        """Connect. ``purpose`` becomes part of application_name. Raises Unreachable- or RejectedError."""
        self.endpoint = endpoint
        # What it calls itself from its next transaction on.
        self.purpose = self._made_for = purpose
        self._renamed = False
        self._pid = os.getpid()
        self._cancelled = False
        self._silence: float | None = None
        # Who holds the lock that the statement under way waits for, where that is known.
        self.blockers: str | None = None
        self.connection = _connect(endpoint, purpose)
        self.pulse = self.connection.pulse
        self.backend = self.connection.get_backend_pid()
        self.connection.autocommit = True
        self.version = self.connection.server_version
        self.notices: list[str] = []
        self.connection.notices = self.notices

    @property
    def label(self) -> str:
        """Return the endpoint's name and address."""
        return f"{self.endpoint.name} ({self.endpoint.label})"

    @property
    def kind(self) -> str:
        """Return what kind of session it was made as."""
        return kind(self._made_for)

    @property
    def lost(self) -> bool:
        """Return whether the connection is gone."""
        return self.connection.closed != 0

    @property
    def reusable(self) -> bool:
        """Return whether the session is as good as new: alive, in no transaction, never cancelled."""
        idle = psycopg2.extensions.TRANSACTION_STATUS_IDLE
        unharmed = not self._cancelled and self._silence is None
        return unharmed and not self.lost and self.connection.info.transaction_status == idle

    @contextmanager
    def transaction(
        self, *, read_only: bool = False, then: Query = "", begun: bool = True, single: bool = False
    ) -> Iterator[Cursor]:
        """Yield a cursor in a transaction, committed at the end and rolled back by any exception.

        A read-only transaction sees one snapshot. BEGIN goes out with the first statement, in one round
        trip. ``then`` is such a first statement, sent at once; the cursor holds its result. With
        ``begun=False`` nothing is sent: the caller's first statement starts with ``begin_sql``, and its
        last may end with COMMIT, which saves a round trip each. With ``single`` the first statement is the
        only one: the server commits by itself what comes in one message. Raises PipelineError.
        """
        if os.getpid() != self._pid:
            raise RuntimeError("a session was carried across a fork")
        with self.translated(), self.connection.cursor(cursor_factory=PulsingCursor) as cursor:
            if begun:
                cursor.first = self._begin_text(read_only=read_only, single=single)
                cursor.single = single
            if then:
                cursor.execute(then)
            try:
                yield cursor
            except BaseException:
                self._rollback()
                raise
            if self.connection.info.transaction_status != psycopg2.extensions.TRANSACTION_STATUS_IDLE:
                cursor.execute("COMMIT")

    def begin_sql(self, *, read_only: bool) -> sql.Composable:
        """Return BEGIN with the settings of our transactions, ended by a semicolon."""
        return sql.SQL(self._begin_text(read_only=read_only))

    def _begin_text(self, *, read_only: bool, single: bool = False) -> str:
        settings = _settings(self.version, read_only, self.endpoint.through or DEFAULT_PASS)
        # Not READ WRITE: that would overrule a database that somebody, or a full disk, made read-only. The
        # level is said because a role may have another default, under which a slice would fail for another's.
        level = "REPEATABLE READ READ ONLY" if read_only else "READ COMMITTED"
        # Statements that come in one message are one transaction, also without BEGIN and COMMIT.
        begin = "SET TRANSACTION" if single else "BEGIN"
        text = "".join([f"{begin} ISOLATION LEVEL {level};", *(f"SET LOCAL {k} = {v};" for k, v in settings.items())])
        self._renamed = self._renamed or self.purpose != self._made_for
        return text + self._rename_text() if self._renamed else text

    def _rename_text(self) -> str:
        """Return what names the session for good, so that a takeover finds it also when it is idle.

        Where the backend is not the one that was announced, a pooler lends it to others: there, for the transaction.
        """
        rename = sql.SQL("SELECT pg_catalog.set_config('application_name', {}, pg_catalog.pg_backend_pid() <> {});")
        named = rename.format(sql.Literal(_application_name(self.purpose)), sql.Literal(self.backend))
        return named.as_string(self.connection)

    def rows(self, query: Query, arguments: Sequence[Any] | Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """Return all rows of one query, in a read-only transaction of its own, in one round trip."""
        with self.transaction(read_only=True, single=True) as cursor:
            cursor.execute(query, arguments)
            return cursor.fetchall()

    def stream(self, query: Query, *, batch_rows: int = STREAM_ROWS) -> Iterator[list[tuple[Any, ...]]]:
        """Yield the rows of one query in batches, from one snapshot, in bounded memory."""
        declare = sql.SQL("SET LOCAL cursor_tuple_fraction = 1; DECLARE pipeline_rows NO SCROLL CURSOR FOR ")
        with self.transaction(read_only=True) as cursor:
            cursor.execute(declare + (sql.SQL(query) if isinstance(query, str) else query))
            while True:
                cursor.execute("FETCH %s FROM pipeline_rows", (batch_rows,))
                if not (batch := cursor.fetchall()):
                    return
                yield batch

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Translate this connection's errors inside into PipelineErrors that name its endpoint."""
        try:
            yield
        except psycopg2.Error as error:
            if error.cursor is not None and error.cursor.connection is not self.connection:
                # Another session's, whose transaction lies around this one: it will say where.
                raise
            if self._cancelled or self._silence is None:
                raise translate(
                    error, self.label, lost=self.lost, cancelled=self._cancelled, blockers=self.blockers
                ) from error
            fact = f"{self.label}: no byte moved for {self._silence:.0f} seconds, the connection was cut"
            raise UnreachableError(fact, "look whether the server hangs, then run the command again") from error

    def end_backends(self, backends: Sequence[int]) -> None:
        """End those of these server processes that are still ours."""
        self.rows(
            "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity"
            " WHERE pid = ANY (%s) AND usename = CURRENT_USER AND application_name LIKE 'pipeline %%'",
            (list(backends),),
        )

    def cancel(self) -> None:
        """Ask the server to cancel the statement under way. May block while the network is dead."""
        self._cancelled = True
        with suppress(psycopg2.Error):
            self.connection.cancel()

    def abort(self) -> None:
        """Cut the connection under whatever waits on it; its thread sees a lost connection at once."""
        self._cancelled = True
        self._shut()

    def cut(self, silence: float) -> None:
        """Abort for a server that was silent for so many seconds: a lost connection, not a stop."""
        self._silence = silence
        self._shut()

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Say that statements inside may be long: silence alone is no reason to cut them."""
        patience, self.pulse.patience = self.pulse.patience, None
        try:
            yield
        finally:
            self.pulse.patience = patience

    def silence(self) -> float:
        """Return for how many seconds a thread has waited here without a byte that moved."""
        try:
            descriptor = self.connection.fileno()
        except psycopg2.Error:
            descriptor = -1
        return self.pulse.silence(descriptor)

    def _shut(self) -> None:
        with suppress(psycopg2.Error, OSError), socket.socket(fileno=os.dup(self.connection.fileno())) as wire:
            wire.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; a transaction under way is rolled back by the server."""
        with suppress(psycopg2.Error):
            self.connection.close()

    def _rollback(self) -> None:
        with suppress(psycopg2.Error):
            if not self.lost and self.connection.info.transaction_status != psycopg2.extensions.TRANSACTION_STATUS_IDLE:
                with self.connection.cursor() as cursor:
                    cursor.execute("ROLLBACK")

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def kind(purpose: str) -> str:
    """Return what all sessions for like purposes are called: ``run`` of ``run 1.2``."""
    return purpose.split()[0]


def _application_name(purpose: str) -> str:
    return f"pipeline {purpose}"[:63]


def _settings(version: int, read_only: bool, through: str) -> dict[str, str]:
    """Return the settings of our transactions, as SQL has them; ``through`` is the pass of those that write."""
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
        # A pass holds nothing that would have to be quoted: its endpoint saw to it.
        settings["pipeline.through"] = f"'{through}'"
    return settings


def _connect(endpoint: Endpoint, purpose: str) -> PulsingConnection:
    keywords: dict[str, Any] = {
        "host": endpoint.host,
        "port": endpoint.port,
        "user": endpoint.user,
        "dbname": endpoint.database,
        "sslmode": endpoint.sslmode,
        "connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "application_name": _application_name(purpose),
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
        connection: PulsingConnection = psycopg2.connect(connection_factory=PulsingConnection, **keywords)
        return connection
    except psycopg2.OperationalError as error:
        text = str(error)
    except (psycopg2.Error, UnicodeError) as error:
        text = type(error).__name__
    # Raised outside the handler, without the driver's exception as its context: a traceback of
    # that one would show the keywords.
    raise connect_error(endpoint, text)


def clock() -> float:
    """Return seconds on a clock that never jumps, for durations; never for decisions between hosts."""
    return time.monotonic()
