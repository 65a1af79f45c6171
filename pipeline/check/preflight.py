"""Every reason in the two descriptions that a copy could fail, found before a row moves; no query."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.check.casts import misfit
from pipeline.errors import RefusedError
from pipeline.postgres.columns import Column
from pipeline.postgres.tables import KINDS, Table
from pipeline.settings import TableMapping

Severity = Literal["refuse", "warn", "note"]
# The ends of the variables that name the columns, in the order of TableMapping.columns.
_VARIABLES = ("ID", "CONTENT", "METADATA", "VECTOR")
# The others name what an application reads; a table that has neither is copied like any other.
_NEEDED = frozenset({"ID", "VECTOR"})
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
    ignored: Sequence[str] = (),
    rounding: bool = False,
) -> tuple[Finding, ...]:
    """Compare the two descriptions; no query. ``names`` are the endpoints' names for the messages.

    Without ``to_write`` the rights that only a copy needs on the target are not asked for. ``ignored``
    columns of the source are left behind. With ``rounding`` a vector goes into a halfvec.
    """
    if source.server == target.server and source.oid == target.oid:
        return (
            _refuse(
                f"{names[0]} and {names[1]} are the same table of the same server, under two names",
                "pipeline settings shows where each points",
            ),
        )
    return (
        *_check_kinds(source, target, names),
        *_check_key(source, target, mapping, names),
        *_check_ignored(source, target, mapping, names, ignored),
        *_check_columns(source, target, mapping, dimensions, names, ignored, rounding),
        *_check_rights(source, target, mapping, names, to_write, ignored),
    )


def refuse_if_needed(findings: tuple[Finding, ...]) -> None:
    """Raise RefusedError with every refusal among the findings, each fact with its hint."""
    refusals = [finding for finding in findings if finding.severity == "refuse"]
    if refusals:
        raise RefusedError(
            "\n".join(finding.fact for finding in refusals),
            "\n".join(dict.fromkeys(finding.hint for finding in refusals)),
        )


def carried_columns(source: Table, target: Table, ignored: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the columns that are copied: all that the source has and the target does not generate."""
    return tuple(
        column.name
        for column in source.columns
        if (there := target.column(column.name)) is not None and not there.generated and column.name not in ignored
    )


def note_columns(
    source: Table, target: Table, names: tuple[str, str], ignored: Sequence[str] = ()
) -> tuple[Finding, ...]:
    """Note how the columns differ where that refuses nothing: casts, what stays behind, what only main has."""
    carried = carried_columns(source, target, ignored)
    found = []
    for name in carried:
        column, there = source.column(name), target.column(name)
        if column is not None and there is not None and column.type != there.type and misfit(column, there) is None:
            found.append(
                f"column {name} is {column.type} on {names[0]} and {there.type} on {names[1]}: carried as the latter"
            )
    found += [
        f"{names[0]}'s column {name} stays behind: --ignore-column"
        for name in ignored
        if source.column(name) is not None
    ]
    found += [
        f"{names[1]}'s column {column.name} is not on {names[0]}: it gets its default, or NULL"
        for column in target.columns
        if column.name not in carried and column.name not in ignored and not column.generated
        if column.has_default or not column.not_null
    ]
    return tuple(Finding(severity="note", fact=fact, hint="") for fact in found)


def has_own_key(source: Table, target: Table) -> bool:
    """Return whether the source itself keeps the target's key unique."""
    return set(source.key) == set(target.key)


def _refuse(fact: str, hint: str) -> Finding:
    return Finding(severity="refuse", fact=fact, hint=hint)


def _check_kinds(source: Table, target: Table, names: tuple[str, str]) -> list[Finding]:
    found = [
        _refuse(
            f"{name}'s {table.qualified} has tables that inherit from it, whose rows are read as its own",
            f"on {name}: make them partitions, or ALTER TABLE ... NO INHERIT {table.quoted}",
        )
        for table, name in ((source, names[0]), (target, names[1]))
        if table.inherited
    ]
    if target.kind != "r":
        found.append(
            _refuse(
                f"{names[1]}'s {target.qualified} is {KINDS[target.kind]}; rows are copied into ordinary tables only",
                "name an ordinary table in PGVECTOR_TABLE",
            )
        )
    if target.encoding not in ("UTF8", "SQL_ASCII", source.encoding):
        found.append(
            _refuse(
                f"{names[1]}'s database has the encoding {target.encoding}, {names[0]}'s has {source.encoding}:"
                " not every text fits",
                f"use a database of the encoding UTF8 for {names[1]}",
            )
        )
    return found


def _check_key(source: Table, target: Table, mapping: TableMapping, names: tuple[str, str]) -> list[Finding]:
    found = []
    for table, name in ((source, names[0]), (target, names[1])):
        column = table.column(mapping.id)
        if table.kind == "r" and not table.key and column is not None:
            found.append(
                _refuse(
                    f"{name}'s {table.qualified} has no key: no primary key, and no unique index over NOT NULL columns",
                    f"on {name}: ALTER TABLE {table.quoted} ADD PRIMARY KEY ({column.quoted})",
                )
            )
    if found or target.kind != "r" or has_own_key(source, target):
        return found
    if source.kind == "r":
        fact = f"the keys differ: ({', '.join(source.key)}) on {names[0]}, ({', '.join(target.key)}) on {names[1]}"
        return [_refuse(fact, "give both tables the same primary key")]
    # A view has none, and a partitioned table's holds the columns that divide it: the target's is counted.
    return [
        _refuse(
            f"the key of {names[1]}'s {target.qualified} has the column {name}, which {names[0]}'s"
            f" {source.qualified} has not",
            "give the target's table a key of columns that both sides have",
        )
        for name in target.key
        if source.column(name) is None
    ]


def _check_ignored(
    source: Table, target: Table, mapping: TableMapping, names: tuple[str, str], ignored: Sequence[str]
) -> list[Finding]:
    have = ", ".join(column.name for column in source.columns)
    return [
        _refuse(
            f"--ignore-column: {names[0]}'s {source.qualified} has no column {name!r}; it has {have}",
            "name a column as it stands in the catalog, or leave the option out",
        )
        if source.column(name) is None
        else _refuse(f"--ignore-column: {name} is the embedding, or in the key", "nothing is left to copy without it")
        for name in ignored
        if source.column(name) is None or name == mapping.embedding or name in target.key
    ]


def _check_columns(
    source: Table,
    target: Table,
    mapping: TableMapping,
    dimensions: int,
    names: tuple[str, str],
    ignored: Sequence[str],
    rounding: bool,
) -> list[Finding]:
    findings = _check_mapped(source, target, mapping, names)
    if findings:
        # Compared by names that are not theirs, the other columns would be blamed for it.
        return findings
    findings += _check_embedding(source, mapping, dimensions, names[0])
    findings += _check_embedding(target, mapping, dimensions, names[1])
    for column in source.columns:
        if column.name not in ignored:
            findings += _check_pair(column, source, target, mapping, names, rounding)
    carried = carried_columns(source, target, ignored)
    for column in target.columns:
        if column.generated:
            continue
        if column.name not in carried and column.not_null and not column.has_default:
            why = "--ignore-column names it" if column.name in ignored else f"{names[0]} has no such column"
            findings.append(
                _refuse(
                    f"{names[1]}'s column {column.name} is NOT NULL without a default, and {why}",
                    f"give it a default, or on {names[1]}: ALTER TABLE {target.quoted} ALTER COLUMN {column.quoted}"
                    " DROP NOT NULL",
                )
            )
        if column.name in carried and column.identity_always and column.name not in target.key:
            findings.append(
                _refuse(
                    f"{names[1]}'s column {column.name} is GENERATED ALWAYS AS IDENTITY and not in the key: a row that"
                    " changes meanwhile could not be written over",
                    f"on {names[1]}: ALTER TABLE {target.quoted} ALTER COLUMN {column.quoted} SET GENERATED BY DEFAULT",
                )
            )
    return findings


def _check_mapped(source: Table, target: Table, mapping: TableMapping, names: tuple[str, str]) -> list[Finding]:
    """Return which columns of the settings are missing; content and metadata may be so on both sides."""
    findings = []
    for table, other, name in ((source, target, names[0]), (target, source, names[1])):
        have = ", ".join(column.name for column in table.columns)
        findings += [
            _refuse(
                f"{name}'s {table.qualified} has no column {column!r}; it has {have}",
                f"set PGVECTOR_COL_{variable} to the name that the column has",
            )
            for variable, column in zip(_VARIABLES, mapping.columns, strict=True)
            if table.column(column) is None and (variable in _NEEDED or other.column(column) is not None)
        ]
    return findings


def _check_pair(
    column: Column, source: Table, target: Table, mapping: TableMapping, names: tuple[str, str], rounding: bool
) -> list[Finding]:
    there = target.column(column.name)
    if there is None:
        return [
            _refuse(
                f"{names[1]} has no column {column.name} ({column.type}), which {names[0]}'s {source.qualified} has",
                f"on {names[1]}: ALTER TABLE {target.quoted} ADD COLUMN {column.quoted} {column.type}"
                f" (or leave it behind: --ignore-column {column.quoted})",
            )
        ]
    wrong = None if there.generated else misfit(column, there, rounding=rounding)
    if wrong is None:
        return []
    if column.name == mapping.embedding and not (column.is_vector and there.is_vector):
        return []  # said once, by _check_embedding
    if column.name == mapping.embedding and column.base_type == there.base_type:
        return []  # the dimensions differ: said once, against EMBEDDING_DIMENSIONS
    return [
        _refuse(
            f"column {column.name} is {column.type} on {names[0]} and {there.type} on {names[1]}"
            + (f": {wrong.reason}" if wrong.reason else ""),
            wrong.hint,
        )
    ]


def _check_embedding(table: Table, mapping: TableMapping, dimensions: int, name: str) -> list[Finding]:
    column = table.column(mapping.embedding)
    if column is None:
        return []
    if not column.is_vector:
        bits = ": bits have no cosine distance that search could be compared by" if column.base_type == "bit" else ""
        return [
            _refuse(
                f"{name}'s column {column.name} is {column.type}, not a vector{bits}",
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
    source: Table,
    target: Table,
    mapping: TableMapping,
    names: tuple[str, str],
    to_write: bool,
    ignored: Sequence[str],
) -> tuple[Finding, ...]:
    findings: list[Finding] = []
    carried = {mapping.id, mapping.embedding, *carried_columns(source, target, ignored)}
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
