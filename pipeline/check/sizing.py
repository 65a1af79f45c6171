"""What a copy will take: time from a timed sample of the source, memory and disk from the figures of the table."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from psycopg2 import sql

from pipeline.check.obstacles import Obstacles
from pipeline.check.preflight import Finding
from pipeline.errors import StatementError
from pipeline.postgres.database import Session, clock
from pipeline.postgres.indexes import GRAPH_BYTES_PER_ROW, MAX_BUILD_BYTES
from pipeline.postgres.slices import Slice, plan_pages, slice_sql
from pipeline.postgres.tables import Table
from pipeline.wording import counted

SAMPLE_BYTES = 8 * 1024 * 1024
SAMPLE_SECONDS = 2
# pgvector's HNSW page: 8 kB less its header and special space. An element is its header with ten heap
# pointers, the vector and a line pointer; beside it stand its neighbours, 2 m pointers of 6 bytes at m = 16.
_PAGE_BYTES, _PAGE_ROOM = 8192, 8160
_ELEMENT_BYTES, _NEIGHBOURS_BYTES = 72 + 8 + 4, 4 + 192 + 4 + 4
# Beyond this many dimensions the index is over halfvec: 2 bytes a number.
_LARGEST_VECTOR = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What was read of the source in the given time: bytes as they go over the wire.

    ``share`` (0 to 1) is how much of the table that was, None where the time ran out before.
    """

    bytes: int
    seconds: float
    share: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What the copy will take, as far as it can be told without writing. Bytes, seconds.

    ``read_seconds`` is one stream's time to read all rows, None where nothing could be timed; how fast
    the target writes is not in it. ``disk_bytes`` is what the target's table and its indexes will fill,
    by the source's table (with what is dead in it), ``wal_bytes`` what is logged meanwhile. ``free_bytes``
    are what the target's file system has left, None where that does not show.
    """

    rows: int
    table_bytes: int
    sample_bytes: int
    sample_seconds: float
    read_seconds: float | None
    index_bytes: int
    disk_bytes: int
    wal_bytes: int
    graph_bytes: int
    free_bytes: int | None


class _Counter:
    """Counts what is written to it, and keeps nothing."""

    def __init__(self) -> None:
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.bytes += len(data)
        return len(data)


def take_sample(session: Session, table: Table, columns: Sequence[str]) -> Sample:
    """Read one slice from the middle of the table as a copy would, and drop it: 8 MB or 2 seconds, at most.

    Raises PipelineError.
    """
    parts = plan_pages(table, SAMPLE_BYTES) or (Slice(ordinal=0),)
    part = parts[len(parts) // 2]
    query = sql.SQL("COPY (SELECT {} {}) TO STDOUT (FORMAT binary)").format(
        sql.SQL(", ").join(map(sql.Identifier, columns)), slice_sql(table, part)
    )
    counter, whole, started = _Counter(), True, clock()
    try:
        with session.transaction(read_only=True) as cursor:
            cursor.execute("SELECT pg_catalog.set_config('statement_timeout', %s, true)", (f"{SAMPLE_SECONDS}s",))
            started = clock()
            cursor.copy_expert(query, counter)
    except StatementError:
        if clock() - started < SAMPLE_SECONDS:
            raise
        whole = False
    return Sample(bytes=counter.bytes, seconds=clock() - started, share=_share(table, part) if whole else None)


def _share(table: Table, part: Slice) -> float:
    """Return how much of the table a slice holds, by bytes; a page weighs as much as its neighbours."""
    for heap in table.heaps:
        if part.relation in (None, (heap.schema, heap.name)) and heap.pages and table.bytes:
            first = part.lower if isinstance(part.lower, int) else 0
            behind = part.upper if isinstance(part.upper, int) else heap.pages
            return (behind - first) / heap.pages * heap.bytes / table.bytes
    return 1.0


# Where the table's files lie (empty: in the data directory), and what tells that folder from any other.
_FOLDER_SQL = """
SELECT (SELECT setting FROM pg_catalog.pg_settings WHERE name = 'data_directory'),
       pg_catalog.pg_tablespace_location(CASE WHEN c.reltablespace = 0 THEN d.dattablespace ELSE c.reltablespace END),
       extract(epoch FROM f.modification)::pg_catalog.int8, extract(epoch FROM f.change)::pg_catalog.int8
FROM pg_catalog.pg_class c, pg_catalog.pg_database d, pg_catalog.pg_stat_file('.') f
WHERE c.oid = %s AND d.datname = pg_catalog.current_database()
"""


def read_free_bytes(session: Session, table: Table) -> int | None:
    """Return what the file system of the table's files has left; None where it does not show.

    A server tells the sizes of files, not of file systems: it shows only where the server's folder is one
    of this machine's too, and the role may ask for it. Raises PipelineError.
    """
    ((may_ask,),) = session.rows(
        "SELECT pg_catalog.has_function_privilege('pg_catalog.pg_stat_file(pg_catalog.text)', 'EXECUTE')"
    )
    if not session.endpoint.is_local or not may_ask:
        return None
    ((folder, tablespace, modified, changed),) = session.rows(_FOLDER_SQL, (table.oid,))
    try:
        # On a loopback port may sit a container, or a tunnel to another machine with a folder of that name.
        found = Path(folder or "").stat()
        if (int(found.st_mtime), int(found.st_ctime)) != (modified, changed):
            return None
        free = os.statvfs(tablespace or folder)
    except OSError:
        return None
    return free.f_bavail * free.f_frsize


def check_space(figures: Estimate, name: str) -> tuple[Finding, ...]:
    """Judge whether the target's disk holds what comes; no query. How much WAL stays there is the server's matter."""
    if figures.free_bytes is None or figures.disk_bytes <= figures.free_bytes:
        return ()
    return (
        Finding(
            severity="warn",
            fact=f"the table and its indexes want about {-(-figures.disk_bytes // 10**6):,} MB on {name}, where"
            f" {figures.free_bytes // 10**6:,} MB are free",
            hint="make room; a copy that a full disk stopped goes on when it is run again",
        ),
    )


def estimate(
    table: Table, sample: Sample | None, rows: int, dimensions: int, target: Obstacles, free_bytes: int | None
) -> Estimate:
    """Work out what a copy of ``rows`` rows takes; no query."""
    indexed = index_bytes(rows, dimensions) if target.has_graph else 0
    return Estimate(
        rows=rows,
        table_bytes=table.bytes,
        sample_bytes=sample.bytes if sample else 0,
        sample_seconds=sample.seconds if sample else 0.0,
        read_seconds=read_seconds(table, sample) if sample else None,
        index_bytes=indexed,
        disk_bytes=table.bytes + indexed,
        wal_bytes=table.bytes + indexed,
        graph_bytes=graph_bytes(rows, dimensions),
        free_bytes=free_bytes,
    )


def read_seconds(table: Table, sample: Sample) -> float | None:
    """Return one stream's time to read the whole table, None where the sample does not tell it."""
    if sample.share is not None:
        return sample.seconds / sample.share if sample.share else None
    # Cut off: what share was read does not show, so the table's bytes stand for those on the wire.
    return sample.seconds * table.bytes / sample.bytes if sample.bytes and table.bytes else None


def graph_bytes(rows: int, dimensions: int) -> int:
    """Return the memory that an HNSW build at m = 16 wants: vectors of 4 bytes a number, and their links."""
    return rows * (4 * dimensions + GRAPH_BYTES_PER_ROW)


def index_bytes(rows: int, dimensions: int) -> int:
    """Return the size of an HNSW index at m = 16 on disk: an element never spans two pages."""
    element = _ELEMENT_BYTES + dimensions * (4 if dimensions <= _LARGEST_VECTOR else 2)
    if together := _PAGE_ROOM // (element + _NEIGHBOURS_BYTES):
        return rows * _PAGE_BYTES // together
    return rows * (_PAGE_BYTES + _PAGE_BYTES * _NEIGHBOURS_BYTES // _PAGE_ROOM)


def check_memory(target: Obstacles, rows: int, dimensions: int, name: str) -> tuple[Finding, ...]:
    """Judge whether the graph of the target's HNSW index fits into what its build will get; no query."""
    wanted, given = graph_bytes(rows, dimensions), max(MAX_BUILD_BYTES, target.build_bytes)
    if not target.has_graph or wanted <= given:
        return ()
    return (
        Finding(
            severity="warn",
            fact=f"the HNSW graph of {counted(rows, 'row')} wants {-(-wanted // 10**6):,} MB of memory on {name}, and"
            f" gets {given // 10**6:,}: its build will be several times slower",
            hint=f"if {name} has it: pipeline copy --index-memory {-(-wanted // 2**20)}",
        ),
    )
