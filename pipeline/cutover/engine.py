"""Cutover and rehearsal: step by step, each intended before and told after, and gone on with where it stopped."""

from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pipeline.cutover import closing, forward, smoke, switching, watching
from pipeline.cutover.readiness import check_readiness
from pipeline.cutover.steps import describe_steps, steps_until
from pipeline.cutover.work import PURPOSE, Deed, Tools, Work, begin, check_same_ends, find_cutover
from pipeline.endpoints import Endpoint
from pipeline.errors import RefusedError
from pipeline.events import CutoverDone, Event, StepDone, StepStarted, Warned
from pipeline.failpoints import failpoint
from pipeline.ledger import cutovers, runs
from pipeline.ledger.cutovers import Cutover, Kind, StepRecord
from pipeline.move.lease import Lease
from pipeline.options import DEFAULT_DEADLINE_SECONDS, STEPS, CutoverOptions
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import clock
from pipeline.settings import Route, Settings, TableMapping

_DEEDS: Mapping[str, Callable[[Work], Deed]] = MappingProxyType(
    {
        "backup": forward.backup,
        "catchup": forward.catch_up,
        "fence": forward.fence,
        "prove": forward.prove,
        "switch": switching.switch,
        "smoke": smoke.smoke,
        "watch": watching.watch,
    }
)
REHEARSED = ("preflight", "backup", "catchup", "fence", "prove", "switch", "smoke")


def cutover(
    route: Route, settings: Settings, options: CutoverOptions, tools: Tools, stamp: str
) -> Generator[Event, None, None]:
    """Do what is left of the cutover, up to ``options.until``; end with CutoverDone.

    A new one begins where none is under way; ``stamp`` names its files. Interrupted, killed or failed, it is run
    again and goes on. Raises PipelineError: what was done stays, and can be taken back by a rollback.
    """
    with Crew() as crew:
        found, records = crew.call(find_under_way, crew, route)
        _check_kind(found, "cutover")
        looked = None
        if not ("fence" in records and records["fence"].stands):
            looked = yield from _preflight(crew, route, settings, options, tools, len(steps_until(options.until)))
        lease = Lease(crew, route.target, crew.call(run_of, crew, route), DEFAULT_DEADLINE_SECONDS)
        work = open_work(
            crew, route, settings, options, tools, found or _new(crew, route, lease, "cutover", stamp), lease
        )
        _record_preflight(work, looked)
        yield from _take_steps(work, steps_until(options.until))
        lease.release()
        yield _done(work)


def rehearse(
    route: Route, settings: Settings, options: CutoverOptions, tools: Tools, stamp: str
) -> Generator[Event, None, None]:
    """Do everything but the switch, with the fence for seconds; end with CutoverDone.

    Whatever happens on the way, the fence is lifted; killed, the next rehearsal or a rollback lifts it.
    Raises PipelineError.
    """
    with Crew() as crew:
        found, _ = crew.call(find_under_way, crew, route)
        _check_kind(found, "rehearsal")
        if found is not None:
            yield from _end_rehearsal(route, settings, options, tools, found)
        looked = yield from _preflight(crew, route, settings, options, tools, len(REHEARSED))
        lease = Lease(crew, route.target, crew.call(run_of, crew, route), DEFAULT_DEADLINE_SECONDS)
        work = open_work(crew, route, settings, options, tools, _new(crew, route, lease, "rehearsal", stamp), lease)
        _record_preflight(work, looked)
        try:
            yield from _take_steps(work, REHEARSED)
            work.note(lambda cursor: cutovers.mark_ended(cursor, work.cutover.id, "rehearsed"))
            lease.release()
            done = _done(work)
        except BaseException:
            # The crew may be stopped by now, and its lease with it.
            crew.close()
            for _ in _end_rehearsal(route, settings, options, tools, work.cutover):
                pass
            raise
        yield done


def _end_rehearsal(
    route: Route, settings: Settings, options: CutoverOptions, tools: Tools, found: Cutover
) -> Generator[Event, None, None]:
    """Lift what a rehearsal that came to no end has left standing."""
    with Crew() as crew:
        lease = Lease(crew, route.target, crew.call(run_of, crew, route), DEFAULT_DEADLINE_SECONDS)
        work = open_work(crew, route, settings, options, tools, found, lease)
        yield from closing.open_again(work, work.source)
        if not was_guarded(work):
            yield from closing.open_again(work, work.target)
        work.undo(*(name for name, record in work.records.items() if record.stands))
        work.note(lambda cursor: cutovers.mark_ended(cursor, found.id, "rolled back"))
        lease.release()


def was_guarded(work: Work) -> bool:
    """Return whether main's table was closed to others before this cutover began."""
    return bool(work.cutover.options.get("guarded"))


def find_under_way(crew: Crew, route: Route) -> tuple[Cutover | None, Mapping[str, StepRecord]]:
    """Return the cutover that has not ended, with its steps. Raises RefusedError where it is of other databases."""
    found, records = _find(crew, route.target, route.table)
    if found is None or found.ended is not None:
        return None, {}
    check_same_ends(found, route)
    return found, records


def files_before(target: Endpoint, mapping: TableMapping, files: Sequence[Path]) -> tuple[Path, ...]:
    """Return what to read the settings from: of a file that a cutover under way has begun to switch, its copy.

    Between two files the settings are of both worlds: half of an address is legacy's, half is main's.
    """
    with Crew() as crew:
        found, records = crew.call(_find, crew, target, mapping)
    if found is None or found.ended is not None or "switch" not in records:
        return tuple(files)
    copies = dict(switching.switched_files(records["switch"].evidence))
    return tuple(
        copy if (copy := copies.get(file.absolute())) is not None and copy.exists() else file for file in files
    )


def _find(crew: Crew, target: Endpoint, mapping: TableMapping) -> tuple[Cutover | None, Mapping[str, StepRecord]]:
    with crew.session(target, PURPOSE) as session:
        return find_cutover(session, mapping)


def next_step(route: Route) -> str:
    """Return the first step of the cutover under way that is left to be done; the first of all where there is none."""
    with Crew() as crew:
        _, records = crew.call(find_under_way, crew, route)
    return next((name for name in STEPS if name not in records or not records[name].stands), STEPS[-1])


def _check_kind(found: Cutover | None, kind: Kind) -> None:
    """Raise RefusedError where something else is under way than what is asked for."""
    if found is None:
        return
    if found.back is not None:
        raise RefusedError(
            f"{found.kind} {found.id} is on its way back since {found.back:%Y-%m-%d %H:%M:%S}Z",
            "end that first: pipeline rollback --execute",
        )
    if found.kind != kind:
        hint = "pipeline cutover --rehearse ends it" if found.kind == "rehearsal" else "pipeline rollback --execute"
        raise RefusedError(f"{found.kind} {found.id} has not ended", f"end that first: {hint}")


def run_of(crew: Crew, route: Route) -> runs.Run:
    """Return the run whose lease keeps two cutovers, and a copy or a sync beside one, apart."""
    with crew.session(route.target, PURPOSE) as session, session.transaction(read_only=True) as cursor:
        for kind in ("copy", "sync"):
            if (run := runs.latest_run(cursor, route.table, kind)) is not None:
                return run
    raise RefusedError(
        f"no copy has filled {route.target.name}'s {route.table.qualified}", "run: pipeline copy, then pipeline verify"
    )


def _new(crew: Crew, route: Route, lease: Lease, kind: Kind, stamp: str) -> Cutover:
    guarded = crew.call(closing.is_closed, crew, route.target, route.table)
    return crew.call(begin, crew, route, lease, kind, {"stamp": stamp, "guarded": guarded})


def open_work(
    crew: Crew, route: Route, settings: Settings, options: CutoverOptions, tools: Tools, found: Cutover, lease: Lease
) -> Work:
    """Return the work on a cutover, with its books read under the lease."""
    work = Work(crew=crew, route=route, settings=settings, options=options, tools=tools, cutover=found, lease=lease)
    work.note(lambda cursor: None)
    return work


def _preflight(
    crew: Crew, route: Route, settings: Settings, options: CutoverOptions, tools: Tools, steps: int
) -> Generator[Event, None, tuple[Mapping[str, Any], str]]:
    """Look whether anything stands in the way, before there is anything to be recorded."""
    yield StepStarted(name="preflight", title="what could stop it on its way", number=1, steps=steps)
    started = clock()
    evidence, summary = yield from check_readiness(crew, route, settings, options, has_revisions=tools.has_revisions())
    seconds = round(clock() - started, 3)
    yield StepDone(name="preflight", summary=summary, seconds=seconds)
    return {**evidence, "seconds": seconds}, summary


def _record_preflight(work: Work, looked: tuple[Mapping[str, Any], str] | None) -> None:
    if looked is not None:
        work.intend("preflight")
        work.finish("preflight", {**looked[0], "summary": looked[1]})


def _take_steps(work: Work, names: tuple[str, ...]) -> Generator[Event, None, None]:
    titles = {step.name: step.title for step in describe_steps(work.route, work.options, {}, rehearsal=work.rehearsal)}
    _forget_what_fell(work)
    for number, name in enumerate(names, 1):
        if name == "preflight":
            continue
        if work.stands(name):
            evidence = work.evidence(name)
            yield StepDone(
                name=name, summary=str(evidence.get("summary", "")), seconds=evidence.get("seconds", 0.0), before=True
            )
            continue
        yield StepStarted(name=name, title=titles[name], number=number, steps=len(names))
        yield from take_step(work, name, _rehearsed_switch if work.rehearsal and name == "switch" else _DEEDS[name])


def take_step(work: Work, name: str, deed: Callable[[Work], Deed]) -> Generator[Event, None, None]:
    """Do one step: the intent, the deed, the evidence."""
    started = clock()
    work.intend(name)
    failpoint("before_step")
    evidence, summary = yield from deed(work)
    failpoint("in_step")
    seconds = round(clock() - started, 3)
    work.finish(name, {**evidence, "summary": summary, "seconds": seconds})
    failpoint("after_step")
    yield StepDone(name=name, summary=summary, seconds=seconds)


def _forget_what_fell(work: Work) -> None:
    """Take steps for not done whose fence does not stand any more; after the switch, that is nothing to be repeated."""
    if work.cutover.opened is not None:
        return
    if work.stands("fence") and not closing.state_of(work, work.source).is_like(closing.moved(work)):
        work.undo("fence", "prove")
    if not work.stands("fence"):
        work.undo("catchup", "prove")


def _rehearsed_switch(work: Work) -> Deed:
    """Lift the fence again, and main's guard where it was not there before; look what the files would become."""
    edits = switching.planned_edits(work)
    began, at = forward.fenced_at(work), work.now()
    lifted = yield from closing.open_again(work, work.source)
    if not was_guarded(work):
        yield from closing.open_again(work, work.target)
    held = None if began is None else (at - began).total_seconds()
    if held is not None and held > work.options.fence_limit_seconds:
        yield Warned(
            fact=f"the fence had to end by itself after {work.options.fence_limit_seconds:g} s, before both sides were"
            " compared",
            hint="give the rehearsal longer with --fence-limit",
        )
    changes = {str(edit.shown): list(edit.changes) for edit in edits}
    evidence = {"lifted": lifted, "fence_seconds": held, "would_change": changes}
    return evidence, f"nothing is switched; fence held for {switching.span(held)}, and lifted"


def _done(work: Work) -> CutoverDone:
    names = REHEARSED if work.rehearsal else STEPS
    left = [name for name in names if not work.stands(name)]
    steps = tuple(
        (name, str(work.evidence(name).get("summary", "")), float(work.evidence(name).get("seconds", 0.0)))
        for name in names
        if work.stands(name)
    )
    return CutoverDone(
        cutover=work.cutover.id,
        kind=work.cutover.kind,
        outcome="rehearsed" if work.rehearsal else "stopped" if left else "switched",
        steps=steps,
        fence_seconds=work.evidence("switch").get("fence_seconds"),
        next_step=left[0] if left else None,
    )
