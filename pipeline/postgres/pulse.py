"""When a server was last heard of: kept by every connection while one of our threads waits for it."""

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg2.extensions

# struct tcp_info of Linux: bytes that the other end has acknowledged, and bytes received.
_TCP_INFO = getattr(socket, "TCP_INFO", None)
_TCP_INFO_BYTES, _COUNTERS_AT = 136, 120


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


class PulsingCursor(psycopg2.extensions.cursor):
    """A cursor whose every statement counts as a wait for the server."""

    connection: PulsingConnection

    def execute(self, *arguments: Any, **keywords: Any) -> None:
        """Execute a statement."""
        with self.connection.pulse.waiting():
            super().execute(*arguments, **keywords)

    def copy_expert(self, *arguments: Any, **keywords: Any) -> None:
        """Run a COPY; its file tells when it is not the server that is waited for."""
        with self.connection.pulse.waiting():
            super().copy_expert(*arguments, **keywords)
