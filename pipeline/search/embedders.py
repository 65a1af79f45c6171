"""What turns texts into vectors: the protocol, and Ollama over HTTP. Knows no database."""

import ipaddress
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from pipeline.errors import PipelineError

if TYPE_CHECKING:
    import httpx

# A model that is not in memory yet is loaded by its first request, which can take a minute.
DEFAULT_TIMEOUT_SECONDS = 120.0
CONNECT_TIMEOUT_SECONDS = 10.0
BATCH_TEXTS = 64
# pgvector stores float4: a larger number cannot be written nor searched for.
LARGEST_COMPONENT = 3.4028234663852886e38


class EmbedderError(PipelineError):
    """The embedder cannot be reached, or its answer is not one usable vector per text."""


class Embedder(Protocol):
    """Turn texts into vectors of one fixed dimension."""

    @property
    def dimensions(self) -> int:
        """Return the number of components of every vector."""
        ...

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Return one vector per text, in order."""
        ...


class OllamaEmbedder:
    """Embed by Ollama's ``POST /api/embed``, as @langchain/ollama does: an over-long text is an error.

    Vectors come normalised. The same text embedded twice differs by up to 1e-4 per component.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        dimensions: int,
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        client: "httpx.Client | None" = None,
    ) -> None:
        """Take ``client`` where the application has one (it stays open); else each call opens its own.

        ``base_url`` may hold ``user:token@``; it is sent, and never shown. Raises EmbedderError.
        """
        host = _host(base_url)
        if host is None:
            raise EmbedderError(
                "the address of Ollama is not an http:// or https:// address",
                "set OLLAMA_BASE_URL, as in http://localhost:11434",
            )
        self._url = base_url.rstrip("/")
        self._shown = f"{self._url.split('://', 1)[0]}://{self._url.split('://', 1)[1].rpartition('@')[2]}"
        self._loopback = _is_loopback(host)
        self._model = model
        self._dimensions = dimensions
        self._timeout_seconds = timeout_seconds
        self._client = client

    @property
    def dimensions(self) -> int:
        """Return the dimension that every vector is checked against."""
        return self._dimensions

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Return one vector of ``dimensions`` finite numbers per text, in order; no text, no request.

        Raises EmbedderError; no message holds a text, the server's words or the address's user part.
        """
        for number, text in enumerate(texts):
            _check_unicode(text, number)
        if not texts:
            return []
        vectors: list[list[float]] = []
        with self._opened() as client:
            for start in range(0, len(texts), BATCH_TEXTS):
                batch = list(texts[start : start + BATCH_TEXTS])
                vectors += self._vectors(self._post(client, batch), len(batch))
        return vectors

    @contextmanager
    def _opened(self) -> "Iterator[httpx.Client]":
        import httpx

        # A proxy from the environment cannot reach this machine's loopback.
        made = self._client is None
        client = self._client or httpx.Client(trust_env=not self._loopback)
        with client if made else nullcontext():
            yield client

    def _post(self, client: "httpx.Client", batch: list[str]) -> "httpx.Response":
        import httpx

        try:
            response = client.post(
                f"{self._url}/api/embed",
                json={"model": self._model, "input": batch, "truncate": False},
                timeout=httpx.Timeout(self._timeout_seconds, connect=CONNECT_TIMEOUT_SECONDS),
            )
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            raise EmbedderError(
                f"Ollama does not answer at {self._shown}: {error or type(error).__name__}",
                "start it with: ollama serve, or set OLLAMA_BASE_URL",
            ) from error
        except httpx.TimeoutException as error:
            raise EmbedderError(
                f"Ollama at {self._shown} did not answer within {self._timeout_seconds:g} s",
                f"try again (a first request loads the model), or see: ollama run {self._model}",
            ) from error
        except httpx.InvalidURL:
            # Its message quotes the address, which may hold a token: not kept as the cause.
            raise EmbedderError("the address of Ollama cannot be used", "check OLLAMA_BASE_URL") from None
        except httpx.RequestError as error:
            raise EmbedderError(
                f"Ollama at {self._shown} broke the exchange off ({type(error).__name__})",
                "look into Ollama's log; the model may not fit into memory",
            ) from error
        if response.status_code != httpx.codes.OK:
            raise self._refusal(response)
        return response

    def _refusal(self, response: "httpx.Response") -> EmbedderError:
        """Say what an HTTP status means. Of the server's words only known ones count: it may echo a text."""
        words = response.text.lower()
        if response.status_code == 404 and "not found" in words and "model" in words:
            return EmbedderError(f"Ollama at {self._shown} has no model {self._model!r}", f"ollama pull {self._model}")
        if "context length" in words:
            return EmbedderError(
                f"a text is longer than the context of {self._model}", "split it into shorter documents"
            )
        if "does not support embed" in words:
            return EmbedderError(
                f"{self._model} is not an embedding model", "set OLLAMA_EMBEDDINGS_MODEL to one that is"
            )
        return EmbedderError(
            f"{self._shown}/api/embed answered with HTTP status {response.status_code}",
            "check that OLLAMA_BASE_URL is Ollama's own address, and look into Ollama's log",
        )

    def _vectors(self, response: "httpx.Response", expected: int) -> list[list[float]]:
        try:
            answer: Any = response.json()
        except ValueError as error:
            raise self._unusable("is not JSON") from error
        vectors = answer.get("embeddings") if isinstance(answer, dict) else None
        if not isinstance(vectors, list):
            raise self._unusable("holds no embeddings")
        if len(vectors) != expected:
            raise self._unusable(f"holds {len(vectors)} vectors for {expected} texts")
        return [self._vector(vector) for vector in vectors]

    def _vector(self, vector: Any) -> list[float]:
        if not isinstance(vector, list) or not all(is_component(number) for number in vector):
            raise self._unusable("holds a vector with something that is not a finite number")
        if len(vector) != self._dimensions:
            raise EmbedderError(
                f"{self._model} answers {len(vector)} dimensions, EMBEDDING_DIMENSIONS says {self._dimensions}",
                "set OLLAMA_EMBEDDINGS_MODEL to the model that the stored embeddings were made with",
            )
        return [float(number) for number in vector]

    def _unusable(self, what: str) -> EmbedderError:
        return EmbedderError(
            f"the answer of {self._shown}/api/embed {what}",
            "check that OLLAMA_BASE_URL is Ollama's own address, and that Ollama is 0.3 or newer",
        )


def is_component(number: object) -> bool:
    """Return whether ``number`` is a finite real number that float4 can hold (a bool is none)."""
    return isinstance(number, int | float) and not isinstance(number, bool) and abs(number) <= LARGEST_COMPONENT


def _check_unicode(text: str, number: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        # The error holds the text itself: not kept as the cause.
        raise EmbedderError(
            f"text {number + 1} holds half a surrogate pair, which is not Unicode",
            "clean the text before embedding",
        ) from None


def _host(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and (parts.port is None or parts.port > 0)
    except ValueError:
        return None
    return parts.hostname if usable else None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
