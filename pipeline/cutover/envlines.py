"""The lines of a ``.env`` file taken apart, and how a value is written so that everybody reads the same."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

_BLANK = r"[^\S\r\n]*"
# As python-dotenv's parser cuts a line that it can read.
_ASSIGNMENT = re.compile(
    rf"(?P<lead>(?:\s*[\r\n])?)(?P<indent>{_BLANK})(?P<export>(?:export[^\S\r\n]+)?)"
    rf"(?P<key>'[^']+'|[^=\#\s]+)(?P<equals>{_BLANK}=)(?P<gap>{_BLANK})(?P<rest>.*)",
    re.DOTALL,
)
_QUOTED = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""", re.DOTALL)
_LINE_END = re.compile(r"(?:\r\n|\n|\r)?\Z")
# Nothing in it means anything to a shell, to Docker's --env-file or to either dotenv.
_PLAIN = re.compile(r"[A-Za-z0-9_.:/@%+,=-]+")

# dotenv for JavaScript (motdotla/dotenv 15 and later, lib/main.js), spelled out where Python's \s, \w, . and
# line anchors are others than JavaScript's.
_JS_SPACE = "\t\n\v\f\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
_JS_LINE = re.compile(
    r"(?:\A|(?<=[\n\u2028\u2029]))[{s}]*(?:export[{s}]+)?([A-Za-z0-9_.-]+)(?:[{s}]*=[{s}]*?|:[{s}]+?)"
    r"""([{s}]*'(?:\\'|[^'])*'|[{s}]*"(?:\\"|[^"])*"|[{s}]*`(?:\\`|[^`])*`|[^#\r\n]+)?"""
    r"[{s}]*(?:#[^\n\r\u2028\u2029]*)?(?=[\n\u2028\u2029]|\Z)".replace("{s}", _JS_SPACE)
)
_JS_QUOTES = re.compile(r"(?:\A|(?<=[\n\u2028\u2029]))(['\"`])([\s\S]*)\1(?=[\n\u2028\u2029]|\Z)")
_JS_SPACES = "".join(chr(code) for code in range(0x10000) if re.match(f"[{_JS_SPACE}]", chr(code)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One assignment, or what stands between two: then ``name`` is empty, and all but ``end`` is in ``lead``.

    ``raw`` is the value as it is written, with its quotes; ``text`` is what python-dotenv reads. ``lead``
    holds the blank lines above, ``tail`` what follows the value.
    """

    lead: str = field(default="", repr=False)
    indent: str = ""
    export: str = ""
    key: str = ""
    equals: str = ""
    gap: str = ""
    raw: str = field(default="", repr=False)
    tail: str = field(default="", repr=False)
    end: str = ""
    name: str = ""
    text: str = field(default="", repr=False)

    @property
    def string(self) -> str:
        """Return what stands in the file."""
        return "".join(
            (self.lead, self.indent, self.export, self.key, self.equals, self.gap, self.raw, self.tail, self.end)
        )

    def named(self, name: str) -> "Line":
        """Return the line with another variable's name."""
        return replace(self, name=name, key=self.key.replace(self.name, name))

    def valued(self, raw: str, text: str) -> "Line":
        """Return the line with another value; the remark behind an empty value stays a remark."""
        glue = self.gap if raw and not self.raw and self.tail.startswith("#") else ""
        return replace(self, raw=raw, text=text, tail=glue + self.tail)

    def below(self, name: str, raw: str, text: str, newline: str) -> tuple["Line", "Line"]:
        """Return this line and a new one under it, written in the same way.

        Only the last line of a file may be without a line end: then the new one is, and this one gets ``newline``.
        """
        lower = replace(self.named(name), lead="", raw=raw, text=text, tail="", gap=self.gap if self.raw else "")
        return replace(self, end=self.end or newline), lower


def cut(original: str, name: str | None, text: str | None) -> Line:
    """Take apart what python-dotenv's parser read as one binding."""
    match = _ASSIGNMENT.match(original) if name is not None else None
    if name is None or match is None:
        end = _line_end(original)
        return Line(lead=original[: len(original) - len(end)], end=end)
    raw, tail, end = _cut_value(match["rest"], bool(match["gap"]))
    parts = {part: match[part] for part in ("lead", "indent", "export", "key", "equals", "gap")}
    return Line(**parts, raw=raw, tail=tail, end=end, name=name, text=(text or "").replace("\r\n", "\n"))


def _cut_value(rest: str, gap: bool) -> tuple[str, str, str]:
    """Return the value as written, what follows it, and the line end."""
    end = _line_end(rest)
    body = rest[: len(rest) - len(end)]
    if quoted := _QUOTED.match(body):
        raw = quoted[0]
    elif gap and body.startswith("#"):
        raw = ""
    else:
        raw = re.sub(r"\s+#.*", "", body).rstrip()
    return raw, body[len(raw) :], end


def _line_end(text: str) -> str:
    match = _LINE_END.search(text)
    return match[0] if match else ""


def spellings(text: str, like: str) -> Iterator[str]:
    """Yield the ways to write ``text`` that python-dotenv and JavaScript's dotenv read alike, that of ``like`` first.

    Without quotes a ``#`` begins a remark for one of them. Between single quotes python-dotenv takes a
    backslash off another one and off a quote; between double quotes both know escapes, and not the same
    ones. There may be no way at all.
    """
    ways = {}
    if _PLAIN.fullmatch(text):
        ways[""] = text
    # A text of several lines could hold what looks like another assignment.
    if not re.search(r"[\r\n'\u2028\u2029]|\\(?:\\|\Z)", text):
        ways["'"] = f"'{text}'"
    if not re.search(r"""[\r\n"\u2028\u2029]|\\(?:[\\'abfnrtv]|\Z)""", text):
        ways['"'] = f'"{text}"'
    style = like[:1] if like[:1] in ("'", '"') else ""
    if style in ways:
        yield ways.pop(style)
    yield from ways.values()


def application_values(text: str) -> dict[str, str]:
    """Return what the application's dotenv reads: the last of two equal names wins, bad lines are passed over."""
    values = {}
    for match in _JS_LINE.finditer(re.sub(r"\r\n?", "\n", text)):
        value = (match[2] or "").strip(_JS_SPACES)
        bare = _JS_QUOTES.sub(r"\2", value)
        values[match[1]] = bare.replace("\\n", "\n").replace("\\r", "\r") if value.startswith('"') else bare
    return values
