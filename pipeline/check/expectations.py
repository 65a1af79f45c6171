"""What the clients take for granted of a table, held against what the application's role meets; no query.

The clients are LangChain's PGVectorStore (JS) and its like: it writes a table's name without quotes where it is
given no schemaName, makes a table where it finds none, and lets the server give a row its id.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.check.pair import Pair
from pipeline.check.role import Relation, Rights, Role
from pipeline.postgres.tables import Table
from pipeline.settings import Route, TableMapping
from pipeline.wording import counted

Severity = Literal["fail", "note"]
# What the clients take each column for, and what is lost with another type.
_TYPES = (
    ("id", ("uuid",), "a delete by id fails, since the client sends uuids"),
    ("content", ("text", "varchar", "bpchar"), "the client takes it for text"),
    ("metadata", ("jsonb",), ""),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AppFinding:
    """One thing found: what is so, and what to type. A ``fail`` is what the application would stumble over."""

    severity: Severity
    fact: str
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the target shows. ``folded`` is the table's name without quotes, None: it cannot go without.

    ``found`` is what that leads to. The nulls are counted in rows; None: there is no such column, or it does not
    show to the role that asks. ``undeclared`` are the indexes of methods that an entity of TypeORM cannot declare.
    """

    role: Role
    rights: Rights
    folded: str | None
    found: Relation | None
    null_contents: int | None
    null_metadata: int | None
    has_uuid_ossp: bool
    undeclared: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Legacy:
    """What the application was used to on the source: ``default`` is its id's, as SQL."""

    off_path: bool
    default: str


def judge(pair: Pair, route: Route, seen: Seen, legacy: Legacy, *, named: bool) -> list[AppFinding]:
    """Return all that the application would meet. ``named`` says that the role is known to be its own."""
    name, mapping = route.target.name, route.table
    # Which search_path the application has is known of a named role alone.
    severity: Severity = "fail" if named else "note"
    return [
        *_check_entry(seen, pair.target, name),
        *_check_name(seen, pair.target, name, severity),
        *_check_rights(seen, pair.target, name),
        *_check_extension(seen, legacy, pair.target, name, severity),
        *_check_id(seen, legacy, pair, mapping, name),
        *_check_columns(pair, mapping, name),
        *_check_types(pair, mapping, name),
        *_check_nulls(seen, pair.target, name),
        *_check_synchronize(seen, pair.target, name),
    ]


def no_role(route: Route, role: str) -> AppFinding:
    """Return the finding of a role that the target has not."""
    return AppFinding(
        severity="fail",
        fact=f"{route.target.name} has no role {role}",
        hint="check --app-role, or have an administrator create the role with LOGIN",
    )


def _check_entry(seen: Seen, table: Table, name: str) -> Iterator[AppFinding]:
    role = seen.role
    if not role.may_connect:
        yield AppFinding(
            severity="fail",
            fact=f"the role {role.name} may not connect to {name}'s database",
            hint=f"on {name}: GRANT CONNECT ON DATABASE {table.quoted_database} TO {role.quoted}",
        )
    if not role.may_login:
        yield AppFinding(severity="note", fact=f"the role {role.name} may not log in: others have to be members of it")


def _check_name(seen: Seen, table: Table, name: str, severity: Severity) -> Iterator[AppFinding]:
    """Yield where the bare name that a client writes leads elsewhere, or to a new and empty table."""
    role, found = seen.role, seen.found
    schema_name = f"pass schemaName: {table.schema!r} to the client, which quotes both names then"
    if found is not None and found.oid == table.oid:
        first = role.places[0] if role.places else None
        if first is not None and first.schema not in (table.schema, "pg_catalog"):
            does = "makes a new, empty one there" if first.may_create else "fails, since the role may make none there"
            yield AppFinding(
                severity=severity if first.may_create else "note",
                fact=f"the search_path of {role.name} begins with the schema {first.schema}: where LangChain"
                f" initializes a table {seen.folded} without schemaName, it {does}",
                hint=f"{schema_name}, or {_set_path(role, table, name)}",
            )
        return
    leads = f"leads to {found.qualified}" if found is not None else "leads to nothing"
    if seen.folded is None:
        fact = f"the name {table.name} does not go without quotes, which a client without schemaName leaves out"
        hint = schema_name
    elif seen.folded != table.name:
        fact = f"without quotes {table.name} is {seen.folded}, which {leads} for the role {role.name}"
        hint = f"{schema_name}, or on {name}: ALTER TABLE {table.quoted} RENAME TO {seen.folded}"
    elif found is None and not seen.rights.may_use_schema:
        return  # said with the rights: a schema that the role may not use is passed over
    else:
        fact = f"the bare name {table.name} {leads} for the role {role.name}, and not to {table.qualified}"
        hint = f"{schema_name}, or {_set_path(role, table, name)}"
    more = ": LangChain makes a new, empty table of that name" if found is None and seen.folded is not None else ""
    yield AppFinding(severity=severity, fact=fact + more, hint=hint)


def _set_path(role: Role, table: Table, name: str) -> str:
    """Return the line that puts the table's schema first on the role's search_path."""
    others = (item for item in role.search_path if item != table.schema)
    quoted = (one if one == "public" else '"{}"'.format(one.replace('"', '""')) for one in others)
    path = ", ".join((table.quoted_schema, *quoted))
    return f"on {name}: ALTER ROLE {role.quoted} IN DATABASE {table.quoted_database} SET search_path = {path}"


def _check_rights(seen: Seen, table: Table, name: str) -> Iterator[AppFinding]:
    role, rights = seen.role, seen.rights
    to, on = f"TO {role.quoted}", f"on {name}: "
    if not rights.may_use_schema:
        yield AppFinding(
            severity="fail",
            fact=f"the role {role.name} may not use {name}'s schema {table.schema}",
            hint=f"{on}GRANT USAGE ON SCHEMA {table.quoted_schema} {to}",
        )
    lacking: tuple[tuple[str, tuple[str, ...], Severity], ...] = (
        ("SELECT", rights.unread, "fail"),
        ("INSERT", rights.uninserted, "fail"),
        ("DELETE", () if rights.may_delete else ("*",), "fail"),
        ("UPDATE", rights.unwritten, "note"),
    )
    for right, columns, severity in lacking:
        if columns:
            some = f" (columns {', '.join(columns)})" if right == "SELECT" and len(columns) < len(table.columns) else ""
            yield AppFinding(
                severity=severity,
                fact=f"the role {role.name} may not {right} on {name}'s {table.qualified}{some}",
                hint=f"{on}GRANT {right} ON {table.quoted} {to}",
            )
    for sequence in rights.sequences:
        yield AppFinding(
            severity="fail",
            fact=f"a default of {table.qualified} draws from {sequence}, which the role {role.name} may not use",
            hint=f"{on}GRANT USAGE ON SEQUENCE {sequence} {to}",
        )
    if rights.secured:
        yield AppFinding(
            severity="note" if rights.policies else "fail",
            fact=f"row-level security of {table.qualified} is active for the role {role.name}: "
            + (
                f"it sees what {counted(rights.policies, 'policy')} let{'s' if rights.policies == 1 else ''} through"
                if rights.policies
                else "no policy lets it see a row"
            ),
            hint=f"{on}CREATE POLICY for it, or ALTER ROLE {role.quoted} BYPASSRLS",
        )
    if not rights.may_create:
        yield AppFinding(
            severity="note",
            fact=f"the role {role.name} may not create tables in {table.schema}: LangChain's initialize fails, although"
            " the table is there",
            hint=f"pass skipInitializationCheck: true, or {on}GRANT CREATE ON SCHEMA {table.quoted_schema} {to}",
        )
    if not rights.owns:
        yield AppFinding(
            severity="note",
            fact=f"{table.qualified} belongs to {rights.owner}: the role {role.name} can make no index on it",
            hint=f"{on}ALTER TABLE {table.quoted} OWNER {to}, where the application makes indexes itself",
        )


def _check_extension(seen: Seen, legacy: Legacy, table: Table, name: str, severity: Severity) -> Iterator[AppFinding]:
    if table.extension is None or (table.extension.schema == table.schema and not seen.rights.may_use_schema):
        return  # said with the rights
    role, schema = seen.role, table.extension.schema
    quoted = '"{}"'.format(schema.replace('"', '""'))
    if not seen.rights.may_use_extension:
        yield AppFinding(
            severity="fail",
            fact=f"the role {role.name} may not use {name}'s schema {schema}, which pgvector is in: no search works",
            hint=f"on {name}: GRANT USAGE ON SCHEMA {quoted} TO {role.quoted}",
        )
    elif not any(place.schema == schema for place in role.places):
        yield AppFinding(
            severity="note" if legacy.off_path else severity,
            fact=f"pgvector's schema {schema} is not on the search_path of the role {role.name}: a client that does not"
            " name it does not find type and operators",
            hint=f"pass extensionSchemaName: {schema!r} to the client, or on {name}: ALTER ROLE {role.quoted} IN"
            f" DATABASE {table.quoted_database} SET search_path with {quoted} added",
        )


def _check_id(seen: Seen, legacy: Legacy, pair: Pair, mapping: TableMapping, name: str) -> Iterator[AppFinding]:
    mine, theirs = pair.source.column(mapping.id), pair.target.column(mapping.id)
    if theirs is not None and not theirs.has_default and not theirs.generated:
        had = mine is not None and mine.has_default
        uuid = theirs.base_type == "uuid"
        yield AppFinding(
            severity="fail" if had else "note",
            fact=f"{name}'s column {mapping.id} has no default"
            + (", and the source's has one" if had else "")
            + ": a row that comes without an id is refused",
            hint=f"on {name}: ALTER TABLE {pair.target.quoted} ALTER COLUMN {theirs.quoted} SET DEFAULT"
            f" {'pg_catalog.gen_random_uuid()' if uuid else '...'}",
        )
    if "uuid_generate_v4" in legacy.default and not seen.has_uuid_ossp:
        yield AppFinding(
            severity="note",
            fact=f"the source's default of {mapping.id} is of uuid-ossp, which {name} has not: LangChain before 0.3.42"
            " asks for that extension when it starts",
            hint=f'bring the client up to date, or on {name}, as an administrator: CREATE EXTENSION "uuid-ossp"',
        )


def _check_columns(pair: Pair, mapping: TableMapping, name: str) -> Iterator[AppFinding]:
    for column in pair.target.columns:
        if not column.not_null or column.has_default or column.generated or column.name in mapping.columns:
            continue
        mine = pair.source.column(column.name)
        # Nobody inserts through a view, and it knows no NOT NULL.
        used_to = pair.source.kind not in ("r", "p") or (mine is not None and mine.not_null and not mine.has_default)
        yield AppFinding(
            severity="note" if used_to else "fail",
            fact=f"{name}'s column {column.name} is NOT NULL without a default: a client that does not fill it cannot"
            " add rows",
            hint=f"on {name}: ALTER TABLE {pair.target.quoted} ALTER COLUMN {column.quoted} DROP NOT NULL",
        )


def _check_types(pair: Pair, mapping: TableMapping, name: str) -> Iterator[AppFinding]:
    for part, expected, effect in _TYPES:
        column, mine = pair.target.column(getattr(mapping, part)), pair.source.column(getattr(mapping, part))
        if column is None or column.base_type in expected:
            continue
        if part == "id" and mine is not None and mine.base_type not in expected:
            continue  # a client that knows uuids alone never used this table
        if part == "metadata":
            effect = (
                "filters by what an array contains fail"
                if column.base_type == "json"
                else "the client gets a string, and filters by metadata fail"
            )
        yield AppFinding(severity="note", fact=f"{name}'s column {column.name} is {column.type}: {effect}")


def _check_nulls(seen: Seen, table: Table, name: str) -> Iterator[AppFinding]:
    for count, what, effect in (
        (seen.null_contents, "content", "LangChain drops them from what a search returns"),
        (seen.null_metadata, "metadata", "a filter, and some clients always, leave them out"),
    ):
        if count:
            fact = f"{name}'s {table.qualified}: {counted(count, 'row')} without {what}: {effect}"
            yield AppFinding(severity="note", fact=fact)


def _check_synchronize(seen: Seen, table: Table, name: str) -> Iterator[AppFinding]:
    if seen.undeclared:
        yield AppFinding(
            severity="note",
            fact=f"{name}'s {table.qualified}: TypeORM, where the table is an entity with synchronize: true, drops the"
            f" {'index' if len(seen.undeclared) == 1 else 'indexes'} {', '.join(seen.undeclared)} at its next start",
            hint="keep synchronize off, or declare each with @Index(name, { synchronize: false })",
        )
