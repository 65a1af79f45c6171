"""Rows of another dimension are found by their stored sizes, exactly, wherever and however a vector is stored."""

from collections.abc import Callable

import pytest
from psycopg2 import sql

from pipeline.check.dimensions import check_vector_dimensions, dimensions_sql, other_dimension_sql
from pipeline.postgres.database import Session
from pipeline.postgres.tables import Table, describe
from pipeline.settings import TableMapping
from tests.preflights import endpoint
from tests.support import Database

# Around each limit: a short header, a value inside the row, outside of it, and longer than a page.
DIMENSIONS = (1, 2, 29, 30, 31, 32, 384, 505, 506, 507, 508, 509, 767, 768, 769, 2039, 2040, 2041)
# Each dimension once with little beside it in the row, and once with so much that vectors move out of it.
FILL = """
CREATE TABLE public.embeddings (id int PRIMARY KEY, content text, embedding {kind} {storage}){options};
INSERT INTO public.embeddings
SELECT d * 2 + wide, (SELECT string_agg(md5(d || ' ' || n), '') FROM generate_series(1, wide * 60) n),
       (SELECT array_agg({number}) FROM generate_series(1, d) n)::vector{cast}
FROM unnest(ARRAY[{dimensions}]) d, generate_series(0, 1) wide;
INSERT INTO public.embeddings VALUES (-1, 'no vector', NULL)
"""


def filled(
    database: Database,
    kind: str = "vector",
    storage: str = "",
    options: str = "",
    number: str = "sin(n)",
    dimensions: tuple[int, ...] = DIMENSIONS,
) -> None:
    database.execute(
        FILL.format(
            kind=kind,
            storage=f"STORAGE {storage}" if storage else "",
            options=options,
            number=number,
            cast="" if kind == "vector" else f"::{kind}",
            dimensions=",".join(map(str, dimensions)),
        )
    )


def others(session: Session, table: Table, dimensions: int) -> list[int]:
    query = sql.SQL("SELECT id FROM {} WHERE {} ORDER BY id").format(
        table.scanned, other_dimension_sql(session, table, "embedding", dimensions)
    )
    return [key for (key,) in session.rows(query)]


def check_all(database: Database, there: tuple[int, ...] = DIMENSIONS) -> None:
    with Session(endpoint(database, "legacy"), "test") as session:
        table = describe(session, TableMapping())
        for dimensions in (*there, 3):
            wanted = [d * 2 + wide for d in there for wide in (0, 1) if d != dimensions]
            assert others(session, table, dimensions) == wanted, dimensions
        (found,) = check_vector_dimensions(session, table, TableMapping(), 768)
    assert "1 dimensions: 2 rows, 2 dimensions: 2 rows" in found.fact


@pytest.mark.parametrize("storage", ["", "PLAIN", "EXTENDED", "MAIN", "EXTERNAL"])
@pytest.mark.parametrize("kind", ["vector", "halfvec"])
def test_every_row_of_another_dimension_and_no_other(kind: str, storage: str, legacy: Database) -> None:
    # A row that keeps everything has to fit into a page.
    there = tuple(d for d in DIMENSIONS if storage != "PLAIN" or d < 2000)
    filled(legacy, kind, storage, dimensions=there)
    check_all(legacy, there)


def test_vectors_that_compress_are_read(legacy: Database) -> None:
    filled(legacy, storage="EXTENDED", number="1")
    assert legacy.value("SELECT count(*) FROM public.embeddings WHERE pg_column_compression(embedding) IS NOT NULL") > 0
    check_all(legacy)


def test_rows_that_may_hold_more_than_a_quarter_of_a_page(legacy: Database) -> None:
    filled(legacy, options=" WITH (toast_tuple_target = 8000)")
    # Inside the row a vector of 767 has the size that one of 768 has outside of it.
    assert legacy.value("SELECT pg_column_size(embedding) FROM public.embeddings WHERE id = 767 * 2") == 3076
    check_all(legacy)


def test_sparse_vectors_and_old_servers(new_database: Callable[..., Database], legacy: Database) -> None:
    filled(legacy, "sparsevec", number="n % 2")
    check_all(legacy)
    old = new_database("16.2")
    old.execute("CREATE EXTENSION vector")
    filled(old)
    check_all(old)


def test_partitions_are_each_asked_for_their_storage(legacy: Database) -> None:
    filled(legacy)
    legacy.execute(
        "ALTER TABLE public.embeddings RENAME TO first;"
        "CREATE TABLE public.embeddings (id int, content text, embedding vector) PARTITION BY HASH (id);"
        "CREATE TABLE public.one PARTITION OF public.embeddings FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
        "CREATE TABLE public.two PARTITION OF public.embeddings FOR VALUES WITH (MODULUS 2, REMAINDER 1)"
        " WITH (toast_tuple_target = 8000);"
        "INSERT INTO public.embeddings SELECT * FROM public.first"
    )
    check_all(legacy)
    legacy.execute("DROP TABLE public.embeddings; CREATE VIEW public.embeddings AS SELECT * FROM public.first")
    check_all(legacy)


def test_no_vector_of_the_right_dimension_is_read(legacy: Database) -> None:
    legacy.execute(
        "CREATE TABLE public.embeddings (id int PRIMARY KEY, embedding vector);"
        "INSERT INTO public.embeddings SELECT i, (SELECT array_agg(sin(i * n)) FROM generate_series(1, 768) n)::vector"
        " FROM generate_series(1, 400) i"
    )
    legacy.execute("UPDATE public.embeddings SET embedding = '[1,2]' WHERE id = 7")

    def toast_reads(session: Session, query: sql.Composable) -> int:
        """Return how many pages of TOAST a query looks at."""
        with session.transaction(read_only=True) as cursor:
            counts = []
            for statement in ("SELECT 1", query):
                cursor.execute(statement)
                cursor.execute(
                    "SELECT pg_stat_get_xact_tuples_fetched(reltoastrelid) + pg_stat_get_xact_blocks_fetched("
                    "reltoastrelid) FROM pg_catalog.pg_class WHERE oid = 'public.embeddings'::pg_catalog.regclass"
                )
                counts.append(cursor.fetchall()[0][0])
        return int(counts[1] - counts[0])

    with Session(endpoint(legacy, "legacy"), "test") as session:
        table = describe(session, TableMapping())
        assert others(session, table, 768) == [7]
        by_size = sql.SQL("SELECT count(*) FROM {} WHERE {}").format(
            table.scanned, other_dimension_sql(session, table, "embedding", 768)
        )
        by_value = sql.SQL("SELECT count(*) FROM {} WHERE {} <> 768").format(
            table.scanned, dimensions_sql(table, "embedding")
        )
        assert toast_reads(session, by_size) == 0
        assert toast_reads(session, by_value) > 300


def test_typed_column_is_not_scanned(legacy: Database) -> None:
    legacy.execute("CREATE TABLE public.embeddings (id int PRIMARY KEY, embedding vector(3))")
    with Session(endpoint(legacy, "legacy"), "test") as session:
        table = describe(session, TableMapping())
        with legacy.cursor() as cursor:
            cursor.execute("LOCK TABLE public.embeddings IN ACCESS EXCLUSIVE MODE")
            assert check_vector_dimensions(session, table, TableMapping(), 4) == ()
