"""The dimension of every vector, told by its stored size wherever that is enough. Read-only."""

from psycopg2 import sql

from pipeline.check.preflight import EXAMPLES, Finding
from pipeline.postgres.database import Session
from pipeline.postgres.tables import Table
from pipeline.settings import TableMapping
from pipeline.wording import counted

# Bytes per dimension of the types whose size tells it; a sparse vector's tells how many numbers are not zero.
_WIDTHS = {"vector": 4, "halfvec": 2}
# What a vector stores beside its numbers, without the header of its length: dimension and a reserved field.
_FIELDS_BYTES = 4
# The first version with pg_column_compression.
COMPRESSION_VERSION = 140000


def check_vector_dimensions(
    session: Session, table: Table, mapping: TableMapping, dimensions: int
) -> tuple[Finding, ...]:
    """Count the rows per dimension where the column's type does not tell: a typed column gets no scan.

    Of an untyped one the heap is read, and from TOAST those vectors alone whose size does not tell that
    they have ``dimensions``. Raises PipelineError.
    """
    column = table.column(mapping.embedding)
    if column is None or column.dimensions is not None or not column.is_vector:
        return ()
    dimension = _told_dimension_sql(session, table, mapping.embedding, dimensions)
    query = sql.SQL(
        "SELECT d, pg_catalog.count(*) FROM (SELECT {} AS d FROM {}) q"
        " WHERE d IS NOT NULL GROUP BY d ORDER BY 2 DESC, 1"
    )
    counts = session.rows(query.format(dimension, table.scanned))
    if all(found == dimensions for found, _ in counts):
        return ()
    listed = ", ".join(f"{found} dimensions: {counted(rows, 'row')}" for found, rows in counts[:EXAMPLES])
    return (
        Finding(
            severity="refuse",
            fact=f"{session.endpoint.name}'s column {mapping.embedding} is an untyped {column.base_type} and holds"
            f" {listed}; EMBEDDING_DIMENSIONS says {dimensions}",
            hint="set EMBEDDING_DIMENSIONS to the model's dimension, and embed or delete the other rows first\n"
            "or set them aside: pipeline copy --quarantine",
        ),
    )


def other_dimension_sql(session: Session, table: Table, embedding: str, dimensions: int) -> sql.Composable:
    """Return the condition that a row's vector has another dimension than ``dimensions``.

    Never met by a row without a vector. See ``_told_dimension_sql`` for what it reads.
    """
    return sql.SQL("coalesce({} <> {}, false)").format(
        _told_dimension_sql(session, table, embedding, dimensions), sql.Literal(dimensions)
    )


def _told_dimension_sql(session: Session, table: Table, embedding: str, dimensions: int) -> sql.Composable:
    """Return a vector's dimension, read from the vector itself only where its size leaves a doubt.

    Outside of the row and uncompressed, pg_column_size is the size of the numbers and their fields, looked
    up in the pointer that the row holds. Inside the row a header of 4 bytes (1 in short values) is counted
    too: such a value has another size, and to look into it costs nothing. A value inside the row with one
    number less (two of a halfvec) would have the size of one outside; it is ruled out where a row cannot
    hold that much: beyond a quarter of a page, and beyond the table's toast_tuple_target, every value that
    may move out has moved out. Only one that was stored while the column was PLAIN, and not since, would
    be taken for one number more; the copy would stop at it.

    Views have no storage of their own, and servers before 14 do not tell what is compressed: there, every
    vector is read.
    """
    column = table.column(embedding)
    assert column is not None
    read, width = dimensions_sql(table, embedding), _WIDTHS.get(column.base_type)
    if width is None or not table.heaps or session.version < COMPRESSION_VERSION:
        return read
    outside = _FIELDS_BYTES + width * dimensions
    return sql.SQL(
        "CASE WHEN pg_catalog.pg_column_size({place}) = {outside} AND ({moved}) < {outside}"
        " AND pg_catalog.pg_column_compression({place}) IS NULL THEN {dimensions} ELSE {read} END"
    ).format(
        place=sql.Identifier(embedding),
        outside=sql.Literal(outside),
        moved=_LARGEST_INSIDE_SQL.format(
            heaps=sql.Literal([heap.oid for heap in table.heaps]), embedding=sql.Literal(embedding)
        ),
        dimensions=sql.Literal(dimensions),
        read=read,
    )


# The largest value that any of the heaps keeps inside a row; NULL where one keeps all (no TOAST, PLAIN or
# MAIN). Asked once a statement: it does not depend on the row.
_LARGEST_INSIDE_SQL = sql.SQL("""
    SELECT CASE WHEN pg_catalog.bool_and(c.reltoastrelid <> 0 AND a.attstorage IN ('e', 'x')) THEN
        greatest(pg_catalog.current_setting('block_size')::pg_catalog.int4 / 4, pg_catalog.max((
            SELECT o.option_value::pg_catalog.int4 FROM pg_catalog.pg_options_to_table(c.reloptions) o
            WHERE o.option_name = 'toast_tuple_target'))) END
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid
    WHERE c.oid = ANY ({heaps}::pg_catalog.oid[]) AND a.attname = {embedding}
""")


def dimensions_sql(table: Table, embedding: str) -> sql.Composable:
    """Return the dimension of a vector of any of the extension's types, read from the vector."""
    column = table.column(embedding)
    assert column is not None and column.send is not None and table.extension is not None
    place = sql.Identifier(embedding)
    if column.base_type != "sparsevec":
        return sql.SQL("{}({})").format(sql.Identifier(table.extension.schema, "vector_dims"), place)
    # No function tells it; the binary form begins with it, as four bytes.
    first = sql.SQL("pg_catalog.encode(pg_catalog.substring({}({}), 1, 4), 'hex')").format(
        sql.Identifier(*column.send), place
    )
    return sql.SQL("('x' || {})::pg_catalog.bit(32)::pg_catalog.int4").format(first)
