"""All that a run of the benchmark measured, as values."""

from dataclasses import dataclass

from content import Content
from proving import ProofCost
from scenes import Scene
from studies import LedgerCost, MemoryCase, PassCost, ResumeCost
from turns import Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far the servers were: a SELECT as measured, in ms, and the proxy's own bytes a second on one connection."""

    select_ms: float
    bytes_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A scene with the results of all that took turns in it."""

    scene: Scene
    results: tuple[Result, ...]
    distance: Distance | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The table that the contenders bring: what it holds, and its bytes as one binary COPY and on disk."""

    content: Content
    dimensions: int
    stream_bytes: int
    table_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """All that a run measured. None: not asked for."""

    data: Data
    machine: dict[str, object]
    rounds: int
    missing_tools: tuple[str, ...]
    sections: tuple[Section, ...]
    memory: tuple[MemoryCase, ...] | None = None
    ledger: LedgerCost | None = None
    resume: ResumeCost | None = None
    changes: PassCost | None = None
    proofs: ProofCost | None = None

    @property
    def results(self) -> tuple[Result, ...]:
        """Return the results of all scenes; a contender's name says in which one it was."""
        return tuple(result for section in self.sections for result in section.results)
