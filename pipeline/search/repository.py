"""The repository: embeddings found, added and deleted on the application's own SQLAlchemy engine."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite, isnan
from typing import Any, Literal
from uuid import UUID
from weakref import WeakKeyDictionary

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
    Float,
    Integer,
    Select,
    String,
    Text,
    Uuid,
    any_,
    bindparam,
    cast,
    column,
    create_engine,
    delete,
    false,
    func,
    insert,
    literal,
    literal_column,
    or_,
    select,
    table,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler, TypeCompiler
from sqlalchemy.types import UserDefinedType

from pipeline.errors import (
    ConflictError,
    PipelineError,
    RejectedError,
    StatementError,
    UnreachableError,
)
from pipeline.search.embedders import LARGEST_COMPONENT, Embedder
from pipeline.settings import DEFAULT_PORT, Endpoint, TableMapping

APPLICATION_NAME = "pipeline search"
CONNECT_TIMEOUT_SECONDS = 10
DEFAULT_K = 4
# pgvector: an HNSW index holds at most so many dimensions of vector and of halfvec; halfvec's largest number.
MAX_INDEXED_VECTOR = 2_000
MAX_INDEXED_HALFVEC = 4_000
LARGEST_HALF = 65_504.0
# pgvector: default and upper limit of hnsw.ef_search, the most rows that one pass over the graph returns.
DEFAULT_EF_SEARCH = 40
MAX_EF_SEARCH = 1_000
# A halfvec index ranks by rounded numbers: so many times k rows are ranked again by their exact distance.
HALFVEC_CANDIDATES = 2

Metric = Literal["cosine", "l2", "inner_product"]
_OPERATORS: dict[Metric, str] = {"cosine": "<=>", "l2": "<->", "inner_product": "<#>"}


class SearchError(PipelineError):
    """A search or a write was asked for that cannot be carried out: vector, filter, document or id."""


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

    def __init__(self, engine: Engine, mapping: TableMapping, embedder: Embedder, *, metric: Metric = "cosine") -> None:
        """Take the engine as it is. ``metric`` must be the index's, or the index is not used."""
        self._engine = engine
        self._embedder = embedder
        self._metric = metric
        self._where = _label(engine)
        self._name = mapping.qualified
        self._id = column(mapping.id, Uuid(as_uuid=True))
        self._content = column(mapping.content, Text())
        self._metadata = column(mapping.metadata, JSONB())
        self._embedding: ColumnElement[Any] = column(mapping.embedding)
        self._table = table(
            mapping.table, self._id, self._content, self._metadata, self._embedding, schema=mapping.schema
        )

    def search(
        self,
        text: str,
        k: int = DEFAULT_K,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
    ) -> list[Hit]:
        """Return the ``k`` rows nearest to ``text``, nearest first. See ``search_by_vector``."""
        _check_k(k)
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
        _check_k(k)
        query = self._checked(vector, "the query vector")
        if self._metric == "cosine" and not any(vector):
            raise SearchError("the query vector is zero and has no cosine distance", "embed another text")
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
        if ids is not None and len(ids) != len(documents):
            raise SearchError(f"{len(ids)} ids were given for {len(documents)} documents", "give one id each")
        texts = [_storable(document.content, f"document {n}") for n, document in enumerate(documents, 1)]
        metadata = [_metadata(document.metadata, n) for n, document in enumerate(documents, 1)]
        if not texts:
            return []
        vectors = self._embedder.embed(texts)
        if len(vectors) != len(texts):
            raise SearchError(f"the embedder made {len(vectors)} vectors of {len(texts)} texts")
        checked = [self._checked(vector, f"the vector of document {n}") for n, vector in enumerate(vectors, 1)]
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
        wanted = cast(
            bindparam("ids", [str(i) for i in ids], type_=ARRAY(String())), _Qualified("pg_catalog", "uuid[]")
        )
        matches = self._id.bool_op("OPERATOR(pg_catalog.=)")(any_(wanted))
        with self._transaction(readonly=False) as (connection, _):
            return connection.execute(delete(self._table).where(matches)).rowcount

    def _nearest(
        self,
        connection: Connection,
        extension: "_Extension",
        query: str,
        k: int,
        conditions: list[ColumnElement[bool]],
        *,
        exact: bool,
    ) -> list[Hit]:
        rounded = not exact and self._is_rounded(extension)
        limit = k * HALFVEC_CANDIDATES if rounded else k
        connection.execute(_planner_statement(extension, limit, exact=exact))
        rows = connection.execute(self._select(extension, query, rounded).where(*conditions).limit(limit))
        hits = [
            Hit(id=key, content=content, metadata={} if metadata is None else metadata, distance=distance)
            for key, content, metadata, distance in rows
            if distance is not None and not isnan(distance)
        ]
        # Rows of a relaxed or rounded scan come nearly in order.
        return sorted(hits, key=lambda hit: (hit.distance, str(hit.id)))[:k]

    def _is_rounded(self, extension: "_Extension") -> bool:
        dimensions = self._embedder.dimensions
        return MAX_INDEXED_VECTOR < dimensions <= MAX_INDEXED_HALFVEC and extension.version >= (0, 7)

    def _select(self, extension: "_Extension", query: str, rounded: bool) -> Any:
        """Order by the very expression that the index is on, ascending and alone: else it is not used."""
        symbol = _OPERATORS[self._metric]
        parameter = bindparam("query", query, type_=Text())

        def distance(as_type: "_Qualified", stored: ColumnElement[Any]) -> _Distance:
            return _Distance(stored, extension.schema, symbol, cast(parameter, as_type))

        labelled = distance(_Qualified(extension.schema, "vector"), self._embedding).label("hit_distance")
        order: ColumnElement[Any] = labelled
        if rounded:
            half = _Qualified(extension.schema, f"halfvec({self._embedder.dimensions})")
            order = distance(half, cast(self._embedding, half))
        return (
            select(
                self._id.label("hit_id"),
                self._content.label("hit_content"),
                self._metadata.label("hit_metadata"),
                labelled,
            )
            .select_from(self._table)
            .order_by(order)
        )

    def _insert(self, extension: "_Extension", key: UUID | None, content: str, metadata: str, embedding: str) -> Any:
        values: dict[Any, Any] = {
            self._content: literal(content, Text()),
            self._metadata: cast(literal(metadata, Text()), _Qualified("pg_catalog", "jsonb")),
            self._embedding: cast(literal(embedding, Text()), _Qualified(extension.schema, "vector")),
        }
        if key is not None:
            values[self._id] = cast(literal(str(key), String()), _Qualified("pg_catalog", "uuid"))
        return insert(self._table).values(values).returning(self._id)

    def _conditions(self, wanted: Mapping[str, Any]) -> list[ColumnElement[bool]]:
        """Return one containment per key, which a GIN index on the metadata can answer."""
        jsonb = _Qualified("pg_catalog", "jsonb")
        stored = cast(self._metadata, jsonb)

        def contains(key: str, value: Any) -> ColumnElement[bool]:
            text = _json({key: value}, f"the filter's value of {key!r}")
            return stored.bool_op("OPERATOR(pg_catalog.@>)")(cast(literal(text, Text()), jsonb))

        return [
            or_(false(), *(contains(key, one) for one in value))
            if isinstance(value, list | tuple | set | frozenset)
            else contains(key, value)
            for key, value in wanted.items()
        ]

    def _checked(self, vector: Sequence[float], what: str) -> str:
        """Return the vector as pgvector reads it, or raise SearchError."""
        expected = self._embedder.dimensions
        if len(vector) != expected:
            raise SearchError(
                f"{what} has {len(vector)} dimensions, not {expected}",
                "EMBEDDING_DIMENSIONS, the model and the column must agree",
            )
        numbers = [float(number) for number in vector]
        halved = MAX_INDEXED_VECTOR < expected <= MAX_INDEXED_HALFVEC
        largest = LARGEST_HALF if halved else LARGEST_COMPONENT
        if not all(isfinite(number) and abs(number) <= largest for number in numbers):
            raise SearchError(f"{what} holds a number that is not finite, or too large", "embed it again")
        return "".join(("[", ",".join(map(repr, numbers)), "]"))

    @contextmanager
    def _transaction(self, *, readonly: bool) -> "Iterator[tuple[Connection, _Extension]]":
        # The engine may be in autocommit, where SET LOCAL is lost and two INSERTs are two transactions.
        options: dict[str, Any] = {"isolation_level": "READ COMMITTED"}
        if readonly:
            options["postgresql_readonly"] = True
        try:
            with self._engine.connect() as connection:
                connection.execution_options(**options)
                with connection.begin():
                    yield connection, _extension(self._engine, connection, self._where)
        except SQLAlchemyError as error:
            if _sqlstate(error).startswith(_MOVED):
                _extensions.pop(self._engine, None)
            if isinstance(error, DBAPIError):
                error.hide_parameters = True
            cause = None if _sqlstate(error).startswith(_QUOTING) else error
            raise _translated(error, self._name, self._where) from cause


def engine_for(endpoint: Endpoint, **options: Any) -> Engine:
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
    url = URL.create(
        "postgresql+psycopg2",
        username=endpoint.user,
        host=endpoint.host,
        port=endpoint.port,
        database=endpoint.database,
    )
    arguments |= options.pop("connect_args", {})
    return create_engine(url, **{"hide_parameters": True, "pool_pre_ping": True, **options, "connect_args": arguments})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Extension:
    schema: str
    version: tuple[int, ...]


_extensions: WeakKeyDictionary[Engine, _Extension] = WeakKeyDictionary()


def _extension(engine: Engine, connection: Connection, where: str) -> _Extension:
    """Look pgvector's schema and version up, once per engine."""
    if (known := _extensions.get(engine)) is not None:
        return known
    extension = table(
        "pg_extension", column("extname"), column("extversion"), column("extnamespace"), schema="pg_catalog"
    )
    namespace = table("pg_namespace", column("oid"), column("nspname"), schema="pg_catalog")
    same = namespace.c.oid.bool_op("OPERATOR(pg_catalog.=)")(extension.c.extnamespace)
    is_vector = extension.c.extname.bool_op("OPERATOR(pg_catalog.=)")(literal("vector", Text()))
    row = connection.execute(
        select(namespace.c.nspname, extension.c.extversion).join_from(extension, namespace, same).where(is_vector)
    ).first()
    if row is None:
        raise SearchError(f"pgvector is not installed in {where}", "run: alembic upgrade head")
    version = tuple(int(part) for part in re.findall(r"\d+", row.extversion))
    return _extensions.setdefault(engine, _Extension(schema=row.nspname, version=version))


def _planner_statement(extension: _Extension, limit: int, *, exact: bool) -> Select[Any]:
    """Set what the next search of this transaction needs, by ``set_config(..., is_local)``.

    The literal loads the library while the statement is parsed: until then its settings are
    placeholders, and one that an old release does not know would be taken in silence.
    """
    changes: list[tuple[str, Any]] = []
    if exact:
        # Both: where the application has switched sequential scans off, they would weigh the same.
        changes.append(("enable_seqscan", literal("on", Text())))
        changes.append(("enable_indexscan", literal("off", Text())))
    elif extension.version >= (0, 5):
        if limit > DEFAULT_EF_SEARCH:
            # The application may have set more for itself: never lowered.
            current = cast(func.pg_catalog.current_setting("hnsw.ef_search"), Integer)
            wanted = func.greatest(current, min(limit, MAX_EF_SEARCH))
            changes.append(("hnsw.ef_search", cast(wanted, String)))
        if extension.version >= (0, 8):
            # Not strict_order: that drops every row nearer than one that it has returned already
            # (at 256 dimensions, 2,970 of 3,000 came back; by relaxed_order all of them).
            changes.append(("hnsw.iterative_scan", literal("relaxed_order", Text())))
    return select(
        cast(literal_column("'[1]'"), _Qualified(extension.schema, "vector")).label("loaded"),
        *(func.pg_catalog.set_config(name, value, True) for name, value in changes),
    )


class _Qualified(UserDefinedType[Any]):
    """A type by schema and name; the schema is quoted when it is compiled."""

    cache_ok = True

    def __init__(self, schema: str, type_name: str) -> None:
        self.schema = schema
        self.type_name = type_name


class _Distance(ColumnElement[float]):
    """``stored OPERATOR(schema.symbol) query``."""

    inherit_cache = False

    def __init__(self, stored: ColumnElement[Any], schema: str, symbol: str, query: ColumnElement[Any]) -> None:
        self.type = Float()
        self.stored = stored
        self.schema = schema
        self.symbol = symbol
        self.query = query


@compiles(_Qualified)
def _compile_type(element: _Qualified, compiler: TypeCompiler, **options: Any) -> str:
    return ".".join((compiler.dialect.identifier_preparer.quote(element.schema), element.type_name))


@compiles(_Distance)
def _compile_distance(element: _Distance, compiler: SQLCompiler, **options: Any) -> str:
    stored = compiler.process(element.stored, **options)
    operator = ".".join((compiler.preparer.quote(element.schema), element.symbol))
    return "".join((stored, " OPERATOR(", operator, ") ", compiler.process(element.query, **options)))


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise SearchError("k, the number of hits, is not a whole number from 1", "ask for one hit or more")


def _storable(text: str, what: str) -> str:
    """Return ``text``, or raise SearchError where PostgreSQL cannot hold it."""
    if "\0" in text:
        raise SearchError(f"{what} holds a NUL character, which PostgreSQL cannot store", "take it out first")
    try:
        text.encode()
    except UnicodeEncodeError:
        # The error holds the text itself: not kept as the cause.
        raise SearchError(f"{what} holds half a surrogate pair, which is not Unicode", "clean it first") from None
    return text


def _metadata(metadata: object, number: int) -> str:
    if not isinstance(metadata, Mapping):
        raise SearchError(f"the metadata of document {number} are not a JSON object", "give a dict")
    return _json(dict(metadata), f"the metadata of document {number}")


def _json(value: Any, what: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        # The error may quote the value: not kept as the cause.
        raise SearchError(f"{what} cannot be written as JSON", "use text, finite numbers, lists") from None
    # An escaped NUL, but not the six characters themselves after an escaped backslash.
    if re.search(r"(?<!\\)(?:\\\\)*\\u0000", text):
        raise SearchError(f"{what} hold a NUL character, which jsonb cannot store", "take it out first")
    return _storable(text, what)


def _label(engine: Engine) -> str:
    url = engine.url
    host = f"[{url.host}]" if ":" in (url.host or "") else url.host
    return f"{url.username}@{host}:{url.port or DEFAULT_PORT}/{url.database}"


# SQLSTATE -> what is wrong, and what to type next. {table} is the table's name.
_REFUSALS: dict[str, tuple[str, str]] = {
    "42P01": ("the table {table} does not exist", "run: alembic upgrade head, or check PGVECTOR_TABLE"),
    "3F000": ("pgvector's schema for {table} has moved", "try again"),
    "42703": ("{table} lacks a column that the settings name", "check PGVECTOR_COL_*"),
    "42501": (
        "this role may not do this on {table}",
        "GRANT SELECT, INSERT, DELETE, and USAGE on the schemas",
    ),
    "22000": ("the embeddings in {table} have other dimensions", "EMBEDDING_DIMENSIONS must be the column's"),
    "23502": ("{table} has a further column that must not be null", "give that column a default"),
    "23505": ("{table} has a row with this key already", "delete that row first, or give another id"),
    "25006": ("the server is read-only, so {table} was not changed", "connect to the primary"),
    "42704": (
        "pgvector's types do not fit {table}, or have moved",
        "try again, or ALTER EXTENSION vector UPDATE",
    ),
    "42883": ("pgvector's operators do not fit {table}", "PGVECTOR_COL_VECTOR must name a vector column"),
    "57014": ("the statement on {table} was cancelled", "see statement_timeout of this role and database"),
}
_CONFLICTS = ("40001", "40P01", "55P03")
# Shutting down, starting up, no connection left; class 08 are connection errors.
_UNREACHABLE = ("57P01", "57P02", "57P03", "53300")
_STARTING = ("starting up", "shutting down", "too many", "remaining connection slots", "recovery mode")


# Unknown type, operator or schema: pgvector may stand elsewhere now, so the next call looks it up again.
_MOVED = ("42", "3F")
# The driver's message quotes the row (22, 23: DETAIL) or the statement with its parameters (42: LINE 1).
_QUOTING = ("22", "23", "42", "P0")


def _sqlstate(error: SQLAlchemyError) -> str:
    """Return the SQLSTATE of psycopg2 (``pgcode``) or psycopg 3 (``sqlstate``), or an empty text."""
    driver_error = error.orig if isinstance(error, DBAPIError) else None
    return getattr(driver_error, "pgcode", None) or getattr(driver_error, "sqlstate", None) or ""


def _translated(error: SQLAlchemyError, name: str, where: str) -> PipelineError:
    """Turn an error of SQLAlchemy into ours, without the server's own words: they may hold a row."""
    if isinstance(error, PoolTimeoutError):
        return UnreachableError(f"no connection to {where} came free", "raise the engine's pool_size, or try again")
    code = _sqlstate(error)
    if code in _REFUSALS:
        fact, hint = _REFUSALS[code]
        return StatementError(" in ".join((fact.format(table=name), where)), hint)
    if code in _CONFLICTS:
        return ConflictError(f"another transaction stood in the way on {name} in {where}", "try again")
    lost = isinstance(error, DBAPIError) and error.connection_invalidated
    if lost or code in _UNREACHABLE or code.startswith("08"):
        return UnreachableError(f"the connection to {where} was lost", "try again when the server is up")
    if code:
        return StatementError(f"{where} refused a statement on {name} (SQLSTATE {code})", "see the server's log")
    # The second is libpq's own, where the server asks for a password and there is none.
    driver_error = error.orig if isinstance(error, DBAPIError) else None
    if any(words in str(driver_error) for words in ("FATAL", "no password supplied")):
        return _turned_down(str(driver_error), where)
    if driver_error is not None:
        return UnreachableError(f"{where} cannot be reached", "check host, port, network and DB_SSL, and that it runs")
    return StatementError(f"SQLAlchemy could not run a statement on {name} ({type(error).__name__})")


def _turned_down(message: str, where: str) -> PipelineError:
    """Translate a server's answer to a connection attempt: it carries no SQLSTATE in psycopg2."""
    if any(words in message for words in _STARTING):
        return UnreachableError(f"{where} takes no connections now", "try again when the server is up")
    return RejectedError(f"{where} turned the connection down", "check user, password, database and pg_hba.conf")
