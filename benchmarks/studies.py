"""What is measured beside speed: memory by the table, what slices and ledger cost, a pass over changed rows."""

import json
import statistics
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from psycopg2 import sql

from contenders import DEFAULT_COPY, DEFAULT_STREAMS, Contender, copy_step, load
from content import Connection, check_equal, read_content
from measure import BenchError, Step, measure
from pipeline.options import DEFAULT_SLICE_BYTES
from testbed import Testbed, fill_rows
from turns import Result, Turns

CHANGED_PASS = Path(__file__).with_name("changed_pass.py")
SMALL_ROWS = 20_000
# A content of random hexadecimal digits, 32 a hash: nothing that a server could compress.
WIDE_ROWS, WIDE_HASHES = 200, 32_768
CHANGED_ROWS = 1_000
LARGEST_SLICE_MIB, SMALLEST_SLICE_MIB = 1024, 1
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
    slices in the time of the copy that has them. ``resumed`` is a copy killed after half its slices and
    run again, its base the same copy left alone.
    """

    results: tuple[Result, ...]
    second_per_slice: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCost:
    """A pass that finds changed rows, and the one after it that finds none, beside the load; medians."""

    rows: int
    changed_rows: int
    load_seconds: float
    pass_seconds: float
    quiet_pass_seconds: float


def memory(bed: Testbed, turns: Turns) -> tuple[MemoryCase, ...]:
    """Copy a small table, the run's own, and one of few rows with a megabyte each."""

    def small(connection: Connection) -> None:
        fill_rows(connection, bed.mapping, SMALL_ROWS)

    def wide(connection: Connection) -> None:
        fill_rows(connection, bed.mapping, WIDE_ROWS)
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

    turns.tell("memory: two more tables")
    found = []
    for what, one in (
        ("a small table", bed.with_table("bench_small", small)),
        ("the run's table", bed),
        ("rows of 1 MB", bed.with_table("bench_wide", wide)),
    ):
        copy = load(DEFAULT_COPY, what, (copy_step(DEFAULT_STREAMS),))
        (result,) = turns.take_all(one, (copy,))
        found.append(
            MemoryCase(what=what, rows=one.content.rows, stream_bytes=one.stream_bytes, peak_bytes=result.peak_bytes)
        )
    return tuple(found)


def ledger(bed: Testbed, turns: Turns) -> LedgerCost:
    """Copy in slices of three sizes, a table of one row, and once killed half way.

    Slices are the honest handle: guard and mark travel in the same messages as COPY and COMMIT, so no
    server log can tell their time apart.
    """
    single = bed.with_table("bench_single", lambda connection: fill_rows(connection, bed.mapping, 1))
    default_mib = DEFAULT_SLICE_BYTES // 2**20
    sizes = {"largest": LARGEST_SLICE_MIB, "default": default_mib, "finest": SMALLEST_SLICE_MIB}
    sized = [
        load(name, f"--workers 1 --slice-size {mib}", (copy_step(1, "--slice-size", str(mib)),), ("largest",))
        for name, mib in sizes.items()
    ]
    largest, default, finest = results = turns.take_all(bed, sized)
    cost = (finest.seconds - largest.seconds) / max(1, finest.slices - largest.slices)
    results += turns.take_all(bed, (_killed(max(1, default.slices // 2)),))
    results += turns.take_all(
        single, (load("one row", "start, plan, ledger, pass: any copy's own time", (copy_step(1),)),)
    )
    return LedgerCost(results=tuple(results), second_per_slice=cost, share=cost * default.slices / default.seconds)


def _killed(slices: int) -> Contender:
    """Return a copy that kills itself after so many slices, and the one that goes on."""
    ((first,),) = copy_step(1)
    variables = ("PIPELINE_TESTING=1", f"PIPELINE_FAILPOINT=after_commit:kill@{slices}")
    shell = ("/bin/sh", "-c", f'"$@"; test $? -eq {KILLED_EXIT_CODE}', "sh")
    killed: Step = (((*shell, "/usr/bin/env", *variables, *first),),)
    return load(
        "resumed", f"killed after slice {slices} of the default, run again", (killed, copy_step(1)), ("default",)
    )


def changes(bed: Testbed, turns: Turns) -> PassCost:
    """Change rows between the load and the first pass of a copy, in every round other ones.

    The last of all: legacy is not what it was.
    """
    rows = min(CHANGED_ROWS, bed.content.rows // 2)
    file = bed.folder / "passes.json"
    runs = []
    for number in range(turns.rounds):
        bed.reset(with_index=False)
        if turns.cold:
            bed.cool()
        command = (sys.executable, str(CHANGED_PASS), str(file), str(rows))
        measure((((command,),),), bed.environment, bed.folder)
        figures = json.loads(file.read_text())
        with closing(bed.connect(bed.legacy)) as legacy, closing(bed.connect(bed.main)) as main:
            check_equal("the changed pass", read_content(legacy, bed.mapping), read_content(main, bed.mapping))
        first, second = figures["passes"]
        if first["upserted"] + first["deleted"] != rows or second["changed"] != 0:
            raise BenchError(f"the first pass did not bring the {rows} changed rows, or the second found more")
        turns.tell(f"round {number + 1} of {turns.rounds}  {'pass':<14} {first['seconds']:8.2f} s")
        runs.append((figures["load_seconds"], first["seconds"], second["seconds"]))
    load_seconds, pass_seconds, quiet_seconds = map(statistics.median, zip(*runs, strict=True))
    return PassCost(
        rows=bed.content.rows,
        changed_rows=rows,
        load_seconds=load_seconds,
        pass_seconds=pass_seconds,
        quiet_pass_seconds=quiet_seconds,
    )
