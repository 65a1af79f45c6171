"""A baseline is captured by a command that reads legacy alone, and says what it kept."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.demo.hashing import HashingEmbedder
from pipeline.demo.ollama import model_name, serve
from tests.data import TABLE_SQL
from tests.moves import Move
from tests.support import Outcome, environment

NewMove = Callable[..., Move]
DIMENSIONS = 64
TEXTS = ["how is tea made", "where does the cat sleep", "what does the sea say"]
COMMAND = "from pipeline.cli import entry, baselines; entry.cli.add_command(baselines.baseline); entry.main()"


def baseline(*arguments: str, env: dict[str, str]) -> Outcome:
    """Run ``pipeline baseline`` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "baseline", *arguments],
        env=env,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Outcome(code=done.returncode, out=done.stdout, err=done.stderr, arguments=arguments)


@pytest.fixture
def move(new_move: NewMove) -> Move:
    """Return a move of 200 rows whose main is empty yet."""
    made = new_move(TABLE_SQL.format(DIMENSIONS), "", EMBEDDING_DIMENSIONS=str(DIMENSIONS))
    made.legacy.execute(
        "INSERT INTO public.embeddings (id, content, metadata, embedding) SELECT md5('row' || i)::uuid, '', '{}',"
        " (SELECT array_agg(sin(i * 0.37 + d * d)) FROM generate_series(1, %s) AS d)::vector"
        " FROM generate_series(1, 200) AS i",
        DIMENSIONS,
    )
    return made


def test_capture_keeps_queries_and_answers_and_says_what_to_type_next(move: Move) -> None:
    done = baseline("capture", "--queries", "7", "--k", "3", env=move.env).expect(0)
    assert "the exact 3 nearest rows of 7 stored vectors, by cosine" in done.out
    assert done.out.splitlines()[-1].startswith("next: pipeline verify")
    rows = move.main.rows(
        "SELECT run_id, source_label, metric, k, jsonb_array_length(answers), target_schema, target_table, origin,"
        " text, answers -> 0 ->> 0 = key, captured_at FROM pipeline.baseline"
    )
    assert len(rows) == 7
    ((*kept, _),) = set(rows)
    label = f"{move.legacy.user}@{move.legacy.server.host}:{move.legacy.server.port}/{move.legacy.name}"
    assert kept == [None, label, "cosine", 3, 3, "public", "embeddings", "stored", None, True]


def test_capture_is_a_document_and_a_second_one_stays_beside_the_first(move: Move) -> None:
    first, second = (baseline("capture", "--json", env=move.env).expect(0).json["baseline"] for _ in range(2))
    assert (first["stored_queries"], first["text_queries"], first["k"], first["metrics"]) == (50, 0, 10, ["cosine"])
    assert first["captured_at"] < second["captured_at"]
    moments = move.main.rows("SELECT captured_at, count(*) FROM pipeline.baseline GROUP BY 1 ORDER BY 1")
    assert [(at.isoformat(), count) for at, count in moments] == [
        (first["captured_at"], 50),
        (second["captured_at"], 50),
    ]


def test_capture_writes_nothing_but_the_ledger(move: Move) -> None:
    def state() -> object:
        return [
            database.rows("SELECT id, xmin::text, ctid::text FROM public.embeddings ORDER BY id")
            + database.rows("SELECT count(*) FROM pg_class")
            for database in (move.legacy, move.main)
        ]

    before = state()
    move.legacy.execute(f"ALTER DATABASE {move.legacy.name} SET default_transaction_read_only = on")
    baseline("capture", env=move.env).expect(0)
    assert state() == before


def test_texts_are_embedded_once_each_and_asked_for_too(move: Move, tmp_path: Path) -> None:
    texts = tmp_path / "questions.txt"
    texts.write_text("\ufeff" + "\r\n".join([*TEXTS, "", TEXTS[0]]) + "\r\n")
    with serve(HashingEmbedder(DIMENSIONS).fit(TEXTS)) as url:
        env = {**move.env, "OLLAMA_BASE_URL": url, "OLLAMA_EMBEDDINGS_MODEL": model_name(DIMENSIONS)}
        found = baseline("capture", "--queries", "2", "--texts", str(texts), "--json", env=env).expect(0)
    assert (found.json["baseline"]["stored_queries"], found.json["baseline"]["text_queries"]) == (2, 3)
    rows = move.main.rows(
        "SELECT text, key, jsonb_array_length(answers), vector_dims(query::vector) FROM pipeline.baseline"
        " WHERE origin = 'text' ORDER BY id"
    )
    assert rows == [(text, None, 10, DIMENSIONS) for text in TEXTS]


def test_what_cannot_be_captured_says_why(move: Move, tmp_path: Path) -> None:
    texts = tmp_path / "questions.txt"
    for content, fact in ((b"\xff\xfe", "is not UTF-8"), (b"\n \n", "holds no text"), (b"a\0b", "holds a NUL")):
        texts.write_bytes(content)
        assert fact in baseline("capture", "--texts", str(texts), env=move.env).expect(2).err
    baseline("capture", "--texts", str(tmp_path / "none"), env=move.env).expect(2)
    texts.write_text(TEXTS[0])
    refused = baseline("capture", "--texts", str(texts), env={**move.env, "OLLAMA_BASE_URL": "http://127.0.0.1:1"})
    assert "Ollama does not answer" in refused.expect(1).err
    move.legacy.execute("DELETE FROM public.embeddings")
    assert "has no embedding in public.embeddings" in baseline("capture", env=move.env).expect(4).err
    move.main.execute("DROP SCHEMA pipeline CASCADE")
    assert "alembic upgrade head" in baseline("capture", env=move.env).expect(4).err
    assert baseline("capture", env=environment()).expect(2).out == ""
