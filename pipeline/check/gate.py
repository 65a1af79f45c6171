"""The gate of a copy: what preflight would refuse of servers and target, asked for in three short queries."""

from functools import partial

from pipeline.check.attached import check_attached, read_attached
from pipeline.check.footing import check_footings, read_footing
from pipeline.check.obstacles import check_extensions
from pipeline.check.preflight import Finding
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Session
from pipeline.postgres.tables import Table


def check_gate(
    crew: Crew, source: Session, target: Session, here: Table, there: Table, *, workers: int
) -> tuple[Finding, ...]:
    """Return what refuses a copy, of all that the descriptions of the two tables do not tell; reads no row.

    The rules are preflight's own. Raises PipelineError.
    """
    names = (source.endpoint.name, target.endpoint.name)
    footings = crew.beside(partial(read_footing, source), partial(read_footing, target))
    with target.transaction(read_only=True) as cursor:
        attached = read_attached(cursor, there)
    found = (
        *check_footings(*footings, workers=workers),
        *check_attached(there, attached, names[1]),
        *check_extensions(here.extension, there.extension, names),
    )
    return tuple(finding for finding in found if finding.severity == "refuse")
