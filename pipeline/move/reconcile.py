"""Rows by key: read as they are now on the source, upserted on the target, deleted where gone.

Idempotent, independent of order, and indifferent to what kind of change made a key known.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg2 import sql

from pipeline.check.digests import hash_sql
from pipeline.check.existing import conflict
from pipeline.check.pair import Pair
from pipeline.check.preflight import EXAMPLES
from pipeline.failpoints import failpoint
from pipeline.ledger import leases, runs
from pipeline.ledger.marks import written_sql
from pipeline.move.lease import Lease
from pipeline.move.relay import insert_sql, relay
from pipeline.options import OnConflict
from pipeline.postgres.database import Cursor, Session
from pipeline.postgres.tables import Table
from pipeline.postgres.values import Key, key_text_sql, keys_sql, same_key_sql, value_sql

STAGE = sql.Identifier("pg_temp", "pipeline_stage")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a batch did to the target: rows added, rows written over, rows deleted.

    ``found`` are the rows of these keys that the source has, and that can be carried.
    """

    inserted: int = 0
    updated: int = 0
    deleted: int = 0
    found: int = 0

    @property
    def written(self) -> int:
        """Return how many rows were touched at all."""
        return self.inserted + self.updated + self.deleted

    def plus(self, other: "Outcome") -> "Outcome":
        """Return the sum of two."""
        return Outcome(
            inserted=self.inserted + other.inserted,
            updated=self.updated + other.updated,
            deleted=self.deleted + other.deleted,
            found=self.found + other.found,
        )


def reconcile(
    source: Session, target: Session, pair: Pair, keys: Sequence[Key], lease: Lease, on_conflict: OnConflict
) -> Outcome:
    """Make the target's rows of these keys equal to the source's, in one transaction on the target.

    Rows that another than the run wrote stay where the source has none of their key, and go by
    ``on_conflict`` where it has. Raises RefusedError with those that stand in the way.
    """
    with target.transaction(then=lease.guard) as cursor:
        leases.check_guard(cursor)
        create_stage(cursor, pair.target, pair.columns)
        query = _select_keys_sql(pair.source, pair.columns, keys)
        staged = relay(source, query, target, cursor, insert_sql(STAGE, pair.columns))
        inserted, updated = upsert_from_stage(cursor, pair, target.label, lease.run_id, on_conflict)
        cursor.execute(_delete_sql(pair.target, keys, lease.run_id))
        deleted = cursor.rowcount
        runs.add_reconciled(cursor, lease.run_id, inserted - deleted)
        failpoint("in_reconcile")
    return Outcome(inserted=inserted, updated=updated, deleted=deleted, found=staged.rows)


def create_stage(cursor: Cursor, table: Table, columns: Sequence[str]) -> None:
    """Create the temporary table that takes rows of ``columns``, gone with the transaction."""
    cursor.execute(
        sql.SQL("CREATE TEMPORARY TABLE pipeline_stage ON COMMIT DROP AS SELECT {} FROM ONLY {} WITH NO DATA").format(
            _names(columns), table.identifier
        )
    )


def upsert_from_stage(cursor: Cursor, pair: Pair, label: str, run_id: int, on_conflict: OnConflict) -> tuple[int, int]:
    """Bring the staged rows into the table; return how many were inserted, and how many written over.

    A row that is equal already, byte for byte, is not written. ``on_conflict`` says what becomes of one
    that is not, and that the run did not write. Raises RefusedError for ``refuse``, naming them.
    """
    table, columns = pair.target, pair.columns
    changed = [name for name in columns if name not in table.key]
    differs = sql.SQL("{} <> {}").format(hash_sql(table, columns, "t"), hash_sql(table, columns, "excluded"))
    if on_conflict != "overwrite":
        differs += sql.SQL(" AND ") + written_sql(run_id, "t")
    sets = sql.SQL(", ").join(sql.SQL("{0} = EXCLUDED.{0}").format(sql.Identifier(name)) for name in changed)
    action = sql.SQL("DO UPDATE SET {} WHERE {}").format(sets, differs) if changed else sql.SQL("DO NOTHING")
    cursor.execute(
        sql.SQL(
            "WITH written AS (INSERT INTO {table} AS t ({columns}) OVERRIDING SYSTEM VALUE"
            " SELECT {columns} FROM {stage} ON CONFLICT ({key}) {action} RETURNING t.xmax)"
            " SELECT pg_catalog.count(*) FILTER (WHERE xmax = 0), pg_catalog.count(*),"
            " (SELECT pg_catalog.count(*) FROM {stage}) FROM written"
        ).format(table=table.identifier, columns=_names(columns), stage=STAGE, key=_names(table.key), action=action)
    )
    row = cursor.fetchone()
    assert row is not None
    inserted, written, staged = row
    if written < staged and on_conflict == "refuse":
        _refuse_conflicts(cursor, pair, label, run_id)
    return inserted, written - inserted


def _refuse_conflicts(cursor: Cursor, pair: Pair, label: str, run_id: int) -> None:
    """Raise RefusedError where staged rows were not written, and what stands is neither equal nor the run's.

    A row of the run's can be among them: that of a slice which was committed while this one was staged.
    """
    table = pair.target
    cursor.execute(
        sql.SQL(
            "SELECT pg_catalog.count(*), (pg_catalog.array_agg(k ORDER BY k))[1:{limit}] FROM (SELECT {key} AS k"
            " FROM {rows} JOIN {stage} AS s ON {same} WHERE {mine} <> {staged} AND NOT {written}) q"
        ).format(
            limit=sql.Literal(EXAMPLES),
            key=key_text_sql(table, "t"),
            rows=table.rows_sql("t"),
            stage=STAGE,
            same=same_key_sql(table, "t", "s"),
            mine=hash_sql(table, pair.columns, "t"),
            staged=hash_sql(table, pair.columns, "s"),
            written=written_sql(run_id, "t"),
        )
    )
    row = cursor.fetchone()
    if row is not None and row[0]:
        raise conflict(f"{label}'s {table.qualified}", row[0], tuple(row[1]))


def _names(columns: Sequence[str]) -> sql.Composable:
    return sql.SQL(", ").join(map(sql.Identifier, columns))


def _select_keys_sql(table: Table, columns: Sequence[str], keys: Sequence[Key]) -> sql.Composable:
    return sql.SQL("COPY (SELECT {} FROM {} JOIN {} ON {}) TO STDOUT (FORMAT binary)").format(
        sql.SQL(", ").join(value_sql(table, name, "t") for name in columns),
        table.rows_sql("t"),
        keys_sql(table, keys),
        same_key_sql(table, "t", "k"),
    )


def _delete_sql(table: Table, keys: Sequence[Key], run_id: int) -> sql.Composable:
    return sql.SQL("DELETE FROM {} USING {} WHERE {} AND {} AND NOT EXISTS (SELECT 1 FROM {} AS s WHERE {})").format(
        table.rows_sql("t"),
        keys_sql(table, keys),
        same_key_sql(table, "t", "k"),
        written_sql(run_id, "t"),
        STAGE,
        same_key_sql(table, "s", "t"),
    )
