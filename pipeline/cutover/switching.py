"""The switch: main opened, the settings pointed there, and the application told."""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.cutover import closing
from pipeline.cutover.envfile import plan_switch
from pipeline.cutover.envwrite import EnvEdit, apply_edit, copy_path
from pipeline.cutover.forward import fenced_at
from pipeline.cutover.work import Deed, Work
from pipeline.errors import PipelineError, RefusedError, SettingsError
from pipeline.failpoints import failpoint
from pipeline.ledger import cutovers
from pipeline.postgres.crew import TICK_SECONDS, Crew
from pipeline.postgres.database import clock
from pipeline.settings import Settings
from pipeline.wording import counted


def switch(work: Work) -> Deed:
    """Open main's table, edit the files, and run the operator's commands; legacy stays closed."""
    closing.check_stands(work, work.source, closing.moved(work))
    begun_with = int(work.evidence("switch").get("commands", 0))
    if begun_with and not work.options.after_switch:
        raise SettingsError(
            f"the switch was begun with {counted(begun_with, 'command')}, and none is given now",
            "give --after-switch again; --after-switch true where it was done by hand",
        )
    edits = planned_edits(work)
    files = [
        {"path": str(path), "copy": str(_copy(work, path))} for path in (p.absolute() for p in work.options.env_files)
    ]
    work.intend("switch", {"files": files, "commands": len(work.options.after_switch)})
    work.note(lambda cursor: cutovers.mark_opened(cursor, work.cutover.id))
    failpoint("before_open")
    opened = yield from closing.open_again(work, work.target, at_once=True)
    failpoint("after_open")
    for edit in edits:
        # The first one was planned before; a file that was switched already has no copy to be made.
        apply_edit(edit, _copy(work, edit.shown) if edit.changed else None)
    held = _note_the_switch(work, edits)
    commands = run_commands(work.crew, work.options.after_switch)
    changed = {str(edit.shown): list(edit.changes) for edit in edits}
    evidence = {"opened": opened, "changed": changed, "command_seconds": commands}
    names = ", ".join(str(edit.shown) for edit in edits)
    ran = f"; {counted(len(commands), 'command')} run" if commands else ""
    return evidence, f"{names} {'points' if len(edits) == 1 else 'point'} to main{ran}; fence held for {span(held)}"


def _note_the_switch(work: Work, edits: Sequence[EnvEdit]) -> float | None:
    """Write down when the files pointed to main, the first time; return for how long no side took writes by then."""
    before = work.evidence("switch")
    if "switched_at" not in before or any(edit.changed for edit in edits):
        began, at = fenced_at(work), work.now()
        held = None if began is None else (at - began).total_seconds()
        work.intend("switch", {"switched_at": at.isoformat(), "fence_seconds": held})
        return held
    found = before["fence_seconds"]
    return None if found is None else float(found)


def planned_edits(work: Work) -> list[EnvEdit]:
    """Return what becomes of every file. Raises SettingsError and RefusedError."""
    return [
        plan_switch(path, work.settings, with_mock_line=not number)
        for number, path in enumerate(work.options.env_files)
    ]


def _copy(work: Work, path: Path) -> Path:
    return copy_path(path, str(work.cutover.options["stamp"]))


def span(seconds: float | None) -> str:
    """Return a time in words, to the hundredth of a second."""
    return "a time that is not known" if seconds is None else f"{seconds:.2f} s"


def run_commands(crew: Crew, commands: Sequence[str]) -> list[float]:
    """Run each command by the shell, to its end; return how long each took. Raises PipelineError for one that fails."""
    return [crew.call(_run, crew, number, command) for number, command in enumerate(commands, 1)]


def _run(crew: Crew, number: int, command: str) -> float:
    started = clock()
    # What it prints is for people: stdout is kept for our own data.
    child = subprocess.Popen(command, shell=True, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True)
    try:
        while True:
            try:
                code = child.wait(TICK_SECONDS)
                break
            except subprocess.TimeoutExpired:
                crew.check()
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGTERM)
    if code:
        raise PipelineError(
            f"command {number} of --after-switch ended with {code}; the settings are changed already",
            "mend it and run the same command again, which goes on with these; pipeline status shows where it stands",
        )
    return round(clock() - started, 3)


def new_settings(work: Work) -> Settings:
    """Return the settings as the files have them by now, without this process's environment; a rehearsal's as they are.

    Of several files the first one that has a variable counts, as it does for the application.
    """
    if work.rehearsal:
        return work.settings
    found = Settings.load(work.options.env_files, {})
    try:
        there = found.application()
    except PipelineError as error:
        raise RefusedError(
            f"the files alone do not say where the application searches: {error.fact}",
            "what is set in this environment has to be set for the application too; then run this again",
        ) from error
    here = work.route.target
    if there.place != here.place:
        raise RefusedError(
            f"by the files alone the application searches at {there.label}, main is {here.label}",
            "look at the files with pipeline settings --env-file; to go back: pipeline rollback",
        )
    return found


def switched_files(evidence: Mapping[str, Any]) -> Iterator[tuple[Path, Path]]:
    """Yield every file that the switch was about to edit, with its copy."""
    for one in evidence.get("files", ()):
        yield Path(one["path"]), Path(one["copy"])
