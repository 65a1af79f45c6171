"""Fixtures of the tests of faults."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.data import become_generated
from tests.faults import DIMENSIONS, ROWS, TEXT_BYTES, Bench
from tests.support import Database


@pytest.fixture
def bench(
    legacy: Database, new_database: Callable[..., Database], main_template: Callable[[int], str]
) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(legacy, new_database("18", main_template(DIMENSIONS)), stack)


@pytest.fixture
def full(bench: Bench) -> Bench:
    become_generated(bench.legacy, ROWS, DIMENSIONS, TEXT_BYTES)
    return bench


@pytest.fixture
def large(bench: Bench) -> Bench:
    """Return a bench whose table does not fit into the buffers on the way."""
    become_generated(bench.legacy, 3 * ROWS, DIMENSIONS, 2 * TEXT_BYTES)
    return bench
