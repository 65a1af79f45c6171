"""What a database's failure means to whoever searches: SQLAlchemy's errors as ours, with no word of a row."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from pipeline.endpoints import DEFAULT_PORT
from pipeline.errors import (
    ConflictError,
    PipelineError,
    RejectedError,
    StatementError,
    UnreachableError,
)

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


class SearchError(PipelineError):
    """A search or a write was asked for that cannot be carried out: vector, filter, document or id."""


def label(engine: Engine) -> str:
    """Return ``user@host:port/database``, as an endpoint's label."""
    url = engine.url
    host = f"[{url.host}]" if ":" in (url.host or "") else url.host
    return f"{url.username}@{host}:{url.port or DEFAULT_PORT}/{url.database}"


@contextmanager
def translated_failures(table: str, where: str, when_moved: Callable[[], None]) -> Iterator[None]:
    """Raise every SQLAlchemyError of the block as a PipelineError; ``table`` and ``where`` are for its words.

    ``when_moved`` is called where pgvector's types and operators may stand in another schema now.
    """
    try:
        yield
    except SQLAlchemyError as error:
        code = _sqlstate(error)
        if code.startswith(_MOVED):
            when_moved()
        if isinstance(error, DBAPIError):
            error.hide_parameters = True
        raise _translated(error, table, where) from (None if code.startswith(_QUOTING) else error)


def _sqlstate(error: SQLAlchemyError) -> str:
    """Return the SQLSTATE of psycopg2 (``pgcode``) or psycopg 3 (``sqlstate``), or an empty text."""
    driver_error = error.orig if isinstance(error, DBAPIError) else None
    return getattr(driver_error, "pgcode", None) or getattr(driver_error, "sqlstate", None) or ""


def _translated(error: SQLAlchemyError, table: str, where: str) -> PipelineError:
    """Turn an error of SQLAlchemy into ours, without the server's own words: they may hold a row."""
    if isinstance(error, PoolTimeoutError):
        return UnreachableError(f"no connection to {where} came free", "raise the engine's pool_size, or try again")
    code = _sqlstate(error)
    if code in _REFUSALS:
        fact, hint = _REFUSALS[code]
        return StatementError(" in ".join((fact.format(table=table), where)), hint)
    if code in _CONFLICTS:
        return ConflictError(f"another transaction stood in the way on {table} in {where}", "try again")
    lost = isinstance(error, DBAPIError) and error.connection_invalidated
    if lost or code in _UNREACHABLE or code.startswith("08"):
        return UnreachableError(f"the connection to {where} was lost", "try again when the server is up")
    if code:
        return StatementError(f"{where} refused a statement on {table} (SQLSTATE {code})", "see the server's log")
    # The second is libpq's own, where the server asks for a password and there is none.
    driver_error = error.orig if isinstance(error, DBAPIError) else None
    if any(words in str(driver_error) for words in ("FATAL", "no password supplied")):
        return _turned_down(str(driver_error), where)
    if driver_error is not None:
        return UnreachableError(f"{where} cannot be reached", "check host, port, network and DB_SSL, and that it runs")
    return StatementError(f"SQLAlchemy could not run a statement on {table} ({type(error).__name__})")


def _turned_down(message: str, where: str) -> PipelineError:
    """Translate a server's answer to a connection attempt: it carries no SQLSTATE in psycopg2."""
    if any(words in message for words in _STARTING):
        return UnreachableError(f"{where} takes no connections now", "try again when the server is up")
    return RejectedError(f"{where} turned the connection down", "check user, password, database and pg_hba.conf")
