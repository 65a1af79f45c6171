"""Search with a metadata filter: under an ANN index it finds fewer rows than there are."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from psycopg2 import sql

from pipeline.check.annindex import FORCED, AnnIndex, SearchSettings, distance_sql, plan_nodes, used_index
from pipeline.check.neighbours import Query
from pipeline.check.sides import Side
from pipeline.errors import RefusedError, StatementError
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Cursor
from pipeline.postgres.tables import Table

# Rows whose metadata are looked at for a filter that matches few.
SAMPLE_ROWS = 2_000
# As many matching rows are a handful; of so many filters the first is taken that matches no more.
FEW_ROWS = 50
CANDIDATES = 4
MAX_VALUE_CHARACTERS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Filtered:
    """What a search finds that is filtered by ``key``, where ``exact`` rows of ``matching_rows`` are to be found.

    ``found`` is the query's that finds the fewest with the index in use, by the settings in force;
    ``found_now`` by the plan that the planner takes today, ``used`` whether that is the index.
    ``found_on_source`` is None where the source was not asked.
    """

    key: str
    k: int
    matching_rows: int
    exact: int
    found: int
    found_now: int
    found_on_source: int | None
    used: bool
    remedy: str | None

    @property
    def fails(self) -> bool:
        """Return whether the target finds less today than the source does."""
        return self.found_now < self.exact and self.found_on_source is not None and self.found_on_source >= self.exact

    @property
    def figures(self) -> dict[str, object]:
        """Return what is reported: never the value, which is content."""
        return {
            "key": self.key,
            "matching_rows": self.matching_rows,
            "k": self.k,
            "exact": self.exact,
            "found": self.found,
            "found_now": self.found_now,
            "found_on_source": self.found_on_source,
            "used": self.used,
            "remedy": self.remedy,
        }


def measure_filter(
    crew: Crew, source: Side, target: Side, index: AnnIndex, queries: Sequence[Query], k: int
) -> Filtered | None:
    """Compare the filtered search under an index with what there is to find; None where no filter matches few rows."""
    table, mapping, session = target.table, target.mapping, target.session
    column = table.column(mapping.metadata)
    if column is None or column.base_type != "jsonb" or not column.may_select:
        return None
    with session.transaction(read_only=True) as cursor:
        chosen = _choose(crew, cursor, target)
    if chosen is None:
        return None
    key, condition, matching = chosen
    counts: list[tuple[int, int, Query]] = []
    for query in queries:
        crew.check()
        counts.append((_found(target, query, k, condition, forced=True), _exact(target, query, k, condition), query))
    found, exact, query = min(counts, key=lambda one: one[0] - one[1])
    short = found < exact
    with session.transaction(read_only=True) as cursor:
        cursor.execute(target.settings.apply_sql())
        used = used_index(plan_nodes(cursor, _search_sql(target, query, k, condition)), target.indexes) is not None
    return Filtered(
        key=key,
        k=k,
        matching_rows=matching,
        exact=exact,
        found=found,
        found_now=_found(target, query, k, condition, forced=False) if short else exact,
        found_on_source=_found_on_source(source, query, k, condition) if short else None,
        used=used,
        remedy=_remedy(target.settings, table, index) if short else None,
    )


# Of objects, each scalar value of each key; the rarest value of every key, those that are there twice first.
_SAMPLE_SQL = sql.SQL("""
SELECT DISTINCT ON (n > 1, key) key, value, n FROM (
    SELECT e.key, e.value #>> '{{}}' AS value, pg_catalog.count(*) AS n
    FROM (SELECT {metadata} AS m FROM {table} WHERE pg_catalog.jsonb_typeof({metadata}) = 'object' LIMIT {rows}) s,
         pg_catalog.jsonb_each(s.m) AS e
    WHERE pg_catalog.jsonb_typeof(e.value) IN ('string', 'number', 'boolean')
    GROUP BY 1, 2 HAVING pg_catalog.count(*) <= {few}) q
WHERE pg_catalog.length(value) <= {characters} ORDER BY n > 1 DESC, key, n, value
""")


def _choose(crew: Crew, cursor: Cursor, target: Side) -> tuple[str, sql.Composable, int] | None:
    """Return a key, the condition of a filter by it that matches few rows, and how many."""
    table, metadata = target.table, sql.Identifier(target.mapping.metadata)
    statement = _SAMPLE_SQL.format(
        metadata=metadata,
        table=_sampled(table),
        rows=sql.Literal(SAMPLE_ROWS),
        few=sql.Literal(FEW_ROWS),
        characters=sql.Literal(MAX_VALUE_CHARACTERS),
    )
    cursor.execute(statement)
    for key, value, _ in cursor.fetchall()[:CANDIDATES]:
        crew.check()
        condition = sql.SQL("{}->>{} = {}").format(metadata, sql.Literal(key), sql.Literal(value))
        count = sql.SQL(
            "SELECT pg_catalog.count(*) FROM (SELECT 1 FROM {table} WHERE {condition} AND {embedding} IS NOT NULL"
            " LIMIT {limit}) q"
        ).format(
            table=table.scanned,
            condition=condition,
            embedding=sql.Identifier(target.mapping.embedding),
            limit=sql.Literal(FEW_ROWS + 1),
        )
        cursor.execute(count)
        ((matching,),) = cursor.fetchall()
        if 0 < matching <= FEW_ROWS:
            return key, condition, matching
    return None


def _sampled(table: Table) -> sql.Composable:
    """Return some rows of the whole table: pages drawn from it, where it is large and has pages."""
    if not table.heaps or table.rows_estimate <= 10 * SAMPLE_ROWS:
        return table.scanned
    # Twice as many as are wanted; rows of one page came together, and look alike.
    percent = min(100.0, 200.0 * SAMPLE_ROWS / table.rows_estimate)
    return sql.SQL("{} TABLESAMPLE SYSTEM ({}) REPEATABLE (1)").format(table.scanned, sql.Literal(percent))


def _search_sql(side: Side, query: Query, k: int, condition: sql.Composable) -> sql.Composable:
    return sql.SQL("SELECT {distance} AS d FROM {table} WHERE {condition} ORDER BY d LIMIT {k}").format(
        distance=distance_sql(side.table, side.mapping, query),
        table=side.table.scanned,
        condition=condition,
        k=sql.Literal(k),
    )


def _found(side: Side, query: Query, k: int, condition: sql.Composable, *, forced: bool) -> int:
    """Return how many neighbours a search finds by the settings in force; what has no distance is none."""
    before = FORCED if forced else sql.SQL("")
    count = sql.SQL("SELECT pg_catalog.count(*) FROM ({}) q WHERE d <> 'NaN'")
    with side.session.transaction(read_only=True) as cursor:
        cursor.execute(before + side.settings.apply_sql())
        cursor.execute(count.format(_search_sql(side, query, k, condition)))
        ((found,),) = cursor.fetchall()
    return int(found)


def _exact(side: Side, query: Query, k: int, condition: sql.Composable) -> int:
    """Return how many neighbours there are to be found."""
    count = sql.SQL(
        "SELECT pg_catalog.count(*) FROM (SELECT 1 FROM {table} WHERE {condition} AND {distance} <> 'NaN' LIMIT {k}) q"
    ).format(
        table=side.table.scanned,
        condition=condition,
        distance=distance_sql(side.table, side.mapping, query),
        k=sql.Literal(k),
    )
    ((found,),) = side.session.rows(count)
    return int(found)


def _found_on_source(source: Side, query: Query, k: int, condition: sql.Composable) -> int | None:
    column = source.table.column(source.mapping.metadata)
    if column is None or column.base_type not in ("json", "jsonb") or not column.may_select:
        return None
    try:
        return _found(source, query, k, condition, forced=False)
    except (StatementError, RefusedError):
        return None


def _remedy(settings: SearchSettings, table: Table, index: AnnIndex) -> str:
    """Return the statement by which a filtered search looks on until it has found enough."""
    further = partial("{}.{}".format, index.method)
    iterative = settings.values.get(further("iterative_scan"))
    if iterative is None:
        # pgvector before 0.8 looks once: at more rows, or at an index that holds none but the matching ones.
        most = index.options["lists"] if index.method == "ivfflat" else settings.limits.get(index.knob, 1_000)
        larger = settings.remedy(index.knob, most)
        return f"{larger} (or make a partial index for the filter; pgvector 0.8 can look on)"
    if iterative == "off":
        return settings.remedy(further("iterative_scan"), "strict_order" if index.method == "hnsw" else "relaxed_order")
    if index.method == "hnsw":
        return settings.remedy(
            further("max_scan_tuples"), max(table.rows_estimate, 2 * settings.number(further("max_scan_tuples")))
        )
    return settings.remedy(further("max_probes"), index.options["lists"])
