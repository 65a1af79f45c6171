"""A role that does not own legacy's table: the owner is shown what to run, and waited for, not without end."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg2
import pytest

from pipeline.errors import EXIT_OK, EXIT_REFUSED
from tests.acceptance.test_copy import wait_until
from tests.cutovers import Cutover
from tests.faults import role
from tests.support import Outcome
from tests.switches import FAST, Make, done_steps, ended, evidence, refuses, standing, started, write

BACK = ("rollback", "--execute", "--yes")
RIGHTS = (
    "GRANT USAGE ON SCHEMA public TO mover",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON public.embeddings TO mover",
)


@pytest.fixture(scope="module")
def bench(make: Make) -> Iterator[Cutover]:
    """Return a bench whose settings name a role on legacy that may read and write the table, and does not own it."""
    made = make()
    with role(made.legacy, "mover", "") as mover:
        for statement in RIGHTS:
            made.legacy.execute(statement)
        text = made.env_file.read_text()
        for name, value in made.legacy.variables("PGVECTOR", "PGVECTOR_DB").items():
            new = mover.variables("PGVECTOR", "PGVECTOR_DB")[name]
            text = text.replace(f"{name}={value}\n", f"{name}={new}\n")
        made.env_file.write_text(text)
        made.pipeline("copy", "--restart").expect(EXIT_OK)
        made.verify()
        yield made


def script(said: str) -> str:
    """Return the SQL that was printed for the owner, as a person would copy it."""
    lines = said.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("BEGIN"))
    last = max(number for number, line in enumerate(lines) if line.startswith("COMMIT"))
    return "\n".join(lines[first : last + 1])


def printed(bench: Cutover, *command: str) -> Outcome:
    return bench.pipeline(*command, "--owner-wait", "0").expect(EXIT_REFUSED)


@contextmanager
def run_meanwhile(bench: Cutover, *command: str) -> Iterator[str]:
    """Start a command that needs the owner and yield the SQL that it prints; it waits while the block runs, then ends.

    What is done before the SQL is printed would be found by its first look, and nobody would be asked.
    """
    said = bench.folder / "said.txt"
    process = started(bench, *command, said_to=said)
    wait_until(lambda: "COMMIT" in said.read_text())
    yield script(said.read_text())
    ended(process).expect(EXIT_OK)


def test_owner_runs_what_is_printed_and_the_cutover_goes_on(bench: Cutover) -> None:
    said = printed(bench, *FAST)
    assert "legacy: the role may not close public.embeddings" in said.err
    assert "have its owner run this in psql" in said.err
    assert "it was waited for 0 s\nhint:  have the owner run the statements above, and run this again" in said.err
    assert "fence" not in done_steps(bench)
    write(bench.legacy)
    # As mover, who is told that he may not, it changes nothing.
    statements = script(said.err)
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        bench.legacy.as_role("mover", "a-password").execute(statements)
    before = standing(bench)[2]
    assert printed(bench, *FAST).code == EXIT_REFUSED
    assert standing(bench)[2] == before
    with run_meanwhile(bench, *FAST, "--until", "prove") as told:
        bench.legacy.execute(told)
    assert told == statements
    assert evidence(bench, "fence")["put"]["by"] == "owner"
    assert "has moved to" in refuses(bench.legacy)
    # What the owner did before the command is found, and nobody is asked again.
    bench.pipeline(*FAST, "--owner-wait", "0").expect(EXIT_OK)


def test_owner_opens_legacy_again_on_the_way_back(bench: Cutover) -> None:
    assert done_steps(bench)[-1] == "watch"
    bench.legacy.execute(f"GRANT CREATE ON DATABASE {bench.legacy.name} TO mover")
    write(bench.main, "INSERT INTO public.embeddings (content) VALUES ('on main')")
    said = printed(bench, *BACK)
    assert "back-open" not in done_steps(bench) and "back-switch" in done_steps(bench)
    assert "has moved to" in refuses(bench.legacy)
    assert bench.legacy.value("SELECT count(*) FROM public.embeddings WHERE content = 'on main'") == 1
    bench.legacy.execute(script(said.err))
    write(bench.legacy)
    bench.pipeline(*BACK, "--owner-wait", "0").expect(EXIT_OK)
    bench.pipeline("finalize", "--yes", "--owner-wait", "0").expect(EXIT_OK)
    assert bench.legacy.value("SELECT count(*) FROM pg_proc WHERE proname = 'pipeline_fence'") == 0
    assert bench.legacy.value("SELECT count(*) FROM pg_namespace WHERE nspname = 'pipeline'") == 0
