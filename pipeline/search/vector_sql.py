"""What the repository says in SQL: types by their schema, distances, pgvector's settings, values as text."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.types import UserDefinedType

from pipeline.search.embedders import LARGEST_COMPONENT
from pipeline.search.failures import SearchError
from pipeline.search.table import MAX_INDEXED_HALFVEC, MAX_INDEXED_VECTOR, HalfVector, Vector

# halfvec's largest number.
LARGEST_HALF = 65_504.0
# pgvector: default and upper limit of hnsw.ef_search, the most rows that one pass over the graph returns.
DEFAULT_EF_SEARCH = 40
MAX_EF_SEARCH = 1_000

Metric = Literal["cosine", "l2", "inner_product"]
_OPERATORS: dict[Metric, str] = {"cosine": "<=>", "l2": "<->", "inner_product": "<#>"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """pgvector as a database has it: the schema of its types and operators, its version as numbers."""

    schema: str
    version: tuple[int, ...]


_extensions: WeakKeyDictionary[sa.Engine, Extension] = WeakKeyDictionary()


def find_extension(engine: sa.Engine, connection: sa.Connection, where: str) -> Extension:
    """Look pgvector's schema and version up, once per engine. Raises SearchError where there is none."""
    if (known := _extensions.get(engine)) is not None:
        return known
    extension = sa.table(
        "pg_extension", sa.column("extname"), sa.column("extversion"), sa.column("extnamespace"), schema="pg_catalog"
    )
    namespace = sa.table("pg_namespace", sa.column("oid"), sa.column("nspname"), schema="pg_catalog")
    same = namespace.c.oid.bool_op("OPERATOR(pg_catalog.=)")(extension.c.extnamespace)
    is_vector = extension.c.extname.bool_op("OPERATOR(pg_catalog.=)")(sa.literal("vector", sa.Text()))
    row = connection.execute(
        sa.select(namespace.c.nspname, extension.c.extversion).join_from(extension, namespace, same).where(is_vector)
    ).first()
    if row is None:
        raise SearchError(f"pgvector is not installed in {where}", "run: alembic upgrade head")
    version = tuple(int(part) for part in re.findall(r"\d+", row.extversion))
    return _extensions.setdefault(engine, Extension(schema=row.nspname, version=version))


def forget_extension(engine: sa.Engine) -> None:
    """Let the next ``find_extension`` look again."""
    _extensions.pop(engine, None)


def planner_statement(extension: Extension, limit: int, *, exact: bool) -> sa.Select[Any]:
    """Set what the next search of this transaction needs, by ``set_config(..., is_local)``.

    The literal loads the library while the statement is parsed: until then its settings are
    placeholders, and one that an old release does not know would be taken in silence.
    """
    changes: list[tuple[str, Any]] = []
    if exact:
        # Both: where the application has switched sequential scans off, they would weigh the same.
        changes.append(("enable_seqscan", sa.literal("on", sa.Text())))
        changes.append(("enable_indexscan", sa.literal("off", sa.Text())))
    elif extension.version >= (0, 5):
        if limit > DEFAULT_EF_SEARCH:
            # The application may have set more for itself: never lowered.
            current = sa.cast(sa.func.pg_catalog.current_setting("hnsw.ef_search"), sa.Integer)
            wanted = sa.func.greatest(current, min(limit, MAX_EF_SEARCH))
            changes.append(("hnsw.ef_search", sa.cast(wanted, sa.String)))
        if extension.version >= (0, 8):
            # Not strict_order: that drops every row nearer than one that it has returned already
            # (at 256 dimensions, 2,970 of 3,000 came back; by relaxed_order all of them).
            changes.append(("hnsw.iterative_scan", sa.literal("relaxed_order", sa.Text())))
    return sa.select(
        sa.cast(sa.literal_column("'[1]'"), Vector(schema=extension.schema)).label("loaded"),
        *(sa.func.pg_catalog.set_config(name, value, True) for name, value in changes),
    )


class CatalogType(UserDefinedType[Any]):
    """A type of ``pg_catalog`` by name, whatever types of that name ``search_path`` holds."""

    cache_ok = True

    def __init__(self, type_name: str) -> None:
        """Take the name as SQL writes it: a constant of the code, ``[]`` for an array."""
        self.type_name = type_name

    def get_col_spec(self, **_: Any) -> str:
        """Return the qualified name."""
        return "".join(("pg_catalog.", self.type_name))


class Distance(sa.ColumnElement[float]):
    """``stored OPERATOR(schema.symbol) CAST(query AS type)``, by the operator of the type's schema."""

    inherit_cache = False

    def __init__(
        self, stored: sa.ColumnElement[Any], query: sa.ColumnElement[str], as_type: Vector | HalfVector, metric: Metric
    ) -> None:
        """Take a column or expression of ``as_type``, and the query as text."""
        self.type = sa.Float()
        self.stored = stored
        self.schema = as_type.schema
        self.symbol = _OPERATORS[metric]
        self.query: sa.Cast[Any] = sa.cast(query, as_type)


@compiles(Distance)
def _compile_distance(element: Distance, compiler: SQLCompiler, **options: Any) -> str:
    stored = compiler.process(element.stored, **options)
    operator = ".".join((compiler.preparer.quote_identifier(element.schema), element.symbol))
    return "".join((stored, " OPERATOR(", operator, ") ", compiler.process(element.query, **options)))


def is_indexed_by_half(dimensions: int) -> bool:
    """Return whether an HNSW index can hold so many dimensions as halfvec only."""
    return MAX_INDEXED_VECTOR < dimensions <= MAX_INDEXED_HALFVEC


def vector_text(vector: Sequence[float], dimensions: int, what: str) -> str:
    """Return ``vector`` as pgvector reads it. Raises SearchError, which calls it ``what``."""
    if len(vector) != dimensions:
        raise SearchError(
            f"{what} has {len(vector)} dimensions, not {dimensions}",
            "EMBEDDING_DIMENSIONS, the model and the column must agree",
        )
    numbers = [float(number) for number in vector]
    largest = LARGEST_HALF if is_indexed_by_half(dimensions) else LARGEST_COMPONENT
    if not all(isfinite(number) and abs(number) <= largest for number in numbers):
        raise SearchError(f"{what} holds a number that is not finite, or too large", "embed it again")
    return "".join(("[", ",".join(map(repr, numbers)), "]"))


def query_text(vector: Sequence[float], dimensions: int, metric: Metric) -> str:
    """Return the vector of a search as pgvector reads it. Raises SearchError, also where it has no distance."""
    text = vector_text(vector, dimensions, "the query vector")
    if metric == "cosine" and not any(vector):
        raise SearchError("the query vector is zero and has no cosine distance", "embed another text")
    return text


def storable_text(text: str, what: str) -> str:
    """Return ``text`` as it is. Raises SearchError where PostgreSQL cannot hold it."""
    if "\0" in text:
        raise SearchError(f"{what} holds a NUL character, which PostgreSQL cannot store", "take it out first")
    try:
        text.encode()
    except UnicodeEncodeError:
        # The error holds the text itself: not kept as the cause.
        raise SearchError(f"{what} holds half a surrogate pair, which is not Unicode", "clean it first") from None
    return text


def json_text(value: Any, what: str) -> str:
    """Return ``value`` as JSON that jsonb can hold. Raises SearchError, which calls it ``what``."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        # The error may quote the value: not kept as the cause.
        raise SearchError(f"{what} cannot be written as JSON", "use text, finite numbers, lists") from None
    # An escaped NUL, but not the six characters themselves after an escaped backslash.
    if re.search(r"(?<!\\)(?:\\\\)*\\u0000", text):
        raise SearchError(f"{what} hold a NUL character, which jsonb cannot store", "take it out first")
    return storable_text(text, what)


def filter_texts(wanted: Mapping[str, Any]) -> list[list[str]]:
    """Return of each key of a filter the JSON objects of which the metadata must contain one. Raises SearchError."""
    return [
        [json_text({key: one}, f"the filter's value of {key!r}") for one in _choices(value)]
        for key, value in wanted.items()
    ]


def _choices(value: Any) -> Collection[Any]:
    return value if isinstance(value, list | tuple | set | frozenset) else (value,)
