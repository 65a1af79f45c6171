"""Rows that cannot be carried: refused with their keys, or set aside, counted by verify, and brought later."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.moves import Move
from tests.support import pipeline

NewMove = Callable[..., Move]
MAIN = "CREATE TABLE embeddings (id bigint PRIMARY KEY, content text, metadata {}, embedding {})"
ROWS = "SELECT id FROM embeddings ORDER BY id"


def quarantine(move: Move, *more: str) -> Any:
    return pipeline("quarantine", "--json", *more, env=move.env).expect(0).json


def checks(move: Move, code: int, *more: str) -> dict[str, Any]:
    return {check["name"]: check for check in move.verify(*more).expect(code).json["checks"]}


UNFIT = {
    "dimension": (
        "id bigint PRIMARY KEY, content text, metadata jsonb, embedding vector",
        "(1, 'a', '{}', '[1,2,3]'), (2, 'b', '{}', '[1,2]'), (3, 'c', '{}', '[3,2,1]'), (4, 'd', '{}', NULL)",
        MAIN.format("jsonb", "vector(3)"),
        "another dimension than 3 in column embedding",
        "UPDATE embeddings SET embedding = '[2,2,2]' WHERE id = 2",
    ),
    "json": (
        "id bigint PRIMARY KEY, content text, metadata json, embedding vector(3)",
        r"""(1, 'a', '{}', '[1,2,3]'), (2, 'b', '{"k": "\u0000"}', '[1,2,2]'), (3, 'c', NULL, '[3,2,1]'),
            (4, 'd', '{}', NULL)""",
        MAIN.format("jsonb", "vector(3)"),
        "json in column metadata that jsonb does not take",
        "UPDATE embeddings SET metadata = '{}' WHERE id = 2",
    ),
    "halfvec": (
        "id bigint PRIMARY KEY, content text, metadata jsonb, embedding vector(3)",
        "(1, 'a', '{}', '[1,2,3.14159]'), (2, 'b', '{}', '[1,-70000,3]'), (3, 'c', '{}', '[65519,-65519,1]'),"
        " (4, 'd', '{}', NULL)",
        MAIN.format("jsonb", "halfvec(3)"),
        "beyond the largest of halfvec, 65,504",
        "UPDATE embeddings SET embedding = '[1,-7000,3]' WHERE id = 2",
    ),
    "null": (
        "id bigint PRIMARY KEY, content text, metadata jsonb, embedding vector(3)",
        "(1, 'a', '{}', '[1,2,3]'), (2, NULL, '{}', '[1,7,3]'), (3, 'c', '{}', '[6,-6,1]'), (4, 'd', '{}', NULL)",
        MAIN.format("jsonb", "vector(3)").replace("content text", "content text NOT NULL"),
        "without a value in column content, which is NOT NULL on the target",
        "UPDATE embeddings SET content = 'b' WHERE id = 2",
    ),
    "length": (
        "id bigint PRIMARY KEY, content text, metadata jsonb, embedding vector(3)",
        "(1, 'a', '{}', '[1,2,3]'), (2, 'much too long', '{}', '[1,7,3]'), (3, 'c', '{}', '[6,-6,1]'),"
        " (4, 'd', '{}', NULL)",
        MAIN.format("jsonb", "vector(3)").replace("content text", "content varchar(5)"),
        "more than 5 characters in column content",
        "UPDATE embeddings SET content = 'b' WHERE id = 2",
    ),
}


@pytest.fixture(params=UNFIT)
def unfit(request: pytest.FixtureRequest, new_move: NewMove) -> tuple[Move, str, str, tuple[str, ...]]:
    """Return a move of four rows, of which that with the key 2 cannot be carried; the reason, the cure, the options."""
    columns, rows, main, reason, cure = UNFIT[request.param]
    move = new_move(f"CREATE TABLE embeddings ({columns}); INSERT INTO embeddings VALUES {rows}", main)
    return move, reason, cure, ("--allow-rounding",) if request.param == "halfvec" else ()


def test_unfit_row_is_refused_set_aside_counted_and_brought_later(
    unfit: tuple[Move, str, str, tuple[str, ...]],
) -> None:
    move, reason, cure, rounding = unfit
    refused = move.copy(*rounding).expect(4)
    assert reason.split(" in column")[0].split(" than")[0] in refused.err or "holds" in refused.err
    assert "pipeline copy --quarantine" in refused.err
    assert move.main.value("SELECT count(*) FROM pipeline.run") == 0
    done = move.copy("--json", "--quarantine", *rounding).expect(0).json["copy"]
    assert (done["rows"], done["moved_rows"], done["quarantined_rows"]) == (3, 3, 1)
    assert move.main.rows(ROWS) == [(1,), (3,), (4,)]
    (row,) = quarantine(move, *rounding)["quarantine"]["rows"]
    assert row["key"] == ["2"] and reason in row["reason"]
    kept = move.main.value("SELECT row ->> 'id' || ' ' || (row ->> 'embedding') FROM pipeline.quarantine")
    assert kept == "2 " + move.legacy.value("SELECT embedding::text FROM embeddings WHERE id = 2")
    found = checks(move, 0, *rounding)
    assert found["counts"]["figures"]["source_rows"] == found["counts"]["figures"]["target_rows"] == 3
    assert found["quarantine"]["figures"] == {"quarantined_rows": 1, "unknown_rows": 0, "keys": []}
    assert "1 row of the source cannot be carried, and lies in quarantine" in found["quarantine"]["summary"]
    assert quarantine(move, "--retry", *rounding)["retried"]["left"] == 1
    move.legacy.execute(cure)
    assert checks(move, 3, *rounding)["digests"]["figures"]["keys"] == [{"kind": "missing", "key": "2"}]
    assert quarantine(move, "--retry", *rounding)["retried"] | {"run": 0} == {
        "run": 0, "brought": 1, "gone": 0, "left": 0
    }  # fmt: skip
    assert "quarantine" not in checks(move, 0, *rounding)
    assert move.main.rows(ROWS) == [(1,), (2,), (3,), (4,)]
    assert "nothing in quarantine" in pipeline("quarantine", env=move.env).expect(0).out


def test_rows_that_become_unfit_and_fit_meanwhile_change_places(new_move: NewMove) -> None:
    columns, rows, main, _, cure = UNFIT["json"]
    move = new_move(f"CREATE TABLE embeddings ({columns}); INSERT INTO embeddings VALUES {rows}", main)
    with move.copy_held("--quarantine"):
        pass
    assert move.main.rows(ROWS) == [(1,), (3,), (4,)]
    move.main.execute("TRUNCATE embeddings")
    # Between the load and the pass over changed rows.
    env = move.env | {"PIPELINE_TESTING": "1", "PIPELINE_FAILPOINT": "before_loaded:kill"}
    pipeline("copy", "--quarantine", env=env).expect(-9)
    move.legacy.execute(cure)
    move.legacy.execute(r"""UPDATE embeddings SET metadata = '{"a": "\u0000"}' WHERE id = 3""")
    done = move.copy("--json", "--quarantine").expect(0).json["copy"]
    assert (done["rows"], done["quarantined_rows"]) == (3, 1)
    assert move.main.rows(ROWS) == [(1,), (2,), (4,)]
    assert [row["key"] for row in quarantine(move)["quarantine"]["rows"]] == [["3"]]
    checks(move, 0)


def test_row_that_was_deleted_on_the_source_leaves_the_quarantine(new_move: NewMove) -> None:
    columns, rows, main, *_ = UNFIT["dimension"]
    move = new_move(f"CREATE TABLE embeddings ({columns}); INSERT INTO embeddings VALUES {rows}", main)
    move.copy("--quarantine").expect(0)
    out = pipeline("quarantine", env=move.env).expect(0).out
    assert "another dimension than 3" in out and "1 row of run 1" in out and "--retry" in out
    move.legacy.execute("DELETE FROM embeddings WHERE id = 2")
    assert "0 rows brought, 1 gone from the source" in pipeline("quarantine", "--retry", env=move.env).expect(0).out


def test_row_that_nobody_set_aside_fails_verify(new_move: NewMove) -> None:
    columns, rows, main, *_ = UNFIT["dimension"]
    move = new_move(f"CREATE TABLE embeddings ({columns}); INSERT INTO embeddings VALUES {rows}", main)
    move.copy("--quarantine").expect(0)
    move.legacy.execute("INSERT INTO embeddings VALUES (9, 'x', '{}', '[1]')")
    found = checks(move, 3)["quarantine"]
    assert found["verdict"] == "fail"
    assert found["figures"]["keys"] == [{"kind": "not set aside", "key": "9"}]
    assert "pipeline quarantine --retry" in found["summary"]
    assert quarantine(move, "--retry")["retried"] == {"run": 1, "brought": 0, "gone": 0, "left": 2}
    checks(move, 0)


def test_killed_copy_keeps_the_quarantine_whole(new_move: NewMove) -> None:
    columns, rows, main, *_ = UNFIT["dimension"]
    move = new_move(f"CREATE TABLE embeddings ({columns}); INSERT INTO embeddings VALUES {rows}", main)
    env = move.env | {"PIPELINE_TESTING": "1", "PIPELINE_FAILPOINT": "in_quarantine:kill"}
    pipeline("copy", "--quarantine", env=env).expect(-9)
    assert move.main.value("SELECT count(*) FROM pipeline.quarantine") == 0
    # Without the option it is refused again, and nothing is lost by that.
    move.copy().expect(4)
    move.copy("--quarantine").expect(0)
    assert move.main.value("SELECT count(*) FROM pipeline.quarantine") == 1


def test_retry_without_a_finished_run_is_refused(new_move: NewMove) -> None:
    columns, rows, main, *_ = UNFIT["dimension"]
    move = new_move(f"CREATE TABLE embeddings ({columns}); INSERT INTO embeddings VALUES {rows}", main)
    refused = pipeline("quarantine", "--retry", env=move.env).expect(4)
    assert "no run has filled" in refused.err and "pipeline copy --quarantine" in refused.err


def test_vector_becomes_halfvec_only_when_it_is_allowed(new_move: NewMove) -> None:
    move = new_move(
        "CREATE TABLE embeddings (id bigint PRIMARY KEY, content text, metadata jsonb, embedding vector(3));"
        " INSERT INTO embeddings VALUES (1, 'a', '{}', '[0.1,0.2,0.3]'), (2, 'b', '{}', '[0.3,0.2,0.1]')",
        MAIN.format("jsonb", "halfvec(3)"),
    )
    refused = move.copy().expect(4)
    assert "half the digits of every number would be lost" in refused.err and "--allow-rounding" in refused.err
    assert "--allow-rounding" in pipeline("preflight", env=move.env).expect(4).out
    pipeline("preflight", "--allow-rounding", env=move.env).expect(0)
    move.copy("--allow-rounding").expect(0)
    assert (
        move.main.value("SELECT embedding::text FROM embeddings WHERE id = 1") == "[0.099975586,0.19995117,0.30004883]"
    )
    move.verify("--allow-rounding").expect(0)
    move.main.execute("UPDATE embeddings SET embedding = '[0.1,0.2,0.31]' WHERE id = 1")
    figures = checks(move, 3, "--allow-rounding")["digests"]["figures"]
    assert figures["keys"] == [{"kind": "different", "key": "1", "columns": ["embedding"]}]
