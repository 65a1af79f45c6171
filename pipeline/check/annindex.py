"""The ANN indexes of a table, and the settings of search that a role will have: both as the catalog says."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from psycopg2 import sql

from pipeline.check.neighbours import OPERATORS, Query
from pipeline.postgres.database import Cursor, Session
from pipeline.postgres.tables import Table
from pipeline.settings import TableMapping

# The setting by which a search of each method looks further; larger is slower and finds more.
KNOBS: Mapping[str, str] = {"hnsw": "hnsw.ef_search", "ivfflat": "ivfflat.probes"}
# What a build takes where the index does not say it: pgvector's own defaults.
DEFAULT_OPTIONS: Mapping[str, Mapping[str, int]] = {
    "hnsw": {"m": 16, "ef_construction": 64},
    "ivfflat": {"lists": 100},
}
# All that changes what a search finds; which of them a server has depends on its pgvector.
SETTINGS = (
    *("hnsw.ef_search", "hnsw.iterative_scan", "hnsw.max_scan_tuples", "hnsw.scan_mem_multiplier"),
    *("ivfflat.probes", "ivfflat.iterative_scan", "ivfflat.max_probes"),
)
# pgvector's limit of an index on the type vector, and thus on the column that the application orders by.
MAX_INDEXED_VECTOR = 2_000
# Whatever stands in the way of an index, but the query itself.
FORCED = sql.SQL(
    "SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off; SET LOCAL enable_sort = off;"
    " SET LOCAL enable_indexscan = on; "
)
# One step of a plan: its depth, what is done on what, and the name of the index.
PlanNode = tuple[int, str, str | None]
_METRICS = {operator: metric for metric, operator in OPERATORS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnIndex:
    """One HNSW or IVFFlat index on the embedding column, or on an expression of it.

    ``names`` are its own and those of its parts on partitions: what a plan names. ``metric`` is one of
    OPERATORS, None for another distance. ``type`` is what is indexed (vector, halfvec, ...), by ``expression``,
    which is SQL as the server writes it. ``plain`` says that this is the column itself, ``cast`` that it is
    a cast of the column and nothing else. ``options`` are those of the build, with pgvector's defaults.
    """

    oid: int
    schema: str
    name: str
    quoted: str
    names: frozenset[str]
    method: str
    opclass: str
    metric: str | None
    type: str
    options: Mapping[str, int]
    expression: str
    plain: bool
    cast: bool
    partial: bool
    valid: bool

    @property
    def knob(self) -> str:
        """Return the setting by which a search of this index looks further."""
        return KNOBS[self.method]

    @property
    def label(self) -> str:
        """Return the method as its makers write it, and the name."""
        return f"{'HNSW' if self.method == 'hnsw' else 'IVFFlat'} index {self.name}"

    @property
    def searchable(self) -> bool:
        """Return whether a search that orders by its expression can use it for every row of the table."""
        return self.valid and not self.partial and (self.plain or self.cast) and self.metric is not None

    def serves(self, metric: str) -> bool:
        """Return whether a search can use it that orders by a distance of the column itself, as clients do."""
        return self.searchable and self.plain and self.metric == metric


# One row for each index on the table, or on a partition that its parent has no such index for.
_INDEXES_SQL = """
WITH RECURSIVE tree AS (
    SELECT %(table)s::pg_catalog.oid AS oid
    UNION ALL SELECT h.inhrelid FROM pg_catalog.pg_inherits h JOIN tree ON h.inhparent = tree.oid),
part AS (
    SELECT i.indexrelid AS root, i.indexrelid AS oid FROM pg_catalog.pg_index i JOIN tree ON tree.oid = i.indrelid
    WHERE NOT EXISTS (SELECT 1 FROM pg_catalog.pg_inherits h WHERE h.inhrelid = i.indexrelid)
    UNION ALL SELECT part.root, h.inhrelid FROM pg_catalog.pg_inherits h JOIN part ON h.inhparent = part.oid)
SELECT c.oid::pg_catalog.int8, n.nspname, c.relname,
       pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname),
       ARRAY(SELECT p.relname FROM part JOIN pg_catalog.pg_class p ON p.oid = part.oid
             WHERE part.root = c.oid)::pg_catalog.text[],
       m.amname, o.opcname, t.typname,
       (SELECT p.oprname FROM pg_catalog.pg_amop s JOIN pg_catalog.pg_operator p ON p.oid = s.amopopr
        WHERE s.amopfamily = o.opcfamily AND s.amoppurpose = 'o' LIMIT 1),
       coalesce(c.reloptions, '{}')::pg_catalog.text[], pg_catalog.pg_get_indexdef(c.oid, 1, false),
       i.indkey[0] = a.attnum, i.indpred IS NOT NULL, i.indisvalid
FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace JOIN pg_catalog.pg_am m ON m.oid = c.relam
JOIN pg_catalog.pg_opclass o ON o.oid = i.indclass[0] JOIN pg_catalog.pg_type t ON t.oid = o.opcintype
JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attname = %(embedding)s
WHERE i.indexrelid IN (SELECT root FROM part) AND m.amname IN ('hnsw', 'ivfflat')
  AND (i.indkey[0] = a.attnum OR EXISTS (
       SELECT 1 FROM pg_catalog.pg_depend d WHERE d.objid = c.oid AND d.refobjid = i.indrelid
       AND d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.refobjsubid = a.attnum))
ORDER BY n.nspname, c.relname
"""


def ann_indexes(cursor: Cursor, table: Table, mapping: TableMapping) -> tuple[AnnIndex, ...]:
    """Return the ANN indexes that hold the embedding column, those that a search would prefer first."""
    column = table.column(mapping.embedding)
    assert column is not None
    cursor.execute(_INDEXES_SQL, {"table": table.oid, "embedding": mapping.embedding})
    # A cast to a type with a length, and nothing else: what else there is has other distances.
    of_cast = re.compile(rf"\(*{re.escape(column.quoted)}\)*::[^:()]+(\(\d+\))?\)*")
    found = []
    for oid, schema, name, quoted, names, method, opclass, type_name, operator, options, *facts in cursor.fetchall():
        expression, plain, partial, valid = facts
        found.append(
            AnnIndex(
                oid=oid,
                schema=schema,
                name=name,
                quoted=quoted,
                names=frozenset(names),
                method=method,
                opclass=opclass,
                metric=_METRICS.get(operator),
                type=type_name,
                options={**DEFAULT_OPTIONS[method], **_options(options)},
                expression=expression,
                plain=plain,
                cast=of_cast.fullmatch(expression) is not None,
                partial=partial,
                valid=valid,
            )
        )
    metrics = [*OPERATORS, None]
    return tuple(sorted(found, key=lambda one: (not one.searchable, metrics.index(one.metric), not one.plain)))


def _options(texts: Sequence[str]) -> dict[str, int]:
    pairs = (text.partition("=") for text in texts)
    return {name: int(value) for name, _, value in pairs if value.isdigit()}


def query_sql(table: Table, mapping: TableMapping, query: Query, type_name: str | None = None) -> sql.Composable:
    """Return a query's vector as a constant, of the type that is carried, or cast to another of the extension."""
    column, extension = table.column(mapping.embedding), table.extension
    assert column is not None and extension is not None
    if column.cast is not None:
        carried: sql.Composable = sql.Identifier(*column.cast)
    else:
        carried = sql.Identifier(extension.schema, column.base_type)
    constant = sql.SQL("{}::{}").format(sql.Literal(query.vector), carried)
    if type_name is None:
        return constant
    return sql.SQL("{}::{}").format(constant, sql.Identifier(extension.schema, type_name))


def distance_sql(table: Table, mapping: TableMapping, query: Query, metric: str = "cosine") -> sql.Composable:
    """Return the distance as the application asks for it: of the column itself, with pgvector's operator."""
    column = table.column(mapping.embedding)
    assert column is not None
    constant = query_sql(table, mapping, query, column.base_type)
    return sql.SQL("{} {} {}").format(sql.Identifier(mapping.embedding), operator_sql(table, metric), constant)


def application_sql(
    table: Table, mapping: TableMapping, query: Query, k: int, condition: sql.Composable | None = None
) -> sql.Composable:
    """Return the search as LangChain's PGVectorStore sends it, with a filter's ``condition`` where there is one."""
    return sql.SQL('SELECT *, {distance} AS "_distance" FROM {table}{where} ORDER BY "_distance" ASC LIMIT {k}').format(
        distance=distance_sql(table, mapping, query),
        # Rows that cannot be carried may be such that no search of their table succeeds.
        table=table.identifier if table.left_out is None else table.scanned,
        where=sql.SQL("") if condition is None else sql.SQL(" WHERE {}").format(condition),
        k=sql.Literal(k),
    )


def operator_sql(table: Table, metric: str) -> sql.Composable:
    """Return a metric's operator, in the schema of the extension."""
    assert table.extension is not None
    return sql.SQL("OPERATOR({}.{})").format(sql.Identifier(table.extension.schema), sql.SQL(OPERATORS[metric]))


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """The settings of search that a role has in this database, and where each of them is set.

    ``values`` are texts as the server has them. ``places`` are ``default``, ``server``, ``every role``,
    ``database``, ``role`` or ``role in database``; ``limits`` the largest whole number of each that has one.
    ``role`` and ``database`` are quoted; ``role_exists`` is False where such a role was asked for in vain: what is
    here then is what a new role would have.
    """

    role: str
    database: str
    role_exists: bool
    values: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)

    def number(self, name: str) -> int:
        """Return a setting that is a whole number."""
        return int(self.values[name])

    def apply_sql(self, **changes: int) -> sql.Composable:
        """Return what gives a transaction these settings, with some of them changed; complete with its semicolon."""
        values = {**self.values, **{name: str(value) for name, value in changes.items()}}
        calls = [
            sql.SQL("pg_catalog.set_config({}, {}, true)").format(sql.Literal(name), sql.Literal(value))
            for name, value in values.items()
        ]
        return sql.SQL("SELECT {}; ").format(sql.SQL(", ").join(calls)) if calls else sql.SQL("")

    def remedy(self, name: str, value: int | str) -> str:
        """Return the statement that changes a setting where it is set now, else for the database."""
        where = {
            "role": f"ROLE {self.role}",
            "role in database": f"ROLE {self.role} IN DATABASE {self.database}",
        }.get(self.places.get(name, ""), f"DATABASE {self.database}")
        return " ".join(("ALTER", where, "SET", name, "=", f"{value};"))


# The literal loads the library: until then its settings are placeholders, and those that it does not have
# would be taken in silence.
_LOAD_SQL = sql.SQL("SELECT '[1]'::{}")
# What a client asked for at its connection is ours (PGOPTIONS), not the application's.
_KNOWN_SQL = """
SELECT name, boot_val, CASE WHEN source IN ('configuration file', 'command line', 'environment variable')
       THEN setting END, min_val, max_val, enumvals FROM pg_catalog.pg_settings WHERE name = ANY (%s) ORDER BY name
"""
# As a server applies them at a connection: the later one wins.
_STORED_SQL = """
SELECT CASE WHEN s.setrole = 0 AND s.setdatabase = 0 THEN 'every role' WHEN s.setrole = 0 THEN 'database'
            WHEN s.setdatabase = 0 THEN 'role' ELSE 'role in database' END, s.setconfig
FROM pg_catalog.pg_db_role_setting s
WHERE s.setdatabase IN (0, (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()))
  AND s.setrole IN (0, (SELECT oid FROM pg_catalog.pg_roles WHERE rolname = %s))
ORDER BY s.setrole <> 0, s.setdatabase <> 0
"""
_ROLE_SQL = """
SELECT r.name, pg_catalog.quote_ident(r.name), pg_catalog.quote_ident(pg_catalog.current_database()),
       EXISTS (SELECT 1 FROM pg_catalog.pg_roles WHERE rolname = r.name)
FROM (SELECT coalesce(%s, SESSION_USER)::pg_catalog.text AS name) r
"""


def search_settings(session: Session, table: Table, role: str | None = None) -> SearchSettings:
    """Return the settings that ``role`` (None: the connecting one) begins with in this database.

    A value that pgvector would refuse is passed over, as the server does when the library is loaded.
    """
    with session.transaction(read_only=True) as cursor:
        cursor.execute(_ROLE_SQL, (role,))
        ((name, quoted, database, exists),) = cursor.fetchall()
        if table.extension is None:
            return SearchSettings(role=quoted, database=database, role_exists=exists)
        cursor.execute(_LOAD_SQL.format(sql.Identifier(table.extension.schema, "vector")))
        cursor.execute(_KNOWN_SQL, (list(SETTINGS),))
        known = {row[0]: row[1:] for row in cursor.fetchall()}
        cursor.execute(_STORED_SQL, (name,))
        stored = cursor.fetchall()
    values, places, limits = dict[str, str](), dict[str, str](), dict[str, int]()
    for setting, (default, configured, _, largest, _) in known.items():
        values[setting], places[setting] = (default, "default") if configured is None else (configured, "server")
        if largest is not None and largest.isdigit():
            limits[setting] = int(largest)
    for place, entries in stored:
        for entry in entries:
            setting, _, value = entry.partition("=")
            if (setting := setting.lower()) in known and _fits(value, *known[setting][2:]):
                values[setting], places[setting] = value.lower(), place
    return SearchSettings(
        role=quoted, database=database, role_exists=exists, values=values, places=places, limits=limits
    )


def _fits(value: str, smallest: str | None, largest: str | None, choices: Sequence[str] | None) -> bool:
    if choices is not None:
        return value.lower() in choices
    try:
        return smallest is None or largest is None or float(smallest) <= float(value) <= float(largest)
    except ValueError:
        return False


def plan_nodes(cursor: Cursor, statement: sql.Composable) -> list[PlanNode]:
    """Return the plan of a statement that is not run: depth, what is done on what, and the index, node by node.

    Without conditions, which would hold the content of rows.
    """
    cursor.execute(sql.SQL("EXPLAIN (FORMAT JSON) {}").format(statement))
    ((document,),) = cursor.fetchall()
    nodes: list[PlanNode] = []
    _walk(document[0]["Plan"], 0, nodes)
    return nodes


def _walk(node: Mapping[str, object], depth: int, nodes: list[PlanNode]) -> None:
    index = node.get("Index Name")
    place = node.get("Relation Name")
    text = str(node["Node Type"]) + (f" using {index}" if index else "") + (f" on {place}" if place else "")
    nodes.append((depth, text, None if index is None else str(index)))
    below = node.get("Plans", [])
    assert isinstance(below, list)
    for one in below:
        _walk(one, depth + 1, nodes)


def used_index(nodes: Sequence[PlanNode], indexes: Sequence[AnnIndex]) -> AnnIndex | None:
    """Return the ANN index that a plan uses, or None."""
    named = {name for _, _, name in nodes if name is not None}
    return next((index for index in indexes if index.names & named), None)


def plan_text(nodes: Sequence[PlanNode]) -> str:
    """Return a plan for people, one line a node."""
    return "\n".join("  " * depth + ("-> " if depth else "") + text for depth, text, _ in nodes)
