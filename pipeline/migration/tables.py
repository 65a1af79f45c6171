"""The ledger's tables as autogenerate compares them."""

from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from pipeline.migration import LEDGER_SCHEMA, UNDER_WAY, UNFINISHED

# The ledger as autogenerate compares it: no CHECK, no comment, no default. The revisions alone create it;
# a change of a table is a new revision and a change here.
LEDGER = sa.MetaData(schema=LEDGER_SCHEMA)
_TEXT, _BIG, _INTEGER = sa.Text(), sa.BigInteger(), sa.Integer()


def _column(name: str, kind: Any, null: bool = False) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=null)


def _columns(names: str, kind: Any, null: bool = False) -> Iterator[sa.Column[Any]]:
    return (_column(name, kind, null) for name in names.split())


def _moments(names: str, null: bool = True) -> Iterator[sa.Column[Any]]:
    return _columns(names, sa.DateTime(timezone=True), null)


def _identity() -> sa.Column[int]:
    return sa.Column("id", _BIG, sa.Identity(always=True), primary_key=True)


def _run_id(null: bool) -> sa.Column[int]:
    return sa.Column("run_id", _BIG, sa.ForeignKey("pipeline.run.id", ondelete="CASCADE"), nullable=null)


_RUN = sa.Table(
    "run",
    LEDGER,
    _identity(),
    *_columns("source_label target_label", _TEXT),
    _column("source_system", sa.Numeric(20)),
    *_columns("source_database source_schema source_table", _TEXT),
    _column("source_oid", _BIG),
    *_columns("target_schema target_table", _TEXT),
    _column("target_oid", _BIG),
    *_columns("column_names column_types key_columns", ARRAY(_TEXT)),
    _column("slice_bytes", _BIG),
    _column("fingerprint", _TEXT),
    _column("lease_owner", _TEXT, null=True),
    _column("lease_backend", _INTEGER, null=True),
    _column("lease_generation", _BIG),
    *_moments("lease_until"),
    *_moments("started_at", null=False),
    *_moments("loaded_at finished_at abandoned_at"),
    *_columns("source_horizon target_horizon reconciled_rows", _BIG),
    _column("tool_version", _TEXT),
    _column("rows_before", _BIG),
    _column("reconciled_xids", ARRAY(_BIG)),
    _column("kind", _TEXT),
)
sa.Index(
    "run_one_unfinished",
    *(_RUN.c.target_schema, _RUN.c.target_table),
    unique=True,
    postgresql_where=sa.text(UNFINISHED),
)
sa.Table(
    "slice",
    LEDGER,
    _run_id(null=False),
    _column("ordinal", _INTEGER),
    _column("kind", _TEXT),
    *_columns("lower upper", _TEXT, null=True),
    *_columns("rows bytes", _BIG, null=True),
    _column("attempts", _INTEGER),
    *_moments("finished_at"),
    _column("relation", ARRAY(_TEXT), null=True),
    _column("xid", _BIG, null=True),
    sa.PrimaryKeyConstraint("run_id", "ordinal"),
)
sa.Table(
    "deferred_index",
    LEDGER,
    _run_id(null=False),
    *_columns("index_schema index_name definition", _TEXT),
    _column("comment", _TEXT, null=True),
    *_moments("dropped_at", null=False),
    *_moments("rebuilt_at"),
    sa.PrimaryKeyConstraint("run_id", "index_schema", "index_name"),
)
sa.Table(
    "quarantine",
    LEDGER,
    _identity(),
    _run_id(null=True),
    *_columns("key reason", _TEXT),
    _column("row", JSONB()),
    *_moments("at", null=False),
    _column("key_values", ARRAY(_TEXT)),
)
_VERDICT = sa.Table(
    "verdict",
    LEDGER,
    _identity(),
    _run_id(null=True),
    *_columns("source_label target_label target_schema target_table check_name verdict", _TEXT),
    _column("figures", JSONB()),
    *_moments("at", null=False),
    *_columns("source_horizon target_horizon", _BIG),
    sa.Column("pass_id", _BIG, sa.ForeignKey("pipeline.pass.id", ondelete="SET NULL"), nullable=True),
)
sa.Index(
    "verdict_latest",
    *(_VERDICT.c.target_schema, _VERDICT.c.target_table, _VERDICT.c.check_name, _VERDICT.c.at.desc()),
)
sa.Table(
    "baseline",
    LEDGER,
    _identity(),
    _run_id(null=True),
    *_moments("captured_at", null=False),
    *_columns("source_label metric", _TEXT),
    _column("k", _INTEGER),
    _column("query", _TEXT),
    _column("answers", JSONB()),
    *_columns("target_schema target_table origin key text", _TEXT, null=True),
)
_PASS = sa.Table(
    "pass",
    LEDGER,
    _identity(),
    _run_id(null=True),
    *_columns("kind source_label target_label target_schema target_table fingerprint", _TEXT),
    *_columns("covered equal", sa.Boolean()),
    *_columns("source_horizon target_horizon figures", JSONB()),
    *_moments("at", null=False),
)
sa.Index("pass_latest", *(_PASS.c.target_schema, _PASS.c.target_table, _PASS.c.id.desc()))
sa.Table(
    "comparison",
    LEDGER,
    _identity(),
    *_columns("source_label target_label target_schema target_table fingerprint", _TEXT),
    *_columns("source_horizon target_horizon source_slices target_slices", JSONB()),
    *_columns("source_done target_done", ARRAY(_INTEGER)),
    *_columns("source_buckets target_buckets", sa.LargeBinary(), null=True),
    *_moments("began_at at", null=False),
)
_CUTOVER = sa.Table(
    "cutover",
    LEDGER,
    _identity(),
    *_columns("kind source_label target_label target_schema target_table", _TEXT),
    _column("options", JSONB()),
    *_moments("began_at", null=False),
    *_moments("opened_at back_at ended_at"),
    _column("outcome", _TEXT, null=True),
)
sa.Index(
    "cutover_one_under_way",
    _CUTOVER.c.target_schema,
    _CUTOVER.c.target_table,
    unique=True,
    postgresql_where=sa.text(UNDER_WAY),
)
sa.Table(
    "step",
    LEDGER,
    _identity(),
    _column("name", _TEXT),
    *_moments("intent_at", null=False),
    *_moments("done_at undone_at"),
    _column("evidence", JSONB()),
    sa.Column("cutover_id", _BIG, sa.ForeignKey("pipeline.cutover.id", ondelete="CASCADE")),
    sa.UniqueConstraint("cutover_id", "name", name="step_once_a_cutover"),
)
