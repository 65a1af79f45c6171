"""Slices cover every page once, whatever the table's size."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from psycopg2 import sql

from pipeline.postgres.slices import condition_sql, plan


@given(pages=st.integers(0, 10**6), bytes_per_page=st.integers(0, 10**6), slice_bytes=st.integers(2**20, 2**30))
def test_slices_cover_every_page_exactly_once(pages: int, bytes_per_page: int, slice_bytes: int) -> None:
    parts = plan(pages, pages * bytes_per_page, slice_bytes)
    assert [part.ordinal for part in parts] == list(range(len(parts)))
    # Open at both ends, and each begins where the one before it ended.
    assert parts[0].lower is None
    assert parts[-1].upper is None
    for before, after in pairwise(parts):
        assert before.upper is not None
        assert before.upper == after.lower
        assert (before.lower or 0) < before.upper < max(1, pages)


def test_slices_are_sized_by_bytes_with_toast_counted() -> None:
    # 100 pages of heap with 90 % of the bytes in TOAST: ten pages weigh 1 MB.
    parts = plan(100, 10_000_000, 1_000_000)
    assert len(parts) == 10
    assert parts[3].lower == 30


def test_page_heavier_than_a_slice_is_a_slice_of_its_own() -> None:
    assert len(plan(5, 5 * 10**9, 2**20)) == 5


def test_empty_table_is_one_open_slice() -> None:
    (only,) = plan(0, 0, 2**20)
    assert (only.lower, only.upper, only.done) == (None, None, False)
    assert condition_sql(only) == sql.SQL("true")
