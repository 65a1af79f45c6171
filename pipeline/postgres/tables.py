"""What a table looks like: columns, types, key, size, rights, and the extension beside it."""

import re
from dataclasses import dataclass
from typing import Any

from psycopg2 import sql

from pipeline.errors import RefusedError
from pipeline.postgres.database import Cursor, ServerIdentity, Session, identify
from pipeline.settings import TableMapping

BLOCK_BYTES = 8192
VECTOR_TYPES = frozenset({"vector", "halfvec", "sparsevec"})
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
class Column:
    """One column. ``type`` is the same text on every server for the same type and modifier.

    ``dimensions`` is the modifier of a vector type, None for an untyped one and for other types.
    ``send`` is the schema and name of the function that gives the type's binary form, ``quoted`` the
    name as a person types it in SQL.
    """

    name: str
    type: str
    base_type: str
    dimensions: int | None
    send: tuple[str, str]
    quoted: str
    not_null: bool
    has_default: bool
    generated: bool
    may_select: bool
    may_insert: bool
    may_update: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table as the catalog describes it, with the identity of the server that it was read from.

    The texts that begin with ``quoted`` are names as a person types them in SQL; ``role`` is who asked.
    """

    server: ServerIdentity
    extension: Extension | None
    oid: int
    schema: str
    name: str
    kind: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    pages: int
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

    @property
    def qualified(self) -> str:
        """Return ``schema.name`` for people."""
        return f"{self.schema}.{self.name}"

    @property
    def identifier(self) -> sql.Identifier:
        """Return the quoted, qualified name for SQL."""
        return sql.Identifier(self.schema, self.name)

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
    oid, kind, total, pages, estimate, owned, secured, may_use_schema, may_delete, may_stage, *names = row
    role, quoted_schema, quoted_name, quoted_database, quoted_role = names
    extension = read_extension(cursor)
    return Table(
        server=identify(cursor),
        extension=extension,
        oid=oid,
        schema=mapping.schema,
        name=mapping.table,
        kind=kind,
        columns=_read_columns(cursor, oid),
        key=_read_key(cursor, oid),
        pages=pages,
        bytes=total,
        rows_estimate=max(0, int(estimate)),
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


# Sizes of the file now, not of the last ANALYZE. A role without USAGE on the schema sees the row too.
_TABLE_SQL = """
SELECT c.oid::pg_catalog.int8, c.relkind::pg_catalog.text,
       CASE WHEN c.relkind IN ('r', 'm') THEN pg_catalog.pg_table_size(c.oid) ELSE 0 END,
       CASE WHEN c.relkind IN ('r', 'm') THEN pg_catalog.pg_relation_size(c.oid)
           / pg_catalog.current_setting('block_size')::pg_catalog.int8 ELSE 0 END,
       CASE WHEN c.relpages > 0 AND c.reltuples > 0 THEN c.reltuples / c.relpages
           * (pg_catalog.pg_relation_size(c.oid) / pg_catalog.current_setting('block_size')::pg_catalog.int8)
           ELSE 0 END,
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

_COLUMNS_SQL = """
SELECT a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod), t.typname,
       CASE WHEN e.oid IS NOT NULL AND a.atttypmod > 0 THEN a.atttypmod END,
       e.oid IS NOT NULL, sn.nspname, sp.proname, a.attnotnull, a.atthasdef OR a.attidentity <> '',
       a.attgenerated <> '', pg_catalog.has_column_privilege(a.attrelid, a.attnum, 'SELECT'),
       pg_catalog.has_column_privilege(a.attrelid, a.attnum, 'INSERT'),
       pg_catalog.has_column_privilege(a.attrelid, a.attnum, 'UPDATE'), pg_catalog.quote_ident(a.attname)
FROM pg_catalog.pg_attribute a
JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
JOIN pg_catalog.pg_proc sp ON sp.oid = t.typsend
JOIN pg_catalog.pg_namespace sn ON sn.oid = sp.pronamespace
LEFT JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_type'::pg_catalog.regclass AND d.objid = t.oid
     AND d.deptype = 'e' AND d.refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass
LEFT JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid AND e.extname = 'vector'
WHERE a.attrelid = %(oid)s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""


def _read_columns(cursor: Cursor, oid: int) -> tuple[Column, ...]:
    cursor.execute(_COLUMNS_SQL, {"oid": oid})
    return tuple(_column(row) for row in cursor.fetchall())


def _column(row: tuple[Any, ...]) -> Column:
    name, formatted, base, dimensions, of_vector, send_schema, send_name, *facts = row
    not_null, has_default, generated, may_select, may_insert, may_update, quoted = facts
    # The extension lives in another schema on each side; its types are the same all the same.
    vector_type = f"{base}({dimensions})" if dimensions else base
    return Column(
        name=name,
        type=vector_type if of_vector else formatted,
        base_type=base,
        dimensions=dimensions,
        send=(send_schema, send_name),
        quoted=quoted,
        not_null=not_null,
        has_default=has_default,
        generated=generated,
        may_select=may_select,
        may_insert=may_insert,
        may_update=may_update,
    )


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
