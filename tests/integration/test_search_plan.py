"""The plan check says whether the application's search can use an index, and what a metadata filter does to it."""

from collections.abc import Callable
from typing import Any

import pytest

from pipeline.check.searchplan import check_plan
from pipeline.events import CheckDone
from tests.ladders import climb, make, random_vectors
from tests.preflights import administrate
from tests.support import Database

DIMENSIONS = 32
HNSW = "CREATE INDEX ann ON public.embeddings USING hnsw (embedding vector_cosine_ops)"


@pytest.fixture
def pair(legacy: Database, empty_main: Database) -> tuple[Database, Database]:
    """Return two databases with the same 2,000 rows."""
    empty_main.execute("CREATE EXTENSION vector")
    make((legacy, empty_main), random_vectors(2_000, DIMENSIONS))
    return legacy, empty_main


def plan(pair: tuple[Database, Database], dimensions: int = DIMENSIONS, **options: Any) -> CheckDone:
    return climb(check_plan, *pair, dimensions, **options)


def change(database: Database, setting: str) -> None:
    database.execute(" ".join(("ALTER DATABASE", database.name, "SET", setting)))


def figures(done: CheckDone) -> Any:
    return done.figures


def test_index_that_fits_is_used(pair: tuple[Database, Database]) -> None:
    pair[1].execute(HNSW)
    done = plan(pair)
    assert done.verdict == "pass"
    assert done.summary.startswith("the application's search uses HNSW index ann (vector_cosine_ops)")
    found = figures(done)
    assert {name: found[name] for name in ("index", "method", "opclass", "metric", "used")} == {
        "index": "ann",
        "method": "hnsw",
        "opclass": "vector_cosine_ops",
        "metric": "cosine",
        "used": True,
    }
    assert found["plan"] == "Limit\n  -> Index Scan using ann on embeddings"
    assert found["settings"]["source"] == found["settings"]["target"]
    assert found["settings"]["target"]["hnsw.ef_search"] == "40"
    assert found["settings"]["target"]["ivfflat.probes"] == "1"


def test_scan_of_a_small_table_is_right(pair: tuple[Database, Database]) -> None:
    pair[1].execute("DELETE FROM embeddings WHERE id > 60; ANALYZE embeddings")
    pair[1].execute(HNSW)
    done = plan(pair, k=40)
    assert (done.verdict, done.figures["used"], done.figures["index"]) == ("pass", False, "ann")
    assert "the planner still scans main's table" in done.summary and "Seq Scan on embeddings" in str(
        done.figures["plan"]
    )


def test_table_without_index_passes_and_the_lost_one_is_named(pair: tuple[Database, Database]) -> None:
    done = plan(pair)
    assert (done.verdict, done.summary, done.figures["index"]) == (
        *("pass", "main has no ANN index: every search is exact", None),
    )
    pair[0].execute(HNSW)
    done = plan(pair)
    assert done.verdict == "pass"
    assert done.figures["advice"] == [
        "legacy has an ANN index, main has none:"
        " CREATE INDEX ON public.embeddings USING hnsw (embedding vector_cosine_ops);"
    ]


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (
            "CREATE INDEX ann ON embeddings USING hnsw (embedding vector_l2_ops)",
            "its vector_l2_ops is for another distance than cosine (<=>)",
        ),
        (
            "CREATE INDEX ann ON embeddings USING hnsw ((embedding::halfvec(32)) halfvec_cosine_ops)",
            "it is on ((embedding)::public.halfvec(32)), and the search orders by the column",
        ),
        (f"{HNSW} WHERE content IS NOT NULL", "it holds only some of the rows"),
        (
            "CREATE INDEX ann ON embeddings USING hnsw ((binary_quantize(embedding)::bit(32)) bit_hamming_ops)",
            "its bit_hamming_ops is for another distance",
        ),
    ],
)
def test_index_that_can_never_serve_fails_until_another_can(
    index: str, reason: str, pair: tuple[Database, Database]
) -> None:
    pair[1].execute(index)
    done = plan(pair)
    assert (done.verdict, done.figures["used"]) == ("fail", False)
    assert done.summary.startswith("the application's search can never use HNSW index ann: ") and reason in done.summary
    pair[1].execute(done.summary.partition("; run: ")[2])
    done = plan(pair)
    assert (done.verdict, done.figures["used"], done.figures["opclass"]) == ("pass", True, "vector_cosine_ops")


def test_invalid_index_fails_and_its_remedy_repairs_it(pair: tuple[Database, Database]) -> None:
    pair[1].execute(HNSW)
    # What a cancelled CREATE INDEX CONCURRENTLY leaves.
    pair[1].execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ann'::regclass")
    done = plan(pair)
    assert (done.verdict, "it is not valid" in done.summary) == ("fail", True)
    administrate(pair[1], done.summary.partition("; run: ")[2])
    assert plan(pair).figures["used"] is True


def test_index_on_a_column_without_dimension_fails_as_the_client_never_uses_it(
    pair: tuple[Database, Database],
) -> None:
    for database in pair:
        database.execute("ALTER TABLE embeddings ALTER COLUMN embedding TYPE vector")
    pair[1].execute("CREATE INDEX ann ON embeddings USING hnsw ((embedding::vector(32)) vector_cosine_ops)")
    done = plan(pair)
    assert done.verdict == "fail"
    assert "ALTER TABLE public.embeddings ALTER COLUMN embedding TYPE vector(32); CREATE INDEX" in done.summary
    administrate(pair[1], *(one for one in done.summary.partition("; run: ")[2].split(";") if one.strip()))
    assert plan(pair).verdict == "pass"


def test_more_dimensions_than_an_index_of_the_column_can_have_pass_and_say_so(
    legacy: Database, empty_main: Database
) -> None:
    empty_main.execute("CREATE EXTENSION vector")
    make((legacy, empty_main), random_vectors(20, 3_000))
    empty_main.execute("CREATE INDEX ann ON embeddings USING hnsw ((embedding::halfvec(3000)) halfvec_cosine_ops)")
    done = plan((legacy, empty_main), 3_000)
    assert done.verdict == "pass"
    assert "an index on 3,000 dimensions of the type vector cannot be" in done.summary


def test_settings_that_differ_are_named_with_their_places(pair: tuple[Database, Database]) -> None:
    pair[1].execute(HNSW)
    change(pair[0], "hnsw.ef_search = 200")
    done = plan(pair)
    (advice,) = (one for one in figures(done)["advice"] if "ef_search" in one)
    assert advice == (
        "hnsw.ef_search is 200 on legacy (database), 40 on main;"
        f" to have the same: ALTER DATABASE {pair[1].name} SET hnsw.ef_search = 200;"
    )
    change(pair[1], "hnsw.ef_search = 200")
    assert figures(plan(pair))["settings"]["target"]["hnsw.ef_search"] == "200"
    assert not [one for one in figures(plan(pair))["advice"] if "ef_search" in one]


def test_filter_that_an_index_does_not_satisfy_is_advice_with_its_remedy(pair: tuple[Database, Database]) -> None:
    for database in pair:
        database.execute(HNSW)
    done = plan(pair)
    found = figures(done)["filter"]
    assert done.verdict == "pass"
    assert (found["key"], found["matching_rows"], found["exact"], found["found"]) == ("n", 1, 1, 0)
    assert (found["used"], found["found_now"]) == (False, 1)
    assert figures(done)["advice"][0].startswith("filtered by 'n', a search finds 0 of 1 rows where HNSW index ann")
    assert found["remedy"] == f"ALTER DATABASE {pair[1].name} SET hnsw.iterative_scan = strict_order;"
    administrate(pair[1], found["remedy"])
    found = figures(plan(pair))["filter"]
    assert (found["found"], found["exact"], found["remedy"]) == (1, 1, None)


def test_filter_that_only_legacy_satisfies_fails(pair: tuple[Database, Database]) -> None:
    for database in pair:
        database.execute(HNSW)
        # As on a table so large that its planner takes the index.
        change(database, "enable_seqscan = off")
    change(pair[0], "hnsw.iterative_scan = strict_order")
    done = plan(pair)
    found = figures(done)["filter"]
    assert done.verdict == "fail"
    assert (found["found"], found["found_now"], found["found_on_source"], found["used"]) == (0, 0, 1, True)
    assert f"run: ALTER DATABASE {pair[1].name} SET hnsw.iterative_scan = strict_order;" in done.summary
    change(pair[0], "hnsw.iterative_scan = off")
    # Where legacy finds as little it is no failure of the move.
    assert plan(pair).verdict == "pass"


def test_lists_are_looked_through_further_in_their_own_way(pair: tuple[Database, Database]) -> None:
    pair[1].execute("CREATE INDEX ann ON embeddings USING ivfflat (embedding vector_cosine_ops) WITH (lists = 40)")
    found = figures(plan(pair))["filter"]
    assert (found["found"], found["exact"]) == (0, 1)
    administrate(pair[1], found["remedy"])
    assert "SET ivfflat.iterative_scan = relaxed_order;" in found["remedy"]
    assert figures(plan(pair))["filter"]["found"] == 1


@pytest.mark.parametrize(
    "metadata", ["NULL", "'[1, 2]'", "'3'", "'{}'", """'{"tags": ["a"]}'""", """'{"kind": "same"}'"""]
)
def test_metadata_that_no_filter_can_be_made_of_are_passed_over(metadata: str, pair: tuple[Database, Database]) -> None:
    pair[1].execute(f"UPDATE embeddings SET metadata = {metadata}; ANALYZE embeddings")
    pair[1].execute(HNSW)
    done = plan(pair)
    assert (done.verdict, done.figures["filter"]) == ("pass", None)


def test_extension_in_a_schema_of_its_own_and_odd_names(new_database: Callable[..., Database]) -> None:
    pair = new_database("16"), new_database("18")
    for database in pair:
        database.execute("CREATE SCHEMA extensions; CREATE EXTENSION vector SCHEMA extensions")
    make(pair, random_vectors(2_000, DIMENSIONS), schema="extensions")
    for database in pair:
        database.execute(
            'CREATE INDEX "an ""odd"" name" ON embeddings USING hnsw (embedding extensions.vector_cosine_ops)'
        )
    done = plan(pair)
    assert (done.verdict, done.figures["used"], done.figures["index"]) == ("pass", True, 'an "odd" name')
    assert figures(done)["filter"]["found"] == 0


def test_old_pgvector_is_compared_by_what_both_have(
    new_database: Callable[..., Database], empty_main: Database
) -> None:
    old = new_database("16.2")
    for database in (old, empty_main):
        database.execute("CREATE EXTENSION vector")
    make((old, empty_main), random_vectors(2_000, DIMENSIONS))
    for database in (old, empty_main):
        database.execute(HNSW)
    change(empty_main, "enable_seqscan = off")
    done = plan((old, empty_main))
    assert "hnsw.iterative_scan" not in figures(done)["settings"]["source"]
    # Its planner scans, and finds all of it.
    assert (done.verdict, figures(done)["filter"]["found_on_source"]) == ("fail", 1)
    change(old, "enable_seqscan = off")
    assert plan((old, empty_main)).verdict == "pass"
