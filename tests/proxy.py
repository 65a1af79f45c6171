"""A TCP proxy that does to a connection what networks do: delays it, slows it, cuts it, swallows it."""

import queue
import re
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

Direction = Literal["up", "down"]
How = Literal["fin", "rst"]
CHUNK_BYTES = 65536
# What may be on its way at a time; with 20 ms it still carries 100 MB/s.
LINE_CHUNKS = 32
# What SO_LINGER takes to make close() send a reset.
_RESET = struct.pack("ii", 1, 0)


@dataclass
class Cut:
    """A cut to come, once: after so many bytes one way, or around a message that the client sends."""

    how: How
    direction: Direction
    after_bytes: int | None = None
    at: re.Pattern[bytes] | None = None
    moment: Literal["before", "after"] = "before"
    only: bytes = b""
    done: bool = False


@dataclass(eq=False)
class _Link:
    """One connection through the proxy. ``up`` is from the client to the server."""

    client: socket.socket
    server: socket.socket
    deaf: bool = False
    opening: bytes = b""
    passed: dict[Direction, int] = field(default_factory=lambda: {"up": 0, "down": 0})
    cut_on_answer: Cut | None = None

    def close(self, how: How) -> None:
        for end in (self.client, self.server):
            with suppress(OSError):
                if how == "rst":
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                else:
                    end.shutdown(socket.SHUT_RDWR)
            with suppress(OSError):
                if how == "rst":
                    # A thread inside recv() keeps the socket open; this wakes it without sending a FIN first.
                    end.shutdown(socket.SHUT_RD)
                end.close()


class Proxy:
    """Stand in front of a server on a loopback port of its own.

    ``latency`` is in seconds each way and does not limit throughput; ``rate`` is in bytes per second
    and direction. Both may be changed while connections are open.
    """

    def __init__(self, host: str, port: int) -> None:
        self.latency = 0.0
        self.rate: float | None = None
        self.accepted = 0
        self._server = (host, port)
        self._links: set[_Link] = set()
        self._cuts: list[Cut] = []
        self._lock = threading.Lock()
        self._deaf = False
        self._listener: socket.socket | None = None
        self.host, self.port = "127.0.0.1", 0
        self.allow()

    def allow(self) -> None:
        """Accept connections, again after ``refuse``."""
        if self._listener is None:
            listener = socket.create_server((self.host, self.port), backlog=64)
            self.port = listener.getsockname()[1]
            self._listener = listener
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def refuse(self) -> None:
        """Refuse new connections from now on; those that are open stay."""
        if self._listener is not None:
            listener, self._listener = self._listener, None
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def cut(self, how: How = "fin") -> int:
        """Cut every open connection on both sides; return how many there were."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.close(how)
        return len(links)

    def swallow(self) -> None:
        """Be a black hole: accept, acknowledge and drop everything, on old and new connections."""
        self._deaf = True
        with self._lock:
            for link in self._links:
                link.deaf = True

    def hear(self) -> None:
        """Forward new connections again; the swallowed ones have lost bytes and stay as they are."""
        self._deaf = False

    def cut_after(self, count: int, direction: Direction, how: How = "rst", only: bytes = b"") -> Cut:
        """Cut once, when exactly ``count`` bytes of one connection have passed in a direction.

        ``only`` has to stand in the client's first bytes, where its application_name is.
        """
        return self._add(Cut(how=how, direction=direction, after_bytes=count, only=only))

    def cut_at(self, pattern: bytes, moment: Literal["before", "after"], how: How = "rst") -> Cut:
        """Cut once around a message of the client's: before it is forwarded, or when it is answered."""
        return self._add(Cut(how=how, direction="up", at=re.compile(pattern, re.DOTALL), moment=moment))

    def _add(self, cut: Cut) -> Cut:
        self._cuts.append(cut)
        return cut

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self.accepted += 1
            server = socket.socket()
            try:
                # Small buffers, so that a slow proxy is felt at the other end.
                for end in (client, server):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, CHUNK_BYTES)
                server.connect(self._server)
            except OSError:
                client.close()
                server.close()
                continue
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = _Link(client=client, server=server, deaf=self._deaf)
            with self._lock:
                self._links.add(link)
            for direction in ("up", "down"):
                line: queue.Queue[tuple[float, bytes]] = queue.Queue(LINE_CHUNKS)
                threading.Thread(target=self._read, args=(link, direction, line), daemon=True).start()
                threading.Thread(target=self._write, args=(link, direction, line), daemon=True).start()

    def _read(self, link: _Link, direction: Direction, line: "queue.Queue[tuple[float, bytes]]") -> None:
        source = link.client if direction == "up" else link.server
        data = b"?"
        while data:
            try:
                data = source.recv(CHUNK_BYTES)
            except OSError:
                data = b""
            if data and len(link.opening) < 1000 and direction == "up":
                link.opening += data
            if not link.deaf:
                line.put((time.monotonic() + self.latency, data))

    def _write(self, link: _Link, direction: Direction, line: "queue.Queue[tuple[float, bytes]]") -> None:
        sink = link.server if direction == "up" else link.client
        while True:
            due, data = line.get()
            time.sleep(max(0.0, due - time.monotonic()))
            if self.rate:
                time.sleep(len(data) / self.rate)
            if not data:
                break
            if link.deaf:
                continue
            cut, data = self._cut_in(link, direction, data)
            try:
                sink.sendall(data)
            except OSError:
                break
            link.passed[direction] += len(data)
            if cut is not None:
                link.close(cut.how)
                break
        link.close("fin")
        with self._lock:
            self._links.discard(link)

    def _cut_in(self, link: _Link, direction: Direction, data: bytes) -> tuple[Cut | None, bytes]:
        """Return the cut that falls into this piece, and what of it still goes through."""
        if direction == "down" and link.cut_on_answer is not None:
            return link.cut_on_answer, b""
        with self._lock:
            for cut in self._cuts:
                if cut.done or cut.direction != direction or cut.only not in link.opening:
                    continue
                if cut.after_bytes is not None and link.passed[direction] + len(data) >= cut.after_bytes:
                    cut.done = True
                    return cut, data[: max(0, cut.after_bytes - link.passed[direction])]
                if cut.at is not None and cut.at.search(data):
                    cut.done = True
                    if cut.moment == "before":
                        return cut, b""
                    link.cut_on_answer = cut
        return None, data

    def close(self) -> None:
        """End everything."""
        self.refuse()
        self.cut("rst")

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
