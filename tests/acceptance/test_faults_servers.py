"""What happens to servers during a copy: stopped, crashed, hung, full, replaying."""

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from psycopg2.extensions import make_dsn

from pipeline.demo.servers import Server, free_port
from tests.acceptance.test_copy import finish, wait_until
from tests.data import content
from tests.faults import SIDES, Bench, role
from tests.support import Database


@pytest.mark.parametrize("side", SIDES)
def test_fast_stop_in_the_middle_of_a_slice_is_survived(side: str, large: Bench) -> None:
    process, _ = large.begin_one_slice(side)
    large.databases[side].server.restart("fast")
    large.hurry()
    assert finish(process).expect(0).json["copy"]["retries"] >= 1
    large.check_done()


@pytest.mark.parametrize("side", SIDES)
def test_crash_of_one_backend_takes_all_sessions_and_no_row(side: str, large: Bench) -> None:
    process, backend = large.begin_one_slice(side)
    os.kill(backend, signal.SIGKILL)
    large.hurry()
    assert finish(process).expect(0).json["copy"]["retries"] >= 1
    large.check_done()


@pytest.mark.parametrize("side", SIDES)
def test_backend_that_hangs_is_given_up(side: str, large: Bench) -> None:
    process = large.begin_slowly("--stall", "2", "--workers", "1")
    hung = large.backends(side)
    assert hung
    for pid in hung:
        os.kill(pid, signal.SIGSTOP)
    try:
        # A new connection: the old one was given up.
        wait_until(lambda: bool(set(large.backends(side)) - set(hung)))
    finally:
        for pid in hung:
            os.kill(pid, signal.SIGCONT)
    large.hurry()
    done = finish(process).expect(0)
    assert re.search(rf"{side} .*: no byte moved for \d+ seconds", done.err), done.err
    large.check_done()


@contextmanager
def standby_of(primary: Database, folder: Path) -> Iterator[Database]:
    """Make a standby that cancels queries soon, from a base backup of the primary's server."""
    server = Server(folder=folder, release="16", port=free_port(), programs=primary.server.programs)
    folder.parent.chmod(0o711)
    folder.mkdir()
    owner = primary.server.data.stat()
    os.chown(folder, owner.st_uid, owner.st_gid)
    source = make_dsn(host=primary.server.host, port=primary.server.port, user=primary.user, password=primary.password)
    subprocess.run(
        [
            *(str(server.programs / "pg_basebackup"), "-d", source, "-D", str(server.data)),
            *("-R", "-c", "fast", "--no-sync", "-X", "stream"),
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
        yield Database(server=server, name=primary.name, password=primary.password)
    finally:
        server.stop("immediate")


def test_standby_that_cancels_the_copy_to_replay_is_asked_again(large: Bench) -> None:
    with (
        tempfile.TemporaryDirectory() as root,
        standby_of(large.legacy, Path(root) / "standby") as standby,
        ExitStack() as stack,
    ):
        replicated = Bench(standby, large.main, stack)
        process, _ = replicated.begin_one_slice("legacy")
        large.legacy.execute("DELETE FROM public.embeddings WHERE id < '80000000-0000-0000-0000-000000000000'")
        with closing(large.legacy.connect()) as connection:
            connection.autocommit = True
            connection.cursor().execute("VACUUM public.embeddings")
        conflicts = "SELECT confl_snapshot FROM pg_stat_database_conflicts WHERE datname = current_database()"
        wait_until(lambda: standby.value(conflicts) > 0)
        replicated.hurry()
        done = finish(process).expect(0)
        assert "the standby cancelled the statement" in done.err, done.err
        assert content(large.main) == content(large.legacy)
        replicated.wait_for_quiet()


def test_marked_slices_survive_a_crash_where_the_role_commits_asynchronously(full: Bench) -> None:
    with (
        role(full.main, "hasty", "SUPERUSER", "synchronous_commit = off") as main,
        ExitStack() as stack,
    ):
        hasty = Bench(full.legacy, main, stack)
        for proxy in hasty.proxies.values():
            proxy.rate = 4_000_000
        process = hasty.begin("--workers", "1")
        wait_until(lambda: len(full.marks()) >= 2)
        marks = full.marks()
        full.main.server.restart("immediate")
        assert marks <= full.marks()
        assert finish(process).code in (0, 5)
        hasty.copy().expect(0)
        assert marks <= full.marks()
        full.check_done()


@contextmanager
def small_disk(database: Database, folder: Path, size: str) -> Iterator[Path]:
    """Put the table onto a disk of its own, so small that it does not fit."""
    folder.parent.chmod(0o711)
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("a small disk takes the right to mount one")
    try:
        owner = database.server.data.stat()
        os.chown(folder, owner.st_uid, owner.st_gid)
        with closing(database.connect()) as connection:
            connection.autocommit = True
            connection.cursor().execute("CREATE TABLESPACE small LOCATION %s", (str(folder),))
        try:
            database.execute("ALTER TABLE public.embeddings SET TABLESPACE small")
            yield folder
        finally:
            with closing(database.connect()) as connection:
                connection.autocommit = True
                connection.cursor().execute("DROP TABLE public.embeddings")
                connection.cursor().execute("DROP TABLESPACE small")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_stops_the_copy_and_a_larger_one_lets_it_go_on(full: Bench) -> None:
    with (
        tempfile.TemporaryDirectory() as root,
        small_disk(full.main, Path(root) / "disk", "3m") as disk,
    ):
        ended = full.copy("--workers", "1", "--deadline", "30").expect(1)
        assert "error: main (" in ended.err
        assert "the disk is full" in ended.err
        assert "free space, then run the command again" in ended.err
        full.wait_for_quiet()
        full.check_books()
        marks = full.marks()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        full.copy().expect(0)
        assert marks <= full.marks()
        full.check_done()
