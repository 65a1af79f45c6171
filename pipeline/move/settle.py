"""After the load: passes over what changed on the source, until one finds nothing."""

from collections.abc import Iterator
from functools import partial

from pipeline.check.changes import Key, changed_keys, key_sums, keys_in_buckets
from pipeline.check.digests import bucket_map, open_buckets
from pipeline.events import Reconciled, Warned
from pipeline.failpoints import failpoint
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
    # What has no heap of its own has no row versions either: there, all rows are compared.
    find = _changes if job.pair.source.heaps else _differences
    with (
        crew.session(job.route.source, lease.purpose) as source,
        crew.session(job.route.source, lease.purpose) as reader,
        crew.session(job.route.target, lease.purpose) as watched,
        crew.session(job.route.target, lease.purpose) as target,
    ):
        with source.transaction(read_only=True) as cursor:
            now = horizon(cursor)
        total = Outcome(inserted=0, updated=0, deleted=0)
        found = 0
        for keys in find(crew, job, (source, watched), since):
            found += len(keys)
            total = _apply(crew, job, lease, (reader, target), keys, total)
        failpoint("before_horizon")
        with target.transaction(then=lease.guard) as cursor:
            leases.check_guard(cursor)
            runs.move_horizon(cursor, job.run.id, now)
    return found, now, total


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


def _changes(crew: Crew, job: Job, sessions: tuple[Session, Session], since: int) -> Iterator[list[Key]]:
    """Yield the keys of what changed since a horizon, then those that one side has and the other has not."""
    source, target = sessions
    yield from changed_keys(source, job.pair.source, since)
    theirs = crew.start(key_sums, target, job.pair.target)
    buckets = key_sums(source, job.pair.source).differing(theirs.result())
    if not buckets:
        return
    here = keys_in_buckets(source, job.pair.source, buckets)
    there = keys_in_buckets(target, job.pair.target, buckets)
    yield from _batches(sorted(here - there))
    yield from _batches(_removable(crew, job, target, sorted(there - here)))


def _differences(crew: Crew, job: Job, sessions: tuple[Session, Session], _since: int) -> Iterator[list[Key]]:
    """Yield the keys of all rows that differ, by the digests of both sides."""
    source, target = sessions
    pair, embedding = job.pair, job.route.table.embedding
    theirs = crew.start(bucket_map, target, pair.target, pair.columns, embedding)
    buckets = bucket_map(source, pair.source, pair.columns, embedding).differing(theirs.result())
    extra: list[Key] = []
    batch: list[Key] = []
    for difference in open_buckets((source, pair.source), (target, pair.target), pair.columns, buckets):
        if difference.kind == "extra":
            extra.append(difference.key)
            continue
        batch.append(difference.key)
        if len(batch) == BATCH_KEYS:
            yield batch
            batch = []
    yield from _batches(batch)
    yield from _batches(_removable(crew, job, target, extra))


def _batches(keys: list[Key]) -> Iterator[list[Key]]:
    return (keys[first : first + BATCH_KEYS] for first in range(0, len(keys), BATCH_KEYS))


def _removable(crew: Crew, job: Job, target: Session, extra: list[Key]) -> list[Key]:
    """Return those keys that only the target has which may go: all of them, or none.

    They may go only while the run's books account for every row there; rows that somebody else wrote
    are reported and left alone.
    """
    if not extra:
        return []
    with target.transaction(read_only=True) as cursor:
        foreign = count_rows(cursor, job.pair.target) - runs.rows_brought(cursor, job.run.id)
    if not foreign:
        return extra
    crew.emit(
        Warned(
            fact=f"{target.label} has {counted(len(extra), 'row')} that the source has not, and"
            f" {counted(foreign, 'row')} that this run did not bring: they stay",
            hint="run pipeline verify, which names them",
        )
    )
    return []
