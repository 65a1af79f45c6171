"""The marks of a run: slices that are done, and indexes that are set aside."""

import json
from collections.abc import Sequence

from psycopg2 import sql

from pipeline.errors import ConflictError
from pipeline.postgres.database import Cursor
from pipeline.postgres.indexes import Index
from pipeline.postgres.slices import Bound, Slice
from pipeline.postgres.tables import Table


def read_slices(cursor: Cursor, run_id: int) -> tuple[Slice, ...]:
    """Return the run's slices in order, as they were cut when it was planned."""
    cursor.execute(
        "SELECT ordinal, kind, relation, lower, upper, rows, bytes FROM pipeline.slice WHERE run_id = %s"
        " ORDER BY ordinal",
        (run_id,),
    )
    return tuple(
        Slice(
            ordinal=ordinal,
            kind=kind,
            relation=None if relation is None else tuple(relation),
            lower=read_bound(lower),
            upper=read_bound(upper),
            rows=rows,
            bytes=size,
        )
        for ordinal, kind, relation, lower, upper, rows, size in cursor.fetchall()
    )


def insert_slices_sql(run: str, slices: Sequence[Slice]) -> sql.Composable:
    """Return the statement that records the slices of the run whose ``id`` a query of that name has.

    Bounds are texts: a page's number, or a key's values as a JSON array.
    """
    return sql.SQL(
        "INSERT INTO pipeline.slice (run_id, ordinal, kind, relation, lower, upper)"
        " SELECT {run}.id, part.ordinal, part.kind,"
        " CASE WHEN part.schema IS NOT NULL THEN ARRAY[part.schema, part.relation] END, part.lower, part.upper"
        " FROM {run}, ROWS FROM (pg_catalog.unnest({ordinals}::pg_catalog.int4[]),"
        " pg_catalog.unnest({kinds}::pg_catalog.text[]), pg_catalog.unnest({schemas}::pg_catalog.text[]),"
        " pg_catalog.unnest({relations}::pg_catalog.text[]), pg_catalog.unnest({lower}::pg_catalog.text[]),"
        " pg_catalog.unnest({upper}::pg_catalog.text[])) AS part(ordinal, kind, schema, relation, lower, upper)"
    ).format(
        run=sql.Identifier(run),
        ordinals=sql.Literal([part.ordinal for part in slices]),
        kinds=sql.Literal([part.kind for part in slices]),
        # Not pairs: an array of arrays comes apart into single texts.
        schemas=sql.Literal([part.relation and part.relation[0] for part in slices]),
        relations=sql.Literal([part.relation and part.relation[1] for part in slices]),
        lower=sql.Literal([written_bound(part.lower) for part in slices]),
        upper=sql.Literal([written_bound(part.upper) for part in slices]),
    )


def read_bound(text: str | None) -> Bound:
    """Return a slice's bound as ``written_bound`` wrote it."""
    if text is None:
        return None
    found = json.loads(text)
    return found if isinstance(found, int) else tuple(found)


def written_bound(bound: Bound) -> str | None:
    """Return a slice's bound as a text: a page's number, or a key's values as a JSON array."""
    return None if bound is None else json.dumps(bound, ensure_ascii=False)


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

    Raises ConflictError where it is set already: then that transaction must not commit.
    """
    cursor.execute(
        "UPDATE pipeline.slice SET rows = %s, bytes = %s, attempts = attempts + %s,"
        " xid = pg_catalog.pg_current_xact_id()::pg_catalog.text::pg_catalog.int8,"
        " finished_at = pg_catalog.clock_timestamp()"
        " WHERE run_id = %s AND ordinal = %s AND finished_at IS NULL",
        (rows, size, attempts, run_id, part.ordinal),
    )
    if cursor.rowcount != 1:
        # By our own earlier try, whose COMMIT was still under way when the mark was looked at.
        raise ConflictError(f"slice {part.ordinal} was finished meanwhile", "run the command again")


def finish_slice_and_commit(cursor: Cursor, run_id: int, part: Slice, rows: int, size: int) -> None:
    """Set a slice's mark and commit, in one round trip. Raises StatementError where it is set already."""
    cursor.execute(sql.SQL(_FINISH_AND_COMMIT_SQL).format(*map(sql.Literal, (rows, size, run_id, part.ordinal))))


_FINISH_AND_COMMIT_SQL = """
DO $mark$ BEGIN
    UPDATE pipeline.slice SET rows = {}, bytes = {}, attempts = attempts + 1,
        xid = pg_catalog.pg_current_xact_id()::pg_catalog.text::pg_catalog.int8,
        finished_at = pg_catalog.clock_timestamp()
    WHERE run_id = {} AND ordinal = {} AND finished_at IS NULL;
    IF NOT FOUND THEN RAISE EXCEPTION 'the slice was finished by somebody else' USING ERRCODE = 'ZL002'; END IF;
END $mark$;
COMMIT
"""


def written_sql(run_id: int, alias: str) -> sql.Composable:
    """Return that a row version of the target, by its alias, was written by the run: not by somebody else, nor before.

    The system column xmin holds the low 32 bits of the transaction that wrote it.
    """
    return sql.SQL(
        "{row}.xmin::pg_catalog.text::pg_catalog.int8 IN (SELECT w.xid & 4294967295 FROM"
        " (SELECT s.xid FROM pipeline.slice s WHERE s.run_id = {run} AND s.xid IS NOT NULL"
        " UNION ALL SELECT pg_catalog.unnest(r.reconciled_xids) FROM pipeline.run r WHERE r.id = {run}) w)"
    ).format(row=sql.Identifier(alias), run=sql.Literal(run_id))


def untouched_sql(horizon: int, alias: str) -> sql.Composable:
    """Return that a row version, by its alias, is older than a horizon of its server."""
    return sql.SQL("pg_catalog.age({}.xmin) > pg_catalog.age({}::pg_catalog.xid)").format(
        sql.Identifier(alias), sql.Literal(str(horizon % 2**32))
    )


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
