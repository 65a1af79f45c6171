"""The embeddings table as SQLAlchemy sees it: its columns, pgvector's types by schema, its index's name."""

import hashlib
from typing import Any

import sqlalchemy as sa
from pgvector.sqlalchemy import HALFVEC, VECTOR
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import TypeCompiler
from sqlalchemy.sql.elements import quoted_name

from pipeline.settings import MAX_IDENTIFIER_BYTES, TableMapping

# pgvector's limits of an HNSW index, in dimensions.
MAX_INDEXED_VECTOR = 2_000
MAX_INDEXED_HALFVEC = 4_000


class Vector(VECTOR):
    """pgvector's ``vector(dim)``, 4 bytes a number, named by the schema that the extension lives in."""

    cache_ok = True

    def __init__(self, dim: int | None = None, schema: str = "public") -> None:
        """Take the dimension (None: any) and the extension's schema."""
        super().__init__(dim)
        self.schema = schema


class HalfVector(HALFVEC):
    """pgvector's ``halfvec(dim)``, 2 bytes a number (pgvector 0.7 and later), named by its schema."""

    cache_ok = True

    def __init__(self, dim: int | None = None, schema: str = "public") -> None:
        """Take the dimension (None: any) and the extension's schema."""
        super().__init__(dim)
        self.schema = schema


@compiles(Vector)
def _compile_vector(element: Vector, compiler: TypeCompiler, **_: Any) -> str:
    return _qualified_type(compiler, element.schema, "vector", element.dim)


@compiles(HalfVector)
def _compile_half_vector(element: HalfVector, compiler: TypeCompiler, **_: Any) -> str:
    return _qualified_type(compiler, element.schema, "halfvec", element.dim)


def _qualified_type(compiler: TypeCompiler, schema: str, name: str, dimensions: int | None) -> str:
    quote = compiler.dialect.identifier_preparer.quote_identifier
    modifier = "" if dimensions is None else "".join(("(", str(dimensions), ")"))
    return "".join((quote(schema), ".", name, modifier))


def always_quoted(name: str) -> quoted_name:
    """Return ``name`` as an identifier that SQLAlchemy quotes whatever it looks like."""
    return quoted_name(name, quote=True)


def embeddings_table(
    mapping: TableMapping, dimensions: int, extension_schema: str, metadata: sa.MetaData | None = None
) -> sa.Table:
    """Return the table with its four columns.

    Their keys are ``id``, ``content``, ``metadata`` and ``embedding``, whatever the columns are called.
    ``extension_schema`` is where pgvector is installed. The table is new in ``metadata`` (None: its own).
    """
    return sa.Table(
        always_quoted(mapping.table),
        sa.MetaData() if metadata is None else metadata,
        sa.Column(
            always_quoted(mapping.id),
            sa.Uuid(),
            key="id",
            primary_key=True,
            server_default=sa.text("pg_catalog.gen_random_uuid()"),
        ),
        sa.Column(always_quoted(mapping.content), sa.Text(), key="content"),
        sa.Column(always_quoted(mapping.metadata), JSONB(), key="metadata"),
        sa.Column(always_quoted(mapping.embedding), Vector(dimensions, extension_schema), key="embedding"),
        schema=always_quoted(mapping.schema),
    )


def hnsw_index_name(mapping: TableMapping) -> str:
    """Return ``TABLE_COLUMN_hnsw``, the ANN index's name, in at most 63 bytes.

    A longer name is cut at a character and ends in a digest, so that two long names stay two.
    """
    name = f"{mapping.table}_{mapping.embedding}_hnsw"
    if len(name.encode()) <= MAX_IDENTIFIER_BYTES:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    ending = f"_{digest}_hnsw"
    head = name.encode()[: MAX_IDENTIFIER_BYTES - len(ending)].decode(errors="ignore")
    return head + ending
