"""A move of one table between two databases, for the tests of what a table may look like."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from psycopg2 import sql

from tests.support import Database, Outcome, environment, pipeline, run


@dataclass(frozen=True, kw_only=True)
class Move:
    """Two databases, the table that is moved from one to the other, and the environment for it."""

    legacy: Database
    main: Database
    table: str
    env: dict[str, str]

    def copy(self, *more: str) -> Outcome:
        return pipeline("copy", *more, env=self.env)

    def verify(self, *more: str) -> Outcome:
        """Verify what a copy has to do with; the ladder's other rungs have tests of their own."""
        return pipeline("verify", "--json", *(more or ("--check", "rows", "--check", "parity")), env=self.env)

    def copy_and_verify(self, *more: str) -> Any:
        done = self.copy("--json", *more).expect(0).json["copy"]
        self.verify().expect(0)
        return done

    def finds(self, kind: str, key: str) -> None:
        """Check that verify finds one difference, and names it."""
        found = self.verify("--check", "rows", "--check", "parity", "--settle", "0").expect(3)
        figures = {check["name"]: check for check in found.json["checks"]}["digests"]["figures"]
        (one,) = figures["keys"]
        assert (one["kind"], one["key"], figures["differing_rows"]) == (kind, key, 1)

    @contextmanager
    def copy_held(self, *more: str) -> Iterator[None]:
        """Start a copy that waits before its first row while the block runs, and see it to its end."""
        with ThreadPoolExecutor(1) as aside:
            with self.main.cursor() as blocker:
                blocker.execute(f"LOCK TABLE {self.table} IN SHARE MODE")
                copying = aside.submit(self.copy, "--json", *more)
                deadline = time.monotonic() + 20
                while not self.main.value("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                    late = time.monotonic() > deadline
                    assert not late and not copying.done(), "the copy did not come to its first row"
                    time.sleep(0.01)
                yield
            assert copying.result().expect(0).json["copy"]["settled"]


def new_move(
    legacy: Database,
    main: Database,
    legacy_sql: str | sql.Composable,
    main_sql: str | sql.Composable,
    table: str = "embeddings",
    extension: str = "public",
    **env: str,
) -> Move:
    """Make both tables, and the ledger unless it is there; with an empty ``main_sql`` Alembic makes main's table."""
    for database, statements in ((legacy, legacy_sql), (main, main_sql)):
        if extension != "public":
            database.execute(f"CREATE SCHEMA {extension}")
        database.execute(f"CREATE EXTENSION IF NOT EXISTS vector SCHEMA {extension}")
        if statements:
            database.execute(statements)
    variables = environment(legacy=legacy, main=main, **{"EMBEDDING_DIMENSIONS": "3", "PGVECTOR_TABLE": table, **env})
    if main.value("SELECT to_regclass('pipeline.run') IS NULL"):
        adopt = ("-x", "adopt=yes") if main_sql else ()
        run("alembic", *adopt, "upgrade", "head", env=variables).expect(0)
    return Move(legacy=legacy, main=main, table=table, env=variables)
