"""What a table looks like: columns, types, key, size, rights, and the extension beside it."""

import re
from dataclasses import dataclass, replace

from psycopg2 import sql

from pipeline.errors import RefusedError
from pipeline.postgres.columns import Column, read_columns
from pipeline.postgres.database import Cursor, ServerIdentity, Session, identify
from pipeline.settings import TableMapping

BLOCK_BYTES = 8192
# The first version that reads a range of pages as such; before, each range is a scan of the whole heap.
TID_RANGE_VERSION = 140000
KINDS = {
    "r": "a table",
    "p": "a partitioned table",
    "v": "a view",
    "m": "a materialized view",
    "f": "a foreign table",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """The extension ``vector``: the schema of its types and operators, and its version."""

    schema: str
    version: tuple[int, ...]

    @property
    def text(self) -> str:
        """Return the version as people write it."""
        return ".".join(map(str, self.version))


@dataclass(frozen=True, slots=True, kw_only=True)
class Heap:
    """A relation that rows of a table lie in: the table itself, or a partition. ``bytes`` count TOAST.

    ``file`` is the number of its file: another one after a rewrite, which moves rows to other places.
    """

    oid: int
    file: int
    schema: str
    name: str
    pages: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table as the catalog describes it, with the identity of the server that it was read from.

    ``heaps`` are where its rows lie, one for each partition; they are empty for what has no pages and
    no ``xmin`` of its own (a view, a foreign table, another access method). ``inherited`` says that other
    tables inherit from it, whose rows would be read with its own. ``encoding`` is the database's. The texts
    that begin with ``quoted`` are names as a person types them in SQL; ``role`` is who asked. ``left_out``
    is the condition of rows that are neither read nor compared; None: there is none. ``version`` is the
    server's (130023 is 13.23), ``peer_version`` that of the server whose table this one is compared with.
    """

    server: ServerIdentity
    extension: Extension | None
    oid: int
    schema: str
    name: str
    kind: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    heaps: tuple[Heap, ...]
    inherited: bool
    encoding: str
    bytes: int
    rows_estimate: int
    owned: bool
    row_security: bool
    may_use_schema: bool
    may_delete: bool
    may_create_temporary: bool
    role: str
    quoted: str
    quoted_schema: str
    quoted_database: str
    quoted_role: str
    version: int
    peer_version: int | None = None
    left_out: sql.Composable | None = None

    @property
    def qualified(self) -> str:
        """Return ``schema.name`` for people."""
        return f"{self.schema}.{self.name}"

    @property
    def identifier(self) -> sql.Identifier:
        """Return the quoted, qualified name for SQL."""
        return sql.Identifier(self.schema, self.name)

    @property
    def scanned(self) -> sql.Composable:
        """Return what FROM names to read every row that is not left out, under the alias ``r``."""
        return self.rows_sql("r")

    def rows_sql(self, alias: str, relation: tuple[str, str] | None = None) -> sql.Composable:
        """Return what FROM names: ONLY where a table has rows of its own, or ``relation``, one of its heaps.

        Where rows are left out it is a subquery, which the planner flattens: a condition on ctid is a
        TID range scan all the same.
        """
        own = self.kind == "r" or relation is not None
        place = self.identifier if relation is None else sql.Identifier(*relation)
        rows = sql.SQL("ONLY {}").format(place) if own else place
        if self.left_out is not None:
            system = sql.SQL("ctid, xmin, " if self.heaps else "")
            rows = sql.SQL("(SELECT {}* FROM {} WHERE ({}) IS NOT TRUE)").format(system, rows, self.left_out)
        return sql.SQL("{} AS {}").format(rows, sql.Identifier(alias))

    def only_left_out(self) -> "Table":
        """Return the table of those rows alone that are left out here."""
        condition = sql.SQL("true") if self.left_out is None else sql.SQL("({}) IS NOT TRUE").format(self.left_out)
        return replace(self, left_out=condition)

    @property
    def pages(self) -> int:
        """Return the number of pages of all heaps, TOAST not among them."""
        return sum(heap.pages for heap in self.heaps)

    @property
    def paged(self) -> bool:
        """Return whether its rows are read by ranges of pages, and not by ranges of its key."""
        return bool(self.heaps) and self.version >= TID_RANGE_VERSION

    @property
    def common_version(self) -> int:
        """Return the older one's version, of the server and of the one that it is compared with."""
        return self.version if self.peer_version is None else min(self.version, self.peer_version)

    def column(self, name: str) -> Column | None:
        """Return the column of that name, if there is one."""
        return next((column for column in self.columns if column.name == name), None)


def describe(session: Session, mapping: TableMapping) -> Table:
    """Read the table's description in one read-only transaction.

    Raises RefusedError where there is no such table, with the names that come close.
    """
    with session.transaction(read_only=True) as cursor:
        return read_table(cursor, mapping, session)


def read_table(cursor: Cursor, mapping: TableMapping, session: Session) -> Table:
    """Read the table's description inside the caller's transaction. Raises RefusedError."""
    cursor.execute(_TABLE_SQL, {"schema": mapping.schema, "name": mapping.table})
    row = cursor.fetchone()
    if row is None:
        raise _missing(cursor, mapping, session)
    oid, kind, encoding, owned, secured, may_use_schema, may_delete, may_stage, *names = row
    role, quoted_schema, quoted_name, quoted_database, quoted_role = names
    extension = read_extension(cursor)
    heaps, inherited, estimate = _read_heaps(cursor, oid, kind)
    return Table(
        server=identify(cursor),
        extension=extension,
        oid=oid,
        schema=mapping.schema,
        name=mapping.table,
        kind=kind,
        columns=read_columns(cursor, oid),
        key=_read_key(cursor, oid),
        heaps=heaps,
        inherited=inherited,
        encoding=encoding,
        bytes=sum(heap.bytes for heap in heaps),
        rows_estimate=estimate,
        owned=owned,
        row_security=secured,
        may_use_schema=may_use_schema,
        may_delete=may_delete,
        may_create_temporary=may_stage,
        role=role,
        quoted=f"{quoted_schema}.{quoted_name}",
        quoted_schema=quoted_schema,
        quoted_database=quoted_database,
        quoted_role=quoted_role,
        version=session.version,
    )


def read_extension(cursor: Cursor) -> Extension | None:
    """Return the extension ``vector`` of this database, or None where it is not installed."""
    cursor.execute(
        "SELECT n.nspname, e.extversion FROM pg_catalog.pg_extension e"
        " JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector'"
    )
    row = cursor.fetchone()
    if row is None:
        return None
    return Extension(schema=row[0], version=tuple(int(part) for part in re.findall(r"\d+", row[1])))


# A role without USAGE on the schema sees the row too.
_TABLE_SQL = """
SELECT c.oid::pg_catalog.int8, c.relkind::pg_catalog.text, pg_catalog.getdatabaseencoding()::pg_catalog.text,
       pg_catalog.pg_has_role(c.relowner, 'USAGE'),
       pg_catalog.row_security_active(c.oid),
       pg_catalog.has_schema_privilege(n.oid, 'USAGE'),
       pg_catalog.has_table_privilege(c.oid, 'DELETE'),
       pg_catalog.has_database_privilege(pg_catalog.current_database(), 'TEMPORARY'),
       CURRENT_USER::pg_catalog.text, pg_catalog.quote_ident(n.nspname), pg_catalog.quote_ident(c.relname),
       pg_catalog.quote_ident(pg_catalog.current_database()), pg_catalog.quote_ident(CURRENT_USER)
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %(schema)s AND c.relname = %(name)s AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
"""

# The table and all below it; what only divides has no rows. Sizes of the files now, not of the last ANALYZE.
_HEAPS_SQL = """
WITH RECURSIVE tree AS (
    SELECT %(oid)s::pg_catalog.oid AS oid
    UNION ALL SELECT i.inhrelid FROM pg_catalog.pg_inherits i JOIN tree ON i.inhparent = tree.oid)
SELECT c.oid::pg_catalog.int8, coalesce(pg_catalog.pg_relation_filenode(c.oid), 0)::pg_catalog.int8,
       n.nspname, c.relname,
       c.relkind IN ('r', 'm') AND (c.relam = 0 OR m.amname = 'heap') AND (c.oid = %(oid)s
           OR pg_catalog.has_table_privilege(c.oid, 'SELECT') AND NOT pg_catalog.row_security_active(c.oid)
           AND pg_catalog.has_schema_privilege(n.oid, 'USAGE')),
       CASE WHEN c.relkind IN ('r', 'm') THEN pg_catalog.pg_relation_size(c.oid)
           / pg_catalog.current_setting('block_size')::pg_catalog.int8 ELSE 0 END,
       CASE WHEN c.relkind IN ('r', 'm') THEN pg_catalog.pg_table_size(c.oid) ELSE 0 END,
       CASE WHEN c.relpages > 0 AND c.reltuples > 0 AND c.relkind IN ('r', 'm') THEN c.reltuples / c.relpages
           * (pg_catalog.pg_relation_size(c.oid) / pg_catalog.current_setting('block_size')::pg_catalog.int8)
           ELSE 0 END
FROM tree JOIN pg_catalog.pg_class c ON c.oid = tree.oid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_catalog.pg_am m ON m.oid = c.relam
WHERE c.relkind <> 'p' ORDER BY c.oid
"""


def _read_heaps(cursor: Cursor, oid: int, kind: str) -> tuple[tuple[Heap, ...], bool, int]:
    """Return where the rows lie, whether other tables inherit from an ordinary one, and about how many rows."""
    cursor.execute(_HEAPS_SQL, {"oid": oid})
    found = cursor.fetchall()
    # One part that has no pages, or that only its parent may read, is enough: then the whole is read by key.
    paged = all(row[4] for row in found)
    heaps = tuple(
        Heap(oid=part, file=file, schema=schema, name=name, pages=pages, bytes=size)
        for part, file, schema, name, _, pages, size, _ in found
        if paged
    )
    return heaps, kind == "r" and len(found) > 1, int(sum(row[7] for row in found))


def heap_files(cursor: Cursor, table: Table) -> tuple[int, ...]:
    """Return the numbers of the heaps' files as they are now, in the order of ``heaps``."""
    cursor.execute(_HEAPS_SQL, {"oid": table.oid})
    return tuple(row[1] for row in cursor.fetchall())


# The primary key, else a unique index that can stand for one: whole, plain, immediate, never null.
_KEY_SQL = """
SELECT ARRAY(SELECT a.attname FROM pg_catalog.unnest(i.indkey::pg_catalog.int2[]) WITH ORDINALITY AS k(attnum, place)
             JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
             WHERE k.place <= i.indnkeyatts ORDER BY k.place)::pg_catalog.text[]
FROM pg_catalog.pg_index i
WHERE i.indrelid = %(oid)s AND i.indisunique AND i.indisvalid AND i.indimmediate
  AND i.indpred IS NULL AND i.indexprs IS NULL
  AND NOT EXISTS (SELECT 1 FROM pg_catalog.pg_attribute a WHERE a.attrelid = i.indrelid
                  AND a.attnum = ANY (i.indkey::pg_catalog.int2[]) AND NOT a.attnotnull)
ORDER BY i.indisprimary DESC, i.indnkeyatts, i.indexrelid LIMIT 1
"""


def _read_key(cursor: Cursor, oid: int) -> tuple[str, ...]:
    cursor.execute(_KEY_SQL, {"oid": oid})
    row = cursor.fetchone()
    return tuple(row[0]) if row else ()


def _missing(cursor: Cursor, mapping: TableMapping, session: Session) -> RefusedError:
    fact = f"{session.label} has no table {mapping.qualified}"
    cursor.execute(
        "SELECT pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname)"
        " FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
        " WHERE pg_catalog.lower(c.relname) = pg_catalog.lower(%s) AND c.relkind IN ('r', 'p', 'v', 'm', 'f')"
        " ORDER BY 1 LIMIT 3",
        (mapping.table,),
    )
    if near := [name for (name,) in cursor.fetchall()]:
        return RefusedError(f"{fact}; there is {', '.join(near)}", f"if it is that one, set PGVECTOR_TABLE={near[0]}")
    if _has_ledger(cursor):
        # Alembic believes that the table stands: it was dropped since, or PGVECTOR_TABLE is another one now.
        return RefusedError(fact, "check PGVECTOR_TABLE, or run: alembic downgrade 0001, then alembic upgrade head")
    if session.endpoint.name == "main":
        return RefusedError(fact, "run: alembic upgrade head")
    return RefusedError(fact, "check PGVECTOR_TABLE, and the database that pipeline settings shows")


def _has_ledger(cursor: Cursor) -> bool:
    cursor.execute(
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = 'pipeline' AND c.relname = 'alembic_version')"
    )
    row = cursor.fetchone()
    return bool(row and row[0])
