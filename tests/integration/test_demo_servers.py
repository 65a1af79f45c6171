"""The embedded servers: a port that somebody takes between its choice and the start is no obstacle."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.demo import servers
from tests.conftest import FOLDER_PREFIX
from tests.support import CANARY


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder that the servers' account can pass through, beside those of the other tests."""
    made = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-ports-"))
    made.chmod(0o711)
    yield made
    servers.kill_server(made / "18")
    shutil.rmtree(made)


def test_server_takes_another_port_where_one_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        free = servers.free_port()
        ports = iter([taken, taken, free])
        monkeypatch.setattr(servers, "free_port", lambda: next(ports))
        server = servers.create_server(folder / "18", "18", CANARY)
    assert (server.port, server.pid is not None) == (free, True)
