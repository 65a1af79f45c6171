"""What the tests share: databases on the embedded servers, and the pipeline as a real process."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extensions
from psycopg2 import sql

from pipeline.demo.servers import Server
from tests.zygote import can_fork, run_forked

ROOT = Path(__file__).parent.parent
# Every test's servers use it, so a leak anywhere is found by looking for this one word.
CANARY = "canary-pa$$w@rd/%41'\"\\ é"
MEMORY = Path("/dev/shm")
# Bytes that the servers of one process fill at most.
SERVERS_SPACE = 2 << 30


def servers_folder() -> Path:
    """Return memory where it is large enough and programs may run in it, else the temporary directory.

    A new database is a thousand files: ten times as fast there as on a disk with a journal.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if MEMORY.is_dir() and os.access(MEMORY, os.W_OK):
        disk = os.statvfs(MEMORY)
        if disk.f_bavail * disk.f_frsize > workers * SERVERS_SPACE and not disk.f_flag & os.ST_NOEXEC:
            return MEMORY
    return Path(tempfile.gettempdir())


@dataclass(frozen=True, kw_only=True)
class Database:
    """A database of one test on an embedded server."""

    server: Server
    name: str
    user: str = "postgres"
    password: str = CANARY

    def connect(self) -> psycopg2.extensions.connection:
        return psycopg2.connect(
            host=self.server.host,
            port=self.server.port,
            user=self.user,
            password=self.password,
            dbname=self.name,
        )

    @contextmanager
    def cursor(self) -> Iterator[psycopg2.extensions.cursor]:
        """Yield a cursor in one transaction, committed at the end."""
        with closing(self.connect()) as connection, connection, connection.cursor() as cursor:
            yield cursor

    def execute(self, statement: str | sql.Composable, *arguments: Any) -> None:
        with self.cursor() as cursor:
            cursor.execute(statement, arguments or None)

    def rows(self, query: str | sql.Composable, *arguments: Any) -> list[tuple[Any, ...]]:
        with self.cursor() as cursor:
            cursor.execute(query, arguments or None)
            return cursor.fetchall()

    def value(self, query: str | sql.Composable, *arguments: Any) -> Any:
        return self.rows(query, *arguments)[0][0]

    def as_role(self, user: str, password: str) -> "Database":
        return Database(server=self.server, name=self.name, user=user, password=password)

    def variables(self, prefix: str, database: str) -> dict[str, str]:
        return {
            f"{prefix}_HOST": self.server.host,
            f"{prefix}_PORT": str(self.server.port),
            f"{prefix}_USER": self.user,
            f"{prefix}_PASSWORD": self.password,
            database: self.name,
        }


def clean_environment() -> dict[str, str]:
    """Return this process's environment without anything that could reach a real server."""
    prefixes = ("PGVECTOR_", "DB_", "LEGACY_", "PG", "EMBEDDING_", "OLLAMA_", "USE_MOCK", "PIPELINE_FAIL")
    return {k: v for k, v in os.environ.items() if not k.startswith(prefixes)}


def environment(*, legacy: Database | None = None, main: Database | None = None, **more: str) -> dict[str, str]:
    """Return the environment of a pipeline process that reaches these databases."""
    variables = clean_environment()
    if main is not None:
        variables |= main.variables("DB", "DB_NAME")
    if legacy is not None:
        variables |= legacy.variables("PGVECTOR", "PGVECTOR_DB")
    return variables | {"COLUMNS": "100", **more}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished process left behind."""

    code: int
    out: str
    err: str
    arguments: tuple[str, ...] = field(default=())

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def expect(self, code: int) -> "Outcome":
        assert self.code == code, f"{self.arguments} ended with {self.code}\n{self.out}\n{self.err}"
        assert CANARY not in self.out + self.err
        assert "Traceback" not in self.err, self.err
        return self


def command_line(name: str, arguments: Sequence[str]) -> list[str]:
    """Return the argv of ``pipeline`` or ``alembic`` in this interpreter."""
    config = ["-c", str(ROOT / "alembic.ini")] if name == "alembic" else []
    return [sys.executable, "-m", name, *config, *arguments]


def run(name: str, *arguments: str, env: dict[str, str], cwd: Path | None = None, timeout: float = 120) -> Outcome:
    """Run ``pipeline`` or ``alembic`` as an operator would, to its end."""
    if can_fork(env):
        argv = command_line(name, arguments)[3:]
        with suppress(BlockingIOError):
            code, out, err = run_forked(name, argv, env, str(cwd or "/"), timeout)
            return Outcome(code=code, out=out, err=err, arguments=(name, *arguments))
    done = subprocess.run(
        command_line(name, arguments),
        env=env,
        cwd=cwd or "/",
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Outcome(code=done.returncode, out=done.stdout, err=done.stderr, arguments=(name, *arguments))


def pipeline(*arguments: str, env: dict[str, str], cwd: Path | None = None, timeout: float = 120) -> Outcome:
    return run("pipeline", *arguments, env=env, cwd=cwd, timeout=timeout)


def start(*arguments: str, env: dict[str, str]) -> "subprocess.Popen[str]":
    """Start ``pipeline`` and return the running process, for signals."""
    return subprocess.Popen(
        command_line("pipeline", arguments),
        env=env,
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
