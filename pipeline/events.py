"""All that the engine can say while it works: frozen events, for consoles, logs and metrics alike."""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

Verdict = Literal["pass", "fail", "partial"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """The base of everything that a long command yields."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Previewed(Event):
    """What a copy would do: the slices left, what they weigh, and the indexes that would be set aside.

    ``rows_before`` were in the target's table before the run.
    ``read_seconds`` is one stream's time to read what is left, by a timed sample; None where nothing was timed.
    """

    run: int | None
    finished: bool
    table: str
    source: str
    target: str
    slices: int
    slices_left: int
    bytes_left: int
    rows_estimate: int
    columns: tuple[str, ...]
    indexes: tuple[str, ...]
    rows_before: int
    read_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned(Event):
    """A run stands in the ledger, new or resumed; ``rows_estimate`` is the source's own estimate.

    ``bytes_estimate`` is the source's table with its TOAST, dead rows too; ``bytes_done`` is what the
    slices that were done before had on the wire (0: not known).
    """

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
    bytes_done: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRows(Event):
    """The target's table had rows: equal to the source's, different from those, and of keys that it has not."""

    table: str
    equal: int
    different: int
    only_there: int
    on_conflict: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined(Event):
    """So many rows of the source cannot be carried, and lie in quarantine."""

    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried(Event):
    """The end of a retry: rows brought now, rows that the source has no more, and those that stay in quarantine."""

    run: int
    brought: int
    gone: int
    left: int


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexDeferred(Event):
    """An index's definition was recorded, and the index dropped, in one transaction."""

    name: str
    definition: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerProgress:
    """What one worker has of its slice: rows read from the source, bytes handed to the target.

    ``bytes_moved`` goes on from slice to slice. A ``rows`` of None: not known, on a second try.
    """

    worker: int
    ordinal: int
    rows: int | None
    bytes: int
    bytes_moved: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress(Event):
    """Totals of this process so far, with those of the slices under way; ``slices`` are the finished ones."""

    rows: int
    bytes: int
    slices: int
    seconds: float
    workers: tuple[WorkerProgress, ...] = ()


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
    """A pass over what changed on the source since the run began, and what it brought over.

    ``foreign`` are rows that only the target has and that the run did not bring: they stay.
    """

    number: int
    changed: int
    upserted: int
    deleted: int
    foreign: int
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
    """The end of a copy. ``moved_rows`` counts this process, ``rows`` the run; seconds are this process'.

    ``settled`` says that the last pass found nothing left to bring; ``rows_before`` were in the target's table
    before the run; ``foreign_rows`` are those that only the target has, at the last pass.
    """

    run: int
    already_done: bool
    rows: int
    moved_rows: int
    moved_bytes: int
    slices: int
    moved_slices: int
    retries: int
    changed_rows: int
    quarantined_rows: int
    rows_before: int
    foreign_rows: int
    settled: bool
    indexes: tuple[str, ...]
    load_seconds: float
    index_seconds: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncPlanned(Event):
    """A sync begins: what was touched since a pass found both sides equal is looked at, or everything (None)."""

    table: str
    source: str
    target: str
    since: datetime | None
    since_kind: str | None
    rows_estimate: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Differing(Event):
    """Differences found: kind, key, the columns in which two rows differ, and what a sync would do ("": not asked)."""

    rows: tuple[tuple[str, tuple[str, ...], tuple[str, ...], str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncDone(Event):
    """The end of a sync; or, with ``dry``, of a list: then the numbers are of what differs.

    ``kept`` rows stay different because somebody else wrote them, ``foreign`` are rows that only the target
    has and that stay; ``left`` are the first of both, kind and key. ``settled``: the last pass had nothing to
    write. ``touched`` keys were looked at by themselves.
    """

    run: int | None
    deep: bool
    dry: bool
    passes: int
    touched: int
    inserted: int
    updated: int
    deleted: int
    kept: int
    foreign: int
    left: tuple[tuple[str, tuple[str, ...]], ...]
    settled: bool
    equal: bool
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckStarted(Event):
    """A check of verify begins."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared(Event):
    """So many slices of both sides are summed up."""

    slices_done: int
    slices: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckDone(Event):
    """A check's verdict with its figures: plain numbers, texts and lists, ready for JSON."""

    name: str
    verdict: Verdict
    summary: str
    figures: dict[str, object]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyDone(Event):
    """The end of a verify: what was compared, when, and every check. ``kind`` is full or incremental; times are UTC."""

    verdict: Verdict
    kind: str
    source: str
    target: str
    source_server: str
    target_server: str
    table: str
    columns: tuple[str, ...]
    ignored: tuple[str, ...]
    began: datetime
    ended: datetime
    tool_version: str
    checks: tuple[CheckDone, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStarted(Event):
    """A step of a cutover, of a rehearsal or of the way back begins; ``number`` of ``steps``."""

    name: str
    title: str
    number: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone(Event):
    """A step is done, and its evidence in the ledger; ``before`` says that it was done by an earlier command."""

    name: str
    summary: str
    seconds: float
    before: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerNeeded(Event):
    """The role may not do what a step needs: the table's owner has to run ``script``, and is waited for."""

    fact: str
    script: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Watching(Event):
    """The watch after the switch goes on: who is still connected to legacy, and how main's searches do."""

    seconds: float
    of_seconds: float
    strays: int
    searches: int
    errors: int
    p95_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CutoverDone(Event):
    """The end of a cutover, a rehearsal, a way back or a finalize, or of the part that was asked for.

    ``outcome`` is rehearsed, switched, stopped (before the step that was named), rolled back,
    finalized, or cleared (of what a rollback had left).
    ``fence_seconds`` is for how long no side took writes. ``remains`` are things that stay, for people.
    """

    cutover: int
    kind: str
    outcome: str
    steps: tuple[tuple[str, str, float], ...]
    fence_seconds: float | None = None
    next_step: str | None = None
    remains: tuple[str, ...] = ()
