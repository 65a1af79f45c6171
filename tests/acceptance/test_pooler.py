"""A real PgBouncer in transaction mode before both servers: every transaction may get another backend."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from pipeline.demo.servers import UNPRIVILEGED_ACCOUNT, Server, free_port
from tests.acceptance.test_copy import finish, wait_until
from tests.data import content
from tests.faults import Bench
from tests.support import CANARY, pipeline, start

PACKAGES = ("pgbouncer", "libevent-2.1-7", "libc-ares2")
CONFIGURATION = """
[databases]
* = host={host} port={server_port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {folder}/users
pool_mode = transaction
default_pool_size = 20
server_idle_timeout = 60
"""


@pytest.fixture(scope="session")
def pgbouncer() -> Iterator[Path]:
    """Return a folder with an unpacked PgBouncer, of the distribution's packages; nothing is installed."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        pytest.skip("PgBouncer is taken from the distribution's packages, by apt-get and dpkg")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "embeddings-pipeline" / "pgbouncer"
    cache.mkdir(parents=True, exist_ok=True)
    if len(list(cache.glob("*.deb"))) < len(PACKAGES):
        done = subprocess.run(
            ["apt-get", "download", *PACKAGES], cwd=cache, capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode:
            pytest.skip(f"apt-get has no PgBouncer to download: {done.stderr.strip().splitlines()[-1:]}")
    # Outside the cache: PgBouncer does not run as root, and another account sees nothing of root's folders.
    with tempfile.TemporaryDirectory(prefix="pipeline-pgbouncer-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        for package in cache.glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(package), str(folder)], check=True)
        yield folder


@contextmanager
def pooled(programs: Path, server: Server) -> Iterator[int]:
    """Run a PgBouncer before a server; yield its port."""
    port = free_port()
    libraries = {str(library.parent) for library in programs.rglob("lib*.so*")}
    with tempfile.TemporaryDirectory(prefix="pipeline-pgbouncer-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        settings = CONFIGURATION.format(host=server.host, server_port=server.port, port=port, folder=folder)
        (folder / "ini").write_text(settings)
        quoted = CANARY.replace('"', '""')
        (folder / "users").write_text(f'"postgres" "{quoted}"\n')
        as_root = os.geteuid() == 0
        process = subprocess.Popen(
            [str(programs / "usr" / "sbin" / "pgbouncer"), "-q", str(folder / "ini")],
            env={"LD_LIBRARY_PATH": ":".join(libraries)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            user=pwd.getpwnam(UNPRIVILEGED_ACCOUNT).pw_uid if as_root else None,
        )
        try:
            wait_until(lambda: _listens(port) or process.poll() is not None)
            assert process.poll() is None, "PgBouncer did not start"
            yield port
        finally:
            process.kill()
            process.wait(10)


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@pytest.fixture
def through(full: Bench, pgbouncer: Path) -> Iterator[dict[str, str]]:
    """Return the environment of a pipeline that reaches both servers through poolers alone."""
    with ExitStack() as stack:
        legacy, main = (
            stack.enter_context(pooled(pgbouncer, database.server)) for database in (full.legacy, full.main)
        )
        yield full.env(PGVECTOR_HOST="127.0.0.1", PGVECTOR_PORT=str(legacy), DB_HOST="127.0.0.1", DB_PORT=str(main))


def check_rows(full: Bench) -> None:
    full.check_books()
    assert content(full.main) == content(full.legacy)


def test_whole_move_goes_through_poolers(full: Bench, through: dict[str, str]) -> None:
    found = pipeline("preflight", "--json", env=through).expect(0).json["preflight"]
    assert found["source"]["pooled"] is found["target"]["pooled"] is True
    done = pipeline("copy", "--slice-size", "1", "--json", env=through).expect(0).json["copy"]
    assert done["settled"] is True
    check_rows(full)
    assert pipeline("verify", "--check", "rows", "--json", env=through).expect(0).json["verdict"] == "pass"
    (run,) = pipeline("status", "--json", env=through).expect(0).json["runs"]
    assert run["phase"] == "done"


def test_proofs_and_sync_go_through_poolers(full: Bench, through: dict[str, str]) -> None:
    pipeline("baseline", "capture", env=through).expect(0)
    pipeline("copy", env=through).expect(0)
    pipeline("verify", "--check", "rows", env=through).expect(0)
    full.legacy.execute(
        "UPDATE public.embeddings SET content = 'new' WHERE id = md5('row1')::uuid;"
        "DELETE FROM public.embeddings WHERE id = md5('row2')::uuid"
    )
    assert len(pipeline("diff", env=through).expect(3).out.splitlines()) == 2
    done = pipeline("sync", "--json", env=through).expect(0).json["sync"]
    assert (done["deep"], done["updated"], done["deleted"], done["equal"]) == (False, 1, 1, True)
    assert content(full.main) == content(full.legacy)
    pipeline("verify", "--incremental", env=through).expect(0)
    assert pipeline("sync", "--deep", "--json", env=through).expect(0).json["sync"]["equal"]
    found = pipeline("verify", "--json", env=through).expect(0).json
    assert [check["verdict"] for check in found["checks"]] == ["pass"] * len(found["checks"])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_copy_through_poolers_goes_on_where_it_was_ended(
    number: signal.Signals, full: Bench, through: dict[str, str], start_through: Callable[..., "subprocess.Popen[str]"]
) -> None:
    process = start_through("--max-rate", "1")
    wait_until(lambda: bool(full.marks()))
    process.send_signal(number)
    assert finish(process).code == (143 if number == signal.SIGTERM else -number)
    full.check_books()
    marks = full.marks()
    if number == signal.SIGKILL:
        # A pooler's sessions can outlive the copier: then nothing but time tells that it is gone.
        full.main.execute("UPDATE pipeline.run SET lease_until = clock_timestamp() - interval '1 second'")
    finish(start_through()).expect(0)
    assert marks <= full.marks(), "a finished slice was done again"
    check_rows(full)


def test_second_copy_through_a_pooler_is_turned_away(
    full: Bench, start_through: Callable[..., "subprocess.Popen[str]"]
) -> None:
    first = start_through("--max-rate", "0.3")
    wait_until(lambda: bool(full.marks()))
    assert f"pid {first.pid}" in finish(start_through()).expect(6).err
    finish(first).expect(0)
    check_rows(full)


@pytest.fixture
def start_through(through: dict[str, str]) -> Callable[..., "subprocess.Popen[str]"]:
    """Return a function that starts a copy through the poolers."""

    def begin(*more: str) -> "subprocess.Popen[str]":
        return start("copy", "--slice-size", "1", *more, env=through)

    return begin
