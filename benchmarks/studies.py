"""What is measured beside speed: memory by the table, slices and ledger, a resume, a pass over changed rows."""

import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from psycopg2 import sql

from contenders import DEFAULT_COPY, copy_step, load
from content import Connection, check_equal, read_content
from measure import BenchError, Step, measure
from pipeline.options import DEFAULT_SLICE_BYTES, DEFAULT_WORKERS
from servers import fill_rows
from testbed import Testbed
from turns import Result, Turns

CHANGED_PASS = Path(__file__).with_name("changed_pass.py")
SMALL_ROWS = 20_000
# A content of random hexadecimal digits, 32 a hash: nothing that a server could compress.
WIDE_ROWS, WIDE_HASHES = 200, 32_768
# A small table is a trial, for which one row in fifty will do.
WIDE_SHARE = 50
CHANGED_ROWS = 1_000
MIB = 2**20
DEFAULT_SLICE_MIB = DEFAULT_SLICE_BYTES // MIB
LARGEST_SLICE_MIB, SMALLEST_SLICE_MIB = 1024, 1
# Of fewer slices, half would hardly be a moment in the middle of the work.
LEAST_SLICES = 8
KILLED_EXIT_CODE = 128 + 9


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCase:
    """The highest peak of a copy with default options, by the table that it copies."""

    what: str
    rows: int
    stream_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerCost:
    """Copies by one worker that differ in their slices alone; medians.

    ``second_per_slice`` is from the finest slices against the largest: guard, snapshot, mark and
    commit of one slice, as far as the work on rows does not hide them. ``share`` is that of the default
    slices in the time of the copy that has them.
    """

    results: tuple[Result, ...]
    second_per_slice: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeCost:
    """A copy that kills itself in the middle of a slice, and is run again; the most of all rounds.

    ``repeated_rows`` is what main was sent more than once, ``slice_rows`` the rows of its largest slice.
    """

    workers: int
    slices: int
    killed_in_slice: int
    slice_rows: int
    repeated_rows: int

    @property
    def repeated_slices(self) -> float:
        """Return the repeated rows, by the largest slice."""
        return self.repeated_rows / self.slice_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCost:
    """A pass that finds changed rows, and the one after it that finds none, beside the copy; medians.

    ``before_seconds`` is from the copy's start to its first slice: checks, plan, lease. ``copy_seconds``
    is that of the whole copy, had nothing changed: without the changes and the pass that brings them.
    """

    rows: int
    changed_rows: int
    before_seconds: float
    load_seconds: float
    pass_seconds: float
    quiet_pass_seconds: float
    copy_seconds: float


def memory(bed: Testbed, turns: Turns, results: Sequence[Result]) -> tuple[MemoryCase, ...]:
    """Copy a small table, one of few rows with a megabyte each, and the run's own unless ``results`` have it."""
    wide_rows = min(WIDE_ROWS, max(1, bed.content.rows // WIDE_SHARE))

    def small(connection: Connection) -> None:
        fill_rows(connection, bed.mapping, SMALL_ROWS)

    def wide(connection: Connection) -> None:
        fill_rows(connection, bed.mapping, wide_rows)
        key, content = map(sql.Identifier, bed.mapping.columns[:2])
        with connection.cursor() as cursor:
            cursor.execute(
                sql.SQL(
                    "UPDATE {table} SET {content} = (SELECT pg_catalog.string_agg("
                    "pg_catalog.md5({key}::pg_catalog.text || n::pg_catalog.text), '')"
                    " FROM pg_catalog.generate_series(1, %s) AS n)"
                ).format(table=bed.table, key=key, content=content),
                (WIDE_HASHES,),
            )

    turns.tell("memory: more tables")
    tables = [("the run's table", bed), ("rows of 1 MB", bed.with_table("bench_wide", wide))]
    if bed.content.rows > SMALL_ROWS:
        tables.insert(0, ("a small table", bed.with_table("bench_small", small)))
    found = []
    for what, one in tables:
        result = next((r for r in results if one is bed and r.contender.name == DEFAULT_COPY), None)
        if result is None:
            (result,) = turns.take_all(one, (load(DEFAULT_COPY, what, (copy_step(DEFAULT_WORKERS),)),))
        found.append(
            MemoryCase(what=what, rows=one.content.rows, stream_bytes=one.stream_bytes, peak_bytes=result.peak_bytes)
        )
    return tuple(found)


def ledger(bed: Testbed, turns: Turns) -> LedgerCost:
    """Copy a table of more than 2 MiB in slices of three sizes, and a table of one row.

    Slices are the honest handle: guard and mark travel in the same messages as COPY and COMMIT, so no
    server log can tell their time apart.
    """
    single = bed.with_table("bench_single", lambda connection: fill_rows(connection, bed.mapping, 1))
    sizes = {"largest": LARGEST_SLICE_MIB, "default": DEFAULT_SLICE_MIB, "finest": SMALLEST_SLICE_MIB}
    sized = [
        load(name, f"--workers 1 --slice-size {mib}", (copy_step(1, "--slice-size", str(mib)),), ("largest",))
        for name, mib in sizes.items()
    ]
    largest, default, finest = results = turns.take_all(bed, sized)
    cost = (finest.seconds - largest.seconds) / (finest.slices - largest.slices)
    results += turns.take_all(
        single, (load("one row", "start, plan, ledger, pass: any copy's own time", (copy_step(1),), ("largest",)),)
    )
    return LedgerCost(results=tuple(results), second_per_slice=cost, share=cost * default.slices / default.seconds)


def resume(bed: Testbed, turns: Turns) -> ResumeCost:
    """Kill a copy where it would lose most: each worker in a slice, one of them about to commit its own."""
    mib = min(DEFAULT_SLICE_MIB, max(1, bed.table_bytes // MIB // LEAST_SLICES))
    half = max(1, bed.table_bytes // (mib * MIB) // 2)
    step = copy_step(DEFAULT_WORKERS, "--slice-size", str(mib))
    contender = load("resumed", "killed half way, run again", (_killed(step, half), step), ())
    found = []
    for number in range(turns.rounds):
        before = bed.inserted_rows()
        one = turns.take(bed, contender)
        bed.check(contender.name, with_index=False)
        turns.tell(f"round {number + 1} of {turns.rounds}  {contender.name:<14} {one.seconds:8.2f} s")
        slices, slice_rows = bed.slices()
        found.append(
            ResumeCost(
                workers=DEFAULT_WORKERS,
                slices=slices,
                killed_in_slice=half,
                slice_rows=slice_rows,
                repeated_rows=bed.inserted_rows() - before - bed.content.rows,
            )
        )
    return max(found, key=lambda one: one.repeated_rows)


def _killed(step: Step, passage: int) -> Step:
    """Return the step with a copy that kills itself when so many slices are sent, before this one's commit."""
    ((command,),) = step
    variables = ("PIPELINE_TESTING=1", f"PIPELINE_FAILPOINT=after_copy:kill@{passage}")
    shell = ("/bin/sh", "-c", f'"$@"; test $? -eq {KILLED_EXIT_CODE}', "sh")
    return (((*shell, "/usr/bin/env", *variables, *command),),)


def changes(bed: Testbed, turns: Turns) -> PassCost:
    """Change rows between the load and the first pass of a copy, in every round other ones.

    The last of all: legacy is not what it was.
    """
    rows = min(CHANGED_ROWS, bed.content.rows // 2)
    file = bed.folder / "passes.json"
    runs = []
    for number in range(turns.rounds):
        bed.reset(with_index=False)
        command = (sys.executable, str(CHANGED_PASS), str(file), str(rows))
        measure((((command,),),), bed.environment, bed.folder)
        figures = json.loads(file.read_text())
        with closing(bed.connect(bed.legacy)) as legacy, closing(bed.connect(bed.main)) as main:
            check_equal("the changed pass", read_content(legacy, bed.mapping), read_content(main, bed.mapping))
        first, second = figures.pop("passes")
        if first["written"] != rows or second["changed"] != 0:
            raise BenchError(f"the first pass did not bring the {rows} changed rows, or the second found more")
        turns.tell(f"round {number + 1} of {turns.rounds}  {'pass':<14} {first['seconds']:8.2f} s")
        runs.append(figures | {"pass_seconds": first["seconds"], "quiet_pass_seconds": second["seconds"]})
    medians = {name: statistics.median(one[name] for one in runs) for name in runs[0]}
    return PassCost(rows=bed.content.rows, changed_rows=rows, **medians)
