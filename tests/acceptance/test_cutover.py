"""A whole cutover as an operator runs it: the plan, every step with its evidence, and what goes wrong on the way."""

import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import EXIT_OK, EXIT_REFUSED
from pipeline.options import STEPS
from tests.cutovers import BACK, EXECUTE, Cutover, points_to
from tests.data import content
from tests.support import CANARY, Database, Outcome, clean_environment
from tests.switches import FAST, Make, copies, done_steps, evidence, refuses, standing, taken_back, write

LEDGER = "SELECT relname FROM pg_class WHERE relnamespace = 'pipeline'::regnamespace AND relkind = 'r' ORDER BY 1"
Switched = tuple[Cutover, str, Outcome]


@pytest.fixture
def bench(used: Cutover) -> Iterator[Cutover]:
    with taken_back(used):
        yield used


@pytest.fixture(scope="module")
def switched(make: Make) -> Switched:
    """Return a bench after a whole cutover with a backup, its file's text before, and what was said."""
    bench = make()
    text = bench.env_file.read_text()
    bench.legacy.execute(
        "INSERT INTO public.embeddings (content) VALUES ('late');"
        " DELETE FROM embeddings WHERE id = (SELECT min(id::text)::uuid FROM embeddings WHERE content <> 'late')"
    )
    told = ("--after-switch", "echo told; echo again", "--after-switch", "pwd >told")
    done = bench.pipeline(*EXECUTE, *told, "--min-free", "0", "--json").expect(EXIT_OK)
    return bench, text, done


def test_plan_names_what_it_would_touch_and_writes_nothing(bench: Cutover) -> None:
    def everything() -> list[Any]:
        ledger = [
            bench.main.rows(f"SELECT t::text FROM pipeline.{name} t ORDER BY 1") for (name,) in bench.main.rows(LEDGER)
        ]
        return [ledger, standing(bench), content(bench.legacy), content(bench.main)]

    before = everything()
    plan = bench.pipeline("cutover", "--after-switch", "systemctl restart app").expect(EXIT_OK)
    assert [line.split(":")[0] for line in plan.out.splitlines() if line[:1].isdigit()] == [
        f"{number}. {name}" for number, name in enumerate(STEPS, 1)
    ]
    for part in ("nothing is done without --execute", ".env", "systemctl restart app", "backups/", "not known yet"):
        assert part in plan.out
    assert plan.out.splitlines()[-1] == "next: pipeline cutover --execute"
    found = bench.pipeline("cutover", "--json").expect(EXIT_OK).json["plan"]
    assert [step["name"] for step in found["steps"]] == list(STEPS)
    assert (found["cutover"], found["done"]) == (None, [])
    back = bench.pipeline("rollback", "--json").expect(EXIT_OK).json["plan"]
    assert (back["kind"], back["cutover"]) == ("rollback", None)
    assert everything() == before


def test_every_step_is_done_in_order_and_has_its_evidence(switched: Switched) -> None:
    bench, _, done = switched
    assert done_steps(bench) == STEPS
    said = done.json["cutover"]
    assert (said["kind"], said["outcome"], said["next_step"]) == ("cutover", "switched", None)
    assert [name for name, *_ in said["steps"]] == list(STEPS)
    assert 0 < said["fence_seconds"] < 60
    assert evidence(bench, "preflight")["lag_rows"] == 2
    assert evidence(bench, "catchup")["sync"] | {"seconds": 0} == evidence(bench, "catchup")["sync"] | {
        "seconds": 0,
        "inserted": 1,
        "updated": 0,
        "deleted": 1,
    }
    proof = evidence(bench, "fence")["proof"]
    assert proof["probes_refused"] >= 3
    assert evidence(bench, "prove")["verdict"] == "pass"
    assert len(evidence(bench, "switch")["command_seconds"]) == 2
    assert (evidence(bench, "smoke")["queries"], evidence(bench, "watch")["verdict"]) == (5, "pass")
    times = bench.main.rows("SELECT intent_at <= done_at FROM pipeline.step")
    assert all(right for (right,) in times)
    assert content(bench.main) == content(bench.legacy)


def test_file_is_switched_and_its_copy_is_as_it_was(switched: Switched) -> None:
    bench, text, _ = switched
    old, new = (side.variables("PGVECTOR", "PGVECTOR_DB") for side in (bench.legacy, bench.main))
    for name, value in old.items():
        text = text.replace(f"{name}={value}\n", f"{name}={new[name]}\nLEGACY{name[8:]}={value}\n")
    assert bench.env_file.read_text() == text.replace("EMBEDDINGS=true  #", "EMBEDDINGS=false  #")
    (copy,) = copies(bench.folder)
    assert copy.read_text() == switched[1]
    assert {path.stat().st_mode & 0o777 for path in (copy, bench.env_file)} == {0o600}
    assert points_to(bench) == "main"
    assert (bench.folder / "told").read_text() == f"{bench.folder}\n"


def test_output_of_the_commands_is_no_part_of_our_own(switched: Switched) -> None:
    _, _, done = switched
    assert "told\nagain\n" in done.err
    assert done.out.startswith("{") and "told" not in done.out


def test_legacy_says_where_the_table_went_and_main_is_open(switched: Switched) -> None:
    bench, *_ = switched
    there = f"{bench.main.server.host}:{bench.main.server.port}/{bench.main.name}"
    assert refuses(bench.legacy) == f"public.embeddings has moved to {there}: this one takes no more writes"
    for statement in ("TRUNCATE embeddings", "SET session_replication_role = replica; DELETE FROM embeddings"):
        assert "has moved to" in refuses(bench.legacy, statement)
    rows = bench.main.value("SELECT count(*) FROM embeddings")
    write(bench.main)
    write(bench.main, "DELETE FROM public.embeddings WHERE content = 'new'")
    assert bench.main.value("SELECT count(*) FROM embeddings") == rows


def test_commands_that_would_write_main_from_legacy_are_refused(switched: Switched) -> None:
    bench, *_ = switched
    for command in (("sync",), ("sync", "--deep")):
        said = bench.pipeline(*command).expect(EXIT_REFUSED)
        assert "legacy's public.embeddings is closed: public.embeddings has moved to" in said.err
        assert "pipeline rollback takes new writes back; pipeline diff only looks" in said.err
    assert "nothing differs" in bench.pipeline("diff").expect(EXIT_OK).err
    assert "nothing to do" in bench.pipeline("copy").expect(EXIT_OK).out


def test_dumps_are_listed_summed_up_and_can_be_restored(
    switched: Switched, empty_main: Database, legacy: Database
) -> None:
    bench, *_ = switched
    folder = bench.folder / "backups"
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True, check=True)
    assert checked.stdout.count(": OK\n") == 2
    dumps = evidence(bench, "backup")["dumps"]
    assert {Path(dump["path"]).name for dump in dumps} | {"SHA256SUMS"} == {path.name for path in folder.iterdir()}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    empty_main.execute("CREATE EXTENSION vector")
    for dump, there in zip(dumps, (legacy, empty_main), strict=True):
        command = [part.replace("DATABASE", there.name) for part in shlex.split(dump["restored_by"])]
        address = {"PGHOST": there.server.host, "PGPORT": str(there.server.port), "PGUSER": there.user}
        subprocess.run(command, env=clean_environment() | address | {"PGPASSWORD": CANARY}, check=True)
        assert there.value("SELECT count(*) FROM embeddings") == dump["rows"]


def test_second_cutover_says_that_it_is_done_and_changes_nothing(switched: Switched) -> None:
    bench, *_ = switched
    before = standing(bench)
    again = bench.pipeline(*EXECUTE, "--after-switch", "exit 9").expect(EXIT_OK)
    assert "switched: the application's settings point to main." in again.out
    assert again.err.count("done before") == len(STEPS) - 1
    assert standing(bench) == before
    # Nobody is asked what has an answer.
    bench.pipeline("cutover", "--execute").expect(EXIT_OK)
    assert "cutover 1 of public.embeddings: switched. next: pipeline finalize" in bench.pipeline("status").out


def test_each_step_can_be_the_last_and_can_be_taken_back(bench: Cutover) -> None:
    for number, name in enumerate(STEPS):
        done = bench.pipeline(*FAST, "--until", name, "--json").expect(EXIT_OK).json["cutover"]
        left = STEPS[number + 1] if number + 1 < len(STEPS) else None
        assert (done["outcome"], done["next_step"]) == ("stopped" if left else "switched", left)
        assert [step for step, *_ in done["steps"]] == [step for step in STEPS if step in STEPS[: number + 1]]
        status = bench.pipeline("status").expect(EXIT_OK).out
        assert (f"{left} comes next" if left else "next: pipeline finalize") in status
        closed = "fence" in STEPS[: number + 1]
        if closed:
            assert "has moved to" in refuses(bench.legacy)
        if number < STEPS.index("switch"):
            assert points_to(bench) == "legacy"
            if number >= STEPS.index("catchup"):
                assert "filled by the pipeline" in refuses(bench.main)
    assert points_to(bench) == "main"
    assert evidence(bench, "backup")["skipped"]


@pytest.mark.parametrize("name", STEPS[: STEPS.index("switch")])
def test_rollback_before_the_switch_opens_legacy(bench: Cutover, name: str) -> None:
    bench.pipeline(*FAST, "--until", name).expect(EXIT_OK)
    done = bench.pipeline(*BACK, "--json").expect(EXIT_OK).json["cutover"]
    assert (done["outcome"], [step for step, *_ in done["steps"]]) == ("rolled back", ["back-open"])
    write(bench.legacy)
    guarded = STEPS.index(name) >= STEPS.index("catchup")
    assert bool(done["remains"]) == guarded
    if guarded:
        assert "stays closed to all but the pipeline" in done["remains"][0]
        assert "filled by the pipeline" in refuses(bench.main)
    assert "rolled back" in bench.pipeline("status").expect(EXIT_OK).out
    bench.pipeline(*BACK).expect(EXIT_REFUSED)
