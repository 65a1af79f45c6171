"""The relay: one slice, streamed from source to target in bounded memory, exactly once."""

import queue
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from psycopg2 import sql

from pipeline.errors import PipelineError, StatementError, StoppedError
from pipeline.postgres.database import Cursor, Session
from pipeline.postgres.pulse import Pulse
from pipeline.postgres.slices import Slice, slice_sql
from pipeline.postgres.tables import Table
from pipeline.postgres.values import value_sql

# One write to the socket; measured: more gains nothing, 8 kB (the driver's default) costs 28 %.
CHUNK_BYTES = 128 * 1024
# What may lie between the two sides. One row may exceed it (a row is the smallest thing to hand over).
PIPE_BYTES = 2 * 1024 * 1024
# How long an idle thread may take to notice that it is done.
IDLE_SECONDS = 0.5


class _AbortedError(RuntimeError):
    """Raised into the driver instead of the real reason, which the driver would send to a server's log."""


class Pipe:
    """A bounded pipe between the thread that reads COPY TO and the one that feeds COPY FROM.

    It never ends early in silence: a binary COPY accepts a stream that just stops as complete, so
    ``read`` returns an empty chunk only after the source said that it is done.
    """

    def __init__(self, on_bytes: Callable[[int], None]) -> None:
        self._on_bytes = on_bytes
        # Of the two connections: while one side waits here for the other, its own server is not silent.
        self.giver, self.taker = Pulse(), Pulse()
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
        # Once a chunk, not once a row: it costs as much as all else here.
        self.giver.beat()
        with self.giver.away(), self._changed:
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
        with self.taker.away():
            return self._read()

    def _read(self) -> bytes:
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
    """What a stream carried: rows read from the source, and bytes of the binary stream."""

    rows: int
    bytes: int


class Stream:
    """One COPY TO on its way through a pipe, and the failure that ended it early, if any."""

    def __init__(self, query: sql.Composable, on_bytes: Callable[[int], None]) -> None:
        self.query = query
        self.pipe = Pipe(on_bytes)
        self.failure: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        """Note why the source gave up, and let the target's side know."""
        self.failure = error
        self.pipe.fail()

    def pour(self, target: Session, cursor: Cursor, statement: sql.Composable) -> Relayed:
        """Feed the stream to a statement that ends with COPY FROM. Raises the side's error that came first."""
        self.pipe.taker = target.pulse
        try:
            with target.translated():
                cursor.copy_expert(statement, self.pipe, CHUNK_BYTES)
        except PipelineError:
            self.pipe.fail()
            if self.failure is not None and not isinstance(self.failure, (StoppedError, _AbortedError)):
                raise self.failure from None
            raise
        rows = self.pipe.messages - 1
        if cursor.rowcount != rows:
            raise StatementError(
                f"{target.label} took {cursor.rowcount} of {rows} rows of a slice; nothing of it was committed",
                "look for triggers or rules on the target's table that swallow rows",
            )
        return Relayed(rows=rows, bytes=self.pipe.bytes)


class Sender:
    """A thread that runs one COPY TO after the other on a source's session, each in a snapshot of its own.

    The next stream fills its pipe while the target still commits the one before: a round trip on one
    side costs the other nothing. ``close`` cuts the session where a stream is under way: the driver
    leaves its result half read.
    """

    def __init__(self, source: Session) -> None:
        self._source = source
        self._queue: queue.SimpleQueue[Stream | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def send(self, query: sql.Composable, on_bytes: Callable[[int], None] = lambda size: None) -> Stream:
        """Queue a COPY TO STDOUT; return its stream at once."""
        stream = Stream(query, on_bytes)
        stream.pipe.giver = self._source.pulse
        self._queue.put(stream)
        return stream

    def close(self, *streams: Stream | None) -> None:
        """End the thread; give up the streams that were not poured to their end."""
        self._queue.put(None)
        for stream in streams:
            if stream is not None:
                stream.pipe.fail()
        self._thread.join(IDLE_SECONDS)
        if self._thread.is_alive():
            self._source.abort()
            self._thread.join()
            self._source.close()

    def _run(self) -> None:
        opened: sql.Composable = sql.SQL("")
        while True:
            try:
                stream = self._queue.get_nowait()
            except queue.Empty:
                opened = self._end(opened)
                stream = self._queue.get()
            if stream is None:
                self._end(opened)
                return
            try:
                with self._source.translated(), self._source.connection.cursor() as cursor:
                    cursor.copy_expert(opened + self._source.begin_sql(read_only=True) + stream.query, stream.pipe)
                opened = sql.SQL("COMMIT;")
                stream.pipe.end()
            except BaseException as error:  # noqa: BLE001 - raised again where the stream is poured
                stream.fail(error)
                self._source.abort()
                self._refuse_the_rest(error)
                return

    def _end(self, opened: sql.Composable) -> sql.Composable:
        """End the last stream's transaction, where no next one does it: none stays open while we wait."""
        if opened != sql.SQL(""):
            with suppress(PipelineError), self._source.translated(), self._source.connection.cursor() as cursor:
                cursor.execute("COMMIT")
        return sql.SQL("")

    def _refuse_the_rest(self, error: BaseException) -> None:
        while (stream := self._queue.get()) is not None:
            stream.fail(error)


def select_sql(table: Table, columns: tuple[str, ...], part: Slice) -> sql.Composable:
    """Return COPY TO of one slice's rows."""
    return sql.SQL("COPY (SELECT {} {}) TO STDOUT (FORMAT binary)").format(
        sql.SQL(", ").join(value_sql(table, name) for name in columns), slice_sql(table, part)
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

    ``on_bytes`` is told the size of every chunk that was handed over. Raises the source's error where
    that side failed first, else the target's; the source's session is of no use then.
    """
    sender = Sender(source)
    stream = sender.send(query, on_bytes)
    try:
        return stream.pour(target, cursor, into)
    finally:
        sender.close(stream)
