"""What a run of the benchmark is asked for."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from cold import CAN_DROP
from contenders import INDEX_SUFFIX, INSERT, names
from pipeline.demo.fill import MAX_ROWS
from scenes import Scene
from studies import CHANGED_ROWS, SMALL_ROWS, WIDE_ROWS

DEFAULT_ROWS, QUICK_ROWS = 200_000, 20_000
DEFAULT_ROUNDS, MAX_ROUNDS = 3, 100
# Above this the loop of inserts takes minutes a round, and runs only when it is asked for.
INSERT_ROWS = 20_000
# What --all takes of --latency: what the proxy itself costs, and a distance.
ALL_LATENCIES = (0.0, 20.0)
MAX_LATENCY_MS = 10_000
# Two slices of the finest take a table of more than 2 MiB.
LEAST_LEDGER_ROWS = 500
# Updated, deleted and new rows take at least one of two rows in ten.
LEAST_CHANGES_ROWS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Size, rounds, scenes, studies. ``only`` are patterns of contenders' names, None for the usual ones."""

    rows: int
    rounds: int
    everything: bool
    index: bool
    scenes: tuple[Scene, ...]
    only: tuple[str, ...] | None
    memory: bool
    ledger: bool
    resume: bool
    changes: bool
    proofs: bool
    json: Path | None

    def wants(self, name: str) -> bool:
        """Return whether a contender is to take turns."""
        if self.only is not None:
            return any(fnmatchcase(name, pattern) for pattern in self.only)
        if name == INSERT:
            return self.everything or self.rows <= INSERT_ROWS
        return self.index or not name.endswith(INDEX_SUFFIX)


def parse(description: str | None, arguments: Sequence[str] | None) -> Choices:
    """Return what the command line asks for; ends the process by exit code 2 where it makes no sense."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_options(parser)
    given = parser.parse_args(arguments)
    latencies = given.latency or (ALL_LATENCIES if given.all else ())
    scenes = [Scene(), *(Scene(latency_ms=milliseconds) for milliseconds in latencies)]
    if given.cold or given.all:
        scenes.append(Scene(cold=True))
    choices = Choices(
        rows=given.rows or (QUICK_ROWS if given.quick else DEFAULT_ROWS),
        rounds=given.rounds,
        everything=given.all,
        index=(given.quick or given.all) if given.index is None else given.index,
        scenes=tuple(scenes),
        only=given.only,
        memory=given.memory or given.all,
        ledger=given.ledger or given.all,
        resume=given.resume or given.all,
        changes=given.changes or given.all,
        proofs=given.proofs or given.all,
        json=given.json,
    )
    if fault := _fault(choices):
        parser.error(fault)
    return choices


def _add_options(parser: argparse.ArgumentParser) -> None:
    rows = f"rows of the table (default {DEFAULT_ROWS}; up to {MAX_ROWS})"
    parser.add_argument("--rows", type=_count(MAX_ROWS), help=rows)
    rounds = f"turns of each contender (default {DEFAULT_ROUNDS})"
    parser.add_argument("--rounds", type=_count(MAX_ROUNDS), default=DEFAULT_ROUNDS, help=rounds)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROWS} rows, and --index")
    least, distance = ALL_LATENCIES
    everything = (
        f"--index --latency {least:g},{distance:g} --cold --memory --ledger --resume --changes --proofs, and the"
    )
    parser.add_argument("--all", action="store_true", help=f"{everything} loop of inserts at any number of rows")
    index = "build the HNSW index too, which takes minutes a round"
    parser.add_argument("--index", action=argparse.BooleanOptionalAction, help=index)
    latency = "raw pipes and copies once more, both servers so many milliseconds of round trip away by a proxy"
    parser.add_argument("--latency", type=_latencies, default=(), metavar="MS[,MS...]", help=latency)
    cold = "raw pipes and copies once more, before every turn legacy restarted, its files dropped from the page cache"
    parser.add_argument("--cold", action="store_true", help=cold)
    memory = f"the copy's peak memory by the table: {SMALL_ROWS} rows, --rows, {WIDE_ROWS} rows of 1 MB"
    parser.add_argument("--memory", action="store_true", help=memory)
    parser.add_argument("--ledger", action="store_true", help="what slices and their marks cost")
    parser.add_argument("--resume", action="store_true", help="how much a copy repeats that is killed and run again")
    changes = f"the time of the checks before a copy, and of the pass that brings {CHANGED_ROWS} changed rows"
    parser.add_argument("--changes", action="store_true", help=changes)
    proofs = "verify and sync: all rows, one in a thousand changed, one in ten changed, and every row different"
    parser.add_argument("--proofs", action="store_true", help=proofs)
    only = "let only these take turns, by name or pattern (raw-*,copy-2@20ms); an empty list: only studies"
    parser.add_argument("--only", type=_patterns, metavar="NAME[,NAME...]", help=only)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE as JSON")


def _fault(choices: Choices) -> str | None:
    """Return what is wrong with options that are fine each by itself."""
    if choices.json is not None and not choices.json.absolute().parent.is_dir():
        return f"argument --json: there is no folder {choices.json.parent}"
    if not CAN_DROP and any(scene.cold for scene in choices.scenes):
        return "argument --cold: this system has no posix_fadvise"
    if choices.ledger and choices.rows < LEAST_LEDGER_ROWS:
        return f"argument --ledger: wants at least {LEAST_LEDGER_ROWS} rows"
    if choices.changes and choices.rows < LEAST_CHANGES_ROWS:
        return f"argument --changes: wants at least {LEAST_CHANGES_ROWS} rows"
    if choices.proofs and choices.rows < LEAST_CHANGES_ROWS:
        return f"argument --proofs: wants at least {LEAST_CHANGES_ROWS} rows"
    known = [name for scene in choices.scenes for name in names(scene)]
    for pattern in choices.only or ():
        if not any(fnmatchcase(name, pattern) for name in known):
            return f"argument --only: {pattern!r} is none of {', '.join(known)}"
    return None


def _count(most: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {most}")
        return int(text)

    return count


def _latencies(text: str) -> tuple[float, ...]:
    """Return the milliseconds of a list, each once, in its order."""
    return tuple(dict.fromkeys(_milliseconds(part) for part in text.split(",")))


def _milliseconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1
    if not 0 <= found <= MAX_LATENCY_MS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to {MAX_LATENCY_MS}")
    return found


def _patterns(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)
