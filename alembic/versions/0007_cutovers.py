"""The cutovers: each with its steps, what it may pass its fences with, and how it ended.

A downgrade drops them, but not while a cutover is under way or can still be rolled back.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from pipeline import migration

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

SCHEMA = "pipeline"
NOW = sa.text("pg_catalog.clock_timestamp()")
ENDS = ("source_label", "target_label", "target_schema", "target_table")


def upgrade() -> None:
    op.create_table(
        "cutover",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), primary_key=True),
        sa.Column("kind", sa.Text(), nullable=False),
        *(sa.Column(name, sa.Text(), nullable=False) for name in ENDS),
        # Which files, how many commands; never a value of a setting.
        sa.Column("options", JSONB(), nullable=False, server_default=sa.text("'{}'")),
        sa.Column("began_at", sa.DateTime(timezone=True), nullable=False, server_default=NOW),
        # Set before main is opened to others: from then on its rows may be newer than legacy's.
        sa.Column("opened_at", sa.DateTime(timezone=True)),
        sa.Column("back_at", sa.DateTime(timezone=True)),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.Column("outcome", sa.Text()),
        sa.CheckConstraint("kind IN ('cutover', 'rehearsal')", name="cutover_kind"),
        sa.CheckConstraint("outcome IN ('rehearsed', 'rolled back', 'finalized')", name="cutover_outcome"),
        sa.CheckConstraint("(ended_at IS NULL) = (outcome IS NULL)", name="cutover_ended_has_outcome"),
        schema=SCHEMA,
        comment="Cutovers and rehearsals: begun, opened to the application, on the way back, ended.",
    )
    op.create_index(
        "cutover_one_under_way",
        "cutover",
        ["target_schema", "target_table"],
        unique=True,
        schema=SCHEMA,
        postgresql_where=sa.text(migration.UNDER_WAY),
    )
    reference = sa.ForeignKey(f"{SCHEMA}.cutover.id", name="step_cutover_id_fkey", ondelete="CASCADE")
    op.add_column("step", sa.Column("cutover_id", sa.BigInteger(), reference), schema=SCHEMA)
    op.create_unique_constraint("step_once_a_cutover", "step", ["cutover_id", "name"], schema=SCHEMA)


def refuse_downgrade() -> None:
    """Raise RefusedError while a run is unfinished, or a cutover: its way back would be forgotten."""
    migration.refuse_unfinished_runs()
    migration.refuse_cutovers()


def downgrade() -> None:
    refuse_downgrade()
    op.drop_constraint("step_once_a_cutover", "step", schema=SCHEMA)
    op.drop_column("step", "cutover_id", schema=SCHEMA)
    op.drop_table("cutover", schema=SCHEMA)
