"""Endpoints: a database's address and secret, from a group of variables or a URL; and how one variable is read."""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from pipeline.envfile import Value
from pipeline.errors import SettingsError

SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
DEFAULT_PORT = 5432
_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})
# The pass of our own write transactions, where an endpoint has no other one: see postgres/fence.py.
DEFAULT_PASS = "pipeline"
# So that it stands in a statement as it is.
_PASS = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_URL_HINT = "write postgresql://user@host:port/database, with ?sslmode= and ?sslrootcert= where wanted"


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

    ``password`` is None where libpq's own ways (``.pgpass``, ``PGPASSFILE``) apply. ``through`` is the
    pass that write transactions show to a fence, None for the one of every command.
    """

    name: str
    host: str
    port: int
    user: str
    database: str
    password: Secret | None = None
    sslmode: str = "prefer"
    sslrootcert: str | None = None
    through: str | None = None

    def __post_init__(self) -> None:
        if self.through is not None:
            check_pass(self.through)

    @property
    def label(self) -> str:
        """Return ``user@host:port/database``: what may be shown, logged and stored."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.user}@{host}:{self.port}/{self.database}"

    @property
    def place(self) -> tuple[str, int, str]:
        """Return where the database is, whoever asks for it; this machine has several names."""
        host = self.host if self.host.startswith(("/", "@")) else _folded(self.host)
        return host, self.port, self.database

    @property
    def is_local(self) -> bool:
        """Return whether the host is a Unix socket or a loopback address."""
        if self.host.startswith(("/", "@")) or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def _folded(host: str) -> str:
    name = host.lower().rstrip(".")
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name
    return "localhost" if address.is_loopback else str(address)


def check_pass(through: str) -> None:
    """Raise ValueError where a text cannot be the pass through a fence."""
    if _PASS.fullmatch(through) is None:
        raise ValueError(f"{through!r} is no pass: small letters, digits, and . _ - between them")


def endpoint_from_variables(values: Mapping[str, Value], name: str, prefix: str, database: str) -> Endpoint:
    """Read the group of variables ``PREFIX_*``; ``database`` is the variable of the database's name.

    Raises SettingsError with the variable that is missing or unusable, and where it was set.
    """
    rootcert = optional_text(values, f"{prefix}_SSLROOTCERT")
    password = optional_text(values, f"{prefix}_PASSWORD")
    return Endpoint(
        name=name,
        host=_host(values, f"{prefix}_HOST"),
        port=whole_number(values, f"{prefix}_PORT", 1, 65535, str(DEFAULT_PORT)),
        user=required_text(values, f"{prefix}_USER"),
        database=required_text(values, database),
        password=None if password is None else Secret(password),
        sslmode=_ssl_mode(values, f"{prefix}_SSL", rootcert),
        sslrootcert=rootcert,
    )


def _host(values: Mapping[str, Value], name: str) -> str:
    """Return a host name, address or socket folder: whatever it is, it will be shown in every label."""
    text = required_text(values, name).strip()
    if not text.startswith(("/", "@")) and re.search(r"[/@=\s]", text):
        raise unusable(
            values, name, "is not a host name", f"give the name alone; port and user have their own {name[:-4]}*"
        )
    return text


def _ssl_mode(values: Mapping[str, Value], name: str, rootcert: str | None) -> str:
    # Whoever names the certificate alone wants it to be checked.
    text = (optional_text(values, name) or ("true" if rootcert else "false")).strip().lower()
    if text in _TRUE:
        return "verify-full" if rootcert else "require"
    if text in _FALSE:
        return "prefer"
    if text not in SSL_MODES:
        hint = f"the modes are {', '.join(SSL_MODES)}"
        raise unusable(values, name, "is neither true, false nor an SSL mode", hint)
    return text


def endpoint_from_url(url: str) -> Endpoint:
    """Parse ``postgresql://user@host:port/database``, with ``sslmode``, ``sslrootcert`` and ``host`` as options.

    By our own rules: the driver's messages quote what may be a password. Raises SettingsError, which
    quotes nothing but the name of an unknown option; a URL with a password is refused.
    """
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


def unusable(values: Mapping[str, Value], name: str, what: str, hint: str = "") -> SettingsError:
    """Return the error that names the variable and where its value came from, never the value."""
    where = values[name].where if name in values else "default"
    return SettingsError(f"{name} ({where}) {what}", hint or "pipeline settings shows every value and its place")


def required_text(values: Mapping[str, Value], name: str, default: str | None = None) -> str:
    """Return a value, or ``default`` where it is not set; never an empty one. Raises SettingsError."""
    value = values.get(name)
    if value is None:
        if default is None:
            raise SettingsError(f"{name} is not set", f"set {name} in the environment or in .env")
        return default
    if not value.text.strip():
        raise unusable(values, name, "is empty", f"give {name} a value, or take the line out")
    return value.text


def optional_text(values: Mapping[str, Value], name: str) -> str | None:
    """Return a value, or None where it is not set or empty."""
    value = values.get(name)
    return value.text if value is not None and value.text else None


def whole_number(values: Mapping[str, Value], name: str, low: int, high: int, default: str | None = None) -> int:
    """Return a whole number from ``low`` to ``high``. Raises SettingsError."""
    text = required_text(values, name, default).strip()
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise unusable(values, name, f"is not a whole number from {low} to {high}")
    return int(text)


def boolean(values: Mapping[str, Value], name: str, default: str | None = None) -> bool:
    """Return true or false, in any of their usual spellings. Raises SettingsError."""
    text = required_text(values, name, default).strip().lower()
    if text not in _TRUE | _FALSE:
        raise unusable(values, name, "is neither true nor false")
    return text in _TRUE
