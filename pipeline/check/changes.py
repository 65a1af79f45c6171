"""What changed since a horizon: keys by one scan of the heap, and key sums that show deletes."""

from collections.abc import Iterator
from dataclasses import dataclass

from psycopg2 import sql

from pipeline.check.digests import BUCKETS, BucketMap, key_hash_sql
from pipeline.errors import StatementError
from pipeline.postgres.database import Session
from pipeline.postgres.facts import gather, horizon_sql
from pipeline.postgres.tables import HEAPS_SQL, Table, heap_files
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
    ((now,),) = session.rows(_now_sql(session.version))
    _check_age(session, now, horizon)
    yield from session.stream(query)


def _now_sql(version: int) -> str:
    return (
        "SELECT pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::pg_catalog.text::pg_catalog.int8"
        if version >= 130000
        else "SELECT pg_catalog.txid_snapshot_xmax(pg_catalog.txid_current_snapshot())"
    )


def _check_age(session: Session, now: int, horizon: int) -> None:
    if not 0 <= now - horizon < MAX_AGE:
        raise StatementError(
            f"{session.label} is at transaction {now}, the last pass was at {horizon}: they cannot be compared",
            "the server was restored or replaced, or two billion transactions have passed; run pipeline verify",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A source at one moment: its horizon, its heaps' files, its rows, and how many ``changed_keys`` would yield."""

    horizon: int
    files: tuple[int, ...]
    rows: int
    changed: int


def look(session: Session, table: Table, horizon: int) -> Look:
    """Look at a source by one scan of its heap, in one snapshot. Raises StatementError as ``changed_keys``."""
    count = sql.SQL(
        "SELECT pg_catalog.count(*),"
        " pg_catalog.count(*) FILTER (WHERE pg_catalog.age(xmin) <= pg_catalog.age({}::pg_catalog.xid)) FROM {}"
    ).format(sql.Literal(str(horizon % 2**32)), table.scanned)
    queries = (horizon_sql(session.version), _now_sql(session.version), HEAPS_SQL, count)
    with session.transaction(read_only=True, single=True) as cursor:
        names = {"schema": table.schema, "name": table.name}
        ((here,),), ((now,),), heaps, ((rows, changed),) = gather(cursor, queries, names)
    _check_age(session, now, horizon)
    return Look(horizon=here, files=heap_files(heaps), rows=rows, changed=changed)


def key_sums(session: Session, table: Table) -> BucketMap:
    """Return a map of the keys alone, by one scan of the heap: count and sum of the key hashes per bucket."""
    query = sql.SQL(
        "SELECT h & {mask}, pg_catalog.count(*), pg_catalog.sum(h) FROM (SELECT {hash} AS h FROM {table}) q GROUP BY 1"
    ).format(mask=sql.Literal(BUCKETS - 1), hash=key_hash_sql(table), table=table.scanned)
    return BucketMap(buckets={bucket: (rows, 0, int(total)) for bucket, rows, total in session.rows(query)})
