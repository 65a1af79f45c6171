"""After the load: passes over what changed on the source, until one finds nothing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from psycopg2 import sql

from pipeline.check.changes import changed_keys, key_sums, look
from pipeline.check.differences import open_buckets
from pipeline.check.digests import bucket_map
from pipeline.events import Reconciled, Warned
from pipeline.failpoints import failpoint
from pipeline.ledger import leases, runs
from pipeline.ledger.marks import written_sql
from pipeline.move.lease import Lease
from pipeline.move.plan import Job
from pipeline.move.reconcile import Outcome, Policy, keys_that, reconcile
from pipeline.move.retry import with_retries
from pipeline.options import CopyOptions
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Session, clock
from pipeline.postgres.facts import gather, horizon_sql
from pipeline.postgres.values import Key
from pipeline.wording import counted

# A source with a steady writer never holds still; after this many passes the next command goes on.
MAX_PASSES = 10
BATCH_KEYS = 2_000
# On the source, on the target, and on the target for what is asked while the first two are being read.
_Sessions = tuple[Session, Session, Session]


def settle(crew: Crew, job: Job, lease: Lease, options: CopyOptions, since: int, passes: Sequence[Reconciled]) -> int:
    """Reconcile what changed since a horizon, pass by pass, until one has nothing to write; return its horizon.

    Or so little that it is fewer than the operator minds. Every pass is recorded by moving the run's
    horizon, so that an interrupted one is done again and a finished one is not. ``passes`` went before. A
    transaction that stays open on the source holds the horizon back: its pass finds the same keys again,
    and writes nothing.
    """
    for number in range(len(passes) + 1, len(passes) + MAX_PASSES + 1):
        started = clock()
        work = partial(_pass, crew, job, lease, options, since)
        done = with_retries(crew, "the pass over changed rows", options.deadline_seconds, work)
        since, outcome = done.horizon, done.outcome
        crew.emit(
            Reconciled(
                number=number,
                changed=done.found,
                upserted=outcome.inserted + outcome.updated,
                deleted=outcome.deleted,
                foreign=done.foreign,
                seconds=clock() - started,
            )
        )
        if outcome.written <= options.settle_rows:
            return since
    crew.emit(
        Warned(
            fact=f"the source still changes: {counted(outcome.written, 'row')} in the last of {MAX_PASSES} passes",
            hint="run pipeline verify once its writers are quiet",
        )
    )
    return since


@dataclass(slots=True, kw_only=True)
class _Pass:
    """What one pass found so far: its own horizon, keys, what it wrote, and rows of the target alone.

    ``rows`` is the source's number of them at the horizon, where an equal number on the target proves the
    same keys once every changed row is reconciled; None where the keys themselves have to be compared.
    """

    horizon: int = 0
    rows: int | None = None
    quiet: bool = False
    found: int = 0
    foreign: int = 0
    outcome: Outcome = field(default_factory=Outcome)


def _pass(crew: Crew, job: Job, lease: Lease, options: CopyOptions, since: int, _attempt: int) -> _Pass:
    """Do one pass, from its horizon to the mark in the ledger."""
    # What has no heap of its own has no row versions either: there, all rows are compared.
    find = _changes if job.pair.source.heaps else _differences
    ends = (job.route.source, lease.purpose), (job.route.target, lease.purpose)
    with crew.together(*ends) as (source, target):
        this = _look(job, source, target, since)
        if not this.quiet:
            with crew.together(*ends) as (reader, judge):
                for keys in find(crew, job, (source, target, judge), since, this):
                    crew.check()
                    this.found += len(keys)
                    done = reconcile(reader, judge, job.pair, keys, lease, Policy(on_conflict=options.on_conflict))
                    this.outcome = this.outcome.plus(done)
        failpoint("before_horizon")
        with target.transaction(single=True) as cursor:
            runs.move_horizon(cursor, job.run.id, lease.generation, this.horizon)
            leases.check_guard(cursor)
    return this


def _look(job: Job, source: Session, target: Session, since: int) -> _Pass:
    """Take the pass's horizon, and tell whether nothing changed on the source, by one scan of its heap.

    Where no rewrite moved rows about, each slice saw every row of it that stood then, once. So the rows of
    now are among those that were brought, by a slice or, changed since, by a pass; and an equal number
    means the same rows. For a run that went on after an interruption the files are not known, and a
    target that had rows is not the run's alone: there, the keys of both sides are compared.
    """
    heaps = job.pair.source.heaps
    if not heaps or job.resumed or job.run.rows_before:
        ((now,),) = source.rows(horizon_sql(source.version))
        return _Pass(horizon=now)
    seen = look(source, job.pair.source, since)
    same_files = seen.files == tuple(heap.file for heap in heaps)
    return _Pass(
        horizon=seen.horizon,
        rows=seen.rows if same_files else None,
        quiet=same_files and not seen.changed and _rows_there(target, job) == {seen.rows},
    )


def _rows_there(target: Session, job: Job) -> set[int]:
    """Return how many rows the target has: by the run's books, and by count, which shows what others did."""
    count = sql.SQL("SELECT pg_catalog.count(*) FROM {}").format(job.pair.target.scanned)
    with target.transaction(read_only=True, single=True) as cursor:
        ((brought,),), ((found,),) = gather(cursor, (runs.ROWS_BROUGHT_SQL, count), {"run": job.run.id})
    return {brought, found}


def _changes(crew: Crew, job: Job, sessions: _Sessions, since: int, this: _Pass) -> Iterator[list[Key]]:
    """Yield the keys of what changed since a horizon, then those that one side has and the other has not."""
    source, target, _ = sessions
    yield from changed_keys(source, job.pair.source, since)
    # A row that was taken out could hide another one that should have been.
    if this.rows is not None and not this.outcome.deleted and _rows_there(target, job) == {this.rows}:
        return
    theirs = crew.start(key_sums, target, job.pair.target)
    buckets = key_sums(source, job.pair.source).differing(theirs.result())
    yield from _keys_in_buckets(job, sessions, this, (), buckets)


def _differences(crew: Crew, job: Job, sessions: _Sessions, _since: int, this: _Pass) -> Iterator[list[Key]]:
    """Yield the keys of all rows that differ, by the digests of both sides."""
    source, target, _ = sessions
    pair, embedding = job.pair, job.route.table.embedding
    theirs = crew.start(bucket_map, target, pair.target, pair.columns, embedding)
    buckets = bucket_map(source, pair.source, pair.columns, embedding).differing(theirs.result())
    yield from _keys_in_buckets(job, sessions, this, pair.columns, buckets)


def _keys_in_buckets(
    job: Job, sessions: _Sessions, this: _Pass, columns: Sequence[str], buckets: Sequence[int]
) -> Iterator[list[Key]]:
    """Yield the keys whose rows differ inside buckets, in batches; of those that only the target has, the run's own.

    Rows that somebody else brought there are counted and left alone.
    """
    if not buckets:
        return
    source, target, judge = sessions
    found = open_buckets((source, job.pair.source), (target, job.pair.target), columns, buckets)
    while batch := list(islice(found, BATCH_KEYS)):
        extra = [difference.key for difference in batch if difference.kind == "extra"]
        own = keys_that(judge, job.pair.target, extra, written_sql(job.run.id, "t")) if extra else set()
        this.foreign += len(extra) - len(own)
        keys = [one.key for one in batch if one.kind != "extra" or one.key in own]
        if keys:
            yield keys
