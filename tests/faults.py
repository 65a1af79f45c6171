"""What the tests of faults share: two databases, each behind a proxy, and what has to hold after every fault."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tests.acceptance.test_copy import INDEXES, OURS, STANDING, wait_until
from tests.data import content
from tests.proxy import Proxy
from tests.support import Database, Outcome, environment, pipeline, start

# Some 5 MB, in slices of 1 MiB.
ROWS, DIMENSIONS, TEXT_BYTES = 2000, 64, 2000
SIDES = ("legacy", "main")
COPY = ("copy", "--slice-size", "1", "--json")
MARKS = "SELECT ordinal, finished_at FROM pipeline.slice WHERE finished_at IS NOT NULL"
# The message that sets a slice's mark and commits.
MARK_AND_COMMIT = rb"finished_at.*COMMIT\s*\x00"
LEFT = """SELECT application_name, state, wait_event, backend_start::text, state_change::text, left(query, 200)
    FROM pg_stat_activity WHERE application_name LIKE 'pipeline%' AND datname = current_database()"""


class Bench:
    """Two databases, a proxy before each, and the environment of a copy that goes through both."""

    def __init__(self, legacy: Database, main: Database, stack: ExitStack) -> None:
        self.databases = {"legacy": legacy, "main": main}
        self.proxies = {
            side: stack.enter_context(Proxy(database.server.host, database.server.port))
            for side, database in self.databases.items()
        }
        self.legacy, self.main = legacy, main

    def env(self, **more: str) -> dict[str, str]:
        legacy, main = self.proxies["legacy"], self.proxies["main"]
        return environment(legacy=self.legacy, main=self.main, EMBEDDING_DIMENSIONS=str(DIMENSIONS)) | {
            "PGVECTOR_HOST": legacy.host,
            "PGVECTOR_PORT": str(legacy.port),
            "DB_HOST": main.host,
            "DB_PORT": str(main.port),
            **more,
        }

    def copy(self, *more: str, **variables: str) -> Outcome:
        return pipeline(*COPY, *more, env=self.env(**variables))

    def begin(self, *more: str, **variables: str) -> "subprocess.Popen[str]":
        return start(*COPY, *more, env=self.env(**variables))

    def marks(self) -> set[tuple[object, ...]]:
        return set(self.main.rows(MARKS))

    def backends(self, side: str) -> list[int]:
        """Return the server processes of the workers on one side."""
        return [
            pid
            for (pid,) in self.databases[side].rows(
                "SELECT pid FROM pg_stat_activity"
                " WHERE application_name LIKE 'pipeline run%' AND datname = current_database()"
            )
        ]

    def copying(self, side: str) -> list[int]:
        """Return the workers' server processes that are inside a COPY, waiting for the other end."""
        return [
            pid
            for (pid,) in self.databases[side].rows(
                "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'pipeline run%'"
                " AND datname = current_database() AND state = 'active' AND query LIKE '%COPY%'"
                " AND wait_event IN ('ClientRead', 'ClientWrite')"
            )
        ]

    def begin_one_slice(self, side: str, *more: str) -> "tuple[subprocess.Popen[str], int]":
        """Start a copy of one large, slow slice; return it, and the server process that is in the middle of it."""
        self._set_rate(2_000_000)
        process = self.begin("--workers", "1", "--slice-size", "64", *more)
        found: list[int] = []

        def look() -> bool:
            # Kept, since it may not wait at the next look.
            found.extend(self.copying(side))
            return bool(found)

        wait_until(look)
        return process, found[0]

    def wait_for_quiet(self) -> None:
        try:
            wait_until(lambda: all(database.value(OURS) == 0 for database in self.databases.values()))
        except AssertionError as error:
            left = [database.rows(LEFT) for database in self.databases.values()]
            raise AssertionError(f"sessions of ours were left behind: {left}") from error

    def check_books(self) -> None:
        """Whatever happened: what the ledger says is there is there, and nothing else."""
        brought, there = self.main.rows(
            "SELECT (SELECT coalesce(sum(s.rows), 0)::int8 FROM pipeline.slice s"
            "        WHERE s.run_id = (SELECT max(id) FROM pipeline.run))"
            " + (SELECT coalesce(sum(reconciled_rows), 0)::int8 FROM pipeline.run"
            "    WHERE id = (SELECT max(id) FROM pipeline.run)),"
            " (SELECT count(*) FROM public.embeddings)"
        )[0]
        assert brought == there, f"the books say {brought} rows, the table has {there}"

    def check_done(self) -> None:
        """Every row is there once and equal, every index stands, nobody of ours is left."""
        self.wait_for_quiet()
        self.check_books()
        assert content(self.main) == content(self.legacy)
        assert self.main.rows(INDEXES) == STANDING

    def begin_slowly(self, *more: str, **variables: str) -> "subprocess.Popen[str]":
        """Start a copy that takes some seconds, and wait for its first slice."""
        self._set_rate(2_000_000)
        process = self.begin(*more, **variables)
        wait_until(lambda: bool(self.marks()))
        return process

    def hurry(self) -> None:
        """Take the brake off."""
        self._set_rate(None)

    def _set_rate(self, rate: float | None) -> None:
        # Of both: before the one that is behind a slow one, buffers may grow until a whole slice is in them.
        for proxy in self.proxies.values():
            proxy.rate = rate


@contextmanager
def role(database: Database, name: str, options: str, *settings: str) -> Iterator[Database]:
    """Make a role with options and settings of its own, for as long as this lasts."""
    database.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'a-password' {options}")
    try:
        for setting in settings:
            database.execute(f"ALTER ROLE {name} SET {setting}")
        yield database.as_role(name, "a-password")
    finally:
        for statement in (f"REASSIGN OWNED BY {name} TO postgres", f"DROP OWNED BY {name}", f"DROP ROLE {name}"):
            database.execute(statement)
