"""The benchmark's figures: ratios to the right base, limits beside them, and both as table and JSON."""

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from tests.support import ROOT

Modules = Callable[[str], ModuleType]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Modules:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def result(module: Modules, name: str, seconds: Sequence[float], against: Sequence[str] = (), peak: int = 1) -> Any:
    """Return a contender's result, of so many rounds as there are seconds."""
    turns = module("turns")
    contender = module("contenders").load(name, f"what {name} is", (), tuple(against))
    one = [turns.Turn(seconds=wall, cpu_seconds=wall, peak_bytes=peak, checkpoints=1) for wall in seconds]
    return turns.Result(contender=contender, turns=tuple(one), left=content(module), slices=3)


def content(module: Modules) -> Any:
    return module("content").Content(rows=200_000, digest="1")


def outcome(module: Modules, *sections: Any, **studies: Any) -> Any:
    """Return what a run found on a quiet machine."""
    data = module("outcome").Data(
        content=content(module), dimensions=768, stream_bytes=700_000_000, table_bytes=1_000_000_000
    )
    machine = {"cores": 2, "kernel": "6", "load_average_1_min": 0.1}
    found = {"data": data, "machine": machine, "rounds": 3, "missing_tools": ("pgloader",), "sections": sections}
    return module("outcome").Outcome(**found, **studies)


def section(module: Modules, *results: Any, **scene: Any) -> Any:
    return module("outcome").Section(scene=module("scenes").Scene(**scene), results=results, distance=None)


def near(module: Modules, copy_seconds: float = 5.0) -> Any:
    raw = ("raw-1", "raw-2", "raw-4")
    return section(
        module,
        result(module, "raw-1", [5.5, 5.0, 9.0], raw),
        result(module, "raw-2", [4.0, 6.0, 5.0], raw),
        result(module, "raw-4", [4.6, 4.6, 4.5], raw),
        result(module, "copy-2", [copy_seconds], raw, peak=90_000_000),
        result(module, "dump", [18.0], raw),
    )


def found_limits(module: Modules, *sections: Any, **studies: Any) -> dict[str, Any]:
    return {one.what: one for one in module("limits").limits(outcome(module, *sections, **studies))}


def test_result_is_held_against_the_least_median_of_those_it_names(module: Modules) -> None:
    raw_1, raw_2, raw_4, copy, dump = results = near(module).results
    assert [one.seconds for one in results] == [5.5, 5.0, 4.6, 5.0, 18.0]
    assert copy.base(results) is dump.base(results) is raw_4
    assert copy.base([raw_1, raw_2]) is raw_2
    assert copy.base([dump]) is None


def test_copy_and_dump_have_their_limits(module: Modules) -> None:
    found = found_limits(module, near(module))
    copy, dump = found["copy-2 to the best raw pipe, raw-4"], found["pg_dump | pg_restore to copy-2"]
    assert copy.found == pytest.approx(5.0 / 4.6)
    assert copy.is_kept
    assert dump.found == pytest.approx(3.6)
    assert dump.is_kept
    late = found_limits(module, near(module, copy_seconds=5.2))
    assert not late["copy-2 to the best raw pipe, raw-4"].is_kept
    assert not late["pg_dump | pg_restore to copy-2"].is_kept


def test_copy_at_a_distance_is_held_against_as_many_streams_there(module: Modules) -> None:
    far = section(
        module,
        result(module, "raw-1@20ms", [6.0]),
        result(module, "raw-2@20ms", [5.0]),
        result(module, "copy-1@20ms", [6.6]),
        result(module, "copy-2@20ms", [6.0]),
        latency_ms=20.0,
    )
    found = found_limits(module, near(module), far)
    assert found["copy-1@20ms to raw-1@20ms"].found == pytest.approx(1.1)
    assert found["copy-1@20ms to raw-1@20ms"].is_kept
    assert not found["copy-2@20ms to raw-2@20ms"].is_kept
    # The proxy alone is no distance.
    assert set(found_limits(module, replace(far, scene=module("scenes").Scene(latency_ms=0.0)))) == set()


def test_memory_counts_the_most_of_all_copies_and_tables(module: Modules) -> None:
    studies = module("studies")
    cases = tuple(
        studies.MemoryCase(what=what, rows=1, stream_bytes=1, peak_bytes=peak)
        for what, peak in (("a small table", 80_000_000), ("rows of 1 MB", 89_000_000))
    )
    found = found_limits(module, near(module), memory=cases)
    assert found["peak memory of any copy"].found == 90_000_000
    spread = found["peak memory, most to least of all tables"]
    assert spread.found == pytest.approx(89 / 80)
    assert not spread.is_kept


def test_studies_have_their_limits(module: Modules) -> None:
    studies = module("studies")
    found = found_limits(
        module,
        ledger=studies.LedgerCost(results=(), second_per_slice=0.001, share=0.019),
        resume=studies.ResumeCost(workers=2, slices=30, killed_in_slice=15, slice_rows=1000, repeated_rows=2001),
        changes=studies.PassCost(
            rows=200_000,
            changed_rows=1000,
            before_seconds=0.1,
            load_seconds=4.0,
            pass_seconds=0.3,
            quiet_pass_seconds=0.1,
            copy_seconds=5.0,
        ),
    )
    assert {what: one.is_kept for what, one in found.items()} == {
        "slices, commits and marks in a copy's time": True,
        "slices repeated after a kill, 2 workers": False,
        "checks and plan in a copy's time": True,
        "pass over 1,000 changed rows to the copy": True,
    }
    assert found["pass over 1,000 changed rows to the copy"].found == pytest.approx(0.06)


def test_proofs_have_their_limits(module: Modules) -> None:
    cost = module("proving").ProofCost(
        rows=200_000,
        few=200,
        many=20_000,
        copy_seconds=5.0,
        verify_seconds=3.0,
        deep_compare_seconds=2.5,
        sync_seconds=0.3,
        incremental_seconds=0.1,
        deep_sync_seconds=3.0,
        many_seconds=2.0,
        upsert_seconds=2.0,
        fence_seconds=0.6,
        rollback_seconds=1.5,
        peak_bytes=80_000_000,
        different_seconds=4.0,
    )
    found = found_limits(module, proofs=cost)
    assert {what: (one.found, one.is_kept) for what, one in found.items()} == {
        "verify of all rows to the copy": (pytest.approx(0.6), True),
        "sync of 200 changed rows to comparing all": (pytest.approx(0.12), False),
        "verify --incremental after it to comparing all": (pytest.approx(0.04), True),
        "sync --deep of 200 changed rows to comparing all": (pytest.approx(1.2), True),
        "fence held, 200 late changes": (0.6, True),
        "fence held, 200 late changes, to comparing all": (pytest.approx(0.24), False),
        "changed rows that a sync brings, of 20,000": (10_000, True),
        "peak memory of verify, every row different": (80_000_000, True),
    }


def test_report_and_document_say_the_same(module: Modules, capsys: pytest.CaptureFixture[str]) -> None:
    run = outcome(module, near(module, copy_seconds=5.2))
    module("report").print_report(run)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "copy-2 to the best raw pipe, raw-4 1.13 x at most 1.10 x beyond" in lines
    assert "copy-2 5.20 5.20 5.20 135 1.13 x raw-4 5.20 90.0 MB what copy-2 is" in lines
    assert "Not installed, so not in it: pgloader." in lines
    assert not any("Others were at work" in line for line in lines)
    written = json.loads(json.dumps(module("document").document(run)))
    assert written["limits"][0] == {
        "what": "copy-2 to the best raw pipe, raw-4",
        "unit": "ratio",
        "found": 5.2 / 4.6,
        "at_most": 1.10,
        "kept": False,
    }
    assert [one["ratio_to"] for one in written["scenes"][0]["contenders"]] == ["raw-4"] * 5
    assert written["data"]["rows"] == written["limits_stated_for"]["rows"]
    module("report").print_report(replace(run, machine=run.machine | {"load_average_1_min": 1.0}))
    assert "Others were at work on this machine" in capsys.readouterr().out


def test_rounds_begin_with_another_and_every_second_goes_backwards(module: Modules) -> None:
    in_turn = module("turns").in_turn
    assert ["".join(in_turn("abcd", number)) for number in range(4)] == ["abcd", "badc", "cdab", "dcba"]
    assert in_turn("", 1) == []
