"""Fixtures of the tests of faults."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from pipeline.demo.servers import Server
from tests.cutovers import Cutover, new_cutover
from tests.data import become_generated
from tests.faults import DIMENSIONS, ROWS, TEXT_BYTES, Bench
from tests.support import Database
from tests.switches import Make


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


@pytest.fixture(scope="module")
def make(
    servers: Callable[[str], Server],
    legacy_template: str,
    main_template: Callable[[int], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Make]:
    """Return a function that makes two equal, verified tables; its arguments go to ``new_cutover``."""
    with ExitStack() as stack:

        def made(**more: Any) -> Cutover:
            folder = tmp_path_factory.mktemp("application")
            return stack.enter_context(new_cutover(servers, legacy_template, main_template, folder, **more))

        yield made


@pytest.fixture(scope="module")
def used(make: Make) -> Cutover:
    """Return a pair of them that the tests of a module share."""
    return make()
