"""The state of the move as the ledger tells it: runs with their phase and progress, and the last verdicts."""

from dataclasses import dataclass, fields
from datetime import datetime

from pipeline.endpoints import Endpoint
from pipeline.ledger import runs
from pipeline.ledger.quarantine import SetAside, read_quarantine
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Cursor
from pipeline.settings import Route


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """One run. ``phase`` is derived: copying, finishing, interrupted, done or abandoned."""

    id: int
    table: str
    source: str
    target: str
    phase: str
    holder: str | None
    slices: int
    slices_done: int
    rows: int
    bytes: int
    indexes_deferred: int
    indexes_missing: int
    quarantined: int
    started: datetime
    finished: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictState:
    """The last verdict of one check on one table."""

    table: str
    check: str
    verdict: str
    summary: str
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Runs, newest first, and the last verdict of every check."""

    runs: tuple[RunState, ...]
    verdicts: tuple[VerdictState, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantineState:
    """What the latest run into a table (None: there is none) has set aside."""

    run: int | None
    table: str
    rows: tuple[SetAside, ...]


def read_quarantine_state(route: Route) -> QuarantineState:
    """Return what lies in quarantine for the target's table. Raises PipelineError."""
    with Crew() as crew:
        return crew.call(_read_quarantine, crew, route)


def _read_quarantine(crew: Crew, route: Route) -> QuarantineState:
    with crew.session(route.target, "quarantine") as session:
        runs.check_revision(session)
        with session.transaction(read_only=True) as cursor:
            run = runs.latest_run(cursor, route.table)
            rows = () if run is None else read_quarantine(cursor, run.id)
    return QuarantineState(run=None if run is None else run.id, table=route.table.qualified, rows=rows)


def read_state(target: Endpoint, limit: int = 5) -> State:
    """Read the newest runs and the last verdicts from the target's ledger, in one snapshot."""
    with Crew() as crew:
        return crew.call(_read, crew, target, limit)


def _read(crew: Crew, target: Endpoint, limit: int) -> State:
    with crew.session(target, "status") as session:
        runs.check_revision(session)
        with session.transaction(read_only=True) as cursor:
            return State(runs=_runs(cursor, limit), verdicts=_verdicts(cursor))


# The lease counts while it has not run out and the session that renews it is there.
_RUNS_SQL = """
SELECT r.id, r.target_schema || '.' || r.target_table, r.source_label, r.target_label,
       CASE WHEN r.abandoned_at IS NOT NULL THEN 'abandoned' WHEN r.finished_at IS NOT NULL THEN 'done'
            WHEN l.held IS NOT TRUE THEN 'interrupted' WHEN r.loaded_at IS NOT NULL THEN 'finishing'
            ELSE 'copying' END,
       CASE WHEN l.held THEN r.lease_owner END,
       s.slices, s.done, s.rows + r.reconciled_rows, s.bytes, d.deferred, d.missing,
       (SELECT pg_catalog.count(*) FROM pipeline.quarantine q WHERE q.run_id = r.id), r.started_at, r.finished_at
FROM pipeline.run r
CROSS JOIN LATERAL (SELECT r.lease_until > pg_catalog.clock_timestamp() AND (r.lease_backend IS NULL OR EXISTS (
    SELECT 1 FROM pg_catalog.pg_stat_activity a WHERE a.pid = r.lease_backend)) AS held) l
CROSS JOIN LATERAL (SELECT pg_catalog.count(*) AS slices, pg_catalog.count(finished_at) AS done,
    coalesce(pg_catalog.sum(rows), 0)::pg_catalog.int8 AS rows,
    coalesce(pg_catalog.sum(bytes), 0)::pg_catalog.int8 AS bytes
    FROM pipeline.slice WHERE run_id = r.id) s
CROSS JOIN LATERAL (SELECT pg_catalog.count(*) AS deferred, pg_catalog.count(*) FILTER (WHERE rebuilt_at IS NULL)
    AS missing FROM pipeline.deferred_index WHERE run_id = r.id) d
ORDER BY r.id DESC LIMIT %s
"""


def _runs(cursor: Cursor, limit: int) -> tuple[RunState, ...]:
    cursor.execute(_RUNS_SQL, (limit,))
    names = [field.name for field in fields(RunState)]
    return tuple(RunState(**dict(zip(names, row, strict=True))) for row in cursor.fetchall())


def _verdicts(cursor: Cursor) -> tuple[VerdictState, ...]:
    cursor.execute(
        "SELECT DISTINCT ON (target_schema, target_table, check_name) target_schema || '.' || target_table,"
        " check_name, verdict, figures ->> 'summary', at FROM pipeline.verdict"
        " ORDER BY target_schema, target_table, check_name, at DESC"
    )
    found = [
        VerdictState(table=table, check=check, verdict=verdict, summary=summary or "", at=at)
        for table, check, verdict, summary, at in cursor.fetchall()
    ]
    return tuple(sorted(found, key=lambda verdict: verdict.at))
