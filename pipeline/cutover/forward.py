"""What the steps of a cutover do, from the backup to the proof under the fence; each can be done again."""

from collections.abc import Generator, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.check.verify import verify
from pipeline.cutover import closing
from pipeline.cutover.backup import check_room, dump_table, file_name, look_at_dump, plan_backup
from pipeline.cutover.work import Deed, Work, keep
from pipeline.errors import DifferencesError
from pipeline.events import CheckDone, CheckStarted, Event, SyncDone, SyncPlanned, VerifyDone, Warned
from pipeline.move.sync import sync
from pipeline.options import SyncOptions, VerifyOptions
from pipeline.settings import Route
from pipeline.wording import counted

# While somebody writes, a verify may meet rows on their way; so often is it tried before the fence.
CATCHUP_TRIES = 3
CATCHUP_SETTLE_SECONDS = 0.5
# Main is closed to others: a row there that was equal once, and that legacy has no more, was deleted there.
_FORWARD = SyncOptions(delete_equal=True)


def backup(work: Work) -> Deed:
    """Dump both tables, each into a file of its own; one that is there already from before is read back."""
    if work.options.skip_backup:
        yield from ()
        return {"skipped": True}, "skipped, as asked for"
    folder = work.options.backup_folder.absolute()
    stamp = str(work.cutover.options["stamp"])
    work.intend("backup", {"folder": str(folder)})
    endpoints = (work.route.source, work.route.target)
    plans = [work.crew.call(plan_backup, work.crew, one, work.route.table, work.options.pg_dump) for one in endpoints]
    there = [folder / file_name(plan, stamp) for plan in plans]
    needed = sum(plan.needed_bytes for plan, file in zip(plans, there, strict=True) if not file.exists())
    work.crew.call(check_room, folder, needed, work.options.free_bytes, make=True)
    dumps = []
    for plan, file in zip(plans, there, strict=True):
        done = work.crew.start(look_at_dump if file.exists() else dump_table, work.crew, plan, file)
        yield from work.crew.follow([done], guards=[work.lease.future])
        dumps.append(done.result())
    for dump in dumps:
        for note in dump.notes:
            yield Warned(fact=note)
    evidence = {"skipped": False, "dumps": [{**asdict(dump), "path": str(dump.path)} for dump in dumps]}
    files = " and ".join(f"{dump.path} ({counted(dump.rows, 'row')})" for dump in dumps)
    return evidence, files


def catch_up(work: Work) -> Deed:
    """Close main's table to others, bring what legacy has written, and compare it while nobody has to wait."""
    closed = yield from closing.close(work, work.route.target, closing.guard(work))
    brought = yield from bring(work, work.forward, _FORWARD)
    renewed = False
    for _ in range(CATCHUP_TRIES):
        found = yield from compare(
            work, work.forward, VerifyOptions(incremental=True, settle_seconds=CATCHUP_SETTLE_SECONDS)
        )
        if renewed := found.verdict == "pass":
            break
        # What differs now was written after the sync, or it stays.
        brought = yield from bring(work, work.forward, _FORWARD)
    if not renewed:
        yield Warned(
            fact="legacy is written all the time: the proof under the fence will look at every row that was"
            " written since the last verify",
            hint="",
        )
    evidence = {"guard": closed, "sync": _figures(brought), "renewed": renewed}
    return evidence, f"main's table takes rows of the pipeline alone; {_brought(brought)}"


def fence(work: Work) -> Deed:
    """Close legacy's table to everybody, and prove that it is closed."""
    wanted = closing.moved(work)
    put = yield from closing.close(work, work.source, wanted)
    at = work.now()
    proof = closing.prove(work, work.source, wanted)
    evidence = {"put": put, "proof": proof, "fenced_at": at.isoformat(), "counters": closing.read_legacy_counters(work)}
    return (
        evidence,
        f"legacy's table takes no more writes: {counted(proof['probes_refused'], 'write')} tried, all refused",
    )


def prove(work: Work) -> Deed:
    """Bring the last changes, and compare: nobody writes on either side."""
    brought = yield from bring(work, work.forward, _FORWARD)
    options = VerifyOptions(incremental=not work.options.deep, checks=("rows",), settle_seconds=0.0)
    found = yield from compare(work, work.forward, options)
    refuse_differences(found, "legacy is fenced, and the two sides are not equal")
    counts = next(check.summary for check in found.checks if check.name == "counts")
    evidence = {"sync": _figures(brought), "verdict": found.verdict, "kind": found.kind, "checks": summaries(found)}
    return evidence, f"{_brought(brought)}; {counts}, and equal"


def bring(work: Work, route: Route, options: SyncOptions) -> Generator[Event, None, SyncDone]:
    """Sync in one direction. Raises DifferencesError where rows stay different."""
    found: list[SyncDone] = []
    held = work.lease if route.target.label == work.route.target.label else None
    for event in keep(sync(route, options, work.crew, held), SyncDone, found):
        if not isinstance(event, SyncPlanned | SyncDone):
            yield event
    (done,) = found
    if done.kept or done.foreign:
        listed = "; ".join(f"{kind} {', '.join(key)}" for kind, key in done.left[:5])
        raise DifferencesError(
            f"{counted(done.kept + done.foreign, 'row')} of {route.target.name} were written by somebody else, and"
            f" stay different: {listed}",
            "pipeline sync --dry-run lists them; choose --on-conflict or --delete there, then run this again; or go"
            " back: pipeline rollback",
        )
    return done


def compare(work: Work, route: Route, options: VerifyOptions) -> Generator[Event, None, VerifyDone]:
    """Verify in one direction; a difference is in the result."""
    found: list[VerifyDone] = []
    for event in keep(verify(route, options, work.crew), VerifyDone, found):
        if not isinstance(event, CheckStarted | CheckDone | VerifyDone):
            yield event
    return found[0]


def refuse_differences(found: VerifyDone, fact: str) -> None:
    """Raise DifferencesError where a verify did not pass."""
    if found.verdict != "pass":
        failing = "; ".join(f"{one.name}: {one.summary}" for one in found.checks if one.verdict != "pass")
        raise DifferencesError(
            f"{fact}: {failing}",
            "pipeline diff lists the rows; run this again once they are equal, or go back: pipeline rollback",
        )


def summaries(found: VerifyDone) -> dict[str, str]:
    """Return what each check found, in words."""
    return {check.name: check.summary for check in found.checks}


def _figures(done: SyncDone) -> Mapping[str, Any]:
    names = ("passes", "touched", "inserted", "updated", "deleted", "settled", "seconds")
    return {name: getattr(done, name) for name in names}


def _brought(done: SyncDone) -> str:
    written = done.inserted + done.updated + done.deleted
    return f"{counted(written, 'change')} brought" if written else "nothing was left to bring"


def fenced_at(work: Work) -> datetime | None:
    """Return when legacy was closed, None where it was not."""
    at = work.evidence("fence").get("fenced_at")
    return None if at is None else datetime.fromisoformat(str(at))


def dumped_files(evidence: Mapping[str, Any]) -> list[Path]:
    """Return the files that the backup has written."""
    return [Path(dump["path"]) for dump in evidence.get("dumps", ())]
