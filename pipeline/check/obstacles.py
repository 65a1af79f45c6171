"""What is attached to a table and stands in the way of rows: constraints, indexes, sequences, collations."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.check.attached import Attached, check_attached, read_attached
from pipeline.check.preflight import Finding, Severity
from pipeline.postgres.database import Session
from pipeline.postgres.indexes import SAFE_PARALLEL_BUILD, secondary_indexes
from pipeline.postgres.tables import Extension, Table
from pipeline.wording import counted

FIRST_HNSW = (0, 5, 0)
# Vacuum can leave an HNSW graph with elements that no search reaches, up to and with 0.8.3.
SAFE_VACUUM = (0, 8, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """An index of the table. A deferred one is set aside for the load; ``method`` is its access method.

    ``exclusive`` says that it allows no two rows with the same values (or, excluding, with like ones) in
    ``columns``, which are sorted; ``whole`` that this is all: no expression, no condition.
    """

    name: str
    method: str
    deferred: bool
    valid: bool
    exclusive: bool
    whole: bool
    columns: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacles:
    """What is attached to a table; all names as they stand in the catalog, quoted where typed.

    ``build_bytes`` is the server's maintenance_work_mem. ``sequences`` are columns that a sequence fills
    upwards, and whether this role may set it.
    ``loose_collations`` are key columns whose collation takes different texts for equal.
    """

    attached: Attached
    foreign_keys: tuple[str, ...]
    checks: tuple[str, ...]
    indexes: tuple[Standing, ...]
    sequences: tuple[tuple[str, bool], ...]
    collations: dict[str, str]
    loose_collations: tuple[str, ...]
    build_bytes: int

    @property
    def has_graph(self) -> bool:
        """Return whether an HNSW index stands."""
        return any(index.method == "hnsw" for index in self.indexes)

    def standing(self) -> "Obstacles":
        """Return the same with every index in place during the copy: the table has rows, and is in use."""
        return replace(self, indexes=tuple(replace(index, deferred=False) for index in self.indexes))


_CONSTRAINTS_SQL = """
SELECT contype::pg_catalog.text, conname FROM pg_catalog.pg_constraint
WHERE conrelid = %s AND contype IN ('f', 'c') ORDER BY conname
"""
_INDEXES_SQL = """
SELECT n.nspname, c.relname, m.amname, i.indisvalid, i.indisunique OR i.indisexclusion,
       i.indpred IS NULL AND i.indexprs IS NULL AND NOT i.indisexclusion,
       ARRAY(SELECT a.attname FROM pg_catalog.pg_attribute a WHERE a.attrelid = i.indrelid
             AND a.attnum = ANY (i.indkey[:i.indnkeyatts - 1]) ORDER BY a.attname)::pg_catalog.text[]
FROM pg_catalog.pg_index i
JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_am m ON m.oid = c.relam WHERE i.indrelid = %s ORDER BY c.relname
"""
# Owned by the column: serial and identity. The last column is whether this role may set it.
_SEQUENCES_SQL = """
SELECT a.attname, s.seqincrement > 0, pg_catalog.has_sequence_privilege(s.seqrelid, 'UPDATE')
    AND pg_catalog.has_sequence_privilege(s.seqrelid, 'SELECT')
FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_depend d ON d.refobjid = a.attrelid AND d.refobjsubid = a.attnum
JOIN pg_catalog.pg_sequence s ON s.seqrelid = d.objid
WHERE a.attrelid = %s AND NOT a.attisdropped AND d.deptype IN ('a', 'i')
  AND d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass
  AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass ORDER BY a.attnum
"""
# The database's own collation is named by what it is, not as "default".
_COLLATIONS_SQL = """
SELECT a.attname, CASE WHEN l.collname = 'default' THEN
           (SELECT datcollate FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
           ELSE l.collname END, l.collisdeterministic
FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_collation l ON l.oid = a.attcollation
WHERE a.attrelid = %s AND a.attname = ANY (%s) AND l.collname NOT IN ('C', 'POSIX')
"""
_MEMORY_SQL = """
SELECT setting::pg_catalog.int8 * 1024 FROM pg_catalog.pg_settings WHERE name = 'maintenance_work_mem'
"""


def read_obstacles(session: Session, table: Table) -> Obstacles:
    """Read what is attached to the table, in one read-only transaction. Raises PipelineError."""
    with session.transaction(read_only=True) as cursor:

        def rows(query: str, *arguments: object) -> list[tuple[Any, ...]]:
            cursor.execute(query, arguments)
            return cursor.fetchall()

        attached = read_attached(cursor, table)
        deferred = {(index.schema, index.name) for index in secondary_indexes(cursor, table.oid)}
        constraints = rows(_CONSTRAINTS_SQL, table.oid)
        collations = rows(_COLLATIONS_SQL, table.oid, list(table.key))
        ((build_bytes,),) = rows(_MEMORY_SQL)
        return Obstacles(
            attached=attached,
            foreign_keys=tuple(name for kind, name in constraints if kind == "f"),
            checks=tuple(name for kind, name in constraints if kind == "c"),
            indexes=tuple(
                Standing(
                    name=name,
                    method=method,
                    deferred=table.owned and (schema, name) in deferred,
                    valid=valid,
                    exclusive=exclusive,
                    whole=whole,
                    columns=tuple(columns),
                )
                for schema, name, method, valid, exclusive, whole, columns in rows(_INDEXES_SQL, table.oid)
            ),
            sequences=tuple((name, may_set) for name, upwards, may_set in rows(_SEQUENCES_SQL, table.oid) if upwards),
            collations={name: collation for name, collation, _ in collations},
            loose_collations=tuple(name for name, _, deterministic in collations if not deterministic),
            build_bytes=build_bytes,
        )


def check_obstacles(table: Table, obstacles: Obstacles, name: str) -> tuple[Finding, ...]:
    """Judge what is attached to the target's table; no query. ``name`` is the endpoint's."""
    return (
        *check_attached(table, obstacles.attached, name),
        *_check_constraints(obstacles, name),
        *_check_indexes(obstacles.indexes, name),
        *_check_columns(table, obstacles, name),
    )


def _finding(severity: Severity, fact: str, hint: str = "") -> Finding:
    return Finding(severity=severity, fact=fact, hint=hint)


def _check_constraints(obstacles: Obstacles, name: str) -> list[Finding]:
    found = []
    if keys := obstacles.foreign_keys:
        found.append(
            _finding(
                "warn",
                f"{name}'s {counted(len(keys), 'foreign key')} ({', '.join(keys)}) must be satisfied by every row"
                " as it comes in",
                f"bring the rows that they point to to {name} first",
            )
        )
    if checks := obstacles.checks:
        found.append(
            _finding("note", f"{name} checks every row by {counted(len(checks), 'constraint')}: {', '.join(checks)}")
        )
    return found


def _check_indexes(indexes: tuple[Standing, ...], name: str) -> list[Finding]:
    found = []
    aside = [index.name for index in indexes if index.deferred]
    stay = [index.name for index in indexes if not index.deferred]
    if aside:
        found.append(_finding("note", f"set aside on {name} for the load, and built after it: {', '.join(aside)}"))
    if stay:
        found.append(_finding("note", f"stays on {name} during the load: {', '.join(stay)}"))
    if slow := [index.name for index in indexes if index.method == "hnsw" and not index.deferred]:
        found.append(
            _finding(
                "warn",
                f"{name}'s HNSW index {', '.join(slow)} cannot be set aside, and makes the load several times slower",
                "copy as the owner of the table",
            )
        )
    if broken := [index.name for index in indexes if not index.valid]:
        found.append(
            _finding(
                "warn",
                f"{name}'s index {', '.join(broken)} is invalid: a build was interrupted, and no search uses it",
                f"on {name}: REINDEX or DROP it",
            )
        )
    return found


def check_exclusive(
    source: Obstacles, target: Obstacles, key: Sequence[str], names: tuple[str, str]
) -> tuple[Finding, ...]:
    """Warn of what the target allows once, where nothing on the source says that it occurs once; no query.

    ``key`` is the target's: of a source that has none, the keys themselves are counted.
    """
    kept = [set(key), *(set(index.columns) for index in source.indexes if index.exclusive and index.whole)]
    return tuple(
        _finding(
            "warn",
            f"{names[1]}'s index {index.name} allows no two rows with the same values"
            f"{' in ' + ', '.join(index.columns) if index.whole else ''}, and {names[0]} does: the first such row ends"
            " the copy",
            "see that there is none, or drop the index for the copy",
        )
        for index in target.indexes
        if index.exclusive and not (set(index.columns) and any(columns <= set(index.columns) for columns in kept))
    )


def _check_columns(table: Table, obstacles: Obstacles, name: str) -> list[Finding]:
    found = [
        _finding("note", f"{name} makes the column {column.name} itself; it is not copied")
        for column in table.columns
        if column.generated
    ]
    found += [
        _finding(
            "note",
            f"{name}'s column {column} is filled by a sequence, which the copy sets behind the largest value",
        )
        if may_set
        else _finding(
            "warn",
            f"{name}'s column {column} is filled by a sequence, which the role {table.role} may not set behind the"
            " largest value: new rows could meet keys that are there already",
            f"on {name}: GRANT ALL ON SEQUENCE ... TO {table.quoted_role}, or set it after the copy",
        )
        for column, may_set in obstacles.sequences
    ]
    found += [
        _finding(
            "warn",
            f"{name}'s key column {column} has a collation that takes different texts for equal: of two such keys,"
            " only one finds room",
            "give the column a deterministic collation",
        )
        for column in obstacles.loose_collations
    ]
    return found


def check_extensions(source: Extension | None, target: Extension | None, names: tuple[str, str]) -> tuple[Finding, ...]:
    """Judge the versions of pgvector, and the schemas that its operators live in; no query."""
    if target is None:
        return ()
    name, found = names[1], []
    update = f"on {name}, as an administrator, once its packages are new: ALTER EXTENSION vector UPDATE"
    if target.version < FIRST_HNSW:
        found.append(_finding("refuse", f"{name}'s pgvector {target.text} has no HNSW index; 0.5.0 brought it", update))
    elif (0, 6, 0) <= target.version < SAFE_PARALLEL_BUILD:
        found.append(
            _finding(
                "warn",
                f"{name}'s pgvector {target.text} can write beyond its memory in a parallel HNSW build"
                " (CVE-2026-3172); the pipeline builds by one process there, slower",
                update,
            )
        )
    if FIRST_HNSW <= target.version < SAFE_VACUUM:
        found.append(
            _finding(
                "note", f"{name}'s pgvector {target.text} can damage an HNSW index by VACUUM; 0.8.4 mends it", update
            )
        )
    if source is not None and source.schema != target.schema:
        found.append(
            _finding(
                "note",
                f"pgvector's operators are in schema {source.schema} on {names[0]}, and in {target.schema} on {name}",
                "see that the application's search_path, or its setting for the extension's schema, names the latter",
            )
        )
    return tuple(found)


def check_collations(source: Obstacles, target: Obstacles, names: tuple[str, str]) -> tuple[Finding, ...]:
    """Note where the keys' texts sort otherwise: nothing of the copy depends on it, an application's lists may."""
    return tuple(
        _finding("note", f"the key {column} sorts by {mine} on {names[0]}, and by {theirs} on {names[1]}")
        for column, mine in source.collations.items()
        if (theirs := target.collations.get(column)) is not None and theirs != mine
    )
