"""Exact nearest neighbours on both sides: the same queries must find the same rows at the same distances."""

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg2 import sql

from pipeline.check.digests import hash_sql
from pipeline.postgres.database import Cursor, Session
from pipeline.postgres.tables import Table
from pipeline.postgres.values import key_text_sql, value_sql
from pipeline.settings import TableMapping

# Two servers add up the same numbers in another order, by the instructions of their processors; for
# 16,000 float4 dimensions the difference stays below this.
DISTANCE_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A stored vector, as its text form (which gives back the same floats), and the key of its row."""

    key: str
    vector: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """A row found: its key, and its cosine distance, 0 to 2."""

    key: str
    distance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """A query whose answers differ, and how."""

    query: str
    reason: str


def sample_queries(session: Session, table: Table, mapping: TableMapping, count: int) -> list[Query]:
    """Draw stored vectors from the whole table, the same ones every time: those of the smallest key hashes.

    Rows without an embedding, or with one of zero length (which has no direction), are not drawn.
    """
    assert table.extension is not None
    query = sql.SQL(
        "SELECT {key}, {value}::pg_catalog.text FROM {table} WHERE {embedding} IS NOT NULL"
        " AND {norm} > 0 ORDER BY {hash}, 1 LIMIT {count}"
    ).format(
        key=key_text_sql(table),
        value=value_sql(table, mapping.embedding),
        embedding=sql.Identifier(mapping.embedding),
        norm=norm_sql(table, mapping.embedding),
        table=table.scanned,
        hash=hash_sql(table, table.key),
        count=sql.Literal(count),
    )
    return [Query(key=key, vector=vector) for key, vector in session.rows(query)]


def norm_sql(table: Table, embedding: str) -> sql.Composable:
    """Return the euclidean length of the embedding, in double precision."""
    assert table.extension is not None
    column = table.column(embedding)
    assert column is not None
    function = "vector_norm" if column.base_type == "vector" else "l2_norm"
    return sql.SQL("{}({})").format(sql.Identifier(table.extension.schema, function), sql.Identifier(embedding))


def exact_neighbours(
    session: Session, table: Table, mapping: TableMapping, queries: Sequence[Query], k: int
) -> list[list[Neighbour]]:
    """Return the exact top k of every query by cosine distance, nearest first; no index is used.

    Rows without an embedding, and distances that are not a number, are no neighbours.
    """
    with session.transaction(read_only=True) as cursor:
        cursor.execute(
            "SET LOCAL enable_indexscan = off; SET LOCAL enable_indexonlyscan = off; SET LOCAL enable_bitmapscan = off"
        )
        return [_nearest(cursor, table, mapping, query, k) for query in queries]


def _nearest(cursor: Cursor, table: Table, mapping: TableMapping, query: Query, k: int) -> list[Neighbour]:
    assert table.extension is not None
    column = table.column(mapping.embedding)
    assert column is not None
    schema = table.extension.schema
    # Compared as what was carried: a type's operator rounds as its type does. OFFSET keeps the planner from
    # trying a distance, and the cast in it, on rows that are left out because they cannot be cast.
    statement = sql.SQL(
        "SELECT k, d FROM (SELECT {key} AS k, {value} OPERATOR({schema}.<=>) {query}::{type} AS d FROM {table}"
        " WHERE {embedding} IS NOT NULL OFFSET 0) q WHERE d <> 'NaN' ORDER BY d, k LIMIT {count}"
    ).format(
        key=key_text_sql(table),
        value=value_sql(table, mapping.embedding),
        embedding=sql.Identifier(mapping.embedding),
        schema=sql.Identifier(schema),
        query=sql.Literal(query.vector),
        type=sql.Identifier(schema, column.base_type) if column.cast is None else sql.Identifier(*column.cast),
        table=table.scanned,
        count=sql.Literal(k),
    )
    cursor.execute(statement)
    return [Neighbour(key=key, distance=distance) for key, distance in cursor.fetchall()]


def disagreement(
    query: Query, left: Sequence[Neighbour], right: Sequence[Neighbour], tolerance: float = DISTANCE_TOLERANCE
) -> Disagreement | None:
    """Return how two exact answers differ, or None.

    The distances must agree rank by rank. A key must be in both answers unless it lies within the
    tolerance of the last rank: of rows at that distance, each side may have kept others.
    """
    if len(left) != len(right):
        return Disagreement(query=query.key, reason=f"{len(left)} rows on one side, {len(right)} on the other")
    for rank, (one, other) in enumerate(zip(left, right, strict=True), 1):
        if abs(one.distance - other.distance) > tolerance:
            return Disagreement(
                query=query.key, reason=f"rank {rank}: distance {one.distance:.7f}, on the other {other.distance:.7f}"
            )
    if not left:
        return None
    edge = min(left[-1].distance, right[-1].distance) - tolerance
    for found, answer in ((left, right), (right, left)):
        distances = {neighbour.key: neighbour.distance for neighbour in answer}
        for neighbour in found:
            there = distances.get(neighbour.key)
            if there is None and neighbour.distance < edge:
                return Disagreement(query=query.key, reason=f"{neighbour.key} is found on one side only")
            if there is not None and abs(there - neighbour.distance) > tolerance:
                return Disagreement(query=query.key, reason=f"{neighbour.key} lies at another distance")
    return None
