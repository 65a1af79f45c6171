"""Rows by key: read as they are now on the source, upserted on the target, deleted where gone.

Idempotent, independent of order, and indifferent to what kind of change made a key known.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg2 import sql

from pipeline.check.existing import conflict
from pipeline.check.pair import Pair
from pipeline.check.preflight import EXAMPLES
from pipeline.failpoints import failpoint
from pipeline.ledger import leases, runs
from pipeline.ledger.marks import untouched_sql, written_sql
from pipeline.move.lease import Lease
from pipeline.move.relay import insert_sql, relay
from pipeline.options import OnConflict
from pipeline.postgres.database import Cursor, Session
from pipeline.postgres.tables import Table
from pipeline.postgres.values import (
    Key,
    form_sql,
    key_text_sql,
    key_texts_sql,
    keys_sql,
    rows_of_keys_sql,
    same_key_sql,
    value_sql,
)

# Keys of rows that stay different that are named; all are counted.
LISTED_KEYS = 20
STAGE = sql.Identifier("pg_temp", "pipeline_stage")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What becomes of the target's rows that somebody else wrote.

    ``on_conflict``: of one whose key the source has with other content. ``equal_at`` is a horizon of the
    target at which both sides were equal (None: not known): a row that nobody has touched since may be
    written over, whoever wrote it, and with ``delete_equal`` it goes where the source has it no more.
    ``delete``: rows whose key the source has not go, also where no run brought them. With ``told`` the rows
    that stay different are counted.
    """

    on_conflict: OnConflict
    equal_at: int | None = None
    delete: bool = False
    delete_equal: bool = False
    told: bool = False

    def gone_sql(self, run_id: int, alias: str) -> sql.Composable:
        """Return that a row of the target goes where the source has it not."""
        if self.delete:
            return sql.SQL("true")
        return self.ours_sql(run_id, alias) if self.delete_equal else written_sql(run_id, alias)

    def ours_sql(self, run_id: int, alias: str) -> sql.Composable:
        """Return that a row of the target may be written over: the run's, or nobody's since both sides were equal."""
        ours = written_sql(run_id, alias)
        if self.equal_at is None:
            return ours
        return sql.SQL("({} OR {})").format(ours, untouched_sql(self.equal_at, alias))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a batch did to the target: rows added, rows written over, rows deleted.

    ``found`` are the rows of these keys that the source has, and that can be carried. Where the policy wants
    them told: ``kept`` are rows that stay different, ``foreign`` those that only the target has, and ``left``
    the first keys of both, each with its kind.
    """

    inserted: int = 0
    updated: int = 0
    deleted: int = 0
    found: int = 0
    kept: int = 0
    foreign: int = 0
    left: tuple[tuple[str, Key], ...] = ()

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
            kept=self.kept + other.kept,
            foreign=self.foreign + other.foreign,
            left=(self.left + other.left)[:LISTED_KEYS],
        )


def reconcile(
    source: Session, target: Session, pair: Pair, keys: Sequence[Key], lease: Lease, policy: Policy
) -> Outcome:
    """Make the target's rows of these keys equal to the source's, in one transaction on the target.

    Rows that another than the run wrote go by the policy. Raises RefusedError with those that stand in the
    way of one that refuses.
    """
    with target.transaction(then=lease.guard) as cursor:
        leases.check_guard(cursor)
        create_stage(cursor, pair.target, pair.columns)
        query = _select_keys_sql(pair.source, pair.columns, keys)
        staged = relay(source, query, target, cursor, insert_sql(STAGE, pair.columns))
        inserted, updated = upsert_from_stage(cursor, pair, target.label, lease.run_id, policy)
        cursor.execute(_delete_sql(pair.target, keys, lease.run_id, policy))
        ((deleted, ours),) = cursor.fetchall()
        runs.add_reconciled(cursor, lease.run_id, inserted - ours)
        # With every key staged and every staged row written, nothing else of these keys is there.
        whole = staged.rows == inserted + updated == len(keys)
        kept, foreign, left = _left(cursor, pair, keys) if policy.told and not whole else (0, 0, ())
        failpoint("in_reconcile")
    return Outcome(
        inserted=inserted,
        updated=updated,
        deleted=deleted,
        found=staged.rows,
        kept=kept,
        foreign=foreign,
        left=left,
    )


def _left(cursor: Cursor, pair: Pair, keys: Sequence[Key]) -> tuple[int, int, tuple[tuple[str, Key], ...]]:
    """Return how many rows of these keys stay different, how many only the target has, and the first of both."""
    table = pair.target
    cursor.execute(
        sql.SQL(
            "SELECT NOT EXISTS (SELECT 1 FROM {stage} AS s WHERE {staged}), {key} FROM {rows}"
            " WHERE NOT EXISTS (SELECT 1 FROM {stage} AS s WHERE {staged} AND NOT ({differs}))"
        ).format(
            stage=STAGE,
            staged=same_key_sql(table, "s", "t"),
            key=key_texts_sql(table, "t"),
            rows=rows_of_keys_sql(table, keys),
            differs=_differs_sql(table, pair.columns, "t", "s"),
        )
    )
    found = [(only_there, tuple(key)) for only_there, *key in cursor.fetchall()]
    foreign = sum(only_there for only_there, _ in found)
    left = tuple(("extra" if only_there else "different", key) for only_there, key in sorted(found)[:LISTED_KEYS])
    return len(found) - foreign, foreign, left


def create_stage(cursor: Cursor, table: Table, columns: Sequence[str]) -> None:
    """Create the temporary table that takes rows of ``columns``, gone with the transaction."""
    cursor.execute(
        sql.SQL("CREATE TEMPORARY TABLE pipeline_stage ON COMMIT DROP AS SELECT {} FROM ONLY {} WITH NO DATA").format(
            _names(columns), table.identifier
        )
    )


def upsert_from_stage(cursor: Cursor, pair: Pair, label: str, run_id: int, policy: Policy) -> tuple[int, int]:
    """Bring the staged rows into the table; return how many were inserted, and how many written over.

    A row that is equal already, byte for byte, is not written. The policy says what becomes of one that is
    not, and that the run did not write. Raises RefusedError where it refuses, naming them.
    """
    table, columns = pair.target, pair.columns
    changed = [name for name in columns if name not in table.key]
    differs = sql.SQL("({})").format(_differs_sql(table, columns, "t", "excluded"))
    if policy.on_conflict != "overwrite":
        differs += sql.SQL(" AND ") + policy.ours_sql(run_id, "t")
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
    if written < staged and policy.on_conflict == "refuse":
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
            " FROM {rows} JOIN {stage} AS s ON {same} WHERE ({differs}) AND NOT {written}) q"
        ).format(
            limit=sql.Literal(EXAMPLES),
            key=key_text_sql(table, "t"),
            rows=table.rows_sql("t"),
            stage=STAGE,
            same=same_key_sql(table, "t", "s"),
            differs=_differs_sql(table, pair.columns, "t", "s"),
            written=written_sql(run_id, "t"),
        )
    )
    row = cursor.fetchone()
    if row is not None and row[0]:
        raise conflict(f"{label}'s {table.qualified}", row[0], tuple(row[1]))


def _differs_sql(table: Table, columns: Sequence[str], left: str, right: str) -> sql.Composable:
    """Return that two rows of a table differ in a byte: column by column, the largest, the vectors, last."""
    ordered = sorted(
        (name for name in columns if name not in table.key),
        key=lambda name: (column := table.column(name)) is not None and column.is_vector,
    )
    parts = (
        sql.SQL("{} IS DISTINCT FROM {}").format(form_sql(table, name, left), form_sql(table, name, right))
        for name in ordered
    )
    return sql.SQL(" OR ").join([*parts, sql.SQL("false")])


def _names(columns: Sequence[str]) -> sql.Composable:
    return sql.SQL(", ").join(map(sql.Identifier, columns))


def _select_keys_sql(table: Table, columns: Sequence[str], keys: Sequence[Key]) -> sql.Composable:
    return sql.SQL("COPY (SELECT {} FROM {}) TO STDOUT (FORMAT binary)").format(
        sql.SQL(", ").join(value_sql(table, name, "t") for name in columns), rows_of_keys_sql(table, keys)
    )


def _delete_sql(table: Table, keys: Sequence[Key], run_id: int, policy: Policy) -> sql.Composable:
    """Return DELETE of the rows of these keys that are not staged, by the policy; it counts all, and the run's."""
    return sql.SQL(
        "WITH gone AS (DELETE FROM {rows} USING {keys} WHERE {same} AND {which}"
        " AND NOT EXISTS (SELECT 1 FROM {stage} AS s WHERE {staged}) RETURNING {ours} AS ours)"
        " SELECT pg_catalog.count(*), pg_catalog.count(*) FILTER (WHERE ours) FROM gone"
    ).format(
        rows=table.rows_sql("t"),
        keys=keys_sql(table, keys),
        same=same_key_sql(table, "t", "k"),
        which=policy.gone_sql(run_id, "t"),
        stage=STAGE,
        staged=same_key_sql(table, "s", "t"),
        ours=written_sql(run_id, "t"),
    )


def keys_that(session: Session, table: Table, keys: Sequence[Key], condition: sql.Composable) -> set[Key]:
    """Return which of a table's rows ``t`` of these keys meet a condition."""
    query = sql.SQL("SELECT {} FROM {} WHERE {}").format(
        key_texts_sql(table, "t"), rows_of_keys_sql(table, keys), condition
    )
    return {tuple(row) for row in session.rows(query)}
