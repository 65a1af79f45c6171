"""The verdicts of verify, each with the horizons that it speaks of."""

import json

from pipeline.events import CheckDone
from pipeline.postgres.database import Cursor
from pipeline.postgres.tables import Table
from pipeline.settings import TableMapping


def record_verdict(
    cursor: Cursor,
    result: CheckDone,
    target: Table,
    labels: tuple[str, str],
    horizons: tuple[int, int],
    number: int | None,
) -> None:
    """Store a check's verdict with the horizons that it speaks of, and the pass that it was given in."""
    cursor.execute(
        "INSERT INTO pipeline.verdict (run_id, source_label, target_label, target_schema, target_table,"
        " check_name, verdict, figures, source_horizon, target_horizon, pass_id)"
        " VALUES ((SELECT pg_catalog.max(id) FROM pipeline.run WHERE target_schema = %s AND target_table = %s),"
        " %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
        (
            target.schema,
            target.name,
            *labels,
            target.schema,
            target.name,
            result.name,
            result.verdict,
            json.dumps({"summary": result.summary, "seconds": round(result.seconds, 3), **result.figures}),
            *horizons,
            number,
        ),
    )


def latest_verdicts(cursor: Cursor, target: TableMapping, labels: tuple[str, str]) -> dict[str, tuple[str, str]]:
    """Return the last verdict of every check between these two databases, with its summary."""
    cursor.execute(
        "SELECT DISTINCT ON (check_name) check_name, verdict, coalesce(figures ->> 'summary', '')"
        " FROM pipeline.verdict WHERE target_schema = %s AND target_table = %s AND source_label = %s"
        " AND target_label = %s ORDER BY check_name, at DESC",
        (target.schema, target.table, *labels),
    )
    return {name: (verdict, summary) for name, verdict, summary in cursor.fetchall()}
