"""What the Alembic revisions share: their target, composed SQL, the extension, and the ledger's model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg2.extensions
import sqlalchemy as sa
from alembic import op
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import ExecutableDDLElement
from sqlalchemy.sql.compiler import DDLCompiler

from pipeline.errors import RefusedError
from pipeline.postgres.database import Session
from pipeline.postgres.tables import Extension, read_extension
from pipeline.search.table import always_quoted
from pipeline.settings import TableMapping

DIALECT = "postgresql+psycopg2://"
LEDGER_SCHEMA = "pipeline"
INSUFFICIENT_PRIVILEGE = "42501"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a migration makes, and what the operator allowed by ``-x``.

    ``extension_schema`` is ``-x extension_schema=NAME``; ``adopt`` is ``-x adopt=yes``: the table that is
    there stays as it is, whatever its shape; ``drop_rows`` is ``-x drop_rows=yes``.
    """

    mapping: TableMapping
    dimensions: int
    extension_schema: str | None = None
    adopt: bool = False
    drop_rows: bool = False


def engine_on(session: Session) -> sa.Engine:
    """Return an engine on a session's own connection: it has connected, and no URL ever holds a password."""
    session.connection.autocommit = False
    return sa.create_engine(
        DIALECT,
        creator=lambda: session.connection,
        poolclass=NullPool,
        isolation_level="READ COMMITTED",
        hide_parameters=True,
    )


def target() -> Target:
    """Return the target of the migration under way."""
    found = op.get_context().opts["target"]
    assert isinstance(found, Target)
    return found


def is_offline() -> bool:
    """Return whether SQL is written (``--sql``) instead of run."""
    return op.get_context().as_sql


class Literal(str):
    """A text that stands in composed SQL as a string constant; any other text is an identifier."""

    __slots__ = ()


class Composed(ExecutableDDLElement):
    """A statement with named holes: a ``str`` is quoted as a name, a Literal as a constant.

    An ``int`` stands as it is. The template is a constant of the code, never made from input.
    """

    def __init__(self, template: str, **parts: str | int) -> None:
        """Take the template and what goes into its holes, by name."""
        self.template = template
        self.parts = parts


class Block(Composed):
    """A PL/pgSQL block, run by DO: what a script without a client (``--sql``) can decide by itself."""


@compiles(Composed)
def _compile_composed(element: Composed, compiler: DDLCompiler, **_: Any) -> str:
    return _compose(element, compiler)


@compiles(Block)
def _compile_block(element: Block, compiler: DDLCompiler, **_: Any) -> str:
    # The body is compiled, and its percent signs doubled where the driver wants it, already.
    return "DO " + _quoted_constant(_compose(element, compiler))


def _compose(element: Composed, compiler: DDLCompiler) -> str:
    return element.template.format_map({name: _rendered(part, compiler) for name, part in element.parts.items()})


def _rendered(part: str | int, compiler: DDLCompiler) -> str:
    if isinstance(part, int):
        return str(part)
    if isinstance(part, Literal):
        constant = _quoted_constant(part)
        # As the preparer does with names: the driver reads a lone percent sign as a placeholder.
        return constant if compiler.dialect.paramstyle == "named" else constant.replace("%", "%%")
    return compiler.preparer.quote_identifier(part)


def _quoted_constant(text: str) -> str:
    """Quote a string constant so that standard_conforming_strings does not matter."""
    doubled = text.replace("'", "''")
    return f"E'{doubled}'".replace("\\", "\\\\") if "\\" in doubled else f"'{doubled}'"


@contextmanager
def needing(hint: str) -> Iterator[None]:
    """Turn a missing privilege (42501) inside into a RefusedError with ``hint``."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        if getattr(error.orig, "pgcode", None) != INSUFFICIENT_PRIVILEGE:
            raise
        message: str | None = getattr(getattr(error.orig, "diag", None), "message_primary", None)
        raise RefusedError(message or "a right is missing", hint) from error


def quoted(name: str) -> str:
    """Return ``name`` quoted for a line of SQL that a person will type."""
    dialect = op.get_context().dialect
    text = dialect.identifier_preparer.quote_identifier(name)
    # For the driver, percent signs are doubled.
    return text if dialect.paramstyle == "named" else text.replace("%%", "%")


def current_role() -> str:
    """Return the role of the connection, quoted for a line of SQL that a person will type."""
    return quoted(op.get_bind().execute(sa.text("SELECT CURRENT_USER")).scalar_one())


def create_schema(name: str) -> None:
    """Create the schema where it is missing. Raises RefusedError without the right to."""
    if is_offline():
        # PostgreSQL asks for CREATE on the database even where the schema exists; public does, always.
        if name != "public":
            op.execute(sa.schema.CreateSchema(always_quoted(name), if_not_exists=True))
        return
    if has_schema(name):
        return
    database = quoted(op.get_bind().execute(sa.text("SELECT pg_catalog.current_database()")).scalar_one())
    with needing(f"an administrator runs: GRANT CREATE ON DATABASE {database} TO {current_role()};"):
        op.execute(sa.schema.CreateSchema(always_quoted(name)))


def has_schema(name: str) -> bool:
    """Return whether the schema exists, visible or not."""
    query = sa.text("SELECT EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = :name)")
    return bool(op.get_bind().execute(query, {"name": name}).scalar_one())


def installed_extension(connection: sa.Connection) -> Extension | None:
    """Return pgvector as it is installed in this database, or None."""
    driver = connection.connection.driver_connection
    assert isinstance(driver, psycopg2.extensions.connection)
    with driver.cursor() as cursor:
        return read_extension(cursor)


def extension_schema() -> str:
    """Return the schema of pgvector's types; offline, what the operator said, or ``public``."""
    if not is_offline():
        extension = installed_extension(op.get_bind())
        if extension is None:
            raise RefusedError(
                "pgvector was removed from this database after revision 0001",
                'an administrator runs: CREATE EXTENSION vector WITH SCHEMA "public";',
            )
        return extension.schema
    return target().extension_schema or "public"


UNFINISHED = "finished_at IS NULL AND abandoned_at IS NULL"
_REFUSE_UNFINISHED = """BEGIN
    IF EXISTS (SELECT FROM pipeline.run WHERE finished_at IS NULL AND abandoned_at IS NULL) THEN
        RAISE EXCEPTION USING
            MESSAGE = 'a run is unfinished; its marks and definitions of indexes would be lost',
            HINT = 'finish or abandon it, or: alembic -x drop_rows=yes downgrade ...';
    END IF;
END"""


def refuse_unfinished_runs() -> None:
    """Raise RefusedError while a run is unfinished, unless rows may be dropped; offline, write the statement for it."""
    if target().drop_rows:
        return
    if is_offline():
        op.execute(Block(_REFUSE_UNFINISHED))
        return
    connection = op.get_bind()
    if not connection.execute(sa.text("SELECT pg_catalog.to_regclass('pipeline.run') IS NOT NULL")).scalar_one():
        return
    run = sa.table("run", schema=LEDGER_SCHEMA)
    query = sa.select(sa.func.count()).select_from(run).where(sa.text(UNFINISHED))
    if unfinished := connection.execute(query).scalar_one():
        raise RefusedError(
            f"{unfinished} unfinished run{'' if unfinished == 1 else 's'} in {LEDGER_SCHEMA}.run: the marks and"
            " the definitions of deferred indexes would be lost",
            "finish or abandon it (pipeline status shows it), or: alembic -x drop_rows=yes downgrade ...",
        )


UNDER_WAY = "ended_at IS NULL"
_REFUSE_CUTOVERS = """BEGIN
    IF EXISTS (SELECT FROM pipeline.cutover WHERE ended_at IS NULL) THEN
        RAISE EXCEPTION USING
            MESSAGE = 'a cutover is under way, or can be rolled back; its way back would be lost',
            HINT = 'end it by pipeline rollback or pipeline finalize, or: alembic -x drop_rows=yes downgrade ...';
    END IF;
END"""


def refuse_cutovers() -> None:
    """Raise RefusedError while a cutover has not ended, unless rows may be dropped; offline, write the statement."""
    if target().drop_rows:
        return
    if is_offline():
        op.execute(Block(_REFUSE_CUTOVERS))
        return
    cutover = sa.table("cutover", schema=LEDGER_SCHEMA)
    query = sa.select(sa.func.count()).select_from(cutover).where(sa.text(UNDER_WAY))
    if op.get_bind().execute(query).scalar_one():
        raise RefusedError(
            f"a cutover in {LEDGER_SCHEMA}.cutover has not ended: its way back would be lost",
            "end it by: pipeline rollback or pipeline finalize; or: alembic -x drop_rows=yes downgrade ...",
        )
