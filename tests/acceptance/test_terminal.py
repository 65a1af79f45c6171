"""A copy on a real terminal of every width, in a pipe, and asked for its state: nothing is ever garbled."""

import re
import signal
import time
from collections.abc import Callable

import pytest

from tests.data import become_generated, content
from tests.support import Database, environment, pipeline, start
from tests.terminal import Emulator, Running, on_terminal

ROWS, DIMENSIONS = 3000, 64
# About four megabytes: at this rate four seconds, on any machine.
SLOW = ("copy", "--slice-size", "1", "--max-rate", "1")


@pytest.fixture
def main64(legacy: Database, new_database: Callable[..., Database], main_template: Callable[[int], str]) -> Database:
    become_generated(legacy, ROWS, DIMENSIONS, 1000)
    return new_database("18", main_template(DIMENSIONS))


@pytest.fixture
def env(legacy: Database, main64: Database) -> dict[str, str]:
    variables = environment(legacy=legacy, main=main64, EMBEDDING_DIMENSIONS=str(DIMENSIONS), TERM="xterm-256color")
    return {name: value for name, value in variables.items() if name not in {"COLUMNS", "LINES", "NO_COLOR"}}


def wait_for_a_slice(main: Database, done: int = 1) -> None:
    deadline = time.monotonic() + 30
    while main.value("SELECT count(finished_at) FROM pipeline.slice") < done:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def drawings(written: str) -> list[list[str]]:
    """Return what was drawn each time: the lines between two erasures."""
    parts = re.split(r"\r(?:\x1b\[\d+A)?\x1b\[J", written)
    return [part.replace("\r", "").split("\n") for part in parts]


def shown(running: Running, columns: int) -> Emulator:
    code, _, written = running.end()
    assert code == 0, written
    emulator = Emulator(columns)
    emulator.feed(written)
    return emulator


def test_bars_show_every_worker_and_leave_nothing_behind(
    legacy: Database, main64: Database, env: dict[str, str]
) -> None:
    with on_terminal(*SLOW, "--workers", "2", env=env, columns=100) as running:
        emulator = shown(running, 100)
        drawn = drawings(running.written)
    bars = [lines for lines in drawn if lines[0].startswith("copying ") and "━" in lines[0]]
    assert any(
        len(lines) == 3
        and re.search(r"%  \d+ of \d+ slices · .* of .*B · .*B/s · \d+ s left$", lines[0])
        and re.match(r"  worker 1 .* slice \d+ .* rows .*B", lines[1])
        and re.match(r"  worker 2 .* slice \d+ .* rows .*B", lines[2])
        for lines in bars
    ), bars
    percents = [int(found[1]) for lines in bars if (found := re.search(r"(\d+)%", lines[0]))]
    assert percents == sorted(percents)
    assert percents[-1] <= 100
    # What stays are the lines that were said, whole, and nothing of the bars.
    kept = [line for line in emulator.text() if line]
    assert kept[0].startswith("run 1 begins: public.embeddings")
    assert not [line for line in kept if "━" in line or "worker 1" in line or "looking at" in line]
    assert kept[-1].startswith("index embeddings_embedding_hnsw is built again")
    assert content(main64) == content(legacy)


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_narrow_terminal_is_never_wrapped_by_a_bar(main64: Database, env: dict[str, str], columns: int) -> None:
    with on_terminal(*SLOW, "--workers", "3", env=env, columns=columns) as running:
        emulator = shown(running, columns)
        drawn = drawings(running.written)
    bars = [lines for lines in drawn if lines[0].startswith("copying")]
    assert len(bars) > 3
    assert all(len(line) < columns for lines in bars for line in lines)
    assert not [line for line in emulator.text() if line.startswith("copying")]


def test_window_that_changes_its_width_is_drawn_at_its_new_one(main64: Database, env: dict[str, str]) -> None:
    widths = (80, 30, 50, 20, 100)
    with on_terminal(*SLOW, env=env, columns=widths[0]) as running:
        for place, columns in enumerate(widths):
            running.resize(columns)
            seen = len(running.written)
            deadline = time.monotonic() + 20
            while len(re.findall(r"\rcopying|Jcopying", running.written[seen:])) < 3 and running.process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            # The first drawing may have been on its way.
            later = [part for part in drawings(running.written[seen:])[2:-1] if part[0].startswith("copying")]
            assert all(len(line) < columns for lines in later for line in lines), (place, later)
        code, out, written = running.end()
    assert code == 0, written
    assert f"copied {ROWS:,} rows" in out


def test_more_workers_than_lines_are_counted(main64: Database, env: dict[str, str]) -> None:
    with on_terminal(*SLOW, "--workers", "4", env=env, columns=60, lines=4) as running:
        emulator = Emulator(60, 4)
        code, _, written = running.end()
    assert code == 0, written
    emulator.feed(written)
    assert max(len(lines) for lines in drawings(written) if lines[0].startswith("copying")) <= 4
    assert re.search(r"  and \d workers? more", written)
    assert not [line for line in emulator.text() if line.startswith("copying")]


def test_state_on_a_terminal_is_one_whole_line(main64: Database, env: dict[str, str]) -> None:
    with on_terminal(*SLOW, env=env, columns=120) as running:
        wait_for_a_slice(main64)
        running.process.send_signal(signal.SIGUSR1)
        emulator = shown(running, 120)
    states = [line for line in emulator.text() if line.startswith("copying: ")]
    assert len(states) == 1
    assert re.fullmatch(r"copying: \d+ %, [\d,]+ rows, \d+ of \d+ slices, \S+ .*B of .*B.*", states[0]), states


def test_interrupted_copy_clears_its_bars_before_it_speaks(main64: Database, env: dict[str, str]) -> None:
    with on_terminal(*SLOW, env=env, columns=80) as running:
        wait_for_a_slice(main64)
        running.process.send_signal(signal.SIGINT)
        code, _, written = running.end()
    emulator = Emulator(80)
    emulator.feed(written)
    assert code == 130
    kept = [line for line in emulator.text() if line]
    assert kept[-2:] == [
        "error: interrupted",
        "hint:  what was committed stays; run the same command again to go on",
    ]
    assert not [line for line in kept if line.startswith("copying")]


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"TERM": ""}])
def test_terminal_that_cannot_move_its_cursor_gets_log_lines(
    main64: Database, env: dict[str, str], variables: dict[str, str]
) -> None:
    with on_terminal("copy", env=env | variables, columns=80) as running:
        code, _, written = running.end()
    assert code == 0, written
    assert "\x1b" not in written
    assert all(line.startswith("timestamp=") for line in written.splitlines()), written


def test_no_color_leaves_no_colour_anywhere(main64: Database, env: dict[str, str]) -> None:
    with on_terminal("copy", env=env | {"NO_COLOR": "1"}, columns=80) as running:
        code, _, written = running.end()
    assert code == 0
    assert not re.search(r"\x1b\[[\d;]*m", written)


def test_encoding_without_fine_characters_gets_plain_ones(main64: Database, env: dict[str, str]) -> None:
    with on_terminal(*SLOW, env=env | {"PYTHONIOENCODING": "ascii"}, columns=80) as running:
        code, _, written = running.end()
    assert code == 0
    assert written.isascii()
    assert "\\u" not in written
    assert re.search(r"copying #+-+ ", written)


def test_pipe_gets_whole_log_lines_and_few_of_them(main64: Database, env: dict[str, str]) -> None:
    done = pipeline("copy", "--slice-size", "1", env=env).expect(0)
    assert main64.value("SELECT count(*) FROM pipeline.slice") >= 3
    lines = done.err.splitlines()
    assert all(re.fullmatch(r'timestamp=\S+ level=\w+ event=(".*"|\S+)( \w+=.*)?', line) for line in lines), lines
    assert not [line for line in lines if "slice 1 " in line]


def test_signal_in_a_pipe_is_answered_by_one_log_line(main64: Database, env: dict[str, str]) -> None:
    process = start(*SLOW, env=env)
    wait_for_a_slice(main64)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert len(re.findall(r'^timestamp=\S+ level=info event="copying: \d+ %, .* slices, .*"$', err, re.MULTILINE)) == 1


def test_signal_during_verify_is_answered_and_ends_nothing(
    legacy: Database, main64: Database, env: dict[str, str]
) -> None:
    pipeline("copy", env=env).expect(0)
    with legacy.connect() as connection, connection.cursor() as cursor:
        cursor.execute("LOCK TABLE public.embeddings IN ACCESS EXCLUSIVE MODE")
        process = start("verify", env=env)
        deadline = time.monotonic() + 30
        while not legacy.value("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR1)
        assert process.stderr is not None
        answers = (re.search(r'event="(looking at both sides|checking rows): for ', line) for line in process.stderr)
        assert any(answers)
        connection.rollback()
        _, err = process.communicate(timeout=60)
    connection.close()
    assert process.returncode == 0, err


def test_resumed_run_begins_where_it_was(main64: Database, env: dict[str, str]) -> None:
    process = start(*SLOW, env=env)
    wait_for_a_slice(main64, 2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    total, before = main64.rows("SELECT count(*), count(finished_at) FROM pipeline.slice")[0]
    with on_terminal(*SLOW, env=env, columns=100) as running:
        code, out, written = running.end()
    assert code == 0, written
    bars = [lines[0] for lines in drawings(written) if lines[0].startswith("copying ")]
    found = re.search(r"(\d+)%  (\d+) of (\d+) slices", bars[0])
    assert found is not None
    assert int(found[1]) >= 100 * before // (total + 1)
    assert (int(found[2]), int(found[3])) == (before, total)
    assert f"{before} slices of the run had been done before" in out
