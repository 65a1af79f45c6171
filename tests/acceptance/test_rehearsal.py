"""A rehearsal leaves both sides as they were, whatever becomes of it; one on copies does not touch them."""

import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import psycopg2
import pytest

from pipeline.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_REFUSED
from pipeline.options import STEPS
from tests.acceptance.test_copy import wait_until
from tests.cutovers import BACK, EXECUTE, Cutover, points_to
from tests.data import content
from tests.fences import objects
from tests.support import Database
from tests.switches import FAST, copies, crowded, ended, evidence, refuses, started, taken_back, write

REHEARSE = ("cutover", "--rehearse", "--yes", "--skip-backup")
SCRATCH = (*REHEARSE, "--scratch", "--watch", "0.2")
VERSIONS = "SELECT id, xmin::text, ctid::text FROM public.embeddings ORDER BY id"
FIRST = "(SELECT id FROM public.embeddings ORDER BY id LIMIT 1)"


@pytest.fixture
def bench(used: Cutover) -> Iterator[Cutover]:
    with taken_back(used):
        yield used


def standing(bench: Cutover) -> list[Any]:
    """Return all that a rehearsal has to leave as it was: rows and their versions, catalogs, files."""
    files = {path.name: path.read_bytes() for path in bench.folder.iterdir() if path.is_file()}
    return [files, *(side.rows(VERSIONS) for side in (bench.legacy, bench.main)), *catalogs(bench)]


def catalogs(bench: Cutover) -> list[Any]:
    """Return both catalogs, without the schemas of temporary tables: each session's first one makes them for good."""
    return [
        [one for one in objects(side) if not str(one[1]).startswith(("pg_temp", "pg_toast_temp"))]
        for side in (bench.legacy, bench.main)
    ]


def kinds(bench: Cutover) -> list[tuple[Any, ...]]:
    return bench.main.rows("SELECT kind, outcome FROM pipeline.cutover ORDER BY id DESC LIMIT 2")


def test_rehearsal_leaves_everything_as_it_was_and_its_times_in_the_plan(bench: Cutover) -> None:
    before = standing(bench)
    done = bench.pipeline(*REHEARSE, "--json").expect(EXIT_OK).json["rehearsal"]
    assert standing(bench) == before
    assert (done["kind"], done["outcome"]) == ("rehearsal", "rehearsed")
    assert [name for name, *_ in done["steps"]] == [name for name in STEPS if name != "watch"]
    assert 0 < done["fence_seconds"] < 60
    would = evidence(bench, "switch")["would_change"]
    assert list(would) == [".env"] and any(line.startswith("PGVECTOR_DB") for line in would[".env"])
    plan = bench.pipeline("cutover", "--json").expect(EXIT_OK).json["plan"]
    assert all(step["seconds"] is not None for step in plan["steps"])
    assert "fence: legacy takes no more writes, and that is proved (about 0." in bench.pipeline("cutover").out
    assert kinds(bench)[0] == ("rehearsal", "rehearsed")
    write(bench.legacy)
    said = bench.pipeline(*REHEARSE).expect(EXIT_OK)
    assert "rehearsed: nothing was switched, and both sides are as before.\nfence held for " in said.out
    assert bench.main.value("SELECT count(*) FROM public.embeddings WHERE content = 'new'") == 1


def test_as_many_free_sessions_as_are_asked_for_are_enough(bench: Cutover) -> None:
    bench.legacy.execute("UPDATE public.embeddings SET content = content || '!'")
    with crowded(bench.legacy, 5), crowded(bench.main, 8):
        said = bench.pipeline("cutover", "--rehearse", "--yes", "--deep").expect(EXIT_OK)
    assert "; try 2" not in said.err


def test_rehearsal_keeps_the_guard_that_stood_before(bench: Cutover) -> None:
    bench.pipeline(*FAST, "--until", "catchup").expect(EXIT_OK)
    bench.pipeline(*BACK).expect(EXIT_OK)
    before = catalogs(bench)
    assert "filled by the pipeline" in refuses(bench.main)
    bench.pipeline(*REHEARSE).expect(EXIT_OK)
    assert catalogs(bench) == before


@pytest.mark.parametrize("point", ["before_step@3", "in_step@3", "before_step@4", "in_step@4", "before_step@5"])
def test_killed_rehearsal_is_ended_by_the_next_one_or_by_a_rollback(bench: Cutover, point: str) -> None:
    before = catalogs(bench)
    # backup, catchup, fence, prove, switch: the fence stands from within the third one on.
    fenced = point != "before_step@3"
    bench.killed_at(point, *REHEARSE)
    if fenced:
        assert "is closed for seconds, while its move to " in refuses(bench.legacy)
        said = bench.pipeline(*EXECUTE).expect(EXIT_REFUSED)
        assert "has not ended\nhint:  end that first: pipeline cutover --rehearse ends it" in said.err
    else:
        write(bench.legacy)
    assert "rehears" in bench.pipeline("status").expect(EXIT_OK).out
    if point.startswith("before"):
        bench.pipeline(*REHEARSE).expect(EXIT_OK)
        assert kinds(bench) == [("rehearsal", "rehearsed"), ("rehearsal", "rolled back")]
    else:
        bench.pipeline(*BACK).expect(EXIT_OK)
        assert kinds(bench)[0] == ("rehearsal", "rolled back")
    assert catalogs(bench) == before
    write(bench.legacy)
    write(bench.main, "DELETE FROM public.embeddings WHERE content = 'nothing'")


def test_fence_of_a_killed_rehearsal_ends_by_itself(bench: Cutover) -> None:
    bench.killed_at("in_step@4", *REHEARSE, "--fence-limit", "1")
    wait_until(lambda: opens(bench.legacy))
    bench.pipeline(*REHEARSE).expect(EXIT_OK)


def opens(database: Database) -> bool:
    try:
        write(database)
    except psycopg2.Error:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_rehearsal_lifts_its_fence_before_it_ends(bench: Cutover, number: signal.Signals) -> None:
    before = catalogs(bench)
    process = started(bench, *REHEARSE, PIPELINE_FAILPOINT="in_step:sleep=2@4", PIPELINE_TESTING="1")
    wait_until(lambda: closed(bench.legacy))
    process.send_signal(number)
    said = ended(process).expect(EXIT_INTERRUPTED if number == signal.SIGINT else 143)
    assert "interrupted" in said.err or "terminated" in said.err
    assert catalogs(bench) == before
    write(bench.legacy)
    assert kinds(bench)[0] == ("rehearsal", "rolled back")


def closed(database: Database) -> bool:
    return bool(database.value("SELECT count(*) FROM pg_trigger WHERE tgname LIKE '%pipeline_fence%'"))


@contextmanager
def writing(database: Database) -> Iterator[list[int]]:
    """Update a row of a table again and again, by somebody who would not wait; the list counts what went through."""
    stop, count = threading.Event(), [0]
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with closing(database.connect()) as connection, connection.cursor() as cursor:
                connection.autocommit = True
                cursor.execute("SET lock_timeout = '1s'")
                while not stop.wait(0.01):
                    cursor.execute(f"UPDATE public.embeddings SET content = 'busy' WHERE id = {FIRST}")
                    count[0] += 1
        except BaseException as error:  # noqa: BLE001 - shown by the test
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield count
    finally:
        stop.set()
        thread.join()
    assert not failed, failed


def test_rehearsal_on_copies_leaves_the_tables_to_their_writers(bench: Cutover) -> None:
    versions, text, before = bench.main.rows(VERSIONS), bench.env_file.read_bytes(), catalogs(bench)
    with writing(bench.legacy) as count:
        said = bench.pipeline(*SCRATCH, "--json").expect(EXIT_OK)
        assert count[0] > 10
    done = said.json["rehearsal"]
    assert (done["kind"], done["outcome"]) == ("rehearsal", "rehearsed")
    assert [name for name, *_ in done["steps"]] == list(STEPS)
    assert (bench.main.rows(VERSIONS), bench.env_file.read_bytes()) == (versions, text)
    assert catalogs(bench) == before
    assert not copies(bench.folder)
    assert points_to(bench) == "legacy"
    for name in ("run", "pass", "verdict", "cutover"):
        left = f"SELECT count(*) FROM pipeline.{name} WHERE target_table LIKE '%scratch%'"
        assert bench.main.value(left) == 0, name
    plan = bench.pipeline("cutover", "--json").expect(EXIT_OK).json["plan"]
    assert (plan["cutover"], all(step["seconds"] for step in plan["steps"] if step["name"] == "fence")) == (None, True)
    bench.pipeline("sync").expect(EXIT_OK)
    assert content(bench.main) == content(bench.legacy)


def test_copies_of_a_rehearsal_go_when_it_is_stopped(bench: Cutover) -> None:
    before = catalogs(bench)
    process: subprocess.Popen[str] = started(
        bench, *SCRATCH, PIPELINE_FAILPOINT="in_step:sleep=2@3", PIPELINE_TESTING="1"
    )
    wait_until(lambda: bool(bench.legacy.value("SELECT count(*) FROM pg_class WHERE relname = 'embeddings_scratch'")))
    wait_until(lambda: closed(bench.legacy))
    process.send_signal(signal.SIGINT)
    ended(process).expect(EXIT_INTERRUPTED)
    assert catalogs(bench) == before


def test_copies_of_a_killed_rehearsal_go_with_the_next_one(bench: Cutover) -> None:
    before = catalogs(bench)
    bench.killed_at("in_step@5", *SCRATCH)
    assert catalogs(bench) != before
    write(bench.legacy)
    # They stand in nobody's way.
    assert "nothing is under way" in bench.pipeline("cutover").expect(EXIT_OK).out
    bench.pipeline(*SCRATCH).expect(EXIT_OK)
    assert catalogs(bench) == before


def test_table_of_that_name_that_is_no_copy_of_ours_is_left_alone(bench: Cutover) -> None:
    bench.legacy.execute("CREATE TABLE public.embeddings_scratch AS SELECT 1 AS mine")
    before = standing(bench)
    said = bench.pipeline(*SCRATCH).expect(EXIT_REFUSED)
    assert "has a table public.embeddings_scratch already, which is no copy of ours" in said.err
    assert standing(bench) == before
    bench.legacy.execute("DROP TABLE public.embeddings_scratch")
