"""Baselines: queries with the exact answers that the source gave once, kept to compare later searches with."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from math import isfinite

from psycopg2.extras import execute_values

from pipeline.postgres.database import Cursor
from pipeline.settings import TableMapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """One query by one metric, and what was found: (key, distance), nearest first, ``k`` at most.

    ``vector`` is its text form. Of a stored vector (origin ``stored``) ``key`` is its row's; of an embedded
    one (origin ``text``) it is None, and ``text`` what was embedded.
    """

    metric: str
    k: int
    vector: str
    answers: tuple[tuple[str, float], ...]
    origin: str
    key: str | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """The queries of one capture, in its order, and when it was."""

    captured_at: datetime
    source_label: str
    queries: tuple[Frozen, ...]


def add_baseline(cursor: Cursor, source_label: str, target: TableMapping, queries: Sequence[Frozen]) -> datetime:
    """Store a capture, and return its moment, which is that of its transaction; earlier ones stay."""
    execute_values(
        cursor,
        "INSERT INTO pipeline.baseline (captured_at, source_label, metric, k, query, answers, target_schema,"
        " target_table, origin, key, text) VALUES %s",
        [
            (
                source_label,
                one.metric,
                one.k,
                one.vector,
                # An infinite distance is no number of JSON: it is kept as a text.
                json.dumps([[key, distance if isfinite(distance) else str(distance)] for key, distance in one.answers]),
                target.schema,
                target.table,
                one.origin,
                one.key,
                one.text,
            )
            for one in queries
        ],
        template="(pg_catalog.now(), %s, %s, %s, %s, %s::pg_catalog.jsonb, %s, %s, %s, %s, %s)",
    )
    cursor.execute("SELECT pg_catalog.now()")
    row = cursor.fetchone()
    assert row is not None
    at: datetime = row[0]
    return at


def latest_baseline(cursor: Cursor, target: TableMapping) -> Baseline | None:
    """Return the newest capture for a table, or None where there is none."""
    cursor.execute(
        "SELECT captured_at, source_label, metric, k, query, answers, origin, key, text FROM pipeline.baseline"
        " WHERE target_schema = %(schema)s AND target_table = %(table)s AND captured_at = (SELECT"
        " pg_catalog.max(captured_at) FROM pipeline.baseline"
        " WHERE target_schema = %(schema)s AND target_table = %(table)s) ORDER BY id",
        {"schema": target.schema, "table": target.table},
    )
    rows = cursor.fetchall()
    if not rows:
        return None
    return Baseline(
        captured_at=rows[0][0],
        source_label=rows[0][1],
        queries=tuple(
            Frozen(
                metric=metric,
                k=k,
                vector=vector,
                answers=tuple((row_key, float(distance)) for row_key, distance in answers),
                origin=origin,
                key=key,
                text=text,
            )
            for _, _, metric, k, vector, answers, origin, key, text in rows
        ),
    )
