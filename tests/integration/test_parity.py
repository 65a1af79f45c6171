"""Parity: equal tables answer alike, whatever their vectors, and what search would notice is found and named."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pipeline.check.baseline import BaselineDone, CaptureOptions, capture
from pipeline.check.ladder import Exact, Ladder
from pipeline.check.neighbours import (
    OPERATORS,
    Excluded,
    TimeUpError,
    count_excluded,
    exact_neighbours,
    sample_queries,
)
from pipeline.check.pair import read_pair
from pipeline.check.parity import check_parity
from pipeline.events import CheckDone
from pipeline.options import VerifyOptions
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Session
from pipeline.postgres.tables import describe
from pipeline.settings import Settings
from tests import moves
from tests.data import TABLE_SQL, fill, load
from tests.moves import Move
from tests.support import Database, environment, pipeline

NewMove = Callable[..., Move]
# Vectors of several lengths, in all directions of the room.
FILL = """INSERT INTO public.embeddings (id, content, metadata, embedding)
    SELECT md5('row' || i)::uuid, 'text ' || i, '{}',
           ARRAY[sin(i * 0.37) * (1 + mod(i, 3)), cos(i * 1.7), sin(i * 1.0 * i) * 2]::real[]::"""


def parity(move: Move, **options: Any) -> tuple[CheckDone, Ladder]:
    """Run the check alone, and return the ladder that it leaves."""
    route = Settings.load(environ=move.env).route("legacy", "main")
    with Crew() as crew:

        def work() -> tuple[CheckDone, Ladder]:
            with crew.together((route.source, "verify"), (route.target, "verify")) as (source, target):
                pair = read_pair(crew, source, target, route, to_write=False)
            ladder = Ladder(route=route, pair=pair, options=VerifyOptions(**options))
            return check_parity(crew, ladder), ladder

        return crew.call(work)


def captured(move: Move, **options: Any) -> BaselineDone:
    route = Settings.load(environ=move.env).route("legacy", "main")
    *_, done = capture(route, CaptureOptions(**options))
    assert isinstance(done, BaselineDone)
    return done


def filled(move: Move, rows: int = 300, vector: str = "vector") -> Move:
    for database in (move.legacy, move.main):
        database.execute(FILL + vector + " FROM generate_series(1, %s) AS i", rows)
    return move


@pytest.fixture
def move(new_move: NewMove) -> Move:
    """Return a move whose two tables hold the same 300 rows; the index on main is by cosine."""
    return filled(new_move(TABLE_SQL.format(3), ""))


def figures(done: CheckDone) -> Any:
    return done.figures


@pytest.mark.parametrize("name", ["nomic768", "google768"])
def test_equal_tables_answer_alike_and_as_every_distance_says(
    name: str, legacy: Database, new_database: Callable[..., Database], main_template: Callable[[int], str]
) -> None:
    data = load(name)
    fill(legacy, data)
    main = new_database("18", main_template(data.dimensions))
    env = environment(legacy=legacy, main=main, EMBEDDING_DIMENSIONS=str(data.dimensions))
    pipeline("copy", env=env).expect(0)
    done, ladder = parity(Move(legacy=legacy, main=main, table="embeddings", env=env))
    assert done.verdict == "pass", done.summary
    assert done.summary == "50 stored vectors find the same 10 nearest rows on both sides"
    assert figures(done)["metrics"] == {"cosine": {"queries": 50, "asked": 50, "disagreements": []}}
    assert figures(done)["excluded"] == {side: {"nulls": 0, "not_a_number": 0} for side in ("source", "target")}
    exact = ladder.exact["cosine"]
    assert len(exact.queries) == len(exact.source) == len(exact.target) == 50
    unit = data.vectors.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    places = {row["id"]: place for place, row in enumerate(data.rows)}
    for query, source, target in zip(exact.queries, exact.source, exact.target, strict=True):
        distances = 1 - unit @ unit[places[query.key]]
        wanted = np.sort(distances)[:10]
        for answer in (source, target):
            assert [one.distance for one in answer] == pytest.approx(wanted, abs=1e-5)
            assert [distances[places[one.key]] for one in answer] == pytest.approx(wanted, abs=1e-5)


def test_swapped_vectors_are_answered_differently_by_every_query(move: Move) -> None:
    move.main.execute(
        "WITH numbered AS (SELECT id, embedding, row_number() OVER (ORDER BY id) AS n, count(*) OVER () AS total"
        " FROM public.embeddings) UPDATE public.embeddings AS a SET embedding = b.embedding FROM numbered AS me"
        " JOIN numbered AS b ON b.n = me.n % me.total + 1 WHERE a.id = me.id"
    )
    done, _ = parity(move)
    assert done.verdict == "fail"
    assert len(figures(done)["disagreements"]) == figures(done)["queries"] == 50
    assert {one["metric"] for one in figures(done)["disagreements"]} == {"cosine"}
    assert done.summary.startswith("50 of 50 queries are answered differently, the first: ")


def test_one_vector_that_moved_is_named_by_its_own_query(move: Move) -> None:
    key = str(move.main.value("SELECT id FROM public.embeddings ORDER BY id LIMIT 1"))
    move.main.execute("UPDATE public.embeddings SET embedding = '[9, -9, 9]' WHERE id = %s", key)
    done, _ = parity(move, queries=300)
    assert done.verdict == "fail"
    wrong = {one["query"] for one in figures(done)["disagreements"]}
    assert key in wrong
    assert 0 < len(wrong) < 300


def test_ties_at_the_last_rank_may_be_broken_by_each_side_in_its_way(new_move: NewMove) -> None:
    # More rows in one direction than are asked for; on main of another length each, by which the last bit
    # of their distances differs.
    move = new_move(TABLE_SQL.format(3), "")
    for database, length in ((move.legacy, "1"), (move.main, "1 / (0.3 + i)")):
        database.execute(
            "INSERT INTO public.embeddings SELECT md5('row' || i)::uuid, '', '{}',"
            f" ARRAY[0.1 * {length}, 0.2 * {length}, 0.3 * {length}]::real[]::vector FROM generate_series(1, 40) AS i"
        )
    done, ladder = parity(move, k=5)
    assert done.verdict == "pass", done.summary
    exact = ladder.exact["cosine"]
    answers = list(zip(exact.source, exact.target, strict=True))
    assert any({one.key for one in source} != {one.key for one in target} for source, target in answers)


def test_rows_without_a_direction_are_excluded_and_counted(move: Move) -> None:
    for database in (move.legacy, move.main):
        database.execute("UPDATE public.embeddings SET embedding = NULL WHERE id = md5('row1')::uuid")
        database.execute(
            "UPDATE public.embeddings SET embedding = '[0, 0, 0]' WHERE id IN (md5('row2')::uuid, md5('row3')::uuid)"
        )
    done, ladder = parity(move, queries=1_000, k=1_000)
    assert done.verdict == "pass"
    assert figures(done)["excluded"] == {side: {"nulls": 1, "not_a_number": 2} for side in ("source", "target")}
    # Every vector but those is asked for, and finds all others.
    assert figures(done)["queries"] == 297
    assert {len(answer) for answer in (*ladder.exact["cosine"].source, *ladder.exact["cosine"].target)} == {297}


def test_queries_are_drawn_also_where_hardly_any_vector_has_a_direction(move: Move) -> None:
    for database in (move.legacy, move.main):
        database.execute(FILL + "vector FROM generate_series(301, 3000) AS i")
        database.execute("UPDATE public.embeddings SET embedding = '[0, 0, 0]' WHERE id <> md5('row7')::uuid")
    done, ladder = parity(move)
    assert (done.verdict, figures(done)["queries"]) == ("pass", 1)
    assert [len(answer) for answer in ladder.exact["cosine"].target] == [1]


def test_empty_table_passes_and_says_that_nothing_could_be_asked_for(new_move: NewMove) -> None:
    done, ladder = parity(new_move(TABLE_SQL.format(3), ""))
    assert (done.verdict, done.summary) == ("pass", "no row of the source has an embedding that could be asked for")
    assert ladder.exact["cosine"] == Exact(queries=[], source=[], target=[])


def test_the_metric_of_the_index_is_asked_for_besides_cosine(move: Move) -> None:
    move.main.execute(
        "DROP INDEX IF EXISTS public.embeddings_embedding_idx;"
        " CREATE INDEX ON public.embeddings USING hnsw (embedding vector_l2_ops)"
    )
    done, ladder = parity(move)
    assert done.verdict == "pass"
    assert set(figures(done)["metrics"]) == set(ladder.exact) == {"cosine", "l2"}
    assert done.summary == "50 stored vectors find the same 10 nearest rows on both sides, by cosine and l2"
    # Longer, in the same direction: by cosine nothing is another.
    move.main.execute(
        "UPDATE public.embeddings SET embedding = (SELECT array_agg(x * 1.5)"
        " FROM unnest(embedding::real[]) AS x)::vector"
    )
    done, _ = parity(move)
    assert done.verdict == "fail"
    metrics = figures(done)["metrics"]
    assert (metrics["cosine"]["disagreements"], len(metrics["l2"]["disagreements"])) == ([], 50)
    assert {one["metric"] for one in figures(done)["disagreements"]} == {"l2"}
    assert "the first by l2: " in done.summary


@pytest.mark.parametrize("kind", ["vector", "halfvec", "sparsevec"])
@pytest.mark.parametrize("metric", OPERATORS)
def test_one_scan_finds_what_the_server_itself_finds_for_each_query(kind: str, metric: str, legacy: Database) -> None:
    legacy.execute(TABLE_SQL.format(3).replace("vector(3)", f"{kind}(3)"))
    legacy.execute(FILL + f"vector::{kind} FROM generate_series(1, 5000) AS i")
    # Another kind of rows, far from the others and all the same, in the first pages.
    legacy.execute(
        f"UPDATE public.embeddings SET embedding = '[-5, -5, -5]'::vector::{kind} WHERE metadata = '{{}}'"
        " AND id < '20000000-0000-0000-0000-000000000000'"
    )
    settings = Settings.load(environ=environment(legacy=legacy))
    with Session(settings.endpoint("legacy"), "test") as session:
        table = describe(session, settings.table)
        queries = sample_queries(session, table, settings.table, 120)
        assert len(queries) == 120
        found = exact_neighbours(session, table, settings.table, queries, 7, metric)
    for query, answer in zip(queries, found, strict=True):
        wanted = legacy.rows(
            f"SELECT id::text, d FROM (SELECT id, (embedding {OPERATORS[metric]} %s::{kind})::float8 AS d"
            " FROM public.embeddings OFFSET 0) r WHERE d <> 'NaN' ORDER BY d, id::text LIMIT 7",
            query.vector,
        )
        assert [(one.key, one.distance) for one in answer] == wanted


def test_extension_elsewhere_and_an_old_legacy_answer_alike_by_a_metric_that_it_has_no_operator_for(
    new_database: Callable[..., Database],
) -> None:
    old, main = new_database("16.2"), new_database("18")
    table = TABLE_SQL.format(3).replace("vector(3)", "extensions.vector(3)")
    move = moves.new_move(old, main, table, table, extension="extensions")
    filled(move, vector="extensions.vector")
    main.execute("CREATE INDEX ON public.embeddings USING hnsw (embedding extensions.vector_l1_ops)")
    done, ladder = parity(move)
    assert done.verdict == "pass", done.summary
    assert {metric: len(exact.target) for metric, exact in ladder.exact.items()} == {"cosine": 50, "l1": 50}


def test_source_is_asked_as_it_is_carried(new_move: NewMove) -> None:
    # Rounded to half precision its distances are those of the target, and no others.
    move = new_move(TABLE_SQL.format(3), TABLE_SQL.format(3).replace("vector(3)", "halfvec(3)"))
    move.legacy.execute(FILL + "vector FROM generate_series(1, 300) AS i")
    move.main.execute(FILL + "vector::halfvec FROM generate_series(1, 300) AS i")
    route = Settings.load(environ=move.env).route("legacy", "main", rounding=True)
    with Crew() as crew, crew.together((route.source, "verify"), (route.target, "verify")) as (source, target):
        pair = read_pair(crew, source, target, route, to_write=False)
        done = check_parity(crew, Ladder(route=route, pair=pair, options=VerifyOptions()))
    assert (done.verdict, figures(done)["queries"]) == ("pass", 50)


def test_without_time_there_is_no_verdict(move: Move) -> None:
    done, ladder = parity(move, budget_seconds=0.0)
    assert done.verdict == "partial"
    assert done.summary == "0 of 50 queries in 0 s, too few to say anything: give it more time, --budget SECONDS"
    assert (figures(done)["queries"], figures(done)["asked"]) == (0, 50)
    assert figures(done)["excluded"] == {"source": None, "target": None}
    assert ladder.exact == {}


def test_scan_that_takes_longer_than_its_time_is_ended_by_the_server(move: Move) -> None:
    move.legacy.execute(FILL + "vector FROM generate_series(301, 50000) AS i")
    settings = Settings.load(environ=move.env)
    with Session(settings.endpoint("legacy"), "test") as session:
        table = describe(session, settings.table)
        queries = sample_queries(session, table, settings.table, 50)
        with pytest.raises(TimeUpError):
            exact_neighbours(session, table, settings.table, queries, 10, seconds=0.001)
        with pytest.raises(TimeUpError):
            count_excluded(session, table, settings.table, 0.001)
        # Nothing of the limit is left behind.
        assert count_excluded(session, table, settings.table) == Excluded(nulls=0, not_a_number=0)


def test_what_only_main_changed_since_the_capture_fails_and_is_named(move: Move) -> None:
    done = captured(move, queries=20)
    assert (done.stored_queries, done.text_queries, done.answers, done.metrics) == (20, 0, 20, ("cosine",))
    equal, _ = parity(move, queries=20)
    assert (equal.verdict, figures(equal)["baseline_queries"], figures(equal)["baseline_changed"]) == ("pass", 20, 0)
    assert figures(equal)["queries"] == 20, "the same queries are asked once"
    assert figures(equal)["baseline_at"] == done.captured_at.isoformat(timespec="seconds")
    assert "so does what was frozen at" in equal.summary
    (key,) = move.main.rows("SELECT key FROM pipeline.baseline ORDER BY id LIMIT 1")[0]
    move.main.execute("UPDATE public.embeddings SET embedding = '[-7, 0.1, 7]' WHERE id = %s", key)
    found, _ = parity(move, queries=20)
    assert found.verdict == "fail"
    (wrong,) = [one for one in figures(found)["disagreements"] if one["query"] == key]
    assert wrong["reason"].endswith("; the source answers as the source did at the capture")
    assert figures(found)["baseline_changed"] == 0


def test_legacy_that_changed_since_the_capture_is_told_and_no_failure(move: Move) -> None:
    captured(move, queries=20)
    (key,) = move.main.rows("SELECT key FROM pipeline.baseline ORDER BY id LIMIT 1")[0]
    change = "UPDATE public.embeddings SET embedding = '[-7, 0.1, 7]' WHERE id = %s"
    move.legacy.execute(change, key)
    behind, _ = parity(move, queries=20)
    assert behind.verdict == "fail"
    reasons = [one["reason"] for one in figures(behind)["disagreements"] if one["query"] == key]
    assert any(reason.endswith("; the target answers as the source did at the capture") for reason in reasons)
    move.main.execute(change, key)
    done, _ = parity(move, queries=20)
    assert done.verdict == "pass", done.summary
    assert 0 < figures(done)["baseline_changed"] < 20
    assert "the source itself answers differently since" in done.summary
    # The vector that was frozen is asked for, and the one that the row has now.
    assert (figures(done)["baseline_queries"], figures(done)["queries"]) == (20, 21)


def test_newest_capture_counts_and_texts_are_asked_for_by_name(move: Move) -> None:
    captured(move, queries=20)
    newest = captured(move, queries=5, k=20, texts=(("what", (0.1, 0.2, -0.7)), ("where", (0.0, 1.0, 1 / 3))))
    assert move.main.value("SELECT count(DISTINCT captured_at) FROM pipeline.baseline") == 2
    done, ladder = parity(move, queries=5)
    assert done.verdict == "pass", done.summary
    assert done.summary.startswith("5 stored vectors and 2 texts find the same 10 nearest rows on both sides")
    assert figures(done)["baseline_at"] == newest.captured_at.isoformat(timespec="seconds")
    asked = {key: figures(done)[f"{key}_queries"] for key in ("stored", "baseline", "text")}
    assert asked == {"stored": 5, "baseline": 7, "text": 2}
    texts = [query for query in ladder.exact["cosine"].queries if query.origin == "text"]
    assert [query.key for query in texts] == ["text 1", "text 2"]
    move.main.execute("UPDATE public.embeddings SET embedding = '[0.1, 0.2, -0.7]' WHERE id = md5('row5')::uuid")
    found, _ = parity(move, queries=5)
    assert "text 1" in {one["query"] for one in figures(found)["disagreements"]}


def test_capture_of_another_dimension_is_passed_over(move: Move) -> None:
    captured(move, queries=20)
    move.main.execute("UPDATE pipeline.baseline SET query = '[1, 2]'")
    done, _ = parity(move)
    assert (done.verdict, figures(done)["baseline_queries"]) == ("pass", 0)
