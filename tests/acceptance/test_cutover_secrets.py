"""A whole cutover with its way back shows no password and no row: not in outputs, processes, ledgers or names."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pipeline.errors import EXIT_ERROR, EXIT_OK
from tests.acceptance.test_secrets import EMBEDDINGS, arguments_of_all_processes, hidden, ledger
from tests.cutovers import BACK, EXECUTE, Cutover
from tests.support import CANARY, Database, Outcome
from tests.switches import Make, copies, started


@pytest.fixture
def bench(make: Make) -> Cutover:
    def fill(legacy: Database) -> None:
        legacy.execute(EMBEDDINGS.partition("; ")[2])

    return make(dimensions=3, fill=fill)


@contextmanager
def watched_processes(found: list[str]) -> Iterator[None]:
    """Look at the arguments of all processes again and again; each line is in the list once."""
    stop, seen = threading.Event(), set[str]()

    def look() -> None:
        while not stop.wait(0.005):
            seen.update(arguments_of_all_processes().splitlines())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        found.extend(seen)


def test_cutover_and_its_way_back_show_no_secret(bench: Cutover) -> None:
    assert CANARY in bench.env_file.read_text()
    bench.env_file.chmod(0o640)
    told: list[Outcome] = []
    processes: list[str] = []

    def run(*arguments: str, code: int = EXIT_OK) -> None:
        told.append(bench.pipeline(*arguments).expect(code))

    with watched_processes(processes):
        run("cutover", "--after-switch", "true")
        run("cutover", "--rehearse", "--yes", "--skip-backup")
        # What was there is dumped once more, by a process whose arguments are seen.
        process = started(bench, *EXECUTE, "--min-free", "0", "--after-switch", "exit 1")
        out, err = process.communicate(timeout=60)
        told.append(Outcome(code=process.returncode, out=out, err=err).expect(EXIT_ERROR))
        run(*EXECUTE, "--after-switch", "true", "--json")
        run("status", "--json")
        run("rollback")
        run(*BACK, "--json")
        books = ledger(bench.legacy)
        run(*EXECUTE, "--skip-backup")
        run("finalize", "--yes", "--json")
    sampled = "\n".join(processes)
    assert "pg_dump" in sampled
    assert "back-sync" in ledger(bench.main)
    assert "run" in books
    for text in (sampled, books, ledger(bench.main), *(one.out + one.err for one in told)):
        hidden(text)
    hidden("\n".join(str(path) for path in bench.folder.rglob("*")))
    assert len(copies(bench.folder)) == 2
    assert {path.stat().st_mode & 0o777 for path in (bench.env_file, *copies(bench.folder))} == {0o640}
    assert {path.stat().st_mode & 0o777 for path in (bench.folder / "backups").iterdir()} == {0o600}


@pytest.mark.parametrize(
    "line", ["PGVECTOR_PASSWORD='canary-pa", "PGVECTOR_PASSWORD=canary-pa #b", "DB_PASSWORD canary-pa"]
)
def test_file_that_cannot_be_switched_is_not_quoted(bench: Cutover, line: str) -> None:
    text = bench.env_file.read_text()
    bench.env_file.write_text(f"{text}{line}\n")
    for command in (EXECUTE, ("cutover",), BACK, ("finalize", "--yes")):
        said = bench.pipeline(*command).expect(2)
        assert ".env" in said.err
        hidden(said.out + said.err)
