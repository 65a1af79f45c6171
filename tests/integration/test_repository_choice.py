"""What the factory gives an application, on real servers: its own engine, any schema and type, errors as errors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from uuid import UUID

import pytest
from psycopg2 import sql
from sqlalchemy import Engine, event

from pipeline.errors import StatementError
from pipeline.search.choice import Repository, repository_for
from pipeline.search.embedders import EmbedderError
from pipeline.search.mock import MockEmbeddingsWarning
from pipeline.search.repository import Document, engine_for
from pipeline.search.vector_sql import Metric
from pipeline.settings import Settings
from tests.support import Database

VECTORS = {"north": [0.0, 1.0, 0.0], "east": [1.0, 0.0, 0.0], "north-east": [0.8, 0.6, 0.0]}
MakeEngine = Callable[..., Engine]


class Compass:
    """Embed four words."""

    dimensions = 3

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        if unknown := set(texts) - set(VECTORS):
            raise EmbedderError(f"{len(unknown)} texts are no direction")
        return [VECTORS[text] for text in texts]


def settings(database: Database, **more: str) -> Settings:
    return Settings.load(environ=database.variables("DB", "DB_NAME") | {"EMBEDDING_DIMENSIONS": "3", **more})


@pytest.fixture
def new_engine() -> Iterator[MakeEngine]:
    """Return a function from a database to an engine of one connection; all are disposed of after the test."""
    made: list[Engine] = []

    def make(database: Database) -> Engine:
        made.append(engine_for(settings(database).endpoint("main"), pool_size=1, max_overflow=0, pool_timeout=5))
        return made[-1]

    yield make
    for engine in made:
        engine.dispose()


def make_table(database: Database, column: str, operators: str, extension: str = "public") -> None:
    """Create the table with an HNSW index; ``column`` is the type of the embedding."""
    where = sql.Identifier(extension)
    database.execute(
        sql.SQL(
            "CREATE SCHEMA IF NOT EXISTS {0}; CREATE EXTENSION vector SCHEMA {0};"
            " CREATE TABLE public.embeddings (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), content text,"
            " metadata jsonb, embedding {0}.{1}(3));"
            " CREATE INDEX ON public.embeddings USING hnsw (embedding {0}.{2})"
        ).format(where, sql.Identifier(column), sql.Identifier(operators))
    )


DOCUMENTS = [Document(content=text, metadata={"length": len(text), "text": text}) for text in VECTORS]


def use(repository: Repository) -> None:
    """Add, search by text and by vector with filter and distance, and delete."""
    ids = repository.add(DOCUMENTS)
    hits = repository.search("north", k=2)
    assert [(hit.id, hit.content) for hit in hits] == [(ids[0], "north"), (ids[2], "north-east")]
    assert [hit.distance for hit in hits] == pytest.approx([0.0, 0.4], abs=1e-3)
    assert hits[0].metadata == {"length": 5, "text": "north"}
    (east,) = repository.search_by_vector([0.9, 0.1, 0.0], 3, {"length": 4})
    assert east.id == ids[1]
    several = repository.search("east", 3, {"text": ["north", "east"]})
    assert [hit.content for hit in several] == ["east", "north"]
    assert repository.delete([*ids[1:], UUID(int=1)]) == 2
    assert [hit.id for hit in repository.search("east")] == [ids[0]]
    assert repository.delete(ids) == 1


@pytest.mark.parametrize("extension", ["public", 'Ext "1"'])
@pytest.mark.parametrize("column", ["vector", "halfvec"])
@pytest.mark.parametrize("release", ["16", "18"])
def test_both_types_work_in_any_schema(
    release: str, column: str, extension: str, new_database: Callable[..., Database], new_engine: MakeEngine
) -> None:
    database = new_database(release)
    make_table(database, column, f"{column}_cosine_ops", extension)
    use(repository_for(settings(database), new_engine(database), embedder=Compass()))


def planned_with_index(database: Database, repository: Repository, engine: Engine) -> bool:
    """Return whether the planner takes the HNSW index for a search, where it may not scan."""
    statements: list[str] = []

    def keep(*arguments: object) -> None:
        statements.append(str(arguments[2]))

    event.listen(engine, "before_cursor_execute", keep)
    repository.search("north", k=1)
    event.remove(engine, "before_cursor_execute", keep)
    (search,) = (one for one in statements if "hit_distance" in one and "ORDER BY" in one)
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("SET enable_seqscan = off")
        cursor.execute("EXPLAIN " + search, {"query": "[0,1,0]", "param_1": 1})
        return "embeddings_embedding_idx" in str(cursor.fetchall())


@pytest.mark.parametrize("column", ["vector", "halfvec"])
@pytest.mark.parametrize(
    ("metric", "operators"), [("cosine", "cosine_ops"), ("l2", "l2_ops"), ("inner_product", "ip_ops")]
)
def test_index_of_either_type_serves_the_search(
    column: str, metric: Metric, operators: str, empty_main: Database, new_engine: MakeEngine
) -> None:
    make_table(empty_main, column, f"{column}_{operators}")
    engine = new_engine(empty_main)
    repository = repository_for(settings(empty_main), engine, embedder=Compass(), metric=metric)
    repository.add(DOCUMENTS)
    assert planned_with_index(empty_main, repository, engine)


def test_applications_own_connection_is_the_only_one(empty_main: Database, new_engine: MakeEngine) -> None:
    make_table(empty_main, "vector", "vector_cosine_ops")
    engine = new_engine(empty_main)
    opened: list[object] = []
    event.listen(engine, "connect", lambda connection, _: opened.append(connection))
    use(repository_for(settings(empty_main), engine, embedder=Compass()))
    use(repository_for(settings(empty_main), engine, embedder=Compass()))
    assert len(opened) == 1
    mine = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    assert empty_main.value(mine) == 1


def test_mock_touches_no_row_and_opens_no_connection(empty_main: Database, new_engine: MakeEngine) -> None:
    make_table(empty_main, "vector", "vector_cosine_ops")
    engine = new_engine(empty_main)
    (kept,) = repository_for(settings(empty_main), engine, embedder=Compass()).add(DOCUMENTS[:1])
    engine.dispose()
    opened: list[object] = []
    event.listen(engine, "connect", lambda connection, _: opened.append(connection))
    with pytest.warns(MockEmbeddingsWarning):
        mock = repository_for(settings(empty_main, USE_MOCK_EMBEDDINGS="true"), engine, embedder=Compass())
    assert mock.search("north") == []
    mock.add(DOCUMENTS[1:])
    assert mock.delete([kept]) == 0
    assert opened == []
    assert empty_main.rows("SELECT id::text, content FROM embeddings") == [(str(kept), "north")]


def test_table_that_goes_away_is_an_error_each_time(empty_main: Database, new_engine: MakeEngine) -> None:
    make_table(empty_main, "vector", "vector_cosine_ops")
    repository = repository_for(settings(empty_main), new_engine(empty_main), embedder=Compass())
    repository.add(DOCUMENTS)
    empty_main.execute("DROP TABLE embeddings")
    for _ in range(2):
        with pytest.raises(StatementError, match=r"the table public\.embeddings does not exist"):
            repository.search("north")
        with pytest.raises(StatementError, match=r"the table public\.embeddings does not exist"):
            repository.add(DOCUMENTS)
    with pytest.raises(EmbedderError, match="no direction"):
        repository.search("up")
