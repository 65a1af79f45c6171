"""All that the engine can say while it works: frozen events, for consoles, logs and metrics alike."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["pass", "fail", "partial"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """The base of everything that a long command yields."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned(Event):
    """A run stands in the ledger, new or resumed; ``rows_estimate`` is the source's own estimate."""

    run: int
    table: str
    source: str
    target: str
    resumed: bool
    slices: int
    slices_done: int
    rows_done: int
    bytes_estimate: int
    rows_estimate: int
    workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexDeferred(Event):
    """An index's definition was recorded, and the index dropped, in one transaction."""

    name: str
    definition: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress(Event):
    """Totals of this process so far: rows and bytes read from the source, slices finished."""

    rows: int
    bytes: int
    slices: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceDone(Event):
    """A slice's rows and its mark are committed on the target."""

    ordinal: int
    rows: int
    bytes: int
    seconds: float
    attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrying(Event):
    """A step failed for a reason that passes; it is tried again after ``delay`` seconds."""

    what: str
    attempt: int
    delay: float
    fact: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned(Event):
    """Something an operator should know that does not stop the work."""

    fact: str
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(Event):
    """Every slice is on the target; ``seconds`` is the time of this process for it."""

    rows: int
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciled(Event):
    """A pass over what changed on the source since the run began, and what it brought over."""

    number: int
    changed: int
    upserted: int
    deleted: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexProgress(Event):
    """An index is being built. ``fraction`` is 0 to 1 of the current phase, None where unknown."""

    name: str
    phase: str
    fraction: float | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexBuilt(Event):
    """An index stands again, valid."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyDone(Event):
    """The end of a copy. ``moved_rows`` counts this process, ``rows`` the run; seconds are this process'."""

    run: int
    already_done: bool
    rows: int
    moved_rows: int
    moved_bytes: int
    slices: int
    moved_slices: int
    retries: int
    changed_rows: int
    settled: bool
    indexes: tuple[str, ...]
    load_seconds: float
    index_seconds: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckStarted(Event):
    """A check of verify begins."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckDone(Event):
    """A check's verdict with its figures: plain numbers, texts and lists, ready for JSON."""

    name: str
    verdict: Verdict
    summary: str
    figures: dict[str, object]
    seconds: float
