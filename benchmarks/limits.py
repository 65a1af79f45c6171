"""What the copy promises, beside what was found. A figure beyond its limit is shown, and is no error.

The figures depend on the machine, and on what else it does; a person judges them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from contenders import BY_HAND, COPY_AND_INDEX, DEFAULT_COPY, DUMP, RAW, STREAMS
from outcome import Outcome
from pipeline.show.figures import size
from scenes import Scene
from turns import Result

# The table that the limits are stated for, and the distance.
STATED_ROWS, STATED_LATENCY_MS = 200_000, 20

Unit = Literal["ratio", "share", "bytes", "slices", "seconds", "rows a second"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A figure and the most that it may be, or the ``least`` that it has to be."""

    what: str
    unit: Unit
    found: float
    limit: float
    least: bool = False

    @property
    def is_kept(self) -> bool:
        """Return whether the figure is on the right side of its limit."""
        return self.found >= self.limit if self.least else self.found <= self.limit


def limits(outcome: Outcome) -> tuple[Limit, ...]:
    """Return every limit for which the run has figures."""
    return (*_speeds(outcome.results), *_distances(outcome), *_memory(outcome), *_studies(outcome), *_proofs(outcome))


def in_words(value: float, unit: Unit) -> str:
    """Return a figure, or a limit, as people read it."""
    match unit:
        case "ratio":
            return f"{value:.2f} x"
        case "share":
            return f"{value:.2%}"
        case "bytes":
            return size(value)
        case "slices":
            return f"{value:.2f}"
        case "seconds":
            return f"{value:.2f} s"
        case "rows a second":
            return f"{value:,.0f}"


def _named(results: Sequence[Result], *names: str) -> Result | None:
    """Return the fastest result of these names, None where none of them ran."""
    found = [one for one in results if one.contender.name in names]
    return min(found, key=lambda one: one.seconds, default=None)


def _ratio(
    what: str, results: Sequence[Result], name: str, base: tuple[str, ...], limit: float, *, least: bool = False
) -> Iterator[Limit]:
    """Yield the ratio of two medians, where both ran; ``{}`` in ``what`` becomes the base's name."""
    one, other = _named(results, name), _named(results, *base)
    if one is not None and other is not None:
        words = what.format(other.contender.name)
        yield Limit(what=words, unit="ratio", found=one.seconds / other.seconds, limit=limit, least=least)


def _speeds(results: Sequence[Result]) -> Iterator[Limit]:
    yield from _ratio(f"{DEFAULT_COPY} to the best raw pipe, {{}}", results, DEFAULT_COPY, RAW, 1.10)
    yield from _ratio("pg_dump | pg_restore to {}", results, DUMP, (DEFAULT_COPY,), 3.5, least=True)
    yield from _ratio("copy and index build to load, then CREATE INDEX", results, COPY_AND_INDEX, (BY_HAND,), 1.05)


def _distances(outcome: Outcome) -> Iterator[Limit]:
    for section in outcome.sections:
        if section.scene.latency_ms:
            for count in STREAMS:
                copy, raw = (f"{kind}-{count}{section.scene.suffix}" for kind in ("copy", "raw"))
                yield from _ratio(f"{copy} to {{}}", section.results, copy, (raw,), 1.15)


def _memory(outcome: Outcome) -> Iterator[Limit]:
    scenes: tuple[Scene, ...] = tuple(section.scene for section in outcome.sections)
    copies = {f"copy-{count}{scene.suffix}" for count in STREAMS for scene in scenes} | {COPY_AND_INDEX}
    peaks = [one.peak_bytes for one in outcome.results if one.contender.name in copies]
    peaks += [case.peak_bytes for case in outcome.memory or ()]
    if peaks:
        yield Limit(what="peak memory of any copy", unit="bytes", found=max(peaks), limit=120e6)
    if outcome.memory is not None:
        of_tables = [case.peak_bytes for case in outcome.memory]
        found = max(of_tables) / min(of_tables)
        yield Limit(what="peak memory, most to least of all tables", unit="ratio", found=found, limit=1.10)


def _studies(outcome: Outcome) -> Iterator[Limit]:
    if (ledger := outcome.ledger) is not None:
        what = "slices, commits and marks in a copy's time"
        yield Limit(what=what, unit="share", found=ledger.share, limit=0.02)
    if (resume := outcome.resume) is not None:
        what = f"slices repeated after a kill, {resume.workers} workers"
        yield Limit(what=what, unit="slices", found=resume.repeated_slices, limit=resume.workers)
    if (changes := outcome.changes) is not None:
        before = changes.before_seconds / changes.copy_seconds
        yield Limit(what="checks and plan in a copy's time", unit="share", found=before, limit=0.03)
        passing = changes.pass_seconds / changes.copy_seconds
        what = f"pass over {changes.changed_rows:,} changed rows to the copy"
        yield Limit(what=what, unit="ratio", found=passing, limit=0.10)


def _proofs(outcome: Outcome) -> Iterator[Limit]:
    if (cost := outcome.proofs) is None:
        return

    def ratio(what: str, found: float, base: float, limit: float) -> Limit:
        return Limit(what=what, unit="ratio", found=found / base, limit=limit)

    deep = cost.deep_compare_seconds
    yield ratio("verify of all rows to the copy", cost.verify_seconds, cost.copy_seconds, 0.7)
    yield ratio(f"sync of {cost.few:,} changed rows to comparing all", cost.sync_seconds, deep, 0.1)
    yield ratio("verify --incremental after it to comparing all", cost.incremental_seconds, deep, 0.1)
    yield ratio(f"sync --deep of {cost.few:,} changed rows to comparing all", cost.deep_sync_seconds, deep, 1.3)
    late = f"{cost.few:,} late changes"
    yield Limit(what=f"fence held, {late}", unit="seconds", found=cost.fence_seconds, limit=1.0)
    yield ratio(f"fence held, {late}, to comparing all", cost.fence_seconds, deep, 0.2)
    what = f"changed rows that a sync brings, of {cost.many:,}"
    yield Limit(what=what, unit="rows a second", found=cost.rows_per_second, limit=8_000, least=True)
    yield Limit(what="peak memory of verify, every row different", unit="bytes", found=cost.peak_bytes, limit=120e6)
