"""Real servers for the tests: 16 as legacy, 18 as main, 16.2 as an old legacy; a database per test."""

import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import hypothesis
import psycopg2
import pytest
from psycopg2 import sql

from pipeline.demo.servers import Server, create_server, kill_server
from tests import moves
from tests.moves import Move
from tests.support import CANARY, MEMORY, Database, clean_environment, environment, run, servers_folder

FOLDER_PREFIX = "pipeline-tests-"
# Durability against a crash of the operating system is not under test; a killed server is.
SERVER_SETTINGS = {
    "fsync": "off",
    "max_connections": "60",
    "wal_level": "logical",
    # Folders may lie in memory, where a checkpoint costs nothing and old WAL does.
    "max_wal_size": "256MB",
    "log_statement": "none",
    # A login with the thousands that are usual costs more than most statements here.
    "scram_iterations": "1",
}

# A machine under load is slow, and no property here is about time.
hypothesis.settings.register_profile("real", deadline=None)
hypothesis.settings.load_profile("real")

# A runner in the background hands SIGINT down as ignored, and then no process here could be
# interrupted; with a handler of our own, what we start has the default again.
signal.signal(signal.SIGINT, signal.default_int_handler)

_numbers = itertools.count(1)


@pytest.fixture(scope="session", autouse=True)
def _environment_without_servers() -> Iterator[None]:
    kept, cleaned = dict(os.environ), clean_environment()
    for variables in (cleaned, kept):
        os.environ.clear()
        os.environ.update(variables)
        if variables is cleaned:
            yield


@pytest.fixture(scope="session")
def servers() -> Iterator[Callable[[str], Server]]:
    """Return a function from a release to its running server, started at the first call."""
    _reap_leftovers()
    root = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-", dir=servers_folder()))
    root.chmod(0o711)
    started: dict[str, Server] = {}

    def get(release: str) -> Server:
        if release not in started:
            started[release] = create_server(root / release, release, CANARY, SERVER_SETTINGS)
            # Hashed anew: initdb does it before it has these settings.
            anew = sql.SQL("ALTER ROLE postgres PASSWORD {}").format(sql.Literal(CANARY))
            _administrate(started[release], anew)
        return started[release]

    yield get
    for server in started.values():
        kill_server(server.folder)
    shutil.rmtree(root, ignore_errors=True)


def _reap_leftovers() -> None:
    """End servers of an earlier run that was killed: they outlive their parent."""
    for root in (*MEMORY.glob(f"{FOLDER_PREFIX}*"), *Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*")):
        owner = int(root.name.removeprefix(FOLDER_PREFIX).split("-")[0])
        if not Path(f"/proc/{owner}").exists():
            for folder in root.iterdir():
                kill_server(folder)
            shutil.rmtree(root, ignore_errors=True)


def _administrate(server: Server, *statements: sql.Composable) -> None:
    with closing(Database(server=server, name="postgres").connect()) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)


@pytest.fixture
def new_database(servers: Callable[[str], Server]) -> Iterator[Callable[..., Database]]:
    """Return a function that makes a database on a release's server; all are dropped after the test."""
    made: list[Database] = []

    def make(release: str, template: str = "template1") -> Database:
        database = Database(server=servers(release), name=f"t{next(_numbers)}")
        _administrate(
            database.server,
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(database.name), sql.Identifier(template)),
        )
        made.append(database)
        return database

    yield make
    for database in made:
        _administrate(
            database.server, sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(database.name))
        )


@pytest.fixture(scope="session")
def main_template(servers: Callable[[str], Server]) -> Callable[[int], str]:
    """Return a function from a dimension to a template database on 18 at ``alembic upgrade head``."""
    made: dict[int, str] = {}

    def get(dimensions: int) -> str:
        if dimensions not in made:
            server = servers("18")
            name = f"template_{dimensions}"
            _administrate(server, sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
            template = Database(server=server, name=name)
            run(
                "alembic", "upgrade", "head", env=environment(main=template, EMBEDDING_DIMENSIONS=str(dimensions))
            ).expect(0)
            made[dimensions] = name
        return made[dimensions]

    return get


@pytest.fixture(scope="session")
def legacy_template(servers: Callable[[str], Server]) -> str:
    """Return a template database on 16 that has the extension."""
    server, name = servers("16"), "template_legacy"
    _administrate(server, sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    Database(server=server, name=name).execute("CREATE EXTENSION vector")
    return name


@pytest.fixture
def legacy(new_database: Callable[..., Database], legacy_template: str) -> Database:
    """Return an empty database on the legacy server, with the extension."""
    return new_database("16", legacy_template)


@pytest.fixture
def empty_main(new_database: Callable[..., Database]) -> Database:
    """Return an empty database on the main server: no extension, no table, no ledger."""
    return new_database("18")


@pytest.fixture
def main(new_database: Callable[..., Database], main_template: Callable[[int], str]) -> Database:
    """Return a database on the main server at ``alembic upgrade head``, 768 dimensions."""
    return new_database("18", main_template(768))


@pytest.fixture
def new_move(new_database: Callable[..., Database], ledger_template: str) -> Callable[..., Move]:
    """Return a function from the SQL of both tables to a move between two new databases, 16 and 18.

    Where main's table is made by hand and the extension is in its usual place, the ledger stands already.
    """

    def make(legacy_sql: str, main_sql: str, *more: str, **env: str) -> Move:
        made = main_sql and (len(more) < 2 or more[1] == "public") and not env.get("extension")
        main = new_database("18", ledger_template) if made else new_database("18")
        return moves.new_move(new_database("16"), main, legacy_sql, main_sql, *more, **env)

    return make


@pytest.fixture(scope="session")
def ledger_template(servers: Callable[[str], Server]) -> str:
    """Return a template database on 18 that has the ledger and no table."""
    server, name = servers("18"), "template_ledger"
    _administrate(server, sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    template = Database(server=server, name=name)
    run("alembic", "upgrade", "head", env=environment(main=template)).expect(0)
    template.execute("DROP TABLE public.embeddings")
    return name


@pytest.fixture
def connected(legacy: Database) -> Iterator[psycopg2.extensions.connection]:
    """Return an open connection to the legacy database."""
    with closing(legacy.connect()) as connection:
        yield connection
