"""The columns of a table: their types, what stands behind a domain, and the forms that they are sent in."""

from dataclasses import dataclass
from typing import Any

from psycopg2 import sql

VECTOR_TYPES = frozenset({"vector", "halfvec", "sparsevec"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column. ``type`` is the same text on every server for the same type and modifier.

    ``base_schema``, ``base_type`` and ``modifier`` (-1: none) are what stands behind a domain, else the
    type itself; ``is_vector`` says that it belongs to the extension, ``dimensions`` is its modifier then.
    ``send`` is the schema and name of the function that gives the binary form, None where there is
    none; ``holds_oids`` says that this form holds numbers of types that differ from server to server.
    ``cast`` is the type that the values are carried as, where it is another one than the column's own.
    ``quoted`` is the name as a person types it in SQL, ``labels`` are those of an enum.
    """

    name: str
    type: str
    base_schema: str
    base_type: str
    modifier: int
    is_vector: bool
    dimensions: int | None
    send: tuple[str, str] | None
    holds_oids: bool
    labels: tuple[str, ...]
    quoted: str
    not_null: bool
    has_default: bool
    generated: bool
    identity_always: bool
    may_select: bool
    may_insert: bool
    may_update: bool
    cast: tuple[str, str] | None = None

    @property
    def is_builtin(self) -> bool:
        """Return whether the type (behind a domain) is one of PostgreSQL's own."""
        return self.base_schema == "pg_catalog"

    @property
    def carried_type(self) -> sql.Composable:
        """Return the type that the values are carried as, for SQL."""
        # The text is format_type's: quoted and qualified by the server itself, under an empty search_path.
        return sql.SQL(self.type) if self.cast is None else sql.Identifier(*self.cast)


# Of the table ``schema`` and ``name``, dropped ones left out. A domain is followed to the type behind it; its
# modifier is the nearest one given on the way. Arrays, composites and ranges of types that a server numbered
# itself (from 16384 on) hold those numbers.
COLUMNS_SQL = """
SELECT a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod), bn.nspname, t.typname, base.typmod,
       CASE WHEN e.oid IS NOT NULL THEN element.typname END, element.oid <> t.oid, t.oid = a.atttypid,
       sn.nspname, sp.proname,
       t.typtype = 'c' OR (t.typtype IN ('r', 'm') AND t.oid >= 16384)
           OR (element.oid <> t.oid AND (element.oid >= 16384 OR element.typtype = 'c')),
       ARRAY(SELECT l.enumlabel FROM pg_catalog.pg_enum l WHERE l.enumtypid = t.oid
             ORDER BY l.enumsortorder)::pg_catalog.text[],
       pg_catalog.quote_ident(a.attname), a.attnotnull, a.atthasdef OR a.attidentity <> '', a.attgenerated <> '',
       a.attidentity = 'a', pg_catalog.has_column_privilege(a.attrelid, a.attnum, 'SELECT'),
       pg_catalog.has_column_privilege(a.attrelid, a.attnum, 'INSERT'),
       pg_catalog.has_column_privilege(a.attrelid, a.attnum, 'UPDATE')
FROM pg_catalog.pg_class r JOIN pg_catalog.pg_namespace rn ON rn.oid = r.relnamespace
JOIN pg_catalog.pg_attribute a ON a.attrelid = r.oid
CROSS JOIN LATERAL (
    WITH RECURSIVE chain AS (
        SELECT y.oid, y.typtype, y.typbasetype,
               CASE WHEN y.typtype = 'd' THEN y.typtypmod ELSE a.atttypmod END AS typmod
        FROM pg_catalog.pg_type y WHERE y.oid = a.atttypid
        UNION ALL
        SELECT y.oid, y.typtype, y.typbasetype,
               CASE WHEN chain.typmod >= 0 THEN chain.typmod WHEN y.typtype = 'd' THEN y.typtypmod ELSE -1 END
        FROM chain JOIN pg_catalog.pg_type y ON y.oid = chain.typbasetype WHERE chain.typtype = 'd')
    SELECT chain.oid, chain.typmod FROM chain WHERE chain.typtype <> 'd') base
JOIN pg_catalog.pg_type t ON t.oid = base.oid
JOIN pg_catalog.pg_namespace bn ON bn.oid = t.typnamespace
JOIN pg_catalog.pg_type element ON element.oid =
    CASE WHEN t.typelem <> 0 AND t.typlen = -1 THEN t.typelem ELSE t.oid END
LEFT JOIN pg_catalog.pg_proc sp ON sp.oid = t.typsend
LEFT JOIN pg_catalog.pg_namespace sn ON sn.oid = sp.pronamespace
LEFT JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_type'::pg_catalog.regclass AND d.objid = element.oid
     AND d.deptype = 'e' AND d.refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass
LEFT JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid AND e.extname = 'vector'
WHERE rn.nspname = %(schema)s AND r.relname = %(name)s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""


def column(*row: Any) -> Column:
    """Return a column from a row of COLUMNS_SQL."""
    name, formatted, base_schema, base, modifier, member, is_array, undisguised, send_schema, send_name, *facts = row
    holds_oids, labels, quoted, not_null, has_default, generated, identity_always, *rights = facts
    is_vector = member in VECTOR_TYPES and not is_array
    dimension = f"({modifier})" if modifier > 0 else ""
    # The extension lives in another schema on each side; its types are the same all the same.
    vector_type = f"{member}{dimension}{'[]' if is_array else ''}"
    return Column(
        name=name,
        type=vector_type if member and undisguised else formatted,
        base_schema=base_schema,
        base_type=base,
        modifier=modifier,
        is_vector=is_vector,
        dimensions=modifier if is_vector and modifier > 0 else None,
        send=None if send_name is None else (send_schema, send_name),
        holds_oids=holds_oids,
        labels=tuple(labels),
        quoted=quoted,
        not_null=not_null,
        has_default=has_default,
        generated=generated,
        identity_always=identity_always,
        may_select=rights[0],
        may_insert=rights[1],
        may_update=rights[2],
    )
