"""Exact nearest neighbours on both sides: the same queries must find the same rows at the same distances."""

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg2 import sql

from pipeline.check.digests import hash_sql
from pipeline.postgres.database import Cursor, Session
from pipeline.postgres.tables import Table
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
        "SELECT {key}, {embedding}::pg_catalog.text FROM ONLY {table} WHERE {embedding} IS NOT NULL"
        " AND {norm} > 0 ORDER BY {hash}, 1 LIMIT %s"
    ).format(
        key=key_text_sql(table),
        embedding=sql.Identifier(mapping.embedding),
        norm=_norm_sql(table, mapping.embedding),
        table=table.identifier,
        hash=hash_sql(table, table.key),
    )
    return [Query(key=key, vector=vector) for key, vector in session.rows(query, (count,))]


def key_text_sql(table: Table) -> sql.Composable:
    """Return the key as one text."""
    return sql.SQL(" || ', ' || ").join(
        sql.SQL("{}::pg_catalog.text").format(sql.Identifier(name)) for name in table.key
    )


def _norm_sql(table: Table, embedding: str) -> sql.Composable:
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
    statement = sql.SQL(
        "SELECT {key}, d FROM (SELECT {columns}, {embedding} OPERATOR({schema}.<=>) %s::{type} AS d FROM ONLY {table}"
        " WHERE {embedding} IS NOT NULL) q WHERE d <> 'NaN' ORDER BY d, 1 LIMIT %s"
    ).format(
        key=key_text_sql(table),
        columns=sql.SQL(", ").join(map(sql.Identifier, table.key)),
        embedding=sql.Identifier(mapping.embedding),
        schema=sql.Identifier(schema),
        type=sql.Identifier(schema, column.base_type),
        table=table.identifier,
    )
    cursor.execute(statement, (query.vector, k))
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
