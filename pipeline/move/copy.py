"""The copy of a table: slices by worker threads, then what changed meanwhile, then the indexes."""

from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import TypeVar

from pipeline.events import CopyDone, Event, FoundRows, Loaded, Planned, Quarantined, Reconciled, Warned
from pipeline.failpoints import failpoint
from pipeline.ledger import leases, runs
from pipeline.move.lease import Lease
from pipeline.move.load import Tally, load
from pipeline.move.plan import Job, enter, prepare
from pipeline.move.quarantine import set_aside
from pipeline.move.rebuild import analyze, defer_indexes, rebuild_indexes
from pipeline.move.retry import with_retries
from pipeline.move.settle import settle
from pipeline.options import CopyOptions
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Session, clock
from pipeline.postgres.sequences import read_sequences, set_sequences
from pipeline.settings import Route

T = TypeVar("T")


def copy(route: Route, options: CopyOptions) -> Generator[Event, None, None]:
    """Copy the table from source to target, or continue where an earlier copy stopped.

    A generator of events that ends with CopyDone; closing it stops the work within two seconds, and
    what was committed stays. Raises PipelineError.
    """
    started = clock()
    with Crew(options.stall_seconds) as crew:
        job = crew.call(prepare, crew, route, options)
        if job.run.finished is not None:
            yield _already_done(job, started)
            return
        lease = Lease(crew, route.target, job.run, options.deadline_seconds)
        work = partial(enter, generation=lease.generation)
        job = _step(crew, job, lease, options.deadline_seconds, "reading the ledger", work)
        if job.run.finished is not None:
            lease.release()
            yield _already_done(job, started)
            return
        failpoint("after_lease")
        yield from _run(crew, job, lease, options, started)


def _run(crew: Crew, job: Job, lease: Lease, options: CopyOptions, started: float) -> Iterator[Event]:
    step = partial(_step, crew, job, lease, options.deadline_seconds)
    yield _planned(job, options)
    yield from _found(job, options)
    quarantined = yield from _set_aside(crew, job, lease, options, told=0)
    if not job.run.rows_before and not any(part.done for part in job.slices):
        yield from step("setting the indexes aside", partial(_defer, lease))
    crew.warmed()
    tally = Tally()
    yield from load(crew, job, lease, options, tally)
    load_seconds = clock() - tally.started
    yield Loaded(rows=tally.rows, bytes=tally.bytes, seconds=load_seconds)
    # Beside the pass, not after it: none of the three waits for another.
    closing = crew.start(step, "closing the load", _mark_loaded)
    analysis = crew.start(step, "refreshing statistics", _analyze)
    passes: list[Reconciled] = []
    seen = yield from _settle(crew, job, lease, options, job.run.source_horizon, passes)
    yield from crew.follow([closing], guards=[lease.future])
    yield from crew.follow([analysis], guards=[lease.future])
    yield from analysis.result()
    building = clock()
    builder = crew.start(step, "building the indexes", _rebuild(crew, lease, options))
    yield from crew.follow([builder], guards=[lease.future])
    index_seconds = clock() - building
    if builder.result():
        # An index takes minutes, and legacy went on meanwhile.
        yield from _settle(crew, job, lease, options, seen, passes)
    quarantined = yield from _set_aside(crew, job, lease, options, told=quarantined)
    lease.leave()
    rows, refused = step("closing the books", partial(_finish, lease, options, passes[-1]))
    yield from refused
    yield CopyDone(
        run=job.run.id,
        already_done=False,
        rows=rows,
        moved_rows=tally.rows,
        moved_bytes=tally.bytes,
        slices=len(job.slices),
        moved_slices=tally.slices,
        retries=tally.retries,
        changed_rows=sum(p.upserted + p.deleted for p in passes),
        quarantined_rows=quarantined,
        rows_before=job.run.rows_before,
        foreign_rows=passes[-1].foreign,
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
    settled = crew.start(settle, crew, job, lease, options, since, tuple(passes))
    for event in crew.follow([settled], guards=[lease.future]):
        if isinstance(event, Reconciled):
            passes.append(event)
        yield event
    return settled.result()


def _found(job: Job, options: CopyOptions) -> Iterator[Event]:
    if job.existing is not None and job.existing.rows:
        yield FoundRows(
            table=job.pair.target.qualified,
            equal=job.existing.equal,
            different=job.existing.different,
            only_there=job.existing.only_there,
            on_conflict=options.on_conflict,
        )


def _set_aside(crew: Crew, job: Job, lease: Lease, options: CopyOptions, told: int) -> Generator[Event, None, int]:
    """Write down the rows that are left out; before the load, and again for what changed meanwhile."""
    if not job.pair.unfit:
        return 0

    def attempt(_number: int) -> int:
        return set_aside(crew, job, lease)

    work = crew.start(with_retries, crew, "the quarantine", options.deadline_seconds, attempt)
    yield from crew.follow([work], guards=[lease.future])
    if (rows := work.result()) != told:
        yield Quarantined(rows=rows)
    return rows


def _step(
    crew: Crew, job: Job, lease: Lease, deadline_seconds: float, what: str, work: Callable[[Session, Job], T]
) -> T:
    """Do one short, repeatable step on a session of its own, in a thread, again after a lost connection."""

    def attempt(_number: int) -> T:
        with crew.session(job.route.target, lease.purpose) as session:
            return work(session, job)

    return crew.call(with_retries, crew, what, deadline_seconds, attempt)


def _mark_loaded(session: Session, job: Job) -> None:
    failpoint("before_loaded")
    with session.transaction(single=True) as cursor:
        runs.mark_loaded(cursor, job.run.id)


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


def _rebuild(crew: Crew, lease: Lease, options: CopyOptions) -> Callable[[Session, Job], tuple[str, ...]]:
    def rebuild(session: Session, job: Job) -> tuple[str, ...]:
        return rebuild_indexes(crew, session, job.route, job.pair.target, options, lease)

    return rebuild


def _analyze(session: Session, job: Job) -> list[Event]:
    """Refresh the planner's statistics: without them it would not choose an index."""
    if job.pair.target.owned:
        analyze(session, job.pair.target)
        return []
    return [
        Warned(
            fact=f"{job.pair.target.qualified} was not analyzed: this role does not own it",
            hint=f"as its owner: ANALYZE {job.pair.target.qualified}",
        )
    ]


def _finish(
    lease: Lease, options: CopyOptions, last: Reconciled, session: Session, job: Job
) -> tuple[int, list[Event]]:
    """Move the sequences behind the rows that came with values of their own, and close the run.

    What the last pass found is written down for a sync that goes on from it. Returns how many rows the run brought,
    and warnings of sequences that this role may not set.
    """
    failpoint("before_finish")
    # Which rows were kept, a run that went on does not know any more.
    kept = options.on_conflict == "keep" and job.run.rows_before and (job.existing is None or job.existing.different)
    covered = not kept
    with session.transaction(read_only=True, single=True) as cursor:
        sequences = read_sequences(cursor, job.pair.target)
    with session.transaction(single=not sequences) as cursor:
        refused = set_sequences(cursor, job.pair.target, sequences)
        rows = runs.mark_finished(
            cursor,
            job.run.id,
            lease.generation,
            (job.pair.source.timeline, job.pair.target.timeline),
            covered=covered,
            equal=covered and not last.foreign,
        )
        leases.check_guard(cursor)
    return rows, [
        Warned(
            fact=f"the sequence {name} was not set behind the rows: this role may not",
            hint=f"as its owner: SELECT setval('{name}', ...) with the largest value of its column",
        )
        for name in refused
    ]


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
        bytes_done=sum(part.bytes or 0 for part in done),
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
        quarantined_rows=0,
        rows_before=job.run.rows_before,
        foreign_rows=0,
        settled=True,
        indexes=(),
        load_seconds=0.0,
        index_seconds=0.0,
        seconds=clock() - started,
    )
