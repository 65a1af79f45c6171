"""The ledger, schema pipeline: runs, slices, deferred indexes, quarantine, verdicts, baselines, steps.

A downgrade drops it, but not while a run is unfinished, unless ``-x drop_rows=yes``. The schema
itself stays: it holds Alembic's own table.
"""

from datetime import datetime

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from pipeline import migration

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

SCHEMA = "pipeline"
# In the order of creation.
TABLES = ("run", "slice", "deferred_index", "quarantine", "verdict", "baseline", "step")
NOW = sa.text("pg_catalog.clock_timestamp()")


def upgrade() -> None:
    with migration.needing(_grant()):
        _create_run()
        _create_slice()
        _create_deferred_index()
        _create_quarantine()
        _create_verdict()
        _create_baseline()
        _create_step()


def _grant() -> str:
    if migration.is_offline():
        return ""
    return f"an administrator runs: GRANT USAGE, CREATE ON SCHEMA {SCHEMA} TO {migration.current_role()};"


def _text(name: str, null: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), nullable=null)


def _bigint(name: str, null: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), nullable=null)


def _moment(name: str) -> sa.Column[datetime]:
    return sa.Column(name, sa.DateTime(timezone=True))


def _made(name: str) -> sa.Column[datetime]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False, server_default=NOW)


def _jsonb(name: str) -> "sa.Column[JSONB]":
    return sa.Column(name, JSONB(), nullable=False)


def _identity() -> sa.Column[int]:
    return sa.Column("id", sa.BigInteger(), sa.Identity(always=True), primary_key=True)


def _run_id(null: bool) -> sa.Column[int]:
    reference = sa.ForeignKey(f"{SCHEMA}.run.id", ondelete="CASCADE")
    return sa.Column("run_id", sa.BigInteger(), reference, nullable=null)


def _create_run() -> None:
    op.create_table(
        "run",
        _identity(),
        _text("source_label"),
        _text("target_label"),
        # A system identifier is an unsigned 64-bit number.
        sa.Column("source_system", sa.Numeric(20), nullable=False),
        _text("source_database"),
        _text("source_schema"),
        _text("source_table"),
        _bigint("source_oid"),
        _text("target_schema"),
        _text("target_table"),
        _bigint("target_oid"),
        sa.Column("column_names", ARRAY(sa.Text()), nullable=False),
        sa.Column("column_types", ARRAY(sa.Text()), nullable=False),
        sa.Column("key_columns", ARRAY(sa.Text()), nullable=False),
        _bigint("slice_bytes"),
        _text("fingerprint"),
        _text("lease_owner", null=True),
        sa.Column("lease_backend", sa.Integer()),
        sa.Column("lease_generation", sa.BigInteger(), nullable=False, server_default=sa.text("0")),
        _moment("lease_until"),
        _made("started_at"),
        _moment("loaded_at"),
        _moment("finished_at"),
        _moment("abandoned_at"),
        _bigint("source_horizon"),
        _bigint("target_horizon"),
        sa.Column("reconciled_rows", sa.BigInteger(), nullable=False, server_default=sa.text("0")),
        _text("tool_version"),
        sa.CheckConstraint(
            "pg_catalog.cardinality(column_names) = pg_catalog.cardinality(column_types)",
            name="run_columns_have_types",
        ),
        sa.CheckConstraint("finished_at IS NULL OR loaded_at IS NOT NULL", name="run_loaded_before_finished"),
        schema=SCHEMA,
        comment="One copy of one table: what from where to where, who holds its lease, and how far it came.",
    )
    op.create_index(
        "run_one_unfinished",
        "run",
        ["target_schema", "target_table"],
        unique=True,
        schema=SCHEMA,
        postgresql_where=sa.text(migration.UNFINISHED),
    )


def _create_slice() -> None:
    op.create_table(
        "slice",
        _run_id(null=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        _text("kind"),
        _text("lower", null=True),
        _text("upper", null=True),
        _bigint("rows", null=True),
        _bigint("bytes", null=True),
        sa.Column("attempts", sa.Integer(), nullable=False, server_default=sa.text("0")),
        _moment("finished_at"),
        sa.PrimaryKeyConstraint("run_id", "ordinal"),
        sa.CheckConstraint("kind IN ('pages', 'keys')", name="slice_kind"),
        sa.CheckConstraint("(finished_at IS NULL) = (rows IS NULL)", name="slice_finished_has_rows"),
        schema=SCHEMA,
        comment="The parts of a run; finished_at is set in the transaction that brought the rows.",
    )


def _create_deferred_index() -> None:
    op.create_table(
        "deferred_index",
        _run_id(null=False),
        _text("index_schema"),
        _text("index_name"),
        _text("definition"),
        _text("comment", null=True),
        _made("dropped_at"),
        _moment("rebuilt_at"),
        sa.PrimaryKeyConstraint("run_id", "index_schema", "index_name"),
        schema=SCHEMA,
        comment="Indexes that a run dropped before the load, with the statement that builds them again.",
    )


def _create_quarantine() -> None:
    op.create_table(
        "quarantine",
        _identity(),
        _run_id(null=True),
        _text("key"),
        _text("reason"),
        _jsonb("row"),
        _made("at"),
        schema=SCHEMA,
        comment="Rows that could not be carried and were set aside, each with the reason.",
    )


def _create_verdict() -> None:
    op.create_table(
        "verdict",
        _identity(),
        _run_id(null=True),
        _text("source_label"),
        _text("target_label"),
        _text("target_schema"),
        _text("target_table"),
        _text("check_name"),
        _text("verdict"),
        _jsonb("figures"),
        _made("at"),
        _bigint("source_horizon"),
        _bigint("target_horizon"),
        sa.CheckConstraint("verdict IN ('pass', 'fail', 'partial')", name="verdict_verdict"),
        schema=SCHEMA,
        comment="What each check found, when, and up to which transaction on both sides it speaks.",
    )
    op.create_index(
        "verdict_latest",
        "verdict",
        ["target_schema", "target_table", "check_name", sa.text("at DESC")],
        schema=SCHEMA,
    )


def _create_baseline() -> None:
    op.create_table(
        "baseline",
        _identity(),
        _run_id(null=True),
        _made("captured_at"),
        _text("source_label"),
        _text("metric"),
        sa.Column("k", sa.Integer(), nullable=False),
        _text("query"),
        _jsonb("answers"),
        sa.CheckConstraint("k > 0", name="baseline_k_positive"),
        schema=SCHEMA,
        comment="Queries with the exact answers of the source, frozen to compare later searches with.",
    )


def _create_step() -> None:
    op.create_table(
        "step",
        _identity(),
        _text("name"),
        _made("intent_at"),
        _moment("done_at"),
        _moment("undone_at"),
        sa.Column("evidence", JSONB(), nullable=False, server_default=sa.text("'{}'")),
        schema=SCHEMA,
        comment="The cutover's steps: intended, done, undone, and what was seen.",
    )


def refuse_downgrade() -> None:
    """Raise RefusedError while a run is unfinished: its marks and index definitions would be lost."""
    migration.refuse_unfinished_runs()


def downgrade() -> None:
    migration.refuse_unfinished_runs()
    for table in reversed(TABLES):
        op.drop_table(table, schema=SCHEMA)
