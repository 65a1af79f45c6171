"""Who runs: raw pipes, the pipeline, pg_dump, a loop of inserts; each as the processes of one turn."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from psycopg2 import sql

from measure import Command, Pipe, Step
from pipeline.demo.servers import SUPERUSER, Server
from pipeline.postgres.indexes import plan_build
from testbed import DATABASE, Connection, Testbed

COPY_WORKERS = (1, 2, 4)
# The engine's default: it loads before an index is built, and before verify.
DEFAULT_COPY = "copy-2"
INSERT_LOOP = Path(__file__).with_name("insert_loop.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """Steps that run one after the other. ``against`` names those whose best median is the ratio's base.

    A ``load`` begins with an empty main without HNSW index and ends with all rows; an ``index`` ends
    with the index too; a ``check`` reads what the last load left. ``finds_index``: main has the index at
    the start, as after ``alembic upgrade head``.
    """

    name: str
    what: str
    kind: Literal["load", "index", "check"]
    steps: tuple[Step, ...]
    against: tuple[str, ...]
    finds_index: bool = False


def loads(bed: Testbed, connection: Connection, *, with_insert: bool) -> tuple[Contender, ...]:
    """Return the contenders that bring the rows. ``connection`` is to any server: it quotes the names."""
    half = sql.SQL("WHERE ctid {} {}::pg_catalog.tid")
    middle = sql.Literal(f"({bed.pages // 2},0)")
    halves = tuple(_raw_pipe(bed, connection, half.format(sql.SQL(operator), middle)) for operator in ("<", ">="))
    found = [
        _load("raw-1", "psql COPY | psql COPY, binary", ((_raw_pipe(bed, connection, sql.SQL("")),),)),
        _load("raw-2", "two such pipes at once, each half the pages", (halves,)),
        *(
            _load(f"copy-{workers}", f"pipeline copy --workers {workers}", (_copy_step(workers),))
            for workers in COPY_WORKERS
        ),
        _load("dump", "pg_dump -Fc -Z0 | pg_restore, data only", ((_dump_pipe(bed, connection),),)),
    ]
    if with_insert:
        urls = (_url(bed.legacy), _url(bed.main))
        loop = (sys.executable, str(INSERT_LOOP), *urls)
        found.append(_load("insert", "SQLAlchemy select and insert, 1,000 rows a batch", (((loop,),),)))
    return tuple(found)


def index_builds(bed: Testbed, connection: Connection) -> tuple[Contender, ...]:
    """Return the contenders that bring the rows and build the HNSW index, with the same settings.

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
    plan = plan_build(bed.content.rows, dimensions, bed.extension, memory, workers)
    settings = (
        sql.SQL("SET maintenance_work_mem = {}").format(sql.Literal(f"{plan.memory_bytes // 1024}kB")),
        sql.SQL("SET max_parallel_maintenance_workers = {}").format(
            sql.Literal(workers if plan.workers is None else plan.workers)
        ),
    )
    build = _psql(bed, bed.main, *(one.as_string(connection) for one in settings), bed.index.definition)
    by_hand = "raw-1+index"
    return (
        Contender(
            name=by_hand,
            what="raw-1, then CREATE INDEX by psql",
            kind="index",
            steps=((_raw_pipe(bed, connection, sql.SQL("")),), ((build,),)),
            against=(by_hand,),
        ),
        Contender(
            name=f"{DEFAULT_COPY}+index",
            what="pipeline copy, the index deferred and built",
            kind="index",
            steps=(_copy_step(2),),
            against=(by_hand,),
            finds_index=True,
        ),
    )


def checks() -> tuple[Contender, ...]:
    """Return the contenders that prove a load."""
    command = (sys.executable, "-m", "pipeline", "verify")
    copies = tuple(f"copy-{workers}" for workers in COPY_WORKERS)
    what = "pipeline verify: both sides, every byte, and search"
    return (Contender(name="verify", what=what, kind="check", steps=(((command,),),), against=copies),)


def _load(name: str, what: str, steps: tuple[Step, ...]) -> Contender:
    return Contender(name=name, what=what, kind="load", steps=steps, against=("raw-1", "raw-2"))


def _copy_step(workers: int) -> Step:
    return (((sys.executable, "-m", "pipeline", "copy", "--workers", str(workers)),),)


def _raw_pipe(bed: Testbed, connection: Connection, where: sql.Composable) -> Pipe:
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
    dump = (str(programs / "pg_dump"), *_where(bed.legacy), "-Fc", "-Z0", "--data-only", table)
    restore = (str(programs / "pg_restore"), *_where(bed.main), "--data-only", "--exit-on-error")
    return (dump, restore)


def _psql(bed: Testbed, server: Server, *statements: str) -> Command:
    """Return main's psql for either server, so that both ends are the same program."""
    each = [part for statement in statements for part in ("-c", statement)]
    return (str(bed.main.programs / "psql"), *_where(server), "-X", "-q", "-v", "ON_ERROR_STOP=1", *each)


def _where(server: Server) -> Command:
    return ("-w", "-h", server.host, "-p", str(server.port), "-U", SUPERUSER, "-d", DATABASE)


def _url(server: Server) -> str:
    return f"postgresql+psycopg2://{SUPERUSER}@{server.host}:{server.port}/{DATABASE}"
