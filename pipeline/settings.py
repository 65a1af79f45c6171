"""The settings: environment and ``.env`` to endpoints and the table mapping. Opens no connection."""

import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from pipeline.envfile import Value, read_env_file
from pipeline.errors import SettingsError

SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
DEFAULT_PORT = 5432
DEFAULT_SCHEMA = "public"
DEFAULT_DIMENSIONS = 768
# pgvector's own limit for the types vector and halfvec.
MAX_DIMENSIONS = 16_000
# NAMEDATALEN - 1: the server cuts longer names silently.
MAX_IDENTIFIER_BYTES = 63
ENDPOINT_NAMES = ("legacy", "main")

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
_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})


class Secret:
    """Hold a text that no repr, str, format, log or pickle shows."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the text itself, for the one call that connects."""
        return self._text

    def __repr__(self) -> str:
        return "Secret(********)"

    def __str__(self) -> str:
        return "********"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a secret is not pickled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A PostgreSQL database by name: ``legacy``, ``main``, or ``url``.

    ``password`` is None where libpq's own ways (``.pgpass``, ``PGPASSFILE``) apply.
    """

    name: str
    host: str
    port: int
    user: str
    database: str
    password: Secret | None = None
    sslmode: str = "prefer"
    sslrootcert: str | None = None

    @property
    def label(self) -> str:
        """Return ``user@host:port/database``: what may be shown, logged and stored."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.user}@{host}:{self.port}/{self.database}"

    @property
    def is_local(self) -> bool:
        """Return whether the host is a Unix socket or a loopback address."""
        if self.host.startswith(("/", "@")) or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


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
    def load(cls, env_file: Path | None = None, environ: Mapping[str, str] | None = None) -> "Settings":
        """Read the environment, then ``env_file`` (default: ``.env`` here, if there is one).

        Raises SettingsError with the file, line and variable of the first unusable value.
        """
        values = _read_values(env_file, os.environ if environ is None else environ)
        url = _text(values, "OLLAMA_BASE_URL").rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise _bad(values, "OLLAMA_BASE_URL", "is not an http:// or https:// address")
        return cls(
            table=_table_mapping(values),
            dimensions=_integer(values, "EMBEDDING_DIMENSIONS", 1, MAX_DIMENSIONS),
            ollama_url=url,
            ollama_model=_text(values, "OLLAMA_EMBEDDINGS_MODEL"),
            use_mock=_boolean(values, "USE_MOCK_EMBEDDINGS"),
            values=values,
        )

    def endpoint(self, name: str) -> Endpoint:
        """Resolve ``legacy``, ``main`` or a ``postgresql://`` URL without a password.

        ``legacy`` is read from ``LEGACY_*`` where any of these is set, else from ``PGVECTOR_*``;
        the two groups are never mixed. Raises SettingsError.
        """
        if name == "main":
            return _endpoint(self.values, name, "DB", "DB_NAME")
        if name == "legacy":
            prefix = self.legacy_prefix
            return _endpoint(self.values, name, prefix, f"{prefix}_DB")
        if "://" in name:
            return _endpoint_from_url(name)
        raise SettingsError(
            # Only a plain word is repeated: anything else may be a connection string with a password.
            f"there is no endpoint named {name}"
            if re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name)
            else "this is not an endpoint's name",
            "say legacy, main, or postgresql://user@host:port/database",
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


def _read_values(env_file: Path | None, environ: Mapping[str, str]) -> dict[str, Value]:
    path = env_file or Path(".env")
    values = read_env_file(path) if env_file is not None or path.is_file() else {}
    values = {name: value for name, value in values.items() if name in DEFAULTS}
    for name in DEFAULTS:
        if name in environ:
            values[name] = Value(text=environ[name], where="environment")
    for name, value in values.items():
        if "\0" in value.text:
            raise _bad(values, name, "holds a NUL character")
        # The environment's bytes that are not UTF-8 arrive as lone surrogates.
        if any("\ud800" <= character <= "\udfff" for character in value.text):
            raise _bad(values, name, "is not UTF-8")
    return values


def _bad(values: Mapping[str, Value], name: str, what: str, hint: str = "") -> SettingsError:
    where = values[name].where if name in values else "default"
    return SettingsError(f"{name} ({where}) {what}", hint or "pipeline settings shows every value and its place")


def _text(values: Mapping[str, Value], name: str) -> str:
    """Return a required value, or its default where it is not set; never an empty one."""
    value = values.get(name)
    if value is None:
        default = DEFAULTS[name]
        if default is None:
            raise SettingsError(f"{name} is not set", f"set {name} in the environment or in .env")
        return default
    if not value.text.strip():
        raise _bad(values, name, "is empty", f"give {name} a value, or take the line out")
    return value.text


def _optional(values: Mapping[str, Value], name: str) -> str | None:
    value = values.get(name)
    return value.text if value is not None and value.text else None


def _integer(values: Mapping[str, Value], name: str, low: int, high: int) -> int:
    text = _text(values, name).strip()
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise _bad(values, name, f"is not a whole number from {low} to {high}")
    return int(text)


def _boolean(values: Mapping[str, Value], name: str) -> bool:
    text = _text(values, name).strip().lower()
    if text not in _TRUE | _FALSE:
        raise _bad(values, name, "is neither true nor false")
    return text in _TRUE


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
    names = {
        part: _text(values, f"PGVECTOR_COL_{variable}")
        for part, variable in (
            ("id", "ID"),
            ("content", "CONTENT"),
            ("metadata", "METADATA"),
            ("embedding", "VECTOR"),
        )
    }
    for part, name in names.items():
        variable = f"PGVECTOR_COL_{'VECTOR' if part == 'embedding' else part.upper()}"
        if wrong := check_identifier(name):
            raise _bad(values, variable, wrong)
        if list(names.values()).count(name) > 1:
            raise _bad(values, variable, "names a column that another variable names too")
    schema, table = _split_table(values)
    return TableMapping(schema=schema, table=table, **names)


def _split_table(values: Mapping[str, Value]) -> tuple[str, str]:
    """Split ``table``, ``schema.table`` or ``"Schema"."Table"`` (quotes only to protect dots and quotes)."""
    text = _text(values, "PGVECTOR_TABLE").strip()
    part = r'(?:"(?:[^"]|"")+"|[^".]+)'
    if not re.fullmatch(rf"{part}(?:\.{part})?", text):
        hint = 'write table, schema.table or "Schema"."Table"'
        raise _bad(values, "PGVECTOR_TABLE", "is not a table name", hint)
    parts = [p[1:-1].replace('""', '"') if p.startswith('"') else p for p in re.findall(part, text)]
    for name in parts:
        if wrong := check_identifier(name):
            raise _bad(values, "PGVECTOR_TABLE", wrong)
    return (parts[0], parts[1]) if len(parts) == 2 else (DEFAULT_SCHEMA, parts[0])


def _endpoint(values: Mapping[str, Value], name: str, prefix: str, database: str) -> Endpoint:
    rootcert = _optional(values, f"{prefix}_SSLROOTCERT")
    password = _optional(values, f"{prefix}_PASSWORD")
    return Endpoint(
        name=name,
        host=_host(values, f"{prefix}_HOST"),
        port=_integer(values, f"{prefix}_PORT", 1, 65535),
        user=_text(values, f"{prefix}_USER"),
        database=_text(values, database),
        password=None if password is None else Secret(password),
        sslmode=_ssl_mode(values, f"{prefix}_SSL", rootcert),
        sslrootcert=rootcert,
    )


def _host(values: Mapping[str, Value], name: str) -> str:
    """Return a host name, address or socket folder: whatever it is, it will be shown in every label."""
    text = _text(values, name).strip()
    if not text.startswith(("/", "@")) and re.search(r"[/@=\s]", text):
        raise _bad(
            values, name, "is not a host name", f"give the name alone; port and user have their own {name[:-4]}*"
        )
    return text


def _ssl_mode(values: Mapping[str, Value], name: str, rootcert: str | None) -> str:
    # Whoever names the certificate alone wants it to be checked.
    text = (_optional(values, name) or ("true" if rootcert else "false")).strip().lower()
    if text in _TRUE:
        return "verify-full" if rootcert else "require"
    if text in _FALSE:
        return "prefer"
    if text not in SSL_MODES:
        hint = f"the modes are {', '.join(SSL_MODES)}"
        raise _bad(values, name, "is neither true, false nor an SSL mode", hint)
    return text


def _endpoint_from_url(url: str) -> Endpoint:
    """Parse a URL by our own rules: the driver's messages quote what may be a password."""
    try:
        parts = urlsplit(url)
        port = DEFAULT_PORT if parts.port is None else parts.port
        options = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query), errors="strict")
        host, user, database = (
            unquote(text, errors="strict")
            for text in (_url_host(parts), parts.username or "", parts.path.removeprefix("/"))
        )
    except ValueError:
        # The standard library's messages quote what they could not read: not kept as the cause.
        raise SettingsError("the URL cannot be read", _URL_HINT) from None
    query = dict(options)
    _check_url(parts, query)
    if len(options) > len(query) or (host and "host" in query):
        raise SettingsError("the URL says something twice", _URL_HINT)
    host = host or query.get("host", "")
    for what, value in (("host", host), ("user", user), ("database", database)):
        if not value or "\0" in value:
            raise SettingsError(f"the URL names no {what}", _URL_HINT)
    if unknown := set(query) - {"sslmode", "sslrootcert", "host"}:
        raise SettingsError(f"the URL's option {sorted(unknown)[0]!r} is not known here", _URL_HINT)
    rootcert = query.get("sslrootcert") or None
    sslmode = query.get("sslmode", "verify-full" if rootcert else "prefer")
    if sslmode not in SSL_MODES:
        raise SettingsError("the URL's sslmode is unknown", f"the modes are {', '.join(SSL_MODES)}")
    if not port:
        raise SettingsError("the URL's port is not from 1 to 65535", _URL_HINT)
    return Endpoint(
        name="url", host=host, port=port, user=user, database=database, sslmode=sslmode, sslrootcert=rootcert
    )


_URL_HINT = "write postgresql://user@host:port/database, with ?sslmode= and ?sslrootcert= where wanted"


def _url_host(parts: SplitResult) -> str:
    """Return the host in its own case: ``hostname`` is folded, and would name another socket folder."""
    text = parts.netloc.rpartition("@")[2]
    return text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]


def _check_url(parts: SplitResult, query: Mapping[str, str]) -> None:
    if parts.scheme not in ("postgresql", "postgres", "postgresql+psycopg2"):
        raise SettingsError("the URL does not begin with postgresql://", _URL_HINT)
    if parts.password is not None or "password" in query:
        raise SettingsError(
            "the URL holds a password, and a command line can be read by every user of this machine",
            "leave it out and put it into ~/.pgpass, or set DB_* or PGVECTOR_* and say main or legacy",
        )
    if parts.fragment:
        raise SettingsError("the URL has a part after #", _URL_HINT)
