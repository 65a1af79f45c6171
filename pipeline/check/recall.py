"""Recall: what share of the exact answers an ANN index finds, and what to type where that is too little."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, sqrt

from psycopg2 import sql

from pipeline.check.annindex import (
    FORCED,
    AnnIndex,
    SearchSettings,
    operator_sql,
    plan_nodes,
    query_sql,
    used_index,
)
from pipeline.check.annremedy import diagnose
from pipeline.check.ladder import Exact, Ladder
from pipeline.check.neighbours import DISTANCE_TOLERANCE, Neighbour, Query
from pipeline.check.sides import Side, exact_answers, open_sides
from pipeline.errors import RefusedError, StatementError
from pipeline.events import CheckDone, Verdict
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Cursor, clock
from pipeline.postgres.values import key_text_sql, value_sql
from pipeline.wording import counted

# Two graphs of the same rows differ: so much less than legacy's own index finds is no loss yet.
LEGACY_TOLERANCE = 0.02
EF_SEARCH_STEPS = (40, 100, 200, 400)
PROBES_STEPS = (1, 10, 40, 100, 200, 400, 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Recall (0 to 1) of every query at one value of the index's knob, and how many got too few rows."""

    value: int
    recalls: tuple[float, ...]
    under_returned: int

    @property
    def mean(self) -> float:
        """Return the mean over the queries."""
        return sum(self.recalls) / len(self.recalls)

    @property
    def figures(self) -> dict[str, object]:
        """Return what is reported."""
        ordered = sorted(self.recalls)
        return {
            "value": self.value,
            "mean": self.mean,
            "minimum": ordered[0],
            "p05": ordered[ceil(0.05 * len(ordered)) - 1],
            "under_returned": self.under_returned,
            "queries": len(ordered),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """An index's recall at each value that there was time for; ``in_force`` is the first that was measured."""

    index: AnnIndex
    in_force: Step
    steps: tuple[Step, ...]

    def smallest(self, wanted: float) -> int | None:
        """Return the smallest value at which as many queries reach the wanted mean, or None."""
        full = (one for one in self.steps if len(one.recalls) >= len(self.in_force.recalls))
        return min((one.value for one in full if one.mean >= wanted), default=None)

    @property
    def figures(self) -> dict[str, object]:
        """Return what is reported."""
        return {
            "index": self.index.name,
            "method": self.index.method,
            "options": dict(self.index.options),
            "in_force": self.in_force.value,
            "steps": [step.figures for step in sorted(self.steps, key=lambda step: step.value)],
        }


def check_recall(crew: Crew, ladder: Ladder) -> CheckDone:
    """Compare what the target's ANN index finds with what there is to find, by the settings that will be in force.

    Fails below the wanted mean, and below legacy's own index. Raises PipelineError where a side cannot be asked.
    """
    started = clock()
    figures: dict[str, object] = {
        "k": ladder.options.k,
        "min_recall": ladder.options.min_recall,
        **dict.fromkeys(("metric", "knob", "target", "source", "recommended")),
        "queries": 0,
    }
    with crew.together((ladder.route.source, "verify"), (ladder.route.target, "verify")) as (here, there):
        source, target = open_sides(crew, ladder, here, there)
        verdict, summary = _look(crew, ladder, source, target, started, figures)
    return CheckDone(name="recall", verdict=verdict, summary=summary, figures=figures, seconds=clock() - started)


def _look(
    crew: Crew, ladder: Ladder, source: Side, target: Side, started: float, figures: dict[str, object]
) -> tuple[Verdict, str]:
    """Measure both sides, and fill the figures in."""
    index = next((one for one in target.indexes if one.searchable), None)
    if index is None or index.metric is None:
        return "pass", _nothing(target)
    figures |= {"metric": index.metric, "knob": index.knob}
    exact = exact_answers(crew, ladder, index.metric, source.session, target.session)
    if not exact.queries:
        return "pass", "no row of the source has an embedding that could be asked for"
    k, deadline = ladder.options.k, started + ladder.options.budget_seconds
    legacy, curve = crew.beside(
        partial(_legacy_curve, crew, source, index.metric, exact, k, deadline),
        partial(measure, crew, target, index, exact.queries, exact.target, k, deadline),
    )
    if curve is None:
        name = target.session.endpoint.name
        return "partial", f"{name} does not use {index.label} even where it is forced to: nothing could be measured"
    floor = ladder.options.min_recall
    if isinstance(legacy, Curve):
        floor = max(floor, legacy.in_force.mean - LEGACY_TOLERANCE)
        figures["source"] = legacy.figures
    recommended = curve.smallest(floor)
    figures |= {
        "knob": curve.index.knob,
        "target": curve.figures,
        "recommended": recommended,
        "queries": len(curve.in_force.recalls),
    }
    parts = [_found(curve, ladder), *_besides(ladder, target, legacy, curve, exact)]
    if curve.in_force.mean >= floor:
        return "pass", "; ".join(parts)
    why, what = diagnose(target.session, target.table, curve.index, target.settings, recommended)
    return "fail", "; ".join((*parts, *([why] if why else []), f"run: {what}"))


def _nothing(target: Side) -> str:
    name = target.session.endpoint.name
    if not target.indexes:
        return f"{name} has no ANN index: every search is exact"
    return f"{name} has no ANN index that could be searched for every row: the check plan says why"


def measure(
    crew: Crew,
    side: Side,
    index: AnnIndex,
    queries: Sequence[Query],
    exact: Sequence[Sequence[Neighbour]],
    k: int,
    deadline: float,
) -> Curve | None:
    """Return the recall at the value in force, then at others until the deadline (by ``clock``).

    At least one query is asked. None: the planner uses no ANN index.
    """
    in_force = side.settings.number(index.knob)
    steps: list[Step] = []
    for value in _values(index, in_force, k, side.settings):
        if steps and clock() >= deadline:
            break
        with side.session.transaction(read_only=True) as cursor:
            cursor.execute(FORCED + side.settings.apply_sql(**{index.knob: value}))
            if not steps:
                used = used_index(plan_nodes(cursor, ann_sql(side, index, queries[0], k)), side.indexes)
                if used is None:
                    return None
                if used.knob != index.knob:
                    # Of two on the same column the planner prefers the other kind.
                    return measure(crew, side, used, queries, exact, k, deadline)
                index = used
            steps.append(_step(crew, cursor, side, index, value, zip(queries, exact, strict=True), k, deadline))
    return Curve(index=index, in_force=steps[0], steps=tuple(steps))


def _values(index: AnnIndex, in_force: int, k: int, settings: SearchSettings) -> list[int]:
    """Return the values of the knob to measure, the one in force first."""
    if index.method == "hnsw":
        # No value below k returns k rows.
        others = {*EF_SEARCH_STEPS, *([k] if k > max(EF_SEARCH_STEPS) else [])}
    else:
        lists = index.options["lists"]
        others = {*(probes for probes in PROBES_STEPS if probes < lists), ceil(sqrt(lists)), lists}
    limit = settings.limits.get(index.knob, max(others))
    return [in_force, *sorted(value for value in others if value <= limit and value != in_force)]


def ann_sql(side: Side, index: AnnIndex, query: Query, k: int) -> sql.Composable:
    """Return the search that an index can answer, by its own expression: keys, and distances as the exact ones are."""
    table, mapping, metric = side.table, side.mapping, index.metric
    assert metric is not None
    operator = operator_sql(table, metric)
    return sql.SQL("SELECT {key}, {value} {operator} {query} FROM {table} ORDER BY {order} LIMIT {k}").format(
        key=key_text_sql(table),
        value=value_sql(table, mapping.embedding),
        operator=operator,
        query=query_sql(table, mapping, query),
        table=table.scanned,
        # The text is the server's own, under an empty search_path.
        order=sql.SQL("{} {} {}").format(
            sql.SQL(index.expression), operator, query_sql(table, mapping, query, index.type)
        ),
        k=sql.Literal(k),
    )


def _step(
    crew: Crew,
    cursor: Cursor,
    side: Side,
    index: AnnIndex,
    value: int,
    asked: "zip[tuple[Query, Sequence[Neighbour]]]",
    k: int,
    deadline: float,
) -> Step:
    recalls: list[float] = []
    under_returned = 0
    for query, exact in asked:
        crew.check()
        if recalls and clock() >= deadline:
            break
        cursor.execute(ann_sql(side, index, query, k))
        found = cursor.fetchall()
        # A zero vector has no cosine distance, and is no answer.
        distances = [distance for _, distance in found if distance == distance]
        edge = exact[-1].distance + DISTANCE_TOLERANCE * max(1.0, abs(exact[-1].distance)) if exact else 0.0
        hits = sum(distance <= edge for distance in distances)
        recalls.append(min(1.0, hits / len(exact)) if exact else 1.0)
        under_returned += len(distances) < len(exact)
    return Step(value=value, recalls=tuple(recalls), under_returned=under_returned)


def _legacy_curve(crew: Crew, side: Side, metric: str, exact: Exact, k: int, deadline: float) -> Curve | str:
    """Return the recall of the source's own index, or why there is nothing to compare with."""
    name = side.session.endpoint.name
    index = next((one for one in side.indexes if one.searchable and one.metric == metric), None)
    if index is None:
        return f"not compared with {name}, which has no such index"
    try:
        curve = measure(crew, side, index, exact.queries, exact.source, k, deadline)
    except (StatementError, RefusedError) as error:
        return f"not compared with {name}: {error.fact}"
    return f"not compared with {name}, whose planner does not use {index.name}" if curve is None else curve


def _found(curve: Curve, ladder: Ladder) -> str:
    step, k, wanted = curve.in_force, ladder.options.k, ladder.options.min_recall
    few = f", {step.under_returned} got fewer rows than there are" if step.under_returned else ""
    return (
        f"{curve.index.label} finds {step.mean:.1%} of the exact nearest {k} at {curve.index.knob} = {step.value}"
        f" ({counted(len(step.recalls), 'query')}, the worst {min(step.recalls):.0%}{few}), {wanted:.0%} are wanted"
    )


def _besides(ladder: Ladder, target: Side, legacy: Curve | str, curve: Curve, exact: Exact) -> list[str]:
    """Return what else has to be said of a verdict: what it was compared with, and what was not asked."""
    asked, queries = len(curve.in_force.recalls), len(exact.queries)
    if isinstance(legacy, str):
        parts = [legacy]
    else:
        step = legacy.in_force
        parts = [f"{ladder.route.source.name}'s {legacy.index.name} finds {step.mean:.1%} at {step.value}"]
    if not target.settings.role_exists:
        parts.append(f"{target.session.endpoint.name} has no role {target.settings.role}: the database's settings")
    if asked < queries:
        parts.append(f"{asked} of {counted(queries, 'query')} within the budget")
    return parts
