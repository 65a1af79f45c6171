"""Latency is measured on both sides, cold and warm, one client and several."""

from typing import Any

import pytest
from psycopg2 import sql

from pipeline.check.latency import check_latency
from pipeline.events import CheckDone
from tests.ladders import climb, make, random_vectors
from tests.support import Database

DIMENSIONS = 32


@pytest.fixture
def pair(legacy: Database, empty_main: Database) -> tuple[Database, Database]:
    """Return two databases with the same 100 rows."""
    empty_main.execute("CREATE EXTENSION vector")
    make((legacy, empty_main), random_vectors(100, DIMENSIONS))
    return legacy, empty_main


def latency(pair: tuple[Database, Database], **options: Any) -> CheckDone:
    return climb(check_latency, *pair, DIMENSIONS, **options)


def times(done: CheckDone) -> Any:
    return {side: done.figures[side] for side in ("source", "target")}


def test_every_query_is_timed_on_both_sides(pair: tuple[Database, Database]) -> None:
    done = latency(pair)
    assert (done.verdict, done.figures["clients"]) == ("pass", [1, 4])
    for side in times(done).values():
        assert set(side) == {"1", "4"}
        for clients, rounds in side.items():
            for found in rounds.values():
                # 13 each of four.
                assert found["queries"] == {"1": 50, "4": 52}[clients]
                assert 0 < found["p50"] <= found["p95"] <= found["p99"]
    source, target = (side["1"]["warm"] for side in times(done).values())
    assert done.summary == (
        f"a search takes legacy {source['p50']:.1f} ms (p95 {source['p95']:.1f}),"
        f" main {target['p50']:.1f} ms (p95 {target['p95']:.1f}); one client, asked before"
    )


def test_budget_ends_it_with_one_query_of_each_client(pair: tuple[Database, Database]) -> None:
    done = latency(pair, budget_seconds=0.0)
    assert done.verdict == "pass"
    for side in times(done).values():
        assert {clients: rounds["warm"]["queries"] for clients, rounds in side.items()} == {"1": 1, "4": 4}


def test_fewer_clients_ask_where_a_server_has_no_room(pair: tuple[Database, Database]) -> None:
    role = sql.Identifier(f"narrow_{pair[1].name}")
    pair[1].execute(
        sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'x' CONNECTION LIMIT 2; GRANT SELECT ON embeddings TO {}").format(
            role, role
        )
    )
    try:
        narrow = pair[1].as_role(f"narrow_{pair[1].name}", "x")
        done = latency((pair[0], narrow), queries=5)
        assert (done.verdict, done.figures["clients"]) == ("pass", [1, 2, 4])
        assert {side: set(found) for side, found in times(done).items()} == {"source": {"1", "4"}, "target": {"1", "2"}}
    finally:
        pair[1].execute(sql.SQL("DROP OWNED BY {}; DROP ROLE {}").format(role, role))


def test_query_that_fails_is_a_failure(pair: tuple[Database, Database]) -> None:
    # Found by no description of a table: an operator that the role may not use.
    role = f"app_{pair[1].name}"
    pair[1].execute(
        sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'x'; GRANT SELECT ON embeddings TO {}").format(
            *[sql.Identifier(role)] * 2
        )
    )
    pair[1].execute("REVOKE EXECUTE ON FUNCTION cosine_distance(vector, vector) FROM PUBLIC")
    try:
        done = latency((pair[0], pair[1].as_role(role, "x")))
        assert done.verdict == "fail"
        assert "the application's search fails on main" in done.summary and "cosine_distance" in done.summary
    finally:
        pair[1].execute(sql.SQL("DROP OWNED BY {}; DROP ROLE {}").format(*[sql.Identifier(role)] * 2))


def test_table_without_vectors_has_nothing_to_time(pair: tuple[Database, Database]) -> None:
    for database in pair:
        database.execute("UPDATE embeddings SET embedding = NULL")
    done = latency(pair)
    assert (done.verdict, done.figures["clients"]) == ("pass", [])
