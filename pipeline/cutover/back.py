"""The way back: from any step, without losing what was written on main since the switch."""

from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

from psycopg2 import sql

from pipeline.check.before import has_passes, pass_before
from pipeline.check.changes import Look, changed_keys, look
from pipeline.check.differences import differences_of
from pipeline.check.finding import Base, touched_keys
from pipeline.check.pair import read_pair
from pipeline.cutover import closing, switching
from pipeline.cutover.engine import find_under_way, open_work, run_of, take_step, was_guarded
from pipeline.cutover.envfile import plan_switch
from pipeline.cutover.envrestore import plan_restore
from pipeline.cutover.envwrite import apply_edit
from pipeline.cutover.forward import bring, compare, refuse_differences, summaries
from pipeline.cutover.work import PURPOSE, Deed, Tools, Work
from pipeline.errors import RefusedError
from pipeline.events import CutoverDone, Event, StepDone, StepStarted
from pipeline.ledger import cutovers, runs
from pipeline.ledger.marks import untouched_sql, written_sql
from pipeline.move.lease import Lease
from pipeline.move.reconcile import keys_that
from pipeline.options import DEFAULT_DEADLINE_SECONDS, CutoverOptions, SyncOptions, VerifyOptions
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Cursor, Session
from pipeline.settings import Route, Settings
from pipeline.wording import counted

# How many rows that legacy took meanwhile are named; all are counted.
LISTED_KEYS = 20

# What these did stays as it is.
_STAY = frozenset({"preflight", "backup"})
_Step = tuple[str, str, Callable[[Work], Deed]]


def rollback(route: Route, settings: Settings, options: CutoverOptions, tools: Tools) -> Generator[Event, None, None]:
    """Go back from wherever the cutover stands; end with CutoverDone.

    Interrupted or killed, it is run again and goes on. Raises RefusedError where there is nothing to go back from,
    or legacy took writes although it was closed; DifferencesError where both sides would not be equal.
    """
    with Crew() as crew:
        found, _ = crew.call(find_under_way, crew, route)
        if found is None:
            raise RefusedError(
                f"no cutover of {route.table.qualified} is under way, or could be rolled back",
                "pipeline status shows what there was",
            )
        lease = Lease(crew, route.target, crew.call(run_of, crew, route), DEFAULT_DEADLINE_SECONDS)
        work = open_work(crew, route, settings, options, tools, found, lease)
        steps = way_back(work)
        if work.cutover.opened is not None and not work.stands("back-verify"):
            crew.call(_check_takes_rows, work)
            crew.call(_check_legacy, work)
        work.note(lambda cursor: cutovers.mark_back(cursor, work.cutover.id))
        for number, (name, title, deed) in enumerate(steps, 1):
            if work.stands(name):
                summary = str(work.evidence(name).get("summary", ""))
                yield StepDone(name=name, summary=summary, seconds=0.0, before=True)
                continue
            yield StepStarted(name=name, title=title, number=number, steps=len(steps))
            yield from take_step(work, name, deed)
        work.note(lambda cursor: _end(work, cursor, [name for name, *_ in steps]))
        lease.release()
        yield CutoverDone(
            cutover=found.id,
            kind=found.kind,
            outcome="rolled back",
            steps=tuple(
                (name, str(work.evidence(name).get("summary", "")), float(work.evidence(name).get("seconds", 0.0)))
                for name, *_ in steps
            ),
            remains=_remains(work),
        )


def _end(work: Work, cursor: Cursor, back: list[str]) -> None:
    cutovers.undo_steps(
        cursor, work.cutover.id, [name for name in work.records if name not in back and name not in _STAY]
    )
    cutovers.mark_ended(cursor, work.cutover.id, "rolled back")


def way_back(work: Work) -> tuple[_Step, ...]:
    """Return the steps of the way back from where the cutover stands."""
    if work.cutover.opened is None:
        return (("back-open", "legacy takes writes again", _open_legacy),)
    return (
        ("back-close", "main takes no more writes", _close_main),
        ("back-sync", "what was written on main goes to legacy", _bring_back),
        ("back-verify", "both sides equal", _verify_back),
        ("back-switch", "the settings as they were", _restore),
        ("back-open", "legacy takes writes again", _open_legacy),
        ("back-commands", "the application is told", _run_commands),
    )


def _check_takes_rows(work: Work) -> None:
    """Raise RefusedError, while main is open yet, where legacy's table is none that rows can be brought into."""
    with work.crew.together((work.target, PURPOSE), (work.source, PURPOSE)) as (source, target):
        read_pair(work.crew, source, target, _backwards(work), to_write=True)


def _check_legacy(work: Work) -> None:
    """Raise RefusedError where legacy took writes since it was closed, of rows that are not the same on main."""
    if work.options.take_main:
        return
    route, proven = work.route, work.evidence("prove")
    legacy, main = (work.source, PURPOSE), (work.target, PURPOSE)
    with work.crew.together(legacy, main, legacy, main) as (source, target, *others):
        pair = read_pair(work.crew, source, target, route, to_write=False)
        before = pass_before(source, target, route.table, pair, verified=True)
        if before is None or not proven:
            raise RefusedError(
                "what legacy held when it was closed is not known any more",
                "pipeline diff lists what differs; pipeline rollback --execute --take-main makes legacy as main is",
            )
        base = Base(source=Look.from_json(before.source_horizon), target=Look.from_json(before.target_horizon))
        # What an earlier attempt of this way back has brought is no write of others.
        own = _brought_back(source, route) if "back-sync" in work.records and has_passes(source) else None
        now = look(source, pair.source, base.source.horizon, own)
        if not now.since(base.source) or (own is not None and (now.changed or 0) <= (base.source.recent or 0)):
            return
        written = {key for batch in changed_keys(source, pair.source, base.source.horizon, own) for key in batch}
        conflicts: list[str] = []
        _, touched = touched_keys(work.crew, pair, (source, target), base)
        for keys in touched:
            found = differences_of(work.crew, (others[0], pair.source), (others[1], pair.target), pair.columns, keys)
            # Both sides had it when legacy was closed, and main has it still: legacy has deleted it.
            only_there = [one.key for one in found if one.kind == "extra"]
            untouched = untouched_sql(base.target.horizon, "t")
            gone = keys_that(others[1], pair.target, only_there, untouched) if only_there and own is None else set()
            conflicts += [one.text for one in found if one.key in written or one.key in gone]
    if conflicts:
        raise RefusedError(
            f"legacy's {route.table.qualified} was written since it was closed: {counted(len(conflicts), 'row')} that"
            f" main has otherwise: {'; '.join(conflicts[:LISTED_KEYS])}",
            "make main's rows the same, and run this again; or overwrite legacy's with main's: --take-main",
        )


def _brought_back(session: Session, route: Route) -> sql.Composable | None:
    """Return the condition of rows that an earlier attempt has brought back."""
    with session.transaction(read_only=True) as cursor:
        run = runs.latest_run(cursor, route.table, "sync")
    return None if run is None else written_sql(run.id, "r")


def _backwards(work: Work) -> Route:
    """Return the route of main's rows to legacy, past the fence there."""
    return replace(work.route, source=work.target, target=work.source)


def _close_main(work: Work) -> Deed:
    # Should somebody have opened legacy, it is closed again before it is looked at for the last time.
    yield from closing.close(work, work.source, closing.moved(work))
    work.crew.call(_check_legacy, work)
    closed = yield from closing.close(work, work.target, closing.returning(work))
    proof = closing.prove(work, work.target, closing.returning(work))
    tried = counted(proof["probes_refused"], "write")
    return {"put": closed, "proof": proof}, f"main's table takes no more writes: {tried} tried, all refused"


def _bring_back(work: Work) -> Deed:
    """Make legacy equal to main: what was added, changed and deleted there since the switch."""
    work.crew.call(work.tools.install_ledger, work.source, work.settings)
    # Legacy was closed all the time: what differs was done on main, deletes among it.
    done = yield from bring(work, _backwards(work), SyncOptions(on_conflict="overwrite", delete=True))
    evidence = {"inserted": done.inserted, "updated": done.updated, "deleted": done.deleted}
    told = f"{done.inserted:,} added, {done.updated:,} written over, {done.deleted:,} deleted"
    return evidence, f"legacy has what was written on main: {told}"


def _verify_back(work: Work) -> Deed:
    options = VerifyOptions(incremental=not work.options.deep, checks=("rows",), settle_seconds=0.0)
    found = yield from compare(work, _backwards(work), options)
    refuse_differences(found, "main and legacy are both closed, and not equal")
    counts = next(check.summary for check in found.checks if check.name == "counts")
    return {"checks": summaries(found)}, f"{counts}, and equal"


def _restore(work: Work) -> Deed:
    """Take the switch back in every file."""
    changed: dict[str, list[str]] = {}
    for path, copy in switching.switched_files(work.evidence("switch")):
        if copy.exists():
            edit = plan_restore(path, copy, work.settings)
            apply_edit(edit, None)
            changed[str(path)] = list(edit.changes)
        elif not plan_switch(path, work.settings, with_mock_line=False).changed:
            raise RefusedError(
                f"{path} points to main, and its copy {copy} is gone",
                "give PGVECTOR_* the values of LEGACY_* by hand, take LEGACY_* out, and run this again",
            )
    yield from ()
    files = ", ".join(Path(path).name for path in changed)
    return {"changed": changed}, f"{files} as before the switch" if files else "no file had been changed"


def _open_legacy(work: Work) -> Deed:
    """Open legacy; main stays closed to others, as it was while it was filled."""
    if work.cutover.opened is not None:
        # The guard instead of the fence, with no moment between: the pipeline may write there again.
        yield from closing.close(work, work.target, closing.guard(work))
    opened = yield from closing.open_again(work, work.source)
    if work.rehearsal and not was_guarded(work):
        yield from closing.open_again(work, work.target)
    return {"opened": opened}, "legacy's table takes writes again"


def _run_commands(work: Work) -> Deed:
    seconds = switching.run_commands(work.crew, work.options.after_switch)
    yield from ()
    if not seconds:
        return {"command_seconds": []}, "no command was given: restart the application"
    return {"command_seconds": seconds}, f"{counted(len(seconds), 'command')} run"


def _remains(work: Work) -> tuple[str, ...]:
    """Return what stays behind, for people."""
    table = work.route.table.qualified
    with_guard = (f"main's {table} stays closed to all but the pipeline, until a cutover or pipeline finalize",)
    ledger = (
        ("the ledger on legacy (schema pipeline), which pipeline finalize removes",)
        if "back-sync" in work.records
        else ()
    )
    return (*(with_guard if not work.rehearsal and "catchup" in work.records else ()), *ledger)
