"""What the tests of single steps of a cutover share: a bench that is used again, and what is seen on either side."""

import os
import pty
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from pipeline.errors import EXIT_OK
from pipeline.postgres.failures import FENCE_STATE
from tests.cutovers import BACK, Cutover
from tests.fences import INSERT, objects
from tests.support import Database, Outcome, clean_environment, command_line

FAST = ("cutover", "--execute", "--yes", "--skip-backup", "--watch", "0")
# What is to be finalized: the last one, or before a rehearsal that went to its end the last that was none.
LAST = """SELECT outcome FROM pipeline.cutover WHERE kind = 'cutover'
    OR (outcome <> 'rehearsed' AND id = (SELECT max(id) FROM pipeline.cutover)) ORDER BY id DESC LIMIT 1"""
Make = Callable[..., Cutover]


@contextmanager
def taken_back(used: Cutover) -> Iterator[Cutover]:
    """Lend a bench; afterwards nothing is switched or under way on it, and both sides are equal."""
    text = used.env_file.read_bytes()
    yield used
    if used.main.value("SELECT count(*) FROM pipeline.cutover WHERE ended_at IS NULL"):
        used.pipeline(*BACK).expect(EXIT_OK)
    if used.main.rows(LAST) == [("rolled back",)]:
        used.pipeline("finalize", "--yes").expect(EXIT_OK)
    assert used.env_file.read_bytes() == text
    used.pipeline("sync").expect(EXIT_OK)


def write(database: Database, statement: str = INSERT) -> None:
    """Write as psql would."""
    database.execute(statement)


def refuses(database: Database, statement: str = INSERT) -> str:
    """Write as psql would; return what the fence says."""
    with pytest.raises(psycopg2.Error) as caught:
        write(database, statement)
    assert caught.value.pgcode == FENCE_STATE
    return str(caught.value.diag.message_primary)


def evidence(bench: Cutover, name: str) -> dict[str, Any]:
    """Return what was seen in a step, the last time."""
    found: dict[str, Any] = bench.main.value(
        "SELECT evidence FROM pipeline.step WHERE name = %s ORDER BY id DESC LIMIT 1", name
    )
    return found


def done_steps(bench: Cutover) -> tuple[str, ...]:
    """Return the steps that stand, of the cutover under way, as they were done."""
    return tuple(
        name
        for (name,) in bench.main.rows(
            "SELECT s.name FROM pipeline.step s JOIN pipeline.cutover c ON c.id = s.cutover_id WHERE c.ended_at IS NULL"
            " AND s.done_at IS NOT NULL AND s.undone_at IS NULL ORDER BY s.done_at"
        )
    )


def standing(bench: Cutover) -> list[Any]:
    """Return all that a cutover writes to but rows: both catalogs, its own books, and the files."""
    books = [bench.main.rows(f"SELECT t::text FROM pipeline.{name} t ORDER BY id") for name in ("cutover", "step")]
    files = {path.name: path.read_bytes() for path in bench.folder.iterdir() if path.is_file()}
    return [books, files, objects(bench.legacy), objects(bench.main)]


def started(bench: Cutover, *arguments: str, said_to: Path | None = None, **variables: str) -> "subprocess.Popen[str]":
    """Start ``pipeline`` in the folder, for signals and for what is done meanwhile; what it says can be read then.

    ``said_to`` is the file that takes stderr, for a test that waits for what is said.
    """
    with nullcontext(subprocess.PIPE) if said_to is None else said_to.open("w") as stderr:
        return subprocess.Popen(
            command_line("pipeline", arguments),
            env=clean_environment() | {"COLUMNS": "100"} | variables,
            cwd=bench.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )


def ended(process: "subprocess.Popen[str]", seconds: float = 60) -> Outcome:
    """Wait for the end of what was started."""
    out, err = process.communicate(timeout=seconds)
    return Outcome(code=process.returncode, out=out, err=err or "")


def answered(bench: Cutover, answer: str, *arguments: str) -> Outcome:
    """Run ``pipeline`` with a terminal as stdin, where somebody types a line."""
    controller, terminal = pty.openpty()
    try:
        os.write(controller, answer.encode() + b"\n")
        done = subprocess.run(
            command_line("pipeline", arguments),
            env=clean_environment() | {"COLUMNS": "100"},
            cwd=bench.folder,
            stdin=terminal,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(controller)
        os.close(terminal)
    return Outcome(code=done.returncode, out=done.stdout, err=done.stderr, arguments=arguments)


@contextmanager
def crowded(database: Database, free: int) -> Iterator[None]:
    """Leave so many sessions free on a server."""
    with ExitStack() as stack:
        first = stack.enter_context(closing(database.connect()))
        with first.cursor() as cursor:
            cursor.execute(
                "SELECT setting::int - (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend')"
                " FROM pg_settings WHERE name = 'max_connections'"
            )
            ((there,),) = cursor.fetchall()
        for _ in range(there - free):
            stack.enter_context(closing(database.connect()))
        yield


def copies(folder: Path) -> list[Path]:
    """Return the dated copies beside the files."""
    return sorted(folder.glob(".*.before-cutover-*"))
