"""Where rows lie: a table cut into page ranges, sized by bytes with TOAST counted."""

import itertools
from dataclasses import dataclass

from psycopg2 import sql


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


def plan(pages: int, table_bytes: int, slice_bytes: int) -> tuple[Slice, ...]:
    """Cut ``pages`` pages of a table into ranges of about ``slice_bytes`` each; at least one.

    The first and the last are open-ended: a row that comes to lie beyond yesterday's last page is in
    the last slice. Most of an embeddings table is TOAST, so ``table_bytes`` counts it, and a page
    weighs ``table_bytes / pages``.
    """
    bytes_per_page = max(1, table_bytes // max(1, pages))
    pages_per_slice = max(1, slice_bytes // bytes_per_page)
    bounds = range(pages_per_slice, pages, pages_per_slice)
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
