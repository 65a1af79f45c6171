"""Who runs: raw pipes, the pipeline, other tools, a loop of inserts; each as the processes of one turn."""

import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from psycopg2 import sql

from content import Connection
from measure import Command, Pipe, Step
from pipeline.demo.servers import SUPERUSER, Server
from pipeline.options import DEFAULT_WORKERS
from pipeline.postgres.indexes import BuildPlan, plan_build
from scenes import Scene
from testbed import Testbed

# As many raw pipes, and as many workers of the pipeline.
STREAMS = (1, 2, 4)
RAW = tuple(f"raw-{streams}" for streams in STREAMS)
COPIES = tuple(f"copy-{streams}" for streams in STREAMS)
DEFAULT_COPY = f"copy-{DEFAULT_WORKERS}"
# The programs that are not the project's, and may not be there.
TOOLS = ("pgcopydb", "pgloader")
DUMP, INSERT, VERIFY = "dump", "insert", "verify"
INDEX_SUFFIX = "+index"
BY_HAND = f"raw-{DEFAULT_WORKERS}{INDEX_SUFFIX}"
COPY_AND_INDEX = f"{DEFAULT_COPY}{INDEX_SUFFIX}"
NEAR_NAMES = (*RAW, *COPIES, DUMP, *TOOLS, INSERT, BY_HAND, COPY_AND_INDEX, VERIFY)
INSERT_LOOP = Path(__file__).with_name("insert_loop.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """Steps that run one after the other. ``against`` names those whose best median is the ratio's base.

    A ``load`` begins with an empty main without HNSW index and ends with all rows; an ``index`` ends
    with the index too; a ``check`` reads what the last load left. ``finds_index``: main has the index at
    the start, as after ``alembic upgrade head``. ``optional``: its failure is not the benchmark's.
    """

    name: str
    what: str
    kind: Literal["load", "index", "check"]
    steps: tuple[Step, ...]
    against: tuple[str, ...]
    finds_index: bool = False
    optional: bool = False


def names(scene: Scene) -> tuple[str, ...]:
    """Return the names of all that could take turns in a scene, whether or not they are installed."""
    return tuple(name + scene.suffix for name in (*RAW, *COPIES)) if scene.suffix else NEAR_NAMES


def missing_tools() -> tuple[str, ...]:
    """Return which of the tools are not installed."""
    return tuple(name for name in TOOLS if shutil.which(name) is None)


def streams(bed: Testbed, connection: Connection, scene: Scene) -> list[Contender]:
    """Return raw pipes and copies, as many streams of each. ``connection`` is to any server: it quotes the names.

    A copy is held against the fastest raw pipe; at a distance, where a second stream hides what one waits
    for, against the raw pipe of as many.
    """
    found = [
        load(
            f"raw-{count}{scene.suffix}",
            "psql COPY | psql COPY, binary" if count == 1 else f"{count} such pipes, each its share of the pages",
            (_raw_step(bed, connection, count),),
            tuple(name + scene.suffix for name in RAW),
        )
        for count in STREAMS
    ]
    for count in STREAMS:
        against = RAW if scene.latency_ms is None else (f"raw-{count}",)
        found.append(
            load(
                f"copy-{count}{scene.suffix}",
                f"pipeline copy --workers {count}",
                (copy_step(count),),
                tuple(name + scene.suffix for name in against),
            )
        )
    return found


def others(bed: Testbed, connection: Connection) -> list[Contender]:
    """Return the other ways to bring the rows: pg_dump, the tools that are installed, the loop of inserts."""
    found = [load(DUMP, "pg_dump -Fc -Z0 | pg_restore, data only", ((_dump_pipe(bed, connection),),))]
    urls = (_url(bed, bed.legacy), _url(bed, bed.main))
    for name, what, make in (
        ("pgcopydb", f"pgcopydb copy table-data, {DEFAULT_WORKERS} jobs", _pgcopydb_step),
        ("pgloader", "pgloader, data only", _pgloader_step),
    ):
        if program := shutil.which(name):
            found.append(replace(load(name, what, (make(bed, program, urls),)), optional=True))
    loop = (sys.executable, str(INSERT_LOOP), *(url.replace(":", "+psycopg2:", 1) for url in urls))
    found.append(load(INSERT, "SQLAlchemy select and insert, 1,000 rows a batch", (((loop,),),)))
    return found


def index_builds(bed: Testbed, connection: Connection) -> list[Contender]:
    """Return the contenders that bring the rows and build the HNSW index, with the same settings and streams.

    ``connection`` is to main, whose settings the pipeline plans its build by.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT setting::pg_catalog.int8 * 1024,"
            " pg_catalog.current_setting('max_parallel_maintenance_workers')::pg_catalog.int4"
            " FROM pg_catalog.pg_settings WHERE name = 'maintenance_work_mem'"
        )
        ((memory, workers),) = cursor.fetchall()
    dimensions = int(bed.environment["EMBEDDING_DIMENSIONS"])
    server = BuildPlan(memory_bytes=memory, workers=workers)
    plan = plan_build(bed.content.rows, dimensions, bed.extension, server)
    settings = (
        sql.SQL("SET maintenance_work_mem = {}").format(sql.Literal(f"{plan.memory_bytes // 1024}kB")),
        sql.SQL("SET max_parallel_maintenance_workers = {}").format(sql.Literal(plan.workers)),
    )
    build = _psql(bed, bed.main, *(one.as_string(connection) for one in settings), bed.index.definition)
    return [
        Contender(
            name=BY_HAND,
            what=f"raw-{DEFAULT_WORKERS}, then CREATE INDEX by psql",
            kind="index",
            steps=(_raw_step(bed, connection, DEFAULT_WORKERS), ((build,),)),
            against=(BY_HAND,),
        ),
        Contender(
            name=COPY_AND_INDEX,
            what="pipeline copy, the index deferred and built",
            kind="index",
            steps=(copy_step(DEFAULT_WORKERS),),
            against=(BY_HAND,),
            finds_index=True,
        ),
    ]


def checks() -> list[Contender]:
    """Return the contenders that prove a load."""
    command = (sys.executable, "-m", "pipeline", "verify", "--check", "rows", "--check", "parity")
    what = "pipeline verify: every byte of both sides, and exact search"
    return [Contender(name=VERIFY, what=what, kind="check", steps=(((command,),),), against=COPIES)]


def load(name: str, what: str, steps: tuple[Step, ...], against: tuple[str, ...] = RAW) -> Contender:
    """Return a contender that brings the rows."""
    return Contender(name=name, what=what, kind="load", steps=steps, against=against)


def copy_step(workers: int, *arguments: str) -> Step:
    """Return the step of one ``pipeline copy``."""
    return (((sys.executable, "-m", "pipeline", "copy", "--workers", str(workers), *arguments),),)


def _raw_step(bed: Testbed, connection: Connection, count: int) -> Step:
    """Return pipes that run at once, the first and the last open-ended."""
    edges = [None, *(bed.pages * number // count for number in range(1, count)), None]
    return tuple(_raw_pipe(bed, connection, edges[place], edges[place + 1]) for place in range(count))


def _raw_pipe(bed: Testbed, connection: Connection, lower: int | None, upper: int | None) -> Pipe:
    bounds = [
        sql.SQL("ctid {} {}::pg_catalog.tid").format(sql.SQL(operator), sql.Literal(f"({page},0)"))
        for operator, page in ((">=", lower), ("<", upper))
        if page is not None
    ]
    where = sql.SQL("WHERE ") + sql.SQL(" AND ").join(bounds) if bounds else sql.SQL("")
    columns = sql.SQL(", ").join(map(sql.Identifier, bed.mapping.columns))
    out = sql.SQL("COPY (SELECT {} FROM {} {}) TO STDOUT (FORMAT binary)").format(columns, bed.table, where)
    into = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(bed.table, columns)
    return (
        _psql(bed, bed.legacy, out.as_string(connection)),
        _psql(bed, bed.main, into.as_string(connection)),
    )


def _dump_pipe(bed: Testbed, connection: Connection) -> Pipe:
    """Return dump and restore by main's programs: a newer pg_dump reads an older server, never the reverse."""
    programs = bed.main.programs
    table = f"--table={bed.table.as_string(connection)}"
    dump = (str(programs / "pg_dump"), *_where(bed, bed.legacy), "-Fc", "-Z0", "--data-only", table)
    restore = (str(programs / "pg_restore"), *_where(bed, bed.main), "--data-only", "--exit-on-error")
    return (dump, restore)


def _pgcopydb_step(bed: Testbed, program: str, urls: tuple[str, str]) -> Step:
    """Return pgcopydb's load. It looks for psql and pg_dump in PATH, so main's go first."""
    path = f"PATH={bed.main.programs}:{bed.environment.get('PATH', '')}"
    ends = ("--source", urls[0], "--target", urls[1], "--dir", str(bed.folder / "pgcopydb"), "--restart")
    return ((("/usr/bin/env", path, program, "copy", "table-data", *ends, "--table-jobs", str(DEFAULT_WORKERS)),),)


def _pgloader_step(bed: Testbed, program: str, urls: tuple[str, str]) -> Step:
    """Return pgloader's load. It takes its orders from a file alone."""
    orders = bed.folder / "pgloader.load"
    orders.write_text(
        f"load database from {urls[0]} into {urls[1]} with data only, workers = {DEFAULT_WORKERS}, concurrency = 1"
        f" including only table names matching '{bed.mapping.table}' in schema '{bed.mapping.schema}';\n"
    )
    return (((program, "--root-dir", str(bed.folder), str(orders)),),)


def _psql(bed: Testbed, server: Server, *statements: str) -> Command:
    """Return main's psql for either server, so that both ends are the same program."""
    each = [part for statement in statements for part in ("-c", statement)]
    return (str(bed.main.programs / "psql"), *_where(bed, server), "-X", "-q", "-v", "ON_ERROR_STOP=1", *each)


def _where(bed: Testbed, server: Server) -> Command:
    """Return the arguments that reach a server, by the proxy where there is one."""
    port = str(bed.ports.get(server.port, server.port))
    return ("-w", "-h", server.host, "-p", port, "-U", SUPERUSER, "-d", bed.database_on(server))


def _url(bed: Testbed, server: Server) -> str:
    port = bed.ports.get(server.port, server.port)
    return f"postgresql://{SUPERUSER}@{server.host}:{port}/{bed.database_on(server)}"
