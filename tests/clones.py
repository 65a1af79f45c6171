"""Servers of a test alone: a clone of another one, and a disk of a few megabytes."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from psycopg2.extensions import make_dsn

from pipeline.demo.servers import Server, free_port
from tests.support import Database


@contextmanager
def clone_of(origin: Database, folder: Path, *, follow: bool) -> Iterator[Database]:
    """Start a base backup of a server: as a standby that follows and cancels queries soon, or as it was then."""
    server = Server(folder=folder, release=origin.server.release, port=free_port(), programs=origin.server.programs)
    folder.parent.chmod(0o711)
    folder.mkdir()
    owner = origin.server.data.stat()
    os.chown(folder, owner.st_uid, owner.st_gid)
    source = make_dsn(host=origin.server.host, port=origin.server.port, user=origin.user, password=origin.password)
    subprocess.run(
        [
            *(str(server.programs / "pg_basebackup"), "-d", source, "-D", str(server.data)),
            *(["-R"] if follow else []),
            *("-c", "fast", "--no-sync", "-X", "stream"),
        ],
        user=owner.st_uid,
        check=True,
        cwd="/",
        timeout=60,
    )
    with (server.data / "postgresql.conf").open("a") as conf:
        conf.write("max_standby_streaming_delay = '200ms'\nwal_receiver_status_interval = '1s'\n")
    server.start()
    try:
        yield Database(server=server, name=origin.name, password=origin.password)
    finally:
        server.stop("immediate")


@contextmanager
def small_disk(folder: Path, size: str, owner: Path) -> Iterator[None]:
    """Mount a disk of that size on a new folder, which belongs to whom another one belongs to."""
    folder.parent.chmod(0o711)
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("a small disk takes the right to mount one")
    try:
        os.chown(folder, owner.stat().st_uid, owner.stat().st_gid)
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def enlarge(folder: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
