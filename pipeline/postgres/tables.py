"""What a table looks like: columns, types, key, size, rights, and the extension beside it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from psycopg2 import sql

from pipeline.errors import RefusedError
from pipeline.postgres.columns import COLUMNS_SQL, Column, column
from pipeline.postgres.database import Cursor, Session
from pipeline.postgres.facts import IDENTITY_SQL, ServerIdentity, gather, horizon_sql, identity
from pipeline.settings import TableMapping

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
    server's (130023 is 13.23), ``peer_version`` that of the server whose table this one is compared with;
    ``timeline`` is the server's: another one once it was promoted, or set back to a backup.
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
    timeline: int | None = None
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
    """Read the table's description. Raises RefusedError where there is no such table, with names that come close."""
    return survey(session, mapping)[0]


def survey(session: Session, mapping: TableMapping) -> tuple[Table, int]:
    """Read the table's description, and the server's horizon before it, in one snapshot and one round trip.

    Raises RefusedError where there is no such table, with the names that come close.
    """
    queries = (horizon_sql(session.version), _TABLE_SQL, EXTENSION_SQL, IDENTITY_SQL, HEAPS_SQL, COLUMNS_SQL, _KEY_SQL)
    with session.transaction(read_only=True, single=True) as cursor:
        names = {"schema": mapping.schema, "name": mapping.table}
        ((horizon,),), found, extensions, ((*server, timeline),), heap_rows, column_rows, keys = gather(
            cursor, queries, names
        )
    if not found:
        raise _missing(session, mapping)
    ((oid, kind, encoding, owned, secured, may_use_schema, may_delete, may_stage, *quoted),) = found
    role, quoted_schema, quoted_name, quoted_database, quoted_role = quoted
    heaps = _heaps(heap_rows)
    table = Table(
        server=identity(*server),
        extension=_extension(extensions),
        oid=oid,
        schema=mapping.schema,
        name=mapping.table,
        kind=kind,
        columns=tuple(column(*row) for row in column_rows),
        key=tuple(keys[0][0]) if keys else (),
        heaps=heaps,
        # Of an ordinary table whose rows would be read with its own.
        inherited=kind == "r" and len(heap_rows) > 1,
        encoding=encoding,
        bytes=sum(heap.bytes for heap in heaps),
        rows_estimate=int(sum(row[-1] for row in heap_rows)),
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
        timeline=timeline,
    )
    return table, horizon


EXTENSION_SQL = """
SELECT n.nspname, e.extversion FROM pg_catalog.pg_extension e
JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector'
"""


def read_extension(cursor: Cursor) -> Extension | None:
    """Return the extension ``vector`` of this database, or None where it is not installed."""
    cursor.execute(EXTENSION_SQL)
    return _extension(cursor.fetchall())


def _extension(rows: Sequence[Sequence[str]]) -> Extension | None:
    if not rows:
        return None
    ((schema, version),) = rows
    return Extension(schema=schema, version=tuple(int(part) for part in re.findall(r"\d+", version)))


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
HEAPS_SQL = """
WITH RECURSIVE root AS (
    SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = %(schema)s AND c.relname = %(name)s),
tree AS (
    SELECT root.oid FROM root
    UNION ALL SELECT i.inhrelid FROM pg_catalog.pg_inherits i JOIN tree ON i.inhparent = tree.oid)
SELECT c.oid::pg_catalog.int8, coalesce(pg_catalog.pg_relation_filenode(c.oid), 0)::pg_catalog.int8,
       n.nspname, c.relname,
       c.relkind IN ('r', 'm') AND (c.relam = 0 OR m.amname = 'heap') AND (c.oid = (SELECT oid FROM root)
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


def _heaps(rows: Sequence[Sequence[Any]]) -> tuple[Heap, ...]:
    """Return where the rows lie, by what HEAPS_SQL found."""
    # One part that has no pages, or that only its parent may read, is enough: then the whole is read by key.
    paged = all(row[4] for row in rows)
    return tuple(
        Heap(oid=part, file=file, schema=schema, name=name, pages=pages, bytes=size)
        for part, file, schema, name, _, pages, size, _ in rows
        if paged
    )


def heap_files(rows: Sequence[Sequence[Any]]) -> tuple[int, ...]:
    """Return the numbers of the heaps' files, in the order of ``heaps``, by what HEAPS_SQL found."""
    return tuple(row[1] for row in rows)


# The primary key, else a unique index that can stand for one: whole, plain, immediate, never null.
_KEY_SQL = """
SELECT ARRAY(SELECT a.attname FROM pg_catalog.unnest(i.indkey::pg_catalog.int2[]) WITH ORDINALITY AS k(attnum, place)
             JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
             WHERE k.place <= i.indnkeyatts ORDER BY k.place)::pg_catalog.text[]
FROM pg_catalog.pg_index i
WHERE i.indrelid = (SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                    WHERE n.nspname = %(schema)s AND c.relname = %(name)s)
  AND i.indisunique AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL AND i.indexprs IS NULL
  AND NOT EXISTS (SELECT 1 FROM pg_catalog.pg_attribute a WHERE a.attrelid = i.indrelid
                  AND a.attnum = ANY (i.indkey::pg_catalog.int2[]) AND NOT a.attnotnull)
ORDER BY i.indisprimary DESC, i.indnkeyatts, i.indexrelid LIMIT 1
"""


def _missing(session: Session, mapping: TableMapping) -> RefusedError:
    fact = f"{session.label} has no table {mapping.qualified}"
    near = session.rows(
        "SELECT pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname)"
        " FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
        " WHERE pg_catalog.lower(c.relname) = pg_catalog.lower(%s) AND c.relkind IN ('r', 'p', 'v', 'm', 'f')"
        " ORDER BY 1 LIMIT 3",
        (mapping.table,),
    )
    if near:
        names = [name for (name,) in near]
        return RefusedError(f"{fact}; there is {', '.join(names)}", f"if it is that one, set PGVECTOR_TABLE={names[0]}")
    ((has_ledger,),) = session.rows(
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = 'pipeline' AND c.relname = 'alembic_version')"
    )
    if has_ledger:
        # Alembic believes that the table stands: it was dropped since, or PGVECTOR_TABLE is another one now.
        return RefusedError(fact, "check PGVECTOR_TABLE, or run: alembic downgrade 0001, then alembic upgrade head")
    if session.endpoint.name == "main":
        return RefusedError(fact, "run: alembic upgrade head")
    return RefusedError(fact, "check PGVECTOR_TABLE, and the database that pipeline settings shows")
