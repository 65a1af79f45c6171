"""Distance between a contender and its servers: the delay proxy as a process, and what it passes by itself."""

import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from measure import BenchError

DELAY = Path(__file__).with_name("delay.py")
HOST = "127.0.0.1"
# Enough for a tenth of a second, and to fill whatever buffers there are.
PROBE_BYTES, PROBE_PIECE_BYTES = 128 * 1024 * 1024, 1024 * 1024
PROBES = 3
ENDING_SECONDS = 5.0


@contextmanager
def delayed(milliseconds: float, ports: Sequence[int]) -> Iterator[dict[int, int]]:
    """Yield, for each of the ports, the one behind which it is ``milliseconds`` of round trip away.

    The proxy ends with the block, and also where this process is killed. Raises BenchError where it
    does not start.
    """
    process = subprocess.Popen(
        (sys.executable, "-I", "-S", str(DELAY), str(milliseconds), *map(str, ports)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        told = process.stdout.readline()
        if not told:
            raise BenchError("the delay proxy did not start", "look at what it said above")
        yield dict(zip(ports, json.loads(told), strict=True))
    finally:
        process.terminate()
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def pass_rate(milliseconds: float) -> float:
    """Return what a proxy of its own passes on one connection, bytes a second, median of three."""
    with socket.create_server((HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
        with delayed(milliseconds, [port]) as ports:
            return statistics.median(_probe(listener, ports[port]) for _ in range(PROBES))


def _probe(listener: socket.socket, port: int) -> float:
    """Return bytes a second of one connection, from the first byte that arrives to the last."""
    with socket.create_connection((HOST, port)) as sending, listener.accept()[0] as receiving:
        sender = threading.Thread(target=_send, args=(sending,), daemon=True)
        sender.start()
        buffer = bytearray(PROBE_PIECE_BYTES)
        got = receiving.recv_into(buffer)
        started, first = time.monotonic(), got
        while count := receiving.recv_into(buffer):
            got += count
        seconds = time.monotonic() - started
        sender.join()
    if got != PROBE_BYTES:
        raise BenchError(f"the delay proxy passed {got:,} of {PROBE_BYTES:,} bytes")
    return (got - first) / seconds


def _send(connection: socket.socket) -> None:
    piece = bytes(PROBE_PIECE_BYTES)
    for _ in range(PROBE_BYTES // PROBE_PIECE_BYTES):
        connection.sendall(piece)
    connection.shutdown(socket.SHUT_WR)
