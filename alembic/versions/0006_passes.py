"""What was compared, and what stood at that moment: passes, comparisons under way, and whose baseline it is.

A pass (of a copy, a sync, a verify) keeps the horizons of both sides and how the tables stood there, so
that a later one looks only at what was touched since. A downgrade drops these.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from pipeline import migration

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

SCHEMA = "pipeline"
NOW = sa.text("pg_catalog.clock_timestamp()")
ENDS = ("source_label", "target_label", "target_schema", "target_table")
BASELINE_COLUMNS = ("target_schema", "target_table", "origin", "key", "text")


def upgrade() -> None:
    _create_pass()
    _create_comparison()
    reference = sa.ForeignKey(f"{SCHEMA}.pass.id", name="verdict_pass_id_fkey", ondelete="SET NULL")
    op.add_column("verdict", sa.Column("pass_id", sa.BigInteger(), reference), schema=SCHEMA)
    # A sync writes rows too, by keys alone; its run has no slices, and none that a copy goes on with.
    kind = sa.Column("kind", sa.Text(), nullable=False, server_default=sa.text("'copy'"))
    op.add_column("run", kind, schema=SCHEMA)
    op.create_check_constraint("run_kind", "run", "kind IN ('copy', 'sync')", schema=SCHEMA)
    # A capture is the rows of one captured_at. ``origin``: a stored vector (with its row's key), or an embedded text.
    for name in BASELINE_COLUMNS:
        op.add_column("baseline", sa.Column(name, sa.Text()), schema=SCHEMA)


def _texts(names: tuple[str, ...]) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text(), nullable=False) for name in names]


def _create_pass() -> None:
    op.create_table(
        "pass",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), primary_key=True),
        sa.Column("run_id", sa.BigInteger(), sa.ForeignKey(f"{SCHEMA}.run.id", ondelete="CASCADE")),
        sa.Column("kind", sa.Text(), nullable=False),
        *_texts(ENDS),
        # Both tables, and the columns with their types: only a pass over the same ones says anything.
        sa.Column("fingerprint", sa.Text(), nullable=False),
        # Covered: every row of the source stood on the target, equal. Equal: and the target had no other.
        sa.Column("covered", sa.Boolean(), nullable=False),
        sa.Column("equal", sa.Boolean(), nullable=False),
        sa.Column("source_horizon", JSONB(), nullable=False),
        sa.Column("target_horizon", JSONB(), nullable=False),
        sa.Column("figures", JSONB(), nullable=False, server_default=sa.text("'{}'")),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False, server_default=NOW),
        sa.CheckConstraint("kind IN ('copy', 'sync', 'verify', 'incremental')", name="pass_kind"),
        schema=SCHEMA,
        comment="Passes over both tables: how they stood at their horizons, and whether they were equal there.",
    )
    op.create_index("pass_latest", "pass", ["target_schema", "target_table", sa.text("id DESC")], schema=SCHEMA)


def _create_comparison() -> None:
    op.create_table(
        "comparison",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), primary_key=True),
        *_texts(ENDS),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("source_horizon", JSONB(), nullable=False),
        sa.Column("target_horizon", JSONB(), nullable=False),
        # Slices that are in the sums already, and the sums: per bucket rows, embeddings and digests.
        sa.Column("source_slices", JSONB(), nullable=False),
        sa.Column("target_slices", JSONB(), nullable=False),
        sa.Column("source_done", ARRAY(sa.Integer()), nullable=False, server_default=sa.text("'{}'")),
        sa.Column("target_done", ARRAY(sa.Integer()), nullable=False, server_default=sa.text("'{}'")),
        sa.Column("source_buckets", sa.LargeBinary()),
        sa.Column("target_buckets", sa.LargeBinary()),
        sa.Column("began_at", sa.DateTime(timezone=True), nullable=False, server_default=NOW),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False, server_default=NOW),
        schema=SCHEMA,
        comment="Comparisons that were interrupted: what of both tables is summed up already.",
    )


def refuse_downgrade() -> None:
    """Raise RefusedError while a run is unfinished, before anything is dropped."""
    migration.refuse_unfinished_runs()


def downgrade() -> None:
    migration.refuse_unfinished_runs()
    for name in reversed(BASELINE_COLUMNS):
        op.drop_column("baseline", name, schema=SCHEMA)
    op.drop_column("run", "kind", schema=SCHEMA)
    op.drop_column("verdict", "pass_id", schema=SCHEMA)
    for table in ("comparison", "pass"):
        op.drop_table(table, schema=SCHEMA)
