"""A comparison that was interrupted: which slices of both sides are summed up, and the sums."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.ledger.marks import read_bound, written_bound
from pipeline.postgres.database import Cursor
from pipeline.postgres.slices import Slice
from pipeline.settings import TableMapping


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedSide:
    """One side: how its table stood before it was read, its slices, those that are done, and their sums."""

    horizon: Mapping[str, Any]
    slices: tuple[Slice, ...]
    done: tuple[int, ...]
    buckets: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A comparison as the ledger has it."""

    id: int
    source: SavedSide
    target: SavedSide


def save_comparison(
    cursor: Cursor,
    saved: int | None,
    labels: tuple[str, str],
    target: TableMapping,
    fingerprint: str,
    sides: tuple[SavedSide, SavedSide],
) -> int:
    """Write a comparison down, or how far it has come since (``saved`` is its id then); return its id."""
    progress = [value for side in sides for value in (list(side.done), side.buckets)]
    if saved is not None:
        cursor.execute(
            "UPDATE pipeline.comparison SET source_done = %s::pg_catalog.int4[], source_buckets = %s,"
            " target_done = %s::pg_catalog.int4[], target_buckets = %s, at = pg_catalog.clock_timestamp()"
            " WHERE id = %s",
            (*progress, saved),
        )
        return saved
    cursor.execute(
        "INSERT INTO pipeline.comparison (source_done, source_buckets, target_done, target_buckets, source_label,"
        " target_label, target_schema, target_table, fingerprint, source_horizon, target_horizon, source_slices,"
        " target_slices) VALUES (%s::pg_catalog.int4[], %s, %s::pg_catalog.int4[], %s, %s, %s, %s, %s, %s, %s, %s, %s,"
        " %s) RETURNING id",
        (
            *progress,
            *labels,
            target.schema,
            target.table,
            fingerprint,
            *(json.dumps(dict(side.horizon)) for side in sides),
            *(_written_slices(side.slices) for side in sides),
        ),
    )
    row = cursor.fetchone()
    assert row is not None
    return int(row[0])


def read_comparison(cursor: Cursor, target: TableMapping, fingerprint: str) -> Saved | None:
    """Return the newest comparison of these tables that was not ended, if there is one."""
    cursor.execute(
        "SELECT id, source_horizon, source_slices, source_done, source_buckets,"
        " target_horizon, target_slices, target_done, target_buckets FROM pipeline.comparison"
        " WHERE target_schema = %s AND target_table = %s AND fingerprint = %s ORDER BY id DESC LIMIT 1",
        (target.schema, target.table, fingerprint),
    )
    row = cursor.fetchone()
    if row is None:
        return None
    number, *found = row
    return Saved(id=number, source=_side(found[:4]), target=_side(found[4:]))


def forget_comparisons(cursor: Cursor, target: TableMapping) -> None:
    """Forget every comparison of a table: one has ended, or is begun anew."""
    cursor.execute(
        "DELETE FROM pipeline.comparison WHERE target_schema = %s AND target_table = %s", (target.schema, target.table)
    )


def _side(found: Sequence[Any]) -> SavedSide:
    horizon, slices, done, buckets = found
    return SavedSide(
        horizon=horizon,
        slices=tuple(_read_slice(part) for part in slices),
        done=tuple(done),
        buckets=b"" if buckets is None else bytes(buckets),
    )


def _written_slices(slices: Sequence[Slice]) -> str:
    return json.dumps(
        [
            [part.ordinal, part.kind, part.relation, written_bound(part.lower), written_bound(part.upper)]
            for part in slices
        ]
    )


def _read_slice(found: Sequence[Any]) -> Slice:
    ordinal, kind, relation, lower, upper = found
    return Slice(
        ordinal=ordinal,
        kind=kind,
        relation=None if relation is None else tuple(relation),
        lower=read_bound(lower),
        upper=read_bound(upper),
    )
