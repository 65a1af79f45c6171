"""What changed since a horizon: keys by one scan of the heap, and key sums that show deletes."""

from collections.abc import Iterator
from dataclasses import dataclass

from psycopg2 import sql

from pipeline.check.digests import BUCKETS, hash_sql, key_texts_sql
from pipeline.errors import StatementError
from pipeline.postgres.database import Session
from pipeline.postgres.tables import Table

Key = tuple[str, ...]
# age() is a signed 32-bit distance: beyond this many transactions it would count backwards.
MAX_AGE = 2**31 - 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySums:
    """Per bucket of key hashes: the number of rows, and the sum of the hashes."""

    buckets: dict[int, tuple[int, int]]

    @property
    def rows(self) -> int:
        """Return the number of rows in all buckets."""
        return sum(count for count, _ in self.buckets.values())

    def differing(self, other: "KeySums") -> list[int]:
        """Return the buckets in which the two sides hold different keys."""
        return sorted(
            bucket
            for bucket in self.buckets.keys() | other.buckets.keys()
            if self.buckets.get(bucket) != other.buckets.get(bucket)
        )


def changed_keys(session: Session, table: Table, horizon: int) -> Iterator[list[Key]]:
    """Yield, in batches, the keys of row versions that a pass with this horizon cannot have seen.

    The heap is scanned, TOAST is not touched. Inserts and updates of transactions that were open at
    the horizon are included; a frozen row of wrapped age only makes the answer larger. Raises
    StatementError where the horizon is too old to be compared with.
    """
    query = sql.SQL("SELECT {} FROM ONLY {} WHERE pg_catalog.age(xmin) <= pg_catalog.age({}::pg_catalog.xid)").format(
        key_texts_sql(table), table.identifier, sql.Literal(str(horizon % 2**32))
    )
    _check_age(session, horizon)
    yield from session.stream(query)


def _check_age(session: Session, horizon: int) -> None:
    modern = "pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::pg_catalog.text::pg_catalog.int8"
    old = "pg_catalog.txid_snapshot_xmax(pg_catalog.txid_current_snapshot())"
    ((now,),) = session.rows(sql.SQL("SELECT ") + sql.SQL(modern if session.version >= 130000 else old))
    if not 0 <= now - horizon < MAX_AGE:
        raise StatementError(
            f"{session.label} is at transaction {now}, the last pass was at {horizon}: they cannot be compared",
            "the server was restored or replaced, or two billion transactions have passed; run pipeline verify",
        )


def key_sums(session: Session, table: Table) -> KeySums:
    """Return the key sums of a table by one scan of its heap (or of its key's index)."""
    query = sql.SQL(
        "SELECT h & {mask}, pg_catalog.count(*), pg_catalog.sum(h) FROM (SELECT {hash} AS h FROM ONLY {table}) q"
        " GROUP BY 1"
    ).format(mask=sql.Literal(BUCKETS - 1), hash=hash_sql(table, table.key), table=table.identifier)
    return KeySums(buckets={bucket: (count, int(total)) for bucket, count, total in session.rows(query)})


def keys_in_buckets(session: Session, table: Table, buckets: list[int]) -> set[Key]:
    """Return the keys whose hashes fall into the given buckets."""
    query = sql.SQL("SELECT {} FROM ONLY {} WHERE ({} & {}) = ANY (%s)").format(
        key_texts_sql(table), table.identifier, hash_sql(table, table.key), sql.Literal(BUCKETS - 1)
    )
    return {tuple(row) for row in session.rows(query, (buckets,))}
