"""Alembic's environment: main by the project's settings, one transaction and one lock per revision.

Options, each as ``-x NAME=VALUE`` before the command: ``env_file`` (another ``.env``),
``extension_schema`` (where to install pgvector), ``adopt=yes`` (the table that another program made
stays as it is), ``drop_rows=yes`` (a downgrade may drop rows).
A caller may put an open Connection into ``config.attributes["connection"]`` and Settings into
``config.attributes["settings"]``; a PipelineError then reaches the caller instead of ending the process.
"""

import logging.config
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any, NoReturn

import psycopg2
import psycopg2.extensions
import psycopg2.extras
import sqlalchemy as sa
from alembic import context
from alembic.runtime.migration import MigrationContext, MigrationStep, RevisionStep

from pipeline.errors import ConflictError, PipelineError, SettingsError, StoppedError
from pipeline.migration import (
    DIALECT,
    LEDGER_SCHEMA,
    Block,
    Literal,
    Target,
    create_schema,
    engine_on,
    installed_extension,
)
from pipeline.migration.tables import LEDGER
from pipeline.postgres.database import Session
from pipeline.postgres.failures import translate
from pipeline.search.table import Vector, embeddings_table
from pipeline.settings import Settings

VERSION_TABLE = "alembic_version"
# Every transaction begins with these. Where another one holds what we need, give up soon: the application
# waits behind our request. Row security would hide rows from the guard of a downgrade.
TRANSACTION_SETTINGS = (
    "SELECT pg_catalog.set_config('search_path', '', true)",
    "SET LOCAL lock_timeout = '5s'",
    "SET LOCAL statement_timeout = 0",
    "SET LOCAL row_security = off",
)
# "pipeline" in ASCII, as a number. It ends with the transaction, so a transaction pooler cannot orphan it.
LOCK = "SELECT pg_catalog.pg_advisory_xact_lock(8100128985715404389)"
OPTIONS = ("env_file", "extension_schema", "adopt", "drop_rows")
QUERY_CANCELED = "57014"

Steps = Callable[[Any, MigrationContext], Iterable[MigrationStep]]


class _MovedError(Exception):
    """Another process migrated the database while this one waited for the lock."""


def main() -> None:
    """Run the command. Where it fails, end the process with two lines and the error's exit code."""
    config = context.config
    steps = _alembic_steps()
    if "connection" in config.attributes:
        connection: sa.Connection = config.attributes["connection"]
        with _translated(connection.engine.url.render_as_string(), lambda: connection.invalidated):
            _run_online(connection, _settings(), steps)
        return
    if config.config_file_name is not None:
        logging.config.fileConfig(config.config_file_name, disable_existing_loggers=False)
    try:
        _run_as_process(steps)
    except PipelineError as error:
        _end(error)
    except KeyboardInterrupt:
        _end(StoppedError("interrupted; the revision under way was rolled back", "run the command again"))


def _end(error: PipelineError) -> NoReturn:
    for name, text in (("error", error.fact), ("hint", error.hint)):
        if text:
            # A name or a server's message may hold line breaks and terminal escapes.
            line = "".join(c if c.isprintable() else " " for c in text)
            sys.stderr.write(f"{name}: {line}\n")
    raise SystemExit(error.exit_code)


def _alembic_steps() -> Steps:
    """Return the command's work function, which Alembic hands to a configured context only."""
    context.configure(url=DIALECT)
    steps: Steps = context.get_context().opts["fn"]
    return steps


def _run_as_process(steps: Steps) -> None:
    settings = _settings()
    if context.is_offline_mode():
        _run_offline(settings, steps)
        return
    # A column of the application's own type in an adopted table is none of ours.
    warnings.filterwarnings("ignore", message="Did not recognize type", category=sa.exc.SAWarning)
    with Session(settings.endpoint("main"), "alembic") as session:
        # Inside libpq's own waiting Ctrl-C does nothing until the statement ends; here it cancels it.
        # Not earlier: libpq's connect_timeout holds only while it waits itself.
        psycopg2.extensions.set_wait_callback(psycopg2.extras.wait_select)
        engine = engine_on(session)
        translated = partial(_translated, session.label, lambda: session.lost)
        # Inside too: once the block has closed the connection, every error would look like a lost one.
        with translated(), engine.connect() as connection, translated():
            _run_online(connection, settings, steps)


@contextmanager
def _translated(where: str, is_lost: Callable[[], bool]) -> Iterator[None]:
    """Turn errors of the database into PipelineErrors that hold no row and no parameter."""
    try:
        yield
    except (sa.exc.DBAPIError, psycopg2.Error) as error:
        cause = error.orig if isinstance(error, sa.exc.DBAPIError) else error
        if not isinstance(cause, psycopg2.Error):
            raise
        # No timeout is set, so a cancel came from Ctrl-C or from an administrator.
        cancelled = cause.pgcode == QUERY_CANCELED
        raise translate(cause, where, lost=is_lost(), cancelled=cancelled) from error


def _settings() -> Settings:
    given = context.config.attributes.get("settings")
    if isinstance(given, Settings):
        return given
    env_file = _options().get("env_file")
    return Settings.load(None if env_file is None else Path(env_file))


def _options() -> Mapping[str, str]:
    """Return the ``-x`` options. Raises SettingsError for an unknown one: a typo must not be lost."""
    found = context.get_x_argument(as_dictionary=True)
    hint = "the options are env_file=PATH, extension_schema=NAME, adopt=yes and drop_rows=yes"
    for name, value in found.items():
        if name not in OPTIONS or not isinstance(value, str) or not value:
            raise SettingsError(f"-x {name} is not an option with a value", hint)
    for name in ("adopt", "drop_rows"):
        if found.get(name, "yes") != "yes":
            raise SettingsError(f"-x {name} has a value other than yes", hint)
    return {name: str(value) for name, value in found.items()}


def _configure(settings: Settings, steps: Steps, **more: Any) -> MigrationContext:
    options = _options()
    context.configure(
        version_table=VERSION_TABLE,
        version_table_schema=LEDGER_SCHEMA,
        transaction_per_migration=True,
        # Alembic would create its table before its schema, and before a revision can refuse.
        dont_mutate=True,
        fn=lambda heads, migration: _guarded(steps(heads, migration), migration),
        target=Target(
            mapping=settings.table,
            dimensions=settings.dimensions,
            extension_schema=options.get("extension_schema"),
            adopt="adopt" in options,
            drop_rows="drop_rows" in options,
        ),
        **more,
    )
    return context.get_context()


def _run_offline(settings: Settings, steps: Steps) -> None:
    # No driver reads the script, so its percent signs are not doubled.
    _configure(settings, steps, url=DIALECT, dialect_opts={"paramstyle": "named"}, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()


def _run_online(connection: sa.Connection, settings: Settings, steps: Steps) -> None:
    """Run the command; from the start again while other processes migrate the same database."""
    external = connection.in_transaction()
    with _complete_names(connection):
        while True:
            if external:
                _begin(connection)
            comparison = _comparison(connection, settings)
            if not external:
                connection.rollback()
            _configure(settings, steps, connection=connection, **comparison)
            try:
                with context.begin_transaction():
                    context.run_migrations()
                return
            except _MovedError as error:
                if external:
                    raise ConflictError("another process migrated this database", "run it again") from error
                connection.rollback()


@contextmanager
def _complete_names(connection: sa.Connection) -> Iterator[None]:
    """Begin every transaction with our settings, and name every object with its schema."""
    dialect: Any = connection.dialect
    kept = dialect.default_schema_name, dialect.ischema_names
    # SQLAlchemy and Alembic leave the default schema out of names; ours are always complete.
    dialect.default_schema_name = None
    sa.event.listen(connection, "begin", _begin)
    try:
        yield
    finally:
        sa.event.remove(connection, "begin", _begin)
        dialect.default_schema_name, dialect.ischema_names = kept


def _begin(connection: sa.Connection) -> None:
    for statement in TRANSACTION_SETTINGS:
        connection.exec_driver_sql(statement)


def _guarded(found: Iterable[MigrationStep], migration: MigrationContext) -> list[MigrationStep]:
    """Ask every step whether it must refuse, before the first one changes anything; then lock each."""
    steps = list(found)
    if not steps:
        return steps
    if migration.as_sql:
        migration.execute(sa.text("SET client_encoding = 'UTF8'"))
        if not steps[0].from_revisions_no_deps:
            create_schema(LEDGER_SCHEMA)
    else:
        for step in steps:
            _ask(step)
    for step in steps:
        step.migration_fn = _locked(step, migration)
    return steps


def _ask(step: MigrationStep) -> None:
    """Call a revision's ``refuse_upgrade`` or ``refuse_downgrade``, where it has one."""
    if isinstance(step, RevisionStep):
        check = f"refuse_{'upgrade' if step.is_upgrade else 'downgrade'}"
        getattr(step.revision.module, check, lambda: None)()


def _create_version_table(migration: MigrationContext, connection: sa.Connection) -> None:
    create_schema(LEDGER_SCHEMA)
    migration.impl.version_table_impl(
        version_table=VERSION_TABLE, version_table_schema=LEDGER_SCHEMA, version_table_pk=True
    ).create(connection, checkfirst=True)


def _locked(step: MigrationStep, migration: MigrationContext) -> Callable[..., None]:
    """Return the step's function under the lock, run only if the database is still where it begins."""
    work = step.migration_fn
    begins_at = set(step.from_revisions_no_deps)

    @wraps(work)
    def run(**arguments: Any) -> None:
        if migration.as_sql:
            for statement in (*TRANSACTION_SETTINGS, LOCK):
                migration.execute(sa.text(statement))
            for revision in begins_at:
                migration.execute(_must_be_at(revision))
        else:
            assert migration.connection is not None
            migration.connection.exec_driver_sql(LOCK)
            if not begins_at:
                # Together with the first revision: where that one fails, nothing is left.
                _create_version_table(migration, migration.connection)
            if set(migration.get_current_heads()) != begins_at:
                raise _MovedError
        work(**arguments)

    return run


def _must_be_at(revision: str) -> Block:
    return Block(
        """BEGIN
    IF NOT EXISTS (SELECT FROM {schema}.{table} WHERE version_num = {revision}) THEN
        RAISE EXCEPTION USING MESSAGE = {message};
    END IF;
END""",
        schema=LEDGER_SCHEMA,
        table=VERSION_TABLE,
        revision=Literal(revision),
        message=Literal(f"this database is not at revision {revision}"),
    )


def _comparison(connection: sa.Connection, settings: Settings) -> dict[str, Any]:
    """Return what makes autogenerate look at our tables alone: the database belongs to the application."""
    mapping = settings.table
    model = sa.MetaData()
    extension_schema = _teach_vector(connection)
    embeddings_table(mapping, settings.dimensions, extension_schema, model)
    own_schemas = {mapping.schema, LEDGER_SCHEMA}

    def is_embeddings(schema: str | None, table: str | None) -> bool:
        return (schema, table) == (mapping.schema, mapping.table)

    def include_name(name: str | None, kind: str, parents: Mapping[str, str | None]) -> bool:
        if kind == "schema":
            return name in own_schemas
        schema = parents.get("schema_name")
        if kind == "table":
            return schema == LEDGER_SCHEMA or is_embeddings(schema, name)
        return True

    def include_object(
        item: sa.schema.SchemaItem, name: str | None, kind: str, reflected: bool, compare_to: object
    ) -> bool:
        """Leave the embeddings table its further columns, indexes (the ANN index too) and constraints."""
        table = item if isinstance(item, sa.Table) else getattr(item, "table", None)
        if kind == "table" or table is None or not is_embeddings(table.schema, table.name):
            return True
        return kind == "column" and (not reflected or name in mapping.columns)

    return {
        "target_metadata": [model, LEDGER],
        "include_schemas": True,
        "include_name": include_name,
        "include_object": include_object,
        # A comment on a table tells that revision 0002 made it; an adopted table has its own.
        "autogenerate_plugins": ["alembic.autogenerate.*", "~alembic.autogenerate.comments"],
    }


def _teach_vector(connection: sa.Connection) -> str:
    """Make reflection know pgvector's type by its schema; return the schema."""
    extension = installed_extension(connection)
    schema = extension.schema if extension else "public"
    shown = connection.execute(sa.select(sa.func.pg_catalog.quote_ident(schema))).scalar_one()
    dialect: Any = connection.dialect
    # SQLAlchemy folds what format_type() shows before it looks the type up.
    dialect.ischema_names = {
        **dialect.ischema_names,
        f"{shown}.vector".lower(): partial(Vector, schema=schema),
    }
    return schema


main()
