"""Which rows a run wrote: by the transactions that did it, beside those that were there before.

A slice names its partition and its transaction, a run the rows that it found and the transactions that
brought changed rows, and a row in quarantine its key value by value. A downgrade drops these columns.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

from pipeline import migration

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

SCHEMA = "pipeline"


def upgrade() -> None:
    # Schema and name of the partition that the pages are of; the table itself where it is NULL.
    op.add_column("slice", sa.Column("relation", ARRAY(sa.Text())), schema=SCHEMA)
    # The target's transaction that brought the rows, in 64 bits: the low 32 are the rows' xmin.
    op.add_column("slice", sa.Column("xid", sa.BigInteger()), schema=SCHEMA)
    none = sa.text("'{}'")
    before = sa.Column("rows_before", sa.BigInteger(), nullable=False, server_default=sa.text("0"))
    op.add_column("run", before, schema=SCHEMA)
    op.add_column(
        "run", sa.Column("reconciled_xids", ARRAY(sa.BigInteger()), nullable=False, server_default=none), schema=SCHEMA
    )
    op.add_column(
        "quarantine", sa.Column("key_values", ARRAY(sa.Text()), nullable=False, server_default=none), schema=SCHEMA
    )


def refuse_downgrade() -> None:
    """Raise RefusedError while a run is unfinished: which rows it wrote would be forgotten."""
    migration.refuse_unfinished_runs()


def downgrade() -> None:
    migration.refuse_unfinished_runs()
    op.drop_column("quarantine", "key_values", schema=SCHEMA)
    for column in ("reconciled_xids", "rows_before"):
        op.drop_column("run", column, schema=SCHEMA)
    for column in ("xid", "relation"):
        op.drop_column("slice", column, schema=SCHEMA)
