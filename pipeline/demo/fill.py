"""The demo's legacy table: LangChain JS's layout, filled with the corpus by binary COPY."""

import hashlib
import json
import struct
import uuid
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import psycopg2.extensions
from numpy.typing import NDArray
from psycopg2 import sql

from pipeline.demo.corpus import Passage, corpus, spread
from pipeline.demo.hashing import DIMENSIONS, EmbedderError, HashingEmbedder
from pipeline.errors import RefusedError
from pipeline.settings import TableMapping

MAX_ROWS = 1_000_000
# The length of the noise on a repeated row's vector of length 1: cosine to the original about 0.995.
NOISE = 0.1
SEED = 768
# One COPY's rows: about 8 MB at 768 dimensions, which bounds the memory and paces the progress.
BLOCK_ROWS = 2_000

# PostgreSQL's binary COPY format: signature, flags, length of the header's extension; -1 ends it.
_COPY_HEADER = b"PGCOPY\n\xff\r\n\x00" + struct.pack(">ii", 0, 0)
_COPY_TRAILER = struct.pack(">h", -1)
_ROW_HEAD = struct.pack(">hi", 4, 16)
_LENGTH = struct.Struct(">i")
# The version byte of jsonb's binary form.
_JSONB_VERSION = b"\x01"


@dataclass(frozen=True, slots=True)
class _Packed:
    """What every copy of a passage shares: the content's field, and the metadata without its last brace."""

    id: uuid.UUID
    content: bytes
    metadata: bytes


def fill_legacy(
    connection: psycopg2.extensions.connection,
    mapping: TableMapping,
    dimensions: int = DIMENSIONS,
    rows: int | None = None,
    *,
    passages: Sequence[Passage] | None = None,
    embedder: HashingEmbedder | None = None,
) -> Generator[int, None, None]:
    """Create extension and table as LangChain JS does, fill it, and yield the rows done after each block.

    ``rows`` below the corpus takes passages spread over it; above, the corpus is repeated: same
    content, an id of its own, ``copy`` in the metadata, a vector a little aside. None is the corpus
    once. ``passages`` defaults to ``corpus()``, ``embedder`` to one fitted on them. The same arguments
    give the same rows. All is one transaction of ``connection`` (which is not in autocommit), committed
    at the end; a generator that is closed before rolls it back. Raises RefusedError where the table has
    rows or ``rows`` is out of range, EmbedderError where the dimensions differ, and psycopg2.Error.
    """
    if rows is not None and not 1 <= rows <= MAX_ROWS:
        raise RefusedError(f"{rows} rows are not from 1 to {MAX_ROWS}", "give fewer rows, or none for the corpus once")
    whole = corpus() if passages is None else passages
    embedder = embedder or HashingEmbedder(dimensions).fit(passage.text for passage in whole)
    if embedder.dimensions != dimensions:
        raise EmbedderError(
            f"the embedder makes {embedder.dimensions} dimensions and the table has {dimensions}",
            "set EMBEDDING_DIMENSIONS to the embedder's, or fit another",
        )
    wanted = len(whole) if rows is None else rows
    chosen = spread(whole, wanted)
    done = 0
    try:
        with connection.cursor() as cursor:
            _create_table(cursor, mapping, dimensions)
            copy = _copy_sql(mapping)
            for count, block in blocks(chosen, embedder, wanted):
                cursor.copy_expert(copy, BytesIO(block), size=65536)
                done += count
                yield done
        connection.commit()
    finally:
        # After the commit nothing is left to roll back.
        if not connection.closed:
            connection.rollback()


def blocks(passages: Sequence[Passage], embedder: HashingEmbedder, rows: int) -> Iterator[tuple[int, bytes]]:
    """Yield (number of rows, a complete binary COPY of them) until ``rows`` rows are made.

    Row ``n`` is passage ``n % len(passages)`` in its copy ``n // len(passages)``; copy 0 is exact.
    Holds the corpus' vectors (3 kB each at 768 dimensions) and one block.
    """
    packed = [_pack(passage) for passage in passages]
    vectors = embedder.embed([passage.text for passage in passages])
    generator = np.random.default_rng(SEED)
    record = np.dtype(
        [
            ("length", ">i4"),
            ("dimensions", ">i2"),
            ("unused", ">i2"),
            ("values", ">f4", (embedder.dimensions,)),
        ]
    )
    for start in range(0, rows, BLOCK_ROWS):
        numbers = np.arange(start, min(start + BLOCK_ROWS, rows))
        fields = np.zeros(len(numbers), record)
        fields["length"] = record.itemsize - 4
        fields["dimensions"] = embedder.dimensions
        fields["values"] = _perturbed(vectors[numbers % len(passages)], numbers >= len(passages), generator)
        yield len(numbers), _rows(packed, numbers.tolist(), fields.tobytes(), record.itemsize)


def _perturbed(
    vectors: NDArray[np.float32], repeated: NDArray[np.bool_], generator: np.random.Generator
) -> NDArray[np.float32]:
    """Push the repeated rows' vectors aside by NOISE and bring them back to length 1."""
    if not repeated.any():
        return vectors
    chosen = vectors[repeated]
    noise = generator.standard_normal(chosen.shape, np.float32)
    noise *= np.float32(NOISE / np.sqrt(chosen.shape[1]))
    chosen += noise
    chosen /= np.sqrt(np.einsum("ij,ij->i", chosen, chosen))[:, np.newaxis]
    vectors[repeated] = chosen
    return vectors


def _pack(passage: Passage) -> _Packed:
    content = passage.text.encode()
    metadata = json.dumps(passage.metadata, ensure_ascii=False).encode()
    return _Packed(passage.id, _LENGTH.pack(len(content)) + content, _JSONB_VERSION + metadata[:-1])


def _rows(packed: Sequence[_Packed], numbers: Sequence[int], vectors: bytes, size: int) -> bytes:
    """Join the rows' fields; ``vectors`` holds ``size`` bytes for each, length prefix included."""
    pieces = [_COPY_HEADER]
    for place, number in enumerate(numbers):
        copy, of = divmod(number, len(packed))
        passage = packed[of]
        metadata = passage.metadata + (b', "copy": %d}' % copy if copy else b"}")
        pieces += (
            _ROW_HEAD,
            _copy_id(passage.id, copy),
            passage.content,
            _LENGTH.pack(len(metadata)),
            metadata,
            vectors[place * size : (place + 1) * size],
        )
    pieces.append(_COPY_TRAILER)
    return b"".join(pieces)


def _copy_id(base: uuid.UUID, copy: int) -> bytes:
    """Return ``uuid5(base, str(copy))``, or ``base`` itself, as bytes; uuid.uuid5 takes much longer."""
    if not copy:
        return base.bytes
    digest = bytearray(hashlib.sha1(base.bytes + b"%d" % copy, usedforsecurity=False).digest()[:16])
    digest[6] = digest[6] & 0x0F | 0x50
    digest[8] = digest[8] & 0x3F | 0x80
    return bytes(digest)


def _create_table(cursor: psycopg2.extensions.cursor, mapping: TableMapping, dimensions: int) -> None:
    """Do as ``PGVectorStore.initialize`` of @langchain/community does when it is given dimensions.

    Its statement names no schema for the type; here it is named, and the table comes out the same.
    """
    cursor.execute("CREATE EXTENSION IF NOT EXISTS vector")
    cursor.execute(
        "SELECT n.nspname FROM pg_catalog.pg_extension e "
        "JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector'"
    )
    found = cursor.fetchone()
    assert found is not None  # The first statement made it.
    table = sql.Identifier(mapping.schema, mapping.table)
    identifier, content, metadata, embedding = (sql.Identifier(name) for name in mapping.columns)
    cursor.execute(
        sql.SQL(
            "CREATE TABLE IF NOT EXISTS {table} ("
            "{identifier} pg_catalog.uuid NOT NULL DEFAULT pg_catalog.gen_random_uuid() PRIMARY KEY, "
            "{content} pg_catalog.text, {metadata} pg_catalog.jsonb, {embedding} {vector}({dimensions}))"
        ).format(
            table=table,
            identifier=identifier,
            content=content,
            metadata=metadata,
            embedding=embedding,
            vector=sql.Identifier(found[0], "vector"),
            dimensions=sql.Literal(dimensions),
        )
    )
    cursor.execute(sql.SQL("SELECT EXISTS (SELECT FROM {})").format(table))
    if cursor.fetchone() != (False,):
        raise RefusedError(
            f"the table {mapping.qualified} already has rows", "empty it, or name another in PGVECTOR_TABLE"
        )


def _copy_sql(mapping: TableMapping) -> sql.Composed:
    return sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(
        sql.Identifier(mapping.schema, mapping.table),
        sql.SQL(", ").join(sql.Identifier(name) for name in mapping.columns),
    )
