"""What acts on rows that come into the target's table, and could make others of them: triggers and rules."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from pipeline.check.preflight import Finding, Severity
from pipeline.postgres.database import Cursor
from pipeline.postgres.fence_sql import ROW_TRIGGER, STATEMENT_TRIGGER
from pipeline.postgres.tables import Table

# Bits of pg_trigger.tgtype.
_ROW, _INSERT = 1, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Trigger:
    """A trigger that would fire for us. ``quoted`` is its name as a person types it."""

    name: str
    quoted: str
    each_row: bool
    on_insert: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A rule that would rewrite what we write. ``quoted`` is its name as a person types it."""

    name: str
    quoted: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """What acts on rows that come in; ``logged`` says that a crash of the server leaves them there.

    A fence of our own is not among it: it lets us through, or says itself why not.
    """

    triggers: tuple[Trigger, ...]
    rules: tuple[Rule, ...]
    logged: bool

    @classmethod
    def found(cls, rows: Sequence[Sequence[Any]]) -> Self:
        """Make it of the rows of ATTACHED_SQL."""
        return cls(
            triggers=tuple(
                Trigger(name=name, quoted=quoted, each_row=bool(bits & _ROW), on_insert=bool(bits & _INSERT))
                for kind, name, quoted, bits in rows
                if kind == "trigger" and name not in (STATEMENT_TRIGGER, ROW_TRIGGER)
            ),
            rules=tuple(Rule(name=name, quoted=quoted) for kind, name, quoted, _ in rows if kind == "rule"),
            logged=not any(kind == "unlogged" for kind, *_ in rows),
        )


# A role or a database set to session_replication_role = replica fires others than usual.
ATTACHED_SQL = """
WITH mode AS (SELECT CASE WHEN pg_catalog.current_setting('session_replication_role') = 'replica'
                          THEN ARRAY['R', 'A'] ELSE ARRAY['O', 'A'] END AS enabled)
SELECT 'trigger', tgname, pg_catalog.quote_ident(tgname), tgtype::pg_catalog.int4
FROM pg_catalog.pg_trigger, mode
WHERE tgrelid = %(oid)s AND NOT tgisinternal AND tgenabled::pg_catalog.text = ANY (enabled)
UNION ALL
SELECT 'rule', rulename, pg_catalog.quote_ident(rulename), 0 FROM pg_catalog.pg_rewrite, mode
WHERE ev_class = %(oid)s AND ev_type <> '1' AND ev_enabled::pg_catalog.text = ANY (enabled)
UNION ALL
SELECT 'unlogged', relname, '', 0 FROM pg_catalog.pg_class WHERE oid = %(oid)s AND relpersistence <> 'p'
ORDER BY 1, 2
"""


def read_attached(cursor: Cursor, table: Table) -> Attached:
    """Read what acts on rows that come in, by one query."""
    cursor.execute(ATTACHED_SQL, {"oid": table.oid})
    return Attached.found(cursor.fetchall())


def check_attached(table: Table, attached: Attached, name: str) -> tuple[Finding, ...]:
    """Judge what acts on rows that come in; no query."""
    found = [*_check_triggers(table, attached.triggers, name)]
    found += [
        _finding(
            "refuse",
            f"{name}'s rule {rule.name} rewrites what is written to {table.qualified}",
            f"on {name}: ALTER TABLE {table.quoted} DISABLE RULE {rule.quoted}, and ENABLE it after the copy",
        )
        for rule in attached.rules
    ]
    if not attached.logged:
        found.append(
            _finding(
                "refuse",
                f"{name}'s {table.qualified} is UNLOGGED: a crash of its server empties it, whatever was copied",
                f"on {name}: ALTER TABLE {table.quoted} SET LOGGED",
            )
        )
    return tuple(found)


def _finding(severity: Severity, fact: str, hint: str = "") -> Finding:
    return Finding(severity=severity, fact=fact, hint=hint)


def _check_triggers(table: Table, triggers: tuple[Trigger, ...], name: str) -> list[Finding]:
    """Judge by what the copy does: it inserts every row, and may update and delete those that change meanwhile."""
    return [
        _finding(
            "refuse" if trigger.on_insert and trigger.each_row else "warn",
            f"{name}'s trigger {trigger.name} would fire for every row that comes in"
            if trigger.on_insert and trigger.each_row
            else f"{name}'s trigger {trigger.name} fires for every statement that brings rows"
            if trigger.on_insert
            else f"{name}'s trigger {trigger.name} fires where the copy writes over a row, or takes one out",
            f"on {name}: ALTER TABLE {table.quoted} DISABLE TRIGGER {trigger.quoted}, and ENABLE it after the copy",
        )
        for trigger in triggers
    ]
