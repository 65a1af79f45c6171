"""A TCP proxy that holds every byte back for a while, as a distance does; a program of its own.

Run as: python delay.py MILLISECONDS PORT [PORT ...]. It writes as JSON the loopback ports that stand for
those given, and ends by SIGTERM, or with whoever holds its stdin.
"""

import json
import select
import socket
import sys
import time
from collections import deque

HOST = "127.0.0.1"
READ_BYTES = 256 * 1024
# What a direction may hold, as sockets do, for a reader that is slow. On top of it goes what is under
# way: at this rate the delay alone never fills a direction, so that time is added and no throughput lost.
WAITING_BYTES = 4 * 1024 * 1024
UNDER_WAY_BYTES_PER_SECOND = 2_000_000_000


class Line:
    """One direction of a connection: pieces that were read, and when each is to be written."""

    def __init__(self, source: socket.socket, sink: socket.socket, delay: float, open_at: float) -> None:
        self.source, self.sink = source, sink
        self.ended = self.done = False
        self._delay, self._open_at = delay, open_at
        self._limit = WAITING_BYTES + int(delay * UNDER_WAY_BYTES_PER_SECOND)
        self._held = 0
        self._pieces: deque[tuple[float, memoryview]] = deque()

    @property
    def reads(self) -> bool:
        """Return whether there is room for more, and more to come."""
        return not self.ended and self._held < self._limit

    @property
    def due(self) -> float | None:
        """Return when the first piece is to be written, None where nothing is held."""
        return self._pieces[0][0] if self._pieces else None

    def read(self, now: float) -> None:
        """Take what the source has; an empty piece is its end."""
        piece = memoryview(self.source.recv(READ_BYTES))
        self.ended = not piece
        self._held += len(piece)
        self._pieces.append((max(now, self._open_at) + self._delay, piece))

    def write(self) -> None:
        """Hand on what the sink takes of the first piece."""
        due, piece = self._pieces.popleft()
        if not piece:
            self.done = True
            self.sink.shutdown(socket.SHUT_WR)
            return
        sent = self.sink.send(piece)
        self._held -= sent
        if sent < len(piece):
            self._pieces.appendleft((due, piece[sent:]))


def open_lines(listener: socket.socket, port: int, delay: float) -> list[Line]:
    """Accept a connection and return its two directions; none where the server does not answer.

    The kernel has greeted the client already. Over a distance that takes a round trip, so the first
    bytes wait for one.
    """
    client, _ = listener.accept()
    try:
        server = socket.create_connection((HOST, port))
    except OSError:
        client.close()
        return []
    for end in (client, server):
        # The kernel sizes buffers by need, up to megabytes; a size that is asked for is capped far below.
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.setblocking(False)
    now = time.monotonic()
    return [Line(client, server, delay, now + 2 * delay), Line(server, client, delay, now)]


def serve(listeners: dict[socket.socket, int], delay: float) -> None:
    """Carry bytes until stdin ends."""
    lines: list[Line] = []
    while True:
        now = time.monotonic()
        due = {line: line.due for line in lines if line.due is not None}
        soonest = min((at for at in due.values() if at > now), default=None)
        reading, writing, _ = select.select(
            [sys.stdin, *listeners, *(line.source for line in lines if line.reads)],
            [line.sink for line, at in due.items() if at <= now],
            [],
            None if soonest is None else soonest - now,
        )
        if sys.stdin in reading:
            return
        now = time.monotonic()
        broken: set[socket.socket] = set()
        for line in lines:
            try:
                if line.sink in writing and due.get(line, now + 1) <= now:
                    line.write()
                if line.source in reading:
                    line.read(now)
            except OSError:
                broken.add(line.source)
        lines = without_ended(lines, broken)
        for listener in listeners.keys() & set(reading):
            lines += open_lines(listener, listeners[listener], delay)


def without_ended(lines: list[Line], broken: set[socket.socket]) -> list[Line]:
    """Return the lines of connections that go on; close those that broke, or ended both ways."""
    kept: list[Line] = []
    for first, second in zip(lines[::2], lines[1::2], strict=True):
        if (first.done and second.done) or {first.source, second.source} & broken:
            first.source.close()
            second.source.close()
        else:
            kept += (first, second)
    return kept


def main(milliseconds: str, *ports: str) -> None:
    """Listen for each port, tell where, and serve; half of the milliseconds is each direction's."""
    listeners = {socket.create_server((HOST, 0)): int(port) for port in ports}
    sys.stdout.write(json.dumps([listener.getsockname()[1] for listener in listeners]) + "\n")
    sys.stdout.flush()
    serve(listeners, float(milliseconds) / 2000)


if __name__ == "__main__":
    main(*sys.argv[1:])
