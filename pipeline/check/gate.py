"""The gate of a copy: what preflight would refuse of servers and target, asked for in one round trip."""

from functools import partial

from pipeline.check.attached import ATTACHED_SQL, Attached, check_attached
from pipeline.check.footing import FOOTING_SQL, Footing, check_footings, copy_need, read_footing
from pipeline.check.obstacles import check_extensions
from pipeline.check.preflight import Finding
from pipeline.endpoints import DEFAULT_PASS
from pipeline.errors import RefusedError
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Session
from pipeline.postgres.facts import gather
from pipeline.postgres.fence import read_fence
from pipeline.postgres.tables import Table


def check_gate(
    crew: Crew, source: Session, target: Session, here: Table, there: Table, *, workers: int
) -> tuple[Finding, ...]:
    """Return what refuses a copy, of all that the descriptions of the two tables do not tell; reads no row.

    The rules are preflight's own. Raises PipelineError.
    """
    names = (source.endpoint.name, target.endpoint.name)
    mine, (theirs, attached) = crew.beside(partial(_read_source, source, here), partial(_read_target, target, there))
    found = (
        *check_footings(mine, theirs, need=copy_need(workers)),
        *check_attached(there, attached, names[1]),
        *check_extensions(here.extension, there.extension, names),
    )
    return tuple(finding for finding in found if finding.severity == "refuse")


def _read_source(session: Session, table: Table) -> Footing:
    refuse_fenced_source(session, table)
    return read_footing(session)


def _read_target(session: Session, table: Table) -> tuple[Footing, Attached]:
    with session.transaction(read_only=True, single=True) as cursor:
        (footing,), rows = gather(cursor, (FOOTING_SQL, ATTACHED_SQL), {"oid": table.oid})
    return Footing.found(session.endpoint, *footing), Attached.found(rows)


def refuse_fenced_source(source: Session, table: Table) -> None:
    """Raise RefusedError where the source's table is closed to us: the application writes to the other side by now.

    What was deleted there would come back, and what was changed there be lost.
    """
    found = read_fence(source, table)
    if found.refusing and found.through != (source.endpoint.through or DEFAULT_PASS):
        raise RefusedError(
            f"{source.endpoint.name}'s {table.qualified} is closed: {found.message}",
            "pipeline status shows the cutover; pipeline rollback takes new writes back; pipeline diff only looks",
        )
