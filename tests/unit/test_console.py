"""What is drawn and logged while a command works: at any width, at any pace, whatever the events say."""

import io
import itertools
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from pipeline import events
from pipeline.show.board import PLAIN, Board, Glyphs, glyphs_for
from pipeline.show.log import LogObserver
from pipeline.show.pace import SILENT_SECONDS, Meter, Pace
from pipeline.show.screen import Screen
from tests.terminal import Emulator

MB = 1_000_000


def planned(slices: int = 10, **changes: int) -> events.Planned:
    figures = {"slices_done": 0, "rows_done": 0, "bytes_estimate": 10 * slices * MB, "bytes_done": 0, "workers": 2}
    return events.Planned(
        run=1,
        table="public.embeddings",
        source="legacy",
        target="main",
        resumed=bool(changes.get("slices_done")),
        slices=slices,
        rows_estimate=1000,
        **(figures | changes),
    )


def progress(seconds: float, moved: float, slices: int = 0, workers: int = 2, **changes: int) -> events.Progress:
    seats = tuple(
        events.WorkerProgress(worker=i + 1, ordinal=slices + i, rows=10 * i, bytes=i * MB, bytes_moved=int(moved / 2))
        for i in range(workers)
    )
    return events.Progress(
        **({"rows": int(moved / 1000)} | changes), bytes=int(moved), slices=slices, seconds=seconds, workers=seats
    )


def slice_done(size: int) -> events.SliceDone:
    return events.SliceDone(ordinal=0, rows=10, bytes=size, seconds=1.0, attempts=1)


def steady(
    pace: Pace, rate: float, slice_bytes: float, slices: int, begin: float = 0.0
) -> Iterator[tuple[float, float | None]]:
    """Let a pace see a copy at a steady rate; yield the moment and the time left, four times a second."""
    total, told, step = slice_bytes * slices, 0, 0.25
    for tick in range(1, int(total / rate / step) + 1):
        moved = rate * tick * step
        while told < int(moved / slice_bytes):
            pace.slice_done(slice_done(int(slice_bytes)))
            told += 1
        under_way = (
            events.WorkerProgress(
                worker=1, ordinal=told, rows=0, bytes=int(moved - told * slice_bytes), bytes_moved=int(moved)
            ),
        )
        pace.progress(
            events.Progress(rows=0, bytes=int(moved), slices=told, seconds=begin + tick * step, workers=under_way)
        )
        yield tick * step, pace.left_seconds


def test_time_left_of_a_steady_copy_runs_down_like_a_clock() -> None:
    pace = Pace(planned(slices=30))
    seen = [(at, left) for at, left in steady(pace, 5 * MB, 10 * MB, 30) if left is not None]
    assert seen[0][0] <= 2.0
    # Sixty seconds in all.
    assert all(abs(left - (60 - at)) < 3 for at, left in seen)
    assert all(abs(before[1] - after[1]) < 1 for before, after in itertools.pairwise(seen))


def test_table_that_is_mostly_dead_rows_is_weighed_by_what_its_slices_bring() -> None:
    """The table has ten times the bytes that go over the wire."""
    pace = Pace(planned(slices=40, bytes_estimate=40 * 100 * MB))
    seen = dict(steady(pace, 5 * MB, 10 * MB, 40))
    left = seen[60.0]
    assert left is not None
    assert 20 <= left <= 60
    assert pace.fraction > 0.7


def test_resumed_run_begins_at_its_share_and_counts_this_process_alone_for_its_rate() -> None:
    pace = Pace(planned(slices=40, slices_done=30, bytes_done=300 * MB))
    assert pace.fraction == pytest.approx(0.75, abs=0.01)
    seen = [(at, left) for at, left in steady(pace, 1 * MB, 10 * MB, 10) if left is not None]
    assert all(abs(left - (100 - at)) < 5 for at, left in seen)
    assert pace.rate == pytest.approx(MB, rel=0.1)


def test_rate_is_steady_where_a_limit_lets_a_chunk_through_now_and_then() -> None:
    """128 kB every eight seconds, looked at four times a second."""
    meter = Meter()
    rates = []
    for tick in range(1600):
        seconds = tick / 4
        meter.take(seconds, 128_000 * (tick // 32))
        if seconds > 120:
            rates.append(meter.rate(seconds))
    assert max(rates) < 1.25 * min(rates)
    assert 12_000 < min(rates) < max(rates) < 20_000


def test_count_that_is_taken_back_begins_a_rate_anew() -> None:
    meter = Meter()
    for seconds in range(10):
        meter.take(seconds, seconds * MB)
    meter.take(10, 2 * MB)
    assert meter.rate(10) == 0
    meter.take(11, 3 * MB)
    assert meter.rate(11) == MB


@given(
    st.integers(1, 50),
    st.integers(0, 10**13),
    st.lists(st.tuples(st.floats(0, 1e5), st.integers(-(10**9), 10**11), st.integers(0, 2), st.integers(0, 70))),
)
def test_pace_is_never_negative_and_never_goes_back(
    slices: int, estimate: int, steps: list[tuple[float, int, int, int]]
) -> None:
    pace = Pace(planned(slices=slices, bytes_estimate=estimate))
    board = Board()
    board.take(planned(slices=slices, bytes_estimate=estimate), 0.0)
    seconds, moved, done, furthest = 0.0, 0, 0, 0.0
    for passed, more, finished, workers in steps:
        seconds, moved, done = seconds + passed, max(0, moved + more), min(slices, done + finished)
        event = progress(seconds, moved, done, workers)
        pace.progress(event)
        board.take(event, seconds)
        assert 0 <= furthest <= pace.fraction <= 1
        furthest = pace.fraction
        assert pace.left_seconds is None or pace.left_seconds >= 0
        assert pace.rate >= 0 and pace.left_bytes >= 0
        assert "\n" not in board.sentence(seconds)
        for width in (1, 19, 39, 79):
            assert all(cell_len(line) <= width for line in board.lines(width, 5, seconds))


EVENTS = (
    planned(),
    progress(4.0, 20 * MB, 2),
    events.Loaded(rows=1, bytes=1, seconds=4.0),
    events.IndexProgress(
        name="by_vector\x1b[2J\nover", phase="building index: loading tuples", fraction=0.5, seconds=2
    ),
    events.IndexProgress(name="埋め込みベクトルの索引", phase="initializing", fraction=None, seconds=2),
    events.CheckStarted(name="rows"),
)


@pytest.mark.parametrize("glyphs", [PLAIN, Glyphs()])
@pytest.mark.parametrize("width", [1, 5, 19, 39, 79, 200])
def test_no_line_is_wider_than_the_terminal_or_obeyed_by_it(width: int, glyphs: Glyphs) -> None:
    board = Board(glyphs)
    assert len(board.lines(width, 10, 0.0)) == 1
    for event in EVENTS:
        board.take(event, 5.0)
        for line in board.lines(width, 10, 6.0):
            assert line
            assert cell_len(line) <= width
            assert line.isprintable()


def test_lightest_figures_go_first_where_room_is_short() -> None:
    board = Board()
    board.take(planned(), 0.0)
    for tick in range(1, 20):
        board.take(progress(tick / 4, tick * MB), tick / 4)
    drawn = [board.lines(width, 1, 5.0)[0] for width in (100, 60, 40, 19, 12)]
    assert re.fullmatch(r"copying #+-+  +\d+%  0 of 10 slices, 19\.0 MB of \d+ MB, 4\.\d MB/s, \d+ s left", drawn[0])
    assert re.fullmatch(r"copying #+-+  +\d+%  4\.\d MB/s, \d+ s left", drawn[1])
    assert re.fullmatch(r"copying #+-+  +\d+%  \d+ s left", drawn[2])
    assert re.fullmatch(r"copying #*-+  +\d+%|copying +\d+%", drawn[3])
    assert re.fullmatch(r"copying \d+%", drawn[4])


def test_workers_beyond_the_last_line_are_counted() -> None:
    board = Board()
    board.take(planned(), 0.0)
    board.take(progress(4.0, 20 * MB, workers=6), 4.0)
    assert len(board.lines(79, 7, 4.0)) == 7
    lines = board.lines(79, 4, 4.0)
    assert len(lines) == 4
    assert lines[-1] == "  and 4 workers more"
    assert len(board.lines(79, 1, 4.0)) == 1


def test_source_that_sends_nothing_is_told_instead_of_a_time() -> None:
    board = Board()
    board.take(planned(), 0.0)
    for tick in range(1, 20):
        board.take(progress(tick / 4, tick * MB), tick / 4)
    board.take(progress(5.0 + SILENT_SECONDS, 19 * MB), 5.0 + SILENT_SECONDS)
    assert board.lines(100, 1, 15.0)[0].endswith("no byte for 10 s")
    assert board.sentence(15.0).endswith("no byte for 10 s")
    assert board.figures(15.0)["silent"] == "10 s"


def test_encoding_decides_what_a_bar_is_drawn_with() -> None:
    assert glyphs_for("utf-8") == Glyphs()
    assert [glyphs_for(encoding) for encoding in ("ascii", "iso-8859-1", None, "no such")] == [PLAIN] * 4


class Terminal(io.StringIO):
    """A stream that feeds an emulator; it has no size of its own, so 80 x 24 is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.emulator = Emulator(80)

    def write(self, text: str) -> int:
        # What the terminal's driver makes of a line's end.
        self.emulator.feed(text.replace("\n", "\r\n"))
        return len(text)


def test_screen_keeps_what_was_said_and_takes_away_what_was_drawn() -> None:
    terminal = Terminal()
    screen = Screen(terminal)
    screen.draw(lambda width, height: ["one", "two", "three"])
    screen.draw(lambda width, height: ["four"])
    assert terminal.emulator.text() == ["four"]
    screen.say("said\nand said again")
    screen.draw(lambda width, height: [f"{width} x {height}", "five"])
    assert terminal.emulator.text() == ["said", "and said again", "79 x 23", "five"]
    # Stopped and continued: the shell has written its line below.
    screen.forget()
    terminal.write("\nStopped\n")
    screen.draw(lambda width, height: ["six", "seven"])
    assert terminal.emulator.text()[-3:] == ["Stopped", "six", "seven"]
    screen.clear()
    screen.clear()
    assert terminal.emulator.text() == ["said", "and said again", "79 x 23", "five", "Stopped", ""]


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def test_terminal_that_is_gone_ends_nothing() -> None:
    screen = Screen(Gone())
    screen.say("nobody hears")
    screen.draw(lambda width, height: ["nobody sees"])
    screen.clear()


def test_log_says_where_a_long_copy_is_at_growing_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    observer = LogObserver()
    observer.on(planned(slices=5000))
    began = observer._began
    for second in range(3 * 3600):
        observer.on(slice_done(10 * MB))
        observer.tick(began + second)
    lines = capsys.readouterr().err.splitlines()
    # Every five seconds at first, every minute in the end: for three hours and 10,800 slices about 200 lines.
    assert 150 < len(lines) < 260
    assert sum("event=copying" in line for line in lines) == len(lines) - 1
    assert all(line.startswith("timestamp=") for line in lines)
    assert "slices=0/5000" in lines[1]
