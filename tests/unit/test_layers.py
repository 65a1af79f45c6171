"""The house's rules, read from the source: who imports whom, who talks to what, and no SQL made from text."""

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.support import ROOT

PIPELINE, ALEMBIC = ROOT / "pipeline", ROOT / "alembic"
MAX_LINES = 400
ENGINE = frozenset({"postgres", "ledger", "check", "move", "cutover"})
# What each part may import of ours, itself aside. A part is a folder, or a module beside the folders.
BASE = frozenset({"wording", "errors", "events", "options", "failpoints"})
SETTINGS = BASE | {"envfile", "endpoints", "settings"}
ALLOWED: Mapping[str, frozenset[str]] = {
    "wording": frozenset(),
    "errors": frozenset(),
    "events": frozenset({"errors"}),
    "options": frozenset({"errors"}),
    "failpoints": frozenset({"errors"}),
    "envfile": BASE,
    "endpoints": BASE | {"envfile"},
    "settings": BASE | {"envfile", "endpoints"},
    "postgres": SETTINGS,
    "ledger": SETTINGS | {"postgres"},
    "check": SETTINGS | {"postgres", "ledger"},
    "move": SETTINGS | {"postgres", "ledger", "check"},
    "cutover": SETTINGS | {"postgres", "ledger", "check", "move"},
    "status": SETTINGS | {"postgres", "ledger", "check", "move", "cutover"},
    "search": SETTINGS,
    "migration": SETTINGS | {"postgres", "search"},
    "install": SETTINGS | {"postgres", "migration"},
    "show": frozenset({"wording", "errors", "events", "settings", "check", "cutover", "status", "search"}),
    "demo": SETTINGS,
    "cli": SETTINGS | {"postgres", "ledger", "check", "move", "cutover", "status", "search", "show", "demo", "install"},
    "__main__": frozenset({"cli"}),
    "alembic": SETTINGS | {"postgres", "search", "migration"},
}
# Where each library may be imported: parts, or modules by their path.
WALLS: Mapping[str, frozenset[str]] = {
    "psycopg2": frozenset({"postgres", "ledger", "check", "move", "cutover", "migration", "demo", "alembic"}),
    "sqlalchemy": frozenset({"search", "migration", "alembic"}),
    "pgvector": frozenset({"search", "migration", "alembic"}),
    "alembic": frozenset({"migration", "install", "alembic"}),
    "click": frozenset({"cli"}),
    "rich": frozenset({"show"}),
    "structlog": frozenset({"show"}),
    "jinja2": frozenset({"show"}),
    "matplotlib": frozenset({"show"}),
    "prometheus_client": frozenset({"show", "search/monitor.py"}),
    "tenacity": frozenset({"move/retry.py"}),
    "dotenv": frozenset({"envfile", "cutover/envfile.py"}),
    "httpx": frozenset({"search/embedders.py"}),
    "numpy": frozenset({"demo"}),
}
# Capitals are SQL by themselves; small letters only where they cannot be English ("copy fills an empty table").
SQL_BEGINNING = re.compile(
    r"\s*(?:(?:SELECT|INSERT|UPDATE|DELETE|COPY|CREATE|DROP|ALTER)\b"
    r"|(?i:insert\s+into|delete\s+from|select\s.*\sfrom|update\s.*\sset|(?:create|drop|alter)\s+(?:table|index))\b)",
    re.DOTALL,
)


def modules(root: Path) -> Iterator[Path]:
    yield from sorted(path for path in root.rglob("*.py") if "__pycache__" not in path.parts)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def part_of(path: Path, root: Path) -> str:
    """Return the part that a module belongs to; everything below a folder that is no package is one part."""
    relative = path.relative_to(root)
    if root.name != "pipeline":
        return root.name
    return relative.parts[0] if len(relative.parts) > 1 else path.stem


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and full name of everything that a module imports, wherever in it the import stands."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)


def wrong_ways(root: Path) -> Iterator[str]:
    """Yield every import of ours against the direction of the layers."""
    for path in modules(root):
        part = part_of(path, root)
        if path.name == "__init__.py" and path.parent == root:
            continue
        for line, name in imported(path):
            package, _, rest = name.partition(".")
            other = rest.split(".")[0]
            if package != "pipeline" or other in {part, "__version__"}:
                continue
            if other not in ALLOWED.get(part, frozenset()):
                yield f"{path.relative_to(root)}:{line} imports {name}"


def through_walls(root: Path) -> Iterator[str]:
    """Yield every import of a library outside the parts that it belongs to."""
    for path in modules(root):
        part, relative = part_of(path, root), str(path.relative_to(root))
        for line, name in imported(path):
            library = name.split(".")[0]
            if library in WALLS and not {part, relative} & WALLS[library]:
                yield f"{relative}:{line} imports {library}"


def guarded_imports(root: Path) -> Iterator[str]:
    """Yield every TYPE_CHECKING that hides an import of ours: it means that something lives too high.

    A library that is imported late, to keep the start of every command short, is another matter.
    """
    for path in modules(root):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                inner = ast.Module(body=node.body, type_ignores=[])
                names = [
                    getattr(child, "module", None) or child.names[0].name
                    for child in ast.walk(inner)
                    if isinstance(child, (ast.Import, ast.ImportFrom))
                ]
                if not names or any(name.split(".")[0] == "pipeline" for name in names):
                    yield f"{path.relative_to(root)}:{node.lineno} hides an import behind TYPE_CHECKING"


def spoken(root: Path, parts: frozenset[str] = ENGINE) -> Iterator[str]:
    """Yield every place where the engine prints, or touches the process's own streams."""
    for path in modules(root):
        if part_of(path, root) not in parts:
            continue
        for node in ast.walk(tree_of(path)):
            printing = isinstance(node, ast.Name) and node.id == "print"
            stream = isinstance(node, ast.Attribute) and node.attr in {"stdout", "stderr", "__stdout__", "__stderr__"}
            if printing or stream:
                yield f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)} speaks"
        for line, name in imported(path):
            if name in {"sys.stdout", "sys.stderr"} or name.split(".")[0] == "logging":
                yield f"{path.relative_to(root)}:{line} imports {name}"


def wall_clocks(root: Path) -> Iterator[str]:
    """Yield every reading of this host's wall clock in the engine: it jumps, and differs from the servers'."""
    for path in modules(root):
        if part_of(path, root) not in ENGINE:
            continue
        for node in ast.walk(tree_of(path)):
            if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
                continue
            if f"{node.value.id}.{node.attr}" in {"time.time", "datetime.now", "datetime.utcnow", "date.today"}:
                yield f"{path.relative_to(root)}:{node.lineno} reads the wall clock"


def begins_as_sql(text: object) -> bool:
    return isinstance(text, str) and SQL_BEGINNING.match(text) is not None


def made_sql(root: Path) -> Iterator[str]:
    """Yield every text that begins as SQL and is made by an f-string, ``%``, ``+`` or ``str.format``."""
    for path in modules(root):
        tree = tree_of(path)
        fixed = literals(tree)
        for node in ast.walk(tree):
            if any(begins_as_sql(text) for text in made_texts(node, fixed)):
                yield f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)} makes SQL from text"


def literals(tree: ast.Module) -> frozenset[str]:
    """Return the module's names in capitals that are bound once, to a literal: no input can come in by these."""
    return frozenset(
        target.id
        for statement in tree.body
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
        for target in statement.targets
        if isinstance(target, ast.Name) and target.id.isupper()
    )


def is_harmless(hole: ast.expr, fixed: frozenset[str]) -> bool:
    """Return whether a hole holds a literal of the module, or a name quoted for a line that a person will type."""
    if isinstance(hole, ast.Call):
        return getattr(hole.func, "attr", getattr(hole.func, "id", "")) == "quoted"
    return isinstance(hole, ast.Name) and hole.id in fixed


def made_texts(node: ast.AST, fixed: frozenset[str]) -> Iterator[object]:
    """Yield the beginning of a text that is put together at this node."""
    match node:
        case ast.JoinedStr(values=[ast.Constant(value=text), *rest]):
            if not all(is_harmless(part.value, fixed) for part in rest if isinstance(part, ast.FormattedValue)):
                yield text
        case ast.BinOp(left=ast.Constant(value=text), op=ast.Mod() | ast.Add()):
            yield text
        case ast.Call(func=ast.Attribute(value=ast.Constant(value=text), attr="format" | "format_map" | "join")):
            yield text


def too_long(root: Path) -> Iterator[str]:
    for path in modules(root):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES:
            yield f"{path.relative_to(root)} has {lines} lines"


@pytest.mark.parametrize("root", [PIPELINE, ALEMBIC], ids=lambda root: root.name)
@pytest.mark.parametrize("rule", [wrong_ways, through_walls, guarded_imports, made_sql, too_long])
def test_rule_is_kept(rule: Callable[[Path], Iterator[str]], root: Path) -> None:
    assert list(rule(root)) == []


def test_engine_never_speaks_for_itself() -> None:
    assert list(spoken(PIPELINE)) == []


def test_engine_decides_by_no_wall_clock() -> None:
    assert list(wall_clocks(PIPELINE)) == []


def test_alembic_folder_does_not_shadow_the_library() -> None:
    assert not (ALEMBIC / "__init__.py").exists()


def test_every_part_has_its_rule() -> None:
    parts = {part_of(path, PIPELINE) for path in modules(PIPELINE)} - {"__init__"}
    assert parts <= set(ALLOWED)


def test_layers_go_one_way() -> None:
    """No two parts may import each other, however far around."""
    seen: dict[str, bool] = {}

    def reach(part: str) -> None:
        assert seen.get(part, True), f"{part} imports itself, in the end"
        if part not in seen:
            seen[part] = False
            for other in ALLOWED[part] - {part}:
                reach(other)
            seen[part] = True

    for part in ALLOWED:
        reach(part)


def test_search_and_engine_stand_apart() -> None:
    assert not ALLOWED["search"] & ENGINE
    assert not any("search" in ALLOWED[part] for part in ENGINE)
    assert [part for part in ALLOWED if "demo" in ALLOWED[part]] == ["cli"]


PLANTED: dict[str, tuple[Callable[[Path], Iterator[str]], str, str]] = {
    "upwards": (wrong_ways, "postgres/tables.py", "from pipeline.check.verify import verify"),
    "upwards inside a function": (wrong_ways, "check/x.py", "def f():\n    from pipeline import move"),
    "the package's attribute": (wrong_ways, "ledger.py", "from pipeline import cli"),
    "search into the engine": (wrong_ways, "search/x.py", "import pipeline.postgres.database"),
    "engine into search": (wrong_ways, "move/x.py", "from pipeline.search.table import Vector"),
    "demo from the engine": (wrong_ways, "check/x.py", "from pipeline.demo import servers"),
    "unknown part": (wrong_ways, "helpers/x.py", "from pipeline.errors import PipelineError"),
    "click in the engine": (through_walls, "move/copy.py", "import click"),
    "rich in the settings": (through_walls, "settings.py", "from rich.table import Table"),
    "driver in search": (through_walls, "search/x.py", "def f():\n    import psycopg2.extras"),
    "tenacity elsewhere": (through_walls, "move/copy.py", "from tenacity import retry"),
    "hidden import": (
        guarded_imports,
        "move/x.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pipeline.move import copy",
    ),
    "print": (spoken, "check/x.py", "def f():\n    print('x')"),
    "stderr": (spoken, "move/x.py", "import sys\nsys.stderr.write('x')"),
    "stream by name": (spoken, "postgres/x.py", "from sys import stdout"),
    "f-string": (made_sql, "move/x.py", "def f(t):\n    return f'SELECT id FROM {t}'"),
    "f-string over a line": (made_sql, "move/x.py", "def f(t):\n    return f'''\n  Delete from {t}'''"),
    "percent": (made_sql, "move/x.py", "def f(t):\n    return 'DROP TABLE %s' % t"),
    "plus": (made_sql, "move/x.py", "def f(t):\n    return 'DROP TABLE ' + t"),
    "small letters": (made_sql, "move/x.py", "def f(t):\n    return f'select id from {t}'"),
    "format": (made_sql, "move/x.py", "def f(t):\n    return 'ALTER TABLE {}'.format(t)"),
    "a constant that is none": (made_sql, "move/x.py", "import os\nT = os.sep\nSQL = f'COPY {T} TO STDOUT'"),
    "wall clock": (wall_clocks, "ledger/x.py", "import time\nx = time.time()"),
    "length": (too_long, "move/x.py", "x = 1\n" * (MAX_LINES + 1)),
}


@pytest.mark.parametrize("case", PLANTED)
def test_checker_finds_what_is_planted(case: str, tmp_path: Path) -> None:
    rule, name, source = PLANTED[case]
    path = tmp_path / "pipeline" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    (found,) = rule(tmp_path / "pipeline")
    assert found.startswith(name)


INNOCENT = '''"""SELECT stands here as a word."""
from psycopg2 import sql
from pipeline.errors import PipelineError
N = 7
LOCK = f"SELECT lock({N})"
def query(t: str) -> sql.Composable:
    if not t:
        raise PipelineError(f"{t}: there is nothing to SELECT from", f"copy fills an empty {t}, update it by hand")
    return sql.SQL("SELECT id FROM {}").format(sql.Identifier(t)) + sql.SQL("LIMIT 1")
'''


@pytest.mark.parametrize("rule", [wrong_ways, through_walls, guarded_imports, spoken, wall_clocks, made_sql, too_long])
def test_checker_lets_the_innocent_be(rule: Callable[[Path], Iterator[str]], tmp_path: Path) -> None:
    (tmp_path / "pipeline" / "move").mkdir(parents=True)
    (tmp_path / "pipeline" / "move" / "x.py").write_text(INNOCENT)
    assert list(rule(tmp_path / "pipeline")) == []
