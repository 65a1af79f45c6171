"""Figures, events and errors in words: units, plurals, and nothing that a terminal would obey."""

from dataclasses import fields, is_dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import events
from pipeline.errors import PipelineError, RefusedError
from pipeline.show.figures import duration, printable, rate, size
from pipeline.show.words import copy_summary, error_lines, event_line
from pipeline.wording import counted

PLANNED = events.Planned(
    run=7,
    table="public.embeddings",
    source="reader@legacy.test:5432/vectors",
    target="app@main.test:5432/app",
    resumed=False,
    slices=3,
    slices_done=0,
    rows_done=0,
    bytes_estimate=96_000_000,
    rows_estimate=20_000,
    workers=2,
)
DONE = events.CopyDone(
    run=7,
    already_done=False,
    rows=1200,
    moved_rows=1200,
    moved_bytes=5_000_000,
    slices=3,
    moved_slices=3,
    retries=0,
    changed_rows=0,
    settled=True,
    indexes=(),
    load_seconds=2.0,
    index_seconds=0.0,
    seconds=2.5,
)


def done(**changes: object) -> events.CopyDone:
    values = {field.name: getattr(DONE, field.name) for field in fields(DONE)}
    return events.CopyDone(**(values | changes))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1500, "1.5 kB"),
        (123_456, "123 kB"),
        (1_234_567, "1.2 MB"),
        (5_000_000_000, "5.0 GB"),
        (7_500_000_000_000, "7.5 TB"),
    ],
)
def test_sizes_are_decimal_in_the_largest_unit_that_fits(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (12.4, "12 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7800, "2 h 10 min"),
        (float("inf"), "?"),
        (float("nan"), "?"),
    ],
)
def test_durations_have_two_units_at_most(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rate_of_no_time_is_no_division() -> None:
    assert rate(1000, 0) == "-"
    assert rate(3_000_000, 2) == "1.5 MB/s"


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (0, "row", "0 rows"),
        (1, "row", "1 row"),
        (1200, "row", "1,200 rows"),
        (1, "index", "1 index"),
        (2, "index", "2 indexes"),
        (3, "pass", "3 passes"),
    ],
)
def test_plurals(count: int, noun: str, text: str) -> None:
    assert counted(count, noun) == text


@given(st.text())
def test_nothing_printable_says_what_a_terminal_would_obey(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text)
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert printable(shown) == shown


def test_error_lines_mark_every_fact_and_hint() -> None:
    error = RefusedError("no key\ntwo types", "add a key\nmake them one")
    assert error_lines(error).splitlines() == [
        "error: no key",
        "error: two types",
        "hint:  add a key",
        "hint:  make them one",
    ]


def test_error_without_a_hint_has_no_hint_line() -> None:
    assert error_lines(PipelineError("nothing helps")) == "error: nothing helps"


def test_error_lines_carry_no_escape_of_a_server() -> None:
    shown = error_lines(PipelineError("\x1b[2Jgone\rover", "\x07type\x9bthis"))
    assert shown == "error: \ufffd[2Jgone\ufffdover\nhint:  \ufffdtype\ufffdthis"


def test_every_event_has_words_or_none() -> None:
    """An event that is forgotten in the match would be silent; these are the silent ones on purpose."""
    silent = {"Event", "Progress", "SliceDone", "IndexProgress", "CopyDone", "CheckStarted", "CheckDone"}
    kinds = {name for name, kind in vars(events).items() if is_dataclass(kind) and kind.__module__ == events.__name__}
    spoken = {
        PLANNED: "run 7 begins: public.embeddings, 96.0 MB in 3 slices, 2 workers\n"
        "  from reader@legacy.test:5432/vectors\n  to   app@main.test:5432/app",
        events.IndexDeferred(name="by_vector", definition="CREATE INDEX"): "index by_vector is set aside until"
        " the rows are in",
        events.Retrying(what="slice 3", attempt=2, delay=0.8, fact="gone"): "slice 3: gone; try 3 in 0.8 s",
        events.Warned(fact="slow", hint="wait"): "warning: slow (wait)",
        events.Loaded(rows=1, bytes=2_000_000, seconds=4): "1 row, 2.0 MB in 4.0 s (500 kB/s)",
        events.Reconciled(
            number=2, changed=3, upserted=2, deleted=1, seconds=0.1
        ): "pass 2: 3 keys changed on the source meanwhile; 2 written, 1 deleted",
        events.IndexBuilt(name="by_vector", seconds=61): "index by_vector stands again, 1 min 01 s",
    }
    assert {event: event_line(event) for event in spoken} == spoken
    assert {type(event).__name__ for event in spoken} | silent == kinds
    assert event_line(events.Progress(rows=1, bytes=1, slices=0, seconds=1)) is None


def test_warning_without_a_hint_has_no_brackets() -> None:
    assert event_line(events.Warned(fact="slow")) == "warning: slow"


def test_nothing_loaded_and_nothing_changed_need_no_words() -> None:
    assert event_line(events.Loaded(rows=0, bytes=0, seconds=0)) is None
    assert event_line(events.Reconciled(number=1, changed=0, upserted=0, deleted=0, seconds=0)) is None


def test_resumed_run_says_what_was_done_before() -> None:
    values = {field.name: getattr(PLANNED, field.name) for field in fields(PLANNED)}
    resumed = events.Planned(**(values | {"resumed": True, "slices_done": 2, "workers": 1}))
    assert "run 7 goes on: public.embeddings, 96.0 MB in 3 slices, 2 of them done before, 1 worker" in str(
        event_line(resumed)
    )


def test_summary_of_a_plain_copy_is_a_line_and_the_next_command() -> None:
    assert copy_summary(DONE).splitlines() == [
        "copied 1,200 rows (5.0 MB) in 2.5 s: 3 slices at 2.5 MB/s.",
        "next: pipeline verify",
    ]


def test_summary_tells_indexes_retries_changes_and_what_is_not_settled() -> None:
    text = copy_summary(
        done(indexes=("a", "b"), index_seconds=3.0, retries=2, changed_rows=1, settled=False, moved_slices=1)
    )
    assert "1 slice at 2.5 MB/s, 2 indexes in 3.0 s, 2 retries." in text
    assert "2 slices were there already; the run has 1,200 rows." in text
    assert "1 row changed on the source meanwhile" in text
    assert "the source still changes" in text
    assert "1 retry." in copy_summary(done(retries=1))


def test_summary_of_a_finished_run_says_that_nothing_was_done() -> None:
    assert copy_summary(done(already_done=True)).startswith("nothing to do: run 7 has copied all 1,200 rows before.")
