"""Failpoints are read as they are written, and by nobody but a test."""

import pytest

from pipeline.errors import SettingsError
from pipeline.failpoints import NAMES, Armed, read_armed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("after_copy", ("after_copy", "kill", 0.0, 1)),
        ("after_copy@3", ("after_copy", "kill", 0.0, 3)),
        ("before_loaded:raise", ("before_loaded", "raise", 0.0, 1)),
        ("before_loaded:stop@2", ("before_loaded", "stop", 0.0, 2)),
        ("in_reconcile:sleep=0.5@12", ("in_reconcile", "sleep", 0.5, 12)),
    ],
)
def test_failpoint_is_read(text: str, expected: tuple[str, str, float, int]) -> None:
    name, action, seconds, passage = expected
    armed = read_armed({"PIPELINE_FAILPOINT": text, "PIPELINE_TESTING": "1"})
    assert armed == Armed(name=name, action=action, seconds=seconds, passage=passage)


@pytest.mark.parametrize(
    "text", ["nowhere", "after_copy:explode", "after_copy@0", "after_copy@", ":kill", "after copy"]
)
def test_unreadable_failpoint_is_refused_with_the_names(text: str) -> None:
    with pytest.raises(SettingsError) as raised:
        read_armed({"PIPELINE_FAILPOINT": text, "PIPELINE_TESTING": "1"})
    assert all(name in raised.value.hint for name in NAMES)


@pytest.mark.parametrize(
    "variables",
    [{}, {"PIPELINE_TESTING": "1"}, {"PIPELINE_FAILPOINT": "after_copy"}, {"PIPELINE_FAILPOINT": "nonsense"}],
)
def test_nothing_is_armed_outside_a_test(variables: dict[str, str]) -> None:
    assert read_armed(variables) is None
