"""Where contenders meet: two embedded servers, a filled legacy table, and main at ``alembic upgrade head``."""

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg2
import psycopg2.extensions
from psycopg2 import sql

from measure import BenchError, Signals, measure
from pipeline.demo.fill import fill_legacy
from pipeline.demo.hashing import DIMENSIONS
from pipeline.demo.servers import SUPERUSER, Server, create_server, kill_server
from pipeline.postgres.indexes import Index, build_state, drop_sql, secondary_indexes
from pipeline.postgres.tables import Extension, read_extension
from pipeline.settings import DEFAULTS, TableMapping

ROOT = Path(__file__).resolve().parent.parent
FOLDER_PREFIX = "pipeline-bench-"
DATABASE = "bench"
RELEASES = ("16", "18")
# As a server comes, but for what would fall upon one contender and spare the next: vacuums and
# checkpoints by the clock, and WAL segments that the first round creates and later ones find.
SERVER_SETTINGS = {
    "fsync": "on",
    "autovacuum": "off",
    "checkpoint_timeout": "1h",
    "max_wal_size": "4GB",
    "min_wal_size": "2GB",
}
# Of a binary COPY: header and trailer, and per row the number of fields and four lengths.
STREAM_FRAME_BYTES, STREAM_ROW_BYTES = 21, 18

Connection = psycopg2.extensions.connection


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What a table holds: its rows, and the sum of a 64-bit hash over the binary forms of each."""

    rows: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Testbed:
    """Two servers ready for a turn. ``environment`` is that of every contender's processes.

    ``index`` is the HNSW index as ``alembic upgrade head`` made it, ``pages`` the length of the legacy
    table's heap, ``stream_bytes`` its size as one binary COPY, ``table_bytes`` its size on disk.
    """

    folder: Path
    legacy: Server
    main: Server
    mapping: TableMapping
    environment: dict[str, str]
    index: Index
    extension: Extension
    content: Content
    pages: int
    stream_bytes: int
    table_bytes: int

    def connect(self, server: Server) -> Connection:
        """Connect to the bench's database on one of the servers, in autocommit."""
        return connect(server, self.folder)

    def reset(self, *, with_index: bool) -> None:
        """Make main as before the first copy: no row, an empty ledger, everything on disk, index or not."""
        with closing(self.connect(self.main)) as connection, connection.cursor() as cursor:
            cursor.execute(sql.SQL("TRUNCATE {}").format(self.table))
            cursor.execute("DELETE FROM pipeline.verdict")
            cursor.execute("DELETE FROM pipeline.run")
            if found := secondary_indexes(cursor, _oid(cursor, self.table)):
                cursor.execute(drop_sql(found[0].schema, found[0].name))
            if with_index:
                cursor.execute(sql.SQL(self.index.definition))
            cursor.execute("CHECKPOINT")

    def check(self, name: str, *, with_index: bool) -> Content:
        """Return what main holds; raise BenchError unless that is legacy's rows, and the index if it should."""
        with closing(self.connect(self.main)) as connection, connection.cursor() as cursor:
            state = build_state(cursor, self.index.schema, self.index.name)
            content = read_content(connection, self.mapping)
        check_equal(name, self.content, content)
        if with_index and state != "valid":
            raise BenchError(f"{name} left main without a valid index {self.index.name}")
        return content

    @property
    def table(self) -> sql.Identifier:
        """Return the table's qualified name, the same on both servers."""
        return sql.Identifier(self.mapping.schema, self.mapping.table)


@contextmanager
def testbed(rows: int, signals: Signals, tell: Callable[[str], None]) -> Iterator[Testbed]:
    """Start servers in a private folder, fill legacy with ``rows`` rows, migrate main; remove all at the end.

    Raises PipelineError where a server, the fill or the migration fails.
    """
    folder = Path(tempfile.gettempdir()) / f"{FOLDER_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with signals.held():
            folder.mkdir()
            # Root's servers run as another user, who has to pass through.
            folder.chmod(0o711 if os.geteuid() == 0 else 0o700)
            tell("starting two servers")
            legacy, main = _create_servers(folder)
        yield _fill(folder, legacy, main, rows, tell)
    finally:
        with signals.held():
            for release in RELEASES:
                kill_server(folder / release)
            if folder.exists():
                shutil.rmtree(folder)


def _create_servers(folder: Path) -> tuple[Server, Server]:
    # The alphabet holds neither the colon nor the backslash that a password file would want escaped.
    password = secrets.token_urlsafe(24)
    legacy, main = (create_server(folder / release, release, password, SERVER_SETTINGS) for release in RELEASES)
    lines = [f"{server.host}:{server.port}:*:{SUPERUSER}:{password}\n" for server in (legacy, main)]
    descriptor = os.open(_passfile(folder), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.writelines(lines)
    return legacy, main


def _fill(folder: Path, legacy: Server, main: Server, rows: int, tell: Callable[[str], None]) -> Testbed:
    mapping = TableMapping()
    for server in (legacy, main):
        with closing(connect(server, folder, "postgres")) as connection, connection.cursor() as cursor:
            cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
    environment = _environment(folder, legacy, main)
    tell("migrating main")
    alembic = (sys.executable, "-m", "alembic", "-c", str(ROOT / "alembic.ini"), "upgrade", "head")
    measure((((alembic,),),), environment, folder)
    tell(f"filling legacy with {rows:,} rows")
    with closing(connect(legacy, folder)) as connection:
        connection.autocommit = False
        for _ in fill_legacy(connection, mapping, rows=rows):
            pass
    table = sql.Identifier(mapping.schema, mapping.table)
    with closing(connect(main, folder)) as connection, connection.cursor() as cursor:
        (index,) = secondary_indexes(cursor, _oid(cursor, table))
    with closing(connect(legacy, folder)) as connection, connection.cursor() as cursor:
        # Else the first reader would write the hint bits for all others.
        cursor.execute(sql.SQL("VACUUM (ANALYZE) {}").format(table))
        cursor.execute("CHECKPOINT")
        extension = read_extension(cursor)
        assert extension is not None
        cursor.execute(
            "SELECT pg_catalog.pg_relation_size(%(oid)s::pg_catalog.regclass)"
            " / pg_catalog.current_setting('block_size')::pg_catalog.int4,"
            " pg_catalog.pg_table_size(%(oid)s::pg_catalog.regclass)",
            {"oid": _oid(cursor, table)},
        )
        ((pages, size),) = cursor.fetchall()
        return Testbed(
            folder=folder,
            legacy=legacy,
            main=main,
            mapping=mapping,
            environment=environment,
            index=index,
            extension=extension,
            content=read_content(connection, mapping),
            pages=pages,
            stream_bytes=read_stream_bytes(connection, mapping),
            table_bytes=size,
        )


def connect(server: Server, folder: Path, database: str = DATABASE) -> Connection:
    """Connect in autocommit, with the password file in ``folder``."""
    connection: Connection = psycopg2.connect(
        host=server.host, port=server.port, user=SUPERUSER, dbname=database, passfile=str(_passfile(folder))
    )
    connection.autocommit = True
    return connection


def _passfile(folder: Path) -> Path:
    return folder / "passwords"


def _environment(folder: Path, legacy: Server, main: Server) -> dict[str, str]:
    """Return this process's environment, without any other server that it may name, with these two."""
    kept = {k: v for k, v in os.environ.items() if k not in DEFAULTS and not k.startswith("PG")}
    variables = {"PGPASSFILE": str(_passfile(folder)), "EMBEDDING_DIMENSIONS": str(DIMENSIONS)}
    for prefix, database, server in (("DB", "DB_NAME", main), ("PGVECTOR", "PGVECTOR_DB", legacy)):
        variables |= {
            f"{prefix}_HOST": server.host,
            f"{prefix}_PORT": str(server.port),
            f"{prefix}_USER": SUPERUSER,
            database: DATABASE,
        }
    return kept | variables


def _oid(cursor: psycopg2.extensions.cursor, table: sql.Identifier) -> int:
    cursor.execute("SELECT pg_catalog.to_regclass(%s)::pg_catalog.oid", (table.as_string(cursor),))
    ((oid,),) = cursor.fetchall()
    return int(oid)


def _sends(cursor: psycopg2.extensions.cursor, mapping: TableMapping) -> list[sql.Composed]:
    """Return the binary forms of the four columns, as COPY sends them."""
    extension = read_extension(cursor)
    assert extension is not None
    functions = (
        ("pg_catalog", "uuid_send"),
        ("pg_catalog", "textsend"),
        ("pg_catalog", "jsonb_send"),
        (extension.schema, "vector_send"),
    )
    return [
        sql.SQL("{}({})").format(sql.Identifier(*function), sql.Identifier(column))
        for function, column in zip(functions, mapping.columns, strict=True)
    ]


def read_content(connection: Connection, mapping: TableMapping) -> Content:
    """Read all rows of the table and digest them, by a query that the engine under test has no part in."""
    with connection.cursor() as cursor:
        cursor.execute(
            sql.SQL(
                "SELECT pg_catalog.count(*), coalesce(pg_catalog.sum("
                "pg_catalog.hash_record_extended(ROW({}), 0)), 0)::pg_catalog.text FROM {}"
            ).format(sql.SQL(", ").join(_sends(cursor, mapping)), sql.Identifier(mapping.schema, mapping.table))
        )
        ((rows, digest),) = cursor.fetchall()
    return Content(rows=rows, digest=digest)


def read_stream_bytes(connection: Connection, mapping: TableMapping) -> int:
    """Return how many bytes one binary COPY of all rows would send."""
    with connection.cursor() as cursor:
        lengths = [sql.SQL("coalesce(pg_catalog.length({}), 0)").format(send) for send in _sends(cursor, mapping)]
        cursor.execute(
            sql.SQL("SELECT coalesce(pg_catalog.sum({} + {}), 0)::pg_catalog.int8 FROM {}").format(
                sql.Literal(STREAM_ROW_BYTES),
                sql.SQL(" + ").join(lengths),
                sql.Identifier(mapping.schema, mapping.table),
            )
        )
        ((total,),) = cursor.fetchall()
    return int(total) + STREAM_FRAME_BYTES


def check_equal(name: str, expected: Content, found: Content) -> None:
    """Raise BenchError where contender ``name`` left other rows than legacy has."""
    if found.rows != expected.rows:
        raise BenchError(f"{name} brought {found.rows:,} of {expected.rows:,} rows: its time counts for nothing")
    if found != expected:
        raise BenchError(f"{name} brought {found.rows:,} rows, but not legacy's: their digests differ")
