"""The benchmark: copy beside a raw pipe, pg_dump and a loop of inserts, in one run on this machine.

Contenders take turns in scenes: legacy warm, both servers at a distance (--latency), legacy cold (--cold).
The limits that the copy promises are printed beside what was found. See benchmarks/README.md.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import psycopg2

import studies
from choices import Choices, parse
from contenders import COPIES, DEFAULT_COPY, RAW, Contender, checks, index_builds, missing_tools, names, others, streams
from document import document, read_machine
from link import pass_rate
from measure import BenchError, Signals
from outcome import Data, Distance, Outcome, Section
from pipeline.errors import EXIT_OK, PipelineError
from pipeline.show.words import error_lines
from proving import proofs
from report import print_report
from scenes import Scene
from servers import connect
from testbed import Testbed, testbed
from turns import Result, Turns

SELECTS = 20


def tell(text: str) -> None:
    """Write one line for people."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code: 0, 1 where a contender failed or brought other rows, 2, 130, 143."""
    choices = parse(__doc__, arguments)
    signals = Signals()
    load_before = os.getloadavg()[0]
    try:
        with testbed(choices.rows, signals, tell) as bed:
            outcome = _run(bed, choices, load_before)
        if choices.json is not None:
            choices.json.write_text(json.dumps(document(outcome), indent=2) + "\n")
        print_report(outcome)
        return EXIT_OK
    except psycopg2.Error as error:
        words = str(error).strip().split("\n")[0] or type(error).__name__
        return _fail(BenchError(f"a server said: {words}", "look at the free disk and memory, or take fewer --rows"))
    except PipelineError as error:
        return _fail(error)


def _fail(error: PipelineError) -> int:
    tell(error_lines(error))
    return error.exit_code


def _run(bed: Testbed, choices: Choices, load_before: float) -> Outcome:
    """Run everything that was chosen, the changes and proofs last: after them legacy is not what it was."""
    turns = Turns(rounds=choices.rounds, tell=tell)
    machine = read_machine(bed, load_before)
    data = Data(
        content=bed.content,
        dimensions=int(bed.environment["EMBEDDING_DIMENSIONS"]),
        stream_bytes=bed.stream_bytes,
        table_bytes=bed.table_bytes,
    )
    sections: list[Section] = []
    for scene in choices.scenes:
        if any(choices.wants(name) for name in names(scene)):
            sections.append(_section(bed, turns, scene, choices, warm_up=not sections))
    results = [result for section in sections for result in section.results]
    return Outcome(
        data=data,
        machine=machine,
        rounds=choices.rounds,
        missing_tools=missing_tools(),
        sections=tuple(sections),
        memory=studies.memory(bed, turns, results) if choices.memory else None,
        ledger=studies.ledger(bed, turns) if choices.ledger else None,
        resume=studies.resume(bed, turns) if choices.resume else None,
        changes=studies.changes(bed, turns) if choices.changes else None,
        proofs=proofs(bed, turns) if choices.proofs else None,
    )


def _section(bed: Testbed, turns: Turns, scene: Scene, choices: Choices, *, warm_up: bool) -> Section:
    """Let all that were chosen take their turns in a scene: first those that load, then by themselves the others."""

    def wanted(contenders: Sequence[Contender]) -> list[Contender]:
        return [one for one in contenders if choices.wants(one.name)]

    turns = replace(turns, cold=scene.cold)
    is_near = not scene.suffix
    tell(scene.title)
    with scene.of(bed) as there:
        with closing(bed.connect(bed.main)) as connection:
            piping = streams(there, connection, scene)
            loading = wanted([*piping, *others(there, connection)] if is_near else piping)
            building = wanted(index_builds(there, connection)) if is_near else []
        if warm_up:
            # Programs and legacy's pages into memory, WAL files for later turns: by one of each kind.
            tell("warming up")
            for kind in (RAW, COPIES):
                for one in [one for one in loading if one.name.removesuffix(scene.suffix) in kind][:1]:
                    turns.take(there, one)
        results: list[Result] = [*turns.take_all(there, loading), *turns.take_all(there, building)]
        if checking := wanted(checks()) if is_near else []:
            turns.take(there, next(one for one in piping if one.name == DEFAULT_COPY))
            results += turns.take_all(there, checking)
        distance = None if scene.latency_ms is None else _distance(there, scene.latency_ms)
    return Section(scene=scene, results=tuple(results), distance=distance)


def _distance(bed: Testbed, latency_ms: float) -> Distance:
    """Measure what was put between contenders and servers."""
    far = replace(bed.main, port=bed.ports[bed.main.port])
    seconds = []
    with closing(connect(far, bed.folder)) as connection, connection.cursor() as cursor:
        for _ in range(SELECTS):
            started = time.monotonic()
            cursor.execute("SELECT 1")
            seconds.append(time.monotonic() - started)
    return Distance(select_ms=statistics.median(seconds) * 1000, bytes_per_second=pass_rate(latency_ms))


if __name__ == "__main__":
    sys.exit(main())
