"""What may happen to the process of a copy: killed, stopped or halted anywhere, the next one goes on."""

import signal
import subprocess
import sys
from contextlib import closing

import pytest

from pipeline.failpoints import NAMES
from tests.acceptance.test_copy import INDEXES, OURS, STANDING, finish, wait_until
from tests.data import content, fill_generated
from tests.faults import DIMENSIONS, MARK_AND_COMMIT, ROWS, TEXT_BYTES, Bench
from tests.support import Database, environment, pipeline, start

# An index on it is built for as long as the table is long: some minutes, in steps that can be interrupted.
SLOWLY = """CREATE OR REPLACE FUNCTION public.slowly(value text, seconds float8) RETURNS text
    LANGUAGE plpgsql IMMUTABLE AS 'BEGIN PERFORM pg_catalog.pg_sleep(seconds); RETURN value; END'"""
QUICKLY = """CREATE OR REPLACE FUNCTION public.slowly(value text, seconds float8) RETURNS text
    LANGUAGE sql IMMUTABLE AS 'SELECT value'"""
BUILDING = "SELECT pid FROM pg_stat_activity WHERE query LIKE '%CREATE INDEX slow%' AND wait_event = 'PgSleep'"


# A row has to be set aside before that point is passed (test_quarantine kills there); the last two are not a copy's.
@pytest.mark.parametrize("name", [name for name in NAMES[: NAMES.index("after_compared")] if name != "in_quarantine"])
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
    pipeline("verify", "--check", "rows", "--check", "parity", env=bench.env()).expect(0)


def test_failpoints_are_inert_outside_a_test(full: Bench) -> None:
    full.copy(PIPELINE_FAILPOINT="after_lease:kill").expect(0)
    full.check_done()


def test_unknown_failpoint_is_refused(full: Bench) -> None:
    assert "after_lease" in full.copy(PIPELINE_FAILPOINT="nowhere", PIPELINE_TESTING="1").expect(2).err


def begin_index_build(full: Bench, seconds: float, *more: str) -> "subprocess.Popen[str]":
    """Start a copy, and wait until it builds an index that takes ``seconds`` a row."""
    full.main.execute(SLOWLY)
    full.main.execute(f"CREATE INDEX slow ON public.embeddings (public.slowly(md5(content), {seconds}))")
    process = full.begin(*more)
    wait_until(lambda: bool(full.main.rows(BUILDING)))
    return process


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_signal_in_an_index_build_ends_it_on_the_server_too(number: signal.Signals, code: int, full: Bench) -> None:
    process = begin_index_build(full, 0.1)
    process.send_signal(number)
    assert finish(process, timeout=10).code == code
    # Left to itself the statement would take minutes.
    full.wait_for_quiet()
    full.check_books()
    full.main.execute(QUICKLY)
    full.copy().expect(0)
    full.wait_for_quiet()
    assert full.main.rows(INDEXES) == [*STANDING, ("slow", True)]
    assert content(full.main) == content(full.legacy)


def test_index_build_that_is_at_work_is_not_taken_for_one_that_hangs(bench: Bench) -> None:
    fill_generated(bench.legacy, 10, DIMENSIONS)
    process = begin_index_build(bench, 0.3, "--stall", "0.5")
    done = finish(process).expect(0)
    assert "no byte moved" not in done.err
    assert bench.main.rows(INDEXES) == [*STANDING, ("slow", True)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_verify_and_its_statements(number: signal.Signals, code: int, full: Bench) -> None:
    full.copy().expect(0)
    with full.main.cursor() as blocker:
        blocker.execute("LOCK TABLE public.embeddings IN ACCESS EXCLUSIVE MODE")
        process = start("verify", env=full.env())
        wait_until(lambda: bool(full.main.value("SELECT count(*) FROM pg_locks WHERE NOT granted")))
        process.send_signal(number)
        assert finish(process, timeout=10).code == code
        wait_until(lambda: all(database.value(OURS) == 0 for database in full.databases.values()))
    pipeline("verify", "--check", "rows", "--check", "parity", env=full.env()).expect(0)


def test_copier_killed_behind_a_dead_network_is_taken_over(full: Bench) -> None:
    killed = full.begin_slowly()
    full.proxies["main"].swallow()
    killed.kill()
    finish(killed)
    left = full.backends("main")
    assert left, "the servers were told of the kill"
    full.hurry()
    full.proxies["main"].hear()
    # Its sessions live, so its lease holds.
    assert f"pid {killed.pid}" in full.copy().expect(6).err
    marks = full.marks()
    full.main.execute("UPDATE pipeline.run SET lease_until = clock_timestamp() - interval '1 second'")
    full.copy().expect(0)
    assert not set(left) & set(full.backends("main"))
    assert marks <= full.marks()
    # The connection of its lease is left to the keepalives.
    full.proxies["main"].cut()
    full.check_done()


def test_lease_whose_connection_is_lost_late_is_held_on_a_new_one(large: Bench) -> None:
    holders = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'pipeline lease%'"
    process = large.begin_slowly("--deadline", "1", "--workers", "1")
    # Longer after the last renewal than the deadline, which counts from the loss.
    renewed = "SELECT lease_until < clock_timestamp() + interval '28 seconds' FROM pipeline.run"
    wait_until(lambda: bool(large.main.value(renewed)))
    (lost,) = large.main.rows(holders)
    large.main.execute("SELECT pg_terminate_backend(%s)", *lost)
    wait_until(lambda: large.main.rows(holders) not in ([], [lost]))
    large.hurry()
    finish(process).expect(0)
    large.check_done()


FORKED = """
import os, sys
from pipeline.postgres.database import Session
from pipeline.settings import Settings
with Session(Settings.load().endpoint("main"), "test") as session:
    if os.fork() == 0:
        try:
            session.rows("SELECT 1")
        except RuntimeError as error:
            os._exit(17 if "fork" in str(error) else 1)
        os._exit(1)
    print(os.waitstatus_to_exitcode(os.wait()[1]), session.rows("SELECT 1"))
"""


def test_session_is_not_used_by_a_child(empty_main: Database) -> None:
    forked = subprocess.run(
        [sys.executable, "-c", FORKED],
        env=environment(main=empty_main),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert forked.stdout.strip() == "17 [(1,)]"
