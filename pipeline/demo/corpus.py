"""The demo's corpus: the documentation inside Python's own standard library, cut into passages."""

import ast
import gc
import os
import re
import sys
import sysconfig
import textwrap
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import PipelineError

# Ids are uuid5 of this and the passage's name and part: the same on every machine and every run.
NAMESPACE = uuid.UUID("6f6a0c3e-5d0b-5c5f-9d0e-6b1f5f3f7a10")
TOPICS = "pydoc_data.topics"
# Characters of a passage's body. Docstrings below the least ("Return self.") say nothing a search could find.
LEAST, ENOUGH, MOST = 40, 200, 1000

_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "ensurepip", "encodings", "idlelib", "lib2to3", "msilib", "pydoc_data"}
    | {"site-packages", "test", "tests", "turtledemo"}
)
# Python twins of modules written in C, documented under the public name.
_TWINS = {"_pydecimal": "decimal", "_pyio": "io", "_pydatetime": "datetime"}
_UNDERLINE = re.compile(r"([*=\-~^\"])\1{2,}")
_ENTRY = re.compile(
    r"(?:(?:class|exception|async|classmethod|coroutine) )*([A-Za-z_][\w.]*\.?\w+)(?:\(.*\))?", re.DOTALL
)
_VERBATIM = re.compile(r"^\s+\S|^>>>|::=|^[-*] |^\d+\. |\s{3,}", re.MULTILINE)
# What stands under an entry is indented by three; what is indented further, or without an entry, is code.
_INDENT = re.compile(r"^ {1,3}", re.MULTILINE)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")

_Function = ast.FunctionDef | ast.AsyncFunctionDef


class CorpusError(PipelineError):
    """This Python carries no documentation to make a corpus of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A piece of documentation: ``text`` is ``head: body``, ``name`` the qualified name it belongs to.

    ``part`` counts the passages of one name from 1. ``lines`` are the first line of the definition and
    the last of its docstring in the source file, and None for the language reference.
    """

    text: str
    source: str
    name: str
    kind: str
    part: int = 1
    lines: tuple[int, int] | None = None

    @property
    def id(self) -> uuid.UUID:
        """Return the uuid5 of the name and part."""
        return uuid.uuid5(NAMESPACE, f"{self.name}/{self.part}")

    @property
    def metadata(self) -> dict[str, object]:
        """Return the metadata object, with ``source`` and ``loc`` where LangChain's loaders put them."""
        found: dict[str, object] = {
            "source": self.source,
            "name": self.name,
            "kind": self.kind,
            "part": self.part,
        }
        if self.lines is not None:
            first, last = self.lines
            found |= {"line": first, "loc": {"lines": {"from": first, "to": last}}}
        return found


@dataclass(frozen=True, slots=True)
class _Document:
    """One docstring or one section of the language reference, not yet cut."""

    head: str
    body: str
    source: str
    name: str
    kind: str
    lines: tuple[int, int] | None = None


def corpus(limit: int | None = None) -> list[Passage]:
    """Collect the passages in a fixed order, or ``limit`` of them spread evenly over the whole.

    Modules are parsed, never imported. No two passages have the same text or the same id. Takes
    about two seconds. Raises CorpusError where Python came without its sources.
    """
    passages: list[Passage] = []
    parts: Counter[str] = Counter()
    texts: set[str] = set()
    for document in _documents():
        for body in _cut(document.body):
            text = f"{document.head}: {body}"
            if len(body) < LEAST or text in texts:
                continue
            texts.add(text)
            parts[document.name] += 1
            passages.append(
                Passage(
                    text=text,
                    source=document.source,
                    name=document.name,
                    kind=document.kind,
                    part=parts[document.name],
                    lines=document.lines,
                )
            )
    if not passages:
        raise CorpusError(
            "this Python has neither the sources nor the documentation of its standard library",
            "run the demo with a Python that was installed with its .py files",
        )
    return passages if limit is None else spread(passages, limit)


def spread(passages: Sequence[Passage], count: int) -> list[Passage]:
    """Return ``count`` passages at even distances, all of them where there are fewer."""
    count = min(count, len(passages))
    return [passages[number * len(passages) // count] for number in range(count)]


def _documents() -> Iterator[_Document]:
    yield from _language_reference()
    root = Path(sysconfig.get_path("stdlib"))
    with _collector_paused(), warnings.catch_warnings():
        # Old docstrings hold invalid escapes, which the parser warns of.
        warnings.simplefilter("ignore")
        for path in _sources(root):
            yield from _docstrings(path, _module_name(path.relative_to(root)))


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep the garbage collector off: it doubles the time of building half a million syntax nodes."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _sources(root: Path) -> Iterator[Path]:
    """Yield the public modules' files in the order of their names."""
    for folder, folders, files in os.walk(root):
        at_root = Path(folder) == root
        folders[:] = sorted(
            name
            for name in folders
            if name not in _SKIPPED_FOLDERS
            and not name.startswith("_")
            and (not at_root or name in sys.stdlib_module_names)
        )
        for file in sorted(files):
            stem = file.removesuffix(".py")
            public = stem == "__init__" or stem in _TWINS or not stem.startswith("_")
            if file.endswith(".py") and public and (not at_root or stem in sys.stdlib_module_names):
                yield Path(folder, file)


def _module_name(path: Path) -> str:
    names = list(path.with_suffix("").parts)
    if names[-1] == "__init__":
        names.pop()
    return ".".join(_TWINS.get(name, name) for name in names)


def _docstrings(path: Path, module: str) -> Iterator[_Document]:
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        # Some distributions keep files of another Python's syntax among the sources.
        return
    if body := ast.get_docstring(tree):
        # Many begin with their own name, which the head has said.
        body = body.removeprefix(module).lstrip(" \n:.-")
        yield _Document(module, body, module, module, "module", (1, _last_line(tree.body)))
    yield from _definitions(tree.body, module, module, in_class=False)


def _definitions(body: Sequence[ast.stmt], module: str, scope: str, *, in_class: bool) -> Iterator[_Document]:
    """Yield the documented public definitions; those inside functions are nobody's to call."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _definitions([*node.body, *node.orelse], module, scope, in_class=in_class)
        if not isinstance(node, ast.ClassDef | _Function):
            continue
        name = f"{scope}.{node.name}"
        if node.name.startswith("_") and not node.name.endswith("__"):
            continue
        if docstring := ast.get_docstring(node):
            lines = (node.lineno, _last_line(node.body))
            yield _Document(name, docstring, module, name, _kind(node, in_class), lines)
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node.body, module, name, in_class=True)


def _last_line(body: Sequence[ast.stmt]) -> int:
    return body[0].end_lineno or body[0].lineno


def _kind(node: ast.ClassDef | _Function, in_class: bool) -> str:
    if isinstance(node, ast.ClassDef):
        return "class"
    decorators = {d.id if isinstance(d, ast.Name) else getattr(d, "attr", "") for d in node.decorator_list}
    if in_class and decorators & {"property", "cached_property"}:
        return "property"
    return "method" if in_class else "function"


def _language_reference() -> Iterator[_Document]:
    """Yield the sections of the language reference, where this Python has it as text.

    Topics overlap: a section that stands in several is yielded each time, with the same name and text.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    seen: set[tuple[str, str]] = set()
    typed: Mapping[str, str] = topics
    for topic in sorted(typed):
        for document in _sections(topic, typed[topic]):
            if (document.head, document.body) not in seen:
                seen.add((document.head, document.body))
                yield document


def _sections(topic: str, text: str) -> Iterator[_Document]:
    """Cut a topic at its underlined titles, and where an entry (``str.strip([chars])``) begins or ends."""
    title, entry = topic, ""
    gathered: list[str] = []

    def document() -> _Document:
        name = _entry_name(entry) if entry else title
        kind = "entry" if entry else "section"
        return _Document(" ".join(entry.split()) or title, "\n\n".join(gathered), TOPICS, name, kind)

    paragraphs = _paragraphs(text.split("\n-[ Footnotes ]-")[0])
    for paragraph, following in zip(paragraphs, [*paragraphs[1:], ""], strict=True):
        lines = paragraph.split("\n")
        is_title = len(lines) == 2 and _UNDERLINE.fullmatch(lines[1].strip()) is not None
        is_entry = bool(following.startswith("   ") and _ENTRY.fullmatch(paragraph))
        if is_title or is_entry or (entry and not paragraph.startswith("   ")):
            if gathered:
                yield document()
            gathered.clear()
            title = lines[0].strip() if is_title else title
            entry = paragraph if is_entry else ""
        if not (is_title or is_entry):
            gathered.append(_INDENT.sub("", paragraph) if entry else paragraph)
    if gathered:
        yield document()


def _entry_name(entry: str) -> str:
    found = _ENTRY.match(entry)
    return found[1] if found else entry


def _paragraphs(text: str) -> list[str]:
    return [paragraph.rstrip() for paragraph in re.split(r"\n(?:[ \t]*\n)+", text.strip("\n"))]


def _cut(text: str) -> Iterator[str]:
    """Cut a text between paragraphs into bodies of about ENOUGH to MOST characters."""
    body = ""
    for piece in _pieces(text):
        if body and len(body) + len(piece) > (MOST if len(body) < ENOUGH else MOST * 6 // 10):
            yield body
            body = ""
        body = f"{body}\n\n{piece}" if body else piece
    if body:
        yield body


def _pieces(text: str) -> Iterator[str]:
    """Yield cleaned paragraphs of at most MOST characters: prose on one line, code as it stands."""
    for paragraph in _paragraphs(_CONTROL.sub(" ", text.expandtabs())):
        if _VERBATIM.search(paragraph):
            clean = textwrap.dedent("\n".join(line.rstrip() for line in paragraph.split("\n")))
        else:
            clean = " ".join(paragraph.split())
        while len(clean) > MOST:
            end = max(clean.rfind("\n", 0, MOST), clean.rfind(". ", 0, MOST) + 1) or MOST
            yield clean[:end].strip()
            clean = clean[end:].strip("\n")
        if clean.strip():
            yield clean.strip()
