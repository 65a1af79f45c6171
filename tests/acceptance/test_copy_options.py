"""The options of copy: what they change, and that a look at the plan changes nothing."""

import signal
import threading
import time
from collections.abc import Callable

import pytest

from pipeline.move.load import Limiter
from tests.data import content, fill_generated
from tests.support import Database, environment, pipeline, start

ROWS, DIMENSIONS = 3000, 64


@pytest.fixture
def main64(legacy: Database, new_database: Callable[..., Database], main_template: Callable[[int], str]) -> Database:
    fill_generated(legacy, ROWS, DIMENSIONS, 1000)
    return new_database("18", main_template(DIMENSIONS))


@pytest.fixture
def env(legacy: Database, main64: Database) -> dict[str, str]:
    return environment(legacy=legacy, main=main64, EMBEDDING_DIMENSIONS=str(DIMENSIONS))


def everything(database: Database) -> object:
    """Return what a write would change: rows of the ledger, row versions, relations and sequences."""
    return database.rows(
        "SELECT (SELECT count(*) FROM pipeline.run), (SELECT array_agg(oid::int8 ORDER BY oid) FROM pg_class),"
        " (SELECT array_agg(xmin::text ORDER BY id) FROM public.embeddings),"
        " (SELECT coalesce(last_value, 0) FROM pg_sequences WHERE sequencename = 'run_id_seq')"
    )


def test_dry_run_shows_the_plan_and_writes_nothing(main64: Database, env: dict[str, str]) -> None:
    before = everything(main64)
    shown = pipeline("copy", "--dry-run", "--slice-size", "1", env=env).expect(0).out
    assert "begins a new run; nothing was written" in shown
    assert "embeddings_embedding_hnsw is dropped first and built again" in shown
    plan = pipeline("copy", "--dry-run", "--slice-size", "1", "--json", env=env).expect(0).json["plan"]
    assert "  time    about " in shown
    assert plan["read_seconds"] > 0
    assert everything(main64) == before
    done = pipeline("copy", "--slice-size", "1", "--json", env=env).expect(0).json["copy"]
    assert plan["slices"] == plan["slices_left"] == done["slices"] > 1
    assert plan["indexes"] == done["indexes"]
    assert "nothing to do" in pipeline("copy", "--dry-run", env=env).expect(0).out


def test_dry_run_refuses_what_the_copy_would_refuse(main64: Database, env: dict[str, str]) -> None:
    main64.execute("ALTER TABLE public.embeddings DROP COLUMN metadata")
    assert "main's public.embeddings has no column 'metadata'" in pipeline("copy", "--dry-run", env=env).expect(4).err


def test_index_memory_is_what_the_build_gets(legacy: Database, main64: Database, env: dict[str, str]) -> None:
    told = pipeline("copy", "--index-memory", "1", "--index-workers", "0", env=env).expect(0)
    # One mebibyte holds no graph of 3,000 vectors; the server says so, and the build goes on.
    assert "hnsw graph no longer fits into maintenance_work_mem" in told.err
    assert content(main64) == content(legacy)


def test_sigusr1_tells_the_state_and_nothing_else_changes(main64: Database, env: dict[str, str]) -> None:
    process = start("copy", "--slice-size", "1", "--max-rate", "1", env=env)
    deadline = time.monotonic() + 20
    while not main64.value("SELECT count(finished_at) FROM pipeline.slice"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert [line for line in err.splitlines() if 'event="copying: ' in line]
    assert f"copied {ROWS:,} rows" in out


def test_workers_together_stay_below_the_rate() -> None:
    rate = 10_000_000.0
    limiter = Limiter(rate, threading.Event())
    started = time.monotonic()
    workers = [
        threading.Thread(target=lambda: [limiter.pass_on(50_000) for _ in range(20)])  # type: ignore[func-returns-value]
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    # Three megabytes at ten a second: never sooner, however many push.
    assert time.monotonic() - started >= 0.3


def test_limiter_lets_go_at_once_when_the_work_stops() -> None:
    stopping = threading.Event()
    limiter = Limiter(1.0, stopping)
    worker = threading.Thread(target=limiter.pass_on, args=(1_000_000,))
    worker.start()
    stopping.set()
    worker.join(2)
    assert not worker.is_alive()


def test_restart_is_refused_while_a_copy_is_at_work(main64: Database, env: dict[str, str]) -> None:
    process = start("copy", "--slice-size", "1", "--max-rate", "1", env=env)
    deadline = time.monotonic() + 20
    while not main64.value("SELECT count(finished_at) FROM pipeline.slice"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    refused = pipeline("copy", "--restart", env=env).expect(6)
    assert "another copy of this table is running" in refused.err
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert main64.value("SELECT count(abandoned_at) FROM pipeline.run") == 0
