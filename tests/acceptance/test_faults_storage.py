"""What happens to the files of servers: a full disk, a full log, a backup put in their place."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from pipeline.demo.servers import create_server, running_pid
from tests.acceptance.test_copy import finish, wait_until
from tests.clones import clone_of, enlarge, small_disk
from tests.conftest import FOLDER_PREFIX, SERVER_SETTINGS
from tests.data import content, fill_generated
from tests.faults import DIMENSIONS, TEXT_BYTES, Bench
from tests.support import CANARY, Database, environment, run

UPDATE_SOME = "UPDATE public.embeddings SET content = 'later' WHERE id > 'c0000000-0000-0000-0000-000000000000'"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder that a server's own account may come into; pytest's own are closed to it."""
    root = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-"))
    root.chmod(0o711)
    yield root
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def own(full: Bench, folder: Path) -> Iterator[Bench]:
    """Return a bench whose main is a server of its own."""
    server = create_server(folder / "main", "18", CANARY, SERVER_SETTINGS)
    main = Database(server=server, name="postgres")
    run("alembic", "upgrade", "head", env=environment(main=main, EMBEDDING_DIMENSIONS=str(DIMENSIONS))).expect(0)
    with ExitStack() as stack:
        yield Bench(full.legacy, main, stack)
    if running_pid(server.folder) is not None:
        server.stop("immediate")


@contextmanager
def on_small_disk(database: Database, folder: Path, size: str) -> Iterator[None]:
    """Put the table onto a disk of its own, so small that it does not fit."""
    with small_disk(folder, size, database.server.data):
        with closing(database.connect()) as connection:
            connection.autocommit = True
            connection.cursor().execute("CREATE TABLESPACE small LOCATION %s", (str(folder),))
        try:
            database.execute("ALTER TABLE public.embeddings SET TABLESPACE small")
            yield
        finally:
            with closing(database.connect()) as connection:
                connection.autocommit = True
                connection.cursor().execute("DROP TABLE public.embeddings")
                connection.cursor().execute("DROP TABLESPACE small")


def test_full_disk_stops_the_copy_and_a_larger_one_lets_it_go_on(full: Bench, folder: Path) -> None:
    with on_small_disk(full.main, folder / "disk", "3m"):
        ended = full.copy("--workers", "1", "--deadline", "30").expect(1)
        assert "error: main (" in ended.err
        assert "the disk is full" in ended.err
        assert "free space, then run the command again" in ended.err
        full.wait_for_quiet()
        full.check_books()
        marks = full.marks()
        enlarge(folder / "disk", "64m")
        full.copy().expect(0)
        assert marks <= full.marks()
        full.check_done()


def test_server_that_breaks_down_for_a_full_log_ends_the_copy_resumable(own: Bench, folder: Path) -> None:
    own.legacy.execute("DROP TABLE public.embeddings")
    fill_generated(own.legacy, 12_000, DIMENSIONS, 2 * TEXT_BYTES)
    server, disk = own.main.server, folder / "log"
    server.stop()
    with small_disk(disk, "40m", server.data):
        log = server.data / "pg_wal"
        _copy(log, disk / "pg_wal")
        shutil.rmtree(log)
        log.symlink_to(disk / "pg_wal")
        server.start()
        ended = own.copy("--deadline", "6", "--workers", "1").expect(5)
        assert "error: main (" in ended.err
        assert "then run the command again" in ended.err or "wait, and run the command again" in ended.err, ended.err
        # It may come back, and break down again; or it stays away.
        assert "No space left on device" in server.log.read_text()
        server.stop("immediate")
        enlarge(disk, "512m")
        server.start()
        own.check_books()
        marks = own.marks()
        assert marks, "not one slice was carried before the log was full"
        own.copy().expect(0)
        assert marks <= own.marks()
        own.check_done()
        server.stop("immediate")


def test_target_that_is_set_back_in_time_is_gone_on_with_from_there(own: Bench, folder: Path) -> None:
    server, backup = own.main.server, folder / "backup"
    process = own.begin_slowly("--workers", "1")
    process.send_signal(signal.SIGKILL)
    finish(process)
    own.wait_for_quiet()
    server.stop()
    _copy(server.data, backup)
    server.start()
    own.hurry()
    early = own.marks()
    own.copy().expect(0)
    own.check_done()
    # What changes now, the backup's ledger knows nothing of.
    own.legacy.execute("DELETE FROM public.embeddings WHERE id < '40000000-0000-0000-0000-000000000000'")
    own.legacy.execute(
        "UPDATE public.embeddings SET content = 'later' WHERE id > 'c0000000-0000-0000-0000-000000000000'"
    )
    server.stop("immediate")
    shutil.rmtree(server.data)
    _copy(backup, server.data)
    server.start()
    assert own.marks() == early
    done = own.copy().expect(0).json["copy"]
    assert done["moved_slices"] == done["slices"] - len(early)
    assert done["changed_rows"] > 0
    own.check_done()


def _copy(origin: Path, copy: Path) -> None:
    """Copy a folder with owners and modes."""
    subprocess.run(["cp", "-a", str(origin), str(copy)], check=True)


def test_copy_goes_on_from_a_standby_that_was_promoted(full: Bench, folder: Path) -> None:
    with clone_of(full.legacy, folder / "standby", follow=True) as standby, ExitStack() as stack:
        process = full.begin_slowly("--workers", "1")
        process.send_signal(signal.SIGKILL)
        finish(process)
        marks = full.marks()
        full.legacy.execute(UPDATE_SOME)
        position = full.legacy.value("SELECT pg_current_wal_lsn()")
        wait_until(lambda: standby.value("SELECT pg_last_wal_replay_lsn() >= %s", position))
        standby.value("SELECT pg_promote()")
        promoted = Bench(standby, full.main, stack)
        promoted.copy().expect(0)
        assert marks <= promoted.marks()
        promoted.check_done()
        assert content(full.main) == content(full.legacy)


def test_source_that_is_set_back_in_time_is_noticed(full: Bench, folder: Path) -> None:
    with clone_of(full.legacy, folder / "restored", follow=False) as restored, ExitStack() as stack:
        for _ in range(50):
            full.legacy.execute(UPDATE_SOME)
        process = full.begin_slowly("--workers", "1")
        process.send_signal(signal.SIGKILL)
        finish(process)
        ended = Bench(restored, full.main, stack).copy().expect(1)
        assert "the last pass was at" in ended.err
        assert "the server was restored or replaced" in ended.err
        assert full.main.rows("SELECT finished_at FROM pipeline.run") == [(None,)]
