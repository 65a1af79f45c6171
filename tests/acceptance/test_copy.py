"""The copy as an operator runs it: a real process, real servers, real signals."""

import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable

import psycopg2
import pytest

from tests.data import become_generated, content, fill, load
from tests.support import Database, Outcome, environment, pipeline, start

INDEXES = (
    "SELECT c.relname, i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
    " WHERE i.indrelid = 'public.embeddings'::regclass ORDER BY 1"
)
STANDING = [("embeddings_embedding_hnsw", True), ("embeddings_pkey", True)]
OURS = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'pipeline%' AND datname = current_database()"
# Some 15 MB, in slices of 1 MiB.
ROWS, DIMENSIONS, TEXT_BYTES = 6000, 64, 2000


@pytest.fixture
def small(legacy: Database, new_database: Callable[..., Database], main_template: Callable[[int], str]) -> Database:
    """Return a main for vectors of 64 dimensions, with a legacy that fills a dozen slices of 1 MiB."""
    become_generated(legacy, ROWS, DIMENSIONS, TEXT_BYTES)
    return new_database("18", main_template(DIMENSIONS))


@pytest.fixture
def env(legacy: Database, small: Database) -> dict[str, str]:
    return environment(legacy=legacy, main=small, EMBEDDING_DIMENSIONS=str(DIMENSIONS))


def copy(env: dict[str, str], *more: str) -> Outcome:
    return pipeline("copy", "--from", "legacy", "--to", "main", "--slice-size", "1", *more, env=env)


def finish(process: "subprocess.Popen[str]", timeout: float = 60) -> Outcome:
    out, err = process.communicate(timeout=timeout)
    return Outcome(code=process.returncode, out=out, err=err)


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the awaited state did not come"
        time.sleep(0.01)


@pytest.mark.parametrize(("sets", "dimensions"), [(("nomic768", "google768"), 768), (("minilm384_docs",), 384)])
def test_real_embeddings_arrive_with_every_byte(
    sets: tuple[str, ...],
    dimensions: int,
    legacy: Database,
    new_database: Callable[..., Database],
    main_template: Callable[[int], str],
) -> None:
    main = new_database("18", main_template(dimensions))
    rows = fill(legacy, *map(load, sets))
    env = environment(legacy=legacy, main=main, EMBEDDING_DIMENSIONS=str(dimensions))
    done = copy(env, "--json").expect(0).json["copy"]
    assert (done["rows"], done["moved_rows"], done["settled"]) == (rows, rows, True)
    assert done["slices"] == done["moved_slices"] > 1
    assert content(main) == content(legacy)
    assert main.rows(INDEXES) == STANDING
    verified = pipeline("verify", "--check", "rows", "--check", "parity", "--json", env=env).expect(0).json
    assert [(check["name"], check["verdict"]) for check in verified["checks"]] == [
        ("counts", "pass"),
        ("digests", "pass"),
        ("parity", "pass"),
    ]


def test_copy_that_is_done_says_so_and_writes_no_row(legacy: Database, small: Database, env: dict[str, str]) -> None:
    copy(env).expect(0)
    before = small.rows("SELECT id, xmin::text FROM public.embeddings ORDER BY id")
    again = copy(env).expect(0)
    assert f"has copied all {ROWS:,} rows before" in again.out
    assert small.rows("SELECT id, xmin::text FROM public.embeddings ORDER BY id") == before
    assert copy(env, "--json").expect(0).json["copy"]["already_done"] is True


def test_legacy_is_only_read(legacy: Database, small: Database, env: dict[str, str]) -> None:
    def state() -> object:
        return legacy.rows(
            "SELECT (SELECT count(*) FROM pg_class), (SELECT array_agg(xmin::text ORDER BY id) FROM public.embeddings)"
        )

    reader = legacy.as_role("reader", "reader-password")
    legacy.execute("CREATE ROLE reader LOGIN PASSWORD 'reader-password'")
    try:
        legacy.execute("GRANT SELECT ON public.embeddings TO reader")
        before = state()
        limited = environment(legacy=reader, main=small, EMBEDDING_DIMENSIONS=str(DIMENSIONS))
        copy(limited).expect(0)
        pipeline("verify", "--check", "rows", "--check", "parity", env=limited).expect(0)
        assert state() == before
    finally:
        legacy.execute("DROP OWNED BY reader")
        legacy.execute("DROP ROLE reader")


def test_kill_9_at_random_moments_loses_and_doubles_nothing(
    legacy: Database, small: Database, env: dict[str, str]
) -> None:
    seed = random.randrange(2**32)
    dice = random.Random(seed)
    marks: dict[int, object] = {}
    kills = 0
    while kills < 20:
        process = start("copy", "--slice-size", "1", "--workers", "2", env=env)
        time.sleep(dice.uniform(0.15, 0.9))
        if process.poll() is not None:
            finish(process)
            if small.value("SELECT count(*) FROM pipeline.run WHERE finished_at IS NOT NULL"):
                small.execute("TRUNCATE public.embeddings")
                marks.clear()
                continue
        process.send_signal(signal.SIGKILL)
        finish(process)
        kills += 1
        # A backend that is inside its COMMIT when the process dies still ends it.
        wait_until(lambda: small.value(OURS) == 0 and legacy.value(OURS) == 0)
        if not small.value("SELECT count(*) FROM pipeline.run"):
            continue
        run = small.value("SELECT max(id) FROM pipeline.run")
        brought, there = small.rows(
            "SELECT (SELECT coalesce(sum(rows), 0)::int8 FROM pipeline.slice WHERE run_id = %s)"
            " + (SELECT reconciled_rows FROM pipeline.run WHERE id = %s),"
            " (SELECT count(*) FROM public.embeddings)",
            run,
            run,
        )[0]
        assert brought == there, f"seed {seed}: the books say {brought} rows, the table has {there}"
        now = dict(
            small.rows(
                "SELECT ordinal, finished_at FROM pipeline.slice WHERE run_id = %s AND finished_at IS NOT NULL", run
            )
        )
        again = [ordinal for ordinal, at in marks.items() if now.get(ordinal) != at]
        assert not again, f"seed {seed}: slices {again} were done twice"
        marks = now
    copy(env).expect(0)
    assert content(small) == content(legacy), f"seed {seed}"
    assert small.rows(INDEXES) == STANDING, f"seed {seed}"
    pipeline("verify", "--check", "rows", "--check", "parity", env=env).expect(0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_stops_within_two_seconds_and_the_next_copy_goes_on(
    number: signal.Signals, code: int, legacy: Database, small: Database, env: dict[str, str]
) -> None:
    with small.cursor() as blocker:
        # The workers' COPY waits for this lock: the hardest moment to stop at.
        process = start("copy", "--slice-size", "1", env=env)
        wait_until(lambda: bool(small.value("SELECT count(*) FROM pipeline.slice")))
        blocker.execute("LOCK TABLE public.embeddings IN SHARE MODE")
        wait_until(lambda: bool(small.value("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")))
        sent = time.monotonic()
        process.send_signal(number)
        stopped = finish(process).expect(code)
        assert time.monotonic() - sent < 2
    assert "run the same command again to go on" in stopped.err
    wait_until(lambda: small.value(OURS) == 0 and legacy.value(OURS) == 0)
    copy(env).expect(0)
    assert content(small) == content(legacy)


def test_resume_moves_no_finished_slice_again(legacy: Database, small: Database, env: dict[str, str]) -> None:
    interrupt_halfway(legacy, small, env)
    marks = small.rows("SELECT ordinal, finished_at FROM pipeline.slice WHERE finished_at IS NOT NULL")
    slices = small.value("SELECT count(*) FROM pipeline.slice")
    assert 0 < len(marks) < slices
    assert "interrupted" in pipeline("status", env=env).expect(0).out
    done = copy(env, "--json").expect(0).json["copy"]
    assert done["moved_slices"] == slices - len(marks)
    assert done["rows"] == ROWS
    assert set(marks) <= set(small.rows("SELECT ordinal, finished_at FROM pipeline.slice"))
    assert content(small) == content(legacy)


def interrupt_halfway(legacy: Database, main: Database, env: dict[str, str]) -> None:
    """Kill a copy after its first slices, while the next one waits for a lock."""
    process = start("copy", "--slice-size", "1", "--workers", "1", env=env)
    wait_until(lambda: bool(main.value("SELECT count(finished_at) FROM pipeline.slice")))
    with main.cursor() as blocker:
        blocker.execute("LOCK TABLE public.embeddings IN SHARE MODE")
        wait_until(lambda: bool(main.value("SELECT count(*) FROM pg_locks WHERE NOT granted")))
        process.kill()
        finish(process)
    wait_until(lambda: main.value(OURS) == 0 and legacy.value(OURS) == 0)


def test_index_is_restored_by_the_next_run_after_a_kill(legacy: Database, small: Database, env: dict[str, str]) -> None:
    definition = small.value("SELECT pg_get_indexdef('public.embeddings_embedding_hnsw'::regclass)")
    comment = "SELECT obj_description('public.embeddings_embedding_hnsw'::regclass, 'pg_class')"
    said = small.value(comment)
    small.execute("CREATE INDEX by_source ON public.embeddings ((metadata ->> 'n'))")
    small.execute("CREATE UNIQUE INDEX stays ON public.embeddings (id, content)")
    interrupt_halfway(legacy, small, env)
    assert [name for name, _ in small.rows(INDEXES)] == ["embeddings_pkey", "stays"]
    assert "2 to build" in pipeline("status", env=env).expect(0).out
    done = copy(env, "--json").expect(0).json["copy"]
    assert done["indexes"] == ["by_source", "embeddings_embedding_hnsw"]
    assert small.rows(INDEXES) == [("by_source", True), *STANDING, ("stays", True)]
    assert small.value("SELECT pg_get_indexdef('public.embeddings_embedding_hnsw'::regclass)") == definition
    assert small.value(comment) == said is not None


def test_status_from_a_second_terminal_shows_a_copy_that_runs(
    legacy: Database, small: Database, env: dict[str, str]
) -> None:
    with small.cursor() as blocker:
        process = start("copy", "--slice-size", "1", env=env)
        wait_until(lambda: bool(small.value("SELECT count(*) FROM pipeline.slice")))
        blocker.execute("LOCK TABLE public.embeddings IN SHARE MODE")
        state = pipeline("status", "--json", env=env).expect(0).json
        (run,) = state["runs"]
        assert run["phase"] == "copying"
        assert str(process.pid) in run["holder"]
        assert run["slices_done"] < run["slices"]
        second = copy(env).expect(6)
        assert f"pid {process.pid}" in second.err
    finish(process).expect(0)
    assert content(small) == content(legacy)


def test_lost_connections_are_made_again_and_nothing_is_lost(
    legacy: Database, small: Database, env: dict[str, str]
) -> None:
    stop = threading.Event()
    terminated = 0

    def terminate() -> None:
        nonlocal terminated
        while terminated < 7 and not stop.wait(0.1):
            for database in (legacy, small):
                terminated += database.value(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                    " WHERE application_name LIKE 'pipeline run%' AND datname = current_database()"
                )

    killer = threading.Thread(target=terminate)
    killer.start()
    done = copy(env, "--json")
    stop.set()
    killer.join()
    assert terminated > 0
    figures = done.expect(0).json["copy"]
    assert figures["rows"] == ROWS
    assert content(small) == content(legacy)
    assert small.rows(INDEXES) == STANDING


@pytest.mark.parametrize("side", ["legacy", "main"])
def test_immediate_stop_of_a_server_is_survived(
    side: str, legacy: Database, small: Database, env: dict[str, str]
) -> None:
    process = start("copy", "--slice-size", "1", "--json", env=env)
    wait_until(lambda: bool(small.value("SELECT count(*) FROM pipeline.slice WHERE finished_at IS NOT NULL")))
    (legacy if side == "legacy" else small).server.restart("immediate")
    outcome = finish(process)
    if outcome.code == 5:
        # The stop came before the workers had anything to try again.
        outcome = copy(env, "--json")
    outcome.expect(0)
    assert content(small) == content(legacy)
    assert small.rows(INDEXES) == STANDING


def test_copier_that_slept_past_its_lease_commits_nothing_more(
    legacy: Database, small: Database, env: dict[str, str]
) -> None:
    with small.cursor() as blocker:
        sleeper = start("copy", "--slice-size", "1", env=env)
        wait_until(lambda: bool(small.value("SELECT count(*) FROM pipeline.slice")))
        blocker.execute("LOCK TABLE public.embeddings IN SHARE MODE")
        wait_until(lambda: bool(small.value("SELECT count(*) FROM pg_locks WHERE NOT granted")))
        sleeper.send_signal(signal.SIGSTOP)
        # The lease runs out while its holder sleeps.
        small.execute("UPDATE pipeline.run SET lease_until = clock_timestamp() - interval '1 second'")
    copy(env).expect(0)
    before = small.rows("SELECT id, xmin::text FROM public.embeddings ORDER BY id")
    sleeper.send_signal(signal.SIGCONT)
    assert finish(sleeper).code in (5, 6)
    assert small.rows("SELECT id, xmin::text FROM public.embeddings ORDER BY id") == before
    assert content(small) == content(legacy)


def test_rows_that_change_on_legacy_meanwhile_are_brought_after(
    legacy: Database, small: Database, env: dict[str, str]
) -> None:
    stop = threading.Event()
    wrote = 0

    def write() -> None:
        nonlocal wrote
        dice = random.Random(7)
        with psycopg2.connect(legacy.connect().dsn, password=legacy.password) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                while not stop.is_set():
                    place = dice.randrange(1, ROWS)
                    cursor.execute(
                        dice.choice(
                            (
                                "UPDATE public.embeddings SET content = 'new ' || %(n)s"
                                " WHERE id = md5('row' || %(n)s)::uuid",
                                "UPDATE public.embeddings SET id = gen_random_uuid()"
                                " WHERE id = md5('row' || %(n)s)::uuid",
                                "DELETE FROM public.embeddings WHERE id = md5('row' || %(n)s)::uuid",
                                "INSERT INTO public.embeddings (id, content, metadata, embedding)"
                                " SELECT gen_random_uuid(), 'added', metadata, embedding FROM public.embeddings"
                                " WHERE id = md5('row' || %(n)s)::uuid",
                            )
                        ),
                        {"n": place},
                    )
                    wrote += 1
                    time.sleep(0.002)

    writer = threading.Thread(target=write)
    writer.start()
    # Open across the start: it began before the run's horizon and commits in the middle of the copy.
    early = legacy.connect()
    early.cursor().execute("UPDATE public.embeddings SET content = 'early' WHERE id = md5('row17')::uuid")
    process = start("copy", "--slice-size", "1", "--workers", "2", "--json", env=env)
    wait_until(lambda: bool(small.value("SELECT count(*) FROM pipeline.slice WHERE finished_at IS NOT NULL")))
    early.commit()
    early.close()
    # The passes end when one finds nothing to write, so the writer has to rest at some time.
    wait_until(lambda: bool(small.value("SELECT count(loaded_at) FROM pipeline.run")))
    stop.set()
    writer.join()
    figures = finish(process).expect(0).json["copy"]
    assert wrote > 20
    assert figures["changed_rows"] > 0
    assert figures["settled"] is True
    assert figures["rows"] == legacy.value("SELECT count(*) FROM public.embeddings")
    assert content(small) == content(legacy)
    pipeline("verify", "--check", "rows", "--check", "parity", env=env).expect(0)


def test_rows_of_many_megabytes_arrive(legacy: Database, small: Database, env: dict[str, str]) -> None:
    for megabytes in (1, 5, 20):
        legacy.execute(
            "UPDATE public.embeddings SET content = (SELECT string_agg(md5(part::text), '')"
            " FROM generate_series(1, %s) AS part) WHERE id = md5('row' || %s)::uuid",
            megabytes * 2**20 // 32,
            megabytes,
        )
    copy(env).expect(0)
    assert content(small) == content(legacy)
