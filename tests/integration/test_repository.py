"""The repository on real servers: pgvector 0.8 on 18 and 16, 0.6 on 16.2."""

import math
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import psycopg2.extras
import pytest
from psycopg2 import sql
from sqlalchemy import Engine, event, text

from pipeline.demo.servers import free_port
from pipeline.endpoints import Endpoint, Secret
from pipeline.errors import (
    ConflictError,
    PipelineError,
    RejectedError,
    StatementError,
    UnreachableError,
)
from pipeline.search.failures import SearchError
from pipeline.search.repository import Document, EmbeddingRepository, Hit, engine_for
from pipeline.search.vector_sql import Metric
from pipeline.settings import TableMapping
from tests.support import CANARY, Database

DIMENSIONS = 8
CONTENT = "canary content of a row"
STRANGE = TableMapping(
    schema='My "ai.%s" Schema',
    table='Docs "2024".é%(x)s',
    id="I d",
    content="order",
    metadata="distance",
    embedding='Vec"tor',
)
MakeEngine = Callable[..., Engine]


class FixedEmbedder:
    """Turn a text into the unit vector of a generator seeded with it."""

    def __init__(self, dimensions: int = DIMENSIONS) -> None:
        self.dimensions = dimensions

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        return [unit_rows(1, self.dimensions, seed=list(one.encode()))[0].tolist() for one in texts]


def unit_rows(count: int, dimensions: int, seed: Any = 1) -> "np.ndarray[Any, np.dtype[np.float32]]":
    rows = np.random.default_rng(seed).normal(size=(count, dimensions))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def endpoint(database: Database, changes: dict[str, Any]) -> Endpoint:
    values: dict[str, Any] = {
        "name": "main",
        "host": database.server.host,
        "port": database.server.port,
        "user": database.user,
        "database": database.name,
        "password": Secret(database.password),
    }
    return Endpoint(**values | changes)


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """Return ``engine_for`` of a database; all engines are disposed of after the test."""
    made: list[Engine] = []

    def make(database: Database, changes: dict[str, Any] | None = None, **options: Any) -> Engine:
        made.append(engine_for(endpoint(database, changes or {}), **options))
        return made[-1]

    yield make
    for engine in made:
        engine.dispose()


def forced(**more: str) -> dict[str, Any]:
    """Return engine options that make the planner take the index."""
    return {"connect_args": {"options": " ".join(f"-c {k}={v}" for k, v in {"enable_seqscan": "off", **more}.items())}}


def create_table(
    database: Database,
    mapping: TableMapping = TableMapping(),  # noqa: B008
    dimensions: int = DIMENSIONS,
    extension: str = "public",
) -> None:
    """Create the extension in its schema, and the table as Alembic and the JavaScript client do."""
    for schema in {extension, mapping.schema}:
        database.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(schema)))
    database.execute(sql.SQL("CREATE EXTENSION IF NOT EXISTS vector SCHEMA {}").format(sql.Identifier(extension)))
    database.execute(
        sql.SQL("CREATE TABLE {} ({} uuid PRIMARY KEY DEFAULT gen_random_uuid(), {} text, {} jsonb, {} {}({}))").format(
            sql.Identifier(mapping.schema, mapping.table),
            *map(sql.Identifier, mapping.columns),
            sql.Identifier(extension, "vector"),
            sql.Literal(dimensions),
        )
    )


def create_index(database: Database) -> None:
    database.execute("CREATE INDEX ON public.embeddings USING hnsw (embedding public.vector_cosine_ops)")
    database.execute("ANALYZE public.embeddings")


def fill(database: Database, vectors: "np.ndarray[Any, np.dtype[np.float32]]") -> None:
    """Insert one row per vector: metadata {"n": number, "even": bool}, id 0, 1, 2, ..."""
    rows = [
        (
            str(uuid.UUID(int=n)),
            f"text {n}",
            psycopg2.extras.Json({"n": n, "even": n % 2 == 0}),
            vector.tolist(),
        )
        for n, vector in enumerate(vectors)
    ]
    with database.cursor() as cursor:
        psycopg2.extras.execute_values(
            cursor, "INSERT INTO public.embeddings (id, content, metadata, embedding) VALUES %s", rows
        )


def nearest(vectors: "np.ndarray[Any, np.dtype[np.float32]]", query: Sequence[float]) -> list[int]:
    """Return the numbers of all rows by exact cosine distance, nearest first."""
    stored, wanted = vectors.astype(np.float64), np.asarray(query, dtype=np.float64)
    cosine = stored @ wanted / np.linalg.norm(stored, axis=1) / np.linalg.norm(wanted)
    return [int(n) for n in np.argsort(-cosine)]


def numbers(hits: Sequence[Hit]) -> list[int]:
    return [hit.id.int for hit in hits]


def plans(engine: Engine, action: Callable[[], object]) -> list[str]:
    """Run ``action`` and return the plan of each search it ran, explained in the place where it ran."""
    found: list[str] = []

    def explain(_connection: Any, cursor: Any, statement: str, parameters: Any, _context: Any, _many: bool) -> None:
        if " AS hit_id" in statement:
            cursor.execute("EXPLAIN " + statement, parameters)
            found.append("\n".join(line for (line,) in cursor.fetchall()))

    event.listen(engine, "before_cursor_execute", explain)
    action()
    event.remove(engine, "before_cursor_execute", explain)
    return found


def test_added_documents_are_found_and_deleted(empty_main: Database, make_engine: MakeEngine) -> None:
    create_table(empty_main)
    repository = EmbeddingRepository(make_engine(empty_main), TableMapping(), FixedEmbedder())
    documents = [Document(content=f"text {n} é\U0001f600", metadata={"n": n, "é": [1, None]}) for n in range(20)]
    ids = repository.add(documents)
    assert [empty_main.value("SELECT content FROM embeddings WHERE id = %s", str(i)) for i in ids] == [
        document.content for document in documents
    ]
    hits = repository.search("text 7 é\U0001f600", k=3)
    assert (hits[0].id, hits[0].content, hits[0].metadata) == (
        ids[7],
        documents[7].content,
        {"n": 7, "é": [1, None]},
    )
    assert hits[0].distance == pytest.approx(0, abs=1e-6)
    assert [hit.distance for hit in hits] == sorted(hit.distance for hit in hits)
    assert repository.delete([*ids[:8], uuid.uuid4()]) == 8
    assert repository.delete([]) == 0
    assert empty_main.value("SELECT count(*) FROM embeddings") == 12
    assert ids[7] not in {hit.id for hit in repository.search("text 7 é\U0001f600", k=20)}


def test_given_ids_are_kept_in_order(empty_main: Database, make_engine: MakeEngine) -> None:
    create_table(empty_main)
    repository = EmbeddingRepository(make_engine(empty_main), TableMapping(), FixedEmbedder())
    ids = [uuid.UUID(int=n) for n in (3, 1, 2)]
    assert repository.add([Document(content=c) for c in "abc"], ids) == ids
    assert empty_main.rows("SELECT content, metadata FROM embeddings ORDER BY id") == [
        ("b", {}),
        ("c", {}),
        ("a", {}),
    ]
    assert repository.add([]) == []
    with pytest.raises(SearchError, match="2 ids were given for 1 documents"):
        repository.add([Document(content="x")], ids[:2])


@pytest.mark.parametrize("release", ["18", "16", "16.2"])
def test_names_that_need_quotes_work_with_a_hostile_search_path(
    release: str, new_database: Callable[..., Database], make_engine: MakeEngine
) -> None:
    database = new_database(release)
    create_table(database, STRANGE, extension="extens%ions")
    for statement in (
        "CREATE SCHEMA evil",
        "CREATE DOMAIN evil.jsonb AS pg_catalog.text",
        "CREATE DOMAIN evil.uuid AS pg_catalog.text",
        "CREATE DOMAIN evil.text AS pg_catalog.int4",
        "CREATE DOMAIN evil.vector AS pg_catalog.text",
        "CREATE FUNCTION evil.never(pg_catalog.jsonb, pg_catalog.jsonb) RETURNS bool LANGUAGE sql AS 'SELECT false'",
        "CREATE FUNCTION evil.never(pg_catalog.uuid, pg_catalog.uuid) RETURNS bool LANGUAGE sql AS 'SELECT false'",
        "CREATE FUNCTION evil.never(pg_catalog.oid, pg_catalog.oid) RETURNS bool LANGUAGE sql AS 'SELECT false'",
        "CREATE OPERATOR evil.@> (LEFTARG = pg_catalog.jsonb, RIGHTARG = pg_catalog.jsonb, FUNCTION = evil.never)",
        "CREATE OPERATOR evil.= (LEFTARG = pg_catalog.uuid, RIGHTARG = pg_catalog.uuid, FUNCTION = evil.never)",
        "CREATE OPERATOR evil.= (LEFTARG = pg_catalog.oid, RIGHTARG = pg_catalog.oid, FUNCTION = evil.never)",
        "CREATE FUNCTION evil.set_config(pg_catalog.text, pg_catalog.text, bool) RETURNS pg_catalog.text"
        " LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION $$evil$$; END'",
    ):
        database.execute(statement)
    for search_path in ("evil, pg_catalog", ""):
        options = {"options": f"-c search_path={search_path.replace(' ', '')}"}
        repository = EmbeddingRepository(make_engine(database, connect_args=options), STRANGE, FixedEmbedder())
        ids = repository.add([Document(content=c, metadata={"c%s": c}) for c in ("a%s", "b")])
        assert [hit.id for hit in repository.search("a%s", 50, {"c%s": "a%s"})] == [ids[0]]
        assert repository.search("b", 1)[0].content == "b"
        assert repository.delete(ids) == 2


def test_filter_means_containment_and_a_list_means_one_of(empty_main: Database, make_engine: MakeEngine) -> None:
    create_table(empty_main)
    repository = EmbeddingRepository(make_engine(empty_main), TableMapping(), FixedEmbedder())
    metadata: list[dict[str, Any]] = [
        {"source": "x", "page": 1, "tags": ["a", "b"], "deep": {"k": 1, "l": 2}},
        {"source": "x", "page": 2, "none": None},
        {"source": "y'\"", "page": 1.0},
        {"source": "1", "page": "1"},
    ]
    repository.add([Document(content=str(n), metadata=m) for n, m in enumerate(metadata)])
    empty_main.execute("INSERT INTO embeddings (content, embedding) VALUES ('4', '[1,1,1,1,1,1,1,1]')")

    def found(wanted: dict[str, Any] | None) -> list[str]:
        return sorted(str(hit.content) for hit in repository.search("q", 50, wanted))

    assert found(None) == found({}) == ["0", "1", "2", "3", "4"]
    assert found({"source": "x"}) == ["0", "1"]
    assert found({"source": "x", "page": 2}) == ["1"]
    assert found({"page": 1}) == ["0", "2"]
    assert found({"source": ["y'\"", "1"]}) == ["2", "3"]
    assert found({"source": ["x", "1"], "page": [1, "1"]}) == ["0", "3"]
    assert found({"source": []}) == []
    assert found({"none": None}) == ["1"]
    assert found({"deep": {"l": 2}}) == ["0"]
    assert found({"tags": [["b"]]}) == ["0"]
    assert found({"source'; DROP TABLE embeddings --": "x"}) == []
    nothing = next(hit for hit in repository.search("q", 50) if hit.content == "4")
    assert nothing.metadata == {}


@pytest.mark.parametrize("value", [{"k": math.nan}, {"k": object()}, {"k": "a\0b"}, {"k\0": 1}, {"k": "\ud800"}])
def test_filter_that_jsonb_cannot_hold_is_refused(
    value: dict[str, Any], empty_main: Database, make_engine: MakeEngine
) -> None:
    create_table(empty_main)
    repository = EmbeddingRepository(make_engine(empty_main), TableMapping(), FixedEmbedder())
    with pytest.raises(SearchError, match="the filter's value"):
        repository.search("q", filter=value)


def test_rows_without_a_distance_are_no_hits(empty_main: Database, make_engine: MakeEngine) -> None:
    create_table(empty_main)
    empty_main.execute(
        "INSERT INTO embeddings (content, embedding) VALUES ('null', NULL), ('zero', '[0,0,0,0,0,0,0,0]'),"
        " ('one', '[1,0,0,0,0,0,0,0]'), (NULL, '[0,1,0,0,0,0,0,0]')"
    )
    create_index(empty_main)
    query = [1.0, 0.1, *([0.0] * 6)]
    for options in ({}, forced()):
        repository = EmbeddingRepository(make_engine(empty_main, **options), TableMapping(), FixedEmbedder())
        assert [hit.content for hit in repository.search_by_vector(query, 10)] == ["one", None]


@pytest.mark.parametrize(("metric", "operator"), [("cosine", "<=>"), ("l2", "<->"), ("inner_product", "<#>")])
def test_distance_is_that_of_pgvector_for_every_metric(
    metric: Metric, operator: str, empty_main: Database, make_engine: MakeEngine
) -> None:
    create_table(empty_main)
    fill(empty_main, unit_rows(30, DIMENSIONS) * 3)
    query = unit_rows(1, DIMENSIONS, seed=9)[0].tolist()
    repository = EmbeddingRepository(make_engine(empty_main), TableMapping(), FixedEmbedder(), metric=metric)
    expected = empty_main.rows(
        sql.SQL("SELECT id, embedding {} %s::vector AS d FROM embeddings ORDER BY d LIMIT 5").format(sql.SQL(operator)),
        str(query),
    )
    assert [(str(hit.id), hit.distance) for hit in repository.search_by_vector(query, 5)] == expected


@pytest.mark.parametrize("release", ["18", "16", "16.2"])
def test_index_answers_and_k_50_gives_50(
    release: str, new_database: Callable[..., Database], make_engine: MakeEngine
) -> None:
    database = new_database(release)
    create_table(database)
    vectors = unit_rows(3_000, DIMENSIONS)
    fill(database, vectors)
    create_index(database)
    query = unit_rows(1, DIMENSIONS, seed=5)[0].tolist()
    engine = make_engine(database, **forced())
    with engine.connect() as connection:
        plain = text("SELECT id FROM embeddings ORDER BY embedding <=> CAST(:q AS vector) LIMIT 50")
        assert len(connection.execute(plain, {"q": str(query)}).all()) == 40
    repository = EmbeddingRepository(engine, TableMapping(), FixedEmbedder())
    answers: list[list[int]] = []
    (plan,) = plans(engine, lambda: answers.append(numbers(repository.search_by_vector(query, 50))))
    assert "Index Scan using embeddings_embedding_idx" in plan
    assert len(answers[0]) == 50
    assert len(set(answers[0]) & set(nearest(vectors, query)[:50])) >= 48


@pytest.mark.parametrize("k", [1, 4, 40, 1_500, 2_999, 3_000, 3_001])
def test_any_k_is_filled_while_rows_are_left(k: int, empty_main: Database, make_engine: MakeEngine) -> None:
    create_table(empty_main)
    fill(empty_main, unit_rows(3_000, DIMENSIONS))
    create_index(empty_main)
    repository = EmbeddingRepository(make_engine(empty_main, **forced()), TableMapping(), FixedEmbedder())
    hits = repository.search("anything", k)
    assert len({hit.id for hit in hits}) == min(k, 3_000)
    assert [hit.distance for hit in hits] == sorted(hit.distance for hit in hits)


@pytest.mark.parametrize("release", ["18", "16.2"])
def test_filtered_search_under_the_index_returns_all_that_match(
    release: str, new_database: Callable[..., Database], make_engine: MakeEngine
) -> None:
    database = new_database(release)
    create_table(database)
    vectors = unit_rows(3_000, DIMENSIONS)
    fill(database, vectors)
    create_index(database)
    query = unit_rows(1, DIMENSIONS, seed=5)[0].tolist()
    engine = make_engine(database, **forced())
    wanted = list(range(2_989, 3_000))
    with engine.connect() as connection:
        plain = text(
            "SELECT id FROM embeddings WHERE CAST(metadata->>'n' AS int) >= 2989"
            " ORDER BY embedding <=> CAST(:q AS vector) LIMIT 50"
        )
        assert len(connection.execute(plain, {"q": str(query)}).all()) < len(wanted)
    repository = EmbeddingRepository(engine, TableMapping(), FixedEmbedder())
    exact = nearest(vectors, query)
    assert numbers(repository.search_by_vector(query, 50, {"n": wanted})) == [n for n in exact if n in wanted]
    assert numbers(repository.search_by_vector(query, 4, {"n": 17})) == [17]
    half = numbers(repository.search_by_vector(query, 100, {"even": True}))
    assert len(half) == 100
    assert len(set(half) & set([n for n in exact if n % 2 == 0][:100])) >= 95


def test_search_is_complete_where_the_index_scan_gives_up(empty_main: Database, make_engine: MakeEngine) -> None:
    create_table(empty_main)
    vectors = unit_rows(3_000, DIMENSIONS)
    fill(empty_main, vectors)
    create_index(empty_main)
    query = unit_rows(1, DIMENSIONS, seed=5)[0].tolist()
    engine = make_engine(empty_main, **forced(**{"hnsw.max_scan_tuples": "100"}))
    repository = EmbeddingRepository(engine, TableMapping(), FixedEmbedder())
    farthest = nearest(vectors, query)[-7:]
    assert numbers(repository.search_by_vector(query, 7, {"n": farthest})) == farthest


def test_more_than_2000_dimensions_use_the_halfvec_index_and_give_exact_distances(
    empty_main: Database, make_engine: MakeEngine
) -> None:
    create_table(empty_main, dimensions=3_000)
    # All nearly alike, so that rounding to half precision swaps neighbours.
    vectors = (unit_rows(1, 3_000) + 1e-4 * unit_rows(200, 3_000, seed=2)).astype(np.float32)
    fill(empty_main, vectors)
    empty_main.execute("CREATE INDEX half ON embeddings USING hnsw ((embedding::halfvec(3000)) halfvec_cosine_ops)")
    engine = make_engine(empty_main, **forced())
    repository = EmbeddingRepository(engine, TableMapping(), FixedEmbedder(3_000))
    query = vectors[33].tolist()
    answers: list[list[Hit]] = []
    (plan,) = plans(engine, lambda: answers.append(repository.search_by_vector(query, 4)))
    assert "Index Scan using half" in plan
    exact = dict(empty_main.rows("SELECT id, embedding <=> %s::vector FROM embeddings", str(query)))
    assert len(answers[0]) == 4
    assert [hit.distance for hit in answers[0]] == [exact[str(hit.id)] for hit in answers[0]]
    assert answers[0][0].distance <= sorted(exact.values())[1]
    assert [hit.distance for hit in repository.search_by_vector(query, 300)] == sorted(exact.values())


def test_more_than_4000_dimensions_are_searched_exactly(empty_main: Database, make_engine: MakeEngine) -> None:
    create_table(empty_main, dimensions=5_000)
    vectors = unit_rows(20, 5_000)
    fill(empty_main, vectors)
    repository = EmbeddingRepository(make_engine(empty_main), TableMapping(), FixedEmbedder(5_000))
    query = unit_rows(1, 5_000, seed=3)[0].tolist()
    assert numbers(repository.search_by_vector(query, 20)) == nearest(vectors, query)


def test_search_leaves_the_session_as_it_was(empty_main: Database, make_engine: MakeEngine) -> None:
    create_table(empty_main)
    fill(empty_main, unit_rows(60, DIMENSIONS))
    engine = make_engine(empty_main, pool_size=1, max_overflow=0, isolation_level="AUTOCOMMIT")
    repository = EmbeddingRepository(engine, TableMapping(), FixedEmbedder())
    names = (
        "hnsw.ef_search",
        "hnsw.iterative_scan",
        "enable_indexscan",
        "transaction_read_only",
        "search_path",
    )

    def session() -> list[Any]:
        with engine.connect() as connection:
            driver = connection.connection.driver_connection
            assert driver is not None and driver.autocommit
            connection.execute(text("SELECT CAST('[1]' AS vector)"))
            return [connection.execute(text(f"SHOW {name}")).scalar_one() for name in names]

    before = session()
    assert len(repository.search("q", 100, {"even": [True, False]})) == 60
    repository.add([Document(content="x")])
    assert session() == before == ["40", "off", "on", "off", '"$user", public']


def test_own_ef_search_of_the_application_is_never_lowered(empty_main: Database, make_engine: MakeEngine) -> None:
    create_table(empty_main)
    fill(empty_main, unit_rows(60, DIMENSIONS))
    engine = make_engine(empty_main, connect_args={"options": "-c hnsw.ef_search=200"})
    repository = EmbeddingRepository(engine, TableMapping(), FixedEmbedder())
    seen: list[str] = []

    def look(_connection: Any, cursor: Any, statement: str, *_rest: Any) -> None:
        if " AS hit_id" in statement:
            cursor.execute("SHOW hnsw.ef_search")
            seen.append(cursor.fetchone()[0])

    event.listen(engine, "before_cursor_execute", look)
    for k in (4, 50, 60):
        repository.search("q", k)
    event.remove(engine, "before_cursor_execute", look)
    assert seen == ["200", "200", "200"]


def test_search_never_writes(empty_main: Database, make_engine: MakeEngine) -> None:
    create_table(empty_main)
    fill(empty_main, unit_rows(3, DIMENSIONS))
    empty_main.execute("CREATE TABLE trace (at timestamptz)")
    empty_main.execute(
        "CREATE FUNCTION note() RETURNS bool LANGUAGE plpgsql AS"
        " 'BEGIN INSERT INTO public.trace VALUES (now()); RETURN true; END'"
    )
    empty_main.execute("CREATE VIEW noting AS SELECT * FROM embeddings WHERE note()")
    repository = EmbeddingRepository(make_engine(empty_main), TableMapping(table="noting"), FixedEmbedder())
    with pytest.raises(StatementError, match="read-only"):
        repository.search("q")
    assert empty_main.value("SELECT count(*) FROM trace") == 0


@pytest.mark.parametrize("isolation", ["AUTOCOMMIT", "REPEATABLE READ"])
def test_add_is_all_or_nothing_whatever_the_engine_does(
    isolation: str, empty_main: Database, make_engine: MakeEngine
) -> None:
    create_table(empty_main)
    repository = EmbeddingRepository(
        make_engine(empty_main, isolation_level=isolation), TableMapping(), FixedEmbedder()
    )
    same = uuid.uuid4()
    with pytest.raises(StatementError, match="a row with this key already"):
        repository.add(
            [Document(content="a"), Document(content="b"), Document(content="c")], [uuid.uuid4(), same, same]
        )
    assert empty_main.value("SELECT count(*) FROM embeddings") == 0


@pytest.mark.parametrize(
    ("document", "fact"),
    [
        (Document(content="a\0b"), "document 2 holds a NUL character"),
        (Document(content="a\ud800b"), "document 2 holds half a surrogate pair"),
        (Document(content="x", metadata={"k": "a\0b"}), "the metadata of document 2 hold a NUL character"),
        (Document(content="x", metadata={"k": {"l": ["\\\0"]}}), "the metadata of document 2 hold a NUL"),
        (
            Document(content="x", metadata={"k": math.inf}),
            "the metadata of document 2 cannot be written as JSON",
        ),
        (Document(content="x", metadata=[1]), "the metadata of document 2 are not a JSON object"),  # type: ignore[arg-type]
    ],
)
def test_add_refuses_what_the_server_cannot_store_before_it_writes(
    document: Document, fact: str, empty_main: Database, make_engine: MakeEngine
) -> None:
    create_table(empty_main)
    repository = EmbeddingRepository(make_engine(empty_main), TableMapping(), FixedEmbedder())
    with pytest.raises(SearchError, match=fact):
        repository.add([Document(content="good"), document])
    assert empty_main.value("SELECT count(*) FROM embeddings") == 0


def test_a_backslash_before_u0000_is_not_a_nul(empty_main: Database, make_engine: MakeEngine) -> None:
    create_table(empty_main)
    repository = EmbeddingRepository(make_engine(empty_main), TableMapping(), FixedEmbedder())
    repository.add([Document(content="\\u0000", metadata={"k": "\\u0000", "l": "\\\\u0000"})])
    assert repository.search("q")[0].metadata == {"k": "\\u0000", "l": "\\\\u0000"}


@pytest.mark.parametrize(
    ("vector", "fact"),
    [
        ([1.0] * 7, "has 7 dimensions, not 8"),
        ([], "has 0 dimensions, not 8"),
        ([math.nan] * 8, "not finite"),
        ([math.inf] + [0.0] * 7, "not finite"),
        ([1e39] + [0.0] * 7, "too large"),
        ([0.0] * 8, "no cosine distance"),
    ],
)
def test_unusable_query_vector_is_refused(
    vector: list[float], fact: str, empty_main: Database, make_engine: MakeEngine
) -> None:
    create_table(empty_main)
    repository = EmbeddingRepository(make_engine(empty_main), TableMapping(), FixedEmbedder())
    with pytest.raises(SearchError, match=fact):
        repository.search_by_vector(vector)


def test_embedder_of_the_wrong_dimension_writes_nothing(empty_main: Database, make_engine: MakeEngine) -> None:
    class Liar(FixedEmbedder):
        def embed(self, texts: Sequence[str]) -> list[list[float]]:
            return [[1.0] * (8 if n == 0 else 9) for n in range(len(texts))]

    create_table(empty_main)
    repository = EmbeddingRepository(make_engine(empty_main), TableMapping(), Liar())
    with pytest.raises(SearchError, match="the vector of document 2 has 9 dimensions, not 8"):
        repository.add([Document(content="a"), Document(content="b")])
    assert empty_main.value("SELECT count(*) FROM embeddings") == 0


@pytest.mark.parametrize("k", [0, -1, True, 2.0])
def test_k_below_one_is_refused(k: Any, empty_main: Database, make_engine: MakeEngine) -> None:
    repository = EmbeddingRepository(make_engine(empty_main), TableMapping(), FixedEmbedder())
    with pytest.raises(SearchError, match="whole number from 1"):
        repository.search("q", k)


def failure(error: pytest.ExceptionInfo[PipelineError]) -> str:
    """Return all that a log would hold of an error, and check that it says where and keeps secrets."""
    shown = "".join(traceback.format_exception(error.value))
    assert CANARY not in shown
    assert CONTENT not in shown
    assert "[parameters:" not in shown
    assert error.value.hint
    return f"{error.value.fact} | {error.value.hint}"


def test_missing_table_extension_and_column_say_what_to_type(empty_main: Database, make_engine: MakeEngine) -> None:
    repository = EmbeddingRepository(make_engine(empty_main), TableMapping(), FixedEmbedder())
    with pytest.raises(SearchError, match="pgvector is not installed") as extension:
        repository.search("q")
    assert "alembic upgrade head" in failure(extension)
    empty_main.execute("CREATE EXTENSION vector")
    for mapping in (TableMapping(), TableMapping(schema="nowhere")):
        other = EmbeddingRepository(make_engine(empty_main), mapping, FixedEmbedder())
        with pytest.raises(StatementError, match="does not exist in postgres@") as missing:
            other.search("q")
        assert "alembic upgrade head" in failure(missing)
        with pytest.raises(StatementError, match="does not exist in postgres@") as missing:
            other.add([Document(content=CONTENT)])
        assert "alembic upgrade head" in failure(missing)
    create_table(empty_main)
    wrong = EmbeddingRepository(make_engine(empty_main), TableMapping(content="text"), FixedEmbedder())
    with pytest.raises(StatementError, match="lacks a column") as column:
        wrong.search("q")
    assert "PGVECTOR_COL_" in failure(column)


def test_column_of_another_dimension_is_named(empty_main: Database, make_engine: MakeEngine) -> None:
    create_table(empty_main, dimensions=4)
    fill(empty_main, unit_rows(2, 4))
    repository = EmbeddingRepository(make_engine(empty_main), TableMapping(), FixedEmbedder())
    with pytest.raises(StatementError, match="other dimensions") as error:
        repository.search("q")
    assert "EMBEDDING_DIMENSIONS" in failure(error)
    with pytest.raises(StatementError, match="other dimensions") as error:
        repository.add([Document(content=CONTENT)])
    assert "EMBEDDING_DIMENSIONS" in failure(error)


def test_failed_write_shows_no_row_where_the_engine_shows_parameters(
    empty_main: Database, make_engine: MakeEngine
) -> None:
    create_table(empty_main)
    empty_main.execute("ALTER TABLE embeddings ADD CHECK (content = 'other')")
    repository = EmbeddingRepository(make_engine(empty_main, hide_parameters=False), TableMapping(), FixedEmbedder())
    with pytest.raises(StatementError) as error:
        repository.add([Document(content=CONTENT)])
    assert "SQLSTATE 23514" in failure(error)


def test_role_without_rights_is_told_which(empty_main: Database, make_engine: MakeEngine) -> None:
    create_table(empty_main)
    role, password = f"reader_{empty_main.name}", "reader's password"
    empty_main.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD %s").format(sql.Identifier(role)), password)
    try:
        repository = EmbeddingRepository(
            make_engine(empty_main.as_role(role, password)), TableMapping(), FixedEmbedder()
        )
        with pytest.raises(StatementError, match="may not do this") as error:
            repository.search("q")
        assert "GRANT SELECT" in failure(error)
        empty_main.execute(sql.SQL("GRANT SELECT ON embeddings TO {}").format(sql.Identifier(role)))
        assert repository.search("q") == []
    finally:
        empty_main.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
        empty_main.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


@pytest.mark.parametrize(
    ("changes", "kind", "fact"),
    [
        ({"password": Secret("wrong " + CANARY)}, RejectedError, "turned the connection down"),
        ({"password": None}, RejectedError, "turned the connection down"),
        ({"database": "nowhere"}, RejectedError, "turned the connection down"),
        ({"port": 0}, UnreachableError, "cannot be reached"),
        ({"host": "nowhere.invalid"}, UnreachableError, "cannot be reached"),
        ({"sslmode": "require"}, UnreachableError, "cannot be reached"),
    ],
)
def test_connection_failures_are_translated(
    changes: dict[str, Any],
    kind: type[PipelineError],
    fact: str,
    empty_main: Database,
    make_engine: MakeEngine,
) -> None:
    if changes.get("port") == 0:
        changes = {"port": free_port()}
    repository = EmbeddingRepository(make_engine(empty_main, changes), TableMapping(), FixedEmbedder())
    with pytest.raises(kind, match=fact) as error:
        repository.search("q")
    assert f"/{changes.get('database', empty_main.name)}" in failure(error)


def test_lost_connection_is_told_and_the_next_search_connects_again(
    empty_main: Database, make_engine: MakeEngine
) -> None:
    create_table(empty_main)
    fill(empty_main, unit_rows(3, DIMENSIONS))
    engine = make_engine(empty_main)
    repository = EmbeddingRepository(engine, TableMapping(), FixedEmbedder())

    def cut(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if " AS hit_id" in statement:
            empty_main.rows(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE application_name = 'pipeline search' AND datname = current_database()"
            )

    event.listen(engine, "before_cursor_execute", cut)
    with pytest.raises(UnreachableError, match="was lost") as error:
        repository.search("q")
    event.remove(engine, "before_cursor_execute", cut)
    assert error.value.retryable
    failure(error)
    assert len(repository.search("q")) == 3


def test_lock_timeout_is_a_conflict_and_statement_timeout_is_named(
    empty_main: Database, make_engine: MakeEngine
) -> None:
    create_table(empty_main)
    for setting, kind, fact in (
        ("lock_timeout", ConflictError, "stood in the way"),
        ("statement_timeout", StatementError, "was cancelled"),
    ):
        options = {"options": f"-c {setting}=100"}
        repository = EmbeddingRepository(make_engine(empty_main, connect_args=options), TableMapping(), FixedEmbedder())
        with empty_main.cursor() as cursor:
            cursor.execute("LOCK TABLE embeddings IN ACCESS EXCLUSIVE MODE")
            with pytest.raises(kind, match=fact) as error:
                repository.search("q")
            failure(error)


def test_exhausted_pool_is_told(empty_main: Database, make_engine: MakeEngine) -> None:
    create_table(empty_main)
    engine = make_engine(empty_main, pool_size=1, max_overflow=0, pool_timeout=0.1)
    repository = EmbeddingRepository(engine, TableMapping(), FixedEmbedder())
    with engine.connect(), pytest.raises(UnreachableError, match=r"no connection to .* came free"):
        repository.search("q")
    assert repository.search("q") == []


def test_extension_is_looked_up_once_and_again_after_it_moved(empty_main: Database, make_engine: MakeEngine) -> None:
    create_table(empty_main)
    fill(empty_main, unit_rows(3, DIMENSIONS))
    engine = make_engine(empty_main)
    looked: list[str] = []

    def watch(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if "pg_extension" in statement:
            looked.append(statement)

    event.listen(engine, "before_cursor_execute", watch)
    for _ in range(3):
        assert len(EmbeddingRepository(engine, TableMapping(), FixedEmbedder()).search("q")) == 3
    assert len(looked) == 1
    empty_main.execute("CREATE SCHEMA moved")
    empty_main.execute("ALTER EXTENSION vector SET SCHEMA moved")
    repository = EmbeddingRepository(engine, TableMapping(), FixedEmbedder())
    with pytest.raises(StatementError, match="have moved"):
        repository.search("q")
    assert len(repository.search("q")) == 3
    assert len(looked) == 2
    empty_main.execute("ALTER SCHEMA moved RENAME TO again")
    with pytest.raises(StatementError, match="has moved"):
        repository.search("q")
    assert len(repository.search("q")) == 3
    event.remove(engine, "before_cursor_execute", watch)


def test_json_metadata_and_a_view_can_be_searched(legacy: Database, make_engine: MakeEngine) -> None:
    legacy.execute("CREATE TABLE t (id uuid PRIMARY KEY, content text NOT NULL, metadata json, embedding vector)")
    legacy.execute(
        "INSERT INTO t VALUES (%s, 'x', '{\"k\": 1}', '[1,0,0,0,0,0,0,0]'), (%s, 'y', '[1]', '[0,1,0,0,0,0,0,0]')",
        str(uuid.UUID(int=1)),
        str(uuid.UUID(int=2)),
    )
    legacy.execute("CREATE VIEW embeddings AS SELECT * FROM t")
    repository = EmbeddingRepository(make_engine(legacy), TableMapping(), FixedEmbedder())
    assert [(hit.id.int, hit.metadata) for hit in repository.search("q", 2, {"k": 1})] == [(1, {"k": 1})]
    assert {hit.id.int: hit.metadata for hit in repository.search("q")}[2] == [1]


def test_engine_shows_its_name_and_no_password(empty_main: Database, make_engine: MakeEngine) -> None:
    engine = make_engine(empty_main)
    with engine.connect() as connection:
        assert connection.execute(text("SHOW application_name")).scalar_one() == "pipeline search"
    assert CANARY not in repr(engine) + engine.url.render_as_string(hide_password=False)


def test_engine_passes_ssl_and_socket_folder_on_to_libpq() -> None:
    engine = engine_for(
        Endpoint(
            name="main",
            host="/run/my sockets",
            port=6432,
            user="u",
            database="d%",
            sslmode="verify-full",
            sslrootcert="/etc/ca.pem",
        )
    )
    seen: list[dict[str, Any]] = []

    @event.listens_for(engine, "do_connect")
    def remember(_dialect: Any, _record: Any, _arguments: Any, parameters: dict[str, Any]) -> None:
        seen.append(dict(parameters))

    with pytest.raises(UnreachableError, match=r"u@/run/my sockets:6432/d%"):
        EmbeddingRepository(engine, TableMapping(), FixedEmbedder()).search("q")
    engine.dispose()
    assert seen[0] == {
        "host": "/run/my sockets",
        "port": 6432,
        "user": "u",
        "dbname": "d%",
        "sslmode": "verify-full",
        "sslrootcert": "/etc/ca.pem",
        "application_name": "pipeline search",
        "connect_timeout": 10,
    }
