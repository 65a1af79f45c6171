"""What a cutover, or the way back, would do from here: read from the ledger, nothing is written."""

from dataclasses import dataclass

from pipeline.cutover.steps import Step, describe_back, describe_steps
from pipeline.cutover.work import PURPOSE, check_same_ends, find_cutover
from pipeline.ledger import cutovers
from pipeline.ledger.cutovers import Cutover, StepRecord
from pipeline.options import CutoverOptions
from pipeline.postgres.crew import Crew
from pipeline.settings import Route


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """The steps with what is known of each. ``cutover`` is the one under way, None where there is none."""

    source: str
    target: str
    table: str
    cutover: int | None
    under_way: str
    kind: str
    steps: tuple[Step, ...]
    done: tuple[str, ...]


def outline_cutover(route: Route, options: CutoverOptions) -> Outline:
    """Return the plan of a cutover for this installation. Raises PipelineError."""
    with Crew() as crew:
        found, records, seconds = crew.call(_read, crew, route, options)
    return _outline(route, found, records, describe_steps(route, options, seconds, rehearsal=False), "cutover")


def outline_rollback(route: Route, options: CutoverOptions) -> Outline:
    """Return what a rollback would do from here. Raises PipelineError."""
    with Crew() as crew:
        found, records, seconds = crew.call(_read, crew, route, options)
    opened = found is not None and found.ended is None and found.opened is not None
    return _outline(route, found, records, describe_back(route, options, seconds, opened=opened), "rollback")


def _read(
    crew: Crew, route: Route, options: CutoverOptions
) -> tuple[Cutover | None, dict[str, StepRecord], dict[str, float]]:
    with crew.session(route.target, PURPOSE) as session:
        found, records = find_cutover(session, route.table)
        if found is not None and found.ended is None:
            check_same_ends(found, route)
        with session.transaction(read_only=True) as cursor:
            return found, records, cutovers.step_seconds(cursor, route.table, deep=options.deep)


def _outline(
    route: Route, found: Cutover | None, records: dict[str, StepRecord], steps: tuple[Step, ...], kind: str
) -> Outline:
    under_way = found is not None and found.ended is None
    return Outline(
        source=route.source.label,
        target=route.target.label,
        table=route.table.qualified,
        cutover=found.id if found is not None and under_way else None,
        under_way=found.kind if found is not None and under_way else "",
        kind=kind,
        steps=steps,
        done=tuple(name for name, record in records.items() if record.stands) if under_way else (),
    )
