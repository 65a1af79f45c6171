"""Twelve kinds of differences, each alone among 100,000 rows: all are found, with the right keys and columns."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.data import DATA_SETS, fill, load
from tests.moves import Move
from tests.support import Database, environment, pipeline

ROWS = 100_000
DIMENSIONS = 8
TABLE = f"""
CREATE TABLE public.embeddings (id uuid NOT NULL{{}}, content text, metadata jsonb, embedding vector({DIMENSIONS}),
    origin json)
"""
LEGACY = (
    TABLE.format(" PRIMARY KEY")
    + """;
INSERT INTO public.embeddings (id, content, metadata, embedding, origin)
SELECT md5('row' || i)::uuid, 'caf' || chr(233) || ' ' || i, jsonb_build_object('n', i, 'price', 1.10),
    (SELECT array_agg(sin(i * 0.37 + d * d)) FROM generate_series(1, 8) AS d)::vector, '{"a": 1, "b": 2}'
FROM generate_series(1, 100000) AS i;
UPDATE public.embeddings SET content = '', embedding = '[0,1,2,3,4,5,6,7]' WHERE id = md5('row7')::uuid
"""
)
KEY, OTHER, NEW = "md5('row777')::uuid", "md5('row778')::uuid", "'00000000-0000-4000-8000-000000000001'::uuid"
ODD = "md5('row7')::uuid"
SET = "UPDATE public.embeddings SET {} WHERE id = {}"


def bits(database: Database, change: Callable[[np.float32], np.float32]) -> str:
    """Return the SQL of a row's vector with its third number changed."""
    text = database.value(f"SELECT embedding::text FROM public.embeddings WHERE id = {KEY}")
    vector = np.array(text.strip("[]").split(","), dtype=np.float32)
    vector[2] = change(vector[2])
    return "'[" + ",".join(str(x) for x in vector.tolist()) + "]'"


@pytest.fixture
def planted(new_move: Callable[..., Move]) -> Move:
    move = new_move(LEGACY, TABLE.format(" PRIMARY KEY"), EMBEDDING_DIMENSIONS=str(DIMENSIONS))
    move.copy("--workers", "2").expect(0)
    return move


def test_each_of_twelve_kinds_alone_among_100_000_rows_is_found(planted: Move) -> None:
    main, legacy = planted.main, planted.legacy
    assert main.value("SELECT count(*) FROM public.embeddings") == ROWS
    one = (("different", KEY),)
    kinds: list[tuple[str, Database, str, tuple[tuple[str, str], ...], list[str]]] = [
        ("row missing", main, f"DELETE FROM public.embeddings WHERE id = {KEY}", (("missing", KEY),), []),
        ("row extra", main, f"INSERT INTO public.embeddings (id) VALUES ({NEW})", (("extra", NEW),), []),
        (
            "doubled key where no key guards",
            legacy,
            "ALTER TABLE public.embeddings DROP CONSTRAINT embeddings_pkey;"
            f" INSERT INTO public.embeddings SELECT * FROM public.embeddings WHERE id = {KEY}",
            (("doubled", KEY),),
            [],
        ),
        (
            "one float",
            main,
            SET.format(f"embedding = {bits(main, lambda x: x * np.float32(1.5))}", KEY),
            one,
            ["embedding"],
        ),
        (
            "sign of zero",
            main,
            SET.format("embedding = '[-0,1,2,3,4,5,6,7]'", ODD),
            (("different", ODD),),
            ["embedding"],
        ),
        (
            "one bit of a float",
            main,
            SET.format(f"embedding = {bits(main, lambda x: np.nextafter(x, np.float32(2)))}", KEY),
            one,
            ["embedding"],
        ),
        ("trailing blank", main, SET.format("content = content || ' '", KEY), one, ["content"]),
        ("Unicode form", main, SET.format("content = normalize(content, NFD)", KEY), one, ["content"]),
        (
            "metadata number 1.10 and 1.1",
            main,
            SET.format("""metadata = metadata || '{"price": 1.1}'""", KEY),
            one,
            ["metadata"],
        ),
        ("key order in json", main, SET.format("""origin = '{"b": 2, "a": 1}'""", KEY), one, ["origin"]),
        ("NULL for empty", main, SET.format("content = NULL", ODD), (("different", ODD),), ["content"]),
        (
            "swapped vectors of two rows",
            main,
            "UPDATE public.embeddings a SET embedding = b.embedding FROM public.embeddings b"
            f" WHERE a.id IN ({KEY}, {OTHER}) AND b.id IN ({KEY}, {OTHER}) AND a.id <> b.id",
            (("different", KEY), ("different", OTHER)),
            ["embedding"],
        ),
    ]
    for database in (main, legacy):
        database.execute(
            f"CREATE TABLE public.kept AS SELECT * FROM public.embeddings WHERE id IN ({KEY},{OTHER},{ODD})"
        )
    for name, database, statement, expected, columns in kinds:
        database.execute(statement)
        found = rows_of(planted)
        wanted = sorted((kind, main.value(f"SELECT {key}::text"), tuple(columns)) for kind, key in expected)
        assert sorted((one["kind"], one["key"], tuple(one.get("columns", ()))) for one in found["keys"]) == wanted, name
        assert found["differing_rows"] == len(expected), name
        database.execute(f"DELETE FROM public.embeddings WHERE id IN ({KEY}, {OTHER}, {ODD}, {NEW})")
        database.execute("INSERT INTO public.embeddings SELECT * FROM public.kept")
    assert rows_of(planted, code=0)["differing_rows"] == 0


def rows_of(move: Move, code: int = 3) -> dict[str, Any]:
    checks = pipeline("verify", "--check", "rows", "--json", env=move.env).expect(code).json["checks"]
    figures: dict[str, Any] = checks[1]["figures"]
    return figures


@pytest.mark.parametrize("name", DATA_SETS)
def test_equal_tables_of_every_data_set_have_no_difference(
    name: str, legacy: Database, new_database: Callable[..., Database], main_template: Callable[[int], str]
) -> None:
    rows = fill(legacy, load(name))
    main = new_database("18", main_template(DATA_SETS[name]))
    env = environment(legacy=legacy, main=main, EMBEDDING_DIMENSIONS=str(DATA_SETS[name]))
    pipeline("copy", env=env).expect(0)
    done = pipeline("verify", "--check", "rows", "--json", env=env).expect(0).json
    assert [check["verdict"] for check in done["checks"]] == ["pass", "pass"]
    assert done["checks"][1]["figures"]["rows"] == rows
    assert pipeline("diff", "--deep", env=env).expect(0).out == ""
