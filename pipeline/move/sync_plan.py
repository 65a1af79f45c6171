"""Before a sync: both tables, the run that keeps its books, and where both sides were last known to be equal."""

from dataclasses import dataclass
from functools import partial

from pipeline.check.before import has_passes, later_pass, pass_on_source, pass_on_target
from pipeline.check.changes import Look
from pipeline.check.finding import Base, can_be_touched, still_holds
from pipeline.check.gate import refuse_fenced_source
from pipeline.check.pair import Pair, read_pair
from pipeline.errors import RefusedError
from pipeline.events import SyncPlanned
from pipeline.ledger import runs
from pipeline.ledger.cutovers import latest_cutover
from pipeline.ledger.marks import written_sql
from pipeline.ledger.passes import Pass
from pipeline.ledger.quarantine import count_quarantine
from pipeline.move.lease import LEASE, RUN
from pipeline.move.reconcile import Policy
from pipeline.options import SyncOptions
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Cursor, Session
from pipeline.settings import Route


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncJob:
    """What a sync is about. ``before`` is the last pass that found both sides equal, None where there was none.

    ``base`` is what is begun from: None, and everything is compared.
    """

    route: Route
    pair: Pair
    run: runs.Run | None
    base: Base | None
    before: Pass | None

    @property
    def fingerprint(self) -> str:
        """Return what binds a pass to these tables and columns."""
        return runs.fingerprint(self.pair.source, self.pair.target, self.pair.columns)


def prepare_sync(crew: Crew, route: Route, options: SyncOptions, *, to_write: bool, dry: bool = False) -> SyncJob:
    """Read both tables and the ledger; record the run that keeps the books of a first sync, unless it is a dry one."""
    writes = to_write and not dry
    if writes:
        crew.warm((route.target, LEASE), (route.source, RUN), (route.target, RUN))
    with crew.together((route.source, RUN), (route.target, RUN)) as (source, target):
        # What is only listed needs no books.
        has_ledger = not dry or has_passes(target)
        (run, set_aside), kept_there = crew.beside(
            partial(_copy_run, target, route, writes=writes) if has_ledger else lambda: (None, False),
            partial(has_passes, source),
        )
        pair = read_pair(crew, source, target, route, to_write=to_write, set_aside=set_aside)

        def ask_source() -> Pass | None:
            if writes:
                refuse_fenced_source(source, pair.source)
            return pass_on_source(source, route.table, pair) if kept_there else None

        def ask_target() -> Pass | None:
            return pass_on_target(target, route.table, pair) if has_ledger else None

        there, here = crew.beside(ask_source, ask_target)
        if has_ledger:
            run = _books(target, route, pair, run, dry=dry)
        before = later_pass(here, there) if can_be_touched(pair) else None
        if before is not None and not still_holds(pair, before.source_horizon, before.target_horizon):
            before = None
    base = None if options.deep else _base(before, run)
    return SyncJob(route=route, pair=pair, run=run, base=base, before=before)


def _copy_run(target: Session, route: Route, *, writes: bool) -> tuple[runs.Run | None, bool]:
    """Return the copy that filled the table, and whether it set rows aside. Raises RefusedError for one under way."""
    runs.check_revision(target)
    with target.transaction(read_only=True) as cursor:
        if writes:
            _refuse_left_behind(cursor, route)
        run = runs.latest_run(cursor, route.table)
        if run is not None and run.finished is None:
            raise RefusedError(
                f"run {run.id} into {target.label}'s {route.table.qualified} is not finished",
                "run: pipeline copy, to its end",
            )
        return run, run is not None and count_quarantine(cursor, run.id) > 0


def _refuse_left_behind(cursor: Cursor, route: Route) -> None:
    """Raise RefusedError where the source was left for good: what was deleted on the target since would come back."""
    last = latest_cutover(cursor, route.table, "cutover")
    if last is not None and last.outcome == "finalized" and (last.source_label, last.target_label) == route.labels:
        raise RefusedError(
            f"{route.source.name} was left for good by cutover {last.id}, at {last.ended:%Y-%m-%d %H:%M:%S}Z:"
            " a sync from there would bring back what was deleted since",
            "pipeline diff lists what differs; write what is wanted of it by hand",
        )


def _books(target: Session, route: Route, pair: Pair, run: runs.Run | None, *, dry: bool) -> runs.Run | None:
    """Return the run that brought the target's rows: a copy from this very source, or that of an earlier sync."""
    bound = runs.fingerprint(pair.source, pair.target, pair.columns)
    if run is not None and run.fingerprint == bound:
        return run
    with target.transaction() as cursor:
        run = runs.latest_run(cursor, route.table, "sync")
        if dry or (run is not None and run.fingerprint == bound):
            return None if run is None or run.fingerprint != bound else run
        return runs.create_run(
            cursor,
            pair.source,
            pair.target,
            route.labels,
            pair.columns,
            (),
            0,
            pair.horizons,
            0,
            "sync",
        )


def _base(before: Pass | None, run: runs.Run | None) -> Base | None:
    if before is None:
        return None
    return Base(
        source=Look.from_json(before.source_horizon),
        target=Look.from_json(before.target_horizon),
        own=None if run is None else written_sql(run.id, "r"),
        exact=before.equal,
    )


def policy_of(job: SyncJob, options: SyncOptions) -> Policy:
    """Return what becomes of the target's rows that somebody else wrote."""
    # Of a row that only the target had then, nothing is known to be equal.
    known = job.before is not None and job.before.equal
    return Policy(
        on_conflict=options.on_conflict,
        equal_at=job.before.target_horizon["horizon"] if known and job.before is not None else None,
        delete=options.delete,
        delete_equal=options.delete_equal,
        told=True,
    )


def planned(job: SyncJob) -> SyncPlanned:
    """Return the event that a sync begins with."""
    before = job.before if job.base is not None else None
    return SyncPlanned(
        table=job.pair.target.qualified,
        source=job.route.source.label,
        target=job.route.target.label,
        since=None if before is None else before.at,
        since_kind=None if before is None else before.kind,
        rows_estimate=job.pair.source.rows_estimate,
    )
