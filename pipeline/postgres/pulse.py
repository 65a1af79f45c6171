"""When a server was last heard of: kept by every connection while one of our threads waits for it."""

import ctypes
import socket
import struct
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import psycopg2
import psycopg2.extensions
from psycopg2 import sql

# struct tcp_info of Linux: bytes that the other end has acknowledged, and bytes received.
_TCP_INFO = getattr(socket, "TCP_INFO", None)
_TCP_INFO_BYTES, _COUNTERS_AT = 136, 120
_ERROR_BYTES = 256
Query = str | bytes | sql.Composable


def _libpq() -> ctypes.CDLL | None:
    """Return the driver's libpq; None where it is linked into the driver and shows no names."""
    library = ctypes.CDLL(psycopg2._psycopg.__file__)
    try:
        library.PQgetCancel.restype = ctypes.c_void_p
        library.PQgetCancel.argtypes = (ctypes.c_void_p,)
        library.PQcancel.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int)
        library.PQfreeCancel.argtypes = (ctypes.c_void_p,)
    except AttributeError:
        return None
    return library


# The driver's own cancel() keeps the interpreter's lock while it waits for the server: behind a dead
# network the whole process would stand still. A call through ctypes lets it go.
_LIBPQ = _libpq()


def hush_driver() -> None:
    """Keep the driver from printing what it raises as well: a server that ended a COPY FROM, with its row's content.

    It prints by way of sys.excepthook, in the thread of the COPY.
    """
    hook = sys.excepthook

    def drop(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not (kind is SystemError and isinstance(error.__cause__, psycopg2.Error)):
            hook(kind, error, trace)

    sys.excepthook = drop


class Pulse:
    """The wait of one thread for one server. Written by that thread, read by the one that watches.

    ``patience`` is how many seconds of silence its statements may need: None where no bound is known,
    as for the build of an index.
    """

    def __init__(self) -> None:
        self.patience: float | None = None
        self.since: float | None = None
        self._heard = 0.0
        self._counters: tuple[int, ...] = ()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Say that everything inside is a wait for the server."""
        before, self.since = self.since, time.monotonic()
        try:
            yield
        finally:
            self.since = before

    @contextmanager
    def away(self) -> Iterator[None]:
        """Say that inside a wait it is not the server that is waited for."""
        self.since = None
        try:
            yield
        finally:
            self.since = time.monotonic()

    def beat(self) -> None:
        """Note that the server was heard."""
        self._heard = time.monotonic()

    def silence(self, descriptor: int) -> float:
        """Return for how many seconds a waiting thread has seen no byte move, 0.0 where none waits."""
        if (counters := _counters(descriptor)) != self._counters:
            self._counters = counters
            self.beat()
        since = self.since
        return 0.0 if since is None else time.monotonic() - max(since, self._heard)


def _counters(descriptor: int) -> tuple[int, ...]:
    """Return the kernel's counters of a TCP connection: one large row moves for long without a call of ours."""
    if _TCP_INFO is None or descriptor < 0:
        return ()
    try:
        with socket.socket(fileno=descriptor) as wire:
            try:
                data = wire.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _TCP_INFO_BYTES)
            finally:
                wire.detach()
    except OSError:
        return ()
    return struct.unpack_from("QQ", data, _COUNTERS_AT) if len(data) == _TCP_INFO_BYTES else ()


class PulsingConnection(psycopg2.extensions.connection):
    """A connection that knows when its server was last heard of."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.pulse = Pulse()
        super().__init__(*arguments, **keywords)
        self.cursor_factory = PulsingCursor
        # Taken now, freed with the connection: it may be closed at the moment of a cancel.
        self._canceller = None if _LIBPQ is None else _LIBPQ.PQgetCancel(self.pgconn_ptr)
        if _LIBPQ is not None:
            weakref.finalize(self, _LIBPQ.PQfreeCancel, self._canceller)

    def cancel(self) -> None:
        """Ask the server to cancel the statement under way; only the calling thread waits for it."""
        if _LIBPQ is None:
            super().cancel()
        else:
            _LIBPQ.PQcancel(self._canceller, ctypes.create_string_buffer(_ERROR_BYTES), _ERROR_BYTES)


class PulsingCursor(psycopg2.extensions.cursor):
    """A cursor whose every statement counts as a wait for the server.

    ``first`` goes out before the first statement, in the same round trip: text without a percent sign. With
    ``single`` there is no second one: the transaction has ended with it.
    """

    connection: PulsingConnection
    first = ""
    single = False

    def execute(self, query: Query, *arguments: Any) -> None:
        """Execute a statement."""
        with self.connection.pulse.waiting():
            super().execute(self._led(query), *arguments)

    def copy_expert(self, query: Query, *arguments: Any) -> None:
        """Run a COPY; its file tells when it is not the server that is waited for."""
        with self.connection.pulse.waiting():
            super().copy_expert(self._led(query), *arguments)

    def _led(self, query: Query) -> Query:
        if not self.first:
            if self.single:
                raise RuntimeError("a second statement where the transaction has one")
            return query
        lead, self.first = self.first, ""
        if isinstance(query, bytes):
            return lead.encode() + query
        return lead + (query.as_string(self) if isinstance(query, sql.Composable) else query)
