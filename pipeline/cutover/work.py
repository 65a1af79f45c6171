"""What all steps of a cutover share: the crew, both ends, the lease, and the books in the ledger on main."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Protocol, TypeVar

from pipeline.endpoints import Endpoint
from pipeline.errors import RefusedError
from pipeline.events import Event
from pipeline.ledger import cutovers, leases, runs
from pipeline.ledger.cutovers import Cutover, Kind, StepRecord
from pipeline.move.lease import Lease
from pipeline.options import CutoverOptions
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Cursor, Session
from pipeline.settings import Route, Settings, TableMapping

E = TypeVar("E", bound=Event)
PURPOSE = "cutover"
# What every step yields on its way, and returns at its end: evidence for the ledger, and a line for people.
Deed = Generator[Event, None, tuple[Mapping[str, Any], str]]


class Search(Protocol):
    """Search as the application will, where its settings lead, on an engine of its own."""

    def by_vector(
        self, endpoint: Endpoint, settings: Settings, vector: Sequence[float], k: int
    ) -> list[tuple[str, float]]:
        """Return key and distance of the nearest rows. Raises PipelineError."""
        ...

    def by_text(self, endpoint: Endpoint, settings: Settings, text: str, k: int) -> list[tuple[str, float]]:
        """Return key and distance of the rows nearest to a text, embedded by Ollama. Raises PipelineError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What a cutover needs from beside the engine: the application's search, and the revisions of a ledger."""

    search: Search
    install_ledger: Callable[[Endpoint, Settings], None]
    has_revisions: Callable[[], bool]


@dataclass(slots=True, kw_only=True)
class Work:
    """A cutover under way. Everything that it writes into the ledger is guarded by its lease."""

    crew: Crew
    route: Route
    settings: Settings
    options: CutoverOptions
    tools: Tools
    cutover: Cutover
    lease: Lease
    records: dict[str, StepRecord] = field(default_factory=dict)

    @property
    def source(self) -> Endpoint:
        """Return legacy, as a session reaches it that passes this cutover's fences."""
        return replace(self.route.source, through=self.cutover.through)

    @property
    def target(self) -> Endpoint:
        """Return main, as a session reaches it that passes this cutover's fences."""
        return replace(self.route.target, through=self.cutover.through)

    @property
    def forward(self) -> Route:
        """Return the route that this cutover's rows take from legacy to main: past the guard, and past the fence."""
        return replace(self.route, source=self.source)

    @property
    def rehearsal(self) -> bool:
        """Return whether nothing is to be switched."""
        return self.cutover.kind == "rehearsal"

    def stands(self, name: str) -> bool:
        """Return whether a step was done, by the ledger."""
        return (record := self.records.get(name)) is not None and record.stands

    def evidence(self, name: str) -> Mapping[str, Any]:
        """Return what was seen in a step, or is intended in it; nothing where it was never begun."""
        record = self.records.get(name)
        return {} if record is None else record.evidence

    def intend(self, name: str, intended: Mapping[str, Any] | None = None) -> None:
        """Record, before it is done, what a step is about to touch."""
        self.note(lambda cursor: cutovers.intend_step(cursor, self.cutover.id, name, intended or {}))

    def finish(self, name: str, evidence: Mapping[str, Any]) -> None:
        """Record that a step is done."""
        self.note(lambda cursor: cutovers.finish_step(cursor, self.cutover.id, name, evidence))

    def undo(self, *names: str) -> None:
        """Record that what steps had done does not stand any more."""
        self.note(lambda cursor: cutovers.undo_steps(cursor, self.cutover.id, names))

    def note(self, write: Callable[[Cursor], object]) -> None:
        """Write into the ledger, in a transaction that nobody else's lease lets through; read the books again.

        Called from the main thread. Raises BusyError where somebody else has taken the cutover over.
        """

        def work() -> tuple[Cutover, dict[str, StepRecord]]:
            with (
                self.crew.session(self.route.target, PURPOSE) as session,
                session.transaction(then=self.lease.guard) as cursor,
            ):
                leases.check_guard(cursor)
                write(cursor)
                return _read(cursor, self.route, self.cutover)

        self.cutover, self.records = self.crew.call(work)

    def now(self) -> datetime:
        """Return main's time: what every step's times are by, whichever process does it."""

        def work() -> datetime:
            with self.crew.session(self.route.target, PURPOSE) as session:
                ((now,),) = session.rows("SELECT pg_catalog.clock_timestamp()")
            assert isinstance(now, datetime)
            return now

        return self.crew.call(work)


def _read(cursor: Cursor, route: Route, cutover: Cutover) -> tuple[Cutover, dict[str, StepRecord]]:
    found = cutovers.latest_cutover(cursor, route.table)
    return found if found is not None and found.id == cutover.id else cutover, cutovers.read_steps(cursor, cutover.id)


def find_cutover(session: Session, mapping: TableMapping) -> tuple[Cutover | None, dict[str, StepRecord]]:
    """Return the cutover that has not ended, else the last one, with its steps. Raises RefusedError: no ledger."""
    runs.check_revision(session)
    with session.transaction(read_only=True) as cursor:
        found = cutovers.latest_cutover(cursor, mapping)
        return found, {} if found is None else cutovers.read_steps(cursor, found.id)


def check_same_ends(cutover: Cutover, route: Route) -> None:
    """Raise RefusedError where a cutover is about other databases than the settings name."""
    if (cutover.source_label, cutover.target_label) != route.labels:
        raise RefusedError(
            f"{cutover.kind} {cutover.id} is from {cutover.source_label} to {cutover.target_label}; the settings name"
            f" {route.labels[0]} and {route.labels[1]}",
            "give the --env-file that it was begun with; pipeline settings shows where each points",
        )


def begin(crew: Crew, route: Route, lease: Lease, kind: Kind, options: Mapping[str, Any]) -> Cutover:
    """Record a new cutover. Raises BusyError where another one has not ended."""
    with crew.session(route.target, PURPOSE) as session, session.transaction(then=lease.guard) as cursor:
        leases.check_guard(cursor)
        return cutovers.create_cutover(cursor, kind, route.labels, route.table, options)


def keep(events: Generator[Event, None, None], kind: type[E], found: list[E]) -> Generator[Event, None, None]:
    """Hand all events on, and keep those of one kind."""
    for event in events:
        if isinstance(event, kind):
            found.append(event)
        yield event
