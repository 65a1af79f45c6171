"""The keys that one side alone has, by hashes of keys: what neither side's row versions tell of a row that is gone."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice

from psycopg2 import sql

from pipeline.check.differences import BATCH_KEYS, open_buckets
from pipeline.check.digests import BUCKETS, BucketMap, key_hash_sql
from pipeline.postgres.database import Session
from pipeline.postgres.tables import Table
from pipeline.postgres.values import Key, key_texts_sql

# Hashes are small: so many come at once, and of so many that differ the keys are fetched by one scan.
HASH_ROWS = 20_000
FETCHED_HASHES = 50_000
# Of so many rows a side the keys come with the hashes: some 10 MB, and a scan is saved.
KEYS_WITH_HASHES = 50_000
# The first version that searches a long array by a hash table.
HASHED_ARRAY_VERSION = 140000


def one_sided_keys(
    source: tuple[Session, Table], target: tuple[Session, Table], sums: tuple[BucketMap, BucketMap]
) -> Iterator[list[Key]]:
    """Yield, in batches, the keys that one side alone has, or has more than once, by sums of the keys of both sides.

    In the buckets that differ the hashes of all keys are compared, in bounded memory. Where these are few,
    the keys come with them; else only those are fetched whose hashes differ, by one more scan.
    """
    if not (buckets := sums[0].differing(sums[1])):
        return
    if min(source[1].version, target[1].version) < HASHED_ARRAY_VERSION:
        # There a list of hashes is searched from its beginning, for every row.
        found = open_buckets(source, target, (), buckets)
        while batch := [one.key for one in islice(found, BATCH_KEYS)]:
            yield batch
    elif max(one.rows_in(buckets) for one in sums) <= KEYS_WITH_HASHES:
        yield from _one_sided_of_few(source, target, buckets)
    else:
        yield from _one_sided_of_many(source, target, buckets)


def _one_sided_of_few(
    source: tuple[Session, Table], target: tuple[Session, Table], buckets: Sequence[int]
) -> Iterator[list[Key]]:
    with ThreadPoolExecutor(2) as both:
        sides = tuple(
            both.map(lambda side: side[0].rows(_in_buckets_sql(side[1], buckets, keys=True)), (source, target))
        )
    wanted = _one_sided(*([hashed for hashed, *_ in rows] for rows in sides))
    for rows, hashes in zip(sides, map(set, wanted), strict=True):
        if keys := [tuple(key) for hashed, *key in rows if hashed in hashes]:
            yield keys


def _one_sided_of_many(
    source: tuple[Session, Table], target: tuple[Session, Table], buckets: Sequence[int]
) -> Iterator[list[Key]]:
    wanted: tuple[list[int], list[int]] = ([], [])
    for here, there in _hashes_by_bucket(source, target, buckets):
        for all_of_side, of_bucket in zip(wanted, _one_sided(here, there), strict=True):
            all_of_side.extend(of_bucket)
        if sum(map(len, wanted)) >= FETCHED_HASHES:
            yield from _keys_of_hashes(source, target, wanted)
            wanted = ([], [])
    yield from _keys_of_hashes(source, target, wanted)


def _one_sided(here: Sequence[int], there: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return, of each side, the hashes that the other has not, and those that it has more than once."""
    mine, theirs = set(here), set(there)
    found = list(mine - theirs), list(theirs - mine)
    for one_sided, hashes, all_of_them in zip(found, (mine, theirs), (here, there), strict=True):
        if len(hashes) < len(all_of_them):
            one_sided.extend(one for one, times in Counter(all_of_them).items() if times > 1)
    return found


def _hashes_by_bucket(
    source: tuple[Session, Table], target: tuple[Session, Table], buckets: Sequence[int]
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the hashes of the keys of both sides, bucket by bucket."""
    streams = [_hashes(*side, buckets) for side in (source, target)]
    with ThreadPoolExecutor(2) as both:
        heads = list(both.map(next, streams, (None, None)))
    for bucket in sorted(buckets):
        found: tuple[list[int], list[int]] = ([], [])
        for side, stream in enumerate(streams):
            head = heads[side]
            if head is not None and head[0] == bucket:
                found[side].extend(head[1])
                heads[side] = next(stream, None)
        yield found


def _hashes(session: Session, table: Table, buckets: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    query = _in_buckets_sql(table, buckets) + sql.SQL(" ORDER BY h & {}").format(sql.Literal(BUCKETS - 1))
    hashes = (found for batch in session.stream(query, batch_rows=HASH_ROWS) for (found,) in batch)
    for bucket, same in groupby(hashes, key=(BUCKETS - 1).__and__):
        yield bucket, list(same)


def _in_buckets_sql(table: Table, buckets: Sequence[int], *, keys: bool = False) -> sql.Composable:
    """Return SELECT of the hashes of all keys in some buckets, and of the keys."""
    # Names of our own for all: a key's column may be called h as well.
    names = [sql.SQL("h"), *(sql.Identifier(f"key {n}") for n in range(len(table.key) if keys else 0))]
    # Once, in a subquery: it is selected and asked for. The buckets are of its type, or each would be tried in turn.
    return sql.SQL(
        "SELECT {names} FROM (SELECT {columns} FROM {table}) q ({names})"
        " WHERE (h & {mask}) = ANY ({buckets}::pg_catalog.int8[])"
    ).format(
        columns=sql.SQL(", ").join([key_hash_sql(table), *([key_texts_sql(table)] if keys else [])]),
        table=table.scanned,
        names=sql.SQL(", ").join(names),
        mask=sql.Literal(BUCKETS - 1),
        buckets=sql.Literal(list(buckets)),
    )


def _keys_of_hashes(
    source: tuple[Session, Table], target: tuple[Session, Table], wanted: tuple[list[int], list[int]]
) -> Iterator[list[Key]]:
    for (session, table), hashes in zip((source, target), wanted, strict=True):
        if hashes:
            query = sql.SQL("SELECT {} FROM {} WHERE {} = ANY ({}::pg_catalog.int8[])").format(
                key_texts_sql(table), table.scanned, key_hash_sql(table), sql.Literal(hashes)
            )
            for batch in session.stream(query):
                yield [tuple(key) for key in batch]
