"""Where rows lie: a table cut into page ranges, sized by bytes with TOAST counted, or into ranges of its key."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from psycopg2 import sql

from pipeline.postgres.tables import Heap, Table

# A page, or the key's values as texts; None: open.
Bound = int | tuple[str, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A part of a table's rows, the unit of bulk copy: of kind ``pages`` or ``keys``.

    Pages: ``lower <= page < upper`` of the table, or of ``relation`` (schema and name), one of its
    partitions. Keys: ``lower < key <= upper``, compared as the source compares them. None is open, so
    the slices of a table leave nothing out. ``rows`` and ``bytes`` are None until the slice is done, then the
    rows that it brought to the target, and their bytes on the wire.
    """

    ordinal: int
    kind: Literal["pages", "keys"] = "pages"
    relation: tuple[str, str] | None = None
    lower: Bound = None
    upper: Bound = None
    rows: int | None = None
    bytes: int | None = None

    @property
    def done(self) -> bool:
        """Return whether the slice's rows are committed on the target."""
        return self.rows is not None


def plan_pages(table: Table, slice_bytes: int, workers: int = 1) -> tuple[Slice, ...]:
    """Cut every heap of a table into page ranges of about ``slice_bytes`` each; at least one of each.

    A heap of more than one slice is cut into as many for each worker, so that none is left to one at the end.
    The first and the last are open-ended: a row that comes to lie beyond yesterday's last page is in
    the last slice. Most of an embeddings table is TOAST, so a heap's bytes count it, and a page weighs
    ``bytes / pages``.
    """
    ranges = (
        (None if heap.oid == table.oid else (heap.schema, heap.name), lower, upper)
        for heap in table.heaps
        for lower, upper in _page_ranges(heap, slice_bytes, workers)
    )
    return tuple(
        Slice(ordinal=ordinal, relation=relation, lower=lower, upper=upper)
        for ordinal, (relation, lower, upper) in enumerate(ranges)
    )


def _page_ranges(heap: Heap, slice_bytes: int, workers: int) -> Iterable[tuple[int | None, int | None]]:
    bytes_per_page = max(1, heap.bytes // max(1, heap.pages))
    pages_per_slice = max(1, slice_bytes // bytes_per_page)
    if heap.pages > pages_per_slice:
        rounds = math.ceil(heap.pages / (pages_per_slice * workers))
        pages_per_slice = math.ceil(heap.pages / (rounds * workers))
    return itertools.pairwise([None, *range(pages_per_slice, heap.pages, pages_per_slice), None])


def plan_keys(boundaries: Sequence[tuple[str, ...]]) -> tuple[Slice, ...]:
    """Return the slices between boundaries that were drawn from the keys in their order."""
    return tuple(
        Slice(ordinal=ordinal, kind="keys", lower=lower, upper=upper)
        for ordinal, (lower, upper) in enumerate(itertools.pairwise([None, *boundaries, None]))
    )


def slice_sql(table: Table, part: Slice) -> sql.Composable:
    """Return what follows SELECT's list: FROM and the condition of the slice's rows.

    A page range is a TID range scan from version 14 on.
    """
    bounds = [
        _bound_sql(table, operator, bound)
        for operator, bound in (
            ((">=", part.lower), ("<", part.upper)) if part.kind == "pages" else ((">", part.lower), ("<=", part.upper))
        )
        if bound is not None
    ]
    rows = table.rows_sql("r", part.relation)
    return sql.SQL("FROM {} WHERE {}").format(rows, sql.SQL(" AND ").join(bounds) if bounds else sql.SQL("true"))


def _bound_sql(table: Table, operator: str, bound: int | tuple[str, ...]) -> sql.Composable:
    if isinstance(bound, int):
        return sql.SQL("ctid {} {}::pg_catalog.tid").format(sql.SQL(operator), sql.Literal(f"({bound},0)"))
    values = [
        sql.SQL("{}::{}").format(sql.Literal(text), sql.SQL(column.type))
        for name, text in zip(table.key, bound, strict=True)
        if (column := table.column(name)) is not None
    ]
    # The same operators as in the order that the boundaries were drawn by.
    return sql.SQL("({}) OPERATOR(pg_catalog.{}) ({})").format(
        sql.SQL(", ").join(map(sql.Identifier, table.key)), sql.SQL(operator), sql.SQL(", ").join(values)
    )


def boundaries_sql(table: Table, rows_per_slice: int) -> sql.Composable:
    """Return the query of every ``rows_per_slice``-th key in key order, as texts.

    The order is the source's own, whatever its collation: nothing else ever compares by it.
    """
    keys = [sql.Identifier(name) for name in table.key]
    order = sql.SQL(", ").join(sql.SQL("{} USING OPERATOR(pg_catalog.<)").format(key) for key in keys)
    texts = sql.SQL(", ").join(
        sql.SQL("{}::pg_catalog.text AS {}").format(key, sql.Identifier(f"text_{place}"))
        for place, key in enumerate(keys)
    )
    return sql.SQL(
        "SELECT {names} FROM (SELECT {texts}, pg_catalog.row_number() OVER (ORDER BY {order}) AS place FROM {table}) q"
        " WHERE place % {step} = 0 ORDER BY place"
    ).format(
        names=sql.SQL(", ").join(sql.Identifier(f"text_{place}") for place in range(len(keys))),
        texts=texts,
        order=order,
        table=table.scanned,
        step=sql.Literal(rows_per_slice),
    )
