"""Slices cover every page once, whatever the table's size, and every key once, whatever the key."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg2 import sql

from pipeline.postgres.facts import ServerIdentity
from pipeline.postgres.slices import Slice, plan_keys, plan_pages, slice_sql
from pipeline.postgres.tables import Heap, Table


def table(*heaps: tuple[int, int], version: int = 160000) -> Table:
    """Return a table of one heap, or of partitions, given as (pages, bytes)."""
    texts = dict.fromkeys(("role", "quoted", "quoted_schema", "quoted_database", "quoted_role"), "")
    flags = ("inherited", "owned", "row_security", "may_use_schema", "may_delete", "may_create_temporary")
    facts: dict[str, Any] = {**texts, **dict.fromkeys(flags, False)}
    return Table(
        server=ServerIdentity(system_identifier=1, started="", database_oid=1),
        extension=None,
        oid=1 if len(heaps) == 1 else 0,
        schema="public",
        name="embeddings",
        kind="r" if len(heaps) == 1 else "p",
        columns=(),
        key=("id",),
        heaps=tuple(
            Heap(oid=number, file=number, schema="public", name=f"part{number}", pages=pages, bytes=size)
            for number, (pages, size) in enumerate(heaps, 1)
        ),
        encoding="UTF8",
        bytes=sum(size for _, size in heaps),
        rows_estimate=0,
        version=version,
        **facts,
    )


def rendered(query: sql.Composable) -> str:
    """Return a query as text, without the connection that quoting by the driver takes."""
    if isinstance(query, sql.Composed):
        return "".join(map(rendered, query.seq))
    if isinstance(query, sql.Identifier):
        return ".".join(f"<{name}>" for name in query.strings)
    return query.string if isinstance(query, sql.SQL) else repr(getattr(query, "wrapped", None))


@given(
    pages=st.integers(0, 10**6),
    bytes_per_page=st.integers(0, 10**6),
    slice_bytes=st.integers(2**20, 2**30),
    workers=st.integers(1, 16),
)
def test_slices_cover_every_page_exactly_once(pages: int, bytes_per_page: int, slice_bytes: int, workers: int) -> None:
    parts = plan_pages(table((pages, pages * bytes_per_page)), slice_bytes, workers)
    assert [part.ordinal for part in parts] == list(range(len(parts)))
    assert {(part.kind, part.relation) for part in parts} == {("pages", None)}
    check_chain(parts, pages)


def check_chain(parts: tuple[Slice, ...], pages: int) -> None:
    # Open at both ends, and each begins where the one before it ended.
    assert parts[0].lower is None
    assert parts[-1].upper is None
    for before, after in pairwise(parts):
        assert isinstance(before.upper, int)
        assert before.upper == after.lower
        lower = before.lower if isinstance(before.lower, int) else 0
        assert lower < before.upper < max(1, pages)


def test_slices_are_sized_by_bytes_with_toast_counted() -> None:
    # 100 pages of heap with 90 % of the bytes in TOAST: ten pages weigh 1 MB.
    parts = plan_pages(table((100, 10_000_000)), 1_000_000)
    assert len(parts) == 10
    assert parts[3].lower == 30


def test_page_heavier_than_a_slice_is_a_slice_of_its_own() -> None:
    assert len(plan_pages(table((5, 5 * 10**9)), 2**20)) == 5


def test_empty_table_is_one_open_slice() -> None:
    empty = table((0, 0))
    (only,) = plan_pages(empty, 2**20)
    assert (only.lower, only.upper, only.done) == (None, None, False)
    assert rendered(slice_sql(empty, only)) == "FROM ONLY <public>.<embeddings> AS <r> WHERE true"


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 10**9)), min_size=2, max_size=5))
def test_every_partition_is_covered_by_slices_of_its_own(heaps: list[tuple[int, int]]) -> None:
    parts = plan_pages(table(*heaps), 2**20)
    assert [part.ordinal for part in parts] == list(range(len(parts)))
    for number, (pages, _) in enumerate(heaps, 1):
        check_chain(tuple(part for part in parts if part.relation == ("public", f"part{number}")), pages)


@given(st.lists(st.tuples(st.text(), st.text()), max_size=5))
def test_key_slices_begin_where_the_one_before_ended_and_are_open_at_both_ends(keys: list[tuple[str, ...]]) -> None:
    parts = plan_keys(keys)
    assert [part.upper for part in parts] == [*keys, None]
    assert [part.lower for part in parts] == [None, *keys]
    assert {part.kind for part in parts} == {"keys"}


def test_page_of_a_partition_is_read_from_the_partition_alone() -> None:
    part = Slice(ordinal=0, relation=("Odd", 'par"t'), lower=3, upper=9)
    condition = "ctid >= '(3,0)'::pg_catalog.tid AND ctid < '(9,0)'::pg_catalog.tid"
    assert rendered(slice_sql(table((1, 1), (2, 2)), part)) == f'FROM ONLY <Odd>.<par"t> AS <r> WHERE {condition}'


@given(st.integers(100000, 190000), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=2))
def test_pages_are_read_as_such_where_there_are_heaps_and_a_server_from_14_on(
    version: int, heaps: list[tuple[int, int]]
) -> None:
    assert table(*heaps, version=version).paged == (version >= 140000 and len(heaps) > 0)


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_every_worker_has_as_many_slices(workers: int) -> None:
    parts = plan_pages(table((10_000, 30 * 2**20)), 2**20, workers)
    assert len(parts) >= 30
    assert len(parts) % workers == 0
    bounds = [part.lower for part in parts[1:]]
    sizes = [upper - lower for lower, upper in pairwise(b for b in bounds if isinstance(b, int))]
    assert max(sizes) - min(sizes) <= 1
    assert len(plan_pages(table((10, 1000)), 2**20, workers)) == 1
