"""The rows that differ: inside buckets, merged in key order, or looked up by their keys."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Literal

from psycopg2 import sql

from pipeline.check.digests import BUCKETS, hash_sql, key_hash_sql
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Session
from pipeline.postgres.tables import Table
from pipeline.postgres.values import Key, form_sql, key_texts_sql, rows_of_keys_sql

DifferenceKind = Literal["missing", "extra", "different", "doubled"]
KINDS: tuple[DifferenceKind, ...] = ("missing", "extra", "different", "doubled")
# Keys that are looked up at once.
BATCH_KEYS = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A key that is missing on the target, extra there, or whose rows differ; or that one side has twice.

    ``key`` are its values as texts, ``columns`` those in which two rows differ. ``place`` is where the row
    lies, 0 to 1 of its table's pages (the source's, of an extra one the target's); None: not known.
    """

    kind: DifferenceKind
    key: Key
    columns: tuple[str, ...] = ()
    place: float | None = None

    @property
    def text(self) -> str:
        """Return the key as one text, for people."""
        return ", ".join(self.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A row by its binary key: the key's texts, a hash of every column, the page, and how often the key is there."""

    binary: bytes
    key: Key
    hashes: tuple[int, ...]
    page: int | None
    times: int = 1


def open_buckets(
    source: tuple[Session, Table], target: tuple[Session, Table], columns: Sequence[str], buckets: Sequence[int]
) -> Iterator[Difference]:
    """Yield every difference inside the given buckets, in key order, in bounded memory.

    With no ``columns`` only keys are compared, and no other value is read. Both sides sort by the keys'
    binary forms, which no collation touches, and are merged.
    """
    left = _rows_in_buckets(*source, columns, buckets)
    right = _rows_in_buckets(*target, columns, buckets)
    # The scan is in the first fetch: on both sides at the same time.
    with ThreadPoolExecutor(2) as both:
        mine, theirs = both.map(next, (left, right), (None, None))
    while mine is not None or theirs is not None:
        if theirs is None or (mine is not None and mine.binary < theirs.binary):
            assert mine is not None
            here, there, mine = mine, None, next(left, None)
        elif mine is None or theirs.binary < mine.binary:
            here, there, theirs = None, theirs, next(right, None)
        else:
            here, there = mine, theirs
            mine, theirs = next(left, None), next(right, None)
        if (found := _difference(here, there, columns, (source[1], target[1]))) is not None:
            yield found


def _difference(
    here: _Row | None, there: _Row | None, columns: Sequence[str], tables: tuple[Table, Table]
) -> Difference | None:
    row, table = (here, tables[0]) if here is not None else (there, tables[1])
    assert row is not None
    kind: DifferenceKind
    differing: tuple[str, ...] = ()
    if max(one.times for one in (here, there) if one is not None) > 1:
        kind = "doubled"
    elif here is None or there is None:
        kind = "missing" if there is None else "extra"
    elif here.hashes != there.hashes:
        kind = "different"
        pairs = zip(columns, here.hashes, there.hashes, strict=True)
        differing = tuple(name for name, mine, theirs in pairs if mine != theirs)
    else:
        return None
    # Of several heaps, the page alone says little.
    only = table.heaps[0] if len(table.heaps) == 1 else None
    place = None if row.page is None or only is None else min(1.0, row.page / max(1, only.pages))
    return Difference(kind=kind, key=row.key, columns=differing, place=place)


def _rows_in_buckets(session: Session, table: Table, columns: Sequence[str], buckets: Sequence[int]) -> Iterator[_Row]:
    """Stream the rows in some buckets, in the order of the binary key; a key that is there twice comes once."""
    # Of the hash's own type: only then are the buckets looked up, and not tried one after the other.
    query = _rows_sql(table, columns, "r", table.scanned) + sql.SQL(
        " WHERE ({hash} & {mask}) = ANY ({buckets}::pg_catalog.int8[]) ORDER BY 1"
    ).format(
        hash=key_hash_sql(table),
        mask=sql.Literal(BUCKETS - 1),
        buckets=sql.Literal(list(buckets)),
    )
    rows = (_row(row, len(table.key)) for batch in session.stream(query) for row in batch)
    for _, same in groupby(rows, key=lambda row: row.binary):
        yield _counted(list(same))


def _counted(rows: Sequence[_Row]) -> _Row:
    first = rows[0]
    if len(rows) == 1:
        return first
    return _Row(binary=first.binary, key=first.key, hashes=first.hashes, page=first.page, times=len(rows))


def _rows_sql(table: Table, columns: Sequence[str], alias: str, place: sql.Composable) -> sql.Composable:
    """Return SELECT of rows as ``_row`` takes them: binary key, page, the key's texts, a hash of every column."""
    binary = sql.SQL(" || ").join(
        sql.SQL("pg_catalog.int4send(pg_catalog.length({send})) || {send}").format(send=form_sql(table, name, alias))
        for name in table.key
    )
    page = (
        sql.SQL("({}.ctid::pg_catalog.text::pg_catalog.point)[0]::pg_catalog.int8").format(sql.Identifier(alias))
        if table.heaps
        else sql.SQL("NULL::pg_catalog.int8")
    )
    wanted = [binary, page, key_texts_sql(table, alias), *(hash_sql(table, [name], alias) for name in columns)]
    return sql.SQL("SELECT {} FROM {}").format(sql.SQL(", ").join(wanted), place)


def _row(found: Sequence[Any], key_columns: int) -> _Row:
    binary, page, *rest = found
    return _Row(binary=bytes(binary), key=tuple(rest[:key_columns]), hashes=tuple(rest[key_columns:]), page=page)


def differences_of(
    crew: Crew,
    source: tuple[Session, Table],
    target: tuple[Session, Table],
    columns: Sequence[str],
    keys: Sequence[Key],
) -> list[Difference]:
    """Return which rows of these keys differ, as both sides have them now; keys that neither has do not."""
    here, there = crew.beside(partial(rows_of, *source, columns, keys), partial(rows_of, *target, columns, keys))
    tables = source[1], target[1]
    pairs = ((here.get(key), there.get(key)) for key in dict.fromkeys(keys))
    found = (_difference(*pair, columns, tables) for pair in pairs if pair != (None, None))
    return [one for one in found if one is not None]


def rows_of(session: Session, table: Table, columns: Sequence[str], keys: Sequence[Key]) -> Mapping[Key, _Row]:
    """Return the rows of these keys, looked up by the key."""
    rows: dict[Key, list[_Row]] = {}
    for found in session.rows(_rows_sql(table, columns, "t", rows_of_keys_sql(table, keys))):
        row = _row(found, len(table.key))
        rows.setdefault(row.key, []).append(row)
    return {key: _counted(same) for key, same in rows.items()}
