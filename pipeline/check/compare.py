"""Both tables summed up bucket by bucket, slice by slice: spread over workers, and gone on with after a stop."""

import struct
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from pipeline.check.changes import Look, look
from pipeline.check.digests import BucketMap, bucket_map
from pipeline.check.pair import Pair
from pipeline.endpoints import Endpoint
from pipeline.errors import PipelineError
from pipeline.events import Compared
from pipeline.failpoints import failpoint
from pipeline.ledger.comparisons import Saved, SavedSide, forget_comparisons, read_comparison, save_comparison
from pipeline.ledger.runs import fingerprint
from pipeline.options import DEFAULT_SLICE_BYTES
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Cursor, clock
from pipeline.postgres.slices import Slice, plan_keys, plan_pages
from pipeline.postgres.tables import Table
from pipeline.settings import Route

# A comparison that is stopped repeats no more than this much of its work.
SAVE_SECONDS = 5.0
# Bucket, rows, embeddings; the sum of 64-bit digests follows, as a number of 16 bytes.
_ENTRY = struct.Struct("<Hqq")
_SUM_BYTES = 16


@dataclass(slots=True, kw_only=True)
class Side:
    """One side of a comparison: how the table stood before it was read, its slices, and what is summed up of them."""

    endpoint: Endpoint
    table: Table
    horizon: Look
    slices: tuple[Slice, ...]
    done: list[int] = field(default_factory=list)
    sums: BucketMap = field(default_factory=lambda: BucketMap(buckets={}))

    def saved(self) -> SavedSide:
        """Return it as the ledger keeps it."""
        return SavedSide(
            horizon=self.horizon.to_json(), slices=self.slices, done=tuple(self.done), buckets=packed(self.sums)
        )

    def resume(self, saved: SavedSide) -> None:
        """Go on where an interrupted comparison was."""
        self.horizon = Look.from_json(saved.horizon)
        self.slices, self.done, self.sums = saved.slices, list(saved.done), unpacked(saved.buckets)


def compare(crew: Crew, route: Route, pair: Pair, *, workers: int, restart: bool, kept: bool) -> tuple[Side, Side]:
    """Sum both tables up, both at the same time; blocks, and emits how far it is.

    ``workers`` sessions read each side. With ``kept`` the ledger is told every few seconds, so that the same
    comparison, begun again, goes on; unless ``restart`` says otherwise, or a table was written anew since.
    Each slice is read in a snapshot of its own: what changes meanwhile is found from the horizons.
    """
    sides = crew.beside(
        partial(_side, crew, route.source, pair.source, workers),
        partial(_side, crew, route.target, pair.target, workers),
    )
    comparison = _Comparison(crew, route, pair, sides)
    if kept:
        comparison.begin(restart=restart)
    comparison.run(workers)
    return sides


def _side(crew: Crew, endpoint: Endpoint, table: Table, workers: int) -> Side:
    with crew.session(endpoint, "verify") as session:
        horizon = look(session, table)
    # What is no heap is summed up whole: to cut it, its keys would have to be sorted first.
    slices = plan_pages(table, DEFAULT_SLICE_BYTES, workers) if table.paged else plan_keys(())
    return Side(endpoint=endpoint, table=table, horizon=horizon, slices=slices)


class _Comparison:
    """The work on both sides, and what the ledger knows of it."""

    def __init__(self, crew: Crew, route: Route, pair: Pair, sides: tuple[Side, Side]) -> None:
        self._crew = crew
        self._route = route
        self._pair = pair
        self._sides = sides
        self._fingerprint = fingerprint(pair.source, pair.target, pair.columns)
        self._id: int | None = None
        self._kept = False
        self._lock = threading.Lock()
        self._failed = threading.Event()

    def begin(self, *, restart: bool) -> None:
        """Take up what an interrupted comparison has left in the ledger, if it still holds."""
        self._kept = True
        with self._crew.session(self._route.target, "verify") as session:
            with session.transaction(read_only=True, single=True) as cursor:
                saved = read_comparison(cursor, self._route.table, self._fingerprint)
            if saved is None:
                return
            if restart or not self._holds(saved):
                with session.transaction(single=True) as cursor:
                    forget_comparisons(cursor, self._route.table)
                return
        for side, found in zip(self._sides, (saved.source, saved.target), strict=True):
            side.resume(found)
        self._id = saved.id

    def _holds(self, saved: Saved) -> bool:
        """Return whether the saved slices mean the same rows: a rewrite moves rows about, and so does a restore."""
        pairs = zip(self._sides, (saved.source, saved.target), strict=True)
        return all(
            side.horizon.files == before.files and before.holds(side.table, side.horizon.horizon)
            for side, before in ((side, Look.from_json(found.horizon)) for side, found in pairs)
        )

    def run(self, workers: int) -> None:
        """Work through the slices of both sides; save what is done every few seconds, and forget it at the end."""
        futures: list[Future[None]] = []
        for side in self._sides:
            todo = deque(part for part in side.slices if part.ordinal not in side.done)
            futures += [self._crew.start(self._work, side, todo) for _ in range(min(workers, len(todo)))]
        saved = clock()
        pending = set(futures)
        while pending:
            pending = wait(pending, timeout=SAVE_SECONDS).not_done
            if self._failed.is_set():
                break
            if pending and self._kept and clock() - saved >= SAVE_SECONDS:
                self._save()
                saved = clock()
        wait(futures)
        failed = [error for future in futures if (error := future.exception()) is not None]
        if failed:
            if self._kept and isinstance(failed[0], PipelineError) and failed[0].retryable:
                self._save_if_possible()
            raise failed[0]
        if self._id is not None:
            with self._ledger() as cursor:
                forget_comparisons(cursor, self._route.table)

    def _work(self, side: Side, todo: deque[Slice]) -> None:
        try:
            with self._crew.session(side.endpoint, "verify") as session:
                while todo and not self._failed.is_set():
                    self._crew.check()
                    try:
                        part = todo.popleft()
                    except IndexError:
                        return
                    columns, embedding = self._pair.columns, self._route.table.embedding
                    sums = bucket_map(session, side.table, columns, embedding, part)
                    with self._lock:
                        side.sums = side.sums.plus(sums)
                        side.done.append(part.ordinal)
                        done = sum(len(one.done) for one in self._sides)
                    self._crew.emit(Compared(slices_done=done, slices=sum(len(one.slices) for one in self._sides)))
                    failpoint("after_compared")
        except BaseException:
            self._failed.set()
            raise

    def _save(self) -> None:
        with self._lock:
            here, there = (side.saved() for side in self._sides)
        with self._ledger() as cursor:
            self._id = save_comparison(
                cursor, self._id, self._route.labels, self._route.table, self._fingerprint, (here, there)
            )

    @contextmanager
    def _ledger(self) -> Iterator[Cursor]:
        with self._crew.session(self._route.target, "verify") as session, session.transaction(single=True) as cursor:
            yield cursor

    def _save_if_possible(self) -> None:
        """Save what is done although a side is lost; if it is the target's, the last save has to do."""
        try:
            self._save()
        except PipelineError:
            return


def packed(sums: BucketMap) -> bytes:
    """Return a bucket map as bytes, 34 of them a bucket."""
    return b"".join(
        _ENTRY.pack(bucket, rows, filled) + total.to_bytes(_SUM_BYTES, "little", signed=True)
        for bucket, (rows, filled, total) in sums.buckets.items()
    )


def unpacked(data: bytes) -> BucketMap:
    """Return the bucket map that ``packed`` wrote."""
    step = _ENTRY.size + _SUM_BYTES
    buckets: dict[int, tuple[int, int, int]] = {}
    for place in range(0, len(data), step):
        bucket, rows, filled = _ENTRY.unpack_from(data, place)
        total = int.from_bytes(data[place + _ENTRY.size : place + step], "little", signed=True)
        buckets[bucket] = (rows, filled, total)
    return BucketMap(buckets=buckets)
