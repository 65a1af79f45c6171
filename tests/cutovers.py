"""What the tests of the cutover share: a table copied and verified, an application's file, and writers on each side."""

import itertools
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psycopg2
import psycopg2.extensions
from psycopg2 import sql

from pipeline.demo.servers import Server
from pipeline.postgres.failures import FENCE_STATE
from tests.acceptance.test_copy import OURS, wait_until
from tests.data import fill_generated
from tests.support import Database, Outcome, clean_environment, pipeline

ROWS, DIMENSIONS = 300, 16
# Every test's cutover goes fast: nobody is there to be watched for long.
EXECUTE = ("cutover", "--execute", "--yes", "--watch", "0.5")
BACK = ("rollback", "--execute", "--yes")
SWITCHED_LINES = ("PGVECTOR_HOST", "PGVECTOR_PORT", "PGVECTOR_DB")
FENCED = "SELECT count(*) > 0 FROM pg_trigger WHERE tgrelid = 'public.embeddings'::regclass AND NOT tgisinternal"
# Fewer rows than the first are not deleted from, more than the second not added to.
LIVE_ROWS = 200, 400
INSERT = (
    "INSERT INTO public.embeddings (content, metadata, embedding) VALUES (%(content)s, %(metadata)s, %(embedding)s)"
)
AGAIN = (
    "INSERT INTO public.embeddings (id, content, metadata, embedding)"
    " VALUES (%(id)s, %(content)s, %(metadata)s, %(embedding)s) ON CONFLICT DO NOTHING"
)
UPDATE = (
    "UPDATE public.embeddings SET content = %(content)s, metadata = %(metadata)s, embedding = %(embedding)s"
    " WHERE id = %(id)s"
)
DELETE = "DELETE FROM public.embeddings WHERE id = %(id)s"
# The time is taken while the table's lock is held: a fence comes after it, or refuses.
RETURNING = " RETURNING id::text, content, metadata::text, embedding::text, clock_timestamp()"
Row = tuple[str, ...]
_numbers = itertools.count(1)


@dataclass(frozen=True, kw_only=True)
class Cutover:
    """Legacy and main, equal and verified, and the folder that ``pipeline`` is run in, with ``.env`` in it."""

    legacy: Database
    main: Database
    folder: Path

    @property
    def env_file(self) -> Path:
        return self.folder / ".env"

    def pipeline(self, *arguments: str, timeout: float = 120, **variables: str) -> Outcome:
        """Run ``pipeline`` in the folder; what it needs to know stands in the file alone."""
        env = clean_environment() | {"COLUMNS": "100"} | variables
        return pipeline(*arguments, env=env, cwd=self.folder, timeout=timeout)

    def killed_at(self, point: str, *arguments: str) -> Outcome:
        """Run ``pipeline`` up to a failpoint (``name@n``), where it is killed; see that it was."""
        done = self.pipeline(*arguments, PIPELINE_FAILPOINT=point, PIPELINE_TESTING="1")
        assert done.code == -9, f"{point} was not passed: it ended with {done.code}\n{done.out}\n{done.err}"
        return done

    def wait_for_quiet(self) -> None:
        """Wait until the servers have seen that a killed process is gone."""
        wait_until(lambda: all(database.value(OURS) == 0 for database in (self.legacy, self.main)))

    def verify(self, *more: str) -> Outcome:
        """Find both sides equal, by everything that a cutover wants to be known."""
        return self.pipeline("verify", *more).expect(0)


def env_text(legacy: Database, main: Database, dimensions: int = DIMENSIONS) -> str:
    """Return a file as an application has it: both addresses, remarks, and a mock that is on."""
    addresses = {"DB": main.variables("DB", "DB_NAME"), "PGVECTOR": legacy.variables("PGVECTOR", "PGVECTOR_DB")}
    lines = ["# the application", *_lines(addresses["DB"]), "", "# vectors", *_lines(addresses["PGVECTOR"])]
    lines += ["PGVECTOR_TABLE=embeddings", f"EMBEDDING_DIMENSIONS={dimensions}", "USE_MOCK_EMBEDDINGS=true  # for now"]
    return "\n".join(lines) + "\n"


def _lines(variables: dict[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in variables.items()]


@contextmanager
def new_cutover(
    servers: Callable[[str], Server],
    legacy_template: str,
    main_template: Callable[[int], str],
    folder: Path,
    *,
    rows: int = ROWS,
    dimensions: int = DIMENSIONS,
    fill: Callable[[Database], object] | None = None,
) -> Iterator[Cutover]:
    """Make both databases, copy and verify; all of it takes seconds, so one for a module where tests allow it.

    The arguments are the fixtures of those names, all of them the session's. ``fill`` makes and fills legacy's
    table instead of the generated rows. The databases are dropped afterwards; the folder stays.
    """
    with ExitStack() as stack:
        legacy = stack.enter_context(_made(servers("16"), legacy_template))
        main = stack.enter_context(_made(servers("18"), main_template(dimensions)))
        if fill is None:
            fill_generated(legacy, rows, dimensions)
        else:
            fill(legacy)
        bench = Cutover(legacy=legacy, main=main, folder=folder)
        bench.env_file.write_text(env_text(legacy, main, dimensions))
        bench.env_file.chmod(0o600)
        bench.pipeline("copy").expect(0)
        bench.verify()
        yield bench


@contextmanager
def _made(server: Server, template: str) -> Iterator[Database]:
    """Make a database, and drop it in the end, whoever is connected."""
    database = Database(server=server, name=f"cutover{next(_numbers)}")
    name = sql.Identifier(database.name)
    _administrate(server, sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(name, sql.Identifier(template)))
    try:
        yield database
    finally:
        _administrate(server, sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))


def _administrate(server: Server, statement: sql.Composable) -> None:
    with closing(Database(server=server, name="postgres").connect()) as connection:
        connection.autocommit = True
        connection.cursor().execute(statement)


def points_to(bench: Cutover, files: Sequence[Path] = ()) -> str:
    """Return which side the files, read as the application reads them, point to: ``legacy`` or ``main``."""
    text = "".join(path.read_text() for path in files or (bench.env_file,))
    found = {line.partition("=")[0]: line.partition("=")[2] for line in text.splitlines()}
    for side, database in (("legacy", bench.legacy), ("main", bench.main)):
        wanted = database.variables("PGVECTOR", "PGVECTOR_DB")
        if all(found[name] == wanted[name] for name in SWITCHED_LINES):
            return side
    raise AssertionError(f"the files point to neither side: {[found[name] for name in SWITCHED_LINES]}")


def rows(database: Database) -> dict[str, Row]:
    """Return every row by its key, in the server's own text."""
    found = database.rows("SELECT id::text, content, metadata::text, embedding::text FROM public.embeddings")
    return {key: tuple(row) for key, *row in found}


class Writer:
    """An application that writes to one side some hundred times a second, whatever it is told; a thread of its own."""

    def __init__(self, side: str, database: Database, journal: "Journal", seed: int) -> None:
        self.side, self._database, self._journal = side, database, journal
        self._dice = random.Random(f"{side} {seed}")
        self._stopped, self._working, self._idle = threading.Event(), threading.Event(), threading.Event()
        self.accepted = self.refused = 0
        self._thread = threading.Thread(target=self._run)
        self._working.set()
        self._thread.start()

    @property
    def tried(self) -> int:
        return self.accepted + self.refused

    def rest(self) -> None:
        """Write nothing until ``go_on``; nothing is under way on return."""
        self._working.clear()
        wait_until(self._idle.is_set)

    def go_on(self) -> None:
        self._idle.clear()
        self._working.set()

    def stop(self) -> None:
        self._stopped.set()
        self._working.set()
        self._thread.join()

    def wait_for(self, number: int, *, refused: bool = False) -> None:
        """Wait until so many more writes were accepted; with ``refused`` those count too that were not."""
        began, tried = self.accepted, self.tried
        wait_until(lambda: (self.tried - tried if refused else self.accepted - began) >= number)

    def _run(self) -> None:
        # What main's table takes before its guard stands would keep a cutover from beginning.
        while self.side == "main" and not self._stopped.is_set() and not self._database.value(FENCED):
            self._stopped.wait(0.02)
        with closing(self._database.connect()) as connection, connection.cursor() as cursor:
            connection.autocommit = True
            while not self._stopped.is_set():
                if not self._working.is_set():
                    self._idle.set()
                    self._working.wait()
                    continue
                self._write(cursor)

    def _write(self, cursor: psycopg2.extensions.cursor) -> None:
        statement, arguments = self._choose()
        try:
            cursor.execute("BEGIN")
            cursor.execute(statement + RETURNING, arguments)
            found = cursor.fetchall()
            cursor.execute("COMMIT")
        except psycopg2.Error as error:
            cursor.execute("ROLLBACK")
            if error.pgcode != FENCE_STATE:
                self._journal.errors.append(f"{self.side}: {error}")
            self.refused += 1
            self._stopped.wait(0.02)
        else:
            for key, *row, at in found:
                self._journal.accept(self.side, at, key, None if statement is DELETE else tuple(row))
            self.accepted += len(found)
            self._stopped.wait(self._dice.uniform(0, 0.008))

    def _choose(self) -> tuple[str, dict[str, object]]:
        live, gone = self._journal.keys()
        kinds = [UPDATE] * 5 + [INSERT] * (len(live) < LIVE_ROWS[1]) + [DELETE] * (len(live) > LIVE_ROWS[0])
        kind = self._dice.choice(kinds + [AGAIN] * bool(gone))
        key = self._dice.choice(gone if kind is AGAIN else live)
        text = f"{self.side} {self._dice.random()}"
        vector = [self._dice.uniform(0.1, 1) for _ in range(DIMENSIONS)]
        return kind, {"id": key, "content": text, "metadata": f'{{"by": "{text}"}}', "embedding": str(vector)}


class Journal:
    """What both sides have accepted, by their clocks, which are one machine's."""

    def __init__(self, database: Database) -> None:
        self._lock = threading.Lock()
        # The time of the last accepted write, None for what was there before; the row, None where it is deleted.
        self._last: dict[str, tuple[datetime | None, Row | None]] = {
            key: (None, row) for key, row in rows(database).items()
        }
        self._accepted: list[tuple[datetime, str]] = []
        self.errors: list[str] = []

    def accept(self, side: str, at: datetime, key: str, row: Row | None) -> None:
        with self._lock:
            self._accepted.append((at, side))
            known, _ = self._last.get(key, (None, None))
            if known is None or at > known:
                self._last[key] = (at, row)

    def keys(self) -> tuple[list[str], list[str]]:
        """Return the keys of rows that are there, and of those that were deleted."""
        with self._lock:
            return (
                [key for key, (_, row) in self._last.items() if row is not None],
                [key for key, (_, row) in self._last.items() if row is None],
            )

    def turns(self) -> list[str]:
        """Return which side accepted writes, and which one next: more turns than switches, and both did at once."""
        assert not self.errors, self.errors
        with self._lock:
            return [side for side, _ in itertools.groupby(side for _, side in sorted(self._accepted))]

    def check(self, database: Database) -> None:
        """Every accepted write is there once, with its last content; what was deleted is not."""
        wanted = {key: row for key, (_, row) in self._last.items() if row is not None}
        found = rows(database)
        lost = [key for key in wanted if found.get(key) != wanted[key]]
        more = [key for key in found if key not in wanted]
        assert not lost and not more, f"{len(lost)} lost or changed, {len(more)} too many: {lost[:3]}, {more[:3]}"
        assert database.value("SELECT count(*) FROM public.embeddings") == len(wanted)
