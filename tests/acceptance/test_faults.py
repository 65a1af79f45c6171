"""What networks, servers and administrators do to a copy: it goes on, or stops with a reason and can be resumed."""

import os
import random
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from pipeline.errors import UnreachableError
from pipeline.failpoints import NAMES
from pipeline.postgres.database import Session
from tests.acceptance.test_copy import INDEXES, OURS, STANDING, finish, wait_until
from tests.data import content, fill_generated
from tests.integration.test_changes import endpoint
from tests.proxy import Direction, How, Proxy
from tests.support import Database, Outcome, environment, pipeline, start

# Some 5 MB, in slices of 1 MiB.
ROWS, DIMENSIONS, TEXT_BYTES = 2000, 64, 2000
SIDES = ("legacy", "main")
COPY = ("copy", "--slice-size", "1", "--json")
MARKS = "SELECT ordinal, finished_at FROM pipeline.slice WHERE finished_at IS NOT NULL"
# The message that sets a slice's mark and commits.
MARK_AND_COMMIT = rb"finished_at.*COMMIT\s*\x00"


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

    def wait_for_quiet(self) -> None:
        wait_until(lambda: all(database.value(OURS) == 0 for database in self.databases.values()))

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
        self.proxies["main"].rate = 2_000_000
        process = self.begin(*more, **variables)
        wait_until(lambda: bool(self.marks()))
        return process

    def hurry(self) -> None:
        """Take the brake off."""
        self.proxies["main"].rate = None


@pytest.fixture
def bench(
    legacy: Database, new_database: Callable[..., Database], main_template: Callable[[int], str]
) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(legacy, new_database("18", main_template(DIMENSIONS)), stack)


@pytest.fixture
def full(bench: Bench) -> Bench:
    fill_generated(bench.legacy, ROWS, DIMENSIONS, TEXT_BYTES)
    return bench


@pytest.fixture
def large(bench: Bench) -> Bench:
    """Return a bench whose table does not fit into the buffers on the way."""
    fill_generated(bench.legacy, 3 * ROWS, DIMENSIONS, 2 * TEXT_BYTES)
    return bench


@pytest.mark.parametrize("name", NAMES)
def test_kill_9_at_each_point_leaves_what_the_next_copy_goes_on_from(name: str, bench: Bench) -> None:
    with closing(bench.legacy.connect()) as early:
        # While this transaction is open every row below counts as changed since, so a pass has work.
        early.cursor().execute("SELECT pg_current_xact_id()")
        fill_generated(bench.legacy, ROWS, DIMENSIONS, TEXT_BYTES)
        bench.main.execute("CREATE INDEX by_number ON public.embeddings ((metadata ->> 'n'))")
        bench.legacy.execute("UPDATE public.embeddings SET content = 'x' WHERE id = md5('row17')::uuid")
        if name == "before_commit":
            # That point lies on the way of a slice whose first try was lost.
            bench.proxies["main"].cut_at(MARK_AND_COMMIT, "before")
        killed = bench.begin(PIPELINE_FAILPOINT=name, PIPELINE_TESTING="1")
        assert finish(killed).code == -signal.SIGKILL, "the point was not passed"
    bench.wait_for_quiet()
    bench.check_books()
    marks = bench.marks()
    assert marks or name not in ("after_commit", "before_loaded")
    bench.copy().expect(0)
    assert marks <= bench.marks(), "a finished slice was done again"
    bench.wait_for_quiet()
    bench.check_books()
    assert content(bench.main) == content(bench.legacy)
    assert bench.main.rows(INDEXES) == [("by_number", True), *STANDING]
    pipeline("verify", env=bench.env()).expect(0)


def test_failpoints_are_inert_outside_a_test(full: Bench) -> None:
    full.copy(PIPELINE_FAILPOINT="after_lease:kill").expect(0)
    full.check_done()


def test_unknown_failpoint_is_refused(full: Bench) -> None:
    assert "after_lease" in full.copy(PIPELINE_FAILPOINT="nowhere", PIPELINE_TESTING="1").expect(2).err


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("side", SIDES)
def test_connection_cut_in_the_middle_of_a_slice_is_made_anew(side: str, how: How, full: Bench) -> None:
    cut = full.proxies[side].cut_after(700_000, "down" if side == "legacy" else "up", how=how, only=b"pipeline run")
    done = full.copy().expect(0)
    assert cut.done
    assert done.json["copy"]["retries"] == 1
    assert "SystemError" not in done.err
    assert "Exception ignored" not in done.err
    full.check_done()


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize(("moment", "attempts"), [("before", 2), ("after", 1)])
def test_lost_answer_to_a_commit_is_settled_by_the_mark(moment: str, attempts: int, how: How, full: Bench) -> None:
    cut = full.proxies["main"].cut_at(MARK_AND_COMMIT, "before" if moment == "before" else "after", how=how)
    done = full.copy("--workers", "1").expect(0).json["copy"]
    assert cut.done
    assert done["retries"] == 1
    # Where the lost COMMIT was done the mark is the first try's.
    assert full.main.value("SELECT max(attempts) FROM pipeline.slice") == attempts
    full.check_done()


@pytest.mark.parametrize("side", SIDES)
def test_cut_after_exactly_n_bytes_loses_nothing_for_any_n(
    side: str, bench: Bench, new_database: Callable[..., Database], main_template: Callable[[int], str]
) -> None:
    seed = random.randrange(2**32)
    dice = random.Random(seed)
    fill_generated(bench.legacy, 100, DIMENSIONS, TEXT_BYTES)
    size = 100 * (TEXT_BYTES + 4 * DIMENSIONS)
    counts = [1, 40, 700, size, *(dice.randrange(100, size + 3000) for _ in range(4))]
    for count in counts:
        with ExitStack() as stack:
            once = Bench(bench.legacy, new_database("18", main_template(DIMENSIONS)), stack)
            bulk: Direction = "down" if side == "legacy" else "up"
            direction: Direction = bulk if count > 1000 or dice.random() < 0.5 else "down" if bulk == "up" else "up"
            once.proxies[side].cut_after(count, direction, only=b"pipeline run")
            done = once.copy()
            assert done.code == 0, f"seed {seed}, cut after {count} bytes {direction}: {done.err}"
            once.check_done()


def test_latency_changes_nothing(full: Bench) -> None:
    for proxy in full.proxies.values():
        proxy.latency = 0.02
    full.copy().expect(0)
    full.check_done()


@pytest.mark.parametrize("side", SIDES)
def test_server_that_is_away_for_a_while_is_waited_for(side: str, full: Bench) -> None:
    process = full.begin_slowly("--deadline", "30")
    full.proxies[side].refuse()
    assert full.proxies[side].cut()
    time.sleep(1.5)
    full.hurry()
    full.proxies[side].allow()
    done = finish(process).expect(0)
    assert "try 2" in done.err
    full.check_done()


@pytest.mark.parametrize("side", SIDES)
def test_server_that_stays_away_ends_the_copy_resumable(side: str, full: Bench) -> None:
    process = full.begin_slowly("--deadline", "2")
    full.proxies[side].refuse()
    full.proxies[side].cut()
    ended = finish(process, timeout=20).expect(5)
    assert f"error: {side}" in ended.err
    full.wait_for_quiet()
    full.check_books()
    full.proxies[side].allow()
    full.hurry()
    full.copy().expect(0)
    full.check_done()


@pytest.mark.parametrize("side", SIDES)
def test_backend_that_hangs_is_given_up(side: str, large: Bench) -> None:
    process = large.begin_slowly("--stall", "2", "--workers", "1")
    hung = large.backends(side)
    assert hung
    for pid in hung:
        os.kill(pid, signal.SIGSTOP)
    try:
        # A new connection: the old one was given up.
        wait_until(lambda: bool(set(large.backends(side)) - set(hung)))
    finally:
        for pid in hung:
            os.kill(pid, signal.SIGCONT)
    large.hurry()
    done = finish(process).expect(0)
    assert re.search(rf"{side} .*: no byte moved for \d+ seconds", done.err), done.err
    large.check_done()


@pytest.mark.parametrize("side", SIDES)
def test_network_that_swallows_everything_is_noticed(side: str, large: Bench) -> None:
    process = large.begin_slowly("--stall", "2")
    large.proxies[side].swallow()
    time.sleep(1)
    large.proxies[side].hear()
    large.hurry()
    done = finish(process).expect(0)
    assert f"{side} (" in done.err
    assert "no byte moved for" in done.err
    large.check_done()


def test_network_that_goes_on_swallowing_ends_the_copy(full: Bench) -> None:
    process = full.begin_slowly("--stall", "1", "--deadline", "1")
    full.proxies["main"].swallow()
    finish(process, timeout=30).expect(5)
    full.proxies["main"].hear()
    full.proxies["main"].cut()
    full.hurry()
    full.copy().expect(0)
    full.check_done()


def test_one_that_holds_a_lock_for_too_long_is_named(full: Bench) -> None:
    with full.main.cursor() as blocker:
        blocker.execute("SELECT pg_backend_pid()")
        (holder,) = blocker.fetchone() or (0,)
        process = full.begin_slowly("--deadline", "3")
        full.hurry()
        blocker.execute("LOCK TABLE public.embeddings IN SHARE MODE")
        ended = finish(process).expect(5)
    assert f"a lock was waited for in vain; it is held by pid {holder} (postgres, idle in transaction)" in ended.err
    full.copy().expect(0)
    full.check_done()


@pytest.mark.parametrize("side", SIDES)
def test_cancelled_statement_stops_the_copy_resumable(side: str, large: Bench) -> None:
    process = large.begin_slowly("--workers", "1")
    # Between two slices there is nothing to cancel.
    while process.poll() is None:
        for pid in large.backends(side):
            large.databases[side].execute("SELECT pg_cancel_backend(%s)", pid)
        time.sleep(0.05)
    ended = finish(process).expect(1)
    assert f"{side} (" in ended.err
    assert "canceling statement due to user request" in ended.err
    large.wait_for_quiet()
    large.check_books()
    large.hurry()
    large.copy().expect(0)
    large.check_done()


TIMEOUTS = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "transaction_timeout")


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


def test_tiny_timeouts_of_the_role_do_not_reach_the_copy(full: Bench) -> None:
    settings = [f"{name} = '30ms'" for name in TIMEOUTS] + ["idle_session_timeout = '300ms'"]
    # Release 16 has no transaction_timeout.
    older = [setting for setting in settings if "transaction_timeout" not in setting or "idle" in setting]
    with (
        role(full.legacy, "hurried", "SUPERUSER", *older) as legacy,
        role(full.main, "hurried", "SUPERUSER", *settings) as main,
        ExitStack() as stack,
    ):
        hurried = Bench(legacy, main, stack)
        for proxy in hurried.proxies.values():
            proxy.rate = 5_000_000
        hurried.copy().expect(0)
        full.check_done()


def test_role_with_two_connections_copies_with_fewer_workers(full: Bench) -> None:
    with (
        role(full.legacy, "narrow", "CONNECTION LIMIT 2") as legacy,
        role(full.main, "narrow", "CONNECTION LIMIT 2") as main,
        ExitStack() as stack,
    ):
        full.legacy.execute("GRANT SELECT ON public.embeddings TO narrow")
        for statement in (
            "GRANT CREATE ON SCHEMA public TO narrow",
            "ALTER TABLE public.embeddings OWNER TO narrow",
            "GRANT USAGE ON SCHEMA pipeline TO narrow",
            "GRANT ALL ON ALL TABLES IN SCHEMA pipeline TO narrow",
            "GRANT ALL ON ALL SEQUENCES IN SCHEMA pipeline TO narrow",
        ):
            full.main.execute(statement)
        done = Bench(legacy, main, stack).copy("--workers", "4", "--deadline", "20").expect(0)
        assert "a worker less" in done.err
        full.check_done()


def test_target_that_becomes_read_only_stops_the_copy_with_the_reason(full: Bench) -> None:
    process = full.begin_slowly()
    full.main.execute(f"ALTER DATABASE {full.main.name} SET default_transaction_read_only = on")
    for pid in full.backends("main"):
        full.main.execute("SELECT pg_terminate_backend(%s)", pid)
    full.hurry()
    ended = finish(process, timeout=20)
    assert ended.code == 4, ended.err
    assert "takes no writes" in ended.err
    assert "read-only mode" in ended.err
    full.main.execute(
        f"SET TRANSACTION READ WRITE; ALTER DATABASE {full.main.name} RESET default_transaction_read_only"
    )
    full.check_books()
    full.copy().expect(0)
    full.check_done()


def test_marked_slices_survive_a_crash_where_the_role_commits_asynchronously(full: Bench) -> None:
    with (
        role(full.main, "hasty", "SUPERUSER", "synchronous_commit = off") as main,
        ExitStack() as stack,
    ):
        hasty = Bench(full.legacy, main, stack)
        for proxy in hasty.proxies.values():
            proxy.rate = 4_000_000
        process = hasty.begin("--workers", "1")
        wait_until(lambda: len(full.marks()) >= 2)
        marks = full.marks()
        full.main.server.restart("immediate")
        assert marks <= full.marks()
        assert finish(process).code in (0, 5)
        hasty.copy().expect(0)
        assert marks <= full.marks()
        full.check_done()


@contextmanager
def small_disk(database: Database, folder: Path, size: str) -> Iterator[Path]:
    """Put the table onto a disk of its own, so small that it does not fit."""
    folder.parent.chmod(0o711)
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("a small disk takes the right to mount one")
    try:
        owner = database.server.data.stat()
        os.chown(folder, owner.st_uid, owner.st_gid)
        with closing(database.connect()) as connection:
            connection.autocommit = True
            connection.cursor().execute("CREATE TABLESPACE small LOCATION %s", (str(folder),))
        try:
            database.execute("ALTER TABLE public.embeddings SET TABLESPACE small")
            yield folder
        finally:
            with closing(database.connect()) as connection:
                connection.autocommit = True
                connection.cursor().execute("DROP TABLE public.embeddings")
                connection.cursor().execute("DROP TABLESPACE small")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_stops_the_copy_and_a_larger_one_lets_it_go_on(full: Bench) -> None:
    with (
        tempfile.TemporaryDirectory() as root,
        small_disk(full.main, Path(root) / "disk", "3m") as disk,
    ):
        ended = full.copy("--workers", "1", "--deadline", "30").expect(1)
        assert "error: main (" in ended.err
        assert "the disk is full" in ended.err
        assert "free space, then run the command again" in ended.err
        full.wait_for_quiet()
        full.check_books()
        marks = full.marks()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        full.copy().expect(0)
        assert marks <= full.marks()
        full.check_done()


def test_lost_connection_is_told_of_the_side_that_was_lost(legacy: Database, empty_main: Database) -> None:
    with (
        Session(endpoint(legacy, "legacy"), "test") as source,
        Session(endpoint(empty_main, "main"), "test") as target,
    ):
        with (
            pytest.raises(UnreachableError, match=r"legacy .*the connection was lost"),
            source.transaction() as mine,
            target.transaction(),
        ):
            legacy.execute("SELECT pg_terminate_backend(%s)", source.backend)
            mine.execute("SELECT 1")
        assert target.rows("SELECT 1") == [(1,)]
