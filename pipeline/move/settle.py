"""After the load: passes over what changed on the source, until one finds nothing."""

from functools import partial

from pipeline.check.changes import Key, changed_keys, key_sums, keys_in_buckets
from pipeline.events import Reconciled, Warned
from pipeline.ledger import leases, runs
from pipeline.move.lease import Lease
from pipeline.move.plan import Job, count_rows
from pipeline.move.reconcile import Outcome, reconcile
from pipeline.move.retry import with_retries
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Session, clock, horizon
from pipeline.wording import counted

# A source with a steady writer never holds still; after this many passes the next command goes on.
MAX_PASSES = 10
BATCH_KEYS = 2_000


def settle(crew: Crew, job: Job, lease: Lease, since: int, done: int, deadline_seconds: float) -> int:
    """Reconcile what changed since a horizon, pass by pass, until one has nothing to write; return its horizon.

    Every pass is recorded by moving the run's horizon, so that an interrupted one is done again and a
    finished one is not. ``done`` passes went before, for their numbers. A transaction that stays open
    on the source holds the horizon back: its pass finds the same keys again, and writes nothing. A
    source that was quiet costs two scans of its heap and one of the target's.
    """
    for number in range(done + 1, done + MAX_PASSES + 1):
        started = clock()
        work = partial(_pass, crew, job, lease, since)
        changed, since, outcome = with_retries(crew, "the pass over changed rows", deadline_seconds, work)
        crew.emit(
            Reconciled(
                number=number,
                changed=changed,
                upserted=outcome.inserted + outcome.updated,
                deleted=outcome.deleted,
                seconds=clock() - started,
            )
        )
        if not outcome.written:
            return since
    crew.emit(
        Warned(
            fact=f"the source still changes: {counted(outcome.written, 'row')} in the last of {MAX_PASSES} passes",
            hint="run pipeline verify once its writers are quiet",
        )
    )
    return since


def _pass(crew: Crew, job: Job, lease: Lease, since: int, _attempt: int) -> tuple[int, int, Outcome]:
    """Do one pass; return how many keys it found, its own horizon, and what it wrote."""
    with (
        crew.session(job.route.source, lease.purpose) as source,
        crew.session(job.route.source, lease.purpose) as reader,
        crew.session(job.route.target, lease.purpose) as target,
    ):
        with source.transaction(read_only=True) as cursor:
            now = horizon(cursor)
        total = Outcome(inserted=0, updated=0, deleted=0)
        found = 0
        for keys in changed_keys(source, job.pair.source, since):
            found += len(keys)
            total = _apply(crew, job, lease, (reader, target), keys, total)
        vanished = _vanished_keys(crew, job, (source, target))
        for first in range(0, len(vanished), BATCH_KEYS):
            total = _apply(crew, job, lease, (reader, target), vanished[first : first + BATCH_KEYS], total)
        with target.transaction(then=lease.guard) as cursor:
            leases.check_guard(cursor)
            runs.move_horizon(cursor, job.run.id, now)
    return found + len(vanished), now, total


def _apply(
    crew: Crew, job: Job, lease: Lease, sessions: tuple[Session, Session], keys: list[Key], total: Outcome
) -> Outcome:
    crew.check()
    done = reconcile(*sessions, job.pair, keys, lease)
    return Outcome(
        inserted=total.inserted + done.inserted,
        updated=total.updated + done.updated,
        deleted=total.deleted + done.deleted,
    )


def _vanished_keys(crew: Crew, job: Job, sessions: tuple[Session, Session]) -> list[Key]:
    """Return the keys that one side has and the other has not: deleted on the source, or not yet there.

    A key that only the target has may go only while the run's books account for every row there;
    rows that somebody else wrote are reported and left alone.
    """
    source, target = sessions
    theirs = crew.start(key_sums, target, job.pair.target)
    buckets = key_sums(source, job.pair.source).differing(theirs.result())
    if not buckets:
        return []
    here = keys_in_buckets(source, job.pair.source, buckets)
    there = keys_in_buckets(target, job.pair.target, buckets)
    missing, extra = here - there, there - here
    with target.transaction(read_only=True) as cursor:
        foreign = count_rows(cursor, job.pair.target) - runs.rows_brought(cursor, job.run.id)
    if foreign and extra:
        crew.emit(
            Warned(
                fact=f"{target.label} has {counted(len(extra), 'row')} that the source has not, and"
                f" {counted(foreign, 'row')} that this run did not bring: they stay",
                hint="run pipeline verify, which names them",
            )
        )
        return sorted(missing)
    return sorted(missing | extra)
