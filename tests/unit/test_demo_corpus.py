"""The demo's corpus, embedder and stand-in for Ollama, without a database server."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.demo.corpus import NAMESPACE, Passage, corpus, spread
from pipeline.demo.hashing import EmbedderError, HashingEmbedder, stem
from pipeline.demo.ollama import EmbeddingServer, StandInError, serve
from tests.support import clean_environment

# A question -> names of passages, of which one must be among the first three.
PROMISES = {
    "extract a zip archive": ["zipfile.ZipFile.extract", "zipfile.ZipFile.extractall"],
    "parse command line arguments": ["argparse.ArgumentParser", "argparse"],
    "remove whitespace from both ends of a string": ["str.strip"],
    "wait until a thread has finished": ["threading.Thread.join"],
    "open a TCP connection with a timeout": ["socket.create_connection"],
    "how do decorators work": ["contextlib.ContextDecorator", "Function definitions"],
    "delete a directory tree": ["shutil.rmtree"],
    "walk a directory tree recursively": ["os.walk", "pathlib.Path.walk"],
    "what is a lambda expression": ["Lambdas"],
    "compute the median of data": ["statistics.median"],
    "create a temporary directory": ["tempfile.TemporaryDirectory"],
    "serialize an object to JSON": ["json.dump", "json.dumps"],
    "raise an exception": ['The "raise" statement'],
    "cache the results of a function": ["functools.cache", "functools.lru_cache"],
    "compress data with gzip": ["gzip.compress"],
    "start a subprocess and capture its output": ["subprocess.check_output", "subprocess.run"],
    "convert a string to lower case": ["str.lower"],
}


@pytest.fixture(scope="module")
def passages() -> list[Passage]:
    return corpus()


@pytest.fixture(scope="module")
def embedder(passages: list[Passage]) -> HashingEmbedder:
    return HashingEmbedder().fit(passage.text for passage in passages)


def in_second_process(program: str) -> str:
    """Run a program with another hash seed, as another machine would."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=clean_environment() | {"PYTHONHASHSEED": "4711"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout


def test_corpus_has_thousands_of_passages_of_a_readable_size(passages: list[Passage]) -> None:
    assert 3_000 <= len(passages) <= 8_000
    assert max(len(passage.text) for passage in passages) < 1_400
    assert min(len(passage.text) for passage in passages) > 40


def test_corpus_holds_library_and_language(passages: list[Passage]) -> None:
    by_name = {passage.name: passage for passage in reversed(passages)}
    extract = by_name["zipfile.ZipFile.extractall"]
    assert extract.text.startswith("zipfile.ZipFile.extractall: Extract all members")
    assert extract.metadata["source"] == "zipfile"
    assert extract.metadata["kind"] == "method"
    assert extract.lines is not None
    assert extract.lines[0] < extract.lines[1]
    assert by_name["str.strip"].text.startswith("str.strip(")
    assert by_name['The "with" statement'].source == "pydoc_data.topics"
    assert {"class", "function", "method", "property", "module", "entry", "section"} <= {p.kind for p in passages}


def test_corpus_has_no_text_and_no_id_twice(passages: list[Passage]) -> None:
    assert len({passage.text for passage in passages}) == len(passages)
    assert len({passage.id for passage in passages}) == len(passages)


def test_corpus_has_nothing_a_database_refuses(passages: list[Passage]) -> None:
    assert not [p for p in passages if "\0" in p.text or "\0" in json.dumps(p.metadata)]
    assert all(passage.text.encode() for passage in passages)


def test_corpus_is_the_same_in_another_process(passages: list[Passage]) -> None:
    out = in_second_process(
        "import zlib; from pipeline.demo.corpus import corpus; p = corpus();"
        "print(len(p), zlib.crc32(repr([(x.id, x.text, x.metadata) for x in p]).encode()))"
    )
    expected = zlib.crc32(repr([(p.id, p.text, p.metadata) for p in passages]).encode())
    assert out.split() == [str(len(passages)), str(expected)]


def test_id_depends_on_name_and_part_alone(passages: list[Passage]) -> None:
    passage = next(p for p in passages if p.name == "shutil.rmtree")
    assert passage.id == uuid.uuid5(NAMESPACE, "shutil.rmtree/1")
    # A fixed value: ids in databases filled by an earlier demo must go on matching.
    assert str(passage.id) == "caac44b3-acaa-57f9-9353-34ead473af2b"


def test_limit_spreads_over_the_whole(passages: list[Passage]) -> None:
    few = corpus(limit=50)
    assert len(few) == 50
    places = [passages.index(passage) for passage in few]
    assert places == sorted(places)
    assert max(b - a for a, b in pairwise(places)) <= len(passages) // 50 + 1
    assert spread(passages, len(passages) + 1) == passages


@pytest.mark.parametrize("question", PROMISES)
def test_question_finds_what_a_person_expects(
    question: str, passages: list[Passage], embedder: HashingEmbedder, vectors: np.ndarray[Any, np.dtype[np.float32]]
) -> None:
    distances = 1 - vectors @ embedder.embed([question])[0]
    found = [passages[place].name for place in np.argsort(distances)[:3]]
    assert set(found) & set(PROMISES[question]), found


@pytest.fixture(scope="module")
def vectors(passages: list[Passage], embedder: HashingEmbedder) -> np.ndarray[Any, np.dtype[np.float32]]:
    return embedder.embed([passage.text for passage in passages])


def test_vectors_have_length_1_and_hardly_any_two_are_equal(vectors: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    assert vectors.dtype == np.float32
    assert vectors.shape[1] == 768
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)
    # Texts that differ in their signs alone are equal to an embedder of words.
    assert len({vector.tobytes() for vector in vectors}) > 0.998 * len(vectors)


@pytest.mark.parametrize("text", ["", " \n\t", "the of and", "?!", "\0", "\ud800", "日本語", "🙂", "x" * 100_000])
def test_no_text_has_a_zero_vector(text: str, embedder: HashingEmbedder) -> None:
    first, again = embedder.embed([text, text])
    assert abs(float(np.linalg.norm(first)) - 1) < 1e-6
    assert first.tobytes() == again.tobytes()


def test_texts_without_telling_words_differ(embedder: HashingEmbedder) -> None:
    blank, signs, stop_words = embedder.embed(["", "?!", "the of"])
    assert abs(float(signs @ stop_words)) < 0.5
    assert abs(float(blank @ signs)) < 0.5


def test_a_text_alone_has_the_vector_it_has_among_others(embedder: HashingEmbedder) -> None:
    together = embedder.embed(["open a file", "close a socket"])
    assert embedder.embed(["close a socket"])[0].tobytes() == together[1].tobytes()
    assert embedder.embed([]).shape == (0, 768)


def test_endings_and_spellings_meet(embedder: HashingEmbedder) -> None:
    one, other, none = embedder.embed(["extracting archives", "extracts an archive", "ring a bell"])
    assert float(one @ other) > 0.99
    assert abs(float(one @ none)) < 0.2
    camel, words = embedder.embed(["TemporaryDirectory", "temporary directory"])
    assert float(camel @ words) > 0.5


@pytest.mark.parametrize(
    ("words", "root"),
    [("removes removed removing remove", "remov"), ("directory directories", "directory"), ("class classes", "class")],
)
def test_stem_is_shared(words: str, root: str) -> None:
    assert {stem(word) for word in words.split()} == {root}


def test_saved_embedder_embeds_the_same_bits_in_another_process(embedder: HashingEmbedder, tmp_path: Path) -> None:
    embedder.save(tmp_path / "model.npz")
    out = in_second_process(
        "from pathlib import Path; from pipeline.demo.hashing import HashingEmbedder;"
        f"e = HashingEmbedder.load(Path({str(tmp_path / 'model.npz')!r}));"
        "print(e.embed(['wait until a thread has finished', 'zipfile.ZipFile: x']).tobytes().hex())"
    )
    expected = embedder.embed(["wait until a thread has finished", "zipfile.ZipFile: x"])
    assert out.strip() == expected.tobytes().hex()
    assert (tmp_path / "model.npz").stat().st_size < 200_000


def test_rarity_decides(embedder: HashingEmbedder) -> None:
    question = "gzip files of modules"
    fitted = embedder.embed([question, "gzip"])
    plain = HashingEmbedder().embed([question, "gzip"])
    assert float(fitted[0] @ fitted[1]) > float(plain[0] @ plain[1]) + 0.05


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut short"])
def test_another_file_is_not_taken_for_an_embedder(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    path.write_bytes(content)
    with pytest.raises(EmbedderError) as raised:
        HashingEmbedder.load(path)
    assert str(path) in raised.value.fact
    assert raised.value.hint


def test_an_array_file_of_something_else_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.save(tmp_path / "single.npy", np.zeros(3))
    for name in ("other.npz", "single.npy", "missing.npz"):
        with pytest.raises(EmbedderError):
            HashingEmbedder.load(tmp_path / name)


@pytest.fixture
def url(embedder: HashingEmbedder) -> Iterator[str]:
    with serve(embedder) as address:
        yield address


def ask(url: str, body: object = None) -> tuple[int, Any]:
    """Return status and answer; bytes are sent as they are, anything else as JSON."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=data), timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_server_embeds_one_text_and_many_with_all_bits(url: str, embedder: HashingEmbedder) -> None:
    texts = ["open a file", "close a socket"]
    status, many = ask(f"{url}/api/embed", {"model": "demo-hashing-768", "input": texts, "truncate": False})
    assert status == 200
    assert many["model"] == "demo-hashing-768"
    assert np.array(many["embeddings"], np.float32).tobytes() == embedder.embed(texts).tobytes()
    _, one = ask(f"{url}/api/embed", {"model": "demo-hashing-768:latest", "input": texts[0]})
    assert one["embeddings"] == many["embeddings"][:1]


@pytest.mark.parametrize("given", [[], "", None])
def test_server_answers_no_input_with_no_vector(url: str, given: object) -> None:
    assert ask(f"{url}/api/embed", {"model": "demo-hashing-768", "input": given})[1]["embeddings"] == []


def test_server_does_not_know_another_model(url: str) -> None:
    status, answer = ask(f"{url}/api/embed", {"model": "nomic-embed-text", "input": "x"})
    assert status == 404
    assert answer == {"error": 'model "nomic-embed-text" not found, try pulling it first'}


@pytest.mark.parametrize(
    "body",
    [b"{", b"", b"\xff", b"[]", b'{"model": 1}', b"[" * 100_000]
    + [json.dumps({"model": "demo-hashing-768", "input": bad}).encode() for bad in ([1], {"a": 1}, 0, False)],
    ids=lambda body: repr(body[:40]),
)
def test_server_refuses_what_is_no_request(url: str, body: bytes) -> None:
    status, answer = ask(f"{url}/api/embed", body)
    assert status == 400
    assert answer["error"]


def test_server_refuses_a_body_without_a_length(url: str) -> None:
    port = int(url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
        raw.sendall(b"POST /api/embed HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")


def test_server_lists_its_model_and_version(url: str) -> None:
    assert [model["name"] for model in ask(f"{url}/api/tags")[1]["models"]] == ["demo-hashing-768:latest"]
    assert ask(f"{url}/api/version")[1]["version"]
    assert ask(f"{url}/api/unknown")[0] == 404
    assert ask(f"{url}/api/unknown", {})[0] == 404


def test_server_listens_on_loopback_alone_and_ends_with_its_block(embedder: HashingEmbedder) -> None:
    with serve(embedder) as url:
        port = int(url.rsplit(":", 1)[1])
        with pytest.raises(StandInError) as raised:
            EmbeddingServer(embedder, port)
        assert str(port) in raised.value.fact
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=2)


def start_stand_in(tmp_path: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "pipeline.demo.ollama", "--model", str(tmp_path / "model.npz")),
            *("--port", "0", "--pid-file", str(tmp_path / "pid")),
        ],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_process_serves_from_its_pid_file_until_stopped(
    number: signal.Signals, embedder: HashingEmbedder, tmp_path: Path
) -> None:
    embedder.save(tmp_path / "model.npz")
    with start_stand_in(tmp_path) as process:
        try:
            deadline = time.monotonic() + 20
            while not (tmp_path / "pid").exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            pid, port = (int(line) for line in (tmp_path / "pid").read_text().split())
            assert pid == process.pid
            body = {"model": "demo-hashing-768", "input": "open a file"}
            _, answer = ask(f"http://127.0.0.1:{port}/api/embed", body)
            assert np.array(answer["embeddings"], np.float32).tobytes() == embedder.embed(["open a file"]).tobytes()
            with start_stand_in(tmp_path) as second:
                _, err = second.communicate(timeout=20)
            assert second.returncode == 1
            assert "already runs" in err
            assert (tmp_path / "pid").read_text().split()[0] == str(pid)
            os.kill(pid, number)
            out, err = process.communicate(timeout=10)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (0, "", "")
    assert not (tmp_path / "pid").exists()


def test_process_tells_of_a_missing_model(tmp_path: Path) -> None:
    with start_stand_in(tmp_path) as process:
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert err.startswith("error: ")
    assert "model.npz cannot be read: No such file" in err
    assert "Traceback" not in err
