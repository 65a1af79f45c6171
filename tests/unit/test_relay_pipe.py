"""The pipe of the relay: bounded, in order, and never an early end that looks like a good one."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.move.relay import CHUNK_BYTES, PIPE_BYTES, Pipe


def drain(pipe: Pipe) -> bytes:
    parts = []
    while chunk := pipe.read(1):
        parts.append(chunk)
    return b"".join(parts)


@given(st.lists(st.integers(0, 3 * CHUNK_BYTES), max_size=40))
def test_bytes_come_out_as_they_went_in(sizes: list[int]) -> None:
    messages = [bytes([number % 256]) * size for number, size in enumerate(sizes)]
    seen: list[int] = []
    pipe = Pipe(seen.append)

    def send() -> None:
        for message in messages:
            pipe.write(message)
        pipe.end()

    sender = threading.Thread(target=send)
    sender.start()
    assert drain(pipe) == b"".join(messages)
    sender.join()
    assert pipe.messages == len(messages)
    assert pipe.bytes == sum(seen) == sum(sizes)


def test_writer_waits_while_the_pipe_is_full() -> None:
    pipe = Pipe(lambda size: None)
    written = 0

    def send() -> None:
        nonlocal written
        for _ in range(200):
            pipe.write(b"x" * CHUNK_BYTES)
            written += CHUNK_BYTES
        pipe.end()

    sender = threading.Thread(target=send)
    sender.start()
    sender.join(0.2)
    assert sender.is_alive()
    assert written <= PIPE_BYTES + CHUNK_BYTES
    assert len(drain(pipe)) == 200 * CHUNK_BYTES
    sender.join()


def test_row_larger_than_the_pipe_passes() -> None:
    pipe = Pipe(lambda size: None)
    row = b"r" * (2 * PIPE_BYTES)

    def send() -> None:
        pipe.write(row)
        pipe.end()

    sender = threading.Thread(target=send)
    sender.start()
    assert drain(pipe) == row
    sender.join()


def test_failed_source_is_an_error_for_the_reader_and_never_an_end() -> None:
    pipe = Pipe(lambda size: None)
    pipe.write(b"x" * CHUNK_BYTES)
    pipe.fail()
    with pytest.raises(RuntimeError, match="aborted"):
        pipe.read(1)


def test_failed_target_wakes_a_writer_that_waits() -> None:
    pipe = Pipe(lambda size: None)
    raised: list[BaseException] = []

    def send() -> None:
        try:
            while True:
                pipe.write(b"x" * CHUNK_BYTES)
        except RuntimeError as error:
            raised.append(error)

    sender = threading.Thread(target=send)
    sender.start()
    sender.join(0.1)
    pipe.fail()
    sender.join(2)
    # The text goes to a server's log: it must say nothing.
    assert [str(error) for error in raised] == ["aborted"]
