"""What differs, listed with its keys, and what a sync would do about it; both sides are only read."""

from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from pipeline.check.differences import Difference
from pipeline.check.finding import find_all, find_touched
from pipeline.events import Differing, Event, SyncDone
from pipeline.ledger.marks import untouched_sql
from pipeline.move.reconcile import Policy, keys_that
from pipeline.move.sync_plan import SyncJob, planned, policy_of, prepare_sync
from pipeline.options import SyncOptions
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Session, clock
from pipeline.postgres.values import Key
from pipeline.settings import Route


@dataclass(slots=True, kw_only=True)
class _Counts:
    """What was listed: by kind of difference, and by what a sync would do."""

    kinds: Counter[str] = field(default_factory=Counter)
    deeds: Counter[str] = field(default_factory=Counter)


def list_differences(route: Route, options: SyncOptions, *, for_sync: bool) -> Generator[Event, None, None]:
    """Yield what a sync would look at, as Differing events with the keys; both sides are only read.

    With ``for_sync`` the rights to write are checked, and every difference tells what a sync would do about it.
    """
    started = clock()
    with Crew(options.stall_seconds) as crew:
        job = crew.call(prepare_sync, crew, route, options, to_write=for_sync, dry=True)
        yield planned(job)
        counts = _Counts()
        work = crew.start(_list, crew, job, options, counts, for_sync=for_sync)
        yield from crew.follow([work])
        yield _listed(job, counts, clock() - started)


def _list(crew: Crew, job: SyncJob, options: SyncOptions, counts: _Counts, *, for_sync: bool) -> None:
    """Emit every difference, in batches, with what a sync would do about it."""
    policy = policy_of(job, options)
    with crew.session(job.route.target, "sync") as judge:

        def take(batch: list[Difference]) -> None:
            deeds = list(_deeds(judge, job, policy, batch)) if for_sync else [""] * len(batch)
            for one, deed in zip(batch, deeds, strict=True):
                counts.kinds[one.kind] += 1
                counts.deeds[deed] += 1
            rows = tuple((one.kind, one.key, one.columns, deed) for one, deed in zip(batch, deeds, strict=True))
            crew.emit(Differing(rows=rows))

        if job.base is None:
            find_all(
                crew,
                job.route,
                job.pair,
                take,
                workers=options.workers,
                settle=options.settle_seconds,
                restart=options.restart,
                kept=False,
            )
        else:
            find_touched(crew, job.route, job.pair, job.base, take, settle=options.settle_seconds)


def _deeds(session: Session, job: SyncJob, policy: Policy, batch: list[Difference]) -> Iterator[str]:
    """Yield what a sync would do about each difference."""
    keys = [one.key for one in batch if one.kind != "missing"]
    ours: set[Key] = set()
    brought: set[Key] = set()
    if keys and job.run is not None:
        ours = keys_that(session, job.pair.target, keys, policy.ours_sql(job.run.id, "t"))
        brought = keys_that(session, job.pair.target, keys, policy.gone_sql(job.run.id, "t"))
    elif keys and policy.equal_at is not None:
        ours = keys_that(session, job.pair.target, keys, untouched_sql(policy.equal_at, "t"))
    for one in batch:
        if one.kind == "missing":
            yield "insert"
        elif one.kind == "extra":
            yield "delete" if policy.delete or one.key in brought else "leave"
        else:
            yield "write over" if policy.on_conflict == "overwrite" or one.key in ours else "leave"


def _listed(job: SyncJob, counts: _Counts, seconds: float) -> SyncDone:
    kinds, deeds = counts.kinds, counts.deeds
    return SyncDone(
        run=None,
        deep=job.base is None,
        dry=True,
        passes=1,
        touched=kinds.total(),
        inserted=kinds["missing"],
        updated=kinds["different"] + kinds["doubled"],
        deleted=kinds["extra"],
        kept=deeds["leave"],
        foreign=0,
        left=(),
        settled=True,
        equal=not kinds,
        seconds=seconds,
    )
