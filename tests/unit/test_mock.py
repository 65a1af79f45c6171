"""The mock and what chooses it: by the settings alone, with the same calls as the real one, and never in silence."""

import inspect
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa

from pipeline.demo.servers import free_port
from pipeline.errors import EXIT_OK, EXIT_REFUSED, EXIT_USAGE, SettingsError, UnreachableError
from pipeline.search import choice, embedders, repository
from pipeline.search import mock as mock_module
from pipeline.search.choice import Repository, repository_for
from pipeline.search.embedders import EmbedderError
from pipeline.search.failures import SearchError
from pipeline.search.mock import MockEmbeddingRepository, MockEmbeddingsWarning
from pipeline.search.repository import Document, EmbeddingRepository
from pipeline.settings import Settings
from tests.support import ROOT, clean_environment, pipeline

DIMENSIONS = 3
TEXT = "canary text of a document"


class Embedder:
    """Embed every text alike, or fail."""

    dimensions = DIMENSIONS

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        if self.fails:
            raise EmbedderError("the embedder is out of order")
        return [[1.0, 0.0, 0.0] for _ in texts]


def settings(**variables: str) -> Settings:
    return Settings.load(environ={"EMBEDDING_DIMENSIONS": str(DIMENSIONS), **variables})


@pytest.fixture
def engine() -> Iterator[sa.Engine]:
    """Return an engine of a server that is not there: whoever connects fails."""
    engine = sa.create_engine(
        sa.URL.create("postgresql+psycopg2", username="u", host="127.0.0.1", port=free_port(), database="d")
    )
    yield engine
    engine.dispose()


@pytest.fixture
def mock(engine: sa.Engine) -> Repository:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MockEmbeddingsWarning)
        return repository_for(settings(USE_MOCK_EMBEDDINGS="true"), engine, embedder=Embedder(fails=True))


@pytest.fixture
def real(engine: sa.Engine) -> Repository:
    return repository_for(settings(), engine, embedder=Embedder())


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize("value", ["true", "TRUE", "1", "yes", "on"])
def test_mock_comes_by_the_setting_and_warns(value: str, engine: sa.Engine, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(MockEmbeddingsWarning, match=r"USE_MOCK_EMBEDDINGS \(environment\) is true"):
        made = repository_for(settings(USE_MOCK_EMBEDDINGS=value), engine)
    assert isinstance(made, MockEmbeddingRepository)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("pipeline.search", logging.WARNING)
    assert "embeddings are a mock" in record.getMessage()


@pytest.mark.parametrize("variables", [{}, {"USE_MOCK_EMBEDDINGS": "false"}, {"USE_MOCK_EMBEDDINGS": "0"}])
def test_without_the_setting_it_is_the_real_one(
    variables: dict[str, str], engine: sa.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    assert isinstance(repository_for(settings(**variables), engine), EmbeddingRepository)
    assert not caplog.records


def test_value_that_is_neither_gives_no_repository_at_all() -> None:
    with pytest.raises(SettingsError, match="neither true nor false"):
        settings(USE_MOCK_EMBEDDINGS="maybe")


def test_failing_database_is_an_error_and_no_mock(real: Repository) -> None:
    calls: dict[str, Callable[[], object]] = {
        "search": lambda: real.search(TEXT),
        "search_by_vector": lambda: real.search_by_vector([1.0, 0.0, 0.0]),
        "add": lambda: real.add([Document(content=TEXT)]),
        "delete": lambda: real.delete([uuid4()]),
    }
    for call in calls.values():
        with pytest.raises(UnreachableError):
            call()


def test_failing_embedder_is_an_error_and_no_mock(engine: sa.Engine) -> None:
    made = repository_for(settings(), engine, embedder=Embedder(fails=True))
    with pytest.raises(EmbedderError, match="out of order"):
        made.search(TEXT)
    with pytest.raises(EmbedderError, match="out of order"):
        made.add([Document(content=TEXT)])


def test_ollama_of_the_settings_embeds_where_none_is_given(engine: sa.Engine) -> None:
    port = free_port()
    made = repository_for(settings(OLLAMA_BASE_URL=f"http://127.0.0.1:{port}"), engine)
    with pytest.raises(EmbedderError, match=f"Ollama does not answer at http://127.0.0.1:{port}"):
        made.search(TEXT)


def test_no_mock_is_made_past_the_setting() -> None:
    """An application cannot fall back on it when something fails."""
    with pytest.raises(SettingsError, match=r"USE_MOCK_EMBEDDINGS \(default\) is not true") as refused:
        MockEmbeddingRepository(settings())
    assert "repository_for(settings, engine)" in refused.value.hint


def test_warning_can_be_made_an_error(engine: sa.Engine) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", MockEmbeddingsWarning)
        with pytest.raises(MockEmbeddingsWarning):
            repository_for(settings(USE_MOCK_EMBEDDINGS="true"), engine)


def test_names_in_the_readme_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| name | is |") : text.index("The table may be of `vector`")]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)", row)}
    there = {name for module in (choice, embedders, mock_module, repository) for name in vars(module)}
    assert len(named) > 8 and named <= there


# ---------------------------------------------------------------- the mock's answers


def test_mock_finds_and_keeps_nothing_and_says_so_each_time(mock: Repository, caplog: pytest.LogCaptureFixture) -> None:
    given = [uuid4(), uuid4()]
    two = [Document(content=TEXT, metadata={"a": TEXT}), Document(content=TEXT)]
    caplog.clear()
    assert mock.search(TEXT, 3, {"a": TEXT}) == []
    assert mock.search_by_vector([1.0, 0.0, 0.0], 3, {"a": [TEXT]}) == []
    assert mock.add(two, given) == given
    made = mock.add(two)
    assert len(set(made)) == 2 and all(isinstance(one, UUID) for one in made)
    assert mock.delete([*given, *made]) == 0
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 5
    for message in messages:
        assert message.startswith("embeddings are a mock: ")
        assert message.endswith("since USE_MOCK_EMBEDDINGS (environment) is true")
        assert TEXT not in message
    assert mock.search(TEXT) == []


BAD_CALLS: dict[str, Callable[[Repository], object]] = {
    "k": lambda r: r.search(TEXT, 0),
    "k of a vector": lambda r: r.search_by_vector([1.0, 0.0, 0.0], -1),
    "dimensions": lambda r: r.search_by_vector([1.0]),
    "zero vector": lambda r: r.search_by_vector([0.0, 0.0, 0.0]),
    "not finite": lambda r: r.search_by_vector([1.0, float("nan"), 0.0]),
    "filter": lambda r: r.search(TEXT, filter={"a": float("inf")}),
    "filter with a NUL": lambda r: r.search_by_vector([1.0, 0.0, 0.0], filter={"a": ["\0"]}),
    "number of ids": lambda r: r.add([Document(content=TEXT)], []),
    "text with a NUL": lambda r: r.add([Document(content="\0")]),
    "metadata": lambda r: r.add([Document(content=TEXT, metadata={"a": object()})]),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_wrong_call_is_refused_by_both_alike(case: str, mock: Repository, real: Repository) -> None:
    refusals = []
    for one in (mock, real):
        with pytest.raises(SearchError) as refused:
            BAD_CALLS[case](one)
        refusals.append((refused.value.fact, refused.value.hint))
    assert refusals[0] == refusals[1]


def test_both_take_the_same_calls() -> None:
    def calls(kind: type) -> dict[str, inspect.Signature]:
        methods = inspect.getmembers(kind, inspect.isfunction)
        return {name: inspect.signature(method) for name, method in methods if not name.startswith("_")}

    assert calls(MockEmbeddingRepository) == calls(EmbeddingRepository) == calls(Repository)


def test_application_without_any_logging_sees_it_on_stderr(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("# settings\nUSE_MOCK_EMBEDDINGS=true\n")
    program = """
import sqlalchemy
from pipeline.search.choice import repository_for
from pipeline.settings import Settings
repository = repository_for(Settings.load(), sqlalchemy.create_engine("postgresql+psycopg2://u@h/d"))
print(repository.search("x"))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=clean_environment() | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "[]\n"
    assert "MockEmbeddingsWarning: embeddings are a mock: searches find nothing" in done.stderr
    assert "embeddings are a mock: a search found nothing, since USE_MOCK_EMBEDDINGS (.env:2) is true" in done.stderr


# ---------------------------------------------------------------- the command


def variables(prefix: str, host: str, database: str, port: int = 5432) -> dict[str, str]:
    name = f"{prefix}_NAME" if prefix == "DB" else f"{prefix}_DB"
    return {f"{prefix}_HOST": host, f"{prefix}_PORT": str(port), f"{prefix}_USER": "app", name: database}


MAIN = variables("DB", "Db.example", "app")
OLD = variables("PGVECTOR", "old.example", "vectors")
KEPT = variables("LEGACY", "old.example", "vectors")
# What PGVECTOR_* points to, by the settings alone.
POINTS: dict[str, tuple[dict[str, str], str, str | None]] = {
    "before the switch": (MAIN | OLD, "legacy", "app@old.example:5432/vectors"),
    "after the switch": (MAIN | KEPT | variables("PGVECTOR", "db.example.", "app"), "main", "app@db.example.:5432/app"),
    "after the switch, old values lost": (
        MAIN | variables("PGVECTOR", "db.example", "app"),
        "main",
        "app@db.example:5432/app",
    ),
    "back again": (MAIN | KEPT | OLD, "legacy", "app@old.example:5432/vectors"),
    "another database": (MAIN | KEPT | variables("PGVECTOR", "db.example", "x"), "elsewhere", "app@db.example:5432/x"),
    "another port": (MAIN | variables("PGVECTOR", "db.example", "app", 6432), "legacy", "app@db.example:6432/app"),
    "this machine by two names": (
        variables("DB", "127.0.0.1", "app") | variables("PGVECTOR", "localhost", "app"),
        "main",
        "app@localhost:5432/app",
    ),
    "folders of sockets": (
        variables("DB", "/run/A", "app") | variables("PGVECTOR", "/run/a", "app"),
        "legacy",
        "app@/run/a:5432/app",
    ),
    "nothing": ({}, "unknown", None),
    "no main": (OLD, "unknown", "app@old.example:5432/vectors"),
    "half a legacy": (MAIN | OLD | {"LEGACY_HOST": "h"}, "unknown", "app@old.example:5432/vectors"),
}


@pytest.mark.parametrize("case", POINTS)
def test_command_tells_where_the_application_points(case: str) -> None:
    given, points_to, label = POINTS[case]
    found = pipeline("mock", "--json", env=clean_environment() | given).expect(EXIT_OK).json
    assert (found["repository"], found["value"], found["where"]) == ("real", "false", "default")
    assert (found["points_to"], found["label"]) == (points_to, label)
    assert (found["problem"] is None) == (points_to != "unknown")
    shown = pipeline("mock", env=clean_environment() | given).expect(EXIT_OK).out
    assert ("is not known to point" if points_to == "unknown" else f"points to {points_to}: {label}") in shown


def test_command_tells_mock_and_its_place(tmp_path: Path) -> None:
    path = tmp_path / "app.env"
    path.write_text("\nUSE_MOCK_EMBEDDINGS=Yes\nPGVECTOR_PASSWORD=canary\n")
    done = pipeline("mock", "--env-file", str(path), env=clean_environment() | MAIN | OLD).expect(EXIT_OK)
    assert f"USE_MOCK_EMBEDDINGS=Yes ({path}:2)" in done.out
    assert "the settings give a mock" in done.out and "canary" not in done.out
    # It says so as a result; nothing was searched that a warning would have to speak of.
    assert done.err == ""
    over = clean_environment() | {"USE_MOCK_EMBEDDINGS": "off"}
    found = pipeline("mock", "--json", "--env-file", str(path), env=over).expect(EXIT_OK).json
    assert (found["repository"], found["value"], found["where"]) == ("real", "off", "environment")
    pipeline("mock", env=over | {"USE_MOCK_EMBEDDINGS": "perhaps"}).expect(EXIT_USAGE)


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_search_by_the_mock_is_refused(more: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "app.env"
    path.write_text("USE_MOCK_EMBEDDINGS=true\n")
    done = pipeline("search", "tea", *more, "--env-file", str(path), env=clean_environment() | MAIN)
    assert done.expect(EXIT_REFUSED).out == ""
    assert f"USE_MOCK_EMBEDDINGS ({path}:1) gives the application a mock" in done.err
    assert "set USE_MOCK_EMBEDDINGS=false" in done.err
