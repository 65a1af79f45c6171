"""LangChain's own Python stores on tables that were moved from 16 to 18: they find, add and delete as in their own."""

import asyncio
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pytest
import sqlalchemy as sa
from psycopg2 import sql

from pipeline.demo.hashing import HashingEmbedder
from tests.data import DataSet, content, fill, load
from tests.moves import Move
from tests.support import Database, environment, pipeline

langchain_postgres: Any = importlib.import_module("langchain_postgres")
documents: Any = importlib.import_module("langchain_core.documents")
embeddings: Any = importlib.import_module("langchain_core.embeddings")

DIMENSIONS = 768
TEA = "Tea is made with boiling water."
QUESTION = "how do I make tea"


def embed(texts: list[str]) -> list[list[float]]:
    vectors = HashingEmbedder(DIMENSIONS).embed(texts)
    return [[float(number) for number in vector] for vector in vectors]


def hashed() -> Any:
    """Return the demo's embedder as LangChain wants one."""
    methods = {
        "embed_documents": lambda _, texts: embed(list(texts)),
        "embed_query": lambda _, text: embed([text])[0],
    }
    return type("Hashed", (embeddings.Embeddings,), methods)()


def url(database: Database, driver: str) -> sa.URL:
    return sa.URL.create(
        f"postgresql+{driver}",
        username=database.user,
        password=database.password,
        host=database.server.host,
        port=database.server.port,
        database=database.name,
    )


def nearest(database: Database, table: str, columns: tuple[str, str], vector: str, k: int) -> list[tuple[str, float]]:
    """Return ids and cosine distances of the exact nearest rows, nearest first."""
    identifier, embedding = map(sql.Identifier, columns)
    query = sql.SQL(
        "SELECT {id}::text, {embedding} <=> %s::vector FROM {table} ORDER BY {embedding} <=> %s::vector LIMIT {k}"
    ).format(id=identifier, embedding=embedding, table=sql.Identifier(table), k=sql.Literal(k))
    return [(key, distance) for key, distance in database.rows(query, vector, vector)]


def labelled(data: DataSet) -> tuple[str, str, set[str]]:
    """Return a key of the metadata with a text that not all rows have, and the ids of those that do."""
    key, value = next(
        (key, value)
        for row in data.rows
        for key, value in row["metadata"].items()
        if isinstance(value, str) and len({one["metadata"].get(key) for one in data.rows}) > 1
    )
    return key, value, {row["id"] for row in data.rows if row["metadata"].get(key) == value}


@contextmanager
def pgvectorstore(database: Database) -> Iterator[Any]:
    """Open PGVectorStore on the pipeline's table, by our names of the columns."""
    engine = langchain_postgres.PGEngine.from_connection_string(url(database, "asyncpg"))
    try:
        yield langchain_postgres.PGVectorStore.create_sync(
            engine,
            hashed(),
            table_name="embeddings",
            id_column="id",
            content_column="content",
            embedding_column="embedding",
            metadata_json_column="metadata",
        )
    finally:
        asyncio.run(engine.close())


def test_pgvectorstore_finds_adds_and_deletes_in_the_moved_table(legacy: Database, main: Database) -> None:
    data = load("nomic768")
    fill(legacy, data)
    pipeline("copy", env=environment(legacy=legacy, main=main)).expect(0)
    with pgvectorstore(main) as store:
        for vector in data.vectors[:3]:
            expected = nearest(legacy, "embeddings", ("id", "embedding"), str(vector.tolist()), 4)
            found = store.similarity_search_with_score_by_vector(vector.tolist(), k=4)
            assert [str(document.id) for document, _ in found] == [key for key, _ in expected]
            assert [score for _, score in found] == pytest.approx([distance for _, distance in expected], abs=1e-6)
        # What it gives back is the row as legacy has it.
        by_id = {row["id"]: row for row in data.rows}
        for document, _ in found:
            row = by_id[str(document.id)]
            assert (document.page_content, document.metadata) == (row["content"], row["metadata"])
        key, value, ids = labelled(data)
        filtered = store.similarity_search_by_vector(data.vectors[0].tolist(), k=len(data.rows), filter={key: value})
        assert {str(document.id) for document in filtered} == ids

        added, given = documents.Document(page_content=TEA, metadata={"source": "kitchen", "n": 1}), str(uuid4())
        ours = [*store.add_documents([added]), *store.add_documents([added], ids=[given])]
        assert ours[1] == given
        stored = "SELECT content, metadata, jsonb_typeof(metadata) FROM embeddings WHERE id = ANY(%s::uuid[])"
        assert main.rows(stored, ours) == [(TEA, added.metadata, "object")] * 2
        assert {str(one.id) for one in store.similarity_search(QUESTION, k=2)} == set(ours)
        # An id that is there is written over, not doubled.
        store.add_documents([documents.Document(page_content=QUESTION, metadata={})], ids=[given])
        assert main.rows("SELECT content, metadata FROM embeddings WHERE id = %s", given) == [(QUESTION, {})]
        store.delete(ids=ours)
    assert content(main) == content(legacy)


COLLECTION_SQL = (
    "CREATE TABLE langchain_pg_collection (uuid uuid PRIMARY KEY, name varchar NOT NULL UNIQUE, cmetadata json)"
)
# As pg_dump writes what PGVector makes.
PGVECTOR_SQL = f"""{COLLECTION_SQL};
CREATE TABLE langchain_pg_embedding (id varchar PRIMARY KEY, collection_id uuid
    REFERENCES langchain_pg_collection (uuid) ON DELETE CASCADE, embedding vector(768), document varchar,
    cmetadata jsonb);
CREATE INDEX ix_cmetadata_gin ON langchain_pg_embedding USING gin (cmetadata jsonb_path_ops)"""
PGVECTOR_ENV = {
    "EMBEDDING_DIMENSIONS": str(DIMENSIONS),
    "PGVECTOR_COL_CONTENT": "document",
    "PGVECTOR_COL_METADATA": "cmetadata",
}
PGVECTOR_ROWS = """
SELECT id, collection_id::text, textsend(document::text), jsonb_send(cmetadata), vector_send(embedding)
FROM langchain_pg_embedding ORDER BY id COLLATE "C"
"""


@contextmanager
def pgvector(database: Database) -> Iterator[Any]:
    """Open PGVector on a database; it makes its tables where they are not there."""
    engine = sa.create_engine(url(database, "psycopg"))
    try:
        yield langchain_postgres.PGVector(
            hashed(), connection=engine, collection_name="docs", embedding_length=DIMENSIONS, use_jsonb=True
        )
    finally:
        engine.dispose()


def test_pgvector_reads_and_writes_its_own_tables_after_the_move(new_move: Callable[..., Move]) -> None:
    move = new_move("", PGVECTOR_SQL, "langchain_pg_embedding", **PGVECTOR_ENV)
    data = load("nomic768")
    with pgvector(move.legacy) as before:
        before.add_embeddings(
            texts=[row["content"] for row in data.rows],
            embeddings=[vector.tolist() for vector in data.vectors],
            metadatas=[row["metadata"] for row in data.rows],
            ids=[f"doc/{row['id']}" for row in data.rows],
        )
        key, value, ids = labelled(data)
        queries = [vector.tolist() for vector in data.vectors[:3]]
        expected = [before.similarity_search_with_score_by_vector(query, k=4) for query in queries]
    # The collections are a table of a few rows without an embedding: they go by hand, before.
    for row in move.legacy.rows("SELECT uuid::text, name, cmetadata::text FROM langchain_pg_collection"):
        move.main.execute("INSERT INTO langchain_pg_collection VALUES (%s, %s, %s)", *row)
    assert move.copy_and_verify()["rows"] == len(data.rows)
    with pgvector(move.main) as store:
        for query, wanted in zip(queries, expected, strict=True):
            found = store.similarity_search_with_score_by_vector(query, k=4)
            assert [one for one, _ in found] == [one for one, _ in wanted]
            assert np.allclose([score for _, score in found], [score for _, score in wanted], atol=1e-6)
        filtered = store.similarity_search_by_vector(queries[0], k=len(data.rows), filter={key: value})
        assert {document.id.removeprefix("doc/") for document in filtered} == ids
        added = documents.Document(page_content=TEA, metadata={"source": "kitchen"})
        (made,), (given,) = store.add_documents([added]), store.add_documents([added], ids=["tea/1"])
        assert given == "tea/1" and UUID(made)
        assert {one.id for one in store.similarity_search(QUESTION, k=2, filter={"source": "kitchen"})} == {made, given}
        store.delete([made, given])
    assert move.main.rows(PGVECTOR_ROWS) == move.legacy.rows(PGVECTOR_ROWS)
    move.verify("--check", "rows").expect(0)
