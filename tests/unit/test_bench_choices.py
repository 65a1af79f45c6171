"""What the benchmark is asked for: options read, and refused where they make no sense."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from tests.support import ROOT

Parse = Callable[..., Any]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module: ModuleType = importlib.import_module("choices")
    return lambda *arguments: module.parse("what it does", arguments)


def wanted(choices: Any) -> list[str]:
    """Return all that would take turns, scene by scene."""
    contenders = importlib.import_module("contenders")
    return [name for scene in choices.scenes for name in contenders.names(scene) if choices.wants(name)]


LOADS = ["raw-1", "raw-2", "raw-4", "copy-1", "copy-2", "copy-4", "dump", "pgcopydb", "pgloader"]


def test_usual_run_leaves_out_what_takes_minutes(parse: Parse) -> None:
    choices = parse()
    assert (choices.rows, choices.rounds) == (200_000, 3)
    assert wanted(choices) == [*LOADS, "verify"]
    assert not (choices.memory or choices.ledger or choices.resume or choices.changes or choices.proofs)


def test_quick_run_has_the_loop_and_the_index(parse: Parse) -> None:
    choices = parse("--quick")
    assert choices.rows == 20_000
    assert wanted(choices) == [*LOADS, "insert", "raw-2+index", "copy-2+index", "verify"]
    assert "copy-2+index" not in wanted(parse("--quick", "--no-index"))


def test_all_is_everything_in_every_scene(parse: Parse) -> None:
    choices = parse("--all")
    streams = LOADS[:6]
    near = [*LOADS, "insert", "raw-2+index", "copy-2+index", "verify"]
    assert wanted(choices) == near + [name + scene for scene in ("@0ms", "@20ms", "@cold") for name in streams]
    assert choices.memory
    assert choices.ledger
    assert choices.resume
    assert choices.changes
    assert choices.proofs
    assert "copy-2@5ms" in wanted(parse("--all", "--latency", "5"))


def test_only_takes_names_and_patterns(parse: Parse) -> None:
    assert wanted(parse("--only", "raw-*")) == ["raw-1", "raw-2", "raw-4", "raw-2+index"]
    assert wanted(parse("--only", "copy-2,insert")) == ["copy-2", "insert"]
    assert wanted(parse("--latency", "0,20", "--only", "*-2@*")) == [
        "raw-2@0ms",
        "copy-2@0ms",
        "raw-2@20ms",
        "copy-2@20ms",
    ]
    assert wanted(parse("--only", "", "--memory")) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rows", "0"), "'0' is not a whole number from 1 to 1000000"),
        (("--rounds", "101"), "'101' is not a whole number from 1 to 100"),
        (("--latency", "-1"), "'-1' is not a number from 0 to 10000"),
        (("--latency", "0,nan"), "'nan' is not a number from 0 to 10000"),
        (("--changes", "--rows", "9"), "argument --changes: wants at least 10 rows"),
        (("--proofs", "--rows", "9"), "argument --proofs: wants at least 10 rows"),
        (("--all", "--rows", "499"), "argument --ledger: wants at least 500 rows"),
        (("--only", "copy-3"), "argument --only: 'copy-3' is none of raw-1, raw-2,"),
        (("--only", "copy-2@20ms"), "argument --only: 'copy-2@20ms' is none of"),
        (("--json", "/nowhere/at/all.json"), "argument --json: there is no folder /nowhere/at"),
    ],
)
def test_what_cannot_be_done_is_refused(
    parse: Parse, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
