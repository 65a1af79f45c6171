"""The benchmark's two embedded servers: their settings, password, databases and rows."""

import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache
from pathlib import Path

import psycopg2
from psycopg2 import sql

from content import Connection
from pipeline.demo.corpus import Passage, corpus
from pipeline.demo.fill import fill_legacy
from pipeline.demo.hashing import DIMENSIONS, HashingEmbedder
from pipeline.demo.servers import SUPERUSER, Server, create_server
from pipeline.settings import TableMapping

DATABASE = "bench"
RELEASES = ("16", "18")
# As a server comes, checkpoints by volume included, but for what would fall upon one contender and spare
# the next: vacuums and checkpoints by the clock, and WAL files that the first turn creates and later ones find.
SERVER_SETTINGS = {
    "fsync": "on",
    "autovacuum": "off",
    "checkpoint_timeout": "1h",
    "max_wal_size": "1GB",
    "min_wal_size": "1GB",
}


def create_servers(folder: Path) -> tuple[Server, Server]:
    """Create and start legacy and main below ``folder``, with a password of their own, in a file there."""
    # The alphabet holds neither the colon nor the backslash that a password file would want escaped.
    password = secrets.token_urlsafe(24)
    with ThreadPoolExecutor() as threads:
        # The corpus takes about as long as a server.
        threads.submit(_material)
        starting = [
            threads.submit(create_server, folder / release, release, password, SERVER_SETTINGS) for release in RELEASES
        ]
    legacy, main = (future.result() for future in starting)
    # Any port: the proxies have theirs.
    lines = [f"{server.host}:*:*:{SUPERUSER}:{password}\n" for server in (legacy, main)]
    descriptor = os.open(passfile(folder), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.writelines(lines)
    return legacy, main


def create_database(server: Server, folder: Path, database: str) -> None:
    """Create an empty database on a server."""
    with closing(connect(server, folder, "postgres")) as connection, connection.cursor() as cursor:
        cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))


def fill_rows(connection: Connection, mapping: TableMapping, rows: int) -> None:
    """Fill legacy's table with the demo's corpus, repeated up to ``rows`` rows."""
    passages, embedder = _material()
    connection.autocommit = False
    for _ in fill_legacy(connection, mapping, rows=rows, passages=passages, embedder=embedder):
        pass
    connection.autocommit = True


@cache
def _material() -> tuple[list[Passage], HashingEmbedder]:
    passages = corpus()
    return passages, HashingEmbedder(DIMENSIONS).fit(passage.text for passage in passages)


def connect(server: Server, folder: Path, database: str = DATABASE) -> Connection:
    """Connect in autocommit, with the password file in ``folder``."""
    connection: Connection = psycopg2.connect(
        host=server.host, port=server.port, user=SUPERUSER, dbname=database, passfile=str(passfile(folder))
    )
    connection.autocommit = True
    return connection


def passfile(folder: Path) -> Path:
    """Return the file with the servers' password."""
    return folder / "passwords"
