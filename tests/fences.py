"""What the tests of the fence share: a table, a session to it, and writers who do not know of any pass."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

import psycopg2
import pytest

from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Session
from pipeline.postgres.failures import FENCE_STATE
from pipeline.postgres.fence_sql import Fence
from pipeline.postgres.tables import Table, describe
from pipeline.settings import TableMapping
from tests.data import TABLE_SQL
from tests.preflights import endpoint
from tests.support import Database

# Whatever a name of a database may hold.
MESSAGE = "public.embeddings isn't written here any more: it's on \"main\" (a@b:5432/ñ), 100%s \\ sure"
FENCE = Fence(message=MESSAGE, through="cutover-7")
GUARD = Fence(message="public.embeddings is being filled by the pipeline", through="pipeline")
INSERT = "INSERT INTO public.embeddings (content) VALUES ('new')"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A table on a server, and what the pipeline would reach it by."""

    database: Database
    crew: Crew
    session: Session

    @property
    def table(self) -> Table:
        return describe(self.session, TableMapping())

    @property
    def count(self) -> int:
        return int(self.database.value("SELECT count(*) FROM public.embeddings"))

    @contextmanager
    def as_pipeline(self, through: str | None) -> Iterator[Session]:
        """Yield a session of the pipeline with that pass."""
        with Session(replace(self.session.endpoint, through=through), "test") as session:
            yield session


@contextmanager
def place_at(database: Database, table_sql: str = TABLE_SQL.format(3)) -> Iterator[Place]:
    """Make the table with three rows, as a superuser, and yield it."""
    database.execute("CREATE EXTENSION IF NOT EXISTS vector")
    database.execute(table_sql)
    database.execute(
        "INSERT INTO public.embeddings (content, embedding) SELECT 'old', '[1,2,3]' FROM generate_series(1, 3)"
    )
    with Crew() as crew, Session(endpoint(database, "legacy"), "test") as session:
        yield Place(database=database, crew=crew, session=session)


@contextmanager
def refused(message: str = MESSAGE) -> Iterator[None]:
    """Expect that a fence refuses what is done inside, in its own words."""
    with pytest.raises(psycopg2.Error) as caught:
        yield
    assert caught.value.pgcode == FENCE_STATE
    assert caught.value.diag.message_primary == message
    assert "pipeline status" in str(caught.value.diag.message_hint)


@contextmanager
def writer(database: Database, name: str = "app") -> Iterator[psycopg2.extensions.cursor]:
    """Yield a cursor of somebody who says BEGIN and COMMIT himself."""
    with closing(database.connect()) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SELECT set_config('application_name', %s, false)", (name,))
            yield cursor


def objects(database: Database) -> list[tuple[object, ...]]:
    """Return everything in the catalog that a fence could leave behind."""
    return database.rows(
        "SELECT 'trigger', tgrelid::regclass::text, tgname, tgenabled::text, encode(tgargs, 'hex') FROM pg_trigger"
        " UNION ALL SELECT 'function', oid::regprocedure::text, prosrc, '', '' FROM pg_proc WHERE oid >= 16384"
        " UNION ALL SELECT 'relation', oid::regclass::text, relkind::text, relacl::text, '' FROM pg_class"
        " WHERE oid >= 16384 UNION ALL SELECT 'schema', nspname, nspacl::text, '', '' FROM pg_namespace"
        " UNION ALL SELECT 'depends', classid::text, objid::text, refclassid::text, refobjid::text FROM pg_depend"
        " WHERE classid <> 'pg_constraint'::regclass ORDER BY 1, 2, 3, 4, 5"
    )
