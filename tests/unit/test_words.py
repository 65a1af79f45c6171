"""Figures, events and errors in words: units, plurals, and nothing that a terminal would obey."""

from dataclasses import is_dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import events
from pipeline.errors import PipelineError, RefusedError
from pipeline.show.figures import duration, printable, rate, size, time_left
from pipeline.show.words import copy_summary, error_lines, event_line, preview_lines, sync_summary
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
    quarantined_rows=0,
    rows_before=0,
    foreign_rows=0,
    settled=True,
    indexes=(),
    load_seconds=2.0,
    index_seconds=0.0,
    seconds=2.5,
)


def done(**changes: Any) -> events.CopyDone:
    return replace(DONE, **changes)


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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "1 s"),
        (3.2, "4 s"),
        (23, "25 s"),
        (59, "1 min 00 s"),
        (187, "3 min 10 s"),
        (1510, "25 min"),
        (3580, "1 h 00 min"),
        (7900, "2 h 10 min"),
        (float("inf"), "?"),
    ],
)
def test_time_left_is_as_coarse_as_it_deserves(seconds: float, text: str) -> None:
    assert time_left(seconds) == text


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
    silent = {
        *("Previewed", "Event", "Progress", "WorkerProgress", "SliceDone", "IndexProgress", "CopyDone"),
        *("CheckStarted", "CheckDone"),
        *("Retried", "Compared", "VerifyDone", "Differing", "SyncDone", "Watching", "CutoverDone"),
    }
    kinds = {name for name, kind in vars(events).items() if is_dataclass(kind) and kind.__module__ == events.__name__}
    spoken = {
        PLANNED: "run 7 begins: public.embeddings, 96.0 MB in 3 slices, 2 workers\n"
        "  from reader@legacy.test:5432/vectors\n  to   app@main.test:5432/app",
        events.IndexDeferred(name="by_vector", definition="CREATE INDEX"): "index by_vector is dropped until"
        " the rows are in; the ledger has its definition",
        events.FoundRows(table="t", equal=5, different=2, only_there=1, on_conflict="keep"): "t holds 8 rows already:"
        " 5 equal to the source's, 2 with other content, which stay as they are, 1 that only it has, which stay; its"
        " indexes stay",
        events.Quarantined(rows=2): "2 rows cannot be carried: set aside in pipeline.quarantine",
        events.Retrying(what="slice 3", attempt=2, delay=0.8, fact="gone"): "slice 3: gone; try 3 in 0.8 s",
        events.Warned(fact="slow", hint="wait"): "warning: slow (wait)",
        events.Loaded(rows=1, bytes=2_000_000, seconds=4): "loaded 1 row, 2.0 MB in 4.0 s (500 kB/s)",
        events.Reconciled(
            number=2, changed=3, upserted=2, deleted=1, foreign=0, seconds=0.1
        ): "pass 2: 3 changed rows, 2 written, 1 deleted",
        events.SyncPlanned(
            table="public.embeddings", source="a", target="b", since=None, since_kind=None, rows_estimate=5
        ): "public.embeddings: every row is compared\n  from a\n  to   b",
        events.SyncPlanned(
            table="t",
            source="a",
            target="b",
            since=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
            since_kind="copy",
            rows_estimate=5,
        ): "t: rows written since the copy of 2026-01-02 03:04:05Z are looked at\n  from a\n  to   b",
        events.IndexBuilt(name="by_vector", seconds=61): "index by_vector is built again, in 1 min 01 s",
        events.StepStarted(
            name="fence", title="legacy takes no more writes", number=4, steps=8
        ): "step 4 of 8, fence: legacy takes no more writes",
        events.StepDone(name="fence", summary="closed", seconds=0.25): "fence done in 0.2 s: closed",
        events.StepDone(name="fence", summary="closed", seconds=9.0, before=True): "fence done before: closed",
        events.OwnerNeeded(fact="the role may not", script="BEGIN;\nCOMMIT;"): "the role may not:\nBEGIN;\nCOMMIT;",
    }
    assert {event: event_line(event) for event in spoken} == spoken
    assert {type(event).__name__ for event in spoken} | silent == kinds
    assert event_line(events.Progress(rows=1, bytes=1, slices=0, seconds=1)) is None


def test_warning_without_a_hint_has_no_brackets() -> None:
    assert event_line(events.Warned(fact="slow")) == "warning: slow"


def test_nothing_loaded_and_nothing_changed_need_no_words() -> None:
    assert event_line(events.Loaded(rows=0, bytes=0, seconds=0)) is None
    assert event_line(events.Reconciled(number=1, changed=0, upserted=0, deleted=0, foreign=0, seconds=0)) is None


def test_try_that_does_not_wait_says_so() -> None:
    retrying = events.Retrying(what="slice 3", attempt=1, delay=0.0, fact="gone")
    assert event_line(retrying) == "slice 3: gone; try 2 now"


def planned(**changes: Any) -> str:
    return str(event_line(replace(PLANNED, **changes))).splitlines()[0]


def test_resumed_run_says_what_was_done_before() -> None:
    assert planned(resumed=True, slices_done=2, rows_done=800, workers=1) == (
        "run 7 goes on: public.embeddings, 96.0 MB in 3 slices, 2 of them done before with 800 rows; 1 worker"
    )
    assert planned(resumed=True, slices_done=3, rows_done=1200, workers=0) == (
        "run 7 goes on: public.embeddings, 96.0 MB in 3 slices, all done before; what follows the load is left"
    )


def test_summary_of_a_plain_copy_says_what_changed_and_the_next_command() -> None:
    assert copy_summary(DONE).splitlines() == [
        "copied 1,200 rows (5.0 MB) in 2.5 s: 3 slices at 2.5 MB/s.",
        "nothing changed on the source meanwhile; source and target were equal at the last pass.",
        "next: pipeline verify",
    ]


def test_summary_tells_indexes_retries_changes_and_what_is_not_settled() -> None:
    lines = copy_summary(
        done(indexes=("a", "b"), index_seconds=3.0, retries=2, changed_rows=1, settled=False, moved_slices=1)
    ).splitlines()
    assert lines == [
        "copied 1,200 rows (5.0 MB) in 2.5 s: 1 slice at 2.5 MB/s, 2 indexes in 3.0 s, 2 retries.",
        "2 slices of the run had been done before; it has 1,200 rows.",
        "1 change on the source meanwhile came after; the source still changes, and the two sides were not equal"
        " at the last pass.",
        "next: pipeline verify, once the writers of the source are quiet",
    ]
    assert "1 retry." in copy_summary(done(retries=1))


def test_summary_of_changes_that_were_all_brought_says_that_both_sides_were_equal() -> None:
    assert "12 changes on the source meanwhile came after; source and target were equal" in copy_summary(
        done(changed_rows=12)
    )


def test_summary_of_a_run_whose_rows_were_all_there_has_no_rate() -> None:
    lines = copy_summary(done(moved_slices=0, moved_rows=0, moved_bytes=0, indexes=("a",))).splitlines()
    assert lines[0] == "finished run 7 in 2.5 s: every slice was there already, 1 index in 0.0 s."


def test_summary_of_a_finished_run_says_that_nothing_was_done() -> None:
    text = copy_summary(done(already_done=True))
    assert text.startswith("nothing to do: run 7 has copied all 1,200 rows before.")
    assert "was not looked for" in text


PREVIEWED = events.Previewed(
    run=None,
    finished=False,
    table="public.embeddings",
    source="legacy",
    target="main",
    slices=3,
    slices_left=3,
    bytes_left=96_000_000,
    rows_estimate=20_000,
    columns=("id", "embedding"),
    indexes=("by_vector",),
    rows_before=0,
    read_seconds=185.0,
)


def test_summary_names_what_was_set_aside_and_what_stays() -> None:
    assert "2 rows set aside: pipeline quarantine lists them." in copy_summary(done(quarantined_rows=2))
    assert "Left alone: 3 rows that only the target has" in copy_summary(done(rows_before=9, foreign_rows=3))
    assert "equal" not in copy_summary(done(rows_before=9))


def previewed(**changes: Any) -> str:
    return preview_lines(replace(PREVIEWED, **changes), 2)


def test_plan_says_what_is_read_and_written_and_how_long_it_takes() -> None:
    assert previewed().splitlines() == [
        "the copy begins a new run; nothing was written yet.",
        "  from    legacy, read only",
        "  to      main, table public.embeddings, columns id, embedding",
        "  slices  3 left of 3, 96.0 MB, by 2 workers",
        "  rows    about 20,000 by the source's own statistics",
        "  time    about 3 min 05 s to read by one stream; how fast the target writes, and building indexes,"
        " is not in it",
        "  ledger  schema pipeline on the target: the run, a mark for every slice",
        "  index   by_vector is dropped first and built again after the load",
        "  after   ANALYZE of the table, and its sequences set behind the rows",
        "next: pipeline copy, without --dry-run",
    ]


def test_plan_of_a_table_without_statistics_tells_no_rows_and_no_time() -> None:
    text = previewed(rows_estimate=0, read_seconds=None, run=4, slices_left=1)
    assert "  rows    not known" in text
    assert "time " not in text
    assert "goes on with run 4" in text
    assert "1 left of 3, 96.0 MB, by 1 worker" in text
    assert "nothing to do: run 4" in previewed(run=4, finished=True)


SYNCED = events.SyncDone(
    run=1,
    deep=False,
    dry=False,
    passes=1,
    touched=3,
    inserted=1,
    updated=1,
    deleted=1,
    kept=0,
    foreign=0,
    left=(),
    settled=True,
    equal=True,
    seconds=0.2,
)


def test_sync_says_what_it_wrote_and_what_it_left() -> None:
    assert sync_summary(SYNCED).splitlines() == [
        "1 added, 1 written over, 1 deleted: 3 rows written since were looked at, in 0.2 s.",
        "source and target were equal at the last pass.",
        "next: pipeline verify --incremental",
    ]
    left = replace(
        SYNCED,
        deep=True,
        inserted=0,
        updated=0,
        deleted=0,
        kept=2,
        foreign=1,
        equal=False,
        left=(("extra", ("a", "b")),),
    )
    assert sync_summary(left).splitlines() == [
        "nothing to write: all rows were compared, in 0.2 s.",
        "left different, written by somebody else: 2 rows of the target."
        " To take the source's: pipeline sync --on-conflict overwrite",
        "left alone, brought by no run: 1 row that only the target has. To delete: pipeline sync --delete",
        "  extra  a, b",
    ]
    assert "still changes" in sync_summary(replace(SYNCED, settled=False, equal=False))


def test_list_of_differences_ends_with_their_numbers() -> None:
    assert sync_summary(replace(SYNCED, dry=True, equal=False)).startswith(
        "3 rows differ: 1 missing on the target, 1 only there, 1 with other content"
    )
    assert sync_summary(replace(SYNCED, dry=True, touched=0)).startswith("nothing differs")
