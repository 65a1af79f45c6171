"""The repository: embeddings found, added and deleted on the application's own SQLAlchemy engine."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import isnan
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from pipeline.endpoints import Endpoint
from pipeline.search.embedders import Embedder
from pipeline.search.failures import SearchError, label, translated_failures
from pipeline.search.table import HalfVector, Vector, always_quoted
from pipeline.search.vector_sql import (
    CatalogType,
    Distance,
    Extension,
    Metric,
    filter_texts,
    find_extension,
    forget_extension,
    is_indexed_by_half,
    json_text,
    planner_statement,
    query_text,
    storable_text,
    vector_text,
)
from pipeline.settings import TableMapping

APPLICATION_NAME = "pipeline search"
CONNECT_TIMEOUT_SECONDS = 10
DEFAULT_K = 4
# A halfvec index ranks by rounded numbers: so many times k rows are ranked again by their exact distance.
HALFVEC_CANDIDATES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What ``add`` stores: a text and its metadata, a JSON object."""

    content: str = field(repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A row near the query. ``distance`` is pgvector's: 0 is nearest for cosine (0..2) and l2.

    For ``inner_product`` it is the negative product. NULL metadata is ``{}``; other JSON comes as it is.
    """

    id: UUID
    content: str | None = field(repr=False)
    metadata: Any = field(repr=False)
    distance: float


class EmbeddingRepository:
    """Search and keep the embeddings of one table, on an engine that the application owns.

    Nothing relies on ``search_path``, on the engine's isolation level or on its ``hide_parameters``.
    Every failure of the database is raised as a PipelineError, whose message holds no row and no parameter.
    """

    def __init__(
        self, engine: sa.Engine, mapping: TableMapping, embedder: Embedder, *, metric: Metric = "cosine"
    ) -> None:
        """Take the engine as it is. ``metric`` must be the index's, or the index is not used."""
        self._engine = engine
        self._embedder = embedder
        self._metric = metric
        self._where = label(engine)
        self._name = mapping.qualified
        self._id = sa.column(always_quoted(mapping.id), sa.Uuid())
        self._content = sa.column(always_quoted(mapping.content), sa.Text())
        self._metadata = sa.column(always_quoted(mapping.metadata), JSONB())
        self._embedding: sa.ColumnClause[Any] = sa.column(always_quoted(mapping.embedding))
        self._table = sa.table(
            always_quoted(mapping.table),
            self._id,
            self._content,
            self._metadata,
            self._embedding,
            schema=always_quoted(mapping.schema),
        )

    def search(
        self,
        text: str,
        k: int = DEFAULT_K,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
    ) -> list[Hit]:
        """Return the ``k`` rows nearest to ``text``, nearest first. See ``search_by_vector``."""
        check_k(k)
        return self.search_by_vector(self._embedder.embed([text])[0], k, filter)

    def search_by_vector(
        self,
        vector: Sequence[float],
        k: int = DEFAULT_K,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
    ) -> list[Hit]:
        """Return the ``k`` rows nearest to ``vector``, nearest first; fewer only where no more match.

        ``filter`` maps metadata keys to the value that they must have; a list means one of its values.
        Rows without an embedding, or without a distance (the zero vector has no cosine), are no hits.
        An HNSW index answers where the planner takes it; what it leaves short of ``k`` is searched exactly.
        Runs in a read-only transaction. Raises SearchError, StatementError, UnreachableError and others.
        """
        check_k(k)
        query = query_text(vector, self._embedder.dimensions, self._metric)
        conditions = self._conditions(filter or {})
        with self._transaction(readonly=True) as (connection, extension):
            # Before 0.8 a filter is applied to the first ef_search rows of the index only.
            if extension.version >= (0, 8) or not conditions:
                hits = self._nearest(connection, extension, query, k, conditions, exact=False)
                if len(hits) == k:
                    return hits
            # An index scan also ends early at hnsw.max_scan_tuples, and at rows deleted but not vacuumed.
            return self._nearest(connection, extension, query, k, conditions, exact=True)

    def add(self, documents: Sequence[Document], ids: Sequence[UUID] | None = None) -> list[UUID]:
        """Embed and insert ``documents`` in one transaction; return their ids in order.

        Without ``ids`` the table's default makes them. Everything is checked before the first row is
        written. Raises SearchError, EmbedderError, StatementError (an id that exists) and others.
        """
        texts, metadata = check_documents(documents, ids)
        if not texts:
            return []
        vectors = self._embedder.embed(texts)
        if len(vectors) != len(texts):
            raise SearchError(f"the embedder made {len(vectors)} vectors of {len(texts)} texts")
        size = self._embedder.dimensions
        checked = [vector_text(vector, size, f"the vector of document {n}") for n, vector in enumerate(vectors, 1)]
        keys = [None] * len(texts) if ids is None else ids
        with self._transaction(readonly=False) as (connection, extension):
            # Row by row: PostgreSQL promises no order for what a many-row INSERT returns.
            return [
                connection.execute(self._insert(extension, *row)).scalar_one()
                for row in zip(keys, texts, metadata, checked, strict=True)
            ]

    def delete(self, ids: Sequence[UUID]) -> int:
        """Delete the rows with these ids; return how many there were."""
        if not ids:
            return 0
        wanted = sa.cast(sa.bindparam("ids", [str(i) for i in ids], type_=ARRAY(sa.String())), CatalogType("uuid[]"))
        matches = self._id.bool_op("OPERATOR(pg_catalog.=)")(sa.any_(wanted))
        with self._transaction(readonly=False) as (connection, _):
            return connection.execute(sa.delete(self._table).where(matches)).rowcount

    def _nearest(
        self,
        connection: sa.Connection,
        extension: Extension,
        query: str,
        k: int,
        conditions: list[sa.ColumnElement[bool]],
        *,
        exact: bool,
    ) -> list[Hit]:
        size = self._embedder.dimensions
        rounded = not exact and is_indexed_by_half(size) and extension.version >= (0, 7)
        limit = k * HALFVEC_CANDIDATES if rounded else k
        connection.execute(planner_statement(extension, limit, exact=exact))
        rows = connection.execute(self._select(extension, query, rounded).where(*conditions).limit(limit))
        hits = [
            Hit(id=key, content=content, metadata={} if metadata is None else metadata, distance=distance)
            for key, content, metadata, distance in rows
            if distance is not None and not isnan(distance)
        ]
        # Rows of a relaxed or rounded scan come nearly in order.
        return sorted(hits, key=lambda hit: (hit.distance, str(hit.id)))[:k]

    def _select(self, extension: Extension, query: str, rounded: bool) -> Any:
        """Order by the very expression that the index is on, ascending and alone: else it is not used."""
        parameter = sa.bindparam("query", query, type_=sa.Text())
        full = Vector(schema=extension.schema)
        labelled = Distance(self._embedding, parameter, full, self._metric).label("hit_distance")
        order: sa.ColumnElement[Any] = labelled
        if rounded:
            half = HalfVector(self._embedder.dimensions, extension.schema)
            order = Distance(sa.cast(self._embedding, half), parameter, half, self._metric)
        return (
            sa.select(
                self._id.label("hit_id"),
                self._content.label("hit_content"),
                self._metadata.label("hit_metadata"),
                labelled,
            )
            .select_from(self._table)
            .order_by(order)
        )

    def _insert(self, extension: Extension, key: UUID | None, content: str, metadata: str, embedding: str) -> Any:
        values: dict[Any, Any] = {
            self._content: sa.literal(content, sa.Text()),
            self._metadata: sa.cast(sa.literal(metadata, sa.Text()), CatalogType("jsonb")),
            self._embedding: sa.cast(sa.literal(embedding, sa.Text()), Vector(schema=extension.schema)),
        }
        if key is not None:
            values[self._id] = sa.cast(sa.literal(str(key), sa.String()), CatalogType("uuid"))
        return sa.insert(self._table).values(values).returning(self._id)

    def _conditions(self, wanted: Mapping[str, Any]) -> list[sa.ColumnElement[bool]]:
        """Return one containment per key, which a GIN index on the metadata can answer."""
        jsonb = CatalogType("jsonb")
        stored = sa.cast(self._metadata, jsonb)

        def contains(text: str) -> sa.ColumnElement[bool]:
            return stored.bool_op("OPERATOR(pg_catalog.@>)")(sa.cast(sa.literal(text, sa.Text()), jsonb))

        return [sa.or_(sa.false(), *map(contains, texts)) for texts in filter_texts(wanted)]

    @contextmanager
    def _transaction(self, *, readonly: bool) -> Iterator[tuple[sa.Connection, Extension]]:
        # The engine may be in autocommit, where SET LOCAL is lost and two INSERTs are two transactions.
        options: dict[str, Any] = {"isolation_level": "READ COMMITTED"}
        if readonly:
            options["postgresql_readonly"] = True
        with (
            translated_failures(self._name, self._where, when_moved=partial(forget_extension, self._engine)),
            self._engine.connect() as connection,
        ):
            connection.execution_options(**options)
            with connection.begin():
                yield connection, find_extension(self._engine, connection, self._where)


def engine_for(endpoint: Endpoint, **options: Any) -> sa.Engine:
    """Make an engine for ``endpoint``; ``options`` go to ``create_engine``. Opens no connection.

    The password is in no URL, so ``engine.url`` can be shown; where there is none, libpq's own ways
    (``.pgpass``) apply. ``endpoint.host`` may be the folder of a Unix socket.
    """
    arguments: dict[str, Any] = {
        "host": endpoint.host,
        "sslmode": endpoint.sslmode,
        "application_name": APPLICATION_NAME,
        "connect_timeout": CONNECT_TIMEOUT_SECONDS,
    }
    if endpoint.sslrootcert is not None:
        arguments["sslrootcert"] = endpoint.sslrootcert
    if endpoint.password is not None:
        arguments["password"] = endpoint.password.reveal()
    url = sa.URL.create(
        "postgresql+psycopg2",
        username=endpoint.user,
        host=endpoint.host,
        port=endpoint.port,
        database=endpoint.database,
    )
    arguments |= options.pop("connect_args", {})
    return sa.create_engine(
        url, **{"hide_parameters": True, "pool_pre_ping": True, **options, "connect_args": arguments}
    )


def check_k(k: int) -> None:
    """Raise SearchError where ``k`` is no number of hits."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise SearchError("k, the number of hits, is not a whole number from 1", "ask for one hit or more")


def check_documents(documents: Sequence[Document], ids: Sequence[UUID] | None) -> tuple[list[str], list[str]]:
    """Return texts and metadata as PostgreSQL takes them, the metadata as JSON. Raises SearchError."""
    if ids is not None and len(ids) != len(documents):
        raise SearchError(f"{len(ids)} ids were given for {len(documents)} documents", "give one id each")
    texts = [storable_text(document.content, f"document {n}") for n, document in enumerate(documents, 1)]
    return texts, [_metadata(document.metadata, n) for n, document in enumerate(documents, 1)]


def _metadata(metadata: object, number: int) -> str:
    if not isinstance(metadata, Mapping):
        raise SearchError(f"the metadata of document {number} are not a JSON object", "give a dict")
    return json_text(dict(metadata), f"the metadata of document {number}")
