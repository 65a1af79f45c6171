"""Every reason that a copy could fail, found before a row moves. Read-only on both sides."""

from dataclasses import dataclass
from typing import Literal

from psycopg2 import sql

from pipeline.errors import RefusedError
from pipeline.postgres.database import Session
from pipeline.postgres.tables import KINDS, VECTOR_TYPES, Column, Table
from pipeline.settings import TableMapping

Severity = Literal["refuse", "warn", "note"]
# How many of a kind a message names before it only counts the rest.
EXAMPLES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing found: what is so, and what to type."""

    severity: Severity
    fact: str
    hint: str


def check_tables(
    source: Table, target: Table, mapping: TableMapping, dimensions: int, names: tuple[str, str]
) -> tuple[Finding, ...]:
    """Compare the two descriptions; no query. ``names`` are the endpoints' names for the messages."""
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
        *_check_key(source, target, names),
        *_check_columns(source, target, mapping, dimensions, names),
        *_check_rights(source, target, mapping, names),
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
    listed = ", ".join(f"{found} dimensions: {rows} rows" for found, rows in counts[:EXAMPLES])
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


def _check_key(source: Table, target: Table, names: tuple[str, str]) -> tuple[Finding, ...]:
    found = tuple(
        _refuse(
            f"{name}'s {table.qualified} has no key: no primary key, and no unique index over NOT NULL columns",
            f"on {name}: ALTER TABLE {table.qualified} ADD PRIMARY KEY (…)",
        )
        for table, name in ((source, names[0]), (target, names[1]))
        if not table.key
    )
    if found or set(source.key) == set(target.key):
        return found
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
                "set PGVECTOR_COL_ID, _CONTENT, _METADATA and _VECTOR to the names that it has",
            )
            for column in mapping.columns
            if table.column(column) is None
        ]
    findings += _check_embedding(source, mapping, dimensions, names[0])
    findings += _check_embedding(target, mapping, dimensions, names[1])
    for column in source.columns:
        findings += _check_pair(column, target.column(column.name), source, mapping, names)
    findings += [
        _refuse(
            f"{names[1]}'s column {column.name} is NOT NULL without a default, and {names[0]} has no such column",
            f"on {names[1]}: ALTER TABLE {target.qualified} ALTER COLUMN {column.name} SET DEFAULT …",
        )
        for column in target.columns
        if column.not_null and not column.has_default and not column.generated and not source.column(column.name)
    ]
    return tuple(findings)


def _check_pair(
    column: Column, there: Column | None, source: Table, mapping: TableMapping, names: tuple[str, str]
) -> list[Finding]:
    if there is None:
        if column.name in mapping.columns:
            return []
        return [
            _refuse(
                f"{names[1]} has no column {column.name} ({column.type}), which {names[0]}'s {source.qualified} has",
                f"on {names[1]}: add the column, so that nothing is left behind in silence",
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


def _check_rights(source: Table, target: Table, mapping: TableMapping, names: tuple[str, str]) -> tuple[Finding, ...]:
    findings = [
        _refuse(
            f"row-level security hides rows of {name}'s {table.qualified} from this role",
            f"use the table's owner, or on {name}: ALTER ROLE … BYPASSRLS",
        )
        for table, name in ((source, names[0]), (target, names[1]))
        if table.row_security
    ]
    needs = ((source, names[0], "SELECT"), (target, names[1], "SELECT"), (target, names[1], "INSERT"))
    for table, name, right in needs:
        lacking = [
            column.name
            for column in table.columns
            if column.name in {*mapping.columns, *carried_columns(source, target)}
            and not (column.may_select if right == "SELECT" else column.may_insert)
        ]
        if lacking or not table.may_use_schema:
            findings.append(
                _refuse(
                    f"this role may not {right} on {name}'s {table.qualified}"
                    + (f" (columns {', '.join(lacking)})" if 0 < len(lacking) < len(table.columns) else ""),
                    f"on {name}: GRANT USAGE ON SCHEMA {table.schema} TO …; GRANT {right} ON {table.qualified} TO …",
                )
            )
    return tuple(findings)
