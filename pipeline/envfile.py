"""Reading ``.env`` files strictly: every line is understood, or named."""

import io
import re
from dataclasses import dataclass, field
from pathlib import Path

from dotenv.parser import parse_stream

from pipeline.errors import SettingsError


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A variable's text and where it came from: ``environment`` or ``FILE:LINE``."""

    text: str = field(repr=False)
    where: str


def read_env_file(path: Path) -> dict[str, Value]:
    """Read every assignment of a ``.env`` file, without interpolation.

    UTF-8, with or without a byte order mark; LF or CRLF. python-dotenv's parser only reports a bad
    line and the last of two equal keys wins; here both are errors, which name file, line and
    variable, never the value. Raises SettingsError.
    """
    values: dict[str, Value] = {}
    for binding in parse_stream(io.StringIO(_read_text(path))):
        line = binding.original.line + _leading_lines(binding.original.string)
        if binding.error:
            raise SettingsError(
                f"{path}, line {line}: this line cannot be read",
                "write NAME=value; quote a value that holds spaces, # or quotes",
            )
        if binding.key is None:
            continue
        if binding.value is None:
            raise SettingsError(f"{path}, line {line}: {binding.key} has no =", f"write {binding.key}=value")
        if binding.key in values:
            raise SettingsError(
                f"{path}, line {line}: {binding.key} is set twice, first at {values[binding.key].where}",
                "keep one of the two lines",
            )
        if problem := _trap(binding.key, binding.value, binding.original.string):
            raise SettingsError(f"{path}, line {line}: {binding.key} {problem[0]}", problem[1])
        values[binding.key] = Value(text=binding.value, where=f"{path}:{line}")
    return values


def _trap(key: str, value: str, original: str) -> tuple[str, str] | None:
    """Return what is wrong with a line that the parser reads otherwise than its author meant it, and the cure."""
    if re.search(r"^(?:export\s+)?[A-Z][A-Z0-9]*_[A-Z0-9_]*=", value.partition("\n")[2], re.MULTILINE):
        return "swallows the assignments of the lines below", "close the quote"
    text = original.partition("=")[2]
    if key.endswith("_PASSWORD") and re.search(r"\s#", text) and not text.lstrip().startswith(("'", '"')):
        return "is cut at a blank and #", "quote the value, or move the comment to its own line"
    return None


def _leading_lines(original: str) -> int:
    """Count the blank lines that the parser hands over in front of a binding."""
    return len(original[: len(original) - len(original.lstrip())].split("\n")) - 1


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        fact = f"{path} cannot be read: {error.strerror}"
        raise SettingsError(fact, "name a file with --env-file") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SettingsError(f"{path}, line {line}: not UTF-8", "save the file as UTF-8") from error
    return text.replace("\r\n", "\n")
