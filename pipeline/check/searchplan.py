"""The application's search on main: which index it can use, with which settings, and what a filter does to it."""

from psycopg2 import sql

from pipeline.check.annindex import (
    FORCED,
    MAX_INDEXED_VECTOR,
    AnnIndex,
    PlanNode,
    application_sql,
    plan_nodes,
    plan_text,
    used_index,
)
from pipeline.check.filtered import Filtered, measure_filter
from pipeline.check.ladder import Ladder
from pipeline.check.sides import Side, open_sides, stored_queries
from pipeline.events import CheckDone, Verdict
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import clock
from pipeline.wording import counted

# What the application's search orders by: LangChain's default, and this project's.
METRIC = "cosine"
# With so many queries a filter is tried: rows that match lie near to some and far from others.
FILTER_QUERIES = 5


def check_plan(crew: Crew, ladder: Ladder) -> CheckDone:
    """Look whether the application's search can use an index of the target, and what its settings do to it.

    Fails where there are ANN indexes and none can ever serve it, and where a filtered search finds less
    than on the source. Raises PipelineError where a side cannot be asked.
    """
    started = clock()
    with crew.together((ladder.route.source, "verify"), (ladder.route.target, "verify")) as (here, there):
        source, target = open_sides(crew, ladder, here, there)
        advice = _setting_advice(source, target)
        figures: dict[str, object] = {
            **dict.fromkeys(("index", "method", "opclass", "metric")),
            "used": False,
            "plan": "",
            "settings": {"source": dict(source.settings.values), "target": dict(target.settings.values)},
            "filter": None,
            "advice": advice,
        }
        verdict, summary = _look(crew, ladder, source, target, figures, advice)
    if advice:
        more = f" (and {counted(len(advice) - 1, 'more note')})" if len(advice) > 1 else ""
        summary = f"{summary}; {advice[0]}{more}"
    return CheckDone(name="plan", verdict=verdict, summary=summary, figures=figures, seconds=clock() - started)


def _look(
    crew: Crew, ladder: Ladder, source: Side, target: Side, figures: dict[str, object], advice: list[str]
) -> tuple[Verdict, str]:
    """Fill the figures and the advice in; return the verdict with its first words."""
    name, k = target.session.endpoint.name, ladder.options.k
    serving = next((index for index in target.indexes if index.serves(METRIC)), None)
    _describe(figures, serving or next(iter(target.indexes), None))
    if not target.indexes:
        if any(index.serves(METRIC) for index in source.indexes):
            advice.append(
                f"{source.session.endpoint.name} has an ANN index, {name} has none: {_create(ladder, target)}"
            )
        return "pass", f"{name} has no ANN index: every search is exact"
    queries = stored_queries(ladder, source.session)
    if not queries:
        return "pass", "no row of the source has an embedding that could be asked for"
    statement = application_sql(target.table, target.mapping, queries[0], k)
    plans: list[list[PlanNode]] = []
    for before in (sql.SQL(""), FORCED):
        with target.session.transaction(read_only=True) as cursor:
            cursor.execute(before + target.settings.apply_sql())
            plans.append(plan_nodes(cursor, statement))
    natural, forced = (used_index(nodes, target.indexes) for nodes in plans)
    figures |= {"used": natural is not None, "plan": plan_text(plans[0])}
    advice += [
        f"{index.label}: {_why_not(ladder, target, index)}"
        for index in target.indexes
        if forced is not None and not index.valid
    ]
    if forced is None:
        return _unserved(ladder, source, target)
    index = natural or forced
    _describe(figures, index)
    crew.check()
    found = measure_filter(crew, source, target, index, queries[:FILTER_QUERIES], k)
    if natural is not None:
        summary = f"the application's search uses {index.label} ({index.opclass})"
    else:
        summary = f"the planner still scans {name}'s table, which is cheaper; {index.label} fits ({index.opclass})"
    if found is None:
        return "pass", summary
    figures["filter"] = found.figures
    if found.found >= found.exact:
        return "pass", summary
    if found.fails:
        theirs = f"{source.session.endpoint.name} finds all"
        return "fail", f"{_shortfall(found)} under {index.label}, {theirs}; run: {found.remedy}"
    advice.insert(0, f"{_shortfall(found)} where {index.label} is used; to repair it: {found.remedy}")
    return "pass", summary


def _describe(figures: dict[str, object], index: AnnIndex | None) -> None:
    if index is not None:
        figures |= {"index": index.name, "method": index.method, "opclass": index.opclass, "metric": index.metric}


def _shortfall(found: Filtered) -> str:
    return f"filtered by {found.key!r}, a search finds {found.found} of {found.exact} rows"


def _unserved(ladder: Ladder, source: Side, target: Side) -> tuple[Verdict, str]:
    """Judge a target that has indexes, of which the application's search can use none."""
    column = target.table.column(target.mapping.embedding)
    assert column is not None
    dimensions = column.dimensions or ladder.route.dimensions
    first = target.indexes[0]
    reason = _why_not(ladder, target, first)
    beyond = column.base_type == "vector" and dimensions > MAX_INDEXED_VECTOR
    if beyond and first.searchable and not any(index.serves(METRIC) for index in source.indexes):
        return "pass", (
            f"an index on {dimensions:,} dimensions of the type vector cannot be: the application's search is exact,"
            f" unless it orders by {first.expression}, as {first.label} does"
        )
    return "fail", f"the application's search can never use {first.label}: {reason}"


def _why_not(ladder: Ladder, target: Side, index: AnnIndex) -> str:
    """Return why an index cannot serve the application's search, and what to type."""
    if not index.valid:
        return f"it is not valid; run: REINDEX INDEX CONCURRENTLY {index.quoted};"
    create = _create(ladder, target)
    if index.partial:
        return f"it holds only some of the rows; run: {create}"
    if index.metric != METRIC:
        return f"its {index.opclass} is for another distance than cosine (<=>), which is asked for; run: {create}"
    column = target.table.column(target.mapping.embedding)
    assert column is not None
    if not index.plain:
        if column.base_type == "vector" and column.dimensions is None:
            # With a dimension of the column's own, the client's cast folds away.
            create = " ".join(
                (
                    *("ALTER TABLE", target.table.quoted, "ALTER COLUMN", column.quoted, "TYPE"),
                    f"vector({ladder.route.dimensions}); {create}",
                )
            )
        return f"it is on {index.expression}, and the search orders by the column; run: {create}"
    return "the planner does not take it, even with enable_seqscan = off; look at the settings of the role"


def _create(ladder: Ladder, target: Side) -> str:
    """Return the statement that makes an index which serves."""
    column = target.table.column(target.mapping.embedding)
    assert column is not None and target.table.extension is not None
    return " ".join(
        ("CREATE INDEX ON", target.table.quoted, "USING hnsw", f"({column.quoted} {column.base_type}_cosine_ops);")
    )


def _setting_advice(source: Side, target: Side) -> list[str]:
    """Return where the settings of search differ: the same query may find less, or take longer."""
    here, there = source.session.endpoint.name, target.session.endpoint.name
    advice = []
    for name, value in source.settings.values.items():
        ours = target.settings.values.get(name)
        if ours is None and source.settings.places[name] != "default":
            advice.append(f"{name} is {value} on {here}, and {there}'s pgvector does not have it")
        elif ours is not None and ours != value:
            where = f"{value} on {here} ({source.settings.places[name]}), {ours} on {there}"
            advice.append(f"{name} is {where}; to have the same: {target.settings.remedy(name, value)}")
    if not target.settings.role_exists:
        advice.append(f"{there} has no role {target.settings.role}: the settings are the database's")
    return advice
