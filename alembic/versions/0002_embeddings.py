"""The embeddings table: created, or adopted where one of the same shape is there.

One of another shape, which another program made and reads, is left as it is by ``-x adopt=yes``.
A downgrade drops it only where this revision created it (its comment says so), and with rows in it
only by ``-x drop_rows=yes``. An adopted table is left as it is, empty or not.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from pipeline import migration
from pipeline.errors import RefusedError
from pipeline.migration import Block, Composed, Literal
from pipeline.postgres.tables import KINDS
from pipeline.search.table import Vector, always_quoted

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

CREATED = "Texts and their embeddings, for cosine distance; made by revision 0002 of the embeddings pipeline."

RELATION = sa.text("""
SELECT c.oid::pg_catalog.int8 AS oid, c.relkind::pg_catalog.text AS kind, c.relpersistence = 'u' AS unlogged,
       pg_catalog.obj_description(c.oid, 'pg_class') AS comment
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = :schema AND c.relname = :table
""")
# The types of the extension are shown without their schema, which differs from host to host.
COLUMNS = sa.text("""
SELECT a.attname AS name, a.attnotnull AS not_null, a.attgenerated <> '' AS generated,
       a.atthasdef OR a.attidentity <> '' AS has_default,
       CASE WHEN t.typname = 'vector' AND e.oid IS NOT NULL
            THEN 'vector' || CASE WHEN a.atttypmod > 0 THEN '(' || a.atttypmod || ')' ELSE '' END
            ELSE pg_catalog.format_type(a.atttypid, a.atttypmod) END AS type,
       EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = a.attrelid AND i.indisunique
               AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL
               AND i.indnkeyatts = 1 AND i.indkey[0] = a.attnum) AS is_unique
FROM pg_catalog.pg_attribute a
JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
LEFT JOIN pg_catalog.pg_extension e ON e.extname = 'vector' AND e.extnamespace = t.typnamespace
WHERE a.attrelid = :oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
""")
# Checked, counted and dropped in one statement, so that no row can come in between.
DROP_IF_CREATED = """BEGIN
    IF pg_catalog.obj_description({quoted}::pg_catalog.regclass, 'pg_class') IS DISTINCT FROM {comment} THEN
        RAISE NOTICE 'the embeddings table was there before revision 0002 and stays';
        RETURN;
    END IF;
    LOCK TABLE {schema}.{table} IN ACCESS EXCLUSIVE MODE;
    IF {keep_rows} = 1 AND EXISTS (SELECT FROM {schema}.{table}) THEN
        RAISE EXCEPTION USING MESSAGE = 'the embeddings table holds rows, and a downgrade would drop them',
            HINT = 'alembic -x drop_rows=yes downgrade ...';
    END IF;
    DROP TABLE {schema}.{table};
END"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """What bears the table's name. ``kind`` is pg_class.relkind."""

    oid: int
    kind: str
    unlogged: bool
    comment: str | None


def _relation() -> Relation | None:
    mapping = migration.target().mapping
    names = {"schema": mapping.schema, "table": mapping.table}
    row = op.get_bind().execute(RELATION, names).one_or_none()
    return None if row is None else Relation(**row._mapping)


def refuse_upgrade() -> None:
    """Raise RefusedError with every deviation where something of another shape bears the table's name."""
    relation = _relation()
    mapping = migration.target().mapping
    if relation is None:
        if migration.target().adopt:
            raise RefusedError(
                f"-x adopt=yes: there is no table {mapping.qualified}",
                "let the program that reads it make it, or correct PGVECTOR_TABLE",
            )
        return
    if relation.kind != "r":
        raise RefusedError(
            f"{mapping.qualified} is {KINDS.get(relation.kind, 'not a table')}, expected a table",
            "rename it, or point PGVECTOR_TABLE at another name",
        )
    if deviations := list(_deviations(relation)):
        raise RefusedError(
            f"{mapping.qualified} exists and has another shape: {'; '.join(deviations)}",
            "alter or rename that table, or correct PGVECTOR_TABLE, PGVECTOR_COL_* or EMBEDDING_DIMENSIONS;"
            " if another program made it for itself: alembic -x adopt=yes upgrade head",
        )


def _deviations(relation: Relation) -> Iterator[str]:
    target = migration.target()
    mapping = target.mapping
    if relation.unlogged:
        yield "it is unlogged, so a crash of the server empties it"
    if target.adopt:
        return
    found = {row.name: row for row in op.get_bind().execute(COLUMNS, {"oid": relation.oid})}
    expected = dict(zip(mapping.columns, ("uuid", "text", "jsonb", f"vector({target.dimensions})"), strict=True))
    for name, kind in expected.items():
        column = found.get(name)
        if column is None:
            yield f"{name} is missing, expected {kind}"
            continue
        if column.type != kind:
            yield f"{name} is {column.type}, expected {kind}"
        if column.generated:
            yield f"{name} is generated, expected a plain column"
        if name != mapping.id and column.not_null:
            yield f"{name} is not null, expected nullable"
    key = found.get(mapping.id)
    if key is not None and not (key.not_null and key.is_unique):
        yield f"{mapping.id} is not the primary key"
    if key is not None and not key.has_default:
        yield f"{mapping.id} has no default, expected gen_random_uuid()"
    for name, column in found.items():
        if name not in expected and column.not_null and not (column.has_default or column.generated):
            yield f"{name} is not null without a default, so no row can be added without it"


def upgrade() -> None:
    mapping = migration.target().mapping
    if not migration.is_offline():
        refuse_upgrade()
    if migration.target().adopt or (not migration.is_offline() and _relation() is not None):
        return
    migration.create_schema(mapping.schema)
    with migration.needing(_grants()):
        op.create_table(
            always_quoted(mapping.table),
            sa.Column(
                always_quoted(mapping.id),
                sa.Uuid(),
                primary_key=True,
                server_default=sa.text("pg_catalog.gen_random_uuid()"),
            ),
            sa.Column(always_quoted(mapping.content), sa.Text()),
            sa.Column(always_quoted(mapping.metadata), JSONB()),
            sa.Column(
                always_quoted(mapping.embedding),
                Vector(migration.target().dimensions, migration.extension_schema()),
            ),
            schema=always_quoted(mapping.schema),
            comment=CREATED,
        )


def _grants() -> str:
    if migration.is_offline():
        return ""
    role, quoted = migration.current_role(), migration.quoted
    schema, types = migration.target().mapping.schema, migration.extension_schema()
    return (
        f"an administrator runs: GRANT USAGE, CREATE ON SCHEMA {quoted(schema)} TO {role};"
        f" GRANT USAGE ON SCHEMA {quoted(types)} TO {role};"
    )


def refuse_downgrade() -> None:
    """Raise RefusedError where a table that this revision created holds rows, with their count."""
    relation = _relation()
    target = migration.target()
    if relation is None or relation.comment != CREATED or target.drop_rows:
        return
    table = sa.table(always_quoted(target.mapping.table), schema=always_quoted(target.mapping.schema))
    rows = op.get_bind().execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
    if rows:
        raise RefusedError(
            f"{target.mapping.qualified} holds {rows} row{'' if rows == 1 else 's'}, and a downgrade would drop them",
            "if they may go: alembic -x drop_rows=yes downgrade ...",
        )


def downgrade() -> None:
    target = migration.target()
    if not migration.is_offline():
        relation = _relation()
        if relation is None or relation.comment != CREATED:
            return
        table = {"schema": target.mapping.schema, "table": target.mapping.table}
        op.execute(Composed("LOCK TABLE {schema}.{table} IN ACCESS EXCLUSIVE MODE", **table))
        refuse_downgrade()
        op.drop_table(always_quoted(table["table"]), schema=always_quoted(table["schema"]))
        return
    op.execute(
        Block(
            DROP_IF_CREATED,
            schema=target.mapping.schema,
            table=target.mapping.table,
            quoted=Literal(f"{migration.quoted(target.mapping.schema)}.{migration.quoted(target.mapping.table)}"),
            comment=Literal(CREATED),
            keep_rows=0 if target.drop_rows else 1,
        )
    )
