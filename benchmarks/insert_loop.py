"""What people write first: select by SQLAlchemy, insert in batches of 1,000 rows. A contender, not an example.

Run as: python insert_loop.py SOURCE_URL TARGET_URL, passwords by PGPASSFILE.
"""

import sys

import sqlalchemy as sa

from pipeline.search.table import embeddings_table
from pipeline.settings import DEFAULT_DIMENSIONS, TableMapping

BATCH_ROWS = 1_000
EXTENSION = sa.text(
    "SELECT n.nspname FROM pg_catalog.pg_extension e"
    " JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector'"
)


def table(connection: sa.Connection) -> sa.Table:
    """Return the table as it stands behind a connection."""
    schema = connection.execute(EXTENSION).scalar_one()
    return embeddings_table(TableMapping(), DEFAULT_DIMENSIONS, schema)


def main(source_url: str, target_url: str) -> None:
    """Copy all rows, one transaction a batch."""
    source, target = sa.create_engine(source_url), sa.create_engine(target_url)
    with source.connect() as reading, target.connect() as writing:
        rows = reading.execution_options(yield_per=BATCH_ROWS).execute(sa.select(table(reading)))
        into = sa.insert(table(writing))
        writing.rollback()
        for batch in rows.mappings().partitions():
            with writing.begin():
                writing.execute(into, [dict(row) for row in batch])


if __name__ == "__main__":
    main(*sys.argv[1:])
