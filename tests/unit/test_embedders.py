"""The embedder against a real HTTP server that plays Ollama, well and badly."""

import json
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.demo.servers import free_port
from pipeline.search.embedders import BATCH_TEXTS, Embedder, EmbedderError, OllamaEmbedder, is_component

TOKEN = "canary-token"
TEXT = "canary text of a row"
MODEL = "nomic-embed-text"
Answer = tuple[int, bytes]
Script = Callable[[dict[str, Any]], Answer]


class Ollama(ThreadingHTTPServer):
    """An HTTP server on a loopback port that answers by ``script`` and keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: Script = embeddings
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Ollama
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers.get("Authorization")))
        status, answer = self.server.script(body)
        if status == 0:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_arguments: object) -> None:
        """Write nothing to stderr."""


def embeddings(body: dict[str, Any]) -> Answer:
    """Answer each text with its length, its place in the request and 0.5."""
    vectors = [[float(len(text)), float(n), 0.5] for n, text in enumerate(body["input"])]
    return 200, json.dumps({"model": body["model"], "embeddings": vectors}).encode()


def always(status: int, answer: object) -> Script:
    data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return lambda _body: (status, data)


@pytest.fixture
def ollama() -> Iterator[Ollama]:
    with Ollama() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def with_token(url: str) -> str:
    return url.replace("://", f"://user:{TOKEN}@")


def failure(embedder: Embedder, texts: tuple[str, ...] = (TEXT,)) -> tuple[str, str]:
    """Return fact and hint of the embedder's error, and check that a log of it would keep every secret."""
    with pytest.raises(EmbedderError) as error:
        embedder.embed(texts)
    shown = "".join(traceback.format_exception(error.value))
    assert TOKEN not in shown
    assert TEXT not in shown
    assert error.value.exit_code == 1
    assert error.value.hint
    return error.value.fact, error.value.hint


def test_texts_are_sent_as_langchain_does_and_vectors_come_back_in_order(ollama: Ollama) -> None:
    embedder = OllamaEmbedder(ollama.url + "/", MODEL, 3)
    assert embedder.embed(["a", "é\U0001f600\0", ""]) == [[1.0, 0.0, 0.5], [3.0, 1.0, 0.5], [0.0, 2.0, 0.5]]
    assert embedder.dimensions == 3
    wanted = {"model": MODEL, "input": ["a", "é\U0001f600\0", ""], "truncate": False}
    assert ollama.asked == [("/api/embed", wanted, None)]


def test_many_texts_are_sent_in_batches(ollama: Ollama) -> None:
    texts = ["x" * n for n in range(2 * BATCH_TEXTS + 1)]
    vectors = OllamaEmbedder(ollama.url, MODEL, 3).embed(texts)
    assert [vector[0] for vector in vectors] == list(range(2 * BATCH_TEXTS + 1))
    assert [len(body["input"]) for _, body, _ in ollama.asked] == [BATCH_TEXTS, BATCH_TEXTS, 1]


def test_no_text_asks_nobody() -> None:
    assert OllamaEmbedder(f"http://127.0.0.1:{free_port()}", MODEL, 3).embed([]) == []


def test_given_client_is_used_and_stays_open(ollama: Ollama) -> None:
    with httpx.Client(headers={"Authorization": "Bearer x"}) as client:
        embedder = OllamaEmbedder(ollama.url, MODEL, 3, client=client)
        embedder.embed(["a"])
        embedder.embed(["b"])
        assert not client.is_closed
    assert [authorization for _, _, authorization in ollama.asked] == ["Bearer x", "Bearer x"]


def test_user_part_of_the_address_is_sent_and_never_shown(ollama: Ollama) -> None:
    embedder = OllamaEmbedder(with_token(ollama.url), MODEL, 3)
    embedder.embed(["a"])
    assert ollama.asked[0][2] is not None
    assert ollama.asked[0][2].startswith("Basic ")
    assert TOKEN not in repr(embedder)
    ollama.script = always(500, {"error": TEXT})
    fact, _ = failure(embedder)
    assert f"{ollama.url}/api/embed" in fact


def test_proxy_of_the_environment_is_not_asked_for_loopback(ollama: Ollama, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    assert OllamaEmbedder(ollama.url, MODEL, 3).embed(["a"]) == [[1.0, 0.0, 0.5]]


def test_server_that_is_down_is_told_with_the_command_that_starts_it() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    fact, hint = failure(OllamaEmbedder(with_token(url), MODEL, 3))
    assert fact.startswith(f"Ollama does not answer at {url}")
    assert "refused" in fact
    assert "ollama serve" in hint
    assert "OLLAMA_BASE_URL" in hint


def test_unknown_host_is_told() -> None:
    fact, hint = failure(OllamaEmbedder("http://nowhere.invalid:11434", MODEL, 3))
    assert fact.startswith("Ollama does not answer at http://nowhere.invalid:11434")
    assert "ollama serve" in hint


def test_server_without_tls_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_in_clear() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer_in_clear)
        thread.start()
        fact, _ = failure(OllamaEmbedder(f"https://127.0.0.1:{listener.getsockname()[1]}", MODEL, 3))
        thread.join()
    assert "does not answer" in fact


def test_server_that_keeps_silent_ends_in_a_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        started = time.monotonic()
        fact, hint = failure(OllamaEmbedder(url, MODEL, 3, timeout_seconds=0.2))
    assert time.monotonic() - started < 5
    assert fact == f"Ollama at {url} did not answer within 0.2 s"
    assert f"ollama run {MODEL}" in hint


def test_connection_broken_off_is_told(ollama: Ollama) -> None:
    ollama.script = lambda _body: (0, b"")
    fact, _ = failure(OllamaEmbedder(ollama.url, MODEL, 3))
    assert "broke the exchange off" in fact


def test_missing_model_is_told_with_the_command_that_fetches_it(ollama: Ollama) -> None:
    ollama.script = always(404, {"error": f'model "{MODEL}" not found, try pulling it first'})
    fact, hint = failure(OllamaEmbedder(ollama.url, MODEL, 3))
    assert fact == f"Ollama at {ollama.url} has no model '{MODEL}'"
    assert hint == f"ollama pull {MODEL}"


@pytest.mark.parametrize("status", [400, 500])
def test_text_beyond_the_context_is_told(status: int, ollama: Ollama) -> None:
    ollama.script = always(status, {"error": f"the input length exceeds the context length: {TEXT}"})
    fact, hint = failure(OllamaEmbedder(ollama.url, MODEL, 3))
    assert fact == f"a text is longer than the context of {MODEL}"
    assert "split" in hint


def test_model_that_embeds_nothing_is_told(ollama: Ollama) -> None:
    ollama.script = always(501, {"error": "this model does not support embeddings"})
    assert failure(OllamaEmbedder(ollama.url, "llama", 3))[0] == "llama is not an embedding model"


@pytest.mark.parametrize("status", [204, 301, 400, 401, 403, 404, 429, 500, 502, 503])
def test_any_other_status_is_told_without_the_servers_words(status: int, ollama: Ollama) -> None:
    ollama.script = always(status, b"" if status == 204 else TEXT.encode())
    fact, _ = failure(OllamaEmbedder(ollama.url, MODEL, 3))
    assert fact == f"{ollama.url}/api/embed answered with HTTP status {status}"


def test_wrong_dimension_names_both(ollama: Ollama) -> None:
    ollama.script = always(200, {"embeddings": [[0.5] * 1024]})
    fact, hint = failure(OllamaEmbedder(ollama.url, "mxbai-embed-large", 768))
    assert fact == "mxbai-embed-large answers 1024 dimensions, EMBEDDING_DIMENSIONS says 768"
    assert "OLLAMA_EMBEDDINGS_MODEL" in hint


@pytest.mark.parametrize(
    ("answer", "fact"),
    [
        (b"<html>" + TEXT.encode(), "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff\xfe\xfd", "is not JSON"),
        (b'{"embeddings": [[1, 2, ', "is not JSON"),
        ([1, 2, 3], "holds no embeddings"),
        (None, "holds no embeddings"),
        ({"embedding": [1, 2, 3]}, "holds no embeddings"),
        ({"embeddings": {"0": [1, 2, 3]}}, "holds no embeddings"),
        ({"embeddings": []}, "holds 0 vectors for 1 texts"),
        ({"embeddings": [[1, 2, 3], [1, 2, 3]]}, "holds 2 vectors for 1 texts"),
        ({"embeddings": [None]}, "not a finite number"),
        ({"embeddings": ["abc"]}, "not a finite number"),
        ({"embeddings": [[1, 2, None]]}, "not a finite number"),
        ({"embeddings": [[1, 2, "3"]]}, "not a finite number"),
        ({"embeddings": [[1, 2, True]]}, "not a finite number"),
        ({"embeddings": [[1, 2, [3]]]}, "not a finite number"),
        ({"embeddings": [[1, 2, 10**400]]}, "not a finite number"),
        (b'{"embeddings": [[1, 2, NaN]]}', "not a finite number"),
        (b'{"embeddings": [[1, 2, -Infinity]]}', "not a finite number"),
        (b'{"embeddings": [[1, 2, 1e999]]}', "not a finite number"),
        (b'{"embeddings": [[1, 2, 1e39]]}', "not a finite number"),
    ],
)
def test_unusable_answer_is_told(answer: object, fact: str, ollama: Ollama) -> None:
    ollama.script = always(200, answer)
    said, hint = failure(OllamaEmbedder(ollama.url, MODEL, 3))
    assert said.startswith(f"the answer of {ollama.url}/api/embed ")
    assert fact in said
    assert "OLLAMA_BASE_URL" in hint


def test_second_batch_is_checked_like_the_first(ollama: Ollama) -> None:
    def short_second(body: dict[str, Any]) -> Answer:
        return embeddings(body) if len(body["input"]) == BATCH_TEXTS else (200, b'{"embeddings": []}')

    ollama.script = short_second
    fact, _ = failure(OllamaEmbedder(ollama.url, MODEL, 3), ("x",) * (BATCH_TEXTS + 2))
    assert "holds 0 vectors for 2 texts" in fact


def test_half_a_surrogate_pair_is_refused_before_anything_is_sent(ollama: Ollama) -> None:
    fact, _ = failure(OllamaEmbedder(ollama.url, MODEL, 3), ("good", f"{TEXT}\ud800"))
    assert fact.startswith("text 2 holds half a surrogate pair")
    assert ollama.asked == []


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:11434",
        f"ftp://user:{TOKEN}@host",
        f"http://user:{TOKEN}/@host:11434",
        "http://",
        "http://host:99999",
        f"http://user:{TOKEN}@[::1",
        f"http://user:{TOKEN}@",
    ],
)
def test_unusable_address_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(EmbedderError, match="Ollama") as error:
        OllamaEmbedder(url, MODEL, 3).embed(["a"])
    assert TOKEN not in "".join(traceback.format_exception(error.value))
    assert "OLLAMA_BASE_URL" in error.value.hint


@given(st.floats(width=32, allow_nan=False, allow_infinity=False) | st.integers(-(2**60), 2**60))
def test_every_float4_is_a_component(number: float) -> None:
    assert is_component(number)


@given(st.floats(min_value=3.5e38) | st.floats(max_value=-3.5e38) | st.text() | st.booleans() | st.none())
def test_nothing_else_is_a_component(thing: object) -> None:
    assert not is_component(thing)


def test_import_leaves_httpx_out() -> None:
    code = "import sys, pipeline.search.embedders; sys.exit('httpx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 0
