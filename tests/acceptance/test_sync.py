"""Sync, its dry run, and the list of differences: what is written, what stays, and what each says."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.data import content, fill_generated
from tests.moves import Move
from tests.support import Database, Outcome, environment, pipeline, run

ROWS, DIMENSIONS = 300, 8
KEY = "md5('row{}')::uuid"


@pytest.fixture
def move(legacy: Database, new_database: Callable[..., Database], main_template: Callable[[int], str]) -> Move:
    """Return two databases with equal rows, brought by a copy."""
    fill_generated(legacy, ROWS, dimensions=DIMENSIONS)
    main = new_database("18", main_template(DIMENSIONS))
    env = environment(legacy=legacy, main=main, EMBEDDING_DIMENSIONS=str(DIMENSIONS))
    pipeline("copy", env=env).expect(0)
    return Move(legacy=legacy, main=main, table="public.embeddings", env=env)


def sync(move: Move, *more: str, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = pipeline("sync", "--json", *more, env=move.env).expect(code).json["sync"]
    return found


def lines(outcome: Outcome) -> list[dict[str, Any]]:
    return [json.loads(line) for line in outcome.out.splitlines()]


def versions(database: Database) -> list[tuple[Any, ...]]:
    return database.rows("SELECT id, xmin::text, ctid::text FROM public.embeddings ORDER BY id")


def change_legacy(move: Move) -> None:
    move.legacy.execute(
        f"UPDATE public.embeddings SET content = 'new' WHERE id = {KEY.format(1)};"
        f"UPDATE public.embeddings SET embedding = '[1,2,3,4,5,6,7,8]' WHERE id = {KEY.format(2)};"
        f"UPDATE public.embeddings SET id = '00000000-0000-4000-8000-000000000001' WHERE id = {KEY.format(3)};"
        f"DELETE FROM public.embeddings WHERE id = {KEY.format(4)};"
        "INSERT INTO public.embeddings (id, content) VALUES ('00000000-0000-4000-8000-000000000002', 'added')"
    )


def test_what_changed_on_legacy_since_the_copy_is_brought_and_a_second_sync_writes_nothing(move: Move) -> None:
    change_legacy(move)
    done = sync(move)
    assert (done["deep"], done["inserted"], done["updated"], done["deleted"]) == (False, 2, 2, 2)
    assert done["equal"] and done["settled"]
    assert content(move.main) == content(move.legacy)
    for more in ((), ("--deep",)):
        standing = versions(move.main)
        again = pipeline("sync", *more, env=move.env).expect(0)
        assert "nothing to write" in again.out
        assert versions(move.main) == standing
    move.verify().expect(0)


def test_diff_and_dry_run_list_the_same_keys_and_write_nothing(move: Move) -> None:
    change_legacy(move)
    before = versions(move.main), versions(move.legacy), move.main.value("SELECT count(*) FROM pipeline.pass")
    expected = {
        ("different", move.main.value(f"SELECT {KEY.format(1)}::text"), ("content",)): "write over",
        ("different", move.main.value(f"SELECT {KEY.format(2)}::text"), ("embedding",)): "write over",
        ("extra", move.main.value(f"SELECT {KEY.format(3)}::text"), ()): "delete",
        ("extra", move.main.value(f"SELECT {KEY.format(4)}::text"), ()): "delete",
        ("missing", "00000000-0000-4000-8000-000000000001", ()): "insert",
        ("missing", "00000000-0000-4000-8000-000000000002", ()): "insert",
    }
    for more in ((), ("--deep",)):
        listed = lines(pipeline("diff", *more, env=move.env).expect(3))
        assert {(one["kind"], one["key"][0], tuple(one.get("columns", ()))) for one in listed} == set(expected)
        assert len(listed) == len(expected)
        dry = lines(pipeline("sync", "--dry-run", *more, env=move.env).expect(3))
        assert {(one["kind"], one["key"][0], tuple(one.get("columns", ()))): one["sync"] for one in dry} == expected
    after = versions(move.main), versions(move.legacy), move.main.value("SELECT count(*) FROM pipeline.pass")
    assert after == before


def test_rows_that_somebody_else_wrote_on_main_stay_and_are_told(move: Move) -> None:
    move.main.execute(
        f"UPDATE public.embeddings SET content = 'mine' WHERE id = {KEY.format(1)};"
        "INSERT INTO public.embeddings (id, content) VALUES ('00000000-0000-4000-8000-000000000009', 'mine')"
    )
    # Brought by the copy and written since by the application: it is not ours any more.
    move.legacy.execute(f"DELETE FROM public.embeddings WHERE id IN ({KEY.format(1)}, {KEY.format(2)})")
    done = sync(move, code=3)
    assert (done["deleted"], done["kept"], done["foreign"], done["equal"]) == (1, 0, 2, False)
    assert {kind for kind, _ in done["left"]} == {"extra"}
    move.legacy.execute(f"INSERT INTO public.embeddings (id, content) VALUES ({KEY.format(1)}, 'theirs')")
    said = pipeline("sync", env=move.env).expect(3)
    assert "left different, written by somebody else: 1 row of the target" in said.out
    assert "left alone, brought by no run: 1 row that only the target has" in said.out
    assert move.main.value(f"SELECT content FROM public.embeddings WHERE id = {KEY.format(1)}") == "mine"
    listed = {one["key"][0]: one["sync"] for one in lines(pipeline("sync", "--dry-run", env=move.env).expect(3))}
    assert set(listed.values()) == {"leave"}
    sync(move, "--on-conflict", "overwrite", code=3)
    assert move.main.value(f"SELECT content FROM public.embeddings WHERE id = {KEY.format(1)}") == "theirs"
    sync(move, "--delete")
    assert content(move.main) == content(move.legacy)


def test_row_that_main_had_equal_follows_legacy_but_is_never_deleted(move: Move) -> None:
    # Main's own row, equal to legacy's: the copy of it changes with legacy, and its end is for the operator.
    own = "INSERT INTO public.embeddings (id, content) VALUES ('00000000-0000-4000-8000-000000000005', 'same')"
    for database in (move.main, move.legacy):
        database.execute(own)
    assert sync(move)["updated"] == 0
    move.legacy.execute(
        "UPDATE public.embeddings SET content = 'new' WHERE id = '00000000-0000-4000-8000-000000000005'"
    )
    assert (sync(move)["updated"], content(move.main)) == (1, content(move.legacy))


def test_first_sync_of_a_table_that_no_copy_filled_compares_everything(
    legacy: Database, new_database: Callable[..., Database], main_template: Callable[[int], str]
) -> None:
    fill_generated(legacy, ROWS, dimensions=DIMENSIONS)
    main = new_database("18", main_template(DIMENSIONS))
    move = Move(
        legacy=legacy,
        main=main,
        table="public.embeddings",
        env=environment(legacy=legacy, main=main, EMBEDDING_DIMENSIONS=str(DIMENSIONS)),
    )
    done = sync(move)
    assert (done["deep"], done["inserted"], done["equal"]) == (True, ROWS, True)
    assert content(main) == content(legacy)
    legacy.execute(f"DELETE FROM public.embeddings WHERE id = {KEY.format(1)}")
    done = sync(move)
    assert (done["deep"], done["deleted"], done["equal"]) == (False, 1, True)
    # A copy has its own books, and finds the rows there.
    found = pipeline("copy", "--json", env=move.env).expect(0).json["copy"]
    assert found["rows_before"] == ROWS - 1


def test_unfinished_copy_goes_first(move: Move) -> None:
    move.main.execute("UPDATE pipeline.run SET finished_at = NULL")
    refused = pipeline("sync", env=move.env).expect(4)
    assert "is not finished" in refused.err and "pipeline copy" in refused.err


def test_sync_goes_back_and_makes_its_ledger_on_request(move: Move) -> None:
    pipeline("verify", "--check", "rows", env=move.env).expect(0)
    back = ("--from", "main", "--to", "legacy")
    refused = pipeline("sync", *back, env=move.env).expect(4)
    assert "has no ledger" in refused.err and "--init-target" in refused.err
    pipeline("diff", *back, env=move.env).expect(0)
    move.main.execute(
        f"UPDATE public.embeddings SET content = 'after the switch' WHERE id = {KEY.format(1)};"
        f"DELETE FROM public.embeddings WHERE id = {KEY.format(2)};"
        "INSERT INTO public.embeddings (id, content) VALUES ('00000000-0000-4000-8000-000000000007', 'new')"
    )
    dry = pipeline("sync", "--dry-run", "--init-target", *back, env=move.env).expect(3)
    assert sorted(one["sync"] for one in lines(dry)) == ["insert", "leave", "write over"]
    assert not move.legacy.value("SELECT count(*) FROM pg_namespace WHERE nspname = 'pipeline'")
    done = pipeline("sync", "--json", "--init-target", "--delete", *back, env=move.env).expect(0).json["sync"]
    # Where both were equal, main's ledger knows.
    assert (done["deep"], done["inserted"], done["updated"], done["deleted"]) == (False, 1, 1, 1)
    assert content(move.main) == content(move.legacy)
    said = pipeline("sync", *back, env=move.env).expect(0)
    assert "next: pipeline verify --from main --to legacy --incremental" in said.out
    again = pipeline("sync", "--json", "--init-target", *back, env=move.env).expect(0).json["sync"]
    assert (again["inserted"], again["updated"], again["deleted"], again["equal"]) == (0, 0, 0, True)


@pytest.mark.parametrize("key", ["text", "bigint", "text, part int"])
def test_keys_of_any_type_are_found_and_reconciled(new_move: Callable[..., Move], key: str) -> None:
    names = "id, part" if "part" in key else "id"
    table = f"CREATE TABLE embeddings (id {key} NOT NULL, content text, metadata jsonb, embedding vector(3)," + (
        f" PRIMARY KEY ({names}))"
    )
    # Two orders: a linguistic one where the server has it, and that of the bytes.
    sorted_here, sorted_there = (
        (table.replace("id text", 'id text COLLATE "C"'), table) if "text" in key else (table, table)
    )
    values = "i::text || '-Ä' || chr(97 + i % 26)" if "text" in key else "i"
    part = ", i % 3" if "part" in key else ""
    filled = f"; INSERT INTO embeddings ({names}, content) SELECT {values}{part}, i FROM generate_series(1, 500) AS i"
    move = new_move(sorted_here + filled, sorted_there)
    move.copy().expect(0)
    move.legacy.execute("UPDATE embeddings SET content = content || '!' WHERE content::int % 100 = 0")
    move.main.execute("DELETE FROM embeddings WHERE content::int % 99 = 0")
    listed = lines(pipeline("diff", "--deep", env=move.env).expect(3))
    assert sorted(one["kind"] for one in listed) == ["different"] * 5 + ["missing"] * 5
    assert {len(one["key"]) for one in listed} == {2 if part else 1}
    assert sync(move)["equal"]
    move.verify().expect(0)


def test_view_is_compared_as_a_whole(new_move: Callable[..., Move]) -> None:
    table = "CREATE TABLE {} (id bigint PRIMARY KEY, content text, metadata jsonb, embedding vector(3))"
    view = (
        f"{table.format('stored')};"
        " INSERT INTO stored SELECT i, i::text, '{}', '[1,2,3]' FROM generate_series(1, 200) i;"
        " CREATE VIEW embeddings AS SELECT * FROM stored"
    )
    move = new_move(view, table.format("embeddings"))
    move.copy().expect(0)
    move.legacy.execute("UPDATE stored SET content = 'new' WHERE id = 7; DELETE FROM stored WHERE id = 8")
    done = sync(move)
    assert (done["deep"], done["updated"], done["deleted"], done["equal"]) == (True, 1, 1, True)
    refused = move.verify("--incremental").expect(4)
    assert "does not tell which of its rows were written since" in refused.err


def test_lease_keeps_a_second_sync_out(move: Move) -> None:
    change_legacy(move)
    before = versions(move.main)
    move.main.execute(
        "UPDATE pipeline.run SET lease_owner = 'another', lease_until = clock_timestamp() + interval '1 hour',"
        " lease_backend = pg_backend_pid()"
    )
    with move.main.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        move.main.execute("UPDATE pipeline.run SET lease_backend = %s", cursor.fetchone()[0])  # type: ignore[index]
        for more in ((), ("--deep",)):
            pipeline("sync", *more, env=move.env).expect(6)
    assert versions(move.main) == before


def test_killed_sync_is_gone_on_with(move: Move) -> None:
    move.legacy.execute("UPDATE public.embeddings SET content = content || '!'")
    env = move.env | {"PIPELINE_TESTING": "1", "PIPELINE_FAILPOINT": "in_reconcile:kill"}
    killed = pipeline("sync", env=env)
    assert killed.code == -9
    assert sync(move)["equal"]
    assert content(move.main) == content(move.legacy)


def test_sync_behind_the_schema_of_an_old_legacy(new_database: Callable[..., Database], empty_main: Database) -> None:
    old = new_database("16.2")
    old.execute("CREATE SCHEMA ai; CREATE EXTENSION vector SCHEMA ai")
    old.execute("CREATE TABLE embeddings (id uuid PRIMARY KEY, content text, metadata jsonb, embedding ai.vector(3))")
    old.execute("INSERT INTO embeddings SELECT md5(i::text)::uuid, i, '{}', '[1,2,3]' FROM generate_series(1, 200) i")
    empty_main.execute("CREATE SCHEMA extensions")
    env = environment(legacy=old, main=empty_main, EMBEDDING_DIMENSIONS="3")
    run("alembic", "upgrade", "head", env=env).expect(0)
    pipeline("copy", env=env).expect(0)
    old.execute(
        "UPDATE embeddings SET embedding = '[3,2,1]' WHERE content = '7'; DELETE FROM embeddings WHERE content = '8'"
    )
    done = pipeline("sync", "--json", env=env).expect(0).json["sync"]
    assert (done["deep"], done["updated"], done["deleted"]) == (False, 1, 1)
    pipeline("verify", "--check", "rows", env=env).expect(0)
    pipeline("verify", "--incremental", env=env).expect(0)
    pipeline("diff", "--deep", env=env).expect(0)


@pytest.mark.parametrize("changed", ['{"timeline": 99}', '{"horizon": 4000000000}'])
@pytest.mark.parametrize("side", ["source_horizon", "target_horizon"])
def test_pass_of_a_server_that_was_set_back_is_not_gone_on_from(move: Move, side: str, changed: str) -> None:
    pipeline("verify", "--check", "rows", env=move.env).expect(0)
    move.main.execute(f"UPDATE pipeline.pass SET {side} = {side} || %s", changed)
    refused = pipeline("verify", "--incremental", env=move.env).expect(4)
    assert "set back" in refused.err
    # That a row is older than the pass says nothing then, on either side.
    move.main.execute(f"UPDATE public.embeddings SET content = 'foreign' WHERE id = {KEY.format(5)}")
    done = sync(move, code=3)
    assert (done["deep"], done["kept"]) == (True, 1)
