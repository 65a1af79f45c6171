"""Exact nearest neighbours on both sides: the same queries must find the same rows at the same distances."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

import psycopg2.errors
from psycopg2 import sql

from pipeline.check.digests import hash_sql
from pipeline.errors import StatementError
from pipeline.postgres.database import Cursor, Session, clock
from pipeline.postgres.tables import Table
from pipeline.postgres.values import key_text_sql, value_sql
from pipeline.settings import TableMapping

# Two servers add up the same numbers in another order, by the instructions of their processors; for
# 16,000 float4 dimensions the difference stays below this. Of distances above 1 it is this share.
DISTANCE_TOLERANCE = 1e-6
# What a metric's distance is asked for by; of pgvector, in the schema of the extension.
OPERATORS: Mapping[str, str] = {"cosine": "<=>", "l2": "<->", "inner_product": "<#>", "l1": "<+>"}
Origin = Literal["stored", "text"]
# Queries that one scan answers. Reading a vector takes as long as comparing it with some thirty queries
# (768 dimensions), and the server holds all of them at once.
SCAN_QUERIES = 50
# Rows that are looked at before the scan, for each neighbour that is wanted: what is farther than the k-th of
# them is none. The scan keeps about one row of so many, for each query.
SAMPLE_ROWS_PER_NEIGHBOUR = 100
MAX_SAMPLE_ROWS = 20_000
# Zero vectors are not drawn: so many more are looked at before all rows are.
_SPARE_ROWS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A stored vector, as its text form (which gives back the same floats), and the key of its row.

    Of an embedded text the key is a name for it.
    """

    key: str
    vector: str
    origin: Origin = "stored"


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """A row found: its key, and its distance (cosine: 0 to 2; inner product: negative, the smaller the nearer)."""

    key: str
    distance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """A query whose answers differ, and how."""

    query: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Excluded:
    """Rows that no search by cosine finds: without an embedding, and those whose distance is not a number."""

    nulls: int
    not_a_number: int


class TimeUpError(StatementError):
    """A search was ended because its time was up."""


def sample_queries(session: Session, table: Table, mapping: TableMapping, count: int) -> list[Query]:
    """Draw stored vectors from the whole table, the same ones every time: those of the smallest key hashes.

    Rows without an embedding, or with one of no length or no finite one (which has no direction), are not
    drawn. Vectors are read of little more than the rows that are drawn, unless most have no direction.
    """
    # As many candidates as are wanted, and some more; where these are not enough, all.
    for limit in (sql.Literal(2 * count + _SPARE_ROWS), sql.SQL("ALL")):
        query = _SAMPLE_SQL.format(
            key=key_text_sql(table, "s"),
            value=value_sql(table, mapping.embedding, "s"),
            columns=_columns_sql(table, mapping, table.key),
            embedding=sql.Identifier(mapping.embedding),
            norm=norm_sql(table, mapping.embedding),
            table=table.scanned,
            hash=hash_sql(table, table.key),
            candidates=limit,
            count=sql.Literal(count),
        )
        if len(found := session.rows(query)) >= count:
            break
    return [Query(key=key, vector=vector) for key, vector in found]


# The vector's text, which takes long to make, is made of the rows that are drawn: the limit stands below it.
_SAMPLE_SQL = sql.SQL("""
SELECT {key} AS k, {value}::pg_catalog.text FROM (
    SELECT * FROM (
        SELECT {columns}, {hash} AS "pipeline hash" FROM {table} WHERE {embedding} IS NOT NULL
        ORDER BY "pipeline hash" LIMIT {candidates}) c
    WHERE {norm} > 0 AND {norm} < 'Infinity' ORDER BY "pipeline hash" LIMIT {count}) s
ORDER BY "pipeline hash", k
""")


def _columns_sql(table: Table, mapping: TableMapping, names: Sequence[str]) -> sql.Composable:
    """Return the named columns and the embedding, each once."""
    return sql.SQL(", ").join(map(sql.Identifier, dict.fromkeys((*names, mapping.embedding))))


def norm_sql(table: Table, embedding: str) -> sql.Composable:
    """Return the euclidean length of the embedding, in double precision."""
    assert table.extension is not None
    column = table.column(embedding)
    assert column is not None
    function = "vector_norm" if column.base_type == "vector" else "l2_norm"
    return sql.SQL("{}({})").format(sql.Identifier(table.extension.schema, function), sql.Identifier(embedding))


def exact_neighbours(
    session: Session,
    table: Table,
    mapping: TableMapping,
    queries: Sequence[Query],
    k: int,
    metric: str = "cosine",
    seconds: float | None = None,
) -> list[list[Neighbour]]:
    """Return the exact top k of every query by a metric of OPERATORS, nearest first; no index is used.

    Rows without an embedding, and distances that are not a number, are no neighbours. One scan of the table
    answers SCAN_QUERIES queries. Raises TimeUpError where it takes more than so many seconds.
    """
    deadline = None if seconds is None else clock() + seconds
    answers: list[list[Neighbour]] = []
    with session.transaction(read_only=True) as cursor:
        cursor.execute(_SETTINGS)
        for start in range(0, len(queries), SCAN_QUERIES):
            asked = queries[start : start + SCAN_QUERIES]
            bounds = _timed(session, cursor, _bounds_sql(table, mapping, asked, k, metric), deadline)
            # Without k rows in the sample, every row whose distance is a number is kept.
            limits = {number: float("inf") if bound is None else bound for number, bound in bounds}
            found: list[list[Neighbour]] = [[] for _ in asked]
            for number, key, distance in _timed(
                session, cursor, _nearest_sql(table, mapping, asked, limits, k, metric), deadline
            ):
                found[number].append(Neighbour(key=key, distance=distance))
            answers += found
    return answers


# Materializing is what a planner with wrong statistics would do to the table, with every vector in a file.
_SETTINGS = """
SET LOCAL enable_indexscan = off; SET LOCAL enable_indexonlyscan = off; SET LOCAL enable_bitmapscan = off;
SET LOCAL enable_material = off
"""


def count_excluded(session: Session, table: Table, mapping: TableMapping, seconds: float | None = None) -> Excluded:
    """Count what no search by cosine finds, in one scan. Raises TimeUpError where it takes longer than ``seconds``."""
    distance = _distance_sql(table, mapping, sql.Identifier("r", "v"), sql.Identifier("r", "v"), "cosine")
    query = sql.SQL(
        "SELECT pg_catalog.count(*) FILTER (WHERE v IS NULL), pg_catalog.count(*) FILTER (WHERE {distance} = 'NaN')"
        " FROM (SELECT {vector} AS v FROM {table} OFFSET 0) r"
    ).format(distance=distance, vector=_vector_sql(table, mapping, "r"), table=table.scanned)
    deadline = None if seconds is None else clock() + seconds
    with session.transaction(read_only=True) as cursor:
        ((nulls, not_a_number),) = _timed(session, cursor, query, deadline)
    return Excluded(nulls=nulls, not_a_number=not_a_number)


def _timed(session: Session, cursor: Cursor, query: sql.Composable, deadline: float | None) -> list[tuple[Any, ...]]:
    """Return the rows of one query, which the server itself ends at the deadline (by ``clock``)."""
    if deadline is not None:
        milliseconds = max(1, int((deadline - clock()) * 1000))
        query = sql.SQL("SET LOCAL statement_timeout = {}; {}").format(sql.Literal(milliseconds), query)
    try:
        cursor.execute(query)
        return cursor.fetchall()
    except psycopg2.errors.QueryCanceled as error:
        # Somebody else may cancel it too, before its time.
        if deadline is None or clock() < deadline:
            raise
        raise TimeUpError(f"{session.label}: the search was not done in its time", "give it more: --budget") from error


def _vector_sql(table: Table, mapping: TableMapping, alias: str) -> sql.Composable:
    """Return the embedding as it is carried, read from its place once, however often it is used then.

    A type's operator rounds as its type does. A cast makes a new value anyway; the one to the type itself,
    with a length of its own, returns what it has read.
    """
    column = table.column(mapping.embedding)
    assert column is not None and table.extension is not None
    value = value_sql(table, mapping.embedding, alias)
    if column.cast is not None:
        return value
    return sql.SQL("{}({}, -1, false)").format(sql.Identifier(table.extension.schema, column.base_type), value)


def _distance_sql(
    table: Table, mapping: TableMapping, left: sql.Composable, right: sql.Composable, metric: str
) -> sql.Composable:
    assert table.extension is not None
    schema = sql.Identifier(table.extension.schema)
    if metric == "l1":
        # Before 0.7 there is no operator for it.
        return sql.SQL("{}.l1_distance({}, {})").format(schema, left, right)
    return sql.SQL("({} OPERATOR({}.{}) {})").format(left, schema, sql.SQL(OPERATORS[metric]), right)


def _queries_sql(
    table: Table, mapping: TableMapping, queries: Sequence[Query], limits: Mapping[int, float] | None = None
) -> sql.Composable:
    """Return the rows of VALUES: number, vector, and the distance that counts at most."""
    column = table.column(mapping.embedding)
    assert column is not None and table.extension is not None
    kind = sql.Identifier(*(column.cast or (table.extension.schema, column.base_type)))
    return sql.SQL(", ").join(
        sql.SQL("({}, {}::{}, {}::pg_catalog.float8)").format(
            sql.Literal(number),
            sql.Literal(query.vector),
            kind,
            sql.Literal(None if limits is None else limits[number]),
        )
        for number, query in enumerate(queries)
    )


# Rows of the smallest key hashes lie all over the table; each query's k-th nearest among them bounds its k-th
# nearest of all. OFFSET keeps the planner from computing anything twice.
_BOUNDS_SQL = sql.SQL("""
WITH s AS MATERIALIZED (
    SELECT {vector} AS v FROM (
        SELECT {columns} FROM {table} WHERE {embedding} IS NOT NULL ORDER BY {hash} LIMIT {rows}) r),
q (i, v, d) AS (VALUES {queries})
SELECT q.i, (SELECT d FROM (SELECT {distance} AS d FROM s OFFSET 0) n WHERE d <> 'NaN'
             ORDER BY d LIMIT 1 OFFSET {last})
FROM q
""")


def _bounds_sql(table: Table, mapping: TableMapping, queries: Sequence[Query], k: int, metric: str) -> sql.Composable:
    return _BOUNDS_SQL.format(
        vector=_vector_sql(table, mapping, "r"),
        columns=sql.Identifier(mapping.embedding),
        table=table.scanned,
        embedding=sql.Identifier(mapping.embedding),
        hash=hash_sql(table, table.key),
        rows=sql.Literal(min(k * SAMPLE_ROWS_PER_NEIGHBOUR, max(k, MAX_SAMPLE_ROWS))),
        queries=_queries_sql(table, mapping, queries),
        distance=_distance_sql(table, mapping, sql.Identifier("s", "v"), sql.Identifier("q", "v"), metric),
        last=sql.Literal(k - 1),
    )


# Each vector is read once and compared with every query; what is kept is little, and sorted then. NaN is more than
# any bound. OFFSET also keeps the planner from trying a distance, and the cast in it, on rows that are left out
# because they cannot be cast.
_NEAREST_SQL = sql.SQL("""
WITH q (i, v, d) AS MATERIALIZED (VALUES {queries}),
near AS (
    SELECT q.i, {key} AS k, {distance} AS d
    FROM (SELECT {keys}, {vector} AS "pipeline vector" FROM {table} WHERE {embedding} IS NOT NULL OFFSET 0) r
    JOIN q ON {distance} <= q.d)
SELECT i, k, d FROM (SELECT i, k, d, pg_catalog.row_number() OVER (PARTITION BY i ORDER BY d, k) AS rank FROM near) n
WHERE rank <= {count} ORDER BY i, d, k
""")


def _nearest_sql(
    table: Table, mapping: TableMapping, queries: Sequence[Query], limits: Mapping[int, float], k: int, metric: str
) -> sql.Composable:
    vector = sql.Identifier("r", "pipeline vector")
    return _NEAREST_SQL.format(
        queries=_queries_sql(table, mapping, queries, limits),
        key=key_text_sql(table, "r"),
        keys=sql.SQL(", ").join(map(sql.Identifier, table.key)),
        distance=_distance_sql(table, mapping, vector, sql.Identifier("q", "v"), metric),
        vector=_vector_sql(table, mapping, "r"),
        table=table.scanned,
        embedding=sql.Identifier(mapping.embedding),
        count=sql.Literal(k),
    )


def disagreement(
    query: Query, left: Sequence[Neighbour], right: Sequence[Neighbour], tolerance: float = DISTANCE_TOLERANCE
) -> Disagreement | None:
    """Return how two exact answers differ, or None.

    The distances must agree rank by rank. A key must be in both answers unless it lies within the
    tolerance of the last rank: of rows at that distance, each side may have kept others. The tolerance is
    a share of the largest distance where that is more than 1.
    """
    if len(left) != len(right):
        return Disagreement(query=query.key, reason=f"{len(left)} rows on one side, {len(right)} on the other")
    if not left:
        return None
    tolerance *= max([1.0, *(abs(one.distance) for one in (*left, *right) if isfinite(one.distance))])
    for rank, (one, other) in enumerate(zip(left, right, strict=True), 1):
        if not _close(one.distance, other.distance, tolerance):
            return Disagreement(
                query=query.key, reason=f"rank {rank}: distance {one.distance:.7f}, on the other {other.distance:.7f}"
            )
    edge = min(left[-1].distance, right[-1].distance) - tolerance
    for found, answer in ((left, right), (right, left)):
        distances = {neighbour.key: neighbour.distance for neighbour in answer}
        for neighbour in found:
            there = distances.get(neighbour.key)
            if there is None and neighbour.distance < edge:
                return Disagreement(query=query.key, reason=f"{neighbour.key} is found on one side only")
            if there is not None and not _close(there, neighbour.distance, tolerance):
                return Disagreement(query=query.key, reason=f"{neighbour.key} lies at another distance")
    return None


def _close(one: float, other: float, tolerance: float) -> bool:
    # Two infinite distances are equal, and their difference is not a number.
    return one == other or abs(one - other) <= tolerance
