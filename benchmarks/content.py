"""What a table holds: counted, digested and weighed, by queries that the engine under test has no part in."""

from dataclasses import dataclass

import psycopg2.extensions
from psycopg2 import sql

from measure import BenchError
from pipeline.postgres.tables import read_extension
from pipeline.settings import TableMapping

# Of a binary COPY: header and trailer, and per row the number of fields and four lengths.
STREAM_FRAME_BYTES, STREAM_ROW_BYTES = 21, 18

Connection = psycopg2.extensions.connection


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What a table holds: its rows, and the sum of a 64-bit hash over the binary forms of each."""

    rows: int
    digest: str


def _sends(cursor: psycopg2.extensions.cursor, mapping: TableMapping) -> list[sql.Composed]:
    """Return the binary forms of the four columns, as COPY sends them."""
    extension = read_extension(cursor)
    assert extension is not None
    functions = (
        ("pg_catalog", "uuid_send"),
        ("pg_catalog", "textsend"),
        ("pg_catalog", "jsonb_send"),
        (extension.schema, "vector_send"),
    )
    return [
        sql.SQL("{}({})").format(sql.Identifier(*function), sql.Identifier(column))
        for function, column in zip(functions, mapping.columns, strict=True)
    ]


def read_content(connection: Connection, mapping: TableMapping) -> Content:
    """Read all rows of the table and digest them."""
    with connection.cursor() as cursor:
        cursor.execute(
            sql.SQL(
                "SELECT pg_catalog.count(*), coalesce(pg_catalog.sum("
                "pg_catalog.hash_record_extended(ROW({}), 0)), 0)::pg_catalog.text FROM {}"
            ).format(sql.SQL(", ").join(_sends(cursor, mapping)), sql.Identifier(mapping.schema, mapping.table))
        )
        ((rows, digest),) = cursor.fetchall()
    return Content(rows=rows, digest=digest)


def read_stream_bytes(connection: Connection, mapping: TableMapping) -> int:
    """Return how many bytes one binary COPY of all rows would send."""
    with connection.cursor() as cursor:
        lengths = [sql.SQL("coalesce(pg_catalog.length({}), 0)").format(send) for send in _sends(cursor, mapping)]
        cursor.execute(
            sql.SQL("SELECT coalesce(pg_catalog.sum({} + {}), 0)::pg_catalog.int8 FROM {}").format(
                sql.Literal(STREAM_ROW_BYTES),
                sql.SQL(" + ").join(lengths),
                sql.Identifier(mapping.schema, mapping.table),
            )
        )
        ((total,),) = cursor.fetchall()
    return int(total) + STREAM_FRAME_BYTES


def check_equal(name: str, expected: Content, found: Content) -> None:
    """Raise BenchError where contender ``name`` left other rows than legacy has."""
    if found.rows != expected.rows:
        raise BenchError(f"{name} brought {found.rows:,} of {expected.rows:,} rows: its time counts for nothing")
    if found != expected:
        raise BenchError(f"{name} brought {found.rows:,} rows, but not legacy's: their digests differ")
