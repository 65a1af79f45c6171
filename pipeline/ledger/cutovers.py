"""Cutovers and their steps: intended before anything is done, and what was seen after it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Literal

from psycopg2 import sql

from pipeline.errors import BusyError
from pipeline.postgres.database import Cursor
from pipeline.settings import TableMapping

Kind = Literal["cutover", "rehearsal"]
Outcome = Literal["rehearsed", "rolled back", "finalized"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutover:
    """One cutover, or the rehearsal of one.

    ``opened`` is when main was opened to the application: its rows may be newer than legacy's since then.
    ``back`` is when the way back began. ``options`` hold no value of a setting.
    """

    id: int
    kind: str
    source_label: str
    target_label: str
    options: Mapping[str, Any]
    began: datetime
    opened: datetime | None
    back: datetime | None
    ended: datetime | None
    outcome: str | None

    @property
    def through(self) -> str:
        """Return what a transaction of this cutover passes its fences with."""
        return f"cutover-{self.id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """A step as the ledger has it. ``evidence`` is plain JSON."""

    name: str
    intent: datetime
    done: datetime | None
    undone: datetime | None
    evidence: Mapping[str, Any]

    @property
    def stands(self) -> bool:
        """Return whether the step was done, and not undone since."""
        return self.done is not None and self.undone is None


_COLUMNS = sql.SQL("id, kind, source_label, target_label, options, began_at, opened_at, back_at, ended_at, outcome")


def latest_cutover(cursor: Cursor, target: TableMapping, kind: Kind | None = None) -> Cutover | None:
    """Return the cutover that has not ended, else the last one; None where there was none."""
    cursor.execute(
        sql.SQL(
            "SELECT {} FROM pipeline.cutover WHERE target_schema = %s AND target_table = %s"
            " AND (%s::pg_catalog.text IS NULL OR kind = %s) ORDER BY ended_at IS NULL DESC, id DESC LIMIT 1"
        ).format(_COLUMNS),
        (target.schema, target.table, kind, kind),
    )
    row = cursor.fetchone()
    return None if row is None else _cutover(row)


def create_cutover(
    cursor: Cursor, kind: Kind, labels: tuple[str, str], target: TableMapping, options: Mapping[str, Any]
) -> Cutover:
    """Record that a cutover begins. Raises BusyError where another one has not ended."""
    cursor.execute(
        sql.SQL(
            "INSERT INTO pipeline.cutover (kind, source_label, target_label, target_schema, target_table, options)"
            " VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING RETURNING {}"
        ).format(_COLUMNS),
        (kind, *labels, target.schema, target.table, json.dumps(dict(options))),
    )
    row = cursor.fetchone()
    if row is None:
        raise BusyError(f"another cutover of {target.qualified} began at this moment", "pipeline status shows it")
    return _cutover(row)


def _cutover(row: Sequence[Any]) -> Cutover:
    return Cutover(**dict(zip((field.name for field in fields(Cutover)), row, strict=True)))


def mark_opened(cursor: Cursor, cutover: int) -> None:
    """Record that main is about to be opened to others than the pipeline; the first time counts."""
    cursor.execute(
        "UPDATE pipeline.cutover SET opened_at = coalesce(opened_at, pg_catalog.clock_timestamp()) WHERE id = %s",
        (cutover,),
    )


def mark_back(cursor: Cursor, cutover: int) -> None:
    """Record that the way back begins: the cutover cannot be gone on with any more."""
    cursor.execute(
        "UPDATE pipeline.cutover SET back_at = coalesce(back_at, pg_catalog.clock_timestamp()) WHERE id = %s",
        (cutover,),
    )


def mark_ended(cursor: Cursor, cutover: int, outcome: Outcome) -> None:
    """Record how a cutover ended."""
    cursor.execute(
        "UPDATE pipeline.cutover SET ended_at = pg_catalog.clock_timestamp(), outcome = %s"
        " WHERE id = %s AND ended_at IS NULL",
        (outcome, cutover),
    )


def read_steps(cursor: Cursor, cutover: int) -> dict[str, StepRecord]:
    """Return the steps of a cutover by their names, in the order of their beginnings."""
    cursor.execute(
        "SELECT name, intent_at, done_at, undone_at, evidence FROM pipeline.step WHERE cutover_id = %s"
        " ORDER BY intent_at, id",
        (cutover,),
    )
    return {
        name: StepRecord(name=name, intent=intent, done=done, undone=undone, evidence=evidence)
        for name, intent, done, undone, evidence in cursor.fetchall()
    }


def read_evidence(cursor: Cursor, target: TableMapping, name: str) -> list[Mapping[str, Any]]:
    """Return what was seen in a step in every cutover and rehearsal of a table, the last one first."""
    cursor.execute(
        "SELECT s.evidence FROM pipeline.step s JOIN pipeline.cutover c ON c.id = s.cutover_id"
        " WHERE c.target_schema = %s AND c.target_table = %s AND s.name = %s ORDER BY c.id DESC",
        (target.schema, target.table, name),
    )
    return [evidence for (evidence,) in cursor.fetchall()]


def intend_step(cursor: Cursor, cutover: int, name: str, intended: Mapping[str, Any]) -> None:
    """Record that a step is about to be done, with what it is about to touch; what was seen before stays beside it."""
    cursor.execute(
        "INSERT INTO pipeline.step AS s (cutover_id, name, evidence) VALUES (%s, %s, %s)"
        " ON CONFLICT (cutover_id, name) DO UPDATE SET intent_at = pg_catalog.clock_timestamp(), done_at = NULL,"
        " undone_at = NULL, evidence = s.evidence OPERATOR(pg_catalog.||) excluded.evidence",
        (cutover, name, json.dumps(dict(intended))),
    )


def finish_step(cursor: Cursor, cutover: int, name: str, evidence: Mapping[str, Any]) -> None:
    """Record that a step is done, and what was seen."""
    cursor.execute(
        "UPDATE pipeline.step SET done_at = pg_catalog.clock_timestamp(), undone_at = NULL,"
        " evidence = evidence OPERATOR(pg_catalog.||) %s::pg_catalog.jsonb WHERE cutover_id = %s AND name = %s",
        (json.dumps(dict(evidence)), cutover, name),
    )


def undo_steps(cursor: Cursor, cutover: int, names: Sequence[str]) -> None:
    """Record that what these steps had done does not stand any more."""
    cursor.execute(
        "UPDATE pipeline.step SET undone_at = pg_catalog.clock_timestamp() WHERE cutover_id = %s AND name = ANY (%s)"
        " AND undone_at IS NULL",
        (cutover, list(names)),
    )


# A verify of the rows, all or those that were touched, and the copy's load tell of steps that were never done.
_GUESS_SQL = """
SELECT (SELECT (v.figures ->> 'seconds')::pg_catalog.float8 FROM pipeline.verdict v
        WHERE v.target_schema = %(schema)s AND v.target_table = %(table)s AND v.check_name = 'digests'
          AND v.verdict = 'pass' AND pg_catalog.jsonb_exists(v.figures, 'renews') <> %(deep)s
        ORDER BY v.at DESC LIMIT 1)
"""


def step_seconds(cursor: Cursor, target: TableMapping, *, deep: bool) -> dict[str, float]:
    """Return how long each step took the last time that it was done, in a cutover or a rehearsal of this table.

    Where there was none, the last verify of the rows stands for the steps that consist of one.
    """
    cursor.execute(_GUESS_SQL, {"schema": target.schema, "table": target.table, "deep": deep})
    ((compared,),) = cursor.fetchall()
    guessed = {} if compared is None else {"prove": float(compared)}
    cursor.execute(
        "SELECT DISTINCT ON (s.name) s.name, (s.evidence ->> 'seconds')::pg_catalog.float8 FROM pipeline.step s"
        " JOIN pipeline.cutover c ON c.id = s.cutover_id WHERE c.target_schema = %s AND c.target_table = %s"
        " AND s.done_at IS NOT NULL AND pg_catalog.jsonb_exists(s.evidence, 'seconds') ORDER BY s.name, s.done_at DESC",
        (target.schema, target.table),
    )
    return guessed | dict(cursor.fetchall())
