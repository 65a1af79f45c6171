"""Recall says what share of the exact answers an index finds, whose settings count, and what to type."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from psycopg2 import sql

from pipeline.check.recall import check_recall
from pipeline.events import CheckDone
from tests.ladders import TABLE, climb, grouped_vectors, make, random_vectors
from tests.preflights import administrate
from tests.support import Database

GOOD = "CREATE INDEX ann ON public.embeddings USING hnsw (embedding vector_cosine_ops)"
# A graph in which a search loses its way.
THIN = f"{GOOD} WITH (m = 2, ef_construction = 4)"
LISTS = "CREATE INDEX ann ON public.embeddings USING ivfflat (embedding vector_cosine_ops) WITH (lists = 40)"
DIMENSIONS = 32


@pytest.fixture
def pair(legacy: Database, empty_main: Database) -> tuple[Database, Database]:
    """Return two databases with the extension."""
    empty_main.execute("CREATE EXTENSION vector")
    return legacy, empty_main


def recall(pair: tuple[Database, Database], dimensions: int = DIMENSIONS, **options: Any) -> CheckDone:
    return climb(check_recall, *pair, dimensions, **options)


def figures(done: CheckDone, side: str = "target") -> Any:
    return done.figures[side]


def means(done: CheckDone, side: str = "target") -> dict[int, float]:
    return {step["value"]: step["mean"] for step in figures(done, side)["steps"]}


def set_for(database: Database, whom: str, setting: str) -> None:
    database.execute(sql.SQL(f"ALTER {whom} SET {setting}").format(sql.Identifier(database.name)))


def test_good_index_passes_with_its_curve(pair: tuple[Database, Database]) -> None:
    make(pair, random_vectors(2_000, DIMENSIONS))
    for database in pair:
        database.execute(GOOD)
    done = recall(pair)
    assert done.verdict == "pass"
    assert (done.figures["metric"], done.figures["knob"], done.figures["queries"]) == ("cosine", "hnsw.ef_search", 50)
    for side in ("source", "target"):
        assert figures(done, side)["options"] == {"m": 16, "ef_construction": 64}
        assert figures(done, side)["in_force"] == 40
        assert list(means(done, side)) == [40, 100, 200, 400]
        assert means(done, side)[40] > 0.95 and means(done, side)[400] == 1
        assert all(step["minimum"] <= step["p05"] <= step["mean"] for step in figures(done, side)["steps"])
    assert done.figures["recommended"] == 40
    assert "HNSW index ann finds " in done.summary and "at hnsw.ef_search = 40" in done.summary
    assert "legacy's ann finds" in done.summary


def test_thin_graph_fails_and_its_remedy_repairs_it(pair: tuple[Database, Database]) -> None:
    make(pair, random_vectors(3_000, 64))
    pair[0].execute(GOOD)
    pair[1].execute(THIN)
    done = recall(pair, 64)
    assert (done.verdict, done.figures["recommended"]) == ("fail", None)
    assert max(means(done).values()) < 0.9
    assert "it was built with m = 2, ef_construction = 4, where pgvector's own are 16 and 64" in done.summary
    remedy = done.summary.partition("; run: ")[2]
    assert remedy == (
        "ALTER INDEX public.ann SET (m = 16, ef_construction = 64); REINDEX INDEX CONCURRENTLY public.ann;"
    )
    administrate(pair[1], *(statement for statement in remedy.split(";") if statement))
    assert recall(pair, 64).verdict == "pass"


def test_larger_value_is_recommended_where_it_is_enough(pair: tuple[Database, Database]) -> None:
    make(pair, random_vectors(2_000, DIMENSIONS))
    pair[1].execute(f"{GOOD} WITH (m = 4, ef_construction = 16)")
    done = recall(pair)
    assert done.verdict == "fail"
    recommended = done.figures["recommended"]
    assert recommended in (100, 200, 400)
    assert means(done)[recommended] >= 0.9 and all(mean < 0.9 for v, mean in means(done).items() if v < recommended)
    remedy = f"ALTER DATABASE {pair[1].name} SET hnsw.ef_search = {recommended};"
    assert remedy in done.summary and "not compared with legacy, which has no such index" in done.summary
    pair[1].execute(remedy)
    done = recall(pair)
    assert (done.verdict, figures(done)["in_force"]) == ("pass", recommended)


def test_lists_made_of_no_rows_fail_and_pass_once_they_are_made_again(pair: tuple[Database, Database]) -> None:
    vectors = grouped_vectors(2_000, 64, 20, 1.0)
    for database in pair:
        database.execute(TABLE.format("vector(64)"))
        database.execute(LISTS)
        set_for(database, "DATABASE {}", "ivfflat.probes = 5")
    pair[1].execute("ALTER TABLE embeddings RENAME TO loaded")
    pair[0].execute("DROP TABLE embeddings")
    make(pair, vectors)
    pair[1].execute("INSERT INTO loaded SELECT * FROM embeddings; DROP TABLE embeddings")
    pair[1].execute("ALTER TABLE loaded RENAME TO embeddings")
    done = recall(pair, 64)
    assert done.verdict == "fail"
    assert (done.figures["knob"], figures(done)["options"]) == ("ivfflat.probes", {"lists": 40})
    assert list(means(done)) == [1, 5, 7, 10, 40]
    assert "2,000 of 2,000 rows were written after it was built: its lists = 40 are not made from them" in done.summary
    assert "; run: REINDEX INDEX CONCURRENTLY public.ann;" in done.summary
    administrate(pair[1], "REINDEX INDEX CONCURRENTLY public.ann")
    done = recall(pair, 64)
    assert (done.verdict, figures(done)["in_force"]) == ("pass", 5)


def test_too_few_probes_of_a_good_index_are_not_cured_by_building_it_again(pair: tuple[Database, Database]) -> None:
    make(pair, grouped_vectors(2_000, 64, 20, 1.0))
    pair[1].execute(LISTS)
    done = recall(pair, 64)
    assert (done.verdict, figures(done)["in_force"]) == ("fail", 1)
    assert done.summary.endswith(f"; run: ALTER DATABASE {pair[1].name} SET ivfflat.probes = 7;")


def test_value_in_force_is_that_of_the_role_that_will_search(pair: tuple[Database, Database]) -> None:
    make(pair, random_vectors(500, DIMENSIONS))
    main = pair[1]
    main.execute(GOOD)
    role = f"app_{main.name}"
    main.execute(f"CREATE ROLE {role} LOGIN")

    def in_force(**options: Any) -> Any:
        return figures(recall(pair, queries=3, **options))["in_force"]

    try:
        set_for(main, "DATABASE {}", "hnsw.ef_search = 50")
        assert (in_force(), in_force(app_role=role)) == (50, 50)
        set_for(main, f"ROLE {role}", "hnsw.ef_search = 60")
        assert (in_force(), in_force(app_role=role)) == (50, 60)
        set_for(main, f"ROLE {role} IN DATABASE {{}}", "hnsw.ef_search = 12")
        assert in_force(app_role=role) == 12
        done = recall(pair, app_role=role, k=20)
        # 12 candidates cannot give 20 rows.
        assert (done.verdict, figures(done)["steps"][0]["under_returned"]) == ("fail", 50)
        assert "50 got fewer rows than there are" in done.summary
        assert f"run: ALTER ROLE {role} IN DATABASE {main.name} SET hnsw.ef_search = 40;" in done.summary
        done = recall(pair, queries=3, app_role="no such role")
        assert figures(done)["in_force"] == 50 and 'main has no role "no such role"' in done.summary
    finally:
        main.execute(f"DROP ROLE {role}")


def test_index_that_finds_less_than_legacys_own_fails(pair: tuple[Database, Database]) -> None:
    make(pair, random_vectors(2_000, DIMENSIONS))
    pair[0].execute(GOOD)
    # A graph's levels are drawn anew by each build: of forty like this one all found 0.86 to 0.93 at 40, and at 400
    # 0.996 and more, where m = 4 may stay below legacy's at every value.
    pair[1].execute(f"{GOOD} WITH (m = 6, ef_construction = 16)")
    done = recall(pair, min_recall=0.3)
    assert done.verdict == "fail"
    assert 0.3 < means(done)[40] < means(done, "source")[40] - 0.02
    recommended: Any = done.figures["recommended"]
    assert means(done)[recommended] >= means(done, "source")[40] - 0.02
    assert f"run: ALTER DATABASE {pair[1].name} SET hnsw.ef_search = {recommended};" in done.summary
    pair[0].execute("DROP INDEX ann")
    done = recall(pair, min_recall=0.3)
    assert (done.verdict, done.figures["source"]) == ("pass", None)


def test_without_index_or_rows_there_is_nothing_to_find_wrong(pair: tuple[Database, Database]) -> None:
    make(pair, random_vectors(50, DIMENSIONS))
    done = recall(pair)
    assert (done.verdict, done.summary) == ("pass", "main has no ANN index: every search is exact")
    for database in pair:
        database.execute(f"DELETE FROM embeddings; {GOOD}")
    done = recall(pair)
    assert (done.verdict, done.figures["queries"]) == ("pass", 0)
    assert done.summary == "no row of the source has an embedding that could be asked for"


def test_rows_without_direction_are_no_answers_that_an_index_misses(pair: tuple[Database, Database]) -> None:
    make(pair, random_vectors(30, DIMENSIONS))
    for database in pair:
        database.execute(
            "INSERT INTO embeddings SELECT 1000 + i, 'x', NULL,"
            f" CASE WHEN i % 2 = 0 THEN array_fill(0::real, ARRAY[{DIMENSIONS}])::vector END"
            " FROM generate_series(1, 10) AS i"
        )
        database.execute(GOOD)
    done = recall(pair, k=50)
    assert done.verdict == "pass"
    assert figures(done)["steps"][0] | {"value": 40} == {
        **dict.fromkeys(("mean", "minimum", "p05"), 1.0),
        "value": 40,
        "under_returned": 0,
        "queries": 30,
    }


def test_equal_distances_count_whichever_row_comes(pair: tuple[Database, Database]) -> None:
    vectors = random_vectors(200, DIMENSIONS)
    # Each forty times: ten of them are any ten.
    vectors[:] = vectors[[i % 5 for i in range(200)]]
    make(pair, vectors)
    for database in pair:
        database.execute(GOOD)
    assert set(means(recall(pair)).values()) == {1.0}


def test_budget_ends_the_check_and_the_number_reached_is_said(pair: tuple[Database, Database]) -> None:
    make(pair, random_vectors(300, DIMENSIONS))
    for database in pair:
        database.execute(GOOD)
    done = recall(pair, budget_seconds=0.0)
    assert (done.verdict, done.figures["queries"], len(figures(done)["steps"])) == ("pass", 1, 1)
    assert "(1 query, the worst" in done.summary


@pytest.mark.parametrize("kind", ["cast", "partition", "schema", "l2"])
def test_every_kind_of_index_is_searched(
    pair: tuple[Database, Database], new_database: Callable[..., Database], kind: str
) -> None:
    vectors = random_vectors(600, DIMENSIONS)
    if kind == "schema":
        pair = new_database("16"), new_database("18")
        for database in pair:
            database.execute("CREATE SCHEMA extensions; CREATE EXTENSION vector SCHEMA extensions")
        make(pair, vectors, schema="extensions")
        index = GOOD.replace("vector_", "extensions.vector_")
    else:
        make(pair, vectors)
        index = {
            "cast": GOOD.replace("embedding vector_", f"(embedding::halfvec({DIMENSIONS})) halfvec_"),
            "partition": GOOD,
            "l2": GOOD.replace("cosine", "l2"),
        }[kind]
    if kind == "partition":
        pair[0].execute("ALTER TABLE embeddings RENAME TO whole")
        pair[0].execute(
            "CREATE TABLE embeddings (LIKE whole, PRIMARY KEY (id)) PARTITION BY HASH (id);"
            "CREATE TABLE part0 PARTITION OF embeddings FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
            "CREATE TABLE part1 PARTITION OF embeddings FOR VALUES WITH (MODULUS 2, REMAINDER 1);"
            "INSERT INTO embeddings SELECT * FROM whole; ANALYZE embeddings"
        )
    for database in pair:
        database.execute(index)
    done = recall(pair)
    assert done.verdict == "pass"
    assert done.figures["metric"] == ("l2" if kind == "l2" else "cosine")
    for side in ("source", "target"):
        assert figures(done, side)["index"] == "ann" and means(done, side)[400] > 0.99


def test_old_pgvector_is_measured_without_what_it_does_not_have(
    new_database: Callable[..., Database], empty_main: Database
) -> None:
    old = new_database("16.2")
    for database in (old, empty_main):
        database.execute("CREATE EXTENSION vector")
    make((old, empty_main), random_vectors(600, DIMENSIONS))
    for database in (old, empty_main):
        database.execute(GOOD)
    set_for(empty_main, "DATABASE {}", "hnsw.iterative_scan = strict_order")
    done = recall((old, empty_main))
    assert done.verdict == "pass"
    assert means(done, "source")[400] > 0.99


def test_vector_of_another_type_is_measured_as_what_is_carried(pair: tuple[Database, Database]) -> None:
    make(pair[:1], random_vectors(600, DIMENSIONS), f"halfvec({DIMENSIONS})")
    pair[0].execute(GOOD.replace("vector_cosine", "halfvec_cosine"))
    pair[1].execute(TABLE.format(f"vector({DIMENSIONS})"))
    rows = pair[0].rows("SELECT id, content, metadata::text, embedding::text FROM embeddings")
    with pair[1].cursor() as cursor:
        cursor.executemany("INSERT INTO embeddings VALUES (%s, %s, %s, %s)", rows)
    pair[1].execute(GOOD)
    done = recall(pair)
    assert done.verdict == "pass"
    assert min(means(done, "source").values()) > 0.95


def test_planner_of_a_role_is_overruled_and_settings_of_search_are_not(pair: tuple[Database, Database]) -> None:
    make(pair, random_vectors(500, DIMENSIONS))
    pair[1].execute(GOOD)
    change = partial(set_for, pair[1], "DATABASE {}")
    change("enable_indexscan = off")
    change("hnsw.ef_search = 5")
    assert recall(pair, k=20).verdict == "fail"
    # A scan that goes on finds all of them, at 5 too.
    change("hnsw.iterative_scan = strict_order")
    assert figures(recall(pair, k=20))["steps"][0]["under_returned"] == 0
