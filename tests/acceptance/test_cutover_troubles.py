"""A cutover that stops on its way: for an answer, for somebody in its way, or for what it has found."""

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import psycopg2
import pytest

from pipeline.errors import EXIT_DIFFERENCES, EXIT_ERROR, EXIT_OK, EXIT_REFUSED, EXIT_UNREACHABLE, EXIT_USAGE
from tests.acceptance.test_copy import wait_until
from tests.cutovers import BACK, Cutover, points_to
from tests.support import Database
from tests.switches import (
    FAST,
    answered,
    copies,
    done_steps,
    ended,
    evidence,
    refuses,
    standing,
    started,
    taken_back,
    write,
)

ASKED = ("cutover", "--execute", "--skip-backup", "--watch", "0")
GUARD = "SET pipeline.through = 'pipeline';"
FIRST = "(SELECT id FROM public.embeddings ORDER BY id LIMIT 1)"


@pytest.fixture
def bench(used: Cutover) -> Iterator[Cutover]:
    with taken_back(used):
        yield used


def label(bench: Cutover) -> str:
    return f"postgres@127.0.0.1:{bench.main.server.port}/{bench.main.name}"


def test_wrong_word_stops_before_the_fence_and_the_right_one_goes_on(bench: Cutover) -> None:
    said = answered(bench, "yes", *ASKED).expect(EXIT_REFUSED)
    assert (
        f"will refuse writes to public.embeddings, and then the application is switched to main.\nType {label(bench)}"
        in said.err
    )
    assert "that is not what was to be typed; nothing more was done" in said.err
    assert set(done_steps(bench)) == {"preflight", "backup", "catchup"}
    write(bench.legacy, f"UPDATE public.embeddings SET content = 'meanwhile' WHERE id = {FIRST}")
    said = answered(bench, label(bench), *ASKED).expect(EXIT_OK)
    assert "switched: " in said.out
    assert points_to(bench) == "main"
    assert bench.main.value(f"SELECT content FROM public.embeddings WHERE id = {FIRST}") == "meanwhile"


def test_way_back_is_asked_for_too(bench: Cutover) -> None:
    bench.pipeline(*FAST).expect(EXIT_OK)
    before = standing(bench)
    answered(bench, "no", "rollback", "--execute").expect(EXIT_REFUSED)
    assert standing(bench) == before
    assert "rolled back" in answered(bench, label(bench), "rollback", "--execute").expect(EXIT_OK).out


def test_command_that_fails_leaves_the_switch_and_is_gone_on_with(bench: Cutover) -> None:
    said = bench.pipeline(*FAST, "--after-switch", "echo first", "--after-switch", "exit 3").expect(EXIT_ERROR)
    assert "command 2 of --after-switch ended with 3; the settings are changed already" in said.err
    assert points_to(bench) == "main"
    write(bench.main, "UPDATE public.embeddings SET metadata = '{}' WHERE content = 'x'")
    assert "main is open, legacy is closed; switch comes next" in bench.pipeline("status").expect(EXIT_OK).out
    forgotten = bench.pipeline(*FAST).expect(EXIT_USAGE)
    assert "the switch was begun with 2 commands" in forgotten.err and "--after-switch" in forgotten.err
    done = bench.pipeline(*FAST, "--after-switch", "echo mended").expect(EXIT_OK)
    assert "mended\n" in done.err and "first" not in done.err
    # The time until the files pointed to main, not until somebody had mended a command.
    assert "fence held for" in done.out


def test_row_that_somebody_changes_on_main_under_the_fence_is_found(bench: Cutover) -> None:
    bench.pipeline(*FAST, "--until", "fence").expect(EXIT_OK)
    write(bench.main, f"{GUARD} UPDATE public.embeddings SET content = 'theirs' WHERE id = {FIRST}")
    said = bench.pipeline(*FAST).expect(EXIT_DIFFERENCES)
    assert "1 row of main were written by somebody else, and stay different: different " in said.err
    assert points_to(bench) == "legacy"
    assert "has moved to" in refuses(bench.legacy)
    assert "nothing is switched yet; prove comes next" in bench.pipeline("status").expect(EXIT_OK).out
    # It is found again, not forgotten.
    bench.pipeline(*FAST).expect(EXIT_DIFFERENCES)
    bench.pipeline(*BACK).expect(EXIT_OK)
    write(bench.legacy, "UPDATE public.embeddings SET metadata = '{}' WHERE content = 'x'")
    bench.pipeline("sync", "--on-conflict", "overwrite").expect(EXIT_OK)


def test_deep_compares_every_row_under_the_fence(bench: Cutover) -> None:
    bench.pipeline(*FAST, "--deep", "--until", "prove").expect(EXIT_OK)
    found = evidence(bench, "prove")
    assert (found["kind"], found["checks"]["digests"]) == ("full", "every byte of 300 rows is equal")
    bench.pipeline(*BACK).expect(EXIT_OK)
    bench.pipeline(*FAST, "--until", "prove").expect(EXIT_OK)
    assert evidence(bench, "prove")["kind"] == "incremental"


def test_fence_that_somebody_takes_away_is_put_and_proved_again(bench: Cutover) -> None:
    bench.pipeline(*FAST, "--until", "prove").expect(EXIT_OK)
    write(bench.legacy, "ALTER TABLE public.embeddings DISABLE TRIGGER ALL")
    write(bench.legacy, f"UPDATE public.embeddings SET content = 'through' WHERE id = {FIRST}")
    done = bench.pipeline(*FAST).expect(EXIT_OK)
    assert [name for name in ("fence", "prove", "catchup") if f'event="{name} done before' in done.err] == []
    assert bench.main.value(f"SELECT content FROM public.embeddings WHERE id = {FIRST}") == "through"
    assert "has moved to" in refuses(bench.legacy)


def test_file_that_leads_elsewhere_after_the_switch_fails_the_smoke(bench: Cutover) -> None:
    bench.pipeline(*FAST, "--until", "switch").expect(EXIT_OK)
    text = bench.env_file.read_text()
    bench.env_file.write_text(text.replace(f"PGVECTOR_DB={bench.main.name}", "PGVECTOR_DB=postgres"))
    said = bench.pipeline(*FAST).expect(EXIT_REFUSED)
    assert "by the files alone the application searches at " in said.err and "/postgres, main is" in said.err
    bench.env_file.write_text(text)
    bench.pipeline(*FAST).expect(EXIT_OK)


def test_question_that_nobody_answers_fails_the_smoke(bench: Cutover) -> None:
    bench.pipeline(*FAST, "--until", "switch").expect(EXIT_OK)
    text = bench.env_file.read_text()
    bench.env_file.write_text(text + "OLLAMA_BASE_URL=http://127.0.0.1:9\n")
    said = bench.pipeline(*FAST, "--smoke-text", "a question").expect(EXIT_ERROR)
    assert "Ollama does not answer at http://127.0.0.1:9" in said.err
    assert done_steps(bench)[-1] == "switch"
    bench.env_file.write_text(text)
    bench.pipeline(*FAST).expect(EXIT_OK)


def test_writer_who_does_not_end_keeps_the_fence_away_and_is_named(bench: Cutover) -> None:
    with closing(bench.legacy.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("SET application_name = 'nightly job'; INSERT INTO public.embeddings (content) VALUES ('open')")
        said = bench.pipeline(*FAST, "--fence-wait", "1.2").expect(EXIT_UNREACHABLE)
        assert "nightly job" in said.err
        # Nobody waits behind us: legacy is as open as before.
        write(bench.legacy, "UPDATE public.embeddings SET metadata = '{}' WHERE content = 'x'")
        assert "fence comes next" in bench.pipeline("status").expect(EXIT_OK).out
        process = started(bench, *FAST)
        wait_until(lambda: bench.legacy.value("SELECT count(*) FROM pg_locks WHERE NOT granted") > 0)
        write(bench.legacy)
        connection.commit()
    done = ended(process).expect(EXIT_OK)
    assert evidence(bench, "fence")["put"]["changed"] is True
    assert done.out.startswith("switched")
    for row in ("open", "new"):
        assert bench.main.value("SELECT count(*) FROM public.embeddings WHERE content = %s", row) == 1


@contextmanager
def stray(database: Database) -> Iterator[None]:
    """Try to write to a table again and again, as an application that was not restarted."""
    stop = threading.Event()

    def try_to_write() -> None:
        with closing(database.connect()) as connection, connection.cursor() as cursor:
            connection.autocommit = True
            cursor.execute("SET application_name = 'old app'")
            while not stop.wait(0.02):
                try:
                    cursor.execute("INSERT INTO public.embeddings (content) VALUES ('stray')")
                except psycopg2.Error:
                    continue

    thread = threading.Thread(target=try_to_write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_stray_writer_is_named_and_the_watch_is_done_anew(bench: Cutover) -> None:
    bench.pipeline(*FAST, "--until", "smoke").expect(EXIT_OK)
    watch = (*FAST[:-1], "0.5")
    with stray(bench.legacy):
        said = bench.pipeline(*watch).expect(EXIT_DIFFERENCES)
    assert "the switch is made, and the watch found: writes are still sent to legacy, by " in said.err
    assert "old app" in said.err
    assert done_steps(bench)[-1] == "smoke"
    assert points_to(bench) == "main"
    bench.pipeline(*watch).expect(EXIT_OK)
    assert evidence(bench, "watch")["written"]["written"] is False
    assert bench.legacy.value("SELECT count(*) FROM public.embeddings WHERE content = 'stray'") == 0


CANARIES = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pipeline canary'"


def test_slow_main_fails_the_watch(bench: Cutover) -> None:
    bench.pipeline(*FAST, "--until", "smoke").expect(EXIT_OK)
    process = started(bench, *FAST[:-1], "2.5", "--max-latency", "50")
    wait_until(lambda: bench.main.value(CANARIES) > 0)
    blocked = " AND wait_event_type = 'Lock' AND clock_timestamp() - query_start > interval '0.1 s'"
    held_up = False
    with closing(bench.main.connect()) as connection, connection.cursor() as cursor:
        # What is held up first may be what it asks before its first search.
        while not held_up:
            cursor.execute("LOCK TABLE public.embeddings IN ACCESS EXCLUSIVE MODE")
            wait_until(lambda: bench.main.value(CANARIES + blocked) > 0)
            held_up = bench.main.value(CANARIES + " AND position('<=>' in query) > 0") > 0
            connection.rollback()
    said = ended(process).expect(EXIT_DIFFERENCES)
    assert "95 of 100 searches on main take up to" in said.err and "up to 50 ms are allowed" in said.err


def test_way_back_without_the_copy_of_the_settings_asks_for_a_hand(bench: Cutover) -> None:
    before = bench.env_file.read_bytes()
    bench.pipeline(*FAST).expect(EXIT_OK)
    for copy in copies(bench.folder):
        copy.unlink()
    said = bench.pipeline(*BACK).expect(EXIT_REFUSED)
    assert "points to main, and its copy" in said.err and "by hand" in said.err
    bench.env_file.write_bytes(before)
    bench.pipeline(*BACK).expect(EXIT_OK)
    assert (points_to(bench), bench.env_file.read_bytes()) == ("legacy", before)
