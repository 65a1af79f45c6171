"""The demo's stand-in for Ollama: its embedding API over the hashing embedder. It is not a language model.

Only what a client of embeddings asks for is here: POST /api/embed, GET /api/tags, GET /api/version.
It listens on the loopback address alone.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.demo.hashing import HashingEmbedder
from pipeline.errors import EXIT_OK, PipelineError

HOST = "127.0.0.1"
# What the stand-in calls itself; a client that looks for a real Ollama can tell.
VERSION = "0.0.0-demo"
MAX_BODY_BYTES = 64 * 1024 * 1024
_IDLE_SECONDS = 60


class StandInError(PipelineError):
    """The stand-in cannot listen, or already runs."""


def model_name(dimensions: int) -> str:
    """Return the model's name, as OLLAMA_EMBEDDINGS_MODEL gives it: ``demo-hashing-768``."""
    return f"demo-hashing-{dimensions}"


class EmbeddingServer(ThreadingHTTPServer):
    """Serve an embedder on ``127.0.0.1:port``; port 0 takes a free one. Raises StandInError."""

    daemon_threads = True
    # A client's idle connection must not hold up the end.
    block_on_close = False

    def __init__(self, embedder: HashingEmbedder, port: int = 0) -> None:
        """Listen at once; requests are answered from ``serve_forever`` on."""
        self.embedder = embedder
        self.model = model_name(embedder.dimensions)
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise StandInError(f"cannot listen on {HOST}:{port}: {error}", "give another --port, or 0") from error

    @property
    def url(self) -> str:
        """Return the address for OLLAMA_BASE_URL."""
        return f"http://{HOST}:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that went away; anything else goes to stderr as usual."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _RefusalError(Exception):
    """An answer other than 200, with Ollama's form of an error."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: EmbeddingServer
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_SECONDS
    # Head and body are two writes; without this the second waits 40 ms for the first one's acknowledgement.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.path == "/api/version":
            self._answer(HTTPStatus.OK, {"version": VERSION})
        elif self.path == "/api/tags":
            self._answer(HTTPStatus.OK, {"models": [self._model()]})
        else:
            self._answer(HTTPStatus.NOT_FOUND, {"error": "not found"})

    def do_POST(self) -> None:
        try:
            body = self._body()
            if self.path != "/api/embed":
                raise _RefusalError(HTTPStatus.NOT_FOUND, "not found")
            self._answer(HTTPStatus.OK, self._embed(body))
        except _RefusalError as refusal:
            self._answer(refusal.status, {"error": str(refusal)})

    def _embed(self, body: bytes) -> dict[str, object]:
        began = time.monotonic_ns()
        model, texts = _parse(body)
        if model.removesuffix(":latest") != self.server.model:
            raise _RefusalError(HTTPStatus.NOT_FOUND, f'model "{model}" not found, try pulling it first')
        vectors = self.server.embedder.embed(texts)
        # The shortest decimals of a float32 keep all its bits and a third of the bytes of a double's.
        embeddings = [[float(str(value)) for value in vector] for vector in vectors]
        return {"model": model, "embeddings": embeddings, "total_duration": time.monotonic_ns() - began}

    def _model(self) -> dict[str, object]:
        name = f"{self.server.model}:latest"
        return {"name": name, "model": name, "details": {"family": "hashing", "families": ["hashing"]}}

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or int(length) > MAX_BODY_BYTES:
            # What follows cannot be told from a next request.
            self.close_connection = True
            raise _RefusalError(HTTPStatus.BAD_REQUEST, "missing request body, or one that is too long")
        return self.rfile.read(int(length))

    def _answer(self, status: HTTPStatus, answer: dict[str, object]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        """Keep silent: what people search for is nobody's business."""


def _parse(body: bytes) -> tuple[str, list[str]]:
    """Return model and texts of a request. As with Ollama, no input or an empty one is no text."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _RefusalError(HTTPStatus.BAD_REQUEST, "the request body is not JSON") from error
    if not isinstance(request, dict) or not isinstance(request.get("model", ""), str):
        raise _RefusalError(HTTPStatus.BAD_REQUEST, "the request is not an object with a model and an input")
    given = request.get("input")
    texts = [] if given in (None, "") else [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise _RefusalError(HTTPStatus.BAD_REQUEST, "invalid input type")
    return request.get("model", ""), texts


@contextmanager
def serve(embedder: HashingEmbedder, port: int = 0) -> Iterator[str]:
    """Serve in a thread of this process for as long as the block runs; yields the base URL."""
    with EmbeddingServer(embedder, port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve in the foreground until SIGTERM or SIGINT; the pid file stands while requests are accepted."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.demo.ollama",
        description="The demo's stand-in for Ollama; not a language model.",
    )
    parser.add_argument("--model", type=Path, required=True, help="the embedder's file, written by the demo")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (default: a free one)")
    parser.add_argument("--pid-file", type=Path, required=True, help="holds process id and port, a line each")
    options = parser.parse_args(arguments)
    try:
        _serve_until_stopped(HashingEmbedder.load(options.model), options.port, options.pid_file)
    except PipelineError as error:
        sys.stderr.write(f"error: {error.fact}\n" + (f"hint: {error.hint}\n" if error.hint else ""))
        return error.exit_code
    return EXIT_OK


def _serve_until_stopped(embedder: HashingEmbedder, port: int, pid_file: Path) -> None:
    with EmbeddingServer(embedder, port) as server:

        def stop(number: int, frame: FrameType | None) -> None:
            # shutdown() waits for serve_forever(), which this very thread is in.
            threading.Thread(target=server.shutdown, daemon=True).start()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        _write_pid_file(pid_file, server.server_port)
        try:
            server.serve_forever(poll_interval=0.1)
        finally:
            pid_file.unlink(missing_ok=True)


def _write_pid_file(path: Path, port: int) -> None:
    """Write the pid file at once and whole. Raises StandInError where another process's stands there."""
    if (other := running_pid(path)) is not None:
        # The number may have gone to another program since; who types kill should look first.
        raise StandInError(
            f"the stand-in of {path} already runs as process {other}",
            f"ps -p {other}, then kill {other}; or remove {path} where that is another program",
        )
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(f"{os.getpid()}\n{port}\n")
        part.replace(path)
    except OSError as error:
        raise StandInError(f"{path} cannot be written: {error.strerror}", "give another --pid-file") from error


def running_pid(pid_file: Path) -> int | None:
    """Return the process id in a pid file, if a process with it runs."""
    try:
        pid = int(pid_file.read_text().split("\n", 1)[0])
        os.kill(pid, 0)
    except (OSError, ValueError):
        return None
    return pid


if __name__ == "__main__":
    sys.exit(main())
