"""The settings: environment and ``.env`` to endpoints and the table mapping. Opens no connection."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.endpoints import (
    DEFAULT_PORT,
    Endpoint,
    Secret,
    boolean,
    endpoint_from_url,
    endpoint_from_variables,
    required_text,
    unusable,
    whole_number,
)
from pipeline.envfile import Value, read_env_file
from pipeline.errors import SettingsError

DEFAULT_SCHEMA = "public"
DEFAULT_DIMENSIONS = 768
# pgvector's own limit for the types vector and halfvec.
MAX_DIMENSIONS = 16_000
# NAMEDATALEN - 1: the server cuts longer names silently.
MAX_IDENTIFIER_BYTES = 63

# Every variable that is read, with its default (None: unset). The order is the order of display.
DEFAULTS: dict[str, str | None] = {
    "DB_HOST": None,
    "DB_PORT": str(DEFAULT_PORT),
    "DB_USER": None,
    "DB_PASSWORD": None,
    "DB_NAME": None,
    "DB_SSL": None,
    "DB_SSLROOTCERT": None,
    "PGVECTOR_HOST": None,
    "PGVECTOR_PORT": str(DEFAULT_PORT),
    "PGVECTOR_USER": None,
    "PGVECTOR_PASSWORD": None,
    "PGVECTOR_DB": None,
    "PGVECTOR_SSL": None,
    "PGVECTOR_SSLROOTCERT": None,
    "LEGACY_HOST": None,
    "LEGACY_PORT": str(DEFAULT_PORT),
    "LEGACY_USER": None,
    "LEGACY_PASSWORD": None,
    "LEGACY_DB": None,
    "LEGACY_SSL": None,
    "LEGACY_SSLROOTCERT": None,
    "PGVECTOR_TABLE": "embeddings",
    "PGVECTOR_COL_ID": "id",
    "PGVECTOR_COL_CONTENT": "content",
    "PGVECTOR_COL_METADATA": "metadata",
    "PGVECTOR_COL_VECTOR": "embedding",
    "EMBEDDING_DIMENSIONS": str(DEFAULT_DIMENSIONS),
    "OLLAMA_BASE_URL": "http://localhost:11434",
    "OLLAMA_EMBEDDINGS_MODEL": "nomic-embed-text",
    "USE_MOCK_EMBEDDINGS": "false",
}
SECRET_VARIABLES = frozenset(name for name in DEFAULTS if name.endswith("_PASSWORD"))
_COLUMN_VARIABLES = {
    "id": "PGVECTOR_COL_ID",
    "content": "PGVECTOR_COL_CONTENT",
    "metadata": "PGVECTOR_COL_METADATA",
    "embedding": "PGVECTOR_COL_VECTOR",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TableMapping:
    """The table's schema and name, and the names of its four columns, as they stand in the catalog."""

    schema: str = DEFAULT_SCHEMA
    table: str = "embeddings"
    id: str = "id"
    content: str = "content"
    metadata: str = "metadata"
    embedding: str = "embedding"

    @property
    def columns(self) -> tuple[str, str, str, str]:
        """Return the four column names: id, content, metadata, embedding."""
        return (self.id, self.content, self.metadata, self.embedding)

    @property
    def qualified(self) -> str:
        """Return ``schema.table`` for people; SQL is composed from the parts."""
        return f"{self.schema}.{self.table}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """From where to where, which table, and the dimension of its vectors on the target.

    ``ignore_columns`` of the source are left behind, and not compared. With ``rounding`` a vector may
    become a halfvec.
    """

    source: Endpoint
    target: Endpoint
    table: TableMapping
    dimensions: int
    ignore_columns: tuple[str, ...] = ()
    rounding: bool = False

    @property
    def labels(self) -> tuple[str, str]:
        """Return both addresses, as they may be shown and stored."""
        return self.source.label, self.target.label


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """One variable as ``pipeline settings`` shows it. ``shown`` never holds a secret."""

    variable: str
    shown: str
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings, read once. Endpoints are resolved when they are asked for."""

    table: TableMapping
    dimensions: int
    ollama_url: str
    ollama_model: str
    use_mock: bool
    values: Mapping[str, Value] = field(repr=False)

    @classmethod
    def load(
        cls, env_file: Path | Sequence[Path] | None = None, environ: Mapping[str, str] | None = None
    ) -> "Settings":
        """Read the environment, then ``env_file`` (default: ``.env`` here, if there is one).

        Of several files the first one that has a variable counts. Raises SettingsError with the file, line and
        variable of the first unusable value.
        """
        files = [env_file] if isinstance(env_file, Path) else list(env_file or ())
        values = _read_values(files, os.environ if environ is None else environ)
        url = required_text(values, "OLLAMA_BASE_URL", DEFAULTS["OLLAMA_BASE_URL"]).rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise unusable(values, "OLLAMA_BASE_URL", "is not an http:// or https:// address")
        return cls(
            table=_table_mapping(values),
            dimensions=whole_number(values, "EMBEDDING_DIMENSIONS", 1, MAX_DIMENSIONS, str(DEFAULT_DIMENSIONS)),
            ollama_url=url,
            ollama_model=required_text(values, "OLLAMA_EMBEDDINGS_MODEL", DEFAULTS["OLLAMA_EMBEDDINGS_MODEL"]),
            use_mock=boolean(values, "USE_MOCK_EMBEDDINGS", DEFAULTS["USE_MOCK_EMBEDDINGS"]),
            values=values,
        )

    def endpoint(self, name: str) -> Endpoint:
        """Resolve ``legacy``, ``main`` or a ``postgresql://`` URL without a password.

        ``legacy`` is read from ``LEGACY_*`` where any of these is set, else from ``PGVECTOR_*``;
        the two groups are never mixed. Raises SettingsError.
        """
        if name == "main":
            return endpoint_from_variables(self.values, name, "DB", "DB_NAME")
        if name == "legacy":
            prefix = self.legacy_prefix
            return endpoint_from_variables(self.values, name, prefix, f"{prefix}_DB")
        if "://" in name:
            return endpoint_from_url(name)
        raise SettingsError(
            # Only a plain word is repeated: anything else may be a connection string with a password.
            f"there is no endpoint named {name}"
            if re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name)
            else "this is not an endpoint's name",
            "say legacy, main, or postgresql://user@host:port/database",
        )

    def application(self) -> Endpoint:
        """Return where the application searches: ``PGVECTOR_*``, legacy before the switch and main after it.

        Raises SettingsError.
        """
        return endpoint_from_variables(self.values, "the application", "PGVECTOR", "PGVECTOR_DB")

    def route(self, source: str, target: str, ignore_columns: tuple[str, ...] = (), *, rounding: bool = False) -> Route:
        """Resolve both ends of a move. Raises SettingsError."""
        return Route(
            source=self.endpoint(source),
            target=self.endpoint(target),
            table=self.table,
            dimensions=self.dimensions,
            ignore_columns=ignore_columns,
            rounding=rounding,
        )

    @property
    def legacy_prefix(self) -> str:
        """Return the group of variables that describes legacy: ``LEGACY`` or ``PGVECTOR``."""
        return "LEGACY" if any(name.startswith("LEGACY_") for name in self.values) else "PGVECTOR"

    def origins(self) -> Iterator[Origin]:
        """Yield every variable with its value (secrets hidden) and where it came from."""
        for name, default in DEFAULTS.items():
            value = self.values.get(name)
            if value is None:
                yield Origin(variable=name, shown=default or "", where="default" if default else "not set")
            else:
                hidden = name in SECRET_VARIABLES and value.text
                shown = str(Secret(value.text)) if hidden else _without_userinfo(value.text)
                yield Origin(variable=name, shown=shown, where=value.where)


def _without_userinfo(text: str) -> str:
    """Hide the user part of an address: people put tokens into OLLAMA_BASE_URL too."""
    return re.sub(r"(?<=://).*@", "********@", text, flags=re.DOTALL)


def _read_values(env_files: Sequence[Path], environ: Mapping[str, str]) -> dict[str, Value]:
    default = Path(".env")
    values: dict[str, Value] = {}
    for path in reversed(env_files or ([default] if default.is_file() else [])):
        values |= read_env_file(path)
    values = {name: value for name, value in values.items() if name in DEFAULTS}
    for name in DEFAULTS:
        if name in environ:
            values[name] = Value(text=environ[name], where="environment")
    for name, value in values.items():
        if "\0" in value.text:
            raise unusable(values, name, "holds a NUL character")
        # The environment's bytes that are not UTF-8 arrive as lone surrogates.
        if any("\ud800" <= character <= "\udfff" for character in value.text):
            raise unusable(values, name, "is not UTF-8")
    return values


def check_identifier(name: str) -> str | None:
    """Return why ``name`` cannot be the name of a table or column, or None where it can."""
    if not name:
        return "is empty"
    if "\0" in name:
        return "holds a NUL character"
    if len(name.encode()) > MAX_IDENTIFIER_BYTES:
        return f"is longer than {MAX_IDENTIFIER_BYTES} bytes"
    return None


def _table_mapping(values: Mapping[str, Value]) -> TableMapping:
    names = {part: required_text(values, variable, DEFAULTS[variable]) for part, variable in _COLUMN_VARIABLES.items()}
    for part, name in names.items():
        variable = _COLUMN_VARIABLES[part]
        if wrong := check_identifier(name):
            raise unusable(values, variable, wrong)
        if list(names.values()).count(name) > 1:
            raise unusable(values, variable, "names a column that another variable names too")
    schema, table = _split_table(values)
    return TableMapping(schema=schema, table=table, **names)


def _split_table(values: Mapping[str, Value]) -> tuple[str, str]:
    """Split ``table``, ``schema.table`` or ``"Schema"."Table"`` (quotes only to protect dots and quotes)."""
    text = required_text(values, "PGVECTOR_TABLE", DEFAULTS["PGVECTOR_TABLE"]).strip()
    part = r'(?:"(?:[^"]|"")+"|[^".]+)'
    if not re.fullmatch(rf"{part}(?:\.{part})?", text):
        hint = 'write table, schema.table or "Schema"."Table"'
        raise unusable(values, "PGVECTOR_TABLE", "is not a table name", hint)
    parts = [p[1:-1].replace('""', '"') if p.startswith('"') else p for p in re.findall(part, text)]
    for name in parts:
        if wrong := check_identifier(name):
            raise unusable(values, "PGVECTOR_TABLE", wrong)
    return (parts[0], parts[1]) if len(parts) == 2 else (DEFAULT_SCHEMA, parts[0])
