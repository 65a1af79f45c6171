"""Secondary indexes: which can be deferred, and building them again with a plan for memory."""

from dataclasses import dataclass

from psycopg2 import sql

from pipeline.postgres.database import Cursor
from pipeline.postgres.tables import Extension

# Up to and with 0.8.1 a parallel HNSW build can write beyond its buffer (CVE-2026-3172).
SAFE_PARALLEL_BUILD = (0, 8, 2)
# What a build may take without being told more; a graph that does not fit is built several times slower.
MAX_BUILD_BYTES = 1024**3
# Per row beside the vector: the element, its neighbour lists at m = 16 and the allocator's share
# (773 bytes measured on 0.8.5, rounded up: a graph that almost fits is built as slowly as one that does not).
GRAPH_BYTES_PER_ROW = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """A secondary index: ``definition`` is the server's own CREATE INDEX, fully qualified."""

    schema: str
    name: str
    definition: str
    comment: str | None


_SECONDARY_SQL = """
SELECT n.nspname, c.relname, pg_catalog.pg_get_indexdef(i.indexrelid),
       pg_catalog.obj_description(i.indexrelid, 'pg_class')
FROM pg_catalog.pg_index i
JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE i.indrelid = %s AND NOT i.indisunique AND NOT i.indisprimary AND NOT i.indisreplident
  AND NOT i.indisclustered
  AND NOT EXISTS (SELECT 1 FROM pg_catalog.pg_constraint k WHERE k.conindid = i.indexrelid)
ORDER BY n.nspname, c.relname
"""


def secondary_indexes(cursor: Cursor, table_oid: int) -> tuple[Index, ...]:
    """Return the indexes that hold no constraint: never the key, never a unique one."""
    cursor.execute(_SECONDARY_SQL, (table_oid,))
    return tuple(
        Index(schema=schema, name=name, definition=definition, comment=comment)
        for schema, name, definition, comment in cursor.fetchall()
    )


def drop_sql(schema: str, name: str) -> sql.Composable:
    """Return DROP INDEX for one index."""
    return sql.SQL("DROP INDEX {}").format(sql.Identifier(schema, name))


def comment_sql(index: Index) -> sql.Composable:
    """Return COMMENT ON INDEX: migrations know by it what they made."""
    return sql.SQL("COMMENT ON INDEX {} IS {}").format(
        sql.Identifier(index.schema, index.name), sql.Literal(index.comment)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildPlan:
    """Settings of one build: bytes of maintenance_work_mem, and processes beside the first one."""

    memory_bytes: int
    workers: int


def plan_build(
    rows: int,
    dimensions: int,
    extension: Extension,
    server: BuildPlan,
    asked_bytes: int | None = None,
    asked_workers: int | None = None,
) -> BuildPlan:
    """Plan memory and workers of an HNSW build from the ``server``'s own settings and what was asked for.

    A graph of ``rows`` vectors wants 4 bytes a dimension and its links; unless more is asked for, it
    gets up to MAX_BUILD_BYTES, and never less than the server's own setting. A version whose parallel
    build is dangerous builds with one process, whatever was asked for.
    """
    wanted = rows * (4 * dimensions + GRAPH_BYTES_PER_ROW)
    memory = max(server.memory_bytes, min(wanted, MAX_BUILD_BYTES))
    workers = server.workers if asked_workers is None else asked_workers
    return BuildPlan(
        memory_bytes=memory if asked_bytes is None else asked_bytes,
        workers=workers if extension.version >= SAFE_PARALLEL_BUILD else 0,
    )


def build_state(cursor: Cursor, schema: str, name: str) -> str | None:
    """Return ``valid``, ``invalid``, or None where no index of that name exists."""
    cursor.execute(
        "SELECT i.indisvalid FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid"
        " JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s",
        (schema, name),
    )
    row = cursor.fetchone()
    return None if row is None else "valid" if row[0] else "invalid"


def read_progress(cursor: Cursor, backend: int) -> tuple[str, float | None] | None:
    """Return phase and fraction (0 to 1, None where unknown) of the build that a backend is at."""
    cursor.execute(
        "SELECT phase, blocks_done, blocks_total, tuples_done, tuples_total"
        " FROM pg_catalog.pg_stat_progress_create_index WHERE pid = %s",
        (backend,),
    )
    row = cursor.fetchone()
    if row is None:
        return None
    phase, blocks, blocks_total, tuples, tuples_total = row
    if tuples_total:
        return phase, min(1.0, tuples / tuples_total)
    return phase, min(1.0, blocks / blocks_total) if blocks_total else None
