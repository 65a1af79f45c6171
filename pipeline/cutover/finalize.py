"""Finalize: the way back given up, and what is the pipeline's own on legacy taken away."""

from collections.abc import Generator, Mapping
from typing import Any

from psycopg2 import sql

from pipeline.cutover import closing, switching
from pipeline.cutover.engine import open_work, run_of
from pipeline.cutover.forward import dumped_files
from pipeline.cutover.work import PURPOSE, Deed, Tools, Work, check_same_ends, find_cutover
from pipeline.errors import RefusedError
from pipeline.events import CutoverDone, Event, StepDone, StepStarted
from pipeline.ledger import cutovers
from pipeline.ledger.cutovers import Cutover
from pipeline.move.lease import Lease
from pipeline.options import DEFAULT_DEADLINE_SECONDS, STEPS, CutoverOptions
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import clock
from pipeline.settings import Route, Settings
from pipeline.wording import counted

# All that a ledger consists of; a schema with anything else is not the pipeline's alone, and stays.
LEDGER_RELATIONS = frozenset(
    {
        "alembic_version",
        "baseline",
        "comparison",
        "cutover",
        "deferred_index",
        "pass",
        "quarantine",
        "run",
        "slice",
        "step",
        "verdict",
    }
)


def finalize(route: Route, settings: Settings, options: CutoverOptions, tools: Tools) -> Generator[Event, None, None]:
    """End the possibility of a rollback, and remove the pipeline's own objects from legacy; end with CutoverDone.

    After a rollback it removes what that left on both sides. Raises RefusedError while a cutover is not complete.
    """
    with Crew() as crew:
        found = crew.call(_find, crew, route)
        lease = Lease(crew, route.target, crew.call(run_of, crew, route), DEFAULT_DEADLINE_SECONDS)
        work = open_work(crew, route, settings, options, tools, found, lease)
        back = found.outcome == "rolled back"
        if not back and (left := [name for name in STEPS if not work.stands(name)]):
            raise RefusedError(
                f"cutover {found.id} is not complete: {', '.join(left)} not done",
                "end it first: pipeline cutover --execute, or pipeline rollback --execute",
            )
        yield StepStarted(name="finalize", title="the pipeline's own objects go", number=1, steps=1)
        started = clock()
        if not back:
            work.intend("finalize")
        _, summary = yield from _clear(work, back=back)
        seconds = clock() - started
        if not back:
            work.finish("finalize", {"summary": summary, "seconds": round(seconds, 3)})
            work.note(lambda cursor: cutovers.mark_ended(cursor, found.id, "finalized"))
        lease.release()
        yield StepDone(name="finalize", summary=summary, seconds=seconds)
        yield CutoverDone(
            cutover=found.id,
            kind=found.kind,
            outcome="cleared" if back else "finalized",
            steps=(("finalize", summary, seconds),),
            remains=tuple(_remains(work, back=back)),
        )


def _find(crew: Crew, route: Route) -> Cutover:
    with crew.session(route.target, PURPOSE) as session:
        found, _ = find_cutover(session, route.table)
        if found is not None and found.outcome == "rehearsed":
            # A rehearsal leaves what an earlier cutover has left.
            with session.transaction(read_only=True) as cursor:
                found = cutovers.latest_cutover(cursor, route.table, "cutover")
    if found is None or found.outcome == "finalized":
        raise RefusedError(
            f"there is no cutover of {route.table.qualified} to finalize", "pipeline status shows what there was"
        )
    if found.back is not None and found.ended is None:
        raise RefusedError(f"cutover {found.id} is on its way back", "end that first: pipeline rollback --execute")
    check_same_ends(found, route)
    return found


def _clear(work: Work, *, back: bool) -> Deed:
    done = []
    opened = yield from closing.open_again(work, work.source)
    if opened.get("changed") or opened["by"] == "owner":
        done.append("legacy's fence")
    if back:
        guarded = yield from closing.open_again(work, work.route.target)
        if guarded.get("changed") or guarded["by"] == "owner":
            done.append("main's guard")
    if work.crew.call(_drop_ledger, work):
        done.append("legacy's ledger (schema pipeline)")
    return {}, f"removed: {', '.join(done) or 'nothing was left to remove'}"


def _drop_ledger(work: Work) -> bool:
    """Drop the ledger on legacy, where it is the pipeline's alone; return whether there was one."""
    with work.crew.session(work.source, PURPOSE) as session:
        names = {
            name
            for (name,) in session.rows(
                "SELECT c.relname::pg_catalog.text FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n"
                " ON n.oid = c.relnamespace WHERE n.nspname = 'pipeline' AND c.relkind IN ('r', 'p', 'v', 'm', 'f')"
            )
        }
        if not names or not names <= LEDGER_RELATIONS or "alembic_version" not in names:
            return False
        with session.transaction() as cursor:
            cursor.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier("pipeline")))
        return True


def _remains(work: Work, *, back: bool) -> Generator[str, None, None]:
    """Yield what stays behind, for people."""
    table = work.route.table.qualified
    if not back:
        yield f"legacy's {table} with its rows, which takes writes again: drop it when you are sure"
    yield "the ledger on main (schema pipeline): runs, verdicts, steps"
    if not back:
        yield "LEGACY_* in the .env files, which the application does not read"
    switches, backups = work.crew.call(_evidence, work)
    if copies := [str(copy) for seen in switches for _, copy in switching.switched_files(seen) if copy.exists()]:
        yield f"{counted(len(copies), 'copy')} of .env files, with their passwords: {', '.join(copies)}"
    if files := [path for seen in backups for path in dumped_files(seen) if path.exists()]:
        folders = dict.fromkeys(str(path.parent) for path in files)
        yield f"{counted(len(files), 'dump')} in {', '.join(folders)}"


def _evidence(work: Work) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Return what was seen in every switch of the table, and in every backup."""
    table = work.route.table
    with work.crew.session(work.route.target, PURPOSE) as session, session.transaction(read_only=True) as cursor:
        return cutovers.read_evidence(cursor, table, "switch"), cutovers.read_evidence(cursor, table, "backup")
