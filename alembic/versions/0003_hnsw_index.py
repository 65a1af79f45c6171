"""The ANN index: HNSW for cosine distance, m = 16, ef_construction = 64 (pgvector's own defaults).

Up to 2,000 dimensions on the column itself; up to 4,000 on its halfvec form (pgvector 0.7 and later),
which a search must then name in the same way; beyond that there is none, and search is exact.
A valid index of this kind on an adopted table is kept; with ``-x adopt=yes`` all are left to the
program that made the table. Building one on a table with rows takes a SHARE lock: reads go on, writes
wait until it is built.
"""

import logging

import sqlalchemy as sa
from alembic import op

from pipeline import migration
from pipeline.errors import RefusedError
from pipeline.migration import Block, Composed, Literal
from pipeline.postgres.indexes import SAFE_PARALLEL_BUILD
from pipeline.search.table import MAX_INDEXED_HALFVEC, MAX_INDEXED_VECTOR, always_quoted, hnsw_index_name

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

CREATED = "Made by revision 0003 of the embeddings pipeline."
# The first release with halfvec.
OLDEST_HALFVEC = (0, 7, 0)
COLUMN_INDEX = """CREATE INDEX {name} ON {schema}.{table}
    USING hnsw ({column} {types}.vector_cosine_ops) WITH (m = 16, ef_construction = 64)"""
HALFVEC_INDEX = """CREATE INDEX {name} ON {schema}.{table}
    USING hnsw (({column}::{types}.halfvec({dimensions})) {types}.halfvec_cosine_ops)
    WITH (m = 16, ef_construction = 64)"""
# One row for each index of the table, and one for whatever else bears the index's name.
INDEXES = sa.text("""
SELECT c.relname AS name, COALESCE(x.indisvalid, false) AS valid,
       COALESCE(t.relname = :table, false) AS ours,
       pg_catalog.obj_description(c.oid, 'pg_class') AS comment,
       COALESCE(m.amname = 'hnsw' AND o.opcname = :opclass AND x.indpred IS NULL AND x.indnatts = 1
           AND (x.indkey[0] = a.attnum AND NOT :halved
                OR x.indkey[0] = 0 AND :halved AND pg_catalog.pg_get_indexdef(c.oid, 1, false)
                   = '((' || pg_catalog.quote_ident(:column) || ')::' || pg_catalog.quote_ident(:types)
                     || '.halfvec(' || :dimensions || '))'), false) AS serves
FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_catalog.pg_index x ON x.indexrelid = c.oid
LEFT JOIN pg_catalog.pg_class t ON t.oid = x.indrelid
LEFT JOIN pg_catalog.pg_am m ON m.oid = c.relam
LEFT JOIN pg_catalog.pg_opclass o ON o.oid = x.indclass[0]
LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = t.oid AND a.attname = :column
WHERE n.nspname = :schema AND (t.relname = :table OR c.relname = :name)
""")

# For a script, which cannot look first.
DROP_IF_CREATED = """BEGIN
    IF pg_catalog.obj_description(pg_catalog.to_regclass({quoted}), 'pg_class') = {comment} THEN
        DROP INDEX {schema}.{name};
    END IF;
END"""

log = logging.getLogger("alembic.pipeline")


def _dimensions() -> int:
    return migration.target().dimensions


def _halved() -> bool:
    return MAX_INDEXED_VECTOR < _dimensions() <= MAX_INDEXED_HALFVEC


def _indexes() -> list[sa.Row[tuple[str, bool, bool, str | None, bool]]]:
    mapping = migration.target().mapping
    parameters = {
        "schema": mapping.schema,
        "table": mapping.table,
        "column": mapping.embedding,
        "name": hnsw_index_name(mapping),
        "opclass": "halfvec_cosine_ops" if _halved() else "vector_cosine_ops",
        "halved": _halved(),
        "types": migration.extension_schema(),
        "dimensions": str(_dimensions()),
    }
    return list(op.get_bind().execute(INDEXES, parameters))


def refuse_upgrade() -> None:
    """Raise RefusedError where the index cannot be made: pgvector too old, or its name is taken."""
    extension = migration.installed_extension(op.get_bind())
    if extension is None or migration.target().adopt or _dimensions() > MAX_INDEXED_HALFVEC:
        return
    if _halved() and extension.version < OLDEST_HALFVEC:
        raise RefusedError(
            f"pgvector {extension.text} cannot index {_dimensions()} dimensions",
            "an administrator runs: ALTER EXTENSION vector UPDATE; (0.7.0 or later is needed)",
        )
    mapping = migration.target().mapping
    indexes = _indexes()
    if any(index.serves and index.valid for index in indexes):
        return
    for index in indexes:
        if index.name == hnsw_index_name(mapping) and (index.valid or not index.ours):
            raise RefusedError(
                f"the name {mapping.schema}.{index.name} is taken by something other than the index needed",
                "rename or drop it",
            )


def upgrade() -> None:
    if migration.target().adopt:
        log.info("the indexes of the table that was there are left to the program that made it")
        return
    if _dimensions() > MAX_INDEXED_HALFVEC:
        log.warning(
            "no ANN index: pgvector's HNSW ends at %s dimensions, the column has %s; search is exact",
            MAX_INDEXED_HALFVEC,
            _dimensions(),
        )
        return
    mapping = migration.target().mapping
    name = hnsw_index_name(mapping)
    if not migration.is_offline():
        refuse_upgrade()
        indexes = _indexes()
        if kept := [index.name for index in indexes if index.serves and index.valid]:
            log.info("the ANN index %s is there already and is kept", kept[0])
            return
        with migration.needing(_owner_hint()):
            if any(index.name == name for index in indexes):
                # What a cancelled CREATE INDEX CONCURRENTLY leaves: kept up to date, never used.
                op.drop_index(always_quoted(name), schema=always_quoted(mapping.schema))
        _make_build_safe()
    statement = Composed(
        HALFVEC_INDEX if _halved() else COLUMN_INDEX,
        name=name,
        schema=mapping.schema,
        table=mapping.table,
        column=mapping.embedding,
        types=migration.extension_schema(),
        dimensions=_dimensions(),
    )
    with migration.needing("" if migration.is_offline() else _owner_hint()):
        op.execute(statement)
    op.execute(
        Composed(
            "COMMENT ON INDEX {schema}.{name} IS {comment}",
            schema=mapping.schema,
            name=name,
            comment=Literal(CREATED),
        )
    )


def _make_build_safe() -> None:
    extension = migration.installed_extension(op.get_bind())
    if extension is not None and extension.version < SAFE_PARALLEL_BUILD:
        # CVE-2026-3172: a parallel build can write beyond its buffer.
        op.execute(sa.text("SET LOCAL max_parallel_maintenance_workers = 0"))


def _owner_hint() -> str:
    mapping, quoted = migration.target().mapping, migration.quoted
    name = f"{quoted(mapping.schema)}.{quoted(mapping.table)}"
    return f"run it as the table's owner, or: ALTER TABLE {name} OWNER TO {migration.current_role()};"


def downgrade() -> None:
    """Drop the index where upgrade() made it; one that was there before stays."""
    mapping = migration.target().mapping
    name = hnsw_index_name(mapping)
    if migration.is_offline():
        op.execute(
            Block(
                DROP_IF_CREATED,
                schema=mapping.schema,
                name=name,
                quoted=Literal(f"{migration.quoted(mapping.schema)}.{migration.quoted(name)}"),
                comment=Literal(CREATED),
            )
        )
        return
    for index in _indexes():
        if index.name == name and index.ours and index.comment == CREATED:
            op.drop_index(always_quoted(name), schema=always_quoted(mapping.schema))
