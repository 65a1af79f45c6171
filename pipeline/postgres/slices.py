"""Where rows lie: a table cut into page ranges, sized by bytes with TOAST counted."""

import itertools
from dataclasses import dataclass

from psycopg2 import sql

from pipeline.postgres.tables import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A range of pages ``lower <= page < upper`` (None: open). The unit of bulk copy.

    ``rows`` is None until the slice is done, then the rows that it brought to the target.
    """

    ordinal: int
    lower: int | None
    upper: int | None
    rows: int | None = None

    @property
    def done(self) -> bool:
        """Return whether the slice's rows are committed on the target."""
        return self.rows is not None


def plan(table: Table, slice_bytes: int) -> tuple[Slice, ...]:
    """Cut the table into page ranges of about ``slice_bytes`` each; at least one.

    The first and the last are open-ended: a row that comes to lie beyond yesterday's last page is in
    the last slice. Most of an embeddings table is TOAST, so a page weighs ``table bytes / pages``.
    """
    bytes_per_page = max(1, table.bytes // max(1, table.pages))
    pages_per_slice = max(1, slice_bytes // bytes_per_page)
    bounds = range(pages_per_slice, table.pages, pages_per_slice)
    edges = [None, *bounds, None]
    return tuple(
        Slice(ordinal=ordinal, lower=lower, upper=upper)
        for ordinal, (lower, upper) in enumerate(itertools.pairwise(edges))
    )


def condition_sql(part: Slice) -> sql.Composable:
    """Return the condition that selects the slice's rows (a TID range scan from version 14 on)."""
    bounds = [
        sql.SQL("ctid {} {}::pg_catalog.tid").format(sql.SQL(operator), sql.Literal(f"({page},0)"))
        for operator, page in ((">=", part.lower), ("<", part.upper))
        if page is not None
    ]
    return sql.SQL(" AND ").join(bounds) if bounds else sql.SQL("true")
