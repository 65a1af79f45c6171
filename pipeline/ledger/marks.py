"""The marks of a run: slices that are done, and indexes that are set aside."""

from pipeline.errors import StatementError
from pipeline.postgres.database import Cursor
from pipeline.postgres.indexes import Index
from pipeline.postgres.slices import Slice
from pipeline.postgres.tables import Table


def read_slices(cursor: Cursor, run_id: int) -> tuple[Slice, ...]:
    """Return the run's slices in order, as they were cut when it was planned."""
    cursor.execute(
        "SELECT ordinal, lower, upper, rows FROM pipeline.slice WHERE run_id = %s ORDER BY ordinal", (run_id,)
    )
    return tuple(
        Slice(
            ordinal=ordinal,
            lower=None if lower is None else int(lower),
            upper=None if upper is None else int(upper),
            rows=rows,
        )
        for ordinal, lower, upper, rows in cursor.fetchall()
    )


def slice_mark(cursor: Cursor, run_id: int, ordinal: int) -> tuple[int, int] | None:
    """Return rows and bytes of a slice that is done, else None: read after a lost COMMIT, never guessed."""
    cursor.execute(
        "SELECT rows, bytes FROM pipeline.slice WHERE run_id = %s AND ordinal = %s AND finished_at IS NOT NULL",
        (run_id, ordinal),
    )
    row = cursor.fetchone()
    return None if row is None else (row[0], row[1])


def finish_slice(cursor: Cursor, run_id: int, part: Slice, rows: int, size: int, attempts: int) -> None:
    """Set a slice's mark, in the transaction that brought its rows.

    Raises StatementError where it is set already: then that transaction must not commit.
    """
    cursor.execute(
        "UPDATE pipeline.slice SET rows = %s, bytes = %s, attempts = attempts + %s,"
        " finished_at = pg_catalog.clock_timestamp()"
        " WHERE run_id = %s AND ordinal = %s AND finished_at IS NULL",
        (rows, size, attempts, run_id, part.ordinal),
    )
    if cursor.rowcount != 1:
        raise StatementError(f"slice {part.ordinal} was finished by somebody else", "pipeline status")


def defer_index(cursor: Cursor, run_id: int, index: Index) -> None:
    """Record an index's definition; the caller drops it in the same transaction."""
    cursor.execute(
        "INSERT INTO pipeline.deferred_index (run_id, index_schema, index_name, definition, comment)"
        " VALUES (%s, %s, %s, %s, %s) ON CONFLICT (run_id, index_schema, index_name) DO UPDATE"
        " SET definition = EXCLUDED.definition, comment = EXCLUDED.comment, rebuilt_at = NULL",
        (run_id, index.schema, index.name, index.definition, index.comment),
    )


def indexes_to_rebuild(cursor: Cursor, target: Table) -> tuple[Index, ...]:
    """Return the table's deferred indexes that do not stand again yet, of whichever run."""
    cursor.execute(
        "SELECT DISTINCT ON (d.index_schema, d.index_name) d.index_schema, d.index_name, d.definition, d.comment"
        " FROM pipeline.deferred_index d JOIN pipeline.run r ON r.id = d.run_id"
        " WHERE r.target_schema = %s AND r.target_table = %s AND d.rebuilt_at IS NULL"
        " ORDER BY d.index_schema, d.index_name, d.run_id DESC",
        (target.schema, target.name),
    )
    return tuple(
        Index(schema=schema, name=name, definition=definition, comment=comment)
        for schema, name, definition, comment in cursor.fetchall()
    )


def mark_rebuilt(cursor: Cursor, index: Index) -> None:
    """Record that a deferred index stands again."""
    cursor.execute(
        "UPDATE pipeline.deferred_index SET rebuilt_at = pg_catalog.clock_timestamp()"
        " WHERE index_schema = %s AND index_name = %s AND rebuilt_at IS NULL",
        (index.schema, index.name),
    )
