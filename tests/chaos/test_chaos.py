"""Random faults at random moments, with and without a writer at work: whatever happens, nothing is lost.

A run is made by its seed; ``make chaos SEED=n RUNS=1`` plays one again (as far as time allows it).
"""

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress

import psycopg2
import pytest

from pipeline.demo.servers import Server
from tests.acceptance.test_copy import STANDING, finish, wait_until
from tests.data import content, fill_generated
from tests.faults import SIDES, Bench
from tests.support import Database

ROWS, DIMENSIONS, TEXT_BYTES = 1500, 64, 2000
RUNS = int(os.environ.get("CHAOS_RUNS") or 2)
# Seconds after which no further run begins; RUNS then bounds nothing.
BUDGET = float(os.environ.get("CHAOS_BUDGET") or 0)
SEED = int(os.environ.get("CHAOS_SEED") or random.randrange(2**31))
DISTURBED_ATTEMPTS = 4
LAST_ATTEMPTS = 3
# Done, out of reach, busy, interrupted, terminated; killed, or a second signal while the interpreter ends.
EXPECTED_CODES = frozenset({0, 5, 6, 130, 143, -signal.SIGKILL, -signal.SIGINT, -signal.SIGTERM})
DEFINITIONS = "SELECT indexdef FROM pg_indexes WHERE tablename = 'embeddings' ORDER BY 1"


class Writer:
    """An application at work on legacy: changes of every kind, short and long transactions, some rolled back."""

    STATEMENTS = (
        "UPDATE public.embeddings SET content = 'new ' || %(n)s WHERE id = md5('row' || %(n)s)::uuid",
        "UPDATE public.embeddings SET metadata = '{\"k\": 1}' WHERE id = md5('row' || %(n)s)::uuid",
        "UPDATE public.embeddings SET embedding = embedding + embedding WHERE id = md5('row' || %(n)s)::uuid",
        "UPDATE public.embeddings SET id = gen_random_uuid() WHERE id = md5('row' || %(n)s)::uuid",
        "DELETE FROM public.embeddings WHERE id = md5('row' || %(n)s)::uuid",
        "INSERT INTO public.embeddings (id, content, metadata, embedding) SELECT gen_random_uuid(), 'added', metadata,"
        " embedding FROM public.embeddings WHERE id = md5('row' || %(n)s)::uuid",
        "INSERT INTO public.embeddings (id, content) VALUES (md5('row' || %(n)s)::uuid, 'again')"
        " ON CONFLICT DO NOTHING",
        "VACUUM public.embeddings",
    )

    def __init__(self, legacy: Database, seed: int) -> None:
        self._legacy = legacy
        self._dice = random.Random(seed)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=(span,)) for span in (1, 8)]
        for thread in self._threads:
            thread.start()

    def _write(self, statements: int) -> None:
        """Write until stopped; a server that goes down meanwhile is connected to again."""
        while not self._stop.is_set():
            with suppress(psycopg2.Error), closing(self._legacy.connect()) as connection:
                while not self._stop.is_set():
                    self._transaction(connection, self._dice.randint(1, statements))
            self._stop.wait(0.05)

    def _transaction(self, connection: psycopg2.extensions.connection, statements: int) -> None:
        with connection.cursor() as cursor:
            chosen = [self._dice.choice(self.STATEMENTS) for _ in range(statements)]
            connection.autocommit = chosen == [self.STATEMENTS[-1]]
            for statement in chosen:
                if statement is not self.STATEMENTS[-1] or connection.autocommit:
                    cursor.execute(statement, {"n": self._dice.randint(1, ROWS)})
                self._stop.wait(self._dice.uniform(0, 0.05 if statements == 1 else 0.3))
        if not connection.autocommit:
            if self._dice.random() < 0.3:
                connection.rollback()
            else:
                connection.commit()
        connection.autocommit = False

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


class Chaos:
    """One run: a copy that is disturbed some times and then left to end."""

    def __init__(self, seed: int, bench: Bench) -> None:
        self.seed = seed
        self.dice = random.Random(seed)
        self.bench = bench
        self.log: list[str] = []
        self.cancelled = False
        # The run whose rows were taken away again.
        self.emptied = -1

    def is_finished(self) -> bool:
        return bool(
            self.bench.main.value(
                "SELECT count(*) FROM pipeline.run WHERE id = %s AND id <> %s AND finished_at IS NOT NULL",
                self.latest_run(),
                self.emptied,
            )
        )

    def latest_run(self) -> int:
        return int(self.bench.main.value("SELECT coalesce(max(id), 0) FROM pipeline.run"))

    def play(self) -> None:
        definitions = self.bench.main.rows(DEFINITIONS)
        writer = Writer(self.bench.legacy, self.seed) if self.dice.random() < 0.6 else None
        try:
            for _ in range(DISTURBED_ATTEMPTS):
                self.attempt(disturbed=True)
                # A copy whose last answer was lost ends with 5, and is finished all the same.
                if self.is_finished():
                    if writer is None:
                        break
                    # It wrote after the last pass: begin again, with what is there now.
                    self.note("done with a writer at work, begun anew")
                    self.bench.main.execute("TRUNCATE public.embeddings")
                    self.emptied = self.latest_run()
        finally:
            if writer is not None:
                writer.stop()
        codes = []
        while (code := self.attempt(disturbed=False)) != 0:
            codes.append(code)
            self.expect(len(codes) < LAST_ATTEMPTS, f"left alone, it ended with {codes}")
        self.expect(not (what := self.difference()), what)
        self.expect(self.bench.main.rows(DEFINITIONS) == definitions, "the indexes differ")
        valid = self.bench.main.rows(
            "SELECT c.relname, i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
            " WHERE i.indrelid = 'public.embeddings'::regclass ORDER BY 1"
        )
        self.expect(valid == STANDING, f"indexes: {valid}")

    def difference(self) -> str:
        """Return how the two sides differ, in numbers and by a few keys; nothing where they are equal."""
        legacy, main = ({row[0]: row[1:] for row in content(self.bench.databases[side])} for side in SIDES)
        if legacy == main:
            return ""
        missing, extra = legacy.keys() - main.keys(), main.keys() - legacy.keys()
        changed = [key for key in legacy.keys() & main.keys() if legacy[key] != main[key]]
        columns = {place for key in changed for place in range(3) if legacy[key][place] != main[key][place]}
        versions = self.bench.legacy.rows(
            "SELECT id::text, xmin::text, ctid::text FROM public.embeddings WHERE id::text = ANY (%s) LIMIT 9",
            [*missing, *changed],
        )
        horizons = self.bench.main.rows("SELECT id, source_horizon FROM pipeline.run ORDER BY 1")
        return (
            f"missing on main {sorted(missing)[:3]}, too many there {sorted(extra)[:3]},"
            f" different {changed[:3]} in columns {columns}: {len(missing)}, {len(extra)} and {len(changed)};"
            f" versions on legacy {versions}, horizons {horizons}"
        )

    def attempt(self, disturbed: bool) -> int:
        """Run the copy once, to its end; check what has to hold after every end."""
        self.cancelled = False
        for proxy in self.bench.proxies.values():
            proxy.accepted = 0
            proxy.latency = self.dice.choice((0, 0, 0.001, 0.005)) if disturbed else 0
            proxy.rate = self.dice.choice((None, 3e6, 1e7)) if disturbed else None
        workers, deadline = str(self.dice.randint(1, 3)), str(self.dice.choice((1, 4)) if disturbed else 30)
        process = self.bench.begin("--workers", workers, "--deadline", deadline, "--stall", "2")
        self.note(f"copy --workers {workers} --deadline {deadline}")
        if disturbed:
            for _ in range(self.dice.randint(1, 3)):
                time.sleep(self.dice.choice((self.dice.uniform(0.2, 1.2), self.dice.uniform(0, 0.2))))
                if process.poll() is None:
                    self.disturb(process)
        try:
            done = finish(process, timeout=90)
        except subprocess.TimeoutExpired:
            process.kill()
            finish(process)
            self.fail("the copy did not end within 90 seconds")
        self.note(f"exit code {done.code}")
        self.log += [f"    {line}" for line in done.err.splitlines()]
        expected = EXPECTED_CODES | ({1} if self.cancelled else frozenset())
        self.expect(done.code in expected, f"exit code {done.code}")
        self.expect("Traceback" not in done.err and "Exception ignored" not in done.err, done.err)
        for proxy in self.bench.proxies.values():
            proxy.cut()
        try:
            self.bench.wait_for_quiet()
            if self.latest_run() != self.emptied:
                self.bench.check_books()
        except AssertionError as error:
            self.fail(str(error))
        return done.code

    def disturb(self, process: "subprocess.Popen[str]") -> None:
        side = self.dice.choice(SIDES)
        fault = self.dice.choice(
            (
                self.kill,
                self.kill,
                self.interrupt,
                self.pause,
                self.terminate_backends,
                self.terminate_backends,
                self.cancel_backend,
                self.cut,
                self.cut,
                self.swallow,
                self.refuse,
                self.crash,
            )
        )
        self.note(f"{fault.__name__} {side}")
        fault(process, side)

    def kill(self, process: "subprocess.Popen[str]", _side: str) -> None:
        process.kill()

    def interrupt(self, process: "subprocess.Popen[str]", _side: str) -> None:
        # Before it has connected the interpreter may still be importing, where signals are its own.
        wait_until(lambda: process.poll() is not None or any(p.accepted for p in self.bench.proxies.values()))
        process.send_signal(self.dice.choice((signal.SIGTERM, signal.SIGINT)))

    def pause(self, process: "subprocess.Popen[str]", _side: str) -> None:
        process.send_signal(signal.SIGSTOP)
        time.sleep(self.dice.uniform(0, 3))
        process.send_signal(signal.SIGCONT)

    def terminate_backends(self, _process: object, side: str) -> None:
        for pid in self.bench.backends(side):
            self.bench.databases[side].execute("SELECT pg_terminate_backend(%s)", pid)

    def cancel_backend(self, _process: object, side: str) -> None:
        for pid in self.bench.backends(side)[:1]:
            self.cancelled = True
            self.bench.databases[side].execute("SELECT pg_cancel_backend(%s)", pid)

    def cut(self, _process: object, side: str) -> None:
        self.bench.proxies[side].cut("rst" if self.dice.random() < 0.5 else "fin")

    def swallow(self, _process: object, side: str) -> None:
        self.bench.proxies[side].swallow()
        time.sleep(self.dice.uniform(0, 1))
        self.bench.proxies[side].hear()

    def refuse(self, _process: object, side: str) -> None:
        self.bench.proxies[side].refuse()
        self.bench.proxies[side].cut()
        time.sleep(self.dice.uniform(0, 2))
        self.bench.proxies[side].allow()

    def crash(self, _process: object, side: str) -> None:
        self.bench.databases[side].server.restart("immediate")

    def note(self, what: str) -> None:
        self.log.append(what)

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            self.fail(what)

    def fail(self, what: str) -> None:
        story = "\n  ".join(self.log)
        raise AssertionError(f"seed {self.seed} (make chaos SEED={self.seed} RUNS=1): {what}\n  {story}")


def runs() -> Iterator[int]:
    """Yield seeds for as long as the budget lasts."""
    began, seed = time.monotonic(), SEED
    while time.monotonic() - began < BUDGET if BUDGET else seed - SEED < RUNS:
        yield seed
        seed += 1


@pytest.fixture(scope="module")
def legacy_template(servers: Callable[[str], Server]) -> Iterator[str]:
    """Return a filled legacy database to make others from."""
    name = "chaos_template"
    template = Database(server=servers("16"), name=name)
    administrator = Database(server=servers("16"), name="postgres")
    with closing(administrator.connect()) as connection:
        connection.autocommit = True
        connection.cursor().execute(f"CREATE DATABASE {name}")
    template.execute("CREATE EXTENSION vector")
    fill_generated(template, ROWS, DIMENSIONS, TEXT_BYTES)
    yield name
    with closing(administrator.connect()) as connection:
        connection.autocommit = True
        connection.cursor().execute(f"DROP DATABASE {name}")


@pytest.mark.chaos
def test_random_faults_at_random_moments_lose_and_double_nothing(
    legacy_template: str, new_database: Callable[..., Database], main_template: Callable[[int], str]
) -> None:
    played = 0
    for seed in runs():
        with ExitStack() as stack:
            legacy = new_database("16", legacy_template)
            main = new_database("18", main_template(DIMENSIONS))
            Chaos(seed, Bench(legacy, main, stack)).play()
        played += 1
    assert played
