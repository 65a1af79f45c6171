"""The census of both sides: equal for equal rows whatever their types, and every figure differs by what was planted."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pipeline.check.censuses import check_census
from pipeline.check.ladder import Ladder
from pipeline.check.pair import read_pair
from pipeline.events import CheckDone
from pipeline.options import VerifyOptions
from pipeline.postgres.crew import Crew
from pipeline.postgres.tables import describe
from pipeline.settings import Route, TableMapping
from tests.data import fill, load
from tests.preflights import ZERO, route
from tests.support import Database, environment, pipeline

DIMENSIONS = 768
COUNTS = (
    *("rows", "null_embeddings", "zero_norms", "not_finite"),
    *("duplicate_groups", "duplicate_rows", "null_contents", "null_metadata"),
)


def census_of(way: Route, *, set_aside: bool = False) -> CheckDone:
    with Crew() as crew, crew.session(way.source, "test") as source, crew.session(way.target, "test") as target:
        pair = read_pair(crew, source, target, way, to_write=False, set_aside=set_aside)
        return check_census(crew, Ladder(route=way, pair=pair, options=VerifyOptions(settle_seconds=0.0)))


def figures(done: CheckDone, side: str) -> dict[str, Any]:
    found = done.figures[side]
    assert isinstance(found, dict)
    return found


def figures_that_differ(done: CheckDone) -> list[str]:
    found = done.figures["differences"]
    assert isinstance(found, list)
    return found


@pytest.fixture
def both(new_database: Callable[..., Database]) -> tuple[Database, Database]:
    """Return two databases, 16 and 18, with the same hundred real rows."""
    databases = (new_database("16"), new_database("18"))
    for database in databases:
        database.execute("CREATE EXTENSION vector")
        fill(database, load("nomic768"))
    return databases


@pytest.mark.parametrize("name", ["nomic768", "google768"])
def test_equal_tables_are_alike_on_both_servers(name: str, new_database: Callable[..., Database]) -> None:
    data, databases = load(name), (new_database("16.2"), new_database("18"))
    for database in databases:
        database.execute("CREATE EXTENSION vector")
        rows = fill(database, data)
    done = census_of(replace(route(*databases), dimensions=data.dimensions))
    assert (done.name, done.verdict, done.figures["differences"]) == ("census", "pass", [])
    assert done.summary.startswith(f"{rows:,} rows alike on both sides, {data.dimensions} dimensions, norms ")
    mine, theirs = figures(done, "source"), figures(done, "target")
    assert {key: mine[key] for key in COUNTS} == {key: theirs[key] for key in COUNTS}
    assert (mine["rows"], mine["dimensions"]) == (rows, [[data.dimensions, rows]])
    for side in (mine, theirs):
        quantiles, norms = side["norm_quantiles"], side["norms"]
        assert len(quantiles) == 21
        assert quantiles == sorted(quantiles)
        named = [norms[key] for key in ("minimum", "p05", "median", "p95", "maximum")]
        assert named == [quantiles[place] for place in (0, 1, 10, 19, 20)]
    assert mine["norm_quantiles"] == pytest.approx(theirs["norm_quantiles"], rel=1e-6)


# What is done to some rows of main, what differs then, and what the summary says.
PLANTED = {
    "row missing": ("DELETE FROM public.embeddings WHERE id = %s::uuid", {"rows"}, "rows: {rows} on the source, "),
    "vector gone": (
        "UPDATE public.embeddings SET embedding = NULL WHERE id = %s::uuid",
        {"null_embeddings", "dimensions"},
        "rows without an embedding: 0 on the source, 1 on the target",
    ),
    "vector of zeros": (
        f"UPDATE public.embeddings SET embedding = '{ZERO}' WHERE id = %s::uuid",
        {"zero_norms", "norm_quantiles"},
        "vectors of zero length: 0 on the source, 1 on the target",
    ),
    "all a little longer": (
        "UPDATE public.embeddings SET embedding = (SELECT array_agg(x * 1.00001) FROM unnest(embedding::real[]) x)"
        "::vector WHERE id <> %s::uuid",
        {"norm_quantiles"},
        "norms: at ",
    ),
    "vector of another row": (
        "UPDATE public.embeddings t SET embedding = o.embedding FROM public.embeddings o"
        " WHERE t.id = %s::uuid AND o.id = (SELECT max(id::text)::uuid FROM public.embeddings)",
        {"duplicate_groups", "duplicate_rows"},
        "rows that share their vector: ",
    ),
    "content gone": (
        "UPDATE public.embeddings SET content = NULL WHERE id = %s::uuid",
        {"null_contents"},
        "rows without content: 0 on the source, 1 on the target",
    ),
    "metadata gone": (
        "UPDATE public.embeddings SET metadata = NULL WHERE id = %s::uuid",
        {"null_metadata"},
        "rows without metadata: 0 on the source, 1 on the target",
    ),
}


@pytest.mark.parametrize("case", PLANTED)
def test_planted_difference_is_named_with_both_figures(case: str, both: tuple[Database, Database]) -> None:
    statement, differ, words = PLANTED[case]
    rows = both[1].value("SELECT count(*) FROM public.embeddings")
    first = both[1].value("SELECT min(id::text) FROM public.embeddings")
    both[1].execute(statement, first)
    done = census_of(route(*both))
    differences = figures_that_differ(done)
    assert done.verdict == "fail"
    assert differ <= set(differences)
    assert words.format(rows=rows) in done.summary
    mine, theirs = figures(done, "source"), figures(done, "target")
    for name in (*COUNTS, "dimensions"):
        assert (mine[name] != theirs[name]) == (name in differences), name


def test_other_dimensions_are_named(both: tuple[Database, Database]) -> None:
    way = route(*both)
    both[1].execute("ALTER TABLE public.embeddings ALTER COLUMN embedding TYPE vector")
    assert census_of(way).verdict == "pass"
    both[1].execute(
        "UPDATE public.embeddings SET embedding = '[3,4]' WHERE id = (SELECT min(id::text)::uuid FROM embeddings)"
    )
    done = census_of(way)
    rows = figures(done, "source")["rows"]
    assert (
        f"dimensions: 768 ({rows} rows) on the source, 768 ({rows - 1} rows), 2 (1 row) on the target" in done.summary
    )
    assert figures(done, "target")["dimensions"] == [[768, rows - 1], [2, 1]]


def test_rounded_vectors_are_looked_at_as_they_are_carried(both: tuple[Database, Database]) -> None:
    way = replace(route(*both), rounding=True)
    both[1].execute("ALTER TABLE public.embeddings ALTER COLUMN embedding TYPE halfvec(768) USING embedding::halfvec")
    exact = census_of(way)
    assert (exact.verdict, exact.figures["differences"]) == ("pass", [])
    assert figures(exact, "source")["norm_quantiles"] == pytest.approx(figures(exact, "target")["norm_quantiles"])
    # The source's own vectors are of other lengths than their rounded form.
    stored = both[0].value("SELECT max(vector_norm(embedding)) FROM public.embeddings")
    assert figures(exact, "source")["norms"]["maximum"] != pytest.approx(stored, rel=1e-9)
    both[1].execute(
        "UPDATE public.embeddings SET embedding = (SELECT array_agg(2 * x) FROM unnest(embedding::vector::real[]) x)"
        "::halfvec"
    )
    assert census_of(way).figures["differences"] == ["norm_quantiles"]


def test_half_vectors_that_became_vectors_are_alike(both: tuple[Database, Database]) -> None:
    both[0].execute("ALTER TABLE public.embeddings ALTER COLUMN embedding TYPE halfvec(768) USING embedding::halfvec")
    both[1].execute("UPDATE public.embeddings SET embedding = embedding::halfvec::vector")
    assert census_of(route(*both)).verdict == "pass"


def test_view_is_read_like_a_table(both: tuple[Database, Database]) -> None:
    both[0].execute(
        "ALTER TABLE public.embeddings RENAME TO store; CREATE VIEW public.embeddings AS SELECT * FROM public.store"
    )
    assert census_of(route(*both)).verdict == "pass"


def test_rows_that_are_left_out_stay_out(both: tuple[Database, Database]) -> None:
    both[0].execute(
        "ALTER TABLE public.embeddings ALTER COLUMN embedding TYPE vector;"
        "INSERT INTO public.embeddings (content, embedding) VALUES ('other', '[1,2]')"
    )
    done = census_of(route(*both), set_aside=True)
    assert (done.verdict, figures(done, "source")["dimensions"]) == ("pass", figures(done, "target")["dimensions"])


def test_column_that_stays_behind_is_not_compared_and_the_summary_says_so(both: tuple[Database, Database]) -> None:
    both[1].execute("UPDATE public.embeddings SET content = NULL")
    way = replace(route(*both), ignore_columns=("content",))
    done = census_of(way)
    assert (done.verdict, figures(done, "target")["null_contents"]) == ("pass", None)
    assert done.summary.endswith("; not compared: content")


def test_empty_tables_are_alike(legacy: Database, main: Database) -> None:
    fill(legacy, load("nomic768"))
    legacy.execute("TRUNCATE public.embeddings")
    done = census_of(route(legacy, main))
    assert (done.verdict, done.summary) == ("pass", "both tables are empty")
    assert figures(done, "source")["norm_quantiles"] is None


def test_target_without_vectors_differs_in_its_norms(legacy: Database, main: Database) -> None:
    fill(legacy, load("nomic768"))
    done = census_of(route(legacy, main))
    assert done.verdict == "fail"
    assert {"rows", "dimensions", "norm_quantiles"} <= set(figures_that_differ(done))
    assert done.summary.startswith("rows: ")
    assert done.summary.endswith(" more figures: pipeline diff names the rows")
    main.execute("INSERT INTO public.embeddings (content, metadata) SELECT '', '{}' FROM generate_series(1, 95)")
    legacy.execute("DELETE FROM public.embeddings WHERE id NOT IN (SELECT id FROM public.embeddings LIMIT 95)")
    assert "norms: none on the target" in census_of(route(legacy, main)).summary


def test_side_that_the_role_may_not_read_whole_is_partial(both: tuple[Database, Database]) -> None:
    legacy, role = both[0], f"reader_{both[0].name}"
    legacy.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'r'; GRANT SELECT ON public.embeddings TO {role}")
    try:
        way = route(legacy.as_role(role, "r"), both[1])
        with Crew() as crew, crew.session(way.source, "test") as source, crew.session(way.target, "test") as target:
            pair = read_pair(crew, source, target, way, to_write=False)
            legacy.execute("ALTER TABLE public.embeddings ENABLE ROW LEVEL SECURITY")
            pair = replace(pair, source=describe(source, TableMapping()))
            done = check_census(crew, Ladder(route=way, pair=pair, options=VerifyOptions(settle_seconds=0.0)))
        assert done.verdict == "partial"
        assert f"legacy: row-level security hides rows of public.embeddings from the role {role}" in done.summary
        assert done.figures["source"] is None
        assert figures(done, "target")["rows"] > 0
    finally:
        legacy.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_copied_table_is_alike(legacy: Database, main: Database) -> None:
    fill(legacy, load("google768"))
    pipeline("copy", env=environment(legacy=legacy, main=main)).expect(0)
    assert census_of(route(legacy, main)).verdict == "pass"
