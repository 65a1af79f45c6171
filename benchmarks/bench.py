"""The benchmark: copy beside a raw pipe, pg_dump and a loop of inserts, in one run on this machine.

Run as: python benchmarks/bench.py [--quick]. See benchmarks/README.md.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psycopg2

import studies
from cold import CAN_DROP
from contenders import DEFAULT_COPY, RAW, checks, index_builds, others, streams
from link import pass_rate
from measure import BenchError, Signals
from pipeline.demo.fill import MAX_ROWS
from pipeline.errors import EXIT_OK, PipelineError
from pipeline.show.words import error_lines
from report import Distance, Report, document, print_report, read_machine
from testbed import Testbed, connect, testbed
from turns import Turns

DEFAULT_ROWS, QUICK_ROWS = 200_000, 20_000
DEFAULT_ROUNDS = 3
# Above this the loop of inserts takes minutes a round, and runs only when it is asked for.
INSERT_ROWS = 20_000
MAX_LATENCY_MS = 10_000
SELECTS = 20
# Updated, deleted and new rows take at least one of two rows in ten.
LEAST_CHANGES_ROWS = 10


def tell(text: str) -> None:
    """Write one line for people."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code: 0, 1 where a contender failed or brought other rows, 2, 130, 143."""
    chosen = _parse(arguments)
    signals = Signals()
    try:
        with testbed(chosen.rows, signals, tell, chosen.latency or None) as bed:
            report = _run(bed, chosen)
            print_report(report)
        if chosen.json is not None:
            chosen.json.write_text(json.dumps(document(report), indent=2) + "\n")
        return EXIT_OK
    except psycopg2.Error as error:
        words = str(error).strip().split("\n")[0] or type(error).__name__
        return _fail(BenchError(f"a server said: {words}", "look at the free disk and memory, or take fewer --rows"))
    except PipelineError as error:
        return _fail(error)


def _fail(error: PipelineError) -> int:
    tell(error_lines(error))
    return error.exit_code


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = f"rows of the table (default {DEFAULT_ROWS}; up to {MAX_ROWS})"
    parser.add_argument("--rows", type=_count(MAX_ROWS), help=rows)
    rounds = f"turns of each contender (default {DEFAULT_ROUNDS})"
    parser.add_argument("--rounds", type=_count(100), default=DEFAULT_ROUNDS, help=rounds)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROWS} rows, and --index")
    index = "build the HNSW index too, which takes minutes a round"
    parser.add_argument("--index", action=argparse.BooleanOptionalAction, help=index)
    parser.add_argument("--all", action="store_true", help=f"run the loop of inserts above {INSERT_ROWS} rows too")
    latency = "put both servers so many milliseconds of round trip away; raw pipes and copies only (default 0)"
    parser.add_argument("--latency", type=_milliseconds, default=0.0, metavar="MS", help=latency)
    cold = "restart legacy and drop its files from the page cache before every turn"
    parser.add_argument("--cold", action="store_true", help=cold)
    memory = f"the copy's peak memory by the table: {studies.SMALL_ROWS} rows, --rows, {studies.WIDE_ROWS} rows of 1 MB"
    parser.add_argument("--memory", action="store_true", help=memory)
    parser.add_argument("--ledger", action="store_true", help="what slices, their marks and a resume cost")
    changes = f"the time of the pass that brings {studies.CHANGED_ROWS} rows changed during the copy"
    parser.add_argument("--changes", action="store_true", help=changes)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE as JSON")
    chosen = parser.parse_args(arguments)
    if chosen.rows is None:
        chosen.rows = QUICK_ROWS if chosen.quick else DEFAULT_ROWS
    if chosen.index is None:
        chosen.index = chosen.quick and not chosen.latency
    if chosen.json is not None and not chosen.json.absolute().parent.is_dir():
        parser.error(f"argument --json: there is no folder {chosen.json.parent}")
    if chosen.cold and not CAN_DROP:
        parser.error("argument --cold: this system has no posix_fadvise")
    if chosen.changes and chosen.rows < LEAST_CHANGES_ROWS:
        parser.error(f"argument --changes: wants at least {LEAST_CHANGES_ROWS} rows")
    return chosen


def _count(most: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {most}")
        return int(text)

    return count


def _milliseconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1
    if not 0 <= found <= MAX_LATENCY_MS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to {MAX_LATENCY_MS}")
    return found


def _run(bed: Testbed, chosen: argparse.Namespace) -> Report:
    """Run everything that was chosen, the changes last: after them legacy is not what it was."""
    turns = Turns(rounds=chosen.rounds, cold=chosen.cold, tell=tell)
    machine = read_machine(bed)
    with closing(bed.connect(bed.main)) as connection:
        loading = streams(bed, connection)
        if not chosen.latency:
            loading += others(bed, connection, with_insert=chosen.all or bed.content.rows <= INSERT_ROWS)
        building = index_builds(bed, connection) if chosen.index else ()
    tell("warming up")
    for contender in loading:
        if contender.name in (RAW[0], DEFAULT_COPY):
            turns.take(bed, contender)
    results = [*turns.take_all(bed, loading), *turns.take_all(bed, building)]
    if not chosen.latency:
        turns.take(bed, next(contender for contender in loading if contender.name == DEFAULT_COPY))
        results += turns.take_all(bed, checks())
    return Report(
        bed=bed,
        machine=machine,
        rounds=chosen.rounds,
        cold=chosen.cold,
        results=tuple(results),
        distance=_distance(bed, chosen.latency) if chosen.latency else None,
        memory=studies.memory(bed, turns) if chosen.memory else None,
        ledger=studies.ledger(bed, turns) if chosen.ledger else None,
        changes=studies.changes(bed, turns) if chosen.changes else None,
    )


def _distance(bed: Testbed, latency_ms: float) -> Distance:
    """Measure what was put between contenders and servers."""
    far = replace(bed.main, port=bed.ports[bed.main.port])
    seconds = []
    with closing(connect(far, bed.folder)) as connection, connection.cursor() as cursor:
        for _ in range(SELECTS):
            started = time.monotonic()
            cursor.execute("SELECT 1")
            seconds.append(time.monotonic() - started)
    return Distance(latency_ms=latency_ms, select_ms=statistics.median(seconds) * 1000, passes=pass_rate(latency_ms))


if __name__ == "__main__":
    sys.exit(main())
