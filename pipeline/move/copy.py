"""The copy of a table: slices by worker threads, then what changed meanwhile, then the indexes."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from pipeline.errors import DuplicateKeyError
from pipeline.events import CopyDone, Event, Loaded, Planned, Progress, Reconciled, SliceDone, Warned
from pipeline.ledger import leases, marks, runs
from pipeline.move.lease import Lease
from pipeline.move.plan import Job, check_foreign_rows, prepare
from pipeline.move.rebuild import analyze, defer_indexes, rebuild_indexes
from pipeline.move.reconcile import STAGE, create_stage, upsert_from_stage
from pipeline.move.relay import insert_sql, relay, select_sql
from pipeline.move.retry import with_retries
from pipeline.move.settle import settle
from pipeline.options import CopyOptions
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Session, clock
from pipeline.postgres.slices import Slice
from pipeline.settings import Route

T = TypeVar("T")


@dataclass(slots=True)
class _Tally:
    """What this process has moved so far; written by the workers, read by the main thread."""

    started: float = field(default_factory=clock)
    rows: int = 0
    bytes: int = 0
    slices: int = 0
    retries: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add_bytes(self, size: int) -> None:
        with self.lock:
            self.bytes += size

    def add_slice(self, rows: int, attempts: int) -> None:
        with self.lock:
            self.rows += rows
            self.slices += 1
            self.retries += attempts - 1

    def progress(self) -> Progress:
        return Progress(rows=self.rows, bytes=self.bytes, slices=self.slices, seconds=clock() - self.started)


def copy(route: Route, options: CopyOptions) -> Generator[Event, None, None]:
    """Copy the table from source to target, or continue where an earlier copy stopped.

    A generator of events that ends with CopyDone; closing it stops the work within two seconds, and
    what was committed stays. Raises PipelineError.
    """
    started = clock()
    with Crew() as crew:
        job = crew.call(prepare, crew, route, options.slice_bytes, options.restart)
        if job.run.finished is not None:
            yield _already_done(job, started)
            return
        lease = Lease(crew, route.target, job.run)
        yield from _run(crew, job, lease, options, started)


def _run(crew: Crew, job: Job, lease: Lease, options: CopyOptions, started: float) -> Iterator[Event]:
    step = partial(_step, crew, job, lease, options.deadline_seconds)
    step("checking the rows on the target", check_foreign_rows)
    yield _planned(job, options)
    if not any(part.done for part in job.slices):
        yield from step("setting the indexes aside", partial(_defer, lease))
    tally = _Tally()
    yield from _load(crew, job, lease, options, tally)
    step("closing the load", _mark_loaded)
    load_seconds = clock() - tally.started
    yield Loaded(rows=tally.rows, bytes=tally.bytes, seconds=load_seconds)
    passes: list[Reconciled] = []
    seen = yield from _settle(crew, job, lease, options, job.run.source_horizon, passes)
    building = clock()
    builder = crew.start(
        _step, crew, job, lease, options.deadline_seconds, "building the indexes", _rebuild(crew, lease)
    )
    yield from crew.follow([builder], guards=[lease.future])
    index_seconds = clock() - building
    if builder.result():
        # An index takes minutes, and legacy went on meanwhile.
        yield from _settle(crew, job, lease, options, seen, passes)
    yield from step("closing the books", partial(_finish, lease))
    lease.release()
    yield CopyDone(
        run=job.run.id,
        already_done=False,
        rows=step("reading the books", _rows_brought),
        moved_rows=tally.rows,
        moved_bytes=tally.bytes,
        slices=len(job.slices),
        moved_slices=tally.slices,
        retries=tally.retries,
        changed_rows=sum(p.upserted + p.deleted for p in passes),
        settled=passes[-1].upserted + passes[-1].deleted == 0,
        indexes=builder.result(),
        load_seconds=load_seconds,
        index_seconds=index_seconds,
        seconds=clock() - started,
    )


def _settle(
    crew: Crew, job: Job, lease: Lease, options: CopyOptions, since: int, passes: list[Reconciled]
) -> Generator[Event, None, int]:
    """Bring what changed since a horizon; note the passes, return the horizon of the last."""
    settled = crew.start(settle, crew, job, lease, since, len(passes), options.deadline_seconds)
    for event in crew.follow([settled], guards=[lease.future]):
        if isinstance(event, Reconciled):
            passes.append(event)
        yield event
    return settled.result()


def _load(crew: Crew, job: Job, lease: Lease, options: CopyOptions, tally: _Tally) -> Iterator[Event]:
    todo = deque(part for part in job.slices if not part.done)
    workers = [
        crew.start(_work, crew, job, lease, options, todo, tally) for _ in range(min(options.workers, len(todo)))
    ]
    yield from crew.follow(workers, tick=tally.progress, guards=[lease.future])


def _work(crew: Crew, job: Job, lease: Lease, options: CopyOptions, todo: deque[Slice], tally: _Tally) -> None:
    """Take slices until none is left. Sessions are kept from slice to slice, and made anew after a failure."""
    while True:
        with (
            crew.session(job.route.source, lease.purpose) as source,
            crew.session(job.route.target, lease.purpose) as target,
        ):
            while not (source.lost or target.lost):
                crew.check()
                try:
                    part = todo.popleft()
                except IndexError:
                    return
                _carry(crew, job, lease, options, part, tally, (source, target))


@contextmanager
def _both(crew: Crew, job: Job, lease: Lease) -> Iterator[tuple[Session, Session]]:
    with (
        crew.session(job.route.source, lease.purpose) as source,
        crew.session(job.route.target, lease.purpose) as target,
    ):
        yield source, target


def _carry(
    crew: Crew,
    job: Job,
    lease: Lease,
    options: CopyOptions,
    part: Slice,
    tally: _Tally,
    sessions: tuple[Session, Session],
) -> None:
    """Carry one slice, on the worker's sessions first and on new ones after a lost connection.

    A COMMIT whose answer was lost may have happened or not: the mark is read before any further try.
    """
    started = clock()

    def attempt(number: int) -> tuple[int, int, int]:
        if number == 1:
            return (*_slice(job, lease, part, tally, *sessions, number), number)
        with (
            crew.session(job.route.source, lease.purpose) as source,
            crew.session(job.route.target, lease.purpose) as target,
        ):
            with target.transaction(then=lease.guard) as cursor:
                leases.check_guard(cursor)
                mark = marks.slice_mark(cursor, job.run.id, part.ordinal)
            if mark is not None:
                return (*mark, number)
            return (*_slice(job, lease, part, tally, source, target, number), number)

    rows, size, attempts = with_retries(crew, f"slice {part.ordinal}", options.deadline_seconds, attempt)
    tally.add_slice(rows, attempts)
    crew.emit(SliceDone(ordinal=part.ordinal, rows=rows, bytes=size, seconds=clock() - started, attempts=attempts))


def _slice(
    job: Job, lease: Lease, part: Slice, tally: _Tally, source: Session, target: Session, attempt: int
) -> tuple[int, int]:
    """Bring one slice's rows and set its mark, in one transaction on the target; return rows and bytes."""
    query = select_sql(job.pair.source, job.pair.columns, part)
    try:
        with target.transaction(then=lease.guard) as cursor:
            leases.check_guard(cursor)
            into = insert_sql(job.pair.target.identifier, job.pair.columns)
            carried = relay(source, query, target, cursor, into, tally.add_bytes)
            marks.finish_slice(cursor, job.run.id, part, carried.rows, carried.bytes, attempt)
            return carried.rows, carried.bytes
    except DuplicateKeyError:
        pass
    # A row that was updated meanwhile lies in two slices, as two versions: the later one is written
    # over the earlier, and the pass over what changed settles which one is right.
    with Session(source.endpoint, lease.purpose) as fresh, target.transaction(then=lease.guard) as cursor:
        leases.check_guard(cursor)
        create_stage(cursor, job.pair.target, job.pair.columns)
        carried = relay(fresh, query, target, cursor, insert_sql(STAGE, job.pair.columns), tally.add_bytes)
        inserted, _ = upsert_from_stage(cursor, job.pair.target, job.pair.columns)
        marks.finish_slice(cursor, job.run.id, part, inserted, carried.bytes, attempt)
    return inserted, carried.bytes


def _step(
    crew: Crew, job: Job, lease: Lease, deadline_seconds: float, what: str, work: Callable[[Session, Job], T]
) -> T:
    """Do one short, repeatable step on a session of its own, in a thread, again after a lost connection."""

    def attempt(_number: int) -> T:
        with crew.session(job.route.target, lease.purpose) as session:
            return work(session, job)

    return crew.call(with_retries, crew, what, deadline_seconds, attempt)


def _mark_loaded(session: Session, job: Job) -> None:
    with session.transaction() as cursor:
        runs.mark_loaded(cursor, job.run.id)


def _rows_brought(session: Session, job: Job) -> int:
    with session.transaction(read_only=True) as cursor:
        return runs.rows_brought(cursor, job.run.id)


def _defer(lease: Lease, session: Session, job: Job) -> list[Event]:
    """Defer the indexes of an empty table; a table that this role does not own keeps them."""
    if job.pair.target.owned:
        return list(defer_indexes(session, job.pair.target, lease))
    return [
        Warned(
            fact=f"the indexes of {job.pair.target.qualified} stay while it is filled: this role does not own it",
            hint="use the table's owner for a load several times faster",
        )
    ]


def _rebuild(crew: Crew, lease: Lease) -> Callable[[Session, Job], tuple[str, ...]]:
    def rebuild(session: Session, job: Job) -> tuple[str, ...]:
        return rebuild_indexes(crew, session, job.route.target, job.pair.target, job.route.dimensions, lease)

    return rebuild


def _finish(lease: Lease, session: Session, job: Job) -> list[Event]:
    """Refresh statistics and close the run's books."""
    events: list[Event] = []
    if job.pair.target.owned:
        analyze(session, job.pair.target)
    else:
        events.append(
            Warned(
                fact=f"{job.pair.target.qualified} was not analyzed: this role does not own it",
                hint=f"as its owner: ANALYZE {job.pair.target.qualified}",
            )
        )
    with session.transaction(then=lease.guard) as cursor:
        leases.check_guard(cursor)
        runs.mark_finished(cursor, job.run.id)
    return events


def _planned(job: Job, options: CopyOptions) -> Planned:
    done = [part for part in job.slices if part.done]
    return Planned(
        run=job.run.id,
        table=job.pair.target.qualified,
        source=job.route.source.label,
        target=job.route.target.label,
        resumed=job.resumed,
        slices=len(job.slices),
        slices_done=len(done),
        rows_done=sum(part.rows or 0 for part in done),
        bytes_estimate=job.pair.source.bytes,
        rows_estimate=job.pair.source.rows_estimate,
        workers=min(options.workers, len(job.slices) - len(done)),
    )


def _already_done(job: Job, started: float) -> CopyDone:
    return CopyDone(
        run=job.run.id,
        already_done=True,
        rows=sum(part.rows or 0 for part in job.slices) + job.run.reconciled_rows,
        moved_rows=0,
        moved_bytes=0,
        slices=len(job.slices),
        moved_slices=0,
        retries=0,
        changed_rows=0,
        settled=True,
        indexes=(),
        load_seconds=0.0,
        index_seconds=0.0,
        seconds=clock() - started,
    )
