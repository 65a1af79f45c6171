"""Real embeddings for the tests, loaded into LangChain JS's table."""

import gzip
import io
import json
import os
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
from numpy.typing import NDArray
from psycopg2 import sql
from psycopg2.extras import execute_values

from pipeline.demo.corpus import corpus
from pipeline.demo.hashing import HashingEmbedder
from tests.support import ROOT, Database

# LangChain JS, PGVectorStore.initialize with dimensions.
TABLE_SQL = """
CREATE TABLE public.embeddings (
    "id" uuid NOT NULL DEFAULT gen_random_uuid() PRIMARY KEY,
    "content" text, "metadata" jsonb, "embedding" vector({}))
"""
DATA_SETS = {"nomic768": 768, "google768": 768, "minilm384_docs": 384}
# Where the data sets are not at hand, as many passages of the demo's corpus stand in.
STAND_IN_ROWS = {"nomic768": 95, "google768": 1070, "minilm384_docs": 5269}
# Port, rows, dimensions and bytes of text of the generated tables that stand as templates on this process's servers.
_generated: set[tuple[int, int, int, int]] = set()


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Rows with ids, texts and metadata, and their vectors in the same order."""

    name: str
    rows: list[dict[str, Any]]
    vectors: NDArray[np.float32]

    @property
    def dimensions(self) -> int:
        return int(self.vectors.shape[1])


@cache
def load(name: str) -> DataSet:
    """Load a data set from PIPELINE_TEST_DATA or ../shared/data, else make one from the demo's corpus."""
    folder = Path(os.environ.get("PIPELINE_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / f"{name}.npz").is_file():
        return _stand_in(name)
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return DataSet(name=name, rows=rows, vectors=np.load(folder / f"{name}.npz")["embedding"])


def _stand_in(name: str) -> DataSet:
    passages = corpus(STAND_IN_ROWS[name])
    embedder = HashingEmbedder(DATA_SETS[name]).fit(passage.text for passage in passages)
    # Another name space for each set: two of them go into one table.
    rows = [
        {
            "id": str(UUID(int=passage.id.int ^ (len(name) << 64))),
            "content": passage.text,
            "metadata": passage.metadata,
        }
        for passage in passages
    ]
    return DataSet(name=name, rows=rows, vectors=embedder.embed([passage.text for passage in passages]))


# The rows of sets as binary COPY has them, once a server has made them of their texts.
_streams: dict[tuple[int, ...], bytes] = {}
_COLUMNS = "public.embeddings (id, content, metadata, embedding)"


def fill(database: Database, *sets: DataSet) -> int:
    """Create the table and insert the sets' rows; return their number."""
    known = tuple(map(id, sets))
    with database.cursor() as cursor:
        cursor.execute(TABLE_SQL.format(sets[0].dimensions))
        if known in _streams:
            cursor.copy_expert(f"COPY {_COLUMNS} FROM STDIN (FORMAT binary)", io.BytesIO(_streams[known]))
            return cursor.rowcount
        rows = [
            (row["id"], row["content"], json.dumps(row["metadata"], ensure_ascii=False), _text(vector))
            for data in sets
            for row, vector in zip(data.rows, data.vectors, strict=True)
        ]
        execute_values(
            cursor,
            f"INSERT INTO {_COLUMNS} VALUES %s",
            rows,
            template="(%s::uuid, %s, %s::jsonb, %s::vector)",
        )
        stream = io.BytesIO()
        cursor.copy_expert(f"COPY {_COLUMNS} TO STDOUT (FORMAT binary)", stream)
        _streams[known] = stream.getvalue()
    return len(rows)


def fill_generated(database: Database, rows: int, dimensions: int = 768, text_bytes: int = 200) -> None:
    """Create the table with generated rows, made by the server: fast, and of any number."""
    with database.cursor() as cursor:
        cursor.execute(TABLE_SQL.format(dimensions))
        cursor.execute(
            "INSERT INTO public.embeddings (id, content, metadata, embedding)"
            " SELECT md5('row' || i)::uuid,"
            # Text that does not compress, so that the table is as large as it looks.
            " (SELECT string_agg(md5(i || ' ' || part), '') FROM generate_series(1, %s) AS part),"
            " jsonb_build_object('n', i, 'price', 1.10, 'tags', jsonb_build_array('a', null)),"
            " (SELECT array_agg(sin(i * 0.37 + d * d)) FROM generate_series(1, %s) AS d)::vector"
            " FROM generate_series(1, %s) AS i",
            (text_bytes // 32, dimensions, rows),
        )


def become_generated(database: Database, rows: int, dimensions: int = 768, text_bytes: int = 200) -> None:
    """Put a copy of a database of generated rows in the place of an empty one, to which nobody is connected."""
    wanted = (database.server.port, rows, dimensions, text_bytes)
    name = "generated_" + "_".join(map(str, wanted[1:]))
    with closing(Database(server=database.server, name="postgres").connect()) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            if wanted not in _generated:
                cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
                template = Database(server=database.server, name=name)
                template.execute("CREATE EXTENSION vector")
                fill_generated(template, rows, dimensions, text_bytes)
                _generated.add(wanted)
            place = sql.Identifier(database.name)
            cursor.execute(sql.SQL("DROP DATABASE {}").format(place))
            cursor.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(place, sql.Identifier(name)))


def content(database: Database) -> list[tuple[Any, ...]]:
    """Return every row as bytes, in key order: what has to be equal on both sides."""
    return database.rows(
        "SELECT id::text, textsend(content), jsonb_send(metadata), vector_send(embedding)"
        " FROM public.embeddings ORDER BY id"
    )


def _text(vector: NDArray[np.float32]) -> str:
    # repr of a float32 gives back the same bits.
    return "[" + ",".join(map(str, vector.tolist())) + "]"
