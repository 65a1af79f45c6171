"""Two exact answers agree up to ties and rounding, and in nothing more."""

import pytest

from pipeline.check.neighbours import Neighbour, Query, disagreement

QUERY = Query(key="q", vector="[1]")


def answer(*found: tuple[str, float]) -> list[Neighbour]:
    return [Neighbour(key=key, distance=distance) for key, distance in found]


def test_equal_answers_agree() -> None:
    same = answer(("a", 0.0), ("b", 0.25))
    assert disagreement(QUERY, same, same) is None
    assert disagreement(QUERY, [], []) is None


def test_order_of_a_tie_is_no_difference() -> None:
    assert (
        disagreement(QUERY, answer(("a", 0.1), ("b", 0.2), ("c", 0.2)), answer(("a", 0.1), ("c", 0.2), ("b", 0.2)))
        is None
    )


def test_other_choice_among_a_tie_at_the_last_rank_is_no_difference() -> None:
    assert disagreement(QUERY, answer(("a", 0.1), ("b", 0.2)), answer(("a", 0.1), ("c", 0.2))) is None


def test_rounding_below_the_tolerance_is_no_difference() -> None:
    assert disagreement(QUERY, answer(("a", 0.1), ("b", 0.2)), answer(("a", 0.1 + 4e-7), ("b", 0.2 - 4e-7))) is None


@pytest.mark.parametrize(
    ("left", "right", "reason"),
    [
        ((("a", 0.1),), (("a", 0.1), ("b", 0.2)), "1 rows on one side, 2 on the other"),
        ((("a", 0.1), ("b", 0.2)), (("a", 0.1), ("b", 0.21)), "rank 2"),
        ((("a", 0.1), ("b", 0.2)), (("c", 0.1), ("b", 0.2)), "found on one side only"),
        ((("a", 0.1), ("b", 0.3)), (("b", 0.1), ("a", 0.3)), "another distance"),
    ],
)
def test_what_a_search_would_notice_is_a_difference(
    left: tuple[tuple[str, float], ...], right: tuple[tuple[str, float], ...], reason: str
) -> None:
    for one, other in ((left, right), (right, left)):
        found = disagreement(QUERY, answer(*one), answer(*other))
        assert found is not None
        assert found.query == "q"
    found = disagreement(QUERY, answer(*left), answer(*right))
    assert found is not None
    assert reason in found.reason


def test_tolerance_grows_with_distances_above_one() -> None:
    far = answer(("a", 0.0), ("b", 5_000.0))
    assert disagreement(QUERY, far, answer(("a", 0.0), ("b", 5_000.004))) is None
    found = disagreement(QUERY, far, answer(("a", 0.0), ("b", 5_000.006)))
    assert found is not None
    assert "rank 2" in found.reason
    # Inner product is negative.
    assert disagreement(QUERY, answer(("a", -90.0)), answer(("a", -90.00008))) is None
    assert disagreement(QUERY, answer(("a", -90.0)), answer(("a", -90.0001))) is not None


def test_infinite_distances_are_equal_to_themselves_and_to_nothing_else() -> None:
    endless = answer(("a", 0.0), ("b", float("inf")))
    assert disagreement(QUERY, endless, endless) is None
    for one, other in ((endless, answer(("a", 0.0), ("b", 3.0))), (answer(("a", 0.0), ("b", 3.0)), endless)):
        found = disagreement(QUERY, one, other)
        assert found is not None
        assert "rank 2" in found.reason
