"""What one role meets in a database: where its names lead, and what it may do with a table. Nobody becomes it."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.postgres.database import Cursor
from pipeline.postgres.tables import Table

# What SQL takes for a name without quotes. Of the key words, those that are reserved for tables are not among it.
_PLAIN = re.compile(r"[A-Za-z_\u0080-\U0010ffff][A-Za-z0-9_$\u0080-\U0010ffff]*")
_PATH_ITEM = re.compile(r'"((?:[^"]|"")*)"|([^,\s"]+)')


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A schema that a role's search_path comes to; those that are not there, or not for it, are passed over."""

    schema: str
    may_create: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """A role, and the search_path that its sessions begin with: as a setting, and as the schemas it comes to."""

    oid: int
    name: str
    quoted: str
    may_login: bool
    may_connect: bool
    search_path: tuple[str, ...]
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """What a name leads to: a table, or whatever else bears it."""

    oid: int
    schema: str
    name: str

    @property
    def qualified(self) -> str:
        """Return ``schema.name`` for people."""
        return f"{self.schema}.{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rights:
    """What a role may do with a table. ``unread``, ``uninserted``, ``unwritten`` are the columns that it may not.

    ``may_use_extension`` speaks of the schema of the types and operators. ``secured`` says that row-level
    security filters what it reads, ``policies`` how many policies let it see rows. ``sequences`` are those
    (as typed in SQL) that a default draws from, and the role may not.
    """

    may_use_schema: bool
    may_create: bool
    may_use_extension: bool
    may_delete: bool
    owns: bool
    owner: str
    secured: bool
    policies: int
    unread: tuple[str, ...]
    uninserted: tuple[str, ...]
    unwritten: tuple[str, ...]
    sequences: tuple[str, ...]


# The role's own setting goes before the database's, and of each the one for this database first. What the
# server sets for all shows only to a session of a role that has none of these: else it is the built-in one.
_ROLE_SQL = """
WITH chosen AS (SELECT r.* FROM pg_catalog.pg_roles r WHERE r.rolname = coalesce(%(role)s, CURRENT_USER)),
base AS (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()),
given AS (
    SELECT s.setrole, s.setdatabase, pg_catalog.substr(c.item, 13) AS value
    FROM pg_catalog.pg_db_role_setting s, pg_catalog.unnest(s.setconfig) AS c(item)
    WHERE s.setdatabase IN (0, (SELECT oid FROM base)) AND c.item LIKE 'search\\_path=%%')
SELECT r.oid::pg_catalog.int8, r.rolname::pg_catalog.text, pg_catalog.quote_ident(r.rolname), r.rolcanlogin,
       pg_catalog.has_database_privilege(r.oid, base.oid, 'CONNECT'),
       coalesce((SELECT value FROM given WHERE setrole IN (0, r.oid)
                 ORDER BY setrole <> 0 DESC, setdatabase <> 0 DESC LIMIT 1),
                (SELECT CASE WHEN EXISTS (SELECT FROM given WHERE setrole IN (
                     0, (SELECT m.oid FROM pg_catalog.pg_roles m WHERE m.rolname = SESSION_USER)))
                 THEN boot_val ELSE reset_val END FROM pg_catalog.pg_settings WHERE name = 'search_path'))
FROM chosen r, base
"""
_PLACES_SQL = """
SELECT n.nspname::pg_catalog.text, pg_catalog.has_schema_privilege(%(role)s::pg_catalog.oid, n.oid, 'CREATE')
FROM pg_catalog.unnest(%(path)s::pg_catalog.text[]) WITH ORDINALITY AS p(name, place)
JOIN pg_catalog.pg_namespace n ON n.nspname = p.name
WHERE pg_catalog.has_schema_privilege(%(role)s::pg_catalog.oid, n.oid, 'USAGE') ORDER BY p.place
"""


def read_role(cursor: Cursor, name: str | None) -> Role | None:
    """Return a role (None: the one that asks), or None where there is no such role. Raises PipelineError."""
    cursor.execute(_ROLE_SQL, {"role": name})
    if not (rows := cursor.fetchall()):
        return None
    ((oid, found, quoted, may_login, may_connect, setting),) = rows
    path = tuple(path_items(setting))
    # A schema of the role's own name stands for "$user"; temporary tables are nobody's of another session.
    schemas = [found if item == "$user" else item for item in path if item != "pg_temp"]
    cursor.execute(_PLACES_SQL, {"role": oid, "path": schemas})
    return Role(
        oid=oid,
        name=found,
        quoted=quoted,
        may_login=may_login,
        may_connect=may_connect,
        search_path=path,
        places=tuple(Place(schema=schema, may_create=may_create) for schema, may_create in cursor.fetchall()),
    )


def path_items(setting: str) -> Iterator[str]:
    """Yield the names in a search_path as it is set, folded and unquoted."""
    for quoted, plain in _PATH_ITEM.findall(setting):
        if quoted or plain:
            yield quoted.replace('""', '"') if quoted else fold(plain)


def fold(name: str) -> str:
    """Return what a name is without quotes: of a database in UTF-8 only ASCII is folded."""
    return "".join(letter.lower() if letter.isascii() else letter for letter in name)


_RESERVED_SQL = "SELECT 1 FROM pg_catalog.pg_get_keywords() WHERE word = %s AND catcode IN ('T', 'R')"
# The server's own tables come first, wherever the path does not say otherwise.
_RESOLVE_SQL = """
SELECT c.oid::pg_catalog.int8, n.nspname::pg_catalog.text, c.relname::pg_catalog.text
FROM pg_catalog.unnest(%(schemas)s::pg_catalog.text[]) WITH ORDINALITY AS p(name, place)
JOIN pg_catalog.pg_namespace n ON n.nspname = p.name
JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = %(name)s
ORDER BY p.place LIMIT 1
"""


def is_plain(cursor: Cursor, name: str) -> bool:
    """Return whether SQL takes a name for a table's without quotes, in whatever case. Raises PipelineError."""
    if not _PLAIN.fullmatch(name):
        return False
    cursor.execute(_RESERVED_SQL, (fold(name),))
    return not cursor.fetchall()


def resolve(cursor: Cursor, role: Role, name: str) -> Relation | None:
    """Return what a bare name, as it stands in the catalog, leads a role to. Raises PipelineError."""
    schemas = [place.schema for place in role.places]
    if "pg_catalog" not in schemas:
        schemas.insert(0, "pg_catalog")
    cursor.execute(_RESOLVE_SQL, {"schemas": schemas, "name": name})
    found = [Relation(oid=oid, schema=schema, name=relation) for oid, schema, relation in cursor.fetchall()]
    return found[0] if found else None


# Members of the owning role are owners too. Row-level security is not for those, unless it is forced, and never
# for superusers and BYPASSRLS; without a policy that lets rows through, it lets none.
_RIGHTS_SQL = """
SELECT pg_catalog.has_schema_privilege(r.oid, c.relnamespace, 'USAGE'),
       pg_catalog.has_schema_privilege(r.oid, c.relnamespace, 'CREATE'),
       coalesce((SELECT pg_catalog.has_schema_privilege(r.oid, n.oid, 'USAGE')
                 FROM pg_catalog.pg_namespace n WHERE n.nspname = %(extension)s), false),
       pg_catalog.has_table_privilege(r.oid, c.oid, 'DELETE'),
       pg_catalog.pg_has_role(r.oid, c.relowner, 'USAGE'), pg_catalog.quote_ident(o.rolname),
       c.relrowsecurity AND NOT r.rolsuper AND NOT r.rolbypassrls
           AND (c.relforcerowsecurity OR NOT pg_catalog.pg_has_role(r.oid, c.relowner, 'USAGE')),
       (SELECT pg_catalog.count(*) FROM pg_catalog.pg_policy p
        WHERE p.polrelid = c.oid AND p.polpermissive AND p.polcmd IN ('r', '*') AND EXISTS (
            SELECT FROM pg_catalog.unnest(p.polroles) AS m(oid)
            WHERE CASE WHEN m.oid = 0 THEN true ELSE pg_catalog.pg_has_role(r.oid, m.oid, 'USAGE') END))
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_roles o ON o.oid = c.relowner
CROSS JOIN pg_catalog.pg_roles r WHERE c.oid = %(table)s AND r.oid = %(role)s::pg_catalog.oid
"""
_COLUMN_RIGHTS_SQL = """
SELECT a.attname::pg_catalog.text,
       pg_catalog.has_column_privilege(%(role)s::pg_catalog.oid, a.attrelid, a.attnum, 'SELECT'),
       pg_catalog.has_column_privilege(%(role)s::pg_catalog.oid, a.attrelid, a.attnum, 'INSERT'),
       pg_catalog.has_column_privilege(%(role)s::pg_catalog.oid, a.attrelid, a.attnum, 'UPDATE')
FROM pg_catalog.pg_attribute a WHERE a.attrelid = %(table)s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""
# Of an identity column nobody is asked for a right to its sequence.
_SEQUENCES_SQL = """
SELECT pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname)
FROM pg_catalog.pg_attrdef f
JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_attrdef'::pg_catalog.regclass AND d.objid = f.oid
     AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass
JOIN pg_catalog.pg_class c ON c.oid = d.refobjid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE f.adrelid = %(table)s
  AND CASE WHEN c.relkind = 'S' THEN
      NOT pg_catalog.has_sequence_privilege(%(role)s::pg_catalog.oid, c.oid, 'USAGE, UPDATE') END
ORDER BY 1
"""


def read_rights(cursor: Cursor, role: Role, table: Table, mapped: Sequence[str]) -> Rights:
    """Return what a role may do with a table, and with its ``mapped`` columns. Raises PipelineError."""
    extension = table.extension.schema if table.extension is not None else None
    arguments: dict[str, Any] = {"role": role.oid, "table": table.oid, "extension": extension}
    cursor.execute(_RIGHTS_SQL, arguments)
    ((may_use, may_create, may_use_extension, may_delete, owns, owner, secured, policies),) = cursor.fetchall()
    cursor.execute(_COLUMN_RIGHTS_SQL, arguments)
    columns = cursor.fetchall()
    cursor.execute(_SEQUENCES_SQL, arguments)
    return Rights(
        may_use_schema=may_use,
        may_create=may_create,
        may_use_extension=may_use_extension,
        may_delete=may_delete,
        owns=owns,
        owner=owner,
        secured=secured,
        policies=policies,
        unread=tuple(name for name, may, _, _ in columns if not may),
        uninserted=tuple(name for name, _, may, _ in columns if not may and name in mapped),
        unwritten=tuple(name for name, _, _, may in columns if not may and name in mapped),
        sequences=tuple(name for (name,) in cursor.fetchall()),
    )
