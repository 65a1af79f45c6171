"""The mock: finds nothing and keeps nothing, where the settings ask for it, and never in silence."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID, uuid4

from pipeline.errors import SettingsError
from pipeline.search.repository import DEFAULT_K, Document, Hit, check_documents, check_k
from pipeline.search.vector_sql import Metric, filter_texts, query_text
from pipeline.settings import DEFAULTS, Settings

MOCK_VARIABLE = "USE_MOCK_EMBEDDINGS"
# An application's log shows a warning of this logger even where nobody has set logging up.
_log = logging.getLogger("pipeline.search")


class MockEmbeddingsWarning(UserWarning):
    """A mock repository was made. ``warnings.simplefilter("error", MockEmbeddingsWarning)`` forbids it."""


class MockEmbeddingRepository:
    """Stand in for EmbeddingRepository where there is no database to ask: every search answers nothing.

    It asks neither embedder nor database. What is wrong with a call is refused as the real one would,
    so that it shows before the switch.
    """

    def __init__(self, settings: Settings, *, metric: Metric = "cosine") -> None:
        """Warn and log that this is the mock. Raises SettingsError where the settings do not ask for it."""
        if not settings.use_mock:
            raise SettingsError(
                f"{MOCK_VARIABLE} ({mock_origin(settings)}) is not true: no mock is made",
                "take what repository_for(settings, engine) returns",
            )
        self._dimensions = settings.dimensions
        self._metric: Metric = metric
        self._why = f"{MOCK_VARIABLE} ({mock_origin(settings)}) is true"
        message = f"embeddings are a mock: searches find nothing, and nothing is kept, since {self._why}"
        _log.warning("%s", message)
        warnings.warn(message, MockEmbeddingsWarning, stacklevel=2)

    def search(
        self,
        text: str,
        k: int = DEFAULT_K,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
    ) -> list[Hit]:
        """Return nothing, and log it. Raises SearchError. ``text`` is not embedded."""
        check_k(k)
        filter_texts(filter or {})
        self._tell("a search found nothing")
        return []

    def search_by_vector(
        self,
        vector: Sequence[float],
        k: int = DEFAULT_K,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
    ) -> list[Hit]:
        """Return nothing, and log it. Raises SearchError."""
        check_k(k)
        query_text(vector, self._dimensions, self._metric)
        filter_texts(filter or {})
        self._tell("a search found nothing")
        return []

    def add(self, documents: Sequence[Document], ids: Sequence[UUID] | None = None) -> list[UUID]:
        """Keep nothing, and log it; return the given ids, or new ones that stand for no row. Raises SearchError."""
        texts, _ = check_documents(documents, ids)
        self._tell(f"documents that were not kept: {len(texts)}")
        return [uuid4() for _ in texts] if ids is None else list(ids)

    def delete(self, ids: Sequence[UUID]) -> int:
        """Delete nothing, and log it; return 0."""
        self._tell(f"ids that were not deleted: {len(ids)}")
        return 0

    def _tell(self, what: str) -> None:
        _log.warning("embeddings are a mock: %s, since %s", what, self._why)


def mock_origin(settings: Settings) -> str:
    """Return where the choice of the mock comes from: ``environment``, ``FILE:LINE`` or ``default``."""
    value = settings.values.get(MOCK_VARIABLE)
    return "default" if value is None else value.where


def mock_value(settings: Settings) -> str:
    """Return the choice of the mock as it is written there."""
    value = settings.values.get(MOCK_VARIABLE)
    return DEFAULTS[MOCK_VARIABLE] or "" if value is None else value.text
