"""Kill -9 anywhere in a cutover, or on its way back, while both sides are written to: nothing is lost or doubled."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.errors import EXIT_DIFFERENCES, EXIT_REFUSED
from tests.cutovers import BACK, EXECUTE, Cutover, Journal, Writer, points_to, rows
from tests.support import Outcome
from tests.switches import Make

# Every point and both ways from it: minutes. Without it those at which most is at stake.
WHOLE = bool(os.environ.get("CHAOS_RUNS"))
STRAYS = "writes are still sent to legacy"
STEPS = ("before_step", "in_step", "after_step")
FILES = ("--env-file", ".env.development", "--env-file", ".env")


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where a cutover is killed: at this failpoint, after the steps up to ``until`` were done in peace."""

    name: str
    until: str | None = None
    more: tuple[str, ...] = ("--skip-backup",)

    def __str__(self) -> str:
        return "-".join(filter(None, (self.until, self.name, "two_files" if FILES[0] in self.more else "")))


def points() -> Iterator[Point]:
    # Backup, catchup, fence, prove, switch and smoke; dumps are made where they are looked at.
    for number in range(1, 7):
        for name in STEPS:
            yield Point(name=f"{name}@{number}", more=() if number == 1 else ("--skip-backup",))
    for name in STEPS:
        yield Point(name=f"{name}@1", until="smoke")
    for name in ("before_open@1", "after_open@1", "in_env_edit@1", "after_env_edit@1"):
        yield Point(name=name)
    for name in ("in_env_edit@2", "after_env_edit@1"):
        yield Point(name=name, more=("--skip-backup", *FILES))
    for name in ("before_pass@1", "in_reconcile@1"):
        yield Point(name=name)
        yield Point(name=name, until="fence")


# In the order of points: a table is closed; proved and not switched; main open; files half done; all done.
SOME = ("in_step@3", "before_step@5", "after_open@1", "after_step@5", "in_env_edit@2-two_files", "fence-in_reconcile@1")
FORWARD = [point for point in points() if WHOLE or str(point) in SOME]
# Close, sync, verify, the files, open, the commands; before the switch there is only to open.
BACKWARD = [
    *(Point(name=f"{name}@{number}", until="smoke") for number in range(1, 7) for name in STEPS),
    *(
        Point(name=name, until="smoke")
        for name in ("before_pass@1", "in_reconcile@1", "in_env_edit@1", "after_env_edit@1")
    ),
    *(Point(name=f"{name}@1", until="prove") for name in STEPS),
]
SOME_BACKWARD = ("smoke-in_step@1", "smoke-in_reconcile@1", "smoke-in_step@5")


@pytest.fixture(scope="module")
def benches(make: Make) -> Callable[[bool], Cutover]:
    """Return a function to the bench that the tests share; every test ends as it began: one that fails spoils it."""
    made: list[Cutover] = []

    def get(anew: bool) -> Cutover:
        if anew or not made:
            made.append(make())
        return made[-1]

    return get


_spoiled: list[bool] = []


@pytest.fixture
def bench(benches: Callable[[bool], Cutover]) -> Iterator[Cutover]:
    found = benches(bool(_spoiled))
    _spoiled[:] = [True]
    yield found


@contextmanager
def at_work(bench: Cutover) -> Iterator[tuple[Journal, Writer, Writer]]:
    """Let an application write on each side; at the end legacy has to have what was accepted, and main gets it."""
    before = bench.env_file.read_bytes()
    journal = Journal(bench.legacy)
    writers = [Writer("legacy", bench.legacy, journal, 1)]
    try:
        writers.append(Writer("main", bench.main, journal, 2))
        writers[0].wait_for(5)
        yield journal, writers[0], writers[1]
        writers[0].wait_for(10)
    finally:
        for one in writers:
            one.stop()
    assert journal.turns() in (["legacy"], ["legacy", "main", "legacy"])
    journal.check(bench.legacy)
    assert bench.env_file.read_bytes() == before
    # What an application has added on main no run has brought: where legacy deletes it, that has to be asked for.
    bench.pipeline("sync", "--delete").expect(0)
    journal.check(bench.main)
    bench.pipeline("verify", "--check", "rows").expect(0)
    _spoiled.clear()


def try_both(*writers: Writer) -> None:
    """Let both writers try for a while: whoever was killed, what he left has to hold."""
    for one in writers:
        if one.tried:
            one.wait_for(5, refused=True)


def to_the_end(bench: Cutover, legacy: Writer, *more: str) -> Outcome:
    """Run the cutover to its end; an application that goes on writing to legacy is stopped where the watch asks it."""
    done = bench.pipeline(*EXECUTE, *more)
    if done.code == EXIT_DIFFERENCES and STRAYS in done.err:
        legacy.rest()
        done = bench.pipeline(*EXECUTE, *more)
    return done.expect(0)


def with_files(bench: Cutover, more: tuple[str, ...]) -> list[Path]:
    """Return the files that are named; there is a second one, which goes before the other."""
    if FILES[0] not in more:
        return [bench.env_file]
    first = bench.folder / ".env.development"
    lines = bench.env_file.read_text().splitlines(keepends=True)
    first.write_text("# at home\n" + "".join(line for line in lines if line.startswith("PGVECTOR_")))
    return [first, bench.env_file]


@pytest.mark.chaos
@pytest.mark.parametrize("way", ["on", "back"])
@pytest.mark.parametrize("point", FORWARD, ids=str)
def test_cutover_killed_anywhere_goes_on_and_goes_back(point: Point, way: str, bench: Cutover) -> None:
    files = with_files(bench, point.more)
    before = [path.read_bytes() for path in files]
    back = [*BACK, *(FILES if len(files) > 1 else ())]
    with at_work(bench) as (journal, legacy, main):
        if point.until is not None:
            bench.pipeline(*EXECUTE, *point.more, "--until", point.until).expect(0)
        if point.until == "smoke":
            # A watch that comes to its end, and may be killed there, is one that nobody disturbs.
            legacy.rest()
        bench.killed_at(point.name, *EXECUTE, *point.more)
        bench.wait_for_quiet()
        try_both(*([main] if point.until == "smoke" else [legacy, main]))
        assert journal.turns() in (["legacy"], ["legacy", "main"])
        if way == "on":
            to_the_end(bench, legacy, *point.more)
            main.wait_for(20)
            main.rest()
            assert journal.turns() == ["legacy", "main"]
            assert [points_to(bench, [path]) for path in files] == ["main"] * len(files)
            journal.check(bench.main)
            main.go_on()
        bench.pipeline(*back).expect(0)
        legacy.go_on()
    assert [path.read_bytes() for path in files] == before


@pytest.mark.chaos
@pytest.mark.parametrize("point", [point for point in BACKWARD if WHOLE or str(point) in SOME_BACKWARD], ids=str)
def test_rollback_killed_anywhere_goes_on(point: Point, bench: Cutover) -> None:
    switched = point.until == "smoke"
    with at_work(bench) as (journal, legacy, main):
        bench.pipeline(*EXECUTE, *point.more, "--until", str(point.until)).expect(0)
        if switched:
            main.wait_for(20)
        bench.killed_at(point.name, *BACK)
        bench.wait_for_quiet()
        try_both(legacy, main)
        there = ["legacy", "main"] if switched else ["legacy"]
        assert journal.turns() in (there, [*there, "legacy"])
        refused = bench.pipeline(*EXECUTE, *point.more).expect(EXIT_REFUSED)
        assert "is on its way back" in refused.err and "pipeline rollback --execute" in refused.err
        bench.pipeline(*BACK).expect(0)


def test_rollback_brings_a_thousand_writes_back(bench: Cutover) -> None:
    before, mode = bench.env_file.read_bytes(), bench.env_file.stat().st_mode
    bench.pipeline(*EXECUTE, "--skip-backup").expect(0)
    assert points_to(bench) == "main"
    keys = sorted(rows(bench.main))
    assert len(keys) >= 200
    with bench.main.cursor() as cursor:
        cursor.execute(
            "INSERT INTO public.embeddings (content, metadata, embedding) SELECT 'new ' || i, '{\"new\": true}',"
            " (SELECT array_agg(sin(i + d)) FROM generate_series(1, 16) AS d)::vector FROM generate_series(1, 800) AS i"
        )
        cursor.execute("UPDATE public.embeddings SET content = 'other' WHERE id::text = ANY (%s)", (keys[:100],))
        cursor.execute("DELETE FROM public.embeddings WHERE id::text = ANY (%s)", (keys[100:200],))
    written = rows(bench.main)
    done = bench.pipeline(*BACK).expect(0)
    assert "800 added, 100 written over, 100 deleted" in done.err
    assert rows(bench.legacy) == written
    bench.pipeline("verify", "--check", "rows", "--from", "main", "--to", "legacy").expect(0)
    assert (bench.env_file.read_bytes(), bench.env_file.stat().st_mode) == (before, mode)
    # What this leaves is more than the other tests' writers are made for.
    bench.legacy.execute("DELETE FROM public.embeddings WHERE content LIKE 'new %'")
    bench.pipeline("sync", "--delete").expect(0)
    bench.pipeline("verify", "--check", "rows").expect(0)
    _spoiled.clear()
