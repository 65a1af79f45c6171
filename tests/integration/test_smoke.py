"""The smoke search: rows written between the draw and the search do not count, rows that are there do."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from pipeline.check.neighbours import Query, sample_queries
from pipeline.cutover.smoke import DRAWS, QUERIES, Hits, K, search_stored
from pipeline.errors import DifferencesError, RefusedError
from pipeline.postgres.database import Session
from pipeline.postgres.tables import describe
from pipeline.search.embedders import OllamaEmbedder
from pipeline.search.repository import EmbeddingRepository, engine_for
from pipeline.settings import TableMapping
from tests.data import fill_generated
from tests.preflights import endpoint
from tests.support import Database

# The seventeenth generated row would be nearly as the first.
DIMENSIONS, ROWS = 8, 16
TURN = "UPDATE public.embeddings SET embedding = array_fill(-1, ARRAY[8])::vector"
FORGET = "UPDATE public.embeddings SET embedding = NULL"
DELETE = "DELETE FROM public.embeddings"


@dataclass
class Application:
    """What draws from a table and searches in it; ``meanwhile`` is done after a draw, before its first search."""

    database: Database
    session: Session
    repository: EmbeddingRepository
    meanwhile: Callable[[Sequence[Query]], object] = lambda _: None
    draws: list[Sequence[Query]] = field(default_factory=list)
    untouched: bool = False

    def draw(self) -> Sequence[Query]:
        self.draws.append(sample_queries(self.session, describe(self.session, TableMapping()), TableMapping(), QUERIES))
        self.untouched = True
        return self.draws[-1]

    def search(self, vector: Sequence[float]) -> Hits:
        if self.untouched:
            self.meanwhile(self.draws[-1])
            self.untouched = False
        return [(str(hit.id), hit.distance) for hit in self.repository.search_by_vector(vector, K)]

    def write(self, statement: str, queries: Sequence[Query]) -> None:
        """Write to the rows of some queries, as others do."""
        for query in queries:
            self.database.execute(f"{statement} WHERE id = %s", query.key)


@pytest.fixture
def application(legacy: Database) -> Iterator[Application]:
    fill_generated(legacy, ROWS, DIMENSIONS)
    where = endpoint(legacy, "main")
    engine = engine_for(where)
    embedder = OllamaEmbedder("http://127.0.0.1:9", "none", DIMENSIONS)
    with Session(where, "test") as session:
        yield Application(legacy, session, EmbeddingRepository(engine, TableMapping(), embedder))
    engine.dispose()


def test_stored_vectors_find_their_rows(application: Application) -> None:
    assert search_stored(application.draw, application.search) == pytest.approx([0] * QUERIES, abs=1e-6)
    assert len(application.draws) == 1


@pytest.mark.parametrize("statement", [TURN, FORGET, DELETE])
def test_row_written_between_draw_and_search_does_not_count(application: Application, statement: str) -> None:
    application.meanwhile = lambda drawn: application.write(statement, drawn[:1])
    assert search_stored(application.draw, application.search) == pytest.approx([0] * (QUERIES - 1), abs=1e-6)
    # Once, and again for what was missed.
    assert len(application.draws) == 2


@pytest.mark.parametrize("statement", [TURN, FORGET, DELETE])
def test_others_are_drawn_where_most_were_written(application: Application, statement: str) -> None:
    written: list[Query] = []

    def once(drawn: Sequence[Query]) -> None:
        if not written:
            written.extend(drawn[1:])
            application.write(statement, written)

    application.meanwhile = once
    assert len(search_stored(application.draw, application.search)) == QUERIES
    assert len(application.draws) == 3
    assert not set(application.draws[-1]) & set(written)


def test_table_that_is_written_faster_than_it_is_searched_does_not_pass(application: Application) -> None:
    application.meanwhile = lambda drawn: application.write(DELETE, drawn)
    with pytest.raises(RefusedError, match="nothing is proved: of 3 times 5 rows that were searched for"):
        search_stored(application.draw, application.search)
    assert application.database.value("SELECT count(*) FROM public.embeddings") == ROWS - DRAWS * QUERIES


def test_one_of_five_may_be_left_out_by_an_index_and_no_more(application: Application) -> None:
    def leaving_out(many: int) -> Callable[[Sequence[float]], Hits]:
        asked: list[Sequence[float]] = []

        def search(vector: Sequence[float]) -> Hits:
            asked.append(vector)
            # Its own row comes first.
            return application.search(vector)[len(asked) <= many :]

        return search

    assert sum(distance > 1e-4 for distance in search_stored(application.draw, leaving_out(1))) == 1
    for many in (2, QUERIES):
        with pytest.raises(DifferencesError, match=f"{QUERIES - many} of {QUERIES} searches for a stored vector"):
            search_stored(application.draw, leaving_out(many))


def test_search_that_finds_nothing_does_not_pass(application: Application) -> None:
    with pytest.raises(DifferencesError, match=f"0 of {QUERIES} searches for a stored vector found its row"):
        search_stored(application.draw, lambda _: [])
    assert len(application.draws) == 2


def test_table_without_vectors_has_nothing_to_find(application: Application) -> None:
    application.database.execute(FORGET)
    assert search_stored(application.draw, application.search) == []
