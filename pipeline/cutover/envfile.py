"""What the switch changes in a ``.env`` file. Writes nothing itself."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from dotenv.parser import parse_stream

from pipeline.cutover.envlines import Line, application_values, cut, spellings
from pipeline.cutover.envwrite import EnvEdit, real_path
from pipeline.endpoints import DEFAULT_PORT, Endpoint, endpoint_from_variables
from pipeline.envfile import Value, read_env_file
from pipeline.errors import RefusedError, SettingsError
from pipeline.settings import Settings

MOCK = "USE_MOCK_EMBEDDINGS"
PARTS = ("HOST", "PORT", "USER", "PASSWORD", "DB", "SSL", "SSLROOTCERT")
PGVECTOR = {f"PGVECTOR_{part}": part for part in PARTS}
LEGACY = {f"LEGACY_{part}": part for part in PARTS}
SWITCHED = frozenset({*PGVECTOR, *LEGACY, MOCK})
_BOM = "\ufeff"
_BY_HAND = "write it into the file by hand; pipeline cutover shows what is to be there"


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvText:
    """A file's lines, and the byte order mark above them."""

    lines: tuple[Line, ...]
    mark: str = ""

    @property
    def body(self) -> str:
        """Return the text below the mark."""
        return "".join(line.string for line in self.lines)

    @property
    def data(self) -> bytes:
        """Return the file's bytes."""
        return (self.mark + self.body).encode()

    @property
    def by_name(self) -> dict[str, Line]:
        """Return the assignments by their variables."""
        return {line.name: line for line in self.lines if line.name}

    @property
    def texts(self) -> dict[str, str]:
        """Return every variable's value as python-dotenv reads it."""
        return {line.name: line.text for line in self.lines if line.name}

    @property
    def newline(self) -> str:
        """Return the line end for a line that had none and gets one below it."""
        return next((line.end for line in self.lines if line.end), "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class MainValue:
    """What main has for one part of its address; ``raw`` is how this file writes it, where it does."""

    text: str = field(repr=False)
    raw: str | None = field(repr=False)

    def is_said_by(self, part: str, text: str) -> bool:
        """Return whether ``text`` is the same value, also where one side leaves the default out."""
        default = str(DEFAULT_PORT) if part == "PORT" else ""
        return (text or default) == (self.text or default)


def plan_switch(path: Path, settings: Settings, *, with_mock_line: bool) -> EnvEdit:
    """Return the edit after which this file's ``PGVECTOR_*`` is main, and ``LEGACY_*`` what these were.

    ``settings`` are those of all files together, as before the switch. Of a file that overrides only some
    variables only these are changed. A variable that main does not have becomes ``LEGACY_*`` where it
    stands. ``USE_MOCK_EMBEDDINGS`` becomes false; ``with_mock_line`` adds it to a file without it. A file
    that is switched already comes back unchanged. Raises SettingsError for a file that cannot be read,
    RefusedError for one that must be edited by hand; neither shows a value.
    """
    real = real_path(path)
    before, data = read_lines(real, path)
    wanted = main_values(path, before, settings)
    after, changes = before, list[str]()
    if not _is_switched(before, wanted):
        after, changes = _switch_address(path, before, wanted, settings)
    after, more = _switch_mock(after, with_mock_line)
    after = parse_lines(path, after.body, after.mark)
    _check_switch(path, before, after, wanted, settings)
    return EnvEdit(path=real, shown=path, before=data, after=after.data, changes=(*changes, *more))


def read_lines(real: Path, shown: Path) -> tuple[EnvText, bytes]:
    """Read a file as strictly as the settings do. Raises SettingsError, or RefusedError if it cannot be cut safely."""
    strict = read_env_file(real)
    try:
        data = real.read_bytes()
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{shown} cannot be read", "name a file with --env-file") from error
    # python-dotenv takes one more mark off than the decoder.
    body = text.removeprefix(_BOM).removeprefix(_BOM)
    parsed = parse_lines(shown, body, text[: len(text) - len(body)])
    if parsed.data != data or parsed.texts != {name: value.text for name, value in strict.items()}:
        raise RefusedError(f"{shown} cannot be taken apart safely", "edit it by hand")
    return parsed, data


def parse_lines(path: Path, body: str, mark: str) -> EnvText:
    """Cut a text into lines; a text of ours that does not read cleanly is never written. Raises RefusedError."""
    lines: list[Line] = []
    for binding in parse_stream(io.StringIO(body)):
        line = cut(binding.original.string, binding.key, binding.value)
        if binding.error or line.string != binding.original.string or (binding.key and binding.value is None):
            raise RefusedError(f"{path}, line {binding.original.line}: this line cannot be edited safely", _BY_HAND)
        lines.append(line)
    names = [line.name for line in lines if line.name]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RefusedError(f"{path} would have {twice[0]} twice", "edit it by hand")
    return EnvText(lines=tuple(lines), mark=mark)


def main_values(path: Path, text: EnvText, settings: Settings) -> dict[str, MainValue]:
    """Return main's address, part by part. Raises RefusedError where file and settings name two databases."""
    found: dict[str, MainValue] = {}
    for part in PARTS:
        variable = "DB_NAME" if part == "DB" else f"DB_{part}"
        own, value = text.by_name.get(variable), settings.values.get(variable)
        if own is not None:
            _check_environment(path, own, value)
        raw = own.raw if own is not None and value is not None and own.text == value.text else None
        found[part] = MainValue(text=value.text if value is not None else "", raw=raw)
        own, value = text.by_name.get(f"PGVECTOR_{part}"), settings.values.get(f"PGVECTOR_{part}")
        if settings.legacy_prefix == "PGVECTOR" and own is not None and value is not None:
            _check_environment(path, own, value)
    return found


def _check_environment(path: Path, own: Line, value: Value | None) -> None:
    """Check that the environment does not say otherwise than the file: nobody knows which of them is meant."""
    if value is None or (value.where == "environment" and value.text != own.text):
        raise RefusedError(
            f"{own.name} has one value in {path} and another one in the environment",
            f"unset {own.name}, or make both the same: the application may read either",
        )


def _is_switched(text: EnvText, wanted: Mapping[str, MainValue]) -> bool:
    texts = text.texts
    if not any(name in texts for name in LEGACY):
        return False
    return all(wanted[part].is_said_by(part, texts[name]) for name, part in PGVECTOR.items() if name in texts)


def _switch_address(
    path: Path, text: EnvText, wanted: Mapping[str, MainValue], settings: Settings
) -> tuple[EnvText, list[str]]:
    names, lines, changes, last = text.by_name, list[Line](), list[str](), -1
    for line in text.lines:
        if part := PGVECTOR.get(line.name):
            made, said = _switch_line(path, line, part, wanted[part], f"LEGACY_{part}" in names, text.newline)
            lines += made
            changes += said
            last = len(lines) - 1
        elif (old := names.get(f"PGVECTOR_{LEGACY.get(line.name)}")) and old.text != line.text:
            lines.append(line.valued(old.raw, old.text))
            changes.append(f"{line.name}: the old {old.name}")
        else:
            lines.append(line)
    for part in _missing(names, wanted, settings) if last >= 0 else ():
        name, want = f"PGVECTOR_{part}", wanted[part]
        raw = _spelled(path, replace(lines[last], lead="", tail="").named(name), want)
        lines[last : last + 1] = lines[last].below(name, raw, want.text, text.newline)
        changes.append(f"{name}: added, main's")
        last += 1
    return replace(text, lines=tuple(lines)), changes


def _switch_line(
    path: Path, line: Line, part: str, want: MainValue, has_legacy: bool, newline: str
) -> tuple[tuple[Line, ...], list[str]]:
    """Return what takes the place of one ``PGVECTOR_*`` line, and how that is told."""
    legacy = f"LEGACY_{part}"
    if not want.text and not line.text:
        return (line,), []
    if not want.text and not has_legacy:
        return (line.named(legacy),), [f"{line.name}: becomes {legacy}"]
    if not want.text:
        # An empty port is an error for the reader, every other empty part is none.
        raw = str(DEFAULT_PORT) if part == "PORT" else ""
        return (line.valued(raw, raw),), [f"{line.name}: as on main, the default"]
    new = line if line.text == want.text else line.valued(_spelled(path, line, want), want.text)
    changes = [] if new is line else [f"{line.name}: main's"]
    if has_legacy:
        return (new,), changes
    upper, lower = line.below(legacy, line.raw, line.text, newline)
    return (replace(new, end=upper.end), lower), [*changes, f"{legacy}: added, the old {line.name}"]


def _missing(names: Mapping[str, Line], wanted: Mapping[str, MainValue], settings: Settings) -> Iterator[str]:
    """Yield the parts that main has and legacy's lines do not.

    A file with only some of the variables leaves to the others what these have.
    """
    whole = all(f"PGVECTOR_{part}" in names for part in ("HOST", "USER", "DB"))
    for part in PARTS:
        name = f"PGVECTOR_{part}"
        if wanted[part].text and name not in names and (whole or name not in settings.values):
            yield part


def _spelled(path: Path, line: Line, want: MainValue) -> str:
    """Return how main's value is written on this line: as main's own line has it, else by the rules of both dotenvs."""
    raws = ([] if want.raw is None else [want.raw]) + list(spellings(want.text, line.raw))
    for raw in raws:
        new = replace(line.valued(raw, want.text), lead="")
        (binding, *rest) = parse_stream(io.StringIO(new.string.rstrip("\r\n")))
        read = (binding.value or "").replace("\r\n", "\n")
        # The strict reader refuses a bare password with a remark behind it: either may be the other's part.
        doubtful = line.name.endswith("_PASSWORD") and "#" in new.tail and not raw.startswith(("'", '"'))
        if not binding.error and not rest and read == want.text and not doubtful:
            return raw
    raise RefusedError(f"main's value cannot be written safely into {path} as {line.name}", _BY_HAND)


def _switch_mock(text: EnvText, with_mock_line: bool) -> tuple[EnvText, list[str]]:
    lines = list(text.lines)
    for at, line in enumerate(lines):
        if line.name == MOCK:
            if line.text == "false":
                return text, []
            quote = line.raw[:1] if line.raw[:1] in ("'", '"') else ""
            lines[at] = line.valued(f"{quote}false{quote}", "false")
            return replace(text, lines=tuple(lines)), [f"{MOCK}: false"]
    if not with_mock_line:
        return text, []
    new = Line(key=MOCK, equals="=", raw="false", name=MOCK, text="false", end=text.newline if not lines else "")
    if lines:
        new = replace(new, end=lines[-1].end)
        lines[-1] = replace(lines[-1], end=lines[-1].end or text.newline)
    return replace(text, lines=(*lines, new)), [f"{MOCK}: added, false"]


def _check_switch(
    path: Path, before: EnvText, after: EnvText, wanted: Mapping[str, MainValue], settings: Settings
) -> None:
    """Read the new text as the pipeline and as the application does. Raises RefusedError, with the variable."""
    old, new = before.texts, after.texts
    js_old, js_new = application_values(before.body), application_values(after.body)
    check_others(path, (old, new), (js_old, js_new))
    for part in PARTS:
        name, legacy = f"PGVECTOR_{part}", f"LEGACY_{part}"
        want = wanted[part]
        theirs = {want.text, js_old.get("DB_NAME" if part == "DB" else f"DB_{part}", want.text)}
        if name in new and not want.is_said_by(part, new[name]):
            raise _misread(path, name)
        if name in new and name in js_new and want.text and js_new[name] not in theirs:
            raise _misread(path, name)
        # An application that cannot see the line (a name in quotes) sees neither of the two.
        moved = (new.get(legacy), js_new.get(legacy)) == (old.get(name), js_old.get(name))
        if old.get(name) and not moved and not _is_switched(before, wanted):
            raise _misread(path, legacy)
    if MOCK in new and new[MOCK] != "false":
        raise _misread(path, MOCK)
    main = _endpoint(new, "PGVECTOR")
    if main is not None and replace(main, name="main") != settings.endpoint("main"):
        raise RefusedError(f"{path}: PGVECTOR_* would not be main", "edit the file by hand")
    legacy_old = _endpoint(old, "LEGACY" if any(name in old for name in LEGACY) else "PGVECTOR")
    if legacy_old is not None and _endpoint(new, "LEGACY") != legacy_old:
        raise RefusedError(
            f"{path}: PGVECTOR_* and LEGACY_* name two databases, and neither is main",
            "take the LEGACY_* lines out where they are old; else give PGVECTOR_* the same values",
        )


def check_others(path: Path, ours: tuple[Mapping[str, str], ...], theirs: tuple[Mapping[str, str], ...]) -> None:
    """Check that every other variable reads as before, to the pipeline and to the application. Raises RefusedError."""
    for old, new in (ours, theirs):
        for name in [*old, *new]:
            if name not in SWITCHED and old.get(name) != new.get(name):
                raise _misread(path, name)


def _misread(path: Path, name: str) -> RefusedError:
    return RefusedError(f"{path}: {name} would be read otherwise than it is meant", _BY_HAND)


def _endpoint(texts: Mapping[str, str], prefix: str) -> Endpoint | None:
    """Return the database that a group of variables names by itself, None where it is a part of a group."""
    if not all(texts.get(f"{prefix}_{part}") for part in ("HOST", "USER", "DB")):
        return None
    values = {name: Value(text=text, where="file") for name, text in texts.items()}
    return endpoint_from_variables(values, "legacy", prefix, f"{prefix}_DB")
