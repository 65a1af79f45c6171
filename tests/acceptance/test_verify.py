"""Verify finds what was planted, names it, and says nothing where nothing is."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data import TABLE_SQL, fill, fill_generated, load
from tests.support import CANARY, Database, Outcome, environment, pipeline, run, start


@pytest.fixture
def verified(
    legacy: Database, new_database: Callable[..., Database], main_template: Callable[[int], str]
) -> Iterator[tuple[Database, dict[str, str], str]]:
    """Return a main that holds equal rows, the environment, and the key of a row with every oddity."""
    data = load("nomic768")
    fill(legacy, data)
    key = data.rows[7]["id"]
    legacy.execute(
        """UPDATE public.embeddings SET content = '', metadata = '{"price": 1.10}',"""
        " embedding = (SELECT array_agg(CASE WHEN place = 3 THEN 0 ELSE x END ORDER BY place)"
        " FROM unnest(embedding::real[]) WITH ORDINALITY AS u(x, place))::vector WHERE id = %s",
        key,
    )
    main = new_database("18", main_template(768))
    env = environment(legacy=legacy, main=main)
    pipeline("copy", env=env).expect(0)
    yield main, env, key


def verify(env: dict[str, str], *more: str) -> Outcome:
    return pipeline("verify", "--json", *more, env=env)


# What of the ladder a test of rows asks for.
ROWS = ("--check", "rows", "--check", "parity")
LADDER = ["counts", "digests", "census", "parity", "recall", "plan", "latency", "application"]


def checks_of(outcome: Outcome) -> dict[str, Any]:
    return {check["name"]: check for check in outcome.json["checks"]}


def test_first_20_of_many_differing_keys_are_listed_and_all_counted(
    verified: tuple[Database, dict[str, str], str],
) -> None:
    main, env, _ = verified
    main.execute("UPDATE public.embeddings SET content = content || '!'")
    figures = verify(env, "--check", "rows").expect(3).json["checks"][1]["figures"]
    assert figures["differing_rows"] == main.value("SELECT count(*) FROM public.embeddings")
    listed = [entry["key"] for entry in figures["keys"]]
    assert len(listed) == 20
    assert figures["columns"] == {"content": figures["differing_rows"]}
    assert sum(figures["places"]["different"]) == figures["differing_rows"]
    assert listed == [key for (key,) in main.rows("SELECT id::text FROM public.embeddings ORDER BY id LIMIT 20")]


def test_swapped_vectors_fail_the_digests_and_the_parity(verified: tuple[Database, dict[str, str], str]) -> None:
    main, env, _ = verified
    main.execute(
        "WITH numbered AS (SELECT id, embedding, row_number() OVER (ORDER BY id) AS n, count(*) OVER () AS total"
        " FROM public.embeddings)"
        " UPDATE public.embeddings AS a SET embedding = b.embedding FROM numbered AS me"
        " JOIN numbered AS b ON b.n = me.n % me.total + 1 WHERE a.id = me.id"
    )
    checks = checks_of(verify(env, *ROWS).expect(3))
    assert (checks["counts"]["verdict"], checks["digests"]["verdict"], checks["parity"]["verdict"]) == (
        "pass",
        "fail",
        "fail",
    )
    assert len(checks["parity"]["figures"]["disagreements"]) == checks["parity"]["figures"]["queries"]


def test_null_and_zero_vectors_pass_and_are_no_neighbours(
    legacy: Database, new_database: Callable[..., Database], main_template: Callable[[int], str]
) -> None:
    data = load("nomic768")
    fill(legacy, data)
    zero = "[" + ",".join("0" * 768) + "]"
    legacy.execute("UPDATE public.embeddings SET embedding = NULL WHERE id = %s", data.rows[0]["id"])
    legacy.execute("UPDATE public.embeddings SET embedding = %s::vector WHERE id = %s", zero, data.rows[1]["id"])
    main = new_database("18", main_template(768))
    env = environment(legacy=legacy, main=main)
    pipeline("copy", env=env).expect(0)
    checks = checks_of(verify(env, *ROWS, "--queries", "200", "--k", "200").expect(0))
    assert checks["counts"]["figures"]["target_embeddings"] == len(data.rows) - 1
    # Every vector but the two is asked for.
    assert checks["parity"]["figures"]["queries"] == len(data.rows) - 2


def test_empty_table_is_copied_and_verified(legacy: Database, main: Database) -> None:
    legacy.execute(TABLE_SQL.format(768))
    env = environment(legacy=legacy, main=main)
    pipeline("copy", env=env).expect(0)
    verify(env).expect(0)


def test_whole_ladder_is_climbed_and_its_verdicts_are_kept(verified: tuple[Database, dict[str, str], str]) -> None:
    main, env, _ = verified
    found = verify(env).expect(0).json
    assert [check["name"] for check in found["checks"]] == LADDER
    assert (found["verdict"], found["kind"], found["schema_version"]) == ("pass", "full", 1)
    assert main.rows("SELECT check_name, verdict FROM pipeline.verdict ORDER BY id") == [
        (name, "pass") for name in LADDER
    ]
    assert main.value("SELECT count(DISTINCT pass_id) FROM pipeline.verdict") == 1
    plain = pipeline("verify", env=env).expect(0)
    assert "verdict: pass" in plain.out and all(name in plain.out for name in LADDER)


def test_status_shows_the_last_verdict_of_each_and_which_are_stale(
    legacy: Database, verified: tuple[Database, dict[str, str], str]
) -> None:
    main, env, key = verified
    verify(env, *ROWS).expect(0)
    assert stale(env) == {"counts": False, "digests": False, "parity": False}
    # On either side, in every way: a write, a deletion, and a deletion beside an insertion.
    for database in (main, legacy):
        database.execute("UPDATE public.embeddings SET content = content WHERE id = %s", key)
        assert set(stale(env).values()) == {True}
        assert "stale" in pipeline("status", env=env).expect(0).out
        verify(env, "--incremental").expect(0)
        verify(env, "--check", "parity").expect(0)
        assert set(stale(env).values()) == {False}
    main.execute("DELETE FROM public.embeddings WHERE id = %s", key)
    assert stale(env)["digests"] is True
    verify(env, *ROWS).expect(3)
    verdicts = {
        one["check"]: one["verdict"] for one in pipeline("status", "--json", env=env).expect(0).json["verdicts"]
    }
    assert (verdicts["counts"], verdicts["digests"]) == ("fail", "fail")
    unreachable = pipeline("status", "--json", env=env | {"PGVECTOR_PORT": "1"}).expect(0).json["verdicts"]
    assert {one["stale"] for one in unreachable} == {None}


def stale(env: dict[str, str]) -> dict[str, bool | None]:
    found = pipeline("status", "--json", env=env).expect(0).json["verdicts"]
    return {one["check"]: one["stale"] for one in found}


def test_incremental_verify_compares_what_was_touched_on_either_side(
    legacy: Database, verified: tuple[Database, dict[str, str], str]
) -> None:
    main, env, key = verified
    # What the copy has brought, nobody has compared yet.
    refused = pipeline("verify", "--incremental", env=env).expect(4)
    assert "no verify has found" in refused.err and "pipeline verify" in refused.err
    assert "alone" in pipeline("verify", "--incremental", "--check", "parity", env=env).expect(2).err
    rows = main.value("SELECT count(*) FROM public.embeddings")
    verify(env, "--check", "rows").expect(0)
    done = verify(env, "--incremental").expect(0).json
    assert (done["kind"], [check["name"] for check in done["checks"]]) == ("incremental", ["counts", "digests"])
    assert done["checks"][1]["figures"]["rows"] == 0
    legacy.execute("UPDATE public.embeddings SET content = 'new' WHERE id = %s", key)
    main.execute("UPDATE public.embeddings SET content = content WHERE id <> %s AND metadata IS NOT NULL", key)
    figures = checks_of(verify(env, "--incremental", "--settle", "0").expect(3))["digests"]["figures"]
    assert (figures["differing_rows"], figures["keys"][0]["key"], figures["columns"]) == (1, key, {"content": 1})
    assert 1 < figures["rows"] <= rows
    # A sync's own rows are compared too.
    pipeline("sync", env=env).expect(0)
    assert checks_of(verify(env, "--incremental").expect(0))["digests"]["figures"]["rows"] >= 1
    main.execute("DELETE FROM public.embeddings WHERE id = %s", key)
    checks = checks_of(verify(env, "--incremental", "--settle", "0").expect(3))
    assert (checks["counts"]["verdict"], checks["digests"]["figures"]["missing_rows"]) == ("fail", 1)
    # A verdict that failed is nothing to go on from: still the last that passed.
    assert checks_of(verify(env, "--incremental", "--settle", "0").expect(3))["digests"]["figures"]["missing_rows"] == 1


def test_interrupted_comparison_goes_on_where_it_was(legacy: Database, main: Database) -> None:
    fill_generated(legacy, 500)
    env = environment(legacy=legacy, main=main)
    pipeline("copy", env=env).expect(0)
    # Longer than the ledger waits to be told, then killed: the second slice is never summed up.
    stopped = {"PIPELINE_TESTING": "1", "PIPELINE_FAILPOINT": "after_compared:sleep=30@2"}
    process = start("verify", "--check", "rows", env=env | stopped)
    deadline = time.monotonic() + 60
    while not main.value("SELECT count(*) FROM pipeline.comparison"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.communicate()
    ((source, target),) = main.rows(
        "SELECT cardinality(source_done), cardinality(target_done) FROM pipeline.comparison"
    )
    assert source + target > 0
    # Written meanwhile, before and behind the place where it was: still found.
    main.execute("UPDATE public.embeddings SET content = 'x' WHERE id IN (md5('row1')::uuid, md5('row500')::uuid)")
    figures = checks_of(verify(env, "--check", "rows", "--settle", "0").expect(3))["digests"]["figures"]
    assert (figures["different_rows"], figures["differing_rows"]) == (2, 2)
    assert main.value("SELECT count(*) FROM pipeline.comparison") == 0


def test_difference_that_is_on_its_way_does_not_count(
    legacy: Database, verified: tuple[Database, dict[str, str], str]
) -> None:
    main, env, key = verified
    held = {"PIPELINE_TESTING": "1", "PIPELINE_FAILPOINT": "after_compared:sleep=2"}
    process = start("verify", "--json", "--check", "rows", "--settle", "4", env=env | held)
    deadline = time.monotonic() + 20
    sleeping = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%hash_record%' AND pid <> pg_backend_pid()"
    while not main.value(sleeping):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    # After both sides' horizons; on legacy first, and on main later than the comparison, as a follower would.
    legacy.execute("UPDATE public.embeddings SET content = 'on its way' WHERE id = %s", key)
    time.sleep(3)
    main.execute("UPDATE public.embeddings SET content = 'on its way' WHERE id = %s", key)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err


def test_report_is_one_page_with_every_check(verified: tuple[Database, dict[str, str], str], tmp_path: Path) -> None:
    _, env, _ = verified
    report = tmp_path / "report.html"
    pipeline("verify", "--report", str(report), env=env).expect(0)
    page = report.read_text(encoding="utf-8")
    assert all(name in page for name in LADDER)
    assert CANARY not in page and "<script" not in page
    refused = pipeline("verify", "--report", str(tmp_path / "none" / "report.html"), env=env).expect(2)
    assert "none" in refused.err


def test_verify_writes_nothing_but_its_verdicts(
    legacy: Database, verified: tuple[Database, dict[str, str], str]
) -> None:
    main, env, _ = verified

    def state(database: Database) -> object:
        return database.rows("SELECT id, xmin::text, ctid::text FROM public.embeddings ORDER BY id")

    before = state(legacy), state(main), main.value("SELECT count(*) FROM pg_class")
    verify(env).expect(0)
    assert (state(legacy), state(main), main.value("SELECT count(*) FROM pg_class")) == before
    assert main.value("SELECT count(*) FROM pipeline.verdict") == len(LADDER)


def test_old_legacy_and_extension_in_another_schema_agree(
    new_database: Callable[..., Database], empty_main: Database
) -> None:
    old = new_database("16.2")
    old.execute("CREATE SCHEMA ai; CREATE EXTENSION vector SCHEMA ai")
    old.execute("ALTER ROLE postgres SET search_path = public, ai")
    try:
        data = load("google768")
        fill(old, data)
    finally:
        old.execute("ALTER ROLE postgres RESET search_path")
    empty_main.execute("CREATE SCHEMA extensions")
    env = environment(legacy=old, main=empty_main)
    run("alembic", "upgrade", "head", env=env).expect(0)
    pipeline("copy", env=env).expect(0)
    verify(env).expect(0)
    schema = "SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE extname = %s"
    assert empty_main.value(schema, "vector") == "extensions"
