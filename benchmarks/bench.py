"""The benchmark: copy beside a raw pipe, pg_dump and a loop of inserts, in one run on this machine.

Run as: python benchmarks/bench.py [--quick]. See benchmarks/README.md.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psycopg2
from rich.console import Console
from rich.table import Table

from contenders import DEFAULT_COPY, Contender, checks, index_builds, loads
from measure import BenchError, Measurement, Signals, measure
from pipeline import __version__
from pipeline.demo.fill import MAX_ROWS
from pipeline.errors import EXIT_OK, PipelineError
from pipeline.postgres.tables import read_extension
from pipeline.show.figures import size
from pipeline.show.words import error_lines
from pipeline.wording import counted
from testbed import RELEASES, SERVER_SETTINGS, Content, Testbed, testbed

SCHEMA_VERSION = 1
DEFAULT_ROWS, QUICK_ROWS = 200_000, 20_000
DEFAULT_ROUNDS = 3
# Above this the loop of inserts takes minutes a round, and runs only when it is asked for.
INSERT_ROWS = 20_000
# Wide enough for the table where stdout is a file or a pipe.
PLAIN_WIDTH = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A contender with the measurements of all its rounds, in order, and what main held after the last."""

    contender: Contender
    measurements: tuple[Measurement, ...]
    left: Content

    @property
    def seconds(self) -> float:
        """Return the median of the wall seconds."""
        return statistics.median(one.seconds for one in self.measurements)

    @property
    def cpu_seconds(self) -> float:
        """Return the median of the CPU seconds."""
        return statistics.median(one.cpu_seconds for one in self.measurements)

    @property
    def peak_bytes(self) -> int:
        """Return the highest peak of all rounds."""
        return max(one.peak_bytes for one in self.measurements)


def tell(text: str) -> None:
    """Write one line for people."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code: 0, 1 where a contender failed or brought other rows, 2, 130, 143."""
    chosen = _parse(arguments)
    signals = Signals()
    try:
        with testbed(chosen.rows, signals, tell) as bed:
            report = _run(bed, chosen)
        if chosen.json is not None:
            chosen.json.write_text(json.dumps(report, indent=2) + "\n")
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE as JSON")
    chosen = parser.parse_args(arguments)
    if chosen.rows is None:
        chosen.rows = QUICK_ROWS if chosen.quick else DEFAULT_ROWS
    if chosen.index is None:
        chosen.index = chosen.quick
    if chosen.json is not None and not chosen.json.absolute().parent.is_dir():
        parser.error(f"argument --json: there is no folder {chosen.json.parent}")
    return chosen


def _count(most: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {most}")
        return int(text)

    return count


def _run(bed: Testbed, chosen: argparse.Namespace) -> dict[str, object]:
    """Run everything that was chosen, print the table, and return the report."""
    with closing(bed.connect(bed.main)) as connection:
        loading = loads(bed, connection, with_insert=chosen.all or bed.content.rows <= INSERT_ROWS)
        building = index_builds(bed, connection) if chosen.index else ()
    machine = _machine(bed)
    tell("warming up")
    for contender in loading:
        if contender.name in ("raw-1", DEFAULT_COPY):
            _turn(bed, contender)
    results = [*_rounds(bed, loading, chosen.rounds), *_rounds(bed, building, chosen.rounds)]
    _turn(bed, next(contender for contender in loading if contender.name == DEFAULT_COPY))
    results += _rounds(bed, checks(), chosen.rounds)
    _print(bed, results, machine)
    return {
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "data": {
            "rows": bed.content.rows,
            "digest": bed.content.digest,
            "dimensions": int(bed.environment["EMBEDDING_DIMENSIONS"]),
            "stream_bytes": bed.stream_bytes,
            "table_bytes": bed.table_bytes,
        },
        "server_settings": SERVER_SETTINGS,
        "rounds": chosen.rounds,
        "contenders": [_entry(bed, result, results) for result in results],
    }


def _rounds(bed: Testbed, contenders: Sequence[Contender], rounds: int) -> list[Result]:
    """Let each contender have a turn per round, and compare what it left after its last one.

    Every round begins with another contender, so that none always follows the same one.
    """
    measured: dict[str, list[Measurement]] = {contender.name: [] for contender in contenders}
    left: dict[str, Content] = {}
    for number in range(rounds):
        first = number % len(contenders) if contenders else 0
        for contender in (*contenders[first:], *contenders[:first]):
            one = _turn(bed, contender)
            measured[contender.name].append(one)
            tell(f"round {number + 1} of {rounds}  {contender.name:<14} {one.seconds:8.2f} s")
            if number + 1 == rounds:
                left[contender.name] = bed.check(contender.name, with_index=contender.kind == "index")
    return [Result(contender=one, measurements=tuple(measured[one.name]), left=left[one.name]) for one in contenders]


def _turn(bed: Testbed, contender: Contender) -> Measurement:
    if contender.kind != "check":
        # The pipeline finds the index and defers it; by hand it is made after the load.
        bed.reset(with_index=contender.finds_index)
    try:
        return measure(contender.steps, bed.environment, bed.folder)
    except BenchError as error:
        raise BenchError(f"{contender.name}: {error.fact}", error.hint) from error


def _ratio(result: Result, results: Sequence[Result]) -> tuple[float, str]:
    """Return the median's ratio to the fastest of those it is held against, and that one's name."""
    best = min((r for r in results if r.contender.name in result.contender.against), key=lambda r: r.seconds)
    return result.seconds / best.seconds, best.contender.name


def _entry(bed: Testbed, result: Result, results: Sequence[Result]) -> dict[str, object]:
    ratio, to = _ratio(result, results)
    return {
        "name": result.contender.name,
        "what": result.contender.what,
        "kind": result.contender.kind,
        "median_seconds": result.seconds,
        "median_cpu_seconds": result.cpu_seconds,
        "peak_bytes": result.peak_bytes,
        "bytes_per_second": bed.stream_bytes / result.seconds,
        "ratio": ratio,
        "ratio_to": to,
        "left": asdict(result.left),
        "equal": result.left == bed.content,
        "rounds": [asdict(one) for one in result.measurements],
    }


def _machine(bed: Testbed) -> dict[str, object]:
    """Return what the figures depend on, the load by others before the first turn included; not the name."""
    servers = {}
    for name, server in (("legacy", bed.legacy), ("main", bed.main)):
        with closing(bed.connect(server)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT pg_catalog.current_setting('server_version')")
            ((release,),) = cursor.fetchall()
            extension = read_extension(cursor)
            servers[name] = {"postgresql": release, "pgvector": extension.text if extension else None}
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average_1_min": os.getloadavg()[0],
        "python": platform.python_version(),
        "psycopg2": version("psycopg2-binary"),
        "pipeline": __version__,
        "servers": servers,
    }


def _print(bed: Testbed, results: Sequence[Result], machine: dict[str, object]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("contender")
    for column in ("seconds", "least", "most", "MB/s", "ratio", "CPU s", "memory"):
        table.add_column(column, justify="right")
    table.add_column("what")
    for result in results:
        ratio, to = _ratio(result, results)
        wall = [one.seconds for one in result.measurements]
        table.add_row(
            result.contender.name,
            *(f"{seconds:.2f}" for seconds in (result.seconds, min(wall), max(wall))),
            f"{bed.stream_bytes / result.seconds / 1e6:.0f}",
            f"{ratio:.2f} x {to}",
            f"{result.cpu_seconds:.2f}",
            size(result.peak_bytes),
            result.contender.what,
        )
    console.print(table)
    console.print(
        f"\n{counted(bed.content.rows, 'row')}, {size(bed.stream_bytes)} as binary COPY,"
        f" {size(bed.table_bytes)} on disk; {counted(len(results[0].measurements), 'round')}, medians."
        f"\nCount and digest of all rows were equal after each contender's last round."
        f"\n{machine['cores']} cores, kernel {machine['kernel']}, PostgreSQL {' to '.join(RELEASES)}."
    )


if __name__ == "__main__":
    sys.exit(main())
