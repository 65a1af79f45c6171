"""Sync: the target made equal to the source, by what was touched since both were equal, or by what differs at all."""

from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

from pipeline.check.changes import Look
from pipeline.check.finding import Base, can_be_touched, find_all, touched_keys
from pipeline.events import Event, Reconciled, SyncDone
from pipeline.failpoints import failpoint
from pipeline.ledger import leases, runs
from pipeline.ledger.marks import written_sql
from pipeline.ledger.passes import record_pass
from pipeline.move.bringing import bringing
from pipeline.move.lease import RUN, Lease
from pipeline.move.reconcile import Outcome
from pipeline.move.retry import with_retries
from pipeline.move.sync_plan import SyncJob, planned, policy_of, prepare_sync
from pipeline.options import SyncOptions
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import clock
from pipeline.settings import Route

# A source with a steady writer never holds still; after this many passes the next command goes on.
MAX_PASSES = 10
# A pass this short is the last one: a sync promises what was written before it began.
SHORT_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """One pass: how both tables stood before it, what it did, and how many keys it looked at by themselves.

    ``whole`` says that it saw every row that only the target has, ``incremental`` that it began from a base.
    """

    looks: tuple[Look, Look]
    outcome: Outcome
    touched: int
    whole: bool
    incremental: bool


@dataclass(slots=True, kw_only=True)
class _Done:
    """What all passes have done, and how both tables stood before the last one."""

    looks: tuple[Look, Look] | None = None
    outcome: Outcome = field(default_factory=Outcome)
    foreign: int = 0
    passes: int = 0
    touched: int = 0
    settled: bool = False

    @property
    def covered(self) -> bool:
        """Return whether every row of the source that was not written since the looks stands on the target, equal."""
        return not self.outcome.kept

    def add(self, one: _Pass, seconds: float) -> None:
        """Count a pass. After a short one another would see little more: what was written while this one ran."""
        self.passes += 1
        self.touched += one.touched
        self.outcome = self.outcome.plus(one.outcome)
        self.looks = one.looks
        self.settled = not one.outcome.written or (one.incremental and seconds < SHORT_SECONDS)
        if one.whole:
            self.foreign = one.outcome.foreign


def sync(
    route: Route, options: SyncOptions, shared: Crew | None = None, held: Lease | None = None
) -> Generator[Event, None, None]:
    """Make the target's rows equal to the source's; end with SyncDone.

    What it was that somebody else wrote on the target goes by the options, and what stays is told. Closing
    the generator stops the work within two seconds; what was committed stays, and the next sync goes on.
    A longer piece of work shares its crew, and the lease that it holds. Raises PipelineError.
    """
    started = clock()
    with Crew(options.stall_seconds) if shared is None else nullcontext(shared) as crew:
        job = crew.call(prepare_sync, crew, route, options, to_write=True)
        yield planned(job)
        assert job.run is not None
        lent = held if held is not None and held.run_id == job.run.id else None
        # A look at both tables is short, and goes on beside it; comparing them is long.
        lease = lent or Lease(crew, route.target, job.run, options.deadline_seconds, wait_for_it=job.base is None)
        work = crew.start(_passes, crew, job, lease, options)
        yield from crew.follow([work], guards=[lease.future])
        done = work.result()
        if lent is None:
            lease.release()
        yield _done(job, job.run, done, clock() - started)


def _passes(crew: Crew, job: SyncJob, lease: Lease, options: SyncOptions) -> _Done:
    """Reconcile, pass by pass, until one has nothing to write; record how it ended."""
    done, base = _Done(), job.base
    while done.passes < MAX_PASSES and not done.settled:
        started = clock()
        work = partial(_pass, crew, job, lease, options, base)
        this = with_retries(crew, "the pass over both sides", options.deadline_seconds, work)
        seconds = clock() - started
        done.add(this, seconds)
        crew.emit(
            Reconciled(
                number=done.passes,
                changed=this.touched,
                upserted=this.outcome.inserted + this.outcome.updated,
                deleted=this.outcome.deleted,
                foreign=this.outcome.foreign,
                seconds=seconds,
            )
        )
        if can_be_touched(job.pair):
            base = Base(source=this.looks[0], target=this.looks[1], own=written_sql(lease.run_id, "r"))
    failpoint("before_pass")
    with_retries(crew, "closing the books", options.deadline_seconds, partial(_record, crew, job, lease, done))
    return done


def _pass(crew: Crew, job: SyncJob, lease: Lease, options: SyncOptions, base: Base | None, _attempt: int) -> _Pass:
    """Reconcile what differs, or what was touched since the base."""
    ends = (job.route.source, RUN), (job.route.target, RUN)
    with bringing(crew, job.route, job.pair, lease, policy_of(job, options)) as bringers:
        if base is None:
            looks = find_all(
                crew,
                job.route,
                job.pair,
                lambda batch: bringers.bring([one.key for one in batch]),
                workers=options.workers,
                settle=0.0,
                restart=options.restart,
                kept=True,
                own=written_sql(lease.run_id, "r"),
            ).horizons
        else:
            with crew.together(*ends) as (here, there):
                looks, touched = touched_keys(crew, job.pair, (here, there), base, bringers.settle)
                for keys in touched:
                    bringers.bring(keys)
    outcome = bringers.outcome
    target = looks[1]
    if base is not None and target.rows is not None:
        # As it stands with what this pass has written: to the next one, that is no change.
        target = replace(target, rows=target.rows + outcome.inserted - outcome.deleted)
    return _Pass(
        looks=(looks[0], target),
        outcome=outcome,
        touched=bringers.touched,
        whole=base is None or not (base.exact and base.still(looks)),
        incremental=base is not None,
    )


def _record(crew: Crew, job: SyncJob, lease: Lease, done: _Done, _attempt: int) -> None:
    """Write the pass down, in a transaction that the lease guards."""
    assert done.looks is not None
    with crew.session(job.route.target, lease.purpose) as session, session.transaction(then=lease.guard) as cursor:
        leases.check_guard(cursor)
        record_pass(
            cursor,
            "sync",
            lease.run_id,
            job.route.labels,
            job.route.table,
            job.fingerprint,
            (done.looks[0].to_json(), done.looks[1].to_json()),
            covered=done.covered,
            equal=done.covered and not done.foreign,
            figures={"passes": done.passes, "foreign_rows": done.foreign},
        )


def _done(job: SyncJob, run: runs.Run, done: _Done, seconds: float) -> SyncDone:
    outcome = done.outcome
    return SyncDone(
        run=run.id,
        deep=job.base is None,
        dry=False,
        passes=done.passes,
        touched=done.touched,
        inserted=outcome.inserted,
        updated=outcome.updated,
        deleted=outcome.deleted,
        kept=outcome.kept,
        foreign=done.foreign,
        left=outcome.left,
        settled=done.settled,
        equal=done.settled and done.covered and not done.foreign,
        seconds=seconds,
    )
