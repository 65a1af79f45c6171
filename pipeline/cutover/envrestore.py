"""What the way back changes in a ``.env`` file that was switched. Writes nothing itself."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pipeline.cutover.envfile import (
    LEGACY,
    MOCK,
    PGVECTOR,
    SWITCHED,
    EnvText,
    MainValue,
    check_others,
    main_values,
    parse_lines,
    read_lines,
)
from pipeline.cutover.envlines import Line, application_values, cut
from pipeline.cutover.envwrite import EnvEdit, real_path
from pipeline.errors import RefusedError
from pipeline.settings import Settings


def plan_restore(path: Path, copy: Path, settings: Settings) -> EnvEdit:
    """Return the edit that takes the switch back: the copy's bytes, where nobody has edited the file since.

    Other lines that were edited since are kept. A file that is restored already comes back unchanged.
    Raises RefusedError where a switched variable has another value by now, or is gone.
    """
    real = real_path(path)
    now, data = read_lines(real, path)
    then, _ = read_lines(real_path(copy), copy)
    wanted = main_values(path, then, settings)
    if _switched_texts(now) == _switched_texts(then):
        return EnvEdit(path=real, shown=path, before=data, after=data, changes=())
    _check_restorable(path, copy, now.texts, then.texts, wanted)
    after, changes = _turn_back(now, then)
    after = parse_lines(path, after.body, after.mark)
    if _switched_texts(after) != _switched_texts(then):
        raise RefusedError(f"{path} cannot be turned back line by line", f"compare it with {copy}, and edit it by hand")
    check_others(path, (now.texts, after.texts), (application_values(now.body), application_values(after.body)))
    return EnvEdit(path=real, shown=path, before=data, after=after.data, changes=tuple(changes))


def _switched_texts(text: EnvText) -> dict[str, str]:
    return {name: value for name, value in text.texts.items() if name in SWITCHED}


def _check_restorable(
    path: Path, copy: Path, now: Mapping[str, str], then: Mapping[str, str], wanted: Mapping[str, MainValue]
) -> None:
    """Check that every switched variable is as before the switch, or as the switch made it."""
    for name in sorted(SWITCHED & {*now, *then}):
        value, old = now.get(name), then.get(name)
        if value == old:
            continue
        if name == MOCK:
            good = value == "false"
        elif name in PGVECTOR:
            part = PGVECTOR[name]
            gone = value is None and not wanted[part].text and now.get(f"LEGACY_{part}") == old
            good = gone or (value is not None and wanted[part].is_said_by(part, value))
        else:
            good = value is not None and value == then.get(f"PGVECTOR_{LEGACY[name]}")
        if not good:
            raise RefusedError(
                f"{path}: {name} is neither what it was before the switch nor what the switch made of it",
                f"compare the file with {copy}, and edit it by hand",
            )


def _turn_back(now: EnvText, then: EnvText) -> tuple[EnvText, list[str]]:
    names, old = now.by_name, then.by_name
    lines, changes = list[Line](), list[str]()
    for line in now.lines:
        origin = line.name
        if line.name in LEGACY and line.name not in old:
            # Renamed in its place, or added below the line that has its old value.
            renamed = f"PGVECTOR_{LEGACY[line.name]}"
            origin = renamed if renamed in old and renamed not in names else ""
        if line.name not in SWITCHED:
            lines.append(line)
        elif origin in old:
            back = _as_it_was(line, old[origin])
            lines.append(back)
            changes += [] if back == line else [f"{origin}: as before"]
        else:
            _drop(lines, line)
            changes.append(f"{line.name}: taken out")
    return replace(now, lines=tuple(lines)), changes


def _as_it_was(line: Line, old: Line) -> Line:
    """Return the old assignment in this line's place; a remark that was edited since is kept."""
    back = replace(old, lead=line.lead, end=line.end)
    return back if line.tail.strip() == old.tail.strip() else replace(back, gap=line.gap, tail=line.tail)


def _drop(lines: list[Line], line: Line) -> None:
    """Leave one line out; where it was the last one, the line above ends the file as this one did."""
    if line.lead:
        above = cut(line.lead, None, None)
        lines.append(above if line.end else replace(above, end=""))
    elif lines and not line.end:
        lines[-1] = replace(lines[-1], end="")
