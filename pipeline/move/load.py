"""The load: slices carried by worker threads, each exactly once."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from pipeline.errors import CrowdedError, DuplicateKeyError, PipelineError, StatementError
from pipeline.events import Event, Progress, Retrying, SliceDone, Warned, WorkerProgress
from pipeline.failpoints import failpoint
from pipeline.ledger import leases, marks
from pipeline.move.lease import Lease
from pipeline.move.plan import Job
from pipeline.move.reconcile import STAGE, Policy, create_stage, upsert_from_stage
from pipeline.move.relay import Relayed, Sender, Stream, insert_sql, relay, select_sql
from pipeline.move.retry import with_retries
from pipeline.options import CopyOptions
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Session, clock
from pipeline.postgres.slices import Slice


@dataclass(slots=True)
class Seat:
    """What one worker has of its slice so far; written by the worker, read by the main thread."""

    worker: int
    part: Slice
    stream: Stream | None = None
    bytes: int = 0
    bytes_moved: int = 0
    done: bool = False

    @property
    def rows(self) -> int | None:
        """Return how many rows the source has sent of this slice, None where only the target knows."""
        return None if self.stream is None else max(0, self.stream.pipe.messages - 1)

    def progress(self) -> WorkerProgress:
        """Return it as the part of an event."""
        return WorkerProgress(
            worker=self.worker,
            ordinal=self.part.ordinal,
            rows=self.rows,
            bytes=self.bytes,
            bytes_moved=self.bytes_moved,
        )


@dataclass(slots=True)
class Tally:
    """What this process has moved so far; written by the workers, read by the main thread.

    A worker is known by its thread: what is counted, is counted in the thread that moves it.
    """

    started: float = field(default_factory=clock)
    rows: int = 0
    bytes: int = 0
    slices: int = 0
    retries: int = 0
    workers: int = 0
    seats: dict[int, Seat] = field(default_factory=dict)
    seated: int = 0
    on_bytes: Callable[[int], None] = lambda size: None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, part: Slice, stream: Stream | None = None) -> None:
        """Say that this thread begins a slice, or begins it again: what a failed try moved does not count."""
        with self.lock:
            me = threading.get_ident()
            before = self.seats.get(me)
            if before is None:
                self.seated += 1
            elif not before.done:
                self.bytes -= before.bytes
            self.seats[me] = Seat(
                worker=self.seated if before is None else before.worker,
                part=part,
                stream=stream,
                bytes_moved=0 if before is None else before.bytes_moved,
            )

    def add_bytes(self, size: int) -> None:
        """Count bytes that were handed to the target, at the rate that is allowed."""
        with self.lock:
            self.bytes += size
            if (seat := self.seats.get(threading.get_ident())) is not None:
                seat.bytes += size
                seat.bytes_moved += size
        self.on_bytes(size)

    def add_slice(self, carried: Relayed, attempts: int) -> None:
        """Count a slice that is committed: by what its mark says, which another try may have set."""
        with self.lock:
            self.rows += carried.rows
            self.bytes += carried.bytes
            self.slices += 1
            self.retries += attempts - 1
            if (seat := self.seats.get(threading.get_ident())) is not None:
                self.bytes -= seat.bytes
                seat.done = True

    def leave(self) -> bool:
        """Count a worker out; False for the last one, who has to stay for as long as there is work."""
        with self.lock:
            self.seats.pop(threading.get_ident(), None)
            if self.workers == 1:
                return False
            self.workers -= 1
            return True

    def progress(self) -> Progress:
        """Return the totals as an event."""
        with self.lock:
            seats = sorted(self.seats.values(), key=lambda seat: seat.worker)
            return Progress(
                rows=self.rows + sum(seat.rows or 0 for seat in seats if not seat.done),
                bytes=self.bytes,
                slices=self.slices,
                seconds=clock() - self.started,
                workers=tuple(seat.progress() for seat in seats),
            )


class Limiter:
    """Hold all workers together to a rate; no burst is saved up."""

    def __init__(self, bytes_per_second: float | None, stopping: threading.Event) -> None:
        self._rate = bytes_per_second
        self._stopping = stopping
        self._free_at = 0.0
        self._lock = threading.Lock()

    def pass_on(self, size: int) -> None:
        """Wait until ``size`` more bytes may have gone."""
        if self._rate is None:
            return
        with self._lock:
            now = clock()
            self._free_at = max(self._free_at, now) + size / self._rate
            wait = self._free_at - now
        self._stopping.wait(wait)


def load(crew: Crew, job: Job, lease: Lease, options: CopyOptions, tally: Tally) -> Iterator[Event]:
    """Carry every slice that is not done; yield its progress."""
    todo = deque(part for part in job.slices if not part.done)
    limiter = Limiter(options.max_bytes_per_second, crew.stopping)
    tally.on_bytes = limiter.pass_on
    tally.workers = min(options.workers, len(todo))
    workers = [crew.start(_work, crew, job, lease, options, todo, tally) for _ in range(tally.workers)]
    yield from crew.follow(workers, tick=tally.progress, guards=[lease.future])


def _work(crew: Crew, job: Job, lease: Lease, options: CopyOptions, todo: deque[Slice], tally: Tally) -> None:
    """Take slices until none is left. Sessions are kept from slice to slice, and made anew after a failure."""
    while todo:
        with ExitStack() as stack:

            def connect(_number: int, stack: ExitStack = stack) -> tuple[Session, Session] | None:
                try:
                    return stack.enter_context(_both(crew, job, lease))
                except CrowdedError as error:
                    if not tally.leave():
                        raise
                    crew.emit(Warned(fact=f"{error.fact}: the copy goes on with a worker less", hint=error.hint))
                    return None

            sessions = with_retries(crew, "connecting", options.deadline_seconds, connect)
            if sessions is None:
                return
            failed = _carry_all(crew, job, lease, todo, tally, sessions)
        if failed is None:
            break
        _carry_again(crew, job, lease, options, tally, *failed)
    tally.leave()


@contextmanager
def _both(crew: Crew, job: Job, lease: Lease, number: int = 1) -> Iterator[tuple[Session, Session]]:
    """Yield a session on each side. A server that is slow, not hung, gets twice the time at every try."""
    patience = crew.stall_seconds * 2 ** (number - 1)
    ends = (job.route.source, lease.purpose), (job.route.target, lease.purpose)
    with crew.together(*ends, patience=patience) as (source, target):
        yield source, target


def _carry_all(
    crew: Crew, job: Job, lease: Lease, todo: deque[Slice], tally: Tally, sessions: tuple[Session, Session]
) -> tuple[Slice, PipelineError] | None:
    """Carry slices until none is left, the source always one ahead; return one that failed, and why."""
    source, target = sessions
    sender = Sender(source)
    current = following = None
    try:
        current = _next(job, todo, sender, tally)
        while current is not None:
            crew.check()
            following = _next(job, todo, sender, tally)
            started = clock()
            tally.begin(*current)
            try:
                carried = _bring(job, lease, target, *current)
            except PipelineError as error:
                if not (error.retryable or isinstance(error, DuplicateKeyError)):
                    raise
                return current[0], error
            _tell(crew, tally, current[0], carried, clock() - started, attempts=1)
            current, following = following, None
        return None
    finally:
        if following is not None:
            todo.appendleft(following[0])
        sender.close(*(pair[1] for pair in (current, following) if pair is not None))


def _next(job: Job, todo: deque[Slice], sender: Sender, tally: Tally) -> tuple[Slice, Stream] | None:
    try:
        part = todo.popleft()
    except IndexError:
        return None
    return part, sender.send(select_sql(job.pair.source, job.pair.columns, part), tally.add_bytes)


def _bring(job: Job, lease: Lease, target: Session, part: Slice, stream: Stream) -> Relayed:
    """Bring one slice's rows and set its mark, in one transaction on the target, in three round trips."""
    with target.transaction(begun=False) as cursor:
        into = insert_sql(job.pair.target.identifier, job.pair.columns)
        try:
            carried = stream.pour(target, cursor, target.begin_sql(read_only=False) + lease.raising_guard + into)
        except StatementError as error:
            if error.sqlstate == leases.LEASE_LOST_STATE:
                raise leases.lease_lost() from error
            raise
        failpoint("after_copy")
        marks.finish_slice_and_commit(cursor, job.run.id, part, carried.rows, carried.bytes)
        failpoint("after_commit")
    return carried


def _carry_again(
    crew: Crew, job: Job, lease: Lease, options: CopyOptions, tally: Tally, part: Slice, error: PipelineError
) -> None:
    """Carry a slice whose first try failed: on new sessions, by way of a staging table.

    A COMMIT whose answer was lost may have happened or not, so the mark is read first. A row that was
    updated meanwhile lies in two slices, as two versions: the later one is written over the earlier,
    and the pass over what changed settles which one is right.
    """
    what = f"slice {part.ordinal}"
    started = clock()
    if error.retryable:
        crew.emit(Retrying(what=what, attempt=1, delay=0.0, fact=error.fact))

    def attempt(number: int) -> tuple[Relayed, int]:
        with _both(crew, job, lease, number) as (source, target), target.transaction(then=lease.guard) as cursor:
            leases.check_guard(cursor)
            mark = marks.slice_mark(cursor, job.run.id, part.ordinal)
            if mark is not None:
                return Relayed(rows=mark[0], bytes=mark[1]), number
            create_stage(cursor, job.pair.target, job.pair.columns)
            tally.begin(part)
            query = select_sql(job.pair.source, job.pair.columns, part)
            carried = relay(source, query, target, cursor, insert_sql(STAGE, job.pair.columns), tally.add_bytes)
            with target.patient():
                policy = Policy(on_conflict=options.on_conflict)
                inserted, _ = upsert_from_stage(cursor, job.pair, target.label, job.run.id, policy)
            marks.finish_slice(cursor, job.run.id, part, inserted, carried.bytes, number + 1)
            failpoint("before_commit")
            return Relayed(rows=inserted, bytes=carried.bytes), number

    carried, tries = with_retries(crew, what, options.deadline_seconds, attempt)
    _tell(crew, tally, part, carried, clock() - started, attempts=tries + 1)


def _tell(crew: Crew, tally: Tally, part: Slice, carried: Relayed, seconds: float, attempts: int) -> None:
    tally.add_slice(carried, attempts)
    crew.emit(
        SliceDone(ordinal=part.ordinal, rows=carried.rows, bytes=carried.bytes, seconds=seconds, attempts=attempts)
    )
