"""The demo tells the whole story, leaves nothing behind unless asked, and what it leaves works by hand."""

import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest
from psycopg2.extensions import make_dsn

from pipeline.demo.servers import running_pid
from pipeline.envfile import read_env_file
from tests.support import clean_environment, pipeline, run, servers_folder, start


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Return a temporary directory of the test's own, open to the account that runs the servers."""
    folder = Path(tempfile.mkdtemp(prefix="pipeline-demo-test-", dir=servers_folder()))
    folder.chmod(0o711)
    yield folder
    pipeline("demo", "--stop", env=environment(folder))
    shutil.rmtree(folder, ignore_errors=True)


def environment(temporary: Path) -> dict[str, str]:
    # The operator's own settings must not reach the demo, nor the demo's servers be missed for them.
    return clean_environment() | {"TMPDIR": str(temporary), "COLUMNS": "100", "DB_HOST": "elsewhere.invalid"}


def postgres_processes(temporary: Path) -> list[str]:
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if str(temporary) in line and "postgres" in line]


def test_demo_moves_proves_searches_and_is_gone(temporary: Path) -> None:
    told = pipeline("demo", "--rows", "400", env=environment(temporary)).expect(0)
    assert "400 rows with 768 dimensions" in told.out
    assert "copied 400 rows" in told.out
    assert told.out.count(" pass ") == 8
    assert "Done in" in told.out
    assert list(temporary.iterdir()) == []
    assert postgres_processes(temporary) == []


def test_searches_of_the_repeated_corpus_make_sense_and_commands_work_by_hand(temporary: Path) -> None:
    # More rows than the corpus has passages: the whole of it, and some of it once more.
    told = pipeline("demo", "--rows", "7000", "--keep", env=environment(temporary)).expect(0)
    assert "copied 7,000 rows" in told.out
    answers = told.out.split("$ pipeline search ")
    assert "zipfile.ZipFile.extract" in answers[1].splitlines()[1]
    assert "threading.Thread.join" in answers[2].splitlines()[1]

    (folder,) = temporary.iterdir()
    assert (folder / ".env").stat().st_mode & 0o777 == 0o600
    kept = {name: value.text for name, value in read_env_file(folder / ".env").items()}
    by_hand = clean_environment() | kept | {"COLUMNS": "100"}
    assert "nothing to do" in pipeline("copy", "--from", "legacy", "--to", "main", env=by_hand).expect(0).out
    pipeline("verify", "--check", "rows", "--env-file", str(folder / ".env"), env=clean_environment()).expect(0)
    assert "done" in pipeline("status", env=by_hand).expect(0).out
    found = pipeline("search", "parse command line arguments", "--k", "2", env=by_hand).expect(0).out
    assert "argparse" in found
    run("alembic", "check", env=by_hand).expect(0)

    second = pipeline("demo", env=environment(temporary)).expect(4)
    assert "pipeline demo --stop" in second.err
    assert "gone" in pipeline("demo", "--stop", env=environment(temporary)).expect(0).out
    assert list(temporary.iterdir()) == []
    assert postgres_processes(temporary) == []
    assert "no demo" in pipeline("demo", "--stop", env=environment(temporary)).expect(0).out


def servers_run(folder: Path) -> bool:
    return running_pid(folder / "main") is not None


def legacy_is_filled(folder: Path) -> bool:
    return (folder / ".env").exists() and (folder / ".env").stat().st_size > 0


@pytest.mark.parametrize(
    ("number", "code", "reached"),
    [(signal.SIGINT, 130, servers_run), (signal.SIGTERM, 143, legacy_is_filled)],
)
def test_demo_that_is_stopped_cleans_up(
    number: signal.Signals, code: int, reached: Callable[[Path], bool], temporary: Path
) -> None:
    process = start("demo", env=environment(temporary))
    folder = temporary / f"pipeline-demo-{os.geteuid()}"
    deadline = time.monotonic() + 60
    while not reached(folder):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    rows = rows_of_legacy(folder) if reached is legacy_is_filled else None
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == code
    if rows is not None:
        # Without --rows it is the whole corpus.
        assert rows > 5000
        assert f"{rows:,} rows with 768 dimensions" in out
    assert list(temporary.iterdir()) == []
    assert postgres_processes(temporary) == []


def rows_of_legacy(folder: Path) -> int:
    kept = {name: value.text for name, value in read_env_file(folder / ".env").items()}
    dsn = make_dsn(
        host=kept["PGVECTOR_HOST"],
        port=kept["PGVECTOR_PORT"],
        user=kept["PGVECTOR_USER"],
        password=kept["PGVECTOR_PASSWORD"],
        dbname=kept["PGVECTOR_DB"],
    )
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM public.embeddings")
        (rows,) = cursor.fetchone() or (0,)
    return int(rows)


def test_files_that_vanish_while_the_demo_is_removed_do_not_matter(temporary: Path) -> None:
    folder = temporary / f"pipeline-demo-{os.geteuid()}"
    folder.mkdir()
    for number in range(5000):
        (folder / str(number)).touch()
    files = [Path(entry) for entry in os.scandir(folder)]

    def vanish() -> None:
        deadline = time.monotonic() + 30
        while files[0].exists() and time.monotonic() < deadline:
            pass
        for file in reversed(files):
            file.unlink(missing_ok=True)

    remover = threading.Thread(target=vanish)
    remover.start()
    stopped = pipeline("demo", "--stop", env=environment(temporary))
    remover.join()
    assert "gone" in stopped.expect(0).out
    assert list(temporary.iterdir()) == []
