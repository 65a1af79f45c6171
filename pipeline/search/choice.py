"""The one place that chooses between the repository and its mock, and tells what the settings choose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from uuid import UUID

import sqlalchemy as sa

from pipeline.errors import SettingsError
from pipeline.search.embedders import Embedder, OllamaEmbedder
from pipeline.search.mock import MockEmbeddingRepository, mock_origin, mock_value
from pipeline.search.repository import DEFAULT_K, Document, EmbeddingRepository, Hit
from pipeline.search.vector_sql import Metric
from pipeline.settings import Settings

PointsTo = Literal["main", "legacy", "elsewhere", "unknown"]


class Repository(Protocol):
    """What an application calls, whichever the settings give it."""

    def search(self, text: str, k: int = DEFAULT_K, filter: Mapping[str, Any] | None = None) -> list[Hit]:  # noqa: A002
        """Return the ``k`` rows nearest to ``text``, nearest first."""
        ...

    def search_by_vector(
        self,
        vector: Sequence[float],
        k: int = DEFAULT_K,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
    ) -> list[Hit]:
        """Return the ``k`` rows nearest to ``vector``, nearest first."""
        ...

    def add(self, documents: Sequence[Document], ids: Sequence[UUID] | None = None) -> list[UUID]:
        """Embed and insert ``documents``; return their ids in order."""
        ...

    def delete(self, ids: Sequence[UUID]) -> int:
        """Delete the rows with these ids; return how many there were."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the settings give an application: mock or not, by which value, from where.

    ``points_to`` is where ``PGVECTOR_*`` leads, by address alone, and ``label`` that address; None: ``problem``
    says what it lacks.
    """

    mock: bool
    value: str
    where: str
    points_to: PointsTo
    label: str | None
    problem: str | None = None


def repository_for(
    settings: Settings, engine: sa.Engine, *, embedder: Embedder | None = None, metric: Metric = "cosine"
) -> Repository:
    """Return the repository that the settings give, on the application's own engine: no other pool is made.

    ``embedder`` is Ollama by the settings, unless one is given. The mock comes by ``USE_MOCK_EMBEDDINGS=true``
    alone: an embedder or a database that fails raises, here never, and at a call always.
    """
    if settings.use_mock:
        return MockEmbeddingRepository(settings, metric=metric)
    if embedder is None:
        embedder = OllamaEmbedder(settings.ollama_url, settings.ollama_model, settings.dimensions)
    return EmbeddingRepository(engine, settings.table, embedder, metric=metric)


def read_choice(settings: Settings) -> Choice:
    """Return what the settings choose. Connects to nothing."""
    points_to, label, problem = _points_to(settings)
    return Choice(
        mock=settings.use_mock,
        value=mock_value(settings),
        where=mock_origin(settings),
        points_to=points_to,
        label=label,
        problem=problem,
    )


def _points_to(settings: Settings) -> tuple[PointsTo, str | None, str | None]:
    """Tell main from legacy as the application sees them: after the switch ``PGVECTOR_*`` are main's values."""
    try:
        points = settings.application()
    except SettingsError as error:
        return "unknown", None, error.fact
    try:
        main = settings.endpoint("main")
    except SettingsError as error:
        return "unknown", points.label, error.fact
    if points.place == main.place:
        return "main", points.label, None
    if settings.legacy_prefix == "PGVECTOR":
        return "legacy", points.label, None
    try:
        legacy = settings.endpoint("legacy")
    except SettingsError as error:
        return "unknown", points.label, error.fact
    return "legacy" if points.place == legacy.place else "elsewhere", points.label, None
