"""Comparing two tables: bucketed digests on each side at once, and the keys where they differ.

A row's digest is a hash over the binary send forms of all its columns, in a record: neither
concatenation, nor trailing blanks, nor the sign of zero, nor a NULL can hide a difference. Digests
are summed, never combined by XOR, which cancels what occurs twice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from psycopg2 import sql

from pipeline.errors import RefusedError
from pipeline.postgres.database import Session
from pipeline.postgres.tables import Table

# 4,096 buckets of a million rows hold 244 rows each: few to open, and a map of some hundred kilobytes.
BUCKETS = 4096
DifferenceKind = Literal["missing", "extra", "different"]
# The first version with hash_record_extended.
RECORD_HASH_VERSION = 140000


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketMap:
    """Per bucket: the number of rows, of non-null embeddings, and the sum of the rows' digests."""

    buckets: dict[int, tuple[int, int, int]]

    @property
    def rows(self) -> int:
        """Return the number of rows in all buckets."""
        return sum(rows for rows, _, _ in self.buckets.values())

    @property
    def embeddings(self) -> int:
        """Return the number of rows whose embedding is not null."""
        return sum(embeddings for _, embeddings, _ in self.buckets.values())

    def differing(self, other: "BucketMap") -> list[int]:
        """Return the buckets in which the two sides differ."""
        return sorted(
            bucket
            for bucket in self.buckets.keys() | other.buckets.keys()
            if self.buckets.get(bucket) != other.buckets.get(bucket)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A key that is missing on the target, extra there, or whose rows differ. ``key`` is its text form."""

    kind: DifferenceKind
    key: str


def hash_sql(table: Table, columns: Sequence[str], alias: str | None = None) -> sql.Composable:
    """Return a 64-bit hash over the binary send forms of columns, equal on every server from 14 on.

    ``alias`` is what the table is called in the statement, where the bare names would be ambiguous.
    """
    return sql.SQL("pg_catalog.hash_record_extended(ROW({}), 0)").format(
        sql.SQL(", ").join(_send_sql(table, name, alias) for name in columns)
    )


def key_texts_sql(table: Table) -> sql.Composable:
    """Return the key's columns as texts, in the key's order."""
    return sql.SQL(", ").join(sql.SQL("{}::pg_catalog.text").format(sql.Identifier(name)) for name in table.key)


def _send_sql(table: Table, name: str, alias: str | None = None) -> sql.Composable:
    column = table.column(name)
    assert column is not None
    place = sql.Identifier(name) if alias is None else sql.Identifier(alias, name)
    return sql.SQL("{}({})").format(sql.Identifier(*column.send), place)


def check_versions(sessions: Sequence[Session]) -> None:
    """Raise RefusedError where a server is too old for the record hash."""
    for session in sessions:
        if session.version < RECORD_HASH_VERSION:
            raise RefusedError(
                f"{session.label} is PostgreSQL {session.version // 10000}; digests need 14 or newer",
                "upgrade the server, or restore a dump of it into a newer one and verify against that",
            )


def bucket_map(session: Session, table: Table, columns: Sequence[str], embedding: str) -> BucketMap:
    """Read a side's bucket map: one sequential pass over all content, in one snapshot."""
    query = sql.SQL(
        "SELECT h & {mask}, pg_catalog.count(*), pg_catalog.count(e), pg_catalog.sum(d) FROM"
        " (SELECT {key} AS h, {row} AS d, {embedding} AS e FROM ONLY {table}) q GROUP BY 1"
    ).format(
        mask=sql.Literal(BUCKETS - 1),
        key=hash_sql(table, table.key),
        row=hash_sql(table, columns),
        embedding=sql.Identifier(embedding),
        table=table.identifier,
    )
    return BucketMap(
        buckets={bucket: (rows, filled, int(total)) for bucket, rows, filled, total in session.rows(query)}
    )


def open_buckets(
    source: tuple[Session, Table], target: tuple[Session, Table], columns: Sequence[str], buckets: Sequence[int]
) -> Iterator[Difference]:
    """Yield every difference inside the given buckets, in key order, in bounded memory.

    Both sides sort by the keys' binary forms, which no collation touches, and are merged.
    """
    left = _digests(*source, columns, buckets)
    right = _digests(*target, columns, buckets)
    mine, theirs = next(left, None), next(right, None)
    while mine is not None or theirs is not None:
        if theirs is None or (mine is not None and mine[0] < theirs[0]):
            assert mine is not None
            yield Difference(kind="missing", key=mine[1])
            mine = next(left, None)
        elif mine is None or theirs[0] < mine[0]:
            yield Difference(kind="extra", key=theirs[1])
            theirs = next(right, None)
        else:
            if mine[2] != theirs[2]:
                yield Difference(kind="different", key=mine[1])
            mine, theirs = next(left, None), next(right, None)


def _digests(
    session: Session, table: Table, columns: Sequence[str], buckets: Sequence[int]
) -> Iterator[tuple[bytes, str, int]]:
    """Stream (binary key, key as text, digest) of the rows in some buckets, in the order of the binary key."""
    binary = sql.SQL(" || ").join(
        sql.SQL("pg_catalog.int4send(pg_catalog.length({send})) || {send}").format(send=_send_sql(table, name))
        for name in table.key
    )
    text = sql.SQL(" || ', ' || ").join(
        sql.SQL("{}::pg_catalog.text").format(sql.Identifier(name)) for name in table.key
    )
    query = sql.SQL(
        "SELECT {binary}, {text}, {row} FROM ONLY {table} WHERE ({hash} & {mask}) = ANY (%s) ORDER BY 1"
    ).format(
        binary=binary,
        text=text,
        row=hash_sql(table, columns),
        table=table.identifier,
        hash=hash_sql(table, table.key),
        mask=sql.Literal(BUCKETS - 1),
    )
    for batch in session.stream(query, (list(buckets),)):
        for key_bytes, key_text, digest in batch:
            yield bytes(key_bytes), key_text, digest
