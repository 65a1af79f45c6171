"""The whole story on embedded servers: fill legacy, then the very commands that an operator types."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg2
from psycopg2 import sql

from pipeline.demo.corpus import Passage, corpus
from pipeline.demo.fill import fill_legacy
from pipeline.demo.hashing import HashingEmbedder
from pipeline.demo.ollama import model_name, running_pid
from pipeline.demo.servers import SUPERUSER, Server, create_server, kill_server
from pipeline.demo.servers import running_pid as server_pid
from pipeline.errors import PipelineError, RefusedError
from pipeline.settings import DEFAULT_DIMENSIONS, TableMapping

LEGACY_RELEASE, MAIN_RELEASE = "16", "18"
LEGACY_DATABASE, MAIN_DATABASE = "vectors", "app"
QUESTIONS = ("extract a zip archive", "wait until a thread has finished")
_STAND_IN_SECONDS = 20
# Memory for the load and the index, and nothing that an ordinary small server would not have.
_SERVER_SETTINGS = {"maintenance_work_mem": "256MB", "max_wal_size": "4GB", "checkpoint_timeout": "15min"}


class DemoError(PipelineError):
    """The demonstration cannot run, or one of its commands failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Words for the person who watches. ``heading`` begins a step."""

    text: str
    heading: bool = False


def demo_folder() -> Path:
    """Return the folder of this user's demo: one at a time, so that --stop finds it."""
    return Path(tempfile.gettempdir()) / f"pipeline-demo-{os.geteuid()}"


def tell(rows: int | None, keep: bool) -> Iterator[Line]:
    """Play the demo; yield what to show. The commands write to this process's own stdout and stderr.

    ``rows`` (default: the corpus as it is) takes fewer passages, or repeats them with perturbed
    vectors, up to a million. Without ``keep`` everything is stopped and removed at the end, also
    after a failure. Raises RefusedError where a demo is kept already, DemoError where a command fails.
    """
    folder = demo_folder()
    if folder.exists():
        if any(server_pid(folder / name) is not None for name in ("legacy", "main")):
            raise RefusedError(f"a demo is there already, in {folder}", "pipeline demo --stop")
        stop()
    started = time.monotonic()
    folder.mkdir(mode=0o711)
    kept = False
    try:
        yield from _play(folder, rows)
        kept = keep
        seconds = time.monotonic() - started
        if keep:
            yield from _farewell(folder, seconds)
        else:
            yield Line(text=f"Done in {seconds:.0f} s; servers and data are gone again.", heading=True)
            yield Line(text="pipeline demo --keep leaves them, for trying every command by hand.")
    finally:
        if not kept:
            stop()


def stop() -> bool:
    """End this user's demo and remove its folder; return whether there was one."""
    folder = demo_folder()
    if not folder.exists():
        return False
    if folder.stat().st_uid != os.geteuid():
        raise RefusedError(f"{folder} belongs to somebody else", "set TMPDIR to a folder of your own")
    for name in ("legacy", "main"):
        kill_server(folder / name)
    stand_in = running_pid(folder / "ollama.pid")
    if stand_in is not None:
        with suppress(ProcessLookupError):
            os.kill(stand_in, signal.SIGTERM)
    while folder.exists():
        # What ends at this moment removes files of its own, its pid file above all.
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)
    return True


def _play(folder: Path, rows: int | None) -> Iterator[Line]:
    yield Line(text="Two PostgreSQL servers, each with a password, on this machine only", heading=True)
    password = secrets.token_urlsafe(18)
    legacy = create_server(folder / "legacy", LEGACY_RELEASE, password, _SERVER_SETTINGS)
    main = create_server(folder / "main", MAIN_RELEASE, password, _SERVER_SETTINGS)
    for name, server, database in (("legacy", legacy, LEGACY_DATABASE), ("main", main, MAIN_DATABASE)):
        version = _create_database(server, password, database)
        yield Line(text=f"{name:<7} PostgreSQL {version} at {server.host}:{server.port}, database {database}")
    yield Line(text="The legacy table, as LangChain JS makes it", heading=True)
    yield Line(text="texts: the documentation inside Python's standard library, cut into passages")
    passages = corpus()
    embedder = HashingEmbedder(DEFAULT_DIMENSIONS)
    embedder.fit(passage.text for passage in passages)
    embedder.save(folder / "embedder.npz")
    yield _fill(legacy, password, rows, passages, embedder)
    port = _start_stand_in(folder)
    environment = _write_env_file(folder, legacy, main, password, port)
    for command in _commands():
        yield Line(text=f"$ {_shown(command)}", heading=True)
        _run(command, environment)


def _commands() -> Iterator[tuple[str, ...]]:
    yield ("alembic", "upgrade", "head")
    yield ("pipeline", "copy", "--from", "legacy", "--to", "main")
    yield ("pipeline", "verify")
    for question in QUESTIONS:
        yield ("pipeline", "search", question, "--k", "3")


def _shown(command: tuple[str, ...]) -> str:
    return " ".join(f'"{word}"' if " " in word else word for word in command)


def _create_database(server: Server, password: str, database: str) -> str:
    with closing(_connect(server, password, "postgres")) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
            cursor.execute("SHOW server_version")
            row = cursor.fetchone()
            assert row is not None
            return str(row[0])


def _connect(server: Server, password: str, database: str) -> psycopg2.extensions.connection:
    connection: psycopg2.extensions.connection = psycopg2.connect(
        host=server.host, port=server.port, user=SUPERUSER, password=password, dbname=database
    )
    return connection


def _fill(server: Server, password: str, rows: int | None, passages: list[Passage], embedder: HashingEmbedder) -> Line:
    started = time.monotonic()
    done = 0
    with closing(_connect(server, password, LEGACY_DATABASE)) as connection:
        filling = fill_legacy(connection, TableMapping(), rows=rows, passages=passages, embedder=embedder)
        for total in filling:
            done = total
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("VACUUM (ANALYZE) public.embeddings")
    return Line(text=f"{done:,} rows with {DEFAULT_DIMENSIONS} dimensions in {time.monotonic() - started:.1f} s")


def _start_stand_in(folder: Path) -> int:
    """Start the stand-in for Ollama in the background; return its port once it listens."""
    pid_file = folder / "ollama.pid"
    with (folder / "ollama.log").open("w") as log:
        child = subprocess.Popen(
            [
                *(sys.executable, "-m", "pipeline.demo.ollama"),
                *("--model", str(folder / "embedder.npz"), "--pid-file", str(pid_file)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + _STAND_IN_SECONDS
    while not pid_file.exists():
        if child.poll() is not None or time.monotonic() > deadline:
            raise DemoError("the stand-in for Ollama did not start", (folder / "ollama.log").read_text().strip())
        time.sleep(0.02)
    return int(pid_file.read_text().split()[1])


def _write_env_file(folder: Path, legacy: Server, main: Server, password: str, port: int) -> dict[str, str]:
    """Write the settings as an application would have them; return the environment that they make."""
    values: dict[str, str] = {}
    for prefix, database_variable, server, database in (
        ("DB", "DB_NAME", main, MAIN_DATABASE),
        ("PGVECTOR", "PGVECTOR_DB", legacy, LEGACY_DATABASE),
    ):
        values |= {
            f"{prefix}_HOST": server.host,
            f"{prefix}_PORT": str(server.port),
            f"{prefix}_USER": SUPERUSER,
            f"{prefix}_PASSWORD": password,
            database_variable: database,
        }
    values |= {
        "OLLAMA_BASE_URL": f"http://127.0.0.1:{port}",
        "OLLAMA_EMBEDDINGS_MODEL": model_name(DEFAULT_DIMENSIONS),
        "EMBEDDING_DIMENSIONS": str(DEFAULT_DIMENSIONS),
    }
    path = folder / ".env"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123
        file.writelines(f"{name}={value}\n" for name, value in values.items())
    ours = ("DB_", "PGVECTOR_", "LEGACY_", "OLLAMA_", "EMBEDDING_", "PG", "USE_MOCK_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | values


def _run(command: tuple[str, ...], environment: dict[str, str]) -> None:
    program, *arguments = command
    config = ["-c", str(_alembic_ini())] if program == "alembic" else []
    done = subprocess.run([sys.executable, "-m", program, *config, *arguments], env=environment, check=False)
    if done.returncode:
        raise DemoError(f"{_shown(command)} ended with exit code {done.returncode}", "its own message stands above")


def _alembic_ini() -> Path:
    for folder in (Path(__file__).parents[2], Path.cwd()):
        if (folder / "alembic.ini").is_file():
            return folder / "alembic.ini"
    raise DemoError("alembic.ini is not found", "run the demo from a checkout of the project")


def _farewell(folder: Path, seconds: float) -> Iterator[Line]:
    yield Line(text=f"Done in {seconds:.0f} s; the servers keep running. Try the commands by hand:", heading=True)
    # Not loaded into the shell: the environment would go before the file that the cutover edits.
    yield Line(text=f"cd {folder}")
    yield Line(text="pipeline status")
    yield Line(text="pipeline cutover")
    yield Line(text="")
    yield Line(text="pipeline demo --stop ends and removes everything.")
