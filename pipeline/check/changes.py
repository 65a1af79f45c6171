"""What changed since a horizon: keys by one scan of the heap, and key sums that show deletes."""

from collections.abc import Iterator

from psycopg2 import sql

from pipeline.check.digests import BUCKETS, BucketMap, hash_sql
from pipeline.errors import StatementError
from pipeline.postgres.database import Cursor, Session
from pipeline.postgres.tables import Table
from pipeline.postgres.values import Key, key_texts_sql

# age() is a signed 32-bit distance: beyond this many transactions it would count backwards.
MAX_AGE = 2**31 - 10_000_000


def changed_keys(session: Session, table: Table, horizon: int) -> Iterator[list[Key]]:
    """Yield, in batches, the keys of row versions that a pass with this horizon cannot have seen.

    The heap is scanned, TOAST is not touched. Inserts and updates of transactions that were open at
    the horizon are included; a frozen row of wrapped age only makes the answer larger. Raises
    StatementError where the horizon is too old to be compared with.
    """
    query = sql.SQL("SELECT {} FROM {} WHERE pg_catalog.age(xmin) <= pg_catalog.age({}::pg_catalog.xid)").format(
        key_texts_sql(table), table.scanned, sql.Literal(str(horizon % 2**32))
    )
    with session.transaction(read_only=True) as cursor:
        _check_age(session, cursor, horizon)
    yield from session.stream(query)


def _check_age(session: Session, cursor: Cursor, horizon: int) -> None:
    modern = "pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::pg_catalog.text::pg_catalog.int8"
    old = "pg_catalog.txid_snapshot_xmax(pg_catalog.txid_current_snapshot())"
    cursor.execute(sql.SQL("SELECT ") + sql.SQL(modern if session.version >= 130000 else old))
    ((now,),) = cursor.fetchall()
    if not 0 <= now - horizon < MAX_AGE:
        raise StatementError(
            f"{session.label} is at transaction {now}, the last pass was at {horizon}: they cannot be compared",
            "the server was restored or replaced, or two billion transactions have passed; run pipeline verify",
        )


def count_rows_and_changes(session: Session, cursor: Cursor, table: Table, horizon: int) -> tuple[int, int]:
    """Return the number of rows, and how many of them ``changed_keys`` would yield; by the same one scan."""
    query = sql.SQL(
        "SELECT pg_catalog.count(*),"
        " pg_catalog.count(*) FILTER (WHERE pg_catalog.age(xmin) <= pg_catalog.age({}::pg_catalog.xid)) FROM {}"
    ).format(sql.Literal(str(horizon % 2**32)), table.scanned)
    _check_age(session, cursor, horizon)
    cursor.execute(query)
    ((rows, changed),) = cursor.fetchall()
    return rows, changed


def key_sums(session: Session, table: Table) -> BucketMap:
    """Return a map of the keys alone, by one scan of the heap: count and sum of the key hashes per bucket."""
    query = sql.SQL(
        "SELECT h & {mask}, pg_catalog.count(*), pg_catalog.sum(h) FROM (SELECT {hash} AS h FROM {table}) q GROUP BY 1"
    ).format(mask=sql.Literal(BUCKETS - 1), hash=hash_sql(table, table.key), table=table.scanned)
    return BucketMap(buckets={bucket: (rows, 0, int(total)) for bucket, rows, total in session.rows(query)})
