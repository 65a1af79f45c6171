"""Where contenders meet: two embedded servers, a filled legacy table, and main at ``alembic upgrade head``."""

import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psycopg2
import psycopg2.extensions
from psycopg2 import sql

from cold import drop_cached
from content import Connection, Content, check_equal, read_content, read_stream_bytes
from link import delayed
from measure import BenchError, Signals, measure
from pipeline.demo.hashing import DIMENSIONS
from pipeline.demo.servers import SUPERUSER, Server, kill_server
from pipeline.postgres.indexes import Index, build_state, drop_sql, secondary_indexes
from pipeline.postgres.tables import Extension, read_extension
from pipeline.settings import DEFAULTS, TableMapping
from servers import DATABASE, RELEASES, connect, create_database, create_servers, fill_rows, passfile

ROOT = Path(__file__).resolve().parent.parent
FOLDER_PREFIX = "pipeline-bench-"
# How long a backend whose client was killed may take to notice.
LEAVING_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Testbed:
    """Two servers ready for a turn. ``environment`` is that of every contender's processes.

    ``database`` is legacy's; ``content``, ``pages`` (the length of the heap), ``stream_bytes`` (the size
    as one binary COPY) and ``table_bytes`` (that on disk) are those of its table. ``index`` is the HNSW
    index as ``alembic upgrade head`` made it. ``ports`` are a proxy's by the servers', empty where
    contenders reach the servers directly.
    """

    folder: Path
    legacy: Server
    main: Server
    mapping: TableMapping
    signals: Signals
    environment: dict[str, str]
    ports: Mapping[int, int]
    database: str
    index: Index
    extension: Extension
    content: Content
    pages: int
    stream_bytes: int
    table_bytes: int

    def connect(self, server: Server) -> Connection:
        """Connect to the bench's database on one of the servers, directly and in autocommit."""
        return connect(server, self.folder, self.database_on(server))

    def database_on(self, server: Server) -> str:
        """Return the name of the bench's database on one of the servers."""
        return self.database if server == self.legacy else DATABASE

    def with_table(self, database: str, fill: Callable[[Connection], None]) -> "Testbed":
        """Return this testbed, reached directly, with a legacy of its own: a new database, filled by ``fill``."""
        create_database(self.legacy, self.folder, database)
        with closing(connect(self.legacy, self.folder, database)) as connection:
            fill(connection)
        environment = self.environment | {"PGVECTOR_DB": database}
        return replace(self, database=database, environment=environment).described()

    @contextmanager
    def at_distance(self, latency_ms: float) -> Iterator["Testbed"]:
        """Yield this testbed with a proxy before both servers, so many milliseconds of round trip away."""
        with delayed(latency_ms, (self.legacy.port, self.main.port)) as ports:
            far = {
                f"{prefix}_PORT": str(ports[server.port])
                for prefix, server in (("PGVECTOR", self.legacy), ("DB", self.main))
            }
            yield replace(self, ports=ports, environment=self.environment | far)

    def described(self) -> "Testbed":
        """Return this testbed with what legacy's table holds now, tidied and on disk."""
        with closing(self.connect(self.legacy)) as connection, connection.cursor() as cursor:
            # Else the first reader would write the hint bits for all others.
            cursor.execute(sql.SQL("VACUUM (ANALYZE) {}").format(self.table))
            cursor.execute("CHECKPOINT")
            cursor.execute(
                "SELECT pg_catalog.pg_relation_size(%(oid)s::pg_catalog.regclass)"
                " / pg_catalog.current_setting('block_size')::pg_catalog.int4,"
                " pg_catalog.pg_table_size(%(oid)s::pg_catalog.regclass)",
                {"oid": _oid(cursor, self.table)},
            )
            ((pages, size),) = cursor.fetchall()
            return replace(
                self,
                content=read_content(connection, self.mapping),
                pages=pages,
                stream_bytes=read_stream_bytes(connection, self.mapping),
                table_bytes=size,
            )

    def cool(self) -> None:
        """Restart legacy with nothing in memory: neither in its buffers nor in the system's page cache."""
        with closing(self.connect(self.legacy)) as connection, connection.cursor() as cursor:
            cursor.execute("CHECKPOINT")
        with self.signals.held():
            self.legacy.stop()
            drop_cached(self.legacy.data)
            self.legacy.start()

    def slices(self) -> tuple[int, int]:
        """Return into how many slices the pipeline's run cut the table, and the largest one's rows; 0 without a run."""
        count, rows = self._one_row("SELECT pg_catalog.count(*), coalesce(pg_catalog.max(rows), 0) FROM pipeline.slice")
        return count, rows

    def checkpoints(self) -> int:
        """Return how many checkpoints main began so far."""
        (count,) = self._one_row("SELECT num_timed + num_requested FROM pg_catalog.pg_stat_checkpointer")
        return count

    def inserted_rows(self) -> int:
        """Return how many rows were ever inserted into main's table, those of aborted transactions too.

        A backend tells its numbers when it ends, so the last one is waited for. Raises BenchError.
        """
        with closing(self.connect(self.main)) as connection, connection.cursor() as cursor:
            deadline = time.monotonic() + LEAVING_SECONDS
            while True:
                cursor.execute(
                    "SELECT (SELECT pg_catalog.count(*) FROM pg_catalog.pg_stat_activity WHERE datname ="
                    " pg_catalog.current_database() AND pid <> pg_catalog.pg_backend_pid()"
                    " AND backend_type = 'client backend'), pg_catalog.pg_stat_get_tuples_inserted(%s)",
                    (_oid(cursor, self.table),),
                )
                ((others, rows),) = cursor.fetchall()
                if not others:
                    return int(rows)
                if time.monotonic() > deadline:
                    raise BenchError(f"{others} backends of a contender are still there")
                time.sleep(0.05)

    def _one_row(self, query: str) -> tuple[int, ...]:
        with closing(self.connect(self.main)) as connection, connection.cursor() as cursor:
            cursor.execute(query)
            (row,) = cursor.fetchall()
            return tuple(row)

    def reset(self, *, with_index: bool) -> None:
        """Make main as before the first copy: no row, an empty ledger, everything on disk, index or not."""
        with closing(self.connect(self.main)) as connection, connection.cursor() as cursor:
            # Not by DELETE: the dead rows of earlier turns would lie in the way of later ones.
            cursor.execute(sql.SQL("TRUNCATE {}, pipeline.run CASCADE").format(self.table))
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
            legacy, main = create_servers(folder)
        bed = _migrated(folder, (legacy, main), signals, tell)
        tell(f"filling legacy with {rows:,} rows")
        with closing(bed.connect(legacy)) as connection:
            fill_rows(connection, bed.mapping, rows)
        yield bed.described()
    finally:
        with signals.held():
            for release in RELEASES:
                kill_server(folder / release)
            if folder.exists():
                shutil.rmtree(folder)


def _migrated(folder: Path, servers: tuple[Server, Server], signals: Signals, tell: Callable[[str], None]) -> Testbed:
    """Return a testbed whose main stands at ``alembic upgrade head``, and whose legacy is empty."""
    legacy, main = servers
    mapping = TableMapping()
    for server in servers:
        create_database(server, folder, DATABASE)
    environment = _environment(folder, legacy, main)
    tell("migrating main")
    alembic = (sys.executable, "-m", "alembic", "-c", str(ROOT / "alembic.ini"), "upgrade", "head")
    measure((((alembic,),),), environment, folder)
    with closing(connect(main, folder)) as connection, connection.cursor() as cursor:
        (index,) = secondary_indexes(cursor, _oid(cursor, sql.Identifier(mapping.schema, mapping.table)))
        extension = read_extension(cursor)
        assert extension is not None
    return Testbed(
        folder=folder,
        legacy=legacy,
        main=main,
        mapping=mapping,
        signals=signals,
        environment=environment,
        ports={},
        database=DATABASE,
        index=index,
        extension=extension,
        content=Content(rows=0, digest="0"),
        pages=0,
        stream_bytes=0,
        table_bytes=0,
    )


def _environment(folder: Path, legacy: Server, main: Server) -> dict[str, str]:
    """Return this process's environment, without any other server that it may name, with these two."""
    kept = {k: v for k, v in os.environ.items() if k not in DEFAULTS and not k.startswith("PG")}
    variables = {"PGPASSFILE": str(passfile(folder)), "EMBEDDING_DIMENSIONS": str(DIMENSIONS)}
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
