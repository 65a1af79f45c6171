"""Sequences behind a table's columns (serial, identity, or a default of nextval): set behind the rows there."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from psycopg2 import sql

from pipeline.postgres.database import Cursor
from pipeline.postgres.tables import Table

# Owned by the column (serial, identity), or named by its default.
_SEQUENCES_SQL = """
SELECT a.attname, n.nspname, c.relname, s.seqmin, s.seqmax, s.seqincrement > 0,
       pg_catalog.has_sequence_privilege(c.oid, 'UPDATE') AND pg_catalog.has_sequence_privilege(c.oid, 'SELECT')
           AND pg_catalog.has_schema_privilege(n.oid, 'USAGE'),
       pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname)
FROM pg_catalog.pg_sequence s
JOIN pg_catalog.pg_class c ON c.oid = s.seqrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_attribute a ON a.attrelid = %(table)s AND a.attnum > 0 AND NOT a.attisdropped AND a.atttypid IN (
    'pg_catalog.int2'::pg_catalog.regtype, 'pg_catalog.int4'::pg_catalog.regtype, 'pg_catalog.int8'::pg_catalog.regtype)
LEFT JOIN pg_catalog.pg_attrdef f ON f.adrelid = a.attrelid AND f.adnum = a.attnum
WHERE EXISTS (
    SELECT 1 FROM pg_catalog.pg_depend d
    WHERE (d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = c.oid AND d.deptype IN ('a', 'i')
           AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass
           AND d.refobjid = a.attrelid AND d.refobjsubid = a.attnum)
       OR (d.classid = 'pg_catalog.pg_attrdef'::pg_catalog.regclass AND d.objid = f.oid
           AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.refobjid = c.oid))
ORDER BY a.attname, c.oid
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """A sequence that gives a column its values; ``quoted`` is its name as typed in SQL."""

    column: str
    schema: str
    name: str
    low: int
    high: int
    upwards: bool
    allowed: bool
    quoted: str


def read_sequences(cursor: Cursor, table: Table) -> tuple[Sequence, ...]:
    """Return the sequences of a table's columns, by one query."""
    cursor.execute(_SEQUENCES_SQL, {"table": table.oid})
    names = [field.name for field in fields(Sequence)]
    return tuple(Sequence(**dict(zip(names, row, strict=True))) for row in cursor.fetchall())


def set_sequences(cursor: Cursor, table: Table, sequences: Iterable[Sequence]) -> tuple[str, ...]:
    """Move every sequence of the table's columns behind the largest value there; never back.

    The next value is ``max + 1`` then, or none where that is beyond the sequence's end. One that counts
    down, or that lies beyond all values already, stays. Returns the names, as typed in SQL, of those that
    this role may not set. Raises PipelineError.
    """
    upwards = [one for one in sequences if one.upwards]
    for one in upwards:
        if one.allowed:
            _set(cursor, table, one)
    return tuple(one.quoted for one in upwards if not one.allowed)


def _set(cursor: Cursor, table: Table, sequence: Sequence) -> None:
    cursor.execute(
        sql.SQL(
            "SELECT pg_catalog.setval({name}::pg_catalog.regclass, least(q.largest, {high}), true)"
            " FROM (SELECT pg_catalog.max({column})::pg_catalog.int8 AS largest FROM {table}) q, {sequence} s"
            " WHERE q.largest >= {low} AND (q.largest > s.last_value OR (q.largest = s.last_value AND NOT s.is_called))"
        ).format(
            name=sql.Literal(sequence.quoted),
            high=sql.Literal(sequence.high),
            low=sql.Literal(sequence.low),
            column=sql.Identifier(sequence.column),
            table=table.scanned,
            sequence=sql.Identifier(sequence.schema, sequence.name),
        )
    )
