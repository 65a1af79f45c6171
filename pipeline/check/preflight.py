"""Every reason that a copy could fail, found before a row moves. Read-only on both sides."""

from dataclasses import dataclass
from typing import Literal

from psycopg2 import sql

from pipeline.errors import RefusedError
from pipeline.postgres.database import Session
from pipeline.postgres.tables import KINDS, VECTOR_TYPES, Column, Table
from pipeline.settings import TableMapping

Severity = Literal["refuse", "warn", "note"]
# The ends of the variables that name the columns, in the order of TableMapping.columns.
_VARIABLES = ("ID", "CONTENT", "METADATA", "VECTOR")
# How many of a kind a message names before it only counts the rest.
EXAMPLES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing found: what is so, and what to type."""

    severity: Severity
    fact: str
    hint: str


def check_tables(
    source: Table,
    target: Table,
    mapping: TableMapping,
    dimensions: int,
    names: tuple[str, str],
    *,
    to_write: bool,
) -> tuple[Finding, ...]:
    """Compare the two descriptions; no query. ``names`` are the endpoints' names for the messages.

    Without ``to_write`` the rights that only a copy needs on the target are not asked for.
    """
    if source.server == target.server and source.oid == target.oid:
        return (
            _refuse(
                f"{names[0]} and {names[1]} are the same table of the same server, under two names",
                "pipeline settings shows where each points",
            ),
        )
    return (
        *_check_kind(source, names[0]),
        *_check_kind(target, names[1]),
        *_check_key(source, target, mapping, names),
        *_check_columns(source, target, mapping, dimensions, names),
        *_check_rights(source, target, mapping, names, to_write),
    )


def refuse_if_needed(findings: tuple[Finding, ...]) -> None:
    """Raise RefusedError with every refusal among the findings, each fact with its hint."""
    refusals = [finding for finding in findings if finding.severity == "refuse"]
    if refusals:
        raise RefusedError(
            "\n".join(finding.fact for finding in refusals),
            "\n".join(dict.fromkeys(finding.hint for finding in refusals)),
        )


def carried_columns(source: Table, target: Table) -> tuple[str, ...]:
    """Return the columns that are copied: all that the source has and the target does not generate."""
    return tuple(
        column.name
        for column in source.columns
        if (there := target.column(column.name)) is not None and not there.generated
    )


def check_vector_dimensions(
    session: Session, table: Table, mapping: TableMapping, dimensions: int
) -> tuple[Finding, ...]:
    """Count the rows per dimension where the column's type does not tell. Reads every vector.

    A typed column needs no scan, and gets none.
    """
    column = table.column(mapping.embedding)
    if column is None or column.dimensions is not None or column.base_type not in VECTOR_TYPES:
        return ()
    if table.extension is None:
        return ()
    counts = session.rows(
        sql.SQL(
            "SELECT d, pg_catalog.count(*) FROM (SELECT {}({}) AS d FROM {}) q WHERE d IS NOT NULL GROUP BY d"
        ).format(
            sql.Identifier(table.extension.schema, "vector_dims"), sql.Identifier(mapping.embedding), table.identifier
        )
        + sql.SQL(" ORDER BY 2 DESC, 1")
    )
    if all(found == dimensions for found, _ in counts):
        return ()
    listed = ", ".join(f"{found} dimensions: {rows} row{'' if rows == 1 else 's'}" for found, rows in counts[:EXAMPLES])
    return (
        _refuse(
            f"{session.endpoint.name}'s column {mapping.embedding} is an untyped vector and holds {listed};"
            f" EMBEDDING_DIMENSIONS says {dimensions}",
            "set EMBEDDING_DIMENSIONS to the model's dimension, and embed or delete the other rows first",
        ),
    )


def _refuse(fact: str, hint: str) -> Finding:
    return Finding(severity="refuse", fact=fact, hint=hint)


def _check_kind(table: Table, name: str) -> tuple[Finding, ...]:
    if table.kind == "r":
        return ()
    return (
        _refuse(
            f"{name}'s {table.qualified} is {KINDS[table.kind]}; only ordinary tables are copied",
            "name the table itself in PGVECTOR_TABLE",
        ),
    )


def _check_key(source: Table, target: Table, mapping: TableMapping, names: tuple[str, str]) -> tuple[Finding, ...]:
    # Only an ordinary table can have a key, and what is none was refused already.
    if source.kind != "r" or target.kind != "r":
        return ()
    found = []
    for table, name in ((source, names[0]), (target, names[1])):
        column = table.column(mapping.id)
        if not table.key and column is not None:
            found.append(
                _refuse(
                    f"{name}'s {table.qualified} has no key: no primary key, and no unique index over NOT NULL columns",
                    f"on {name}: ALTER TABLE {table.quoted} ADD PRIMARY KEY ({column.quoted})",
                )
            )
    if found or not (source.key and target.key) or set(source.key) == set(target.key):
        return tuple(found)
    return (
        _refuse(
            f"the keys differ: ({', '.join(source.key)}) on {names[0]}, ({', '.join(target.key)}) on {names[1]}",
            "give both tables the same primary key",
        ),
    )


def _check_columns(
    source: Table, target: Table, mapping: TableMapping, dimensions: int, names: tuple[str, str]
) -> tuple[Finding, ...]:
    findings: list[Finding] = []
    for table, name in ((source, names[0]), (target, names[1])):
        have = ", ".join(column.name for column in table.columns)
        findings += [
            _refuse(
                f"{name}'s {table.qualified} has no column {column!r}; it has {have}",
                f"set PGVECTOR_COL_{variable} to the name that the column has",
            )
            for variable, column in zip(_VARIABLES, mapping.columns, strict=True)
            if table.column(column) is None
        ]
    if findings:
        # Compared by names that are not theirs, the other columns would be blamed for it.
        return tuple(findings)
    findings += _check_embedding(source, mapping, dimensions, names[0])
    findings += _check_embedding(target, mapping, dimensions, names[1])
    for column in source.columns:
        findings += _check_pair(column, source, target, mapping, names)
    findings += [
        _refuse(
            f"{names[1]}'s column {column.name} is NOT NULL without a default, and {names[0]} has no such column",
            f"give it a default, or on {names[1]}: ALTER TABLE {target.quoted} ALTER COLUMN {column.quoted}"
            " DROP NOT NULL",
        )
        for column in target.columns
        if column.not_null and not column.has_default and not column.generated and not source.column(column.name)
    ]
    return tuple(findings)


def _check_pair(
    column: Column, source: Table, target: Table, mapping: TableMapping, names: tuple[str, str]
) -> list[Finding]:
    there = target.column(column.name)
    if there is None:
        return [
            _refuse(
                f"{names[1]} has no column {column.name} ({column.type}), which {names[0]}'s {source.qualified} has",
                f"on {names[1]}: ALTER TABLE {target.quoted} ADD COLUMN {column.quoted} {column.type}"
                " (nothing is left behind in silence)",
            )
        ]
    typed_there = column.base_type == there.base_type and column.dimensions is None and there.dimensions is not None
    if column.type == there.type or there.generated or (typed_there and column.name == mapping.embedding):
        return []
    if column.name == mapping.embedding and column.base_type == there.base_type:
        return []  # the dimensions differ: said once, against EMBEDDING_DIMENSIONS
    return [
        _refuse(
            f"column {column.name} is {column.type} on {names[0]} and {there.type} on {names[1]}",
            "give both columns the same type: COPY would refuse or reinterpret the bytes",
        )
    ]


def _check_embedding(table: Table, mapping: TableMapping, dimensions: int, name: str) -> list[Finding]:
    column = table.column(mapping.embedding)
    if column is None:
        return []
    if column.base_type not in VECTOR_TYPES:
        return [
            _refuse(
                f"{name}'s column {column.name} is {column.type}, not a vector",
                "set PGVECTOR_COL_VECTOR to the column that holds the embeddings",
            )
        ]
    if column.dimensions is not None and column.dimensions != dimensions:
        return [
            _refuse(
                f"{name}'s column {column.name} has {column.dimensions} dimensions,"
                f" EMBEDDING_DIMENSIONS says {dimensions}",
                f"if {name} is right: set EMBEDDING_DIMENSIONS={column.dimensions}"
                + (" before alembic upgrade head, on an empty main" if name != "main" else ""),
            )
        ]
    return []


def _check_rights(
    source: Table, target: Table, mapping: TableMapping, names: tuple[str, str], to_write: bool
) -> tuple[Finding, ...]:
    findings: list[Finding] = []
    carried = {*mapping.columns, *carried_columns(source, target)}
    for table, name in ((source, names[0]), (target, names[1])):
        if table.row_security:
            findings.append(
                _refuse(
                    f"row-level security hides rows of {name}'s {table.qualified} from the role {table.role}",
                    f"use the table's owner, or on {name}: ALTER ROLE {table.quoted_role} BYPASSRLS",
                )
            )
        if not table.may_use_schema:
            findings.append(
                _refuse(
                    f"the role {table.role} may not use {name}'s schema {table.schema}",
                    f"on {name}: GRANT USAGE ON SCHEMA {table.quoted_schema} TO {table.quoted_role}",
                )
            )
    findings += _check_right(source, names[0], "SELECT", [c for c in source.columns if not c.may_select], carried)
    findings += _check_right(target, names[1], "SELECT", [c for c in target.columns if not c.may_select], carried)
    if to_write:
        findings += _check_rights_to_write(target, names[1], carried)
    return tuple(findings)


def _check_right(table: Table, name: str, right: str, lacking: list[Column], needed: set[str]) -> list[Finding]:
    columns = [column.name for column in lacking if column.name in needed]
    if not columns:
        return []
    some = f" (columns {', '.join(columns)})" if len(lacking) < len(table.columns) else ""
    return [
        _refuse(
            f"the role {table.role} may not {right} on {name}'s {table.qualified}{some}",
            f"on {name}: GRANT {right} ON {table.quoted} TO {table.quoted_role}",
        )
    ]


def _check_rights_to_write(table: Table, name: str, needed: set[str]) -> list[Finding]:
    """Return what would stop a copy: at its begin, or at its end, where it brings what changed meanwhile."""
    findings = _check_right(table, name, "INSERT", [c for c in table.columns if not c.may_insert], needed)
    findings += _check_right(table, name, "UPDATE", [c for c in table.columns if not c.may_update], needed)
    if not table.may_delete:
        findings += _check_right(table, name, "DELETE", list(table.columns), needed)
    if not table.may_create_temporary:
        findings.append(
            _refuse(
                f"the role {table.role} may not make temporary tables on {name}",
                f"on {name}: GRANT TEMPORARY ON DATABASE {table.quoted_database} TO {table.quoted_role}",
            )
        )
    return findings
