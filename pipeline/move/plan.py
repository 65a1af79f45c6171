"""Before the first row: the run found, continued or recorded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from psycopg2 import sql

from pipeline.check.existing import Existing, compare_existing, conflict
from pipeline.check.filled import other_plan
from pipeline.check.gate import check_gate
from pipeline.check.pair import Pair, read_pair
from pipeline.check.preflight import refuse_if_needed
from pipeline.check.sizing import read_seconds, take_sample
from pipeline.errors import BusyError, RefusedError
from pipeline.events import Previewed
from pipeline.ledger import leases, marks, runs
from pipeline.move.lease import LEASE, RUN, end_lapsed_generations
from pipeline.options import CopyOptions
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Cursor, Session
from pipeline.postgres.facts import gather
from pipeline.postgres.indexes import secondary_indexes
from pipeline.postgres.slices import Slice, boundaries_sql, plan_keys, plan_pages
from pipeline.postgres.tables import Table
from pipeline.postgres.values import form_sql
from pipeline.settings import Route, TableMapping
from pipeline.wording import counted

# So many rows of a view are weighed, to cut it into slices of about the same size.
SAMPLE_ROWS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a copy is about: the route, both tables as they were found, the run and its slices.

    ``existing`` is what a new run found in the target's table; None for one that is gone on with.
    """

    route: Route
    pair: Pair
    run: runs.Run
    existing: Existing | None
    slices: tuple[Slice, ...]

    @property
    def resumed(self) -> bool:
        """Return whether the run stood in the ledger already."""
        return self.existing is None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What a copy would do: go on with ``run``, or begin another with these slices, into what is ``existing``."""

    pair: Pair
    run: runs.Run | None
    existing: Existing
    slices: tuple[Slice, ...]


def prepare(crew: Crew, route: Route, options: CopyOptions) -> Job:
    """Check everything, then continue the unfinished run, find the finished one, or record a new one."""
    crew.warm((route.target, LEASE))
    with crew.together((route.source, "copy"), (route.target, "copy")) as (source, target):
        runs.check_revision(target)
        # Before anything else is asked: what one of them left open can lock the whole table.
        end_lapsed_generations(target)
        plan = _plan(crew, source, target, route, options)
        if plan.run is not None:
            return Job(route=route, pair=plan.pair, run=plan.run, existing=None, slices=plan.slices)
        crew.warm(*((route.source, RUN), (route.target, RUN)) * min(options.workers, len(plan.slices)))
        with target.transaction(single=not options.restart) as cursor:
            if options.restart:
                _abandon(cursor, route.table)
            run = runs.create_run(
                cursor,
                plan.pair.source,
                plan.pair.target,
                route.labels,
                plan.pair.columns,
                plan.slices,
                options.slice_bytes,
                plan.pair.horizons,
                plan.existing.rows,
            )
    return Job(route=route, pair=plan.pair, run=run, existing=plan.existing, slices=plan.slices)


def _plan(crew: Crew, source: Session, target: Session, route: Route, options: CopyOptions) -> _Plan:
    """Check everything that could stand in the way; find the run to go on with, or cut the source for a new one."""
    pair = read_pair(crew, source, target, route, to_write=True, set_aside=options.quarantine)
    run, empty = _standing_run(target, route.table, pair, options.restart)
    slices = () if run is None else _read_slices(target, run)
    if run is None or run.finished is None:
        refuse_if_needed(check_gate(crew, source, target, pair.source, pair.target, workers=options.workers))
    existing = Existing()
    if run is None:
        # In no transaction of the target: to compare what is there, and to cut a view, may take long.
        existing = existing if empty else _check_existing(source, target, pair, options)
        pair, slices = cut(source, pair, options)
    return _Plan(pair=pair, run=run, existing=existing, slices=slices)


def enter(session: Session, job: Job, generation: int) -> Job:
    """Return the job as the ledger has it once the lease is held; check the rows that are there.

    Who had the lease until now may have done more since the job was read, and even all of it; but nobody
    had it before the first generation. Raises BusyError where somebody else has given the run up
    meanwhile, and RefusedError where rows are there that the run did not bring, or gone.
    """
    if generation > 1:
        with session.transaction(read_only=True) as cursor:
            run = runs.latest_run(cursor, job.route.table)
            if run is None or run.id != job.run.id:
                raise BusyError(f"run {job.run.id} was given up by another copy meanwhile", "pipeline status shows it")
            job = replace(job, run=run, slices=marks.read_slices(cursor, run.id))
    if job.run.finished is None:
        _check_foreign_rows(session, job)
    return job


def _check_existing(source: Session, target: Session, pair: Pair, options: CopyOptions) -> Existing:
    """Compare what is in the target's table. Raises RefusedError where that stands in the way."""
    existing = compare_existing(source, target, pair)
    if existing.different and options.on_conflict == "refuse":
        raise conflict(f"{target.label}'s {pair.target.qualified}", existing.different, existing.first)
    return existing


def cut(session: Session, pair: Pair, options: CopyOptions) -> tuple[Pair, tuple[Slice, ...]]:
    """Cut the source into slices: by pages where it has any, else by its key, in the order that it has there.

    Returns the pair with the source's size, which the catalog does not know of a view.
    """
    if pair.source.paged:
        return pair, plan_pages(pair.source, options.slice_bytes, options.workers)
    ((rows, bytes_per_row),) = session.rows(_weigh_sql(pair.source, pair.columns))
    weighed = replace(pair, source=replace(pair.source, rows_estimate=rows, bytes=rows * bytes_per_row))
    rows_per_slice = max(1, options.slice_bytes // max(1, bytes_per_row))
    if rows <= rows_per_slice:
        return weighed, plan_keys(())
    return weighed, plan_keys([tuple(key) for key in session.rows(boundaries_sql(pair.source, rows_per_slice))])


def _weigh_sql(table: Table, columns: Sequence[str]) -> sql.Composable:
    """Return the query of the number of rows, and of the bytes that one takes on the wire, by a few of them."""
    sizes = sql.SQL(" + ").join(
        sql.SQL("coalesce(pg_catalog.octet_length({}), 0)").format(form_sql(table, name)) for name in columns
    )
    return sql.SQL(
        "SELECT (SELECT pg_catalog.count(*) FROM {table}), (SELECT coalesce(pg_catalog.avg(size), 0)::pg_catalog.int8"
        " FROM (SELECT {sizes} AS size FROM {table} LIMIT {sample}) q)"
    ).format(table=table.scanned, sizes=sizes, sample=sql.Literal(SAMPLE_ROWS))


def _standing_run(session: Session, mapping: TableMapping, pair: Pair, restart: bool) -> tuple[runs.Run | None, bool]:
    """Return the run to go on with, or None where a new one is to begin; and whether the target's table is empty.

    Raises RefusedError where the run is bound to another plan.
    """
    with session.transaction(read_only=True, single=True) as cursor:
        run = runs.latest_run(cursor, mapping)
    ((empty,),) = session.rows(sql.SQL("SELECT NOT EXISTS (SELECT 1 FROM {})").format(pair.target.scanned))
    if run is None or (restart if run.finished is None else empty):
        return None, empty
    if run.fingerprint != runs.fingerprint(pair.source, pair.target, pair.columns):
        raise other_plan(run, pair.source, pair.target, session.endpoint.name)
    return run, empty


def _abandon(cursor: Cursor, mapping: TableMapping) -> None:
    """Give an unfinished run up. Raises BusyError while a copier is at work on it."""
    run = runs.latest_run(cursor, mapping)
    if run is None or run.finished is not None:
        return
    if leases.take_lease(cursor, run) is None:
        raise BusyError("another copy of this table is running", "pipeline status shows it; stop it with Ctrl-C there")
    runs.abandon_run(cursor, run)


def preview(route: Route, options: CopyOptions) -> Previewed:
    """Check everything that a copy checks, and tell what it would do; both sides are only read."""
    with Crew() as crew:
        return crew.call(_preview, crew, route, options)


def _preview(crew: Crew, route: Route, options: CopyOptions) -> Previewed:
    with crew.together((route.source, "copy"), (route.target, "copy")) as (source, target):
        runs.check_revision(target)
        plan = _plan(crew, source, target, route, options)
        run, pair, slices = plan.run, plan.pair, plan.slices
        left = sum(not part.done for part in slices)
        before = plan.existing.rows if run is None else run.rows_before
        untouched = left == len(slices) and pair.target.owned and not before
        with target.transaction(read_only=True, single=True) as cursor:
            indexes = secondary_indexes(cursor, pair.target.oid) if untouched else ()
        seconds = read_seconds(pair.source, take_sample(source, pair.source, pair.columns)) if left else 0.0
    return Previewed(
        run=None if run is None else run.id,
        finished=run is not None and run.finished is not None,
        table=pair.target.qualified,
        source=route.source.label,
        target=route.target.label,
        slices=len(slices),
        slices_left=left,
        bytes_left=pair.source.bytes * left // len(slices),
        rows_estimate=pair.source.rows_estimate,
        columns=pair.columns,
        indexes=tuple(index.name for index in indexes),
        rows_before=before,
        read_seconds=None if seconds is None else seconds * left / len(slices),
    )


def _check_foreign_rows(session: Session, job: Job) -> None:
    """Refuse to go on where the target's table holds other rows than the run's books say.

    One scan of the heap, under the lease: nobody else writes rows for this run now. A table that had rows
    before is in use, and its number of rows says nothing.
    """
    if job.run.rows_before:
        return
    count = sql.SQL("SELECT pg_catalog.count(*) FROM {}").format(job.pair.target.scanned)
    with session.transaction(read_only=True, single=True) as cursor:
        ((found,),), ((brought,),) = gather(cursor, (count, runs.ROWS_BROUGHT_SQL), {"run": job.run.id})
    where = f"{session.label}'s {job.pair.target.qualified}"
    if found > brought:
        raise RefusedError(
            f"{where} holds {counted(found - brought, 'row')} that this run did not bring",
            "see what wrote them; take them out, or TRUNCATE the table and run: pipeline copy --restart",
        )
    if found < brought:
        raise RefusedError(
            f"{where} has lost {brought - found:,} of the {counted(brought, 'row')} that this run brought",
            f"TRUNCATE {job.pair.target.qualified}, then run: pipeline copy --restart",
        )


def _read_slices(session: Session, run: runs.Run) -> tuple[Slice, ...]:
    with session.transaction(read_only=True, single=True) as cursor:
        return marks.read_slices(cursor, run.id)
