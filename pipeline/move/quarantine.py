"""Rows that cannot be carried: written down in the ledger with the reason, and tried again when asked."""

from collections.abc import Generator

from psycopg2 import sql

from pipeline.check.contents import UTF8_TYPES, is_utf8_sql
from pipeline.check.pair import Pair, read_pair
from pipeline.errors import RefusedError
from pipeline.events import Event, Retried
from pipeline.failpoints import failpoint
from pipeline.ledger import leases, runs
from pipeline.ledger.quarantine import SetAside, add_to_quarantine, clear_quarantine, read_quarantine
from pipeline.move.lease import Lease
from pipeline.move.plan import Job
from pipeline.move.reconcile import Outcome, Policy, reconcile
from pipeline.options import CopyOptions, OnConflict
from pipeline.postgres.columns import Column
from pipeline.postgres.crew import Crew
from pipeline.postgres.tables import Table
from pipeline.postgres.values import key_texts_sql
from pipeline.settings import Route

# Rows are sent whole, as text, and one may have megabytes.
BATCH_ROWS = 20
BATCH_KEYS = 2_000


def set_aside(crew: Crew, job: Job, lease: Lease) -> int:
    """Write down every row of the source that cannot be carried, in place of what was written before; return how many.

    One scan of the source (none where by their types all rows can be), one transaction on the target: who
    interrupts it leaves the quarantine as it was.
    """
    total = 0
    ends = (job.route.source, lease.purpose), (job.route.target, lease.purpose)
    with crew.together(*ends) as (source, target), target.transaction(then=lease.guard) as cursor:
        leases.check_guard(cursor)
        clear_quarantine(cursor, job.run.id)
        if not job.pair.unfit:
            return 0
        for batch in source.stream(_unfit_sql(job.pair), batch_rows=BATCH_ROWS):
            crew.check()
            add_to_quarantine(cursor, job.run.id, [(tuple(key), reason, row) for reason, row, *key in batch])
            total += len(batch)
        failpoint("in_quarantine")
    return total


def _unfit_sql(pair: Pair) -> sql.Composable:
    """Return the query of the rows that are left out: the first reason, the row as JSON of texts, and the key."""
    source = pair.source.only_left_out()
    reasons = sql.SQL(" ").join(
        sql.SQL("WHEN {} THEN {}").format(one.condition, sql.Literal(one.what)) for one in pair.unfit
    )
    values = sql.SQL(", ").join(
        sql.SQL("{} AS {}").format(_text_sql(source, column), sql.Identifier(column.name))
        for column in source.columns
        if column.may_select
    )
    return sql.SQL(
        "SELECT CASE {} END, (SELECT pg_catalog.to_json(v)::pg_catalog.text FROM (SELECT {}) AS v), {} FROM {}"
    ).format(reasons, values, key_texts_sql(source), source.scanned)


def _text_sql(table: Table, column: Column) -> sql.Composable:
    """Return a value as text; bytes that are no text, in a database that knows no encoding, in hex."""
    place = sql.Identifier(column.name)
    text = sql.SQL("{}::pg_catalog.text").format(place)
    if table.encoding != "SQL_ASCII" or not (column.is_builtin and column.base_type in UTF8_TYPES):
        return text
    return sql.SQL(
        "CASE WHEN {} THEN {} ELSE '\\x' || pg_catalog.encode(pg_catalog.convert_to({}, 'SQL_ASCII'), 'hex') END"
    ).format(is_utf8_sql(place), text, text)


def retry(route: Route, options: CopyOptions) -> Generator[Event, None, None]:
    """Bring the rows in quarantine that can be carried by now; end with Retried.

    What the source has no more leaves the quarantine, what still cannot be carried stays. Raises
    PipelineError: RefusedError where there is no finished run.
    """
    with Crew(options.stall_seconds) as crew:
        job, rows = crew.call(_prepare, crew, route)
        lease = Lease(crew, route.target, job.run, options.deadline_seconds)
        work = crew.start(_retry, crew, job, lease, rows, options.on_conflict)
        yield from crew.follow([work], guards=[lease.future])
        lease.release()
        yield work.result()


def _prepare(crew: Crew, route: Route) -> tuple[Job, tuple[SetAside, ...]]:
    with crew.session(route.source, "quarantine") as source, crew.session(route.target, "quarantine") as target:
        runs.check_revision(target)
        pair = read_pair(crew, source, target, route, to_write=True, set_aside=True)
        with target.transaction(read_only=True) as cursor:
            run = runs.latest_run(cursor, route.table)
            if run is None or run.finished is None:
                state = "no run has filled" if run is None else f"run {run.id} is not finished into"
                raise RefusedError(
                    f"{state} {target.label}'s {pair.target.qualified}", "run: pipeline copy --quarantine, to its end"
                )
            found = read_quarantine(cursor, run.id)
    return Job(route=route, pair=pair, run=run, existing=None, slices=()), found


def _retry(crew: Crew, job: Job, lease: Lease, rows: tuple[SetAside, ...], on_conflict: OnConflict) -> Retried:
    """Bring what can be carried, then write the quarantine anew: rows may have come into it that were not there."""
    total = Outcome()
    ends = (job.route.source, lease.purpose), (job.route.target, lease.purpose)
    with crew.together(*ends) as (source, target):
        for first in range(0, len(rows), BATCH_KEYS):
            crew.check()
            keys = [row.key for row in rows[first : first + BATCH_KEYS]]
            total = total.plus(reconcile(source, target, job.pair, keys, lease, Policy(on_conflict=on_conflict)))
        set_aside(crew, job, lease)
        with target.transaction(read_only=True, single=True) as cursor:
            left = {row.key for row in read_quarantine(cursor, job.run.id)}
    staying = sum(row.key in left for row in rows)
    return Retried(run=job.run.id, brought=total.found, gone=len(rows) - total.found - staying, left=len(left))
