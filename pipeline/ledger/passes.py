"""Passes over both tables: how these stood at their horizons, and whether they were equal there."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipeline.postgres.database import Cursor
from pipeline.settings import TableMapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """A pass of a copy, a sync or a verify. The horizons are looks, as JSON.

    It found every row of the source on the target, equal; ``equal``: and the target had no other.
    """

    kind: str
    equal: bool
    source_horizon: Mapping[str, Any]
    target_horizon: Mapping[str, Any]
    at: datetime


def record_pass(
    cursor: Cursor,
    kind: str,
    run: int | None,
    labels: tuple[str, str],
    target: TableMapping,
    fingerprint: str,
    horizons: tuple[Mapping[str, Any], Mapping[str, Any]],
    *,
    covered: bool,
    equal: bool,
    figures: Mapping[str, Any],
) -> int:
    """Store a pass that has ended; return its id. ``covered``: every row of the source was on the target, equal."""
    cursor.execute(
        "INSERT INTO pipeline.pass (kind, run_id, source_label, target_label, target_schema, target_table, fingerprint,"
        " covered, equal, source_horizon, target_horizon, figures)"
        " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
        " RETURNING id",
        (
            kind,
            run,
            *labels,
            target.schema,
            target.table,
            fingerprint,
            covered,
            equal,
            *(json.dumps(dict(horizon)) for horizon in horizons),
            json.dumps(dict(figures)),
        ),
    )
    row = cursor.fetchone()
    assert row is not None
    return int(row[0])


def latest_pass(cursor: Cursor, target: TableMapping, fingerprint: str, *, verified: bool = False) -> Pass | None:
    """Return the last pass over these tables and columns that found every row equal, if there is one.

    What differed later was written later than its horizons say, so nothing before has to be looked at again.
    With ``verified`` it is one that compared the rows, those that a copy or a sync brought too, and the
    target had no other.
    """
    cursor.execute(
        "SELECT kind, equal, source_horizon, target_horizon, at FROM pipeline.pass"
        " WHERE target_schema = %s AND target_table = %s AND fingerprint = %s AND covered"
        " AND (NOT %s OR equal AND kind IN ('verify', 'incremental')) ORDER BY id DESC LIMIT 1",
        (target.schema, target.table, fingerprint, verified),
    )
    row = cursor.fetchone()
    if row is None:
        return None
    kind, equal, source_horizon, target_horizon, at = row
    return Pass(kind=kind, equal=equal, source_horizon=source_horizon, target_horizon=target_horizon, at=at)
