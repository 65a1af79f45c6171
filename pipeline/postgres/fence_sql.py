"""What a fence is made of: its function and triggers, how the catalog shows them, the statements that change them.

The condition stands in the function, and not in WHEN clauses of the triggers: so all of it is one fixed text
that the catalog can be compared with, and the pass can be read there. It costs up to 2 microseconds a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg2.extensions
from psycopg2 import sql

from pipeline.endpoints import check_pass
from pipeline.errors import RefusedError
from pipeline.postgres.database import Cursor
from pipeline.postgres.facts import gather
from pipeline.postgres.failures import FENCE_STATE
from pipeline.postgres.tables import KINDS, Table

FUNCTION = "pipeline_fence"
# Where the function goes if the role may make none in the table's schema.
OTHER_SCHEMA = "pipeline"
# Triggers fire in the order of their names: no other one's work is done, and undone, before.
STATEMENT_TRIGGER, ROW_TRIGGER = "00_pipeline_fence_statement", "00_pipeline_fence_row"
# The version that knows CREATE OR REPLACE TRIGGER: before, a trigger is dropped, which waits for readers too.
REPLACE_VERSION = 140000
# Operators are named with their schema, since the search path is the writer's. A missing setting is NULL, which
# is refused. NEW goes back as it came: any expression around it would read large values that did not change.
BODY = f"""
BEGIN
  IF pg_catalog.current_setting('pipeline.through', true) OPERATOR(pg_catalog.=) TG_ARGV[1]
    OR (CASE WHEN TG_ARGV[3] OPERATOR(pg_catalog.<>) ''
        THEN pg_catalog.clock_timestamp() OPERATOR(pg_catalog.>) TG_ARGV[3]::pg_catalog.timestamptz END) THEN
    IF TG_OP OPERATOR(pg_catalog.=) 'DELETE' THEN
      RETURN OLD;
    END IF;
    RETURN NEW;
  END IF;
  RAISE EXCEPTION USING ERRCODE = '{FENCE_STATE}', MESSAGE = TG_ARGV[0], SCHEMA = TG_TABLE_SCHEMA,
    TABLE = TG_TABLE_NAME, HINT = 'The table is being moved by the pipeline: pipeline status shows how far that is.';
END
"""
# Bits of pg_trigger.tgtype: row 1, before 2, insert 4, delete 8, update 16, truncate 32.
_TYPES = {STATEMENT_TRIGGER: 2 + 4 + 8 + 16 + 32, ROW_TRIGGER: 1 + 2 + 4 + 8 + 16}
_EVENTS = {
    STATEMENT_TRIGGER: sql.SQL("BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON {} FOR EACH STATEMENT"),
    ROW_TRIGGER: sql.SQL("BEFORE INSERT OR UPDATE OR DELETE ON {} FOR EACH ROW"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """What a fence says to whom it refuses, in one line, and the pass of those whom it lets through.

    ``until`` is when it ends by itself, by the server's clock and as an ISO time; empty: never.
    """

    message: str
    through: str
    until: str = ""

    def __post_init__(self) -> None:
        check_pass(self.through)
        if not self.message.strip() or not self.message.isprintable():
            raise ValueError("a fence's message is one line of text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The table, or a table below it: a partition or an heir. ``owned``: the role may change its triggers."""

    oid: int
    schema: str
    name: str
    kind: str
    owned: bool

    @property
    def identifier(self) -> sql.Identifier:
        """Return the quoted, qualified name for SQL."""
        return sql.Identifier(self.schema, self.name)

    @property
    def triggers(self) -> tuple[str, ...]:
        """Return the triggers of a fence: what only divides has no rows of its own."""
        return (STATEMENT_TRIGGER,) if self.kind == "p" else (STATEMENT_TRIGGER, ROW_TRIGGER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trigger:
    """A trigger that is a fence's by its name or its function; ``ours`` by its function's every letter.

    ``arguments`` are the message, the pass, the name of the table that is fenced, and when it ends. ``plain`` says
    that it has no condition and fires for every column.
    """

    part: Part
    name: str
    type: int
    enabled: str
    plain: bool
    arguments: tuple[str, ...]
    ours: bool
    function_schema: str

    def is_whole(self, message: str, through: str, until: str) -> bool:
        """Return whether it does what it has to, but for being enabled."""
        told = (*self.arguments[:2], *self.arguments[3:])
        return self.plain and self.type == _TYPES.get(self.name) and told == (message, through, until)


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A function of the fence's name; ``used`` counts the triggers that call it."""

    schema: str
    ours: bool
    owned: bool
    used: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """What the catalog shows of a table and its fence. ``parts`` begin with the table itself.

    ``may_create`` are schemas, of the two that the function may be in, in which the role may make one. ``now`` is the
    server's time.
    """

    table: Table
    parts: tuple[Part, ...]
    triggers: tuple[Trigger, ...]
    functions: tuple[Function, ...]
    may_create: frozenset[str]
    now: datetime

    @property
    def ours(self) -> tuple[Trigger, ...]:
        """Return the triggers that are of this table's fence, also those on what was once a part of it."""
        parts = {part.oid for part in self.parts}
        mine = (self.table.qualified,)
        return tuple(one for one in self.triggers if one.ours and (one.part.oid in parts or one.arguments[2:3] == mine))

    def trigger(self, part: Part, name: str) -> Trigger | None:
        """Return the trigger of that name on a part, whoever's it is."""
        return next((one for one in self.triggers if (one.part.oid, one.name) == (part.oid, name)), None)

    @property
    def function_schema(self) -> str | None:
        """Return where the function is or can be made, None where the role may make it nowhere."""
        places = (self.table.schema, OTHER_SCHEMA)
        standing = [place for place in places if any(one.ours and one.schema == place for one in self.functions)]
        return next(iter(standing or [place for place in places if place in self.may_create]), None)

    def check(self) -> None:
        """Raise RefusedError where no fence can stand, or where something else has the name of a part of one."""
        root = self.table
        if root.kind not in ("r", "p"):
            hint = "set PGVECTOR_TABLE to the table below it, or see to it by other means that nobody writes there"
            raise RefusedError(f"{root.qualified} is {KINDS[root.kind]}, which no trigger can guard", hint)
        for part in self.parts:
            if part.kind not in ("r", "p"):
                fact = f"{part.schema}.{part.name}, a part of {root.qualified}, is {KINDS.get(part.kind, 'no table')}"
                raise RefusedError(f"{fact}, whose rows are written elsewhere too", "detach it first")
        for name in (f"function {one.schema}.{FUNCTION}()" for one in self.functions if not one.ours):
            raise RefusedError(f"there is a {name} that is not the pipeline's", "rename it, or drop it")
        for trigger in self.triggers:
            if not trigger.ours and any(trigger.part.oid == part.oid for part in self.parts):
                place = f"{trigger.part.schema}.{trigger.part.name}"
                fact = f"the trigger {trigger.name} on {place} is not the pipeline's"
                raise RefusedError(fact, "rename it, or drop it")


_PARTS_SQL = """
WITH RECURSIVE tree AS (
    SELECT %(oid)s::pg_catalog.oid AS oid
    UNION SELECT i.inhrelid FROM pg_catalog.pg_inherits i JOIN tree ON i.inhparent = tree.oid)
SELECT c.oid::pg_catalog.int8, n.nspname, c.relname, c.relkind::pg_catalog.text,
       pg_catalog.pg_has_role(c.relowner, 'USAGE')
FROM tree JOIN pg_catalog.pg_class c ON c.oid = tree.oid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
ORDER BY c.oid <> %(oid)s, n.nspname, c.relname
"""

# Ours by its text: whatever else bears the name is somebody else's.
_TRIGGERS_SQL = """
SELECT c.oid::pg_catalog.int8, cn.nspname, c.relname, c.relkind::pg_catalog.text,
       pg_catalog.pg_has_role(c.relowner, 'USAGE') AS part_owned,
       t.tgname, t.tgtype::pg_catalog.int4, t.tgenabled::pg_catalog.text,
       t.tgqual IS NULL AND t.tgattr::pg_catalog.text = '' AND NOT t.tgdeferrable AS plain,
       pg_catalog.encode(t.tgargs, 'hex'),
       p.proname = %(function)s AND p.pronargs = 0 AND p.prosrc = %(body)s AND p.proconfig IS NULL
       AND (SELECT l.lanname FROM pg_catalog.pg_language l WHERE l.oid = p.prolang) = 'plpgsql' AS ours,
       pn.nspname AS function_schema
FROM pg_catalog.pg_trigger t
JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid JOIN pg_catalog.pg_namespace cn ON cn.oid = c.relnamespace
JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid JOIN pg_catalog.pg_namespace pn ON pn.oid = p.pronamespace
WHERE NOT t.tgisinternal AND (t.tgname = ANY (%(triggers)s) OR p.proname = %(function)s)
ORDER BY cn.nspname, c.relname, t.tgname
"""

_FUNCTIONS_SQL = """
SELECT n.nspname,
       p.proname = %(function)s AND p.pronargs = 0 AND p.prosrc = %(body)s AND p.proconfig IS NULL
       AND (SELECT l.lanname FROM pg_catalog.pg_language l WHERE l.oid = p.prolang) = 'plpgsql' AS ours,
       pg_catalog.pg_has_role(p.proowner, 'USAGE') AS owned,
       (SELECT pg_catalog.count(*) FROM pg_catalog.pg_trigger t WHERE t.tgfoid = p.oid) AS used
FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
WHERE p.proname = %(function)s AND p.pronargs = 0 AND n.nspname = ANY (%(schemas)s) ORDER BY n.nspname
"""

_SCHEMAS_SQL = """
SELECT nspname FROM pg_catalog.pg_namespace
WHERE nspname = ANY (%(schemas)s) AND pg_catalog.has_schema_privilege(oid, 'CREATE')
"""


# gather hands texts on.
_NOW_SQL = "SELECT pg_catalog.clock_timestamp()::pg_catalog.text"


def read_catalog(cursor: Cursor, table: Table) -> Catalog:
    """Read what there is of a table's fence, by one query. Raises RefusedError where the table is gone."""
    arguments = {
        "oid": table.oid,
        "function": FUNCTION,
        "body": BODY,
        "triggers": [STATEMENT_TRIGGER, ROW_TRIGGER],
        "schemas": [table.schema, OTHER_SCHEMA],
    }
    parts, triggers, functions, schemas, ((now,),) = gather(
        cursor, (_PARTS_SQL, _TRIGGERS_SQL, _FUNCTIONS_SQL, _SCHEMAS_SQL, _NOW_SQL), arguments
    )
    if not parts:
        raise RefusedError(
            f"the table {table.qualified} is gone: it was dropped, or made again", "run the command again"
        )
    return Catalog(
        table=table,
        parts=tuple(_part(row) for row in parts),
        triggers=tuple(_trigger(row, table.encoding) for row in triggers),
        functions=tuple(
            Function(schema=schema, ours=ours, owned=owned, used=used) for schema, ours, owned, used in functions
        ),
        may_create=frozenset(name for (name,) in schemas),
        now=datetime.fromisoformat(now),
    )


def _part(row: Sequence[Any]) -> Part:
    oid, schema, name, kind, owned = row
    return Part(oid=oid, schema=schema, name=name, kind=kind, owned=owned)


def _trigger(row: Sequence[Any], encoding: str) -> Trigger:
    name, bits, enabled, plain, arguments, ours, function_schema = row[5:]
    codec = psycopg2.extensions.encodings.get(encoding, "utf_8").replace("ascii", "utf_8")
    return Trigger(
        part=_part(row[:5]),
        name=name,
        type=bits,
        enabled=enabled,
        plain=plain,
        # Each argument ends with a zero byte.
        arguments=tuple(one.decode(codec, "replace") for one in bytes.fromhex(arguments).split(b"\0")[:-1]),
        ours=ours,
        function_schema=function_schema,
    )


def lock_sql(table: Table, mode: str, seconds: float) -> sql.Composable:
    """Return what locks a table and all below it in a mode, and waits no longer for any of them.

    SHARE ROW EXCLUSIVE waits out every writer and lets readers be; ACCESS EXCLUSIVE waits out everybody.
    """
    return sql.SQL("SET LOCAL lock_timeout = {};\nLOCK TABLE {} IN {} MODE").format(
        sql.Literal(f"{int(seconds * 1000)}ms"), table.identifier, sql.SQL(mode)
    )


def put_statements(catalog: Catalog, fence: Fence, schema: str) -> Iterator[sql.Composable]:
    """Yield the statements that make the fence stand, its function in that schema; none where it does."""
    if not any(one.ours and one.schema == schema for one in catalog.functions):
        head = sql.SQL("CREATE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql AS $pipeline${}$pipeline$")
        yield head.format(sql.Identifier(schema, FUNCTION), sql.SQL(BODY))
    for part in catalog.parts:
        for name in part.triggers:
            yield from _trigger_statements(catalog, part, name, fence, schema)


def _trigger_statements(catalog: Catalog, part: Part, name: str, fence: Fence, schema: str) -> Iterator[sql.Composable]:
    standing = catalog.trigger(part, name)
    whole = standing is not None and standing.is_whole(fence.message, fence.through, fence.until)
    if not whole:
        create = sql.SQL("CREATE TRIGGER ")
        if standing is not None and catalog.table.version >= REPLACE_VERSION:
            create = sql.SQL("CREATE OR REPLACE TRIGGER ")
        elif standing is not None:
            yield drop_trigger_sql(standing)
        arguments = (fence.message, fence.through, catalog.table.qualified, fence.until)
        yield create + sql.SQL("{} {} EXECUTE FUNCTION {}({})").format(
            sql.Identifier(name),
            _EVENTS[name].format(part.identifier),
            sql.Identifier(schema, FUNCTION),
            sql.SQL(", ").join(map(sql.Literal, arguments)),
        )
    if standing is None or not whole or standing.enabled != "A":
        yield sql.SQL("ALTER TABLE {} ENABLE ALWAYS TRIGGER {}").format(part.identifier, sql.Identifier(name))


def disable_statements(catalog: Catalog) -> Iterator[sql.Composable]:
    """Yield the statements after which the fence refuses nobody; they wait for writers only."""
    for one in catalog.ours:
        if one.enabled != "D":
            yield sql.SQL("ALTER TABLE {} DISABLE TRIGGER {}").format(one.part.identifier, sql.Identifier(one.name))


def drop_trigger_sql(trigger: Trigger) -> sql.Composable:
    """Return DROP TRIGGER for one trigger."""
    return sql.SQL("DROP TRIGGER {} ON {}").format(sql.Identifier(trigger.name), trigger.part.identifier)


def drop_statements(catalog: Catalog, *, by_owner: bool = False) -> Iterator[sql.Composable]:
    """Yield the statements that leave nothing of the fence: the function goes with its last trigger.

    One of another role stays, unless it is the owner who will run them.
    """
    yield from (drop_trigger_sql(one) for one in catalog.ours)
    for function in catalog.functions:
        dropped = sum(one.function_schema == function.schema for one in catalog.ours)
        if function.ours and function.used == dropped and (function.owned or by_owner):
            yield sql.SQL("DROP FUNCTION {}()").format(sql.Identifier(function.schema, FUNCTION))
