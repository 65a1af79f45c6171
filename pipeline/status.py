"""The state of the move as the ledger tells it: runs with their phase and progress, and the last verdicts."""

from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, fields, replace
from datetime import datetime

from pipeline.check.changes import Look, is_written
from pipeline.endpoints import Endpoint
from pipeline.errors import PipelineError
from pipeline.ledger import cutovers, runs
from pipeline.ledger.quarantine import SetAside, read_quarantine
from pipeline.options import STEPS
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Cursor
from pipeline.postgres.tables import describe
from pipeline.settings import Route, TableMapping

# A state that takes longer than this to be shown is of no use; a side that has not answered by then is not known.
PATIENCE_SECONDS = 5.0


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
    """The last verdict of one check on one table.

    ``stale`` says that one of the tables was written since; None: not known, as of a side out of reach.
    """

    table: str
    check: str
    verdict: str
    summary: str
    at: datetime
    stale: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spoken:
    """How both tables stood when a check's last verdict was given."""

    table: str
    check: str
    source: Look
    target: Look


@dataclass(frozen=True, slots=True, kw_only=True)
class StepState:
    """One step of a cutover, or of the way back: ``state`` is done, under way (or interrupted) or undone."""

    name: str
    state: str
    summary: str
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class CutoverState:
    """The cutover that has not ended, else the last one. ``outcome`` is None until it has ended.

    ``opened`` is when main was opened to the application, ``next_step`` what is left to be done first.
    """

    id: int
    kind: str
    table: str
    began: datetime
    opened: datetime | None
    back: datetime | None
    ended: datetime | None
    outcome: str | None
    steps: tuple[StepState, ...]
    next_step: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Runs, newest first, the last verdict of every check, and the cutover of the table."""

    runs: tuple[RunState, ...]
    verdicts: tuple[VerdictState, ...]
    cutover: CutoverState | None = None


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


def read_state(route: Route, source: Endpoint | None, limit: int = 5) -> State:
    """Read the newest runs and the last verdicts from the target's ledger, in one snapshot.

    What verdicts speak of is looked at on both sides (one scan of the heap each), to tell whether it was
    written since; ``source`` is not waited for, and None where it is not known.
    """
    with Crew() as crew:
        # Asked first: it may be out of reach, and is given as long as the other questions take, and little more.
        ends = ((route.target, "target"), *([] if source is None else [(source, "source")]))
        state, spoken = crew.call(_read, crew, route, limit)
        ours = [one for one in spoken if one.table == route.table.qualified]
        works = [crew.start(_written_since, crew, endpoint, side, route.table, ours) for endpoint, side in ends]
        wait(works, timeout=PATIENCE_SECONDS)
        found = [work.result() if work.done() else {} for work in works]
        if len(ends) == 1:
            found.append({})
        return replace(state, verdicts=tuple(_judged(one, found) for one in state.verdicts))


def _judged(verdict: VerdictState, found: Sequence[Mapping[str, bool]]) -> VerdictState:
    """Return a verdict with whether it is stale, by what each side knows of its check."""
    sides = [known.get(verdict.check) for known in found]
    stale = True if True in sides else None if None in sides else False
    return replace(verdict, stale=stale)


def _written_since(
    crew: Crew, endpoint: Endpoint, side: str, mapping: TableMapping, spoken: Sequence[_Spoken]
) -> dict[str, bool]:
    """Return by check whether a side's table was written since its verdict; nothing where the side cannot be asked."""
    known: dict[tuple[int, int | None], bool] = {}
    found: dict[str, bool] = {}
    try:
        with crew.session(endpoint, "status") as session:
            table = describe(session, mapping)
            for one in spoken:
                then = one.source if side == "source" else one.target
                place = then.horizon, then.recent_sum
                if place not in known:
                    known[place] = is_written(session, table, then)
                found[one.check] = known[place]
    except PipelineError:
        return found
    return found


def _read(crew: Crew, route: Route, limit: int) -> tuple[State, list[_Spoken]]:
    with crew.session(route.target, "status") as session:
        runs.check_revision(session)
        with session.transaction(read_only=True) as cursor:
            verdicts, spoken = _verdicts(cursor)
            return State(runs=_runs(cursor, limit), verdicts=verdicts, cutover=_cutover(cursor, route.table)), spoken


def _cutover(cursor: Cursor, table: TableMapping) -> CutoverState | None:
    """Return where the cutover of a table stands, None where there was none."""
    if (found := cutovers.latest_cutover(cursor, table)) is None:
        return None
    records = cutovers.read_steps(cursor, found.id)
    left = [name for name in STEPS if name not in records or not records[name].stands]
    return CutoverState(
        id=found.id,
        kind=found.kind,
        table=table.qualified,
        began=found.began,
        opened=found.opened,
        back=found.back,
        ended=found.ended,
        outcome=found.outcome,
        steps=tuple(
            StepState(
                name=record.name,
                state="done" if record.stands else "undone" if record.undone else "begun",
                summary=str(record.evidence.get("summary", "")),
                at=record.undone or record.done or record.intent,
            )
            for record in sorted(
                records.values(), key=lambda one: STEPS.index(one.name) if one.name in STEPS else len(STEPS)
            )
        ),
        next_step=left[0] if left and found.ended is None and found.back is None else None,
    )


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


def _verdicts(cursor: Cursor) -> tuple[tuple[VerdictState, ...], list[_Spoken]]:
    """Return the last verdict of each check, and how both tables stood when it was given."""
    cursor.execute(
        "SELECT DISTINCT ON (v.target_schema, v.target_table, v.check_name) v.target_schema || '.' || v.target_table,"
        " v.check_name, v.verdict, v.figures ->> 'summary', v.at,"
        " coalesce(p.source_horizon, pg_catalog.jsonb_build_object('horizon', v.source_horizon)),"
        " coalesce(p.target_horizon, pg_catalog.jsonb_build_object('horizon', v.target_horizon))"
        " FROM pipeline.verdict v LEFT JOIN pipeline.pass p ON p.id = v.pass_id"
        " ORDER BY v.target_schema, v.target_table, v.check_name, v.at DESC"
    )
    states: list[VerdictState] = []
    spoken: list[_Spoken] = []
    for table, check, verdict, summary, at, source, target in cursor.fetchall():
        states.append(VerdictState(table=table, check=check, verdict=verdict, summary=summary or "", at=at))
        spoken.append(_Spoken(table=table, check=check, source=Look.from_json(source), target=Look.from_json(target)))
    return tuple(sorted(states, key=lambda verdict: verdict.at)), spoken
