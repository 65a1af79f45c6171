"""The steps of a cutover, as a person reads them: what each looks at, what it writes, and the way back from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.options import STEPS, CutoverOptions
from pipeline.settings import Route


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step, in words; ``seconds`` is how long it took the last time, None where it never was."""

    name: str
    title: str
    reads: str
    writes: str
    undo: str
    seconds: float | None = None


def describe_steps(
    route: Route, options: CutoverOptions, seconds: dict[str, float], *, rehearsal: bool
) -> tuple[Step, ...]:
    """Return the steps for this installation, with its tables and files."""
    table = route.table.qualified
    source, target = (f"{one.name}'s {table}" for one in (route.source, route.target))
    folder = "nothing (--skip-backup)" if options.skip_backup else f"{options.backup_folder}/: a dump of each table"
    steps = {
        "preflight": (
            "what could stop it on its way",
            f"both servers, the last verdicts, {_files(options.env_files)}",
            "nothing",
            "none needed",
        ),
        "backup": ("dumps of both tables, listed and summed up", f"{source}, {target}", folder, "none needed"),
        "catchup": (
            "main's table closed to others, and made equal",
            source,
            f"triggers on {target}, rows",
            "pipeline rollback",
        ),
        "fence": (
            "legacy takes no more writes, and that is proved",
            source,
            f"a function and triggers on {source}",
            "pipeline rollback lifts it",
        ),
        "prove": (
            "the last changes, and every row compared" if options.deep else "the last changes, and both sides equal",
            f"{source}, {target}",
            f"rows of {target}",
            "pipeline rollback",
        ),
        "switch": _switch(options, target),
        "smoke": ("a search by the new settings alone", target, "nothing", "pipeline rollback"),
        "watch": (
            f"stray writers and searches, for {options.watch_seconds:g} s",
            "sessions on legacy, searches on main",
            "nothing",
            "pipeline rollback",
        ),
    }
    if rehearsal:
        del steps["watch"]
        steps["switch"] = (
            "the fence is lifted again; nothing is switched",
            source,
            f"triggers on {source}, {target}: gone",
            "none needed",
        )
    known = {**seconds, "watch": options.watch_seconds}
    return tuple(
        Step(name=name, title=title, reads=reads, writes=writes, undo=undo, seconds=known.get(name))
        for name, (title, reads, writes, undo) in steps.items()
    )


def describe_back(
    route: Route, options: CutoverOptions, seconds: dict[str, float], *, opened: bool
) -> tuple[Step, ...]:
    """Return the steps of the way back; ``opened`` says that main may have rows that legacy has not."""
    table = route.table.qualified
    source, target = (f"{one.name}'s {table}" for one in (route.source, route.target))
    commands = "; ".join(options.after_switch) or "no command (--after-switch): restart the application"
    steps = {
        "back-close": ("main takes no more writes", target, f"triggers on {target}"),
        "back-sync": ("what was written on main goes to legacy", target, f"rows of {source}, a ledger beside it"),
        "back-verify": ("both sides equal", f"{source}, {target}", "the verdict"),
        "back-switch": ("the settings as they were", "the dated copies", _files(options.env_files)),
        "back-open": ("legacy takes writes again", source, f"triggers on {source}: gone"),
        "back-commands": ("the application is told", "nothing", commands),
    }
    return tuple(
        Step(name=name, title=title, reads=reads, writes=writes, undo="", seconds=seconds.get(name))
        for name, (title, reads, writes) in steps.items()
        if opened or name == "back-open"
    )


def _switch(options: CutoverOptions, target: str) -> tuple[str, str, str, str]:
    commands = "".join(f"; then: {command}" for command in options.after_switch)
    return (
        "main's table opened, the settings point there",
        _files(options.env_files),
        f"triggers on {target}: gone; {_files(options.env_files)}{commands}",
        "pipeline rollback, which brings new writes back",
    )


def _files(files: Sequence[Path]) -> str:
    return ", ".join(str(path) for path in files) or "no .env file"


def steps_until(name: str | None) -> tuple[str, ...]:
    """Return the names of the steps up to one, itself included; all where it is None."""
    return STEPS if name is None else STEPS[: STEPS.index(name) + 1]
