"""Sync beside a writer, and over a network that breaks: what is equal at the end, and what is tried again."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager

import pytest

from tests.acceptance.test_copy import finish
from tests.data import content, fill_generated
from tests.faults import Bench
from tests.support import Database, pipeline, start

ROWS, DIMENSIONS = 4000, 64
CHANGES_PER_SECOND = 500
STATEMENTS = (
    "UPDATE public.embeddings SET content = 'new ' || %(n)s WHERE id = md5('row' || %(n)s)::uuid",
    "UPDATE public.embeddings SET metadata = '{\"k\": 1}' WHERE id = md5('row' || %(n)s)::uuid",
    "UPDATE public.embeddings SET embedding = embedding + embedding WHERE id = md5('row' || %(n)s)::uuid",
    "UPDATE public.embeddings SET id = gen_random_uuid() WHERE id = md5('row' || %(n)s)::uuid",
    "DELETE FROM public.embeddings WHERE id = md5('row' || %(n)s)::uuid",
    "INSERT INTO public.embeddings (id, content) VALUES (md5('row' || %(n)s)::uuid, 'again') ON CONFLICT DO NOTHING",
)


@contextmanager
def writer(database: Database, seed: int) -> Iterator[list[int]]:
    """Change rows at a steady rate, in transactions of five, one in five rolled back; yield the number so far."""
    dice, stop, changes = random.Random(seed), threading.Event(), [0]

    def write() -> None:
        with closing(database.connect()) as connection, connection.cursor() as cursor:
            began = time.monotonic()
            while not stop.is_set():
                for _ in range(5):
                    cursor.execute(dice.choice(STATEMENTS), {"n": dice.randint(1, ROWS)})
                connection.rollback() if dice.random() < 0.2 else connection.commit()
                changes[0] += 5
                stop.wait(max(0.0, changes[0] / CHANGES_PER_SECOND - (time.monotonic() - began)))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield changes
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def bench(
    legacy: Database, new_database: Callable[..., Database], main_template: Callable[[int], str]
) -> Iterator[Bench]:
    """Return a filled legacy and an empty main, each behind a proxy."""
    with ExitStack() as stack:
        fill_generated(legacy, ROWS, dimensions=DIMENSIONS)
        yield Bench(legacy, new_database("18", main_template(DIMENSIONS)), stack)


def test_writer_through_copy_and_sync_then_stopped_leaves_both_sides_equal(bench: Bench) -> None:
    env = bench.env()
    with writer(bench.legacy, seed=random.randrange(2**32)) as changes:
        finish(start("copy", "--max-rate", "1", "--json", env=env)).expect(0)
        for _ in range(3):
            assert pipeline("sync", "--json", env=env).code in (0, 3)
        # A difference that is on legacy alone at any moment is one: the writer does not stop for verify.
        assert pipeline("verify", "--check", "rows", "--settle", "0.2", env=env).code in (0, 3)
    assert changes[0] > 500
    done = pipeline("sync", "--json", env=env).expect(0).json["sync"]
    assert done["equal"] and not done["deep"]
    assert content(bench.main) == content(bench.legacy)
    pipeline("verify", "--check", "rows", env=env).expect(0)
    pipeline("verify", "--incremental", env=env).expect(0)
    assert pipeline("diff", "--deep", env=env).expect(0).out == ""


@pytest.mark.parametrize("side", ["legacy", "main"])
@pytest.mark.parametrize("how", ["fin", "rst"])
def test_sync_goes_on_after_a_cut_connection(bench: Bench, side: str, how: str) -> None:
    env = bench.env()
    pipeline("copy", env=env).expect(0)
    bench.legacy.execute("UPDATE public.embeddings SET content = content || '!'")
    held = {"PIPELINE_TESTING": "1", "PIPELINE_FAILPOINT": "in_reconcile:sleep=2"}
    process = start("sync", "--json", env=env | held)
    deadline = time.monotonic() + 20
    while not bench.main.value(
        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%%reconciled_xids%%'"
        " AND pid <> pg_backend_pid() AND state = 'idle in transaction'"
    ):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    bench.proxies[side].cut(how)  # type: ignore[arg-type]
    done = finish(process).expect(0).json["sync"]
    assert done["equal"]
    assert content(bench.main) == content(bench.legacy)
    bench.wait_for_quiet()


def test_sync_and_verify_end_with_5_where_a_side_stays_out_of_reach(bench: Bench) -> None:
    env = bench.env()
    pipeline("copy", env=env).expect(0)
    bench.proxies["legacy"].refuse()
    for command in (("sync",), ("verify",), ("diff",)):
        said = pipeline(*command, env=env).expect(5)
        assert "legacy" in said.err
    bench.proxies["legacy"].allow()
    pipeline("sync", env=env).expect(0)
