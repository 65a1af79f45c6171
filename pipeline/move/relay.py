"""The relay: one slice, streamed from source to target in bounded memory, exactly once."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from psycopg2 import sql

from pipeline.errors import StatementError, StoppedError
from pipeline.postgres.database import Cursor, Session
from pipeline.postgres.slices import Slice, condition_sql
from pipeline.postgres.tables import Table

# One write to the socket; measured: more gains nothing, 8 kB (the driver's default) costs 28 %.
CHUNK_BYTES = 128 * 1024
# What may lie between the two sides. One row may exceed it (a row is the smallest thing to hand over).
PIPE_BYTES = 4 * 1024 * 1024


class _AbortedError(RuntimeError):
    """Raised into the driver instead of the real reason, which the driver would send to a server's log."""


class Pipe:
    """A bounded pipe between the thread that reads COPY TO and the one that feeds COPY FROM.

    It never ends early in silence: a binary COPY accepts a stream that just stops as complete, so
    ``read`` returns an empty chunk only after the source said that it is done.
    """

    def __init__(self, on_bytes: Callable[[int], None]) -> None:
        self._on_bytes = on_bytes
        self._chunks: deque[bytes] = deque()
        self._held = 0
        self._rows: list[bytes] = []
        self._rows_bytes = 0
        self._ended = False
        self._failed = False
        self._changed = threading.Condition()
        self.messages = 0
        self.bytes = 0

    def write(self, message: bytes) -> None:
        """Take one message of COPY TO: a row, with the header before the first; the last is the trailer."""
        self.messages += 1
        self._rows.append(message)
        self._rows_bytes += len(message)
        if self._rows_bytes >= CHUNK_BYTES:
            self._hand_over()

    def _hand_over(self) -> None:
        chunk = self._rows[0] if len(self._rows) == 1 else b"".join(self._rows)
        self._rows.clear()
        self._rows_bytes = 0
        with self._changed:
            while self._held and self._held + len(chunk) > PIPE_BYTES and not self._failed:
                self._changed.wait()
            if self._failed:
                raise _AbortedError("aborted")
            self._chunks.append(chunk)
            self._held += len(chunk)
            self._changed.notify_all()

    def end(self) -> None:
        """Say that the source has sent everything."""
        if self._rows:
            self._hand_over()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def fail(self) -> None:
        """Make both sides give up at their next read or write."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def read(self, _size: int) -> bytes:
        """Return the next chunk whole (the driver takes more than it asked for), or b"" at the end."""
        with self._changed:
            while not self._chunks and not self._ended and not self._failed:
                self._changed.wait()
            if self._failed:
                raise _AbortedError("aborted")
            if not self._chunks:
                return b""
            chunk = self._chunks.popleft()
            self._held -= len(chunk)
            self._changed.notify_all()
        self.bytes += len(chunk)
        self._on_bytes(len(chunk))
        return chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Relayed:
    """What a slice carried: rows read from the source, and bytes of the binary stream."""

    rows: int
    bytes: int


def select_sql(table: Table, columns: tuple[str, ...], part: Slice) -> sql.Composable:
    """Return COPY TO of one slice's rows."""
    return sql.SQL("COPY (SELECT {} FROM ONLY {} WHERE {}) TO STDOUT (FORMAT binary)").format(
        sql.SQL(", ").join(map(sql.Identifier, columns)), table.identifier, condition_sql(part)
    )


def insert_sql(into: sql.Composable, columns: tuple[str, ...]) -> sql.Composable:
    """Return COPY FROM into a table; the columns always named, never by position."""
    return sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(
        into, sql.SQL(", ").join(map(sql.Identifier, columns))
    )


def relay(
    source: Session,
    query: sql.Composable,
    target: Session,
    cursor: Cursor,
    into: sql.Composable,
    on_bytes: Callable[[int], None] = lambda size: None,
) -> Relayed:
    """Stream one COPY into another, inside the caller's transaction ``cursor`` on the target.

    ``on_bytes`` is told the size of every chunk that was handed over. The source's side runs in a
    thread of its own, in its own read-only transaction. Raises the source's error where that side
    failed first, else the target's. After a failure the source's session is closed: the driver leaves
    its result half read.
    """
    pipe = Pipe(on_bytes)
    failures: list[BaseException] = []
    sender = threading.Thread(target=_send, args=(source, query, pipe, failures), daemon=True)
    sender.start()
    try:
        with target.translated():
            cursor.copy_expert(into, pipe, CHUNK_BYTES)
    except BaseException:
        pipe.fail()
        # The sender may sit in a read that a slow or dead source never ends.
        source.abort()
        sender.join()
        source.close()
        for failure in failures:
            if not isinstance(failure, (StoppedError, _AbortedError)):
                raise failure from None
        raise
    sender.join()
    rows = pipe.messages - 1
    if failures:
        source.close()
        raise failures[0]
    if cursor.rowcount != rows:
        raise StatementError(
            f"{target.label} took {cursor.rowcount} of {rows} rows of a slice; nothing of it was committed",
            "look for triggers or rules on the target's table that swallow rows",
        )
    return Relayed(rows=rows, bytes=pipe.bytes)


def _send(source: Session, query: sql.Composable, pipe: Pipe, failures: list[BaseException]) -> None:
    try:
        with source.transaction(read_only=True) as cursor:
            cursor.copy_expert(query, pipe)
        pipe.end()
    except BaseException as error:  # noqa: BLE001 - raised again by relay, in the worker's thread
        failures.append(error)
        pipe.fail()
