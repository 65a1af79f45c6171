"""The extension vector: used where it is installed, else created.

It goes into the schema of ``-x extension_schema=NAME``, else ``extensions`` (where Supabase keeps
extensions) if there is one, else ``public``. A downgrade leaves it: other tables may use it.
"""

import re

import sqlalchemy as sa
from alembic import op

from pipeline import migration
from pipeline.errors import RefusedError, SettingsError
from pipeline.migration import Block, Composed, Literal

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# The first release with HNSW.
OLDEST = (0, 5, 0)
HOSTED_SCHEMA = "extensions"
DEFAULT_SCHEMA = "public"
EXTENSION_ELSEWHERE = """DECLARE
    found pg_catalog.name;
BEGIN
    SELECT n.nspname INTO found FROM pg_catalog.pg_extension e
    JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector';
    IF found <> {schema} THEN
        RAISE EXCEPTION USING MESSAGE = 'pgvector is installed in schema ' || found,
            HINT = 'write this script again with: alembic -x extension_schema=' || found;
    END IF;
END"""


def refuse_upgrade() -> None:
    """Raise RefusedError or SettingsError where the extension cannot be had as asked."""
    wanted = migration.target().extension_schema
    extension = migration.installed_extension(op.get_bind())
    if extension is None:
        _refuse_unavailable()
        if wanted is not None and not migration.has_schema(wanted):
            raise SettingsError(
                f"-x extension_schema: there is no schema {wanted}",
                f"create it: CREATE SCHEMA {migration.quoted(wanted)};",
            )
        return
    if wanted not in (None, extension.schema):
        raise RefusedError(
            f"pgvector is installed in schema {extension.schema} already, not in {wanted}",
            f"leave -x extension_schema out, or say -x extension_schema={extension.schema}",
        )
    if extension.version < OLDEST:
        raise RefusedError(
            f"pgvector {extension.text} has no HNSW index",
            "an administrator runs: ALTER EXTENSION vector UPDATE; (0.5.0 or later is needed)",
        )


def _refuse_unavailable() -> None:
    available = op.get_bind().execute(
        sa.text("SELECT default_version FROM pg_catalog.pg_available_extensions WHERE name = 'vector'")
    )
    version = available.scalar_one_or_none()
    if version is None:
        raise RefusedError(
            "pgvector is not installed on the server",
            "install its package there (postgresql-NN-pgvector, pgvector_NN), or choose a host that has it",
        )
    if tuple(int(part) for part in re.findall(r"\d+", version)) < OLDEST:
        raise RefusedError(
            f"the server offers pgvector {version}, which has no HNSW index",
            "install pgvector 0.5.0 or later on the server",
        )


def upgrade() -> None:
    if migration.is_offline():
        schema = migration.extension_schema()
        op.execute(Composed("CREATE EXTENSION IF NOT EXISTS vector WITH SCHEMA {schema}", schema=schema))
        op.execute(Block(EXTENSION_ELSEWHERE, schema=Literal(schema)))
        return
    refuse_upgrade()
    if migration.installed_extension(op.get_bind()) is not None:
        return
    hosted = HOSTED_SCHEMA if migration.has_schema(HOSTED_SCHEMA) else DEFAULT_SCHEMA
    schema = migration.target().extension_schema or hosted
    line = f"CREATE EXTENSION vector WITH SCHEMA {migration.quoted(schema)};"
    with migration.needing(f"an administrator of this database runs: {line}"):
        op.execute(Composed("CREATE EXTENSION vector WITH SCHEMA {schema}", schema=schema))


def downgrade() -> None:
    """Leave the extension: what else uses it is not known here."""
