"""The demo's legacy table: what is filled in reads back as it was made."""

import json
from collections.abc import Callable
from contextlib import closing
from itertools import islice

import psycopg2.extensions
import pytest
from psycopg2 import sql

from pipeline.demo.corpus import Passage, corpus, spread
from pipeline.demo.fill import BLOCK_ROWS, fill_legacy
from pipeline.demo.hashing import EmbedderError, HashingEmbedder
from pipeline.errors import RefusedError
from pipeline.settings import TableMapping
from tests.support import Database

PLAIN = TableMapping()
ODD = TableMapping(
    schema='Ge"heim', table='My "Docs"', id="doc.id", content="pageContent", metadata="select", embedding="vec%s{}"
)


@pytest.fixture(scope="module")
def passages() -> list[Passage]:
    return corpus()


@pytest.fixture(scope="module")
def embedder(passages: list[Passage]) -> HashingEmbedder:
    return HashingEmbedder().fit(passage.text for passage in passages)


def test_fill_brings_300_passages_bit_by_bit(
    legacy: Database,
    connected: psycopg2.extensions.connection,
    passages: list[Passage],
    embedder: HashingEmbedder,
) -> None:
    done = list(fill_legacy(connected, PLAIN, rows=300, passages=passages, embedder=embedder))
    assert done == [300]
    chosen = spread(passages, 300)
    rows = {
        identifier: rest
        for identifier, *rest in legacy.rows(
            "SELECT id::text, content, metadata::text, public.vector_send(embedding) FROM public.embeddings"
        )
    }
    assert len(rows) == 300
    vectors = embedder.embed([passage.text for passage in chosen])
    for passage, vector in zip(chosen, vectors, strict=True):
        content, metadata, sent = rows[str(passage.id)]
        assert content == passage.text
        assert json.loads(metadata) == passage.metadata
        assert bytes(sent) == b"\x03\x00\x00\x00" + vector.astype(">f4").tobytes()


def test_fill_beyond_the_corpus_repeats_it_a_little_aside(
    legacy: Database, connected: psycopg2.extensions.connection, passages: list[Passage], embedder: HashingEmbedder
) -> None:
    few = spread(passages, 700)
    rows = 2 * BLOCK_ROWS + 100
    done = list(fill_legacy(connected, PLAIN, rows=rows, passages=few, embedder=embedder))
    assert done == [BLOCK_ROWS, 2 * BLOCK_ROWS, rows]
    counts = legacy.rows(
        "SELECT count(*), count(DISTINCT id), count(DISTINCT content), count(DISTINCT embedding::text),"
        " count(*) FILTER (WHERE metadata ? 'copy') FROM public.embeddings"
    )
    assert counts == [(rows, rows, 700, rows, rows - 700)]
    assert legacy.value("SELECT max((metadata->>'copy')::int) FROM public.embeddings") == (rows - 1) // 700
    low, high = legacy.rows(
        "SELECT min(public.vector_norm(embedding)), max(public.vector_norm(embedding)) FROM public.embeddings"
    )[0]
    assert abs(low - 1) < 1e-6
    assert abs(high - 1) < 1e-6
    nearest, farthest = legacy.rows(
        "SELECT min(a.embedding OPERATOR(public.<=>) b.embedding), max(a.embedding OPERATOR(public.<=>) b.embedding)"
        " FROM public.embeddings a JOIN public.embeddings b USING (content)"
        " WHERE NOT a.metadata ? 'copy' AND b.metadata ? 'copy'"
    )[0]
    assert 0.001 < nearest < farthest < 0.02


def test_fill_is_the_same_every_time(
    legacy: Database, connected: psycopg2.extensions.connection, passages: list[Passage], embedder: HashingEmbedder
) -> None:
    few = passages[:50]
    tables = [TableMapping(table=name) for name in ("first", "second")]
    for table in tables:
        list(fill_legacy(connected, table, rows=170, passages=few, embedder=embedder))
    differing = "(TABLE public.{} EXCEPT TABLE public.{})"
    for one, other in (tables, tables[::-1]):
        query = sql.SQL("SELECT count(*) FROM " + differing + " d").format(
            sql.Identifier(one.table), sql.Identifier(other.table)
        )
        assert legacy.value(query) == 0
    # Version 5, as uuid5 makes them.
    ids = legacy.value("SELECT count(*) FROM public.first WHERE substr(id::text, 15, 1) = '5'")
    assert ids == 170


def test_table_is_the_one_langchain_makes(
    legacy: Database, connected: psycopg2.extensions.connection, passages: list[Passage], embedder: HashingEmbedder
) -> None:
    list(fill_legacy(connected, PLAIN, rows=10, passages=passages, embedder=embedder))
    legacy.execute(
        'CREATE TABLE reference ("id" uuid NOT NULL DEFAULT gen_random_uuid() PRIMARY KEY, "content" text,'
        ' "metadata" jsonb, "embedding" vector(768))'
    )
    shape = (
        "SELECT attname, format_type(atttypid, atttypmod), attnotnull, attstorage::text, pg_get_expr(adbin, adrelid)"
        " FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum"
        " WHERE attrelid = %s::regclass AND attnum > 0 ORDER BY attnum"
    )
    assert legacy.rows(shape, "public.embeddings") == legacy.rows(shape, "public.reference")
    indexes = "SELECT indisprimary, indkey::text FROM pg_index WHERE indrelid = %s::regclass"
    assert legacy.rows(indexes, "public.embeddings") == legacy.rows(indexes, "public.reference") == [(True, "1")]


def test_fill_takes_any_names_and_an_extension_off_the_search_path(
    new_database: Callable[..., Database], passages: list[Passage]
) -> None:
    database = new_database("18")
    database.execute("CREATE SCHEMA ext; CREATE EXTENSION vector SCHEMA ext")
    database.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(ODD.schema)))
    with closing(database.connect()) as connection:
        assert list(fill_legacy(connection, ODD, 16, 20, passages=passages)) == [20]
    found = database.value(
        sql.SQL("SELECT sum(ext.vector_dims({})) FROM {}").format(
            sql.Identifier(ODD.embedding), sql.Identifier(ODD.schema, ODD.table)
        )
    )
    assert found == 20 * 16


def test_search_in_the_filled_table_finds_what_a_person_expects(
    legacy: Database, connected: psycopg2.extensions.connection, passages: list[Passage], embedder: HashingEmbedder
) -> None:
    assert list(fill_legacy(connected, PLAIN, passages=passages, embedder=embedder))[-1] == len(passages)
    vector = "[" + ",".join(map(str, embedder.embed(["remove whitespace from both ends of a string"])[0])) + "]"
    found = legacy.rows(
        "SELECT metadata->>'name' FROM public.embeddings"
        " ORDER BY embedding OPERATOR(public.<=>) %s::public.vector, id LIMIT 3",
        vector,
    )
    assert ("str.strip",) in found


def test_fill_that_is_broken_off_leaves_nothing(
    legacy: Database, connected: psycopg2.extensions.connection, passages: list[Passage], embedder: HashingEmbedder
) -> None:
    with closing(fill_legacy(connected, PLAIN, rows=9_000, passages=passages[:100], embedder=embedder)) as filling:
        assert list(islice(filling, 2)) == [BLOCK_ROWS, 2 * BLOCK_ROWS]
    assert legacy.value("SELECT to_regclass('public.embeddings')::text") is None


def test_fill_refuses_a_table_with_rows_and_leaves_it(
    legacy: Database, connected: psycopg2.extensions.connection, passages: list[Passage], embedder: HashingEmbedder
) -> None:
    list(fill_legacy(connected, PLAIN, rows=5, passages=passages, embedder=embedder))
    with pytest.raises(RefusedError) as raised:
        list(fill_legacy(connected, PLAIN, rows=7, passages=passages, embedder=embedder))
    assert "public.embeddings" in raised.value.fact
    assert legacy.value("SELECT count(*) FROM public.embeddings") == 5


def test_fill_checks_its_arguments_before_it_writes(
    legacy: Database, connected: psycopg2.extensions.connection, passages: list[Passage], embedder: HashingEmbedder
) -> None:
    for rows in (0, -1, 1_000_001):
        with pytest.raises(RefusedError):
            list(fill_legacy(connected, PLAIN, rows=rows, passages=passages, embedder=embedder))
    with pytest.raises(EmbedderError):
        list(fill_legacy(connected, PLAIN, 384, 10, passages=passages, embedder=embedder))
    assert legacy.value("SELECT to_regclass('public.embeddings')::text") is None
