"""The benchmark's delay proxy, one direction of a connection, by a clock of the test's own."""

import importlib
import socket
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from tests.support import ROOT

DELAY_SECONDS = 0.01


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("delay")


@pytest.fixture
def line(module: ModuleType) -> Iterator[tuple[Any, socket.socket, socket.socket]]:
    """Yield a direction with the end that writes into it, and the one that reads from it."""
    near, source = socket.socketpair()
    sink, far = socket.socketpair()
    with near, source, sink, far:
        for end in (near, source, sink, far):
            end.setblocking(False)
        yield module.Line(source, sink, DELAY_SECONDS, open_at=5.0), near, far


def test_piece_is_due_after_the_delay_and_not_before_the_line_is_open(
    line: tuple[Any, socket.socket, socket.socket],
) -> None:
    direction, near, far = line
    assert direction.due is None
    near.sendall(b"one")
    direction.read(now=1.0)
    assert direction.due == 5.0 + DELAY_SECONDS
    direction.write()
    assert far.recv(10) == b"one"
    near.sendall(b"two")
    direction.read(now=7.0)
    assert direction.due == 7.0 + DELAY_SECONDS


def test_direction_holds_what_two_gigabytes_a_second_put_under_way(
    line: tuple[Any, socket.socket, socket.socket],
) -> None:
    direction, near, _ = line
    held = 0
    piece = bytes(64 * 1024)
    while direction.reads:
        held += near.send(piece)
        direction.read(now=0.0)
    assert held >= DELAY_SECONDS * 2e9
    # Without an end of its own, a slow reader would have it hold the whole table.
    assert held < DELAY_SECONDS * 2e9 + 5 * 2**20


def test_end_of_one_side_reaches_the_other_after_what_was_sent(line: tuple[Any, socket.socket, socket.socket]) -> None:
    direction, near, far = line
    near.sendall(b"last")
    direction.read(now=0.0)
    near.shutdown(socket.SHUT_WR)
    direction.read(now=0.0)
    assert not direction.reads
    direction.write()
    assert not direction.done
    direction.write()
    assert direction.done
    assert far.recv(10) == b"last"
    assert far.recv(10) == b""
