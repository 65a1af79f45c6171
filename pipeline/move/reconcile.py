"""Rows by key: read as they are now on the source, upserted on the target, deleted where gone.

Idempotent, independent of order, and indifferent to what kind of change made a key known.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg2 import sql

from pipeline.check.changes import Key
from pipeline.check.digests import hash_sql
from pipeline.check.pair import Pair
from pipeline.ledger import leases, runs
from pipeline.move.lease import Lease
from pipeline.move.relay import insert_sql, relay
from pipeline.postgres.database import Cursor, Session
from pipeline.postgres.tables import Table

STAGE = sql.Identifier("pg_temp", "pipeline_stage")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a batch did to the target: rows added, rows written over, rows deleted."""

    inserted: int
    updated: int
    deleted: int

    @property
    def written(self) -> int:
        """Return how many rows were touched at all."""
        return self.inserted + self.updated + self.deleted


def reconcile(
    source: Session,
    target: Session,
    pair: Pair,
    keys: Sequence[Key],
    lease: Lease,
) -> Outcome:
    """Make the target's rows of these keys equal to the source's, in one transaction on the target."""
    with target.transaction(then=lease.guard) as cursor:
        leases.check_guard(cursor)
        create_stage(cursor, pair.target, pair.columns)
        query = _select_keys_sql(pair.source, pair.columns, keys)
        relay(source, query, target, cursor, insert_sql(STAGE, pair.columns))
        inserted, updated = upsert_from_stage(cursor, pair.target, pair.columns)
        cursor.execute(_delete_sql(pair.target, keys))
        deleted = cursor.rowcount
        runs.add_reconciled(cursor, lease.run_id, inserted - deleted)
    return Outcome(inserted=inserted, updated=updated, deleted=deleted)


def create_stage(cursor: Cursor, table: Table, columns: Sequence[str]) -> None:
    """Create the temporary table that takes rows of ``columns``, gone with the transaction."""
    cursor.execute(
        sql.SQL("CREATE TEMPORARY TABLE pipeline_stage ON COMMIT DROP AS SELECT {} FROM ONLY {} WITH NO DATA").format(
            _names(columns), table.identifier
        )
    )


def upsert_from_stage(cursor: Cursor, table: Table, columns: Sequence[str]) -> tuple[int, int]:
    """Bring the staged rows into the table; return how many were inserted, and how many written over.

    A row that is equal already, byte for byte, is not written.
    """
    changed = [name for name in columns if name not in table.key]
    action = (
        sql.SQL("DO UPDATE SET {} WHERE {} <> {}").format(
            sql.SQL(", ").join(
                sql.SQL("{name} = EXCLUDED.{name}").format(name=sql.Identifier(name)) for name in changed
            ),
            hash_sql(table, columns, "t"),
            hash_sql(table, columns, "excluded"),
        )
        if changed
        else sql.SQL("DO NOTHING")
    )
    cursor.execute(
        sql.SQL(
            "WITH written AS (INSERT INTO {table} AS t ({columns}) OVERRIDING SYSTEM VALUE"
            " SELECT {columns} FROM {stage} ON CONFLICT ({key}) {action} RETURNING t.xmax)"
            " SELECT pg_catalog.count(*) FILTER (WHERE xmax = 0), pg_catalog.count(*) FROM written"
        ).format(table=table.identifier, columns=_names(columns), stage=STAGE, key=_names(table.key), action=action)
    )
    row = cursor.fetchone()
    assert row is not None
    return row[0], row[1] - row[0]


def _names(columns: Sequence[str]) -> sql.Composable:
    return sql.SQL(", ").join(map(sql.Identifier, columns))


def _keys_sql(table: Table, keys: Sequence[Key]) -> sql.Composable:
    """Return a row source ``k`` of the keys, typed as the table's columns (COPY takes no parameters)."""
    arrays = [
        sql.SQL("pg_catalog.unnest({}::{}[])").format(
            sql.Literal([key[place] for key in keys]), sql.SQL(_type_of(table, name))
        )
        for place, name in enumerate(table.key)
    ]
    return sql.SQL("ROWS FROM ({}) AS k ({})").format(sql.SQL(", ").join(arrays), _names(table.key))


def _type_of(table: Table, name: str) -> str:
    """Return the type as format_type wrote it: quoted and qualified by the server, so it is SQL."""
    column = table.column(name)
    assert column is not None
    return column.type


def _same_key_sql(table: Table, left: str, right: str) -> sql.Composable:
    return sql.SQL(" AND ").join(
        sql.SQL("{} = {}").format(sql.Identifier(left, name), sql.Identifier(right, name)) for name in table.key
    )


def _select_keys_sql(table: Table, columns: Sequence[str], keys: Sequence[Key]) -> sql.Composable:
    return sql.SQL("COPY (SELECT {} FROM ONLY {} AS t JOIN {} ON {}) TO STDOUT (FORMAT binary)").format(
        sql.SQL(", ").join(sql.Identifier("t", name) for name in columns),
        table.identifier,
        _keys_sql(table, keys),
        _same_key_sql(table, "t", "k"),
    )


def _delete_sql(table: Table, keys: Sequence[Key]) -> sql.Composable:
    return sql.SQL("DELETE FROM ONLY {} AS t USING {} WHERE {} AND NOT EXISTS (SELECT 1 FROM {} AS s WHERE {})").format(
        table.identifier, _keys_sql(table, keys), _same_key_sql(table, "t", "k"), STAGE, _same_key_sql(table, "s", "t")
    )
