"""Comparing two tables by the sums of their rows' digests, bucket by bucket.

A row's digest is a hash over the binary forms of all its values as they are carried, in a record:
neither concatenation, nor trailing blanks, nor the sign of zero, nor a NULL can hide a difference. The
older of the two servers decides which hash, for both.
Digests are summed, never combined by XOR, which cancels what occurs twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg2 import sql

from pipeline.errors import RefusedError
from pipeline.postgres.database import Session
from pipeline.postgres.slices import Slice, slice_sql
from pipeline.postgres.tables import Table
from pipeline.postgres.values import form_sql, value_sql

# 4,096 buckets of a million rows hold 244 rows each: few to open, and a map of some hundred kilobytes.
BUCKETS = 4096
# The first version with hash_record_extended, which is the faster hash.
RECORD_HASH_VERSION = 140000
# What a copy asks of the two servers. Before 12 a float's text does not give back its bits, and the
# catalog knows no generated columns. The ledger's transaction numbers come from functions of 13; 14 is the
# oldest that a table is moved into.
LEAST_SOURCE_VERSION = 120000
LEAST_TARGET_VERSION = 140000


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

    def rows_in(self, buckets: Sequence[int]) -> int:
        """Return the number of rows in some buckets."""
        return sum(self.buckets.get(bucket, (0, 0, 0))[0] for bucket in buckets)

    def plus(self, other: "BucketMap") -> "BucketMap":
        """Return the map of both maps' rows."""
        total = dict(self.buckets)
        for bucket, (rows, filled, digests) in other.buckets.items():
            before = total.get(bucket, (0, 0, 0))
            total[bucket] = (before[0] + rows, before[1] + filled, before[2] + digests)
        return BucketMap(buckets=total)

    def differing(self, other: "BucketMap") -> list[int]:
        """Return the buckets in which the two sides differ."""
        return sorted(
            bucket
            for bucket in self.buckets.keys() | other.buckets.keys()
            if self.buckets.get(bucket) != other.buckets.get(bucket)
        )


def hash_sql(table: Table, columns: Sequence[str], alias: str | None = None) -> sql.Composable:
    """Return a 64-bit hash over the binary forms of columns, equal on both servers that are compared.

    ``alias`` is what the table is called in the statement, where the bare names would be ambiguous.
    Where one of the servers is older than 14 it is the first half of an md5, over the record's own
    binary form: it gives the length of each value, and -1 for NULL.
    """
    values = sql.SQL(", ").join(form_sql(table, name, alias) for name in columns)
    if table.common_version >= RECORD_HASH_VERSION:
        return sql.SQL("pg_catalog.hash_record_extended(ROW({}), 0)").format(values)
    return sql.SQL(
        "('x' || pg_catalog.substr(pg_catalog.md5(pg_catalog.record_send(ROW({}))), 1, 16))"
        "::pg_catalog.bit(64)::pg_catalog.int8"
    ).format(values)


def key_hash_sql(table: Table) -> sql.Composable:
    """Return a 64-bit hash of a row's key, equal on both servers that are compared; 0 where it is NULL.

    The usual types have one of their own, over the same bytes, for a fraction of the time.
    """
    if len(table.key) == 1 and (column := table.column(table.key[0])) is not None:
        carried = column.cast or (column.base_schema, column.base_type)
        if own := _OWN_HASHES.get(carried):
            value = value_sql(table, column.name)
            return sql.SQL("coalesce(pg_catalog.{}({}, 0), 0)").format(sql.Identifier(own), value)
    return hash_sql(table, table.key)


# Since version 11, and the same on all since.
_OWN_HASHES = {
    ("pg_catalog", "uuid"): "uuid_hash_extended",
    ("pg_catalog", "int4"): "hashint4extended",
    ("pg_catalog", "int8"): "hashint8extended",
}


def check_version(session: Session, *, is_target: bool) -> None:
    """Raise RefusedError where a server is too old for its side of a copy, or of a comparison."""
    if session.version >= (LEAST_TARGET_VERSION if is_target else LEAST_SOURCE_VERSION):
        return
    fact = f"{session.label} is PostgreSQL {session.version // 10000}"
    if is_target:
        raise RefusedError(
            f"{fact}, a target must be {LEAST_TARGET_VERSION // 10000} or newer",
            "upgrade that server, or name a newer one with --to",
        )
    raise RefusedError(
        f"{fact}, a source must be {LEAST_SOURCE_VERSION // 10000} or newer",
        "restore a dump of its database into a newer server (pg_dump -Fc, then pg_restore), and name that with --from",
    )


def bucket_map(
    session: Session, table: Table, columns: Sequence[str], embedding: str, part: Slice | None = None
) -> BucketMap:
    """Read a side's bucket map, or that of a slice: one sequential pass over all content, in one snapshot.

    Maps of slices add up, so that a comparison spreads over workers, and goes on where it was stopped.
    """
    query = sql.SQL(
        "SELECT h & {mask}, pg_catalog.count(*), pg_catalog.count(e), pg_catalog.sum(d) FROM"
        " (SELECT {key} AS h, {row} AS d, {embedding} AS e {rows}) q GROUP BY 1"
    ).format(
        mask=sql.Literal(BUCKETS - 1),
        key=key_hash_sql(table),
        row=hash_sql(table, columns),
        embedding=sql.Identifier(embedding),
        rows=sql.SQL("FROM {}").format(table.scanned) if part is None else slice_sql(table, part),
    )
    return BucketMap(
        buckets={bucket: (rows, filled, int(total)) for bucket, rows, filled, total in session.rows(query)}
    )
