"""What a cutover refuses before it writes anything: each reason in its words, with exit code 4, and all as it was."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import EXIT_BUSY, EXIT_OK, EXIT_REFUSED, EXIT_USAGE
from tests.cutovers import DIMENSIONS, EXECUTE, Cutover
from tests.data import content
from tests.faults import role
from tests.fences import objects
from tests.support import environment, pipeline
from tests.switches import crowded

ATTEMPT = (*EXECUTE, "--skip-backup")
LEDGER = "SELECT relname FROM pg_class WHERE relnamespace = 'pipeline'::regnamespace AND relkind = 'r' ORDER BY 1"
BOOKS = "SELECT row_to_json(c)::text FROM pipeline.cutover c UNION ALL SELECT row_to_json(s)::text FROM pipeline.step s"


def standing(bench: Cutover) -> tuple[Any, ...]:
    """Return all that a cutover writes to: rows, catalogs, files, and its own books."""
    files = {path.name: path.read_bytes() for path in sorted(bench.folder.iterdir()) if path.is_file()}
    return (
        *(objects(side) for side in (bench.legacy, bench.main)),
        *(content(side) for side in (bench.legacy, bench.main) if side.value(IS_TABLE)),
        bench.main.rows(BOOKS),
        files,
        sorted(path.name for path in bench.folder.iterdir()),
    )


IS_TABLE = "SELECT count(*) FROM pg_class WHERE oid = 'public.embeddings'::regclass AND relkind = 'r'"


def refused(bench: Cutover, *arguments: str, code: int = EXIT_REFUSED, **variables: Any) -> str:
    """Run a cutover that has to be refused, with nothing written; return what it says."""
    before = standing(bench)
    said = bench.pipeline(*arguments, **variables).expect(code)
    assert not said.out
    assert standing(bench) == before
    return said.err


# What is done to main or legacy, what undoes it, and what a cutover says of it.
STATES = {
    "never verified": (
        "main",
        "CREATE TABLE public.kept AS TABLE pipeline.verdict; DELETE FROM pipeline.verdict",
        "INSERT INTO pipeline.verdict OVERRIDING SYSTEM VALUE TABLE public.kept; DROP TABLE public.kept",
        "nothing is known yet of: counts, digests, census, parity, recall, plan",
    ),
    "no pass": (
        "main",
        "UPDATE pipeline.pass SET target_table = 'another'",
        "UPDATE pipeline.pass SET target_table = 'embeddings'",
        "no verify has found public.embeddings equal on both sides",
    ),
    "server set back": (
        "main",
        "UPDATE pipeline.pass SET source_horizon = source_horizon || '{\"timeline\": 99}'",
        "UPDATE pipeline.pass SET source_horizon = source_horizon || '{\"timeline\": 1}'",
        "a server was set back, or replaced, since the last verify",
    ),
    "verify failed": (
        "main",
        "UPDATE pipeline.verdict SET verdict = 'fail' WHERE check_name = 'recall'",
        "UPDATE pipeline.verdict SET verdict = 'pass' WHERE check_name = 'recall'",
        "the last verdict of recall is fail: ",
    ),
    "verify did not end": (
        "main",
        "UPDATE pipeline.verdict SET verdict = 'partial' WHERE check_name = 'parity'",
        "UPDATE pipeline.verdict SET verdict = 'pass' WHERE check_name = 'parity'",
        "the last verdict of parity is partial: ",
    ),
    "foreign row": (
        "main",
        "INSERT INTO public.embeddings (content) VALUES ('foreign')",
        "DELETE FROM public.embeddings WHERE content = 'foreign'",
        "1 row of main were written by somebody else",
    ),
    "unfinished copy": (
        "main",
        "UPDATE pipeline.run SET finished_at = NULL",
        "UPDATE pipeline.run SET finished_at = clock_timestamp()",
        "public.embeddings is not finished\nhint:  run: pipeline copy, to its end",
    ),
    "view": (
        "legacy",
        "ALTER TABLE public.embeddings RENAME TO stored; CREATE VIEW public.embeddings AS SELECT * FROM stored",
        "DROP VIEW public.embeddings; ALTER TABLE public.stored RENAME TO embeddings",
        "legacy's public.embeddings is a view: what is written to the tables below it cannot be refused there",
    ),
    "materialized view": (
        "legacy",
        "ALTER TABLE public.embeddings RENAME TO stored;"
        " CREATE MATERIALIZED VIEW public.embeddings AS SELECT * FROM stored;"
        " CREATE UNIQUE INDEX ON public.embeddings (id)",
        "DROP MATERIALIZED VIEW public.embeddings; ALTER TABLE public.stored RENAME TO embeddings",
        "legacy's public.embeddings is a materialized view",
    ),
    "somebody's trigger": (
        "legacy",
        "CREATE FUNCTION public.pipeline_fence() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
        " CREATE TRIGGER aaa_pipeline_fence BEFORE INSERT ON public.embeddings EXECUTE FUNCTION pipeline_fence()",
        "DROP FUNCTION public.pipeline_fence() CASCADE",
        "pipeline_fence",
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_state_that_is_not_ready_is_refused(used: Cutover, state: str) -> None:
    side, do, undo, message = STATES[state]
    database = used.main if side == "main" else used.legacy
    database.execute(do)
    try:
        assert message in refused(used, *ATTEMPT)
    finally:
        database.execute(undo)


def test_all_that_stands_in_the_way_is_told_at_once(used: Cutover) -> None:
    os.link(used.env_file, used.folder / "other")
    used.main.execute("UPDATE pipeline.verdict SET verdict = 'fail' WHERE check_name IN ('recall', 'census')")
    wrong = ("--pg-dump", "/nowhere/pg_dump")
    try:
        said = refused(used, *EXECUTE, *wrong)
        assert refused(used, "cutover", "--rehearse", "--yes", *wrong).splitlines()[1:] == said.splitlines()[1:]
    finally:
        (used.folder / "other").unlink()
        used.main.execute("UPDATE pipeline.verdict SET verdict = 'pass'")
    for fact in ("recall is fail", "census is fail", "has 2 names (hard links)", "no file /nowhere/pg_dump"):
        assert fact in said


def test_more_rows_than_may_differ_are_refused(used: Cutover) -> None:
    used.legacy.execute("UPDATE public.embeddings SET content = 'late' WHERE id IN (SELECT id FROM embeddings LIMIT 4)")
    said = refused(used, *ATTEMPT, "--max-lag", "3")
    assert "4 rows differ, written since the last sync; 3 may" in said
    assert "hint:  run: pipeline sync" in said
    used.pipeline("sync").expect(EXIT_OK)
    used.verify()


def test_settings_without_a_file_leave_nothing_to_switch(used: Cutover, tmp_path: Path) -> None:
    env = environment(legacy=used.legacy, main=used.main, EMBEDDING_DIMENSIONS=str(DIMENSIONS))
    before = standing(used)
    said = pipeline(*ATTEMPT, env=env, cwd=tmp_path).expect(EXIT_REFUSED)
    assert (
        "there is no .env file that the switch could be made in\nhint:  name the application's with --env-file"
        in said.err
    )
    assert standing(used) == before
    assert not list(tmp_path.iterdir())
    # The plan can be read all the same.
    assert "no .env file" in pipeline("cutover", env=env, cwd=tmp_path).expect(EXIT_OK).out


def test_file_and_environment_that_name_two_databases_are_refused(used: Cutover) -> None:
    text = used.env_file.read_text()
    elsewhere: Any
    for variable, name in (("DB_NAME", used.main.name), ("PGVECTOR_DB", used.legacy.name)):
        elsewhere = {variable: name}
        used.env_file.write_text(text.replace(f"{variable}=", f"{variable}=not_"))
        try:
            said = refused(used, *ATTEMPT, **elsewhere)
        finally:
            used.env_file.write_text(text)
        assert f"{variable} has one value in .env and another one in the environment" in said


def test_folder_that_cannot_be_written_is_refused(used: Cutover) -> None:
    made = subprocess.run(["chattr", "+i", used.folder], capture_output=True, check=False).returncode == 0
    if not made:
        pytest.skip("chattr does not work here")
    try:
        said = refused(used, *ATTEMPT)
    finally:
        subprocess.run(["chattr", "-i", used.folder], check=True)
    assert f"{used.folder} is protected (chattr +i or +a)\nhint:  chattr -ia {used.folder}" in said


def test_application_that_may_not_use_the_table_on_main_is_refused(used: Cutover) -> None:
    with role(used.main, "stranger", "") as stranger:
        said = refused(used, *ATTEMPT, "--app-role", "stranger")
        assert "the application on main: the role stranger" in said
        used.main.execute("GRANT SELECT ON public.embeddings TO stranger")
        assert "the application on main: the role stranger" in refused(used, *ATTEMPT, "--app-role", stranger.user)


def test_backup_without_room_or_client_is_refused(used: Cutover) -> None:
    said = refused(used, *EXECUTE, "--min-free", "1e9")
    assert "backups has " in said and "have to stay free" in said
    old = used.legacy.server.programs / "pg_dump"
    said = refused(used, *EXECUTE, "--pg-dump", str(old))
    assert "there is no pg_dump here that fits PostgreSQL 18; found: 16." in said
    assert not (used.folder / "backups").exists()


@pytest.mark.parametrize(("side", "sessions"), [("legacy", 5), ("main", 8)])
def test_server_without_enough_free_sessions_is_refused(used: Cutover, side: str, sessions: int) -> None:
    database = used.main if side == "main" else used.legacy
    before = standing(used)
    with crowded(database, sessions - 1):
        said = used.pipeline(*ATTEMPT).expect(EXIT_REFUSED).err
    assert f"{side}: a cutover takes {sessions} sessions at least, and the server has {sessions - 1} free" in said
    assert f"end sessions on {side}, or raise its max_connections" in said
    assert standing(used) == before


def test_second_command_is_kept_out_while_one_runs(used: Cutover) -> None:
    with used.main.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (pid,) = cursor.fetchone() or (0,)
        used.main.execute(
            "UPDATE pipeline.run SET lease_owner = 'another', lease_until = clock_timestamp() + interval '1 hour',"
            " lease_backend = %s",
            pid,
        )
        try:
            assert "another" in refused(used, *ATTEMPT, code=EXIT_BUSY)
        finally:
            used.main.execute("UPDATE pipeline.run SET lease_owner = NULL, lease_until = NULL, lease_backend = NULL")


@contextmanager
def under_way(bench: Cutover, until: str = "preflight") -> Iterator[None]:
    bench.pipeline(*ATTEMPT, "--until", until).expect(EXIT_OK)
    try:
        yield
    finally:
        bench.pipeline("rollback", "--execute", "--yes").expect(EXIT_OK)
        bench.pipeline("finalize", "--yes").expect(EXIT_OK)


def test_cutover_of_other_databases_is_not_gone_on_with(used: Cutover) -> None:
    with under_way(used):
        (label,) = used.main.rows("SELECT target_label FROM pipeline.cutover WHERE ended_at IS NULL")[0]
        used.main.execute("UPDATE pipeline.cutover SET target_label = 'x@elsewhere:5432/y' WHERE ended_at IS NULL")
        for command in (ATTEMPT, ("cutover",), ("rollback", "--execute", "--yes"), ("finalize", "--yes")):
            said = used.pipeline(*command).expect(EXIT_REFUSED)
            assert "x@elsewhere:5432/y; the settings name " in said.err
        used.main.execute("UPDATE pipeline.cutover SET target_label = %s WHERE ended_at IS NULL", label)


def test_rehearsal_waits_for_the_end_of_a_cutover(used: Cutover) -> None:
    with under_way(used):
        for more in ((), ("--scratch",)):
            said = used.pipeline("cutover", "--rehearse", *more, "--yes", "--skip-backup").expect(EXIT_REFUSED)
            assert "has not ended" in said.err and "pipeline rollback --execute" in said.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("cutover", "--execute", "--rehearse", "--yes"),
        ("cutover", "--rehearse", "--until", "fence", "--yes"),
        ("cutover", "--execute", "--scratch", "--yes"),
        ("cutover", "--until", "nothing"),
        ("cutover", "--execute", "--skip-backup"),
        ("cutover", "--rehearse", "--skip-backup"),
        ("finalize",),
    ],
    ids=" ".join,
)
def test_command_that_says_two_things_or_nobody_can_answer_is_a_usage_error(
    used: Cutover, arguments: tuple[str, ...]
) -> None:
    before = standing(used)
    used.pipeline(*arguments).expect(EXIT_USAGE)
    assert standing(used) == before


def test_nothing_under_way_is_nothing_to_go_back_from_or_to_end(used: Cutover) -> None:
    used.main.execute("DELETE FROM pipeline.cutover")
    before = standing(used)
    for command in (("rollback", "--execute", "--yes"), ("finalize", "--yes")):
        said = used.pipeline(*command).expect(EXIT_REFUSED)
        assert said.err.startswith("error: ")
    assert "nothing is under way" in used.pipeline("rollback").expect(EXIT_OK).out
    assert standing(used) == before
