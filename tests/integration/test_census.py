"""The census counts exactly what is there, by one scan, in every type of vector and on every server."""

from collections.abc import Callable

import numpy as np
import pytest

from pipeline.check.census import Census, can_take_census, check_census, check_finite, take_census
from pipeline.postgres.database import Session
from pipeline.postgres.tables import describe
from pipeline.settings import TableMapping
from tests.data import DataSet, fill, load
from tests.preflights import endpoint
from tests.support import Database


def census(database: Database) -> Census:
    with Session(endpoint(database, "legacy"), "test") as session:
        table = describe(session, TableMapping())
        assert can_take_census(session, table, TableMapping())
        return take_census(session, table, TableMapping())


def lengths(data: DataSet) -> list[float]:
    return sorted(float(np.sqrt((vector.astype(np.float64) ** 2).sum())) for vector in data.vectors)


def test_percentiles_are_exact(legacy: Database) -> None:
    data = load("minilm384_docs")
    rows = fill(legacy, data)
    found = census(legacy)
    assert (found.rows, found.null_embeddings, found.zero_norms, found.not_finite) == (rows, 0, 0, 0)
    assert found.dimensions == ((384, rows),)
    sorted_lengths = lengths(data)
    assert found.norms is not None
    for share, figure in (
        *((0.0, found.norms.minimum), (0.05, found.norms.p05), (0.5, found.norms.median)),
        *((0.95, found.norms.p95), (1.0, found.norms.maximum)),
    ):
        place = max(0, int(np.ceil(share * rows)) - 1)
        assert figure == pytest.approx(sorted_lengths[place], rel=1e-12)
    assert found.norms.normalised == sum(abs(length - 1) <= 1e-3 for length in sorted_lengths) / rows
    distinct = {vector.tobytes() for vector in data.vectors}
    assert found.duplicate_rows - found.duplicate_groups == rows - len(distinct)


def test_planted_rows_are_counted_each_in_its_place(legacy: Database) -> None:
    data = load("nomic768")
    rows = fill(legacy, data)
    before = census(legacy)
    ids = [row["id"] for row in data.rows]
    zero = "[" + ",".join("0" * 768) + "]"
    legacy.execute("UPDATE public.embeddings SET embedding = NULL WHERE id = ANY (%s::uuid[])", ids[:3])
    legacy.execute("UPDATE public.embeddings SET embedding = %s WHERE id = ANY (%s::uuid[])", zero, ids[3:5])
    legacy.execute("UPDATE public.embeddings SET content = NULL WHERE id = ANY (%s::uuid[])", ids[5:9])
    legacy.execute("UPDATE public.embeddings SET metadata = NULL WHERE id = ANY (%s::uuid[])", ids[5:10])
    legacy.execute("UPDATE public.embeddings SET metadata = 'null' WHERE id = %s", ids[11])
    found = census(legacy)
    assert (found.rows, found.null_embeddings, found.zero_norms) == (rows, 3, 2)
    assert (found.null_contents, found.null_metadata) == (4, 5)
    assert found.duplicate_groups >= 1
    assert before.null_embeddings == before.zero_norms == before.null_contents == before.null_metadata == 0
    assert found.norms is not None
    assert found.norms.minimum == 0
    facts = [one.fact for one in check_census(found, "legacy")]
    assert "legacy: 3 rows without embedding: no search finds them" in facts
    assert any(fact.startswith("legacy: 2 vectors of zero length") for fact in facts)


def test_untyped_column_tells_rows_by_dimension_and_copies_are_duplicates(legacy: Database) -> None:
    data = load("nomic768")
    rows = fill(legacy, data)
    legacy.execute("ALTER TABLE public.embeddings ALTER COLUMN embedding TYPE vector")
    legacy.execute(
        "UPDATE public.embeddings SET embedding = '[3,4]' WHERE id = ANY (%s::uuid[])",
        [row["id"] for row in data.rows[:4]],
    )
    found = census(legacy)
    assert found.dimensions == ((768, rows - 4), (2, 4))
    assert found.norms is not None
    assert 5.0 in (found.norms.minimum, found.norms.maximum, found.norms.p05, found.norms.p95)
    assert found.duplicate_rows >= 4


@pytest.mark.parametrize("kind", ["halfvec", "sparsevec"])
def test_other_types_of_vectors_are_counted_too(kind: str, legacy: Database) -> None:
    rows = fill(legacy, load("nomic768"))
    legacy.execute(
        f"ALTER TABLE public.embeddings ALTER COLUMN embedding TYPE {kind}(768) USING embedding::{kind}(768)"
    )
    found = census(legacy)
    assert found.dimensions == ((768, rows),)
    assert found.norms is not None
    assert found.norms.maximum > 0


def test_empty_table_has_no_norms(main: Database) -> None:
    found = census(main)
    assert (found.rows, found.norms, found.dimensions, found.duplicate_rows) == (0, None, (), 0)
    (warned,) = check_census(found, "main")
    assert (warned.severity, warned.fact) == ("warn", "main's table is empty")


def test_old_server_and_extension_elsewhere(new_database: Callable[..., Database]) -> None:
    old = new_database("16.2")
    old.execute("CREATE EXTENSION vector")
    rows = fill(old, load("nomic768"))
    old.execute("CREATE SCHEMA ai; ALTER EXTENSION vector SET SCHEMA ai")
    assert census(old).dimensions == ((768, rows),)


def test_table_without_content_and_metadata_has_no_count_of_them(legacy: Database) -> None:
    rows = fill(legacy, load("nomic768"))
    legacy.execute("ALTER TABLE public.embeddings DROP COLUMN content, DROP COLUMN metadata")
    found = census(legacy)
    assert (found.rows, found.null_contents, found.null_metadata) == (rows, None, None)


def test_view_and_partitions_are_read_whole(legacy: Database) -> None:
    rows = fill(legacy, load("nomic768"))
    legacy.execute(
        "ALTER TABLE public.embeddings RENAME TO first; ALTER TABLE public.first ALTER id SET NOT NULL;"
        "CREATE TABLE public.embeddings (LIKE public.first) PARTITION BY HASH (id);"
        "CREATE TABLE public.one PARTITION OF public.embeddings FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
        "CREATE TABLE public.two PARTITION OF public.embeddings FOR VALUES WITH (MODULUS 2, REMAINDER 1);"
        "INSERT INTO public.embeddings SELECT * FROM public.first"
    )
    assert census(legacy).rows == rows
    legacy.execute("DROP TABLE public.embeddings; CREATE VIEW public.embeddings AS SELECT * FROM public.first")
    assert census(legacy).dimensions == ((768, rows),)


def test_vectors_that_only_an_old_pgvector_let_in(legacy: Database) -> None:
    data = load("nomic768")
    rows = fill(legacy, data)
    # What a binary COPY could bring before 0.4.3: the bytes of a vector that no input takes today.
    legacy.execute("CREATE CAST (bytea AS vector) WITHOUT FUNCTION")
    for number, row in (("7fc00000", 0), ("7f800000", 1), ("ff800000", 2)):
        vector = b"\x00\x03\x00\x00" + bytes.fromhex(number)[::-1] + b"\x00" * 4 * 767
        legacy.execute(
            "UPDATE public.embeddings SET embedding = %s::bytea::vector WHERE id = %s", vector, data.rows[row]["id"]
        )
    found = census(legacy)
    assert (found.rows, found.not_finite, found.dimensions) == (rows, 3, ((768, rows),))
    assert found.norms is not None and found.norms.maximum < 1000
    refused = next(one for one in check_census(found, "legacy") if one.severity == "refuse")
    assert refused.fact == "legacy: 3 vectors with NaN or infinity, which pgvector takes no more since 0.4.3"
    assert refused.hint == "embed these texts again, or delete the rows"
    for version, expected in (("0.4.2", (refused,)), ("0.4.3", ()), ("0.8.5", ())):
        legacy.execute("UPDATE pg_extension SET extversion = %s WHERE extname = 'vector'", version)
        with Session(endpoint(legacy, "legacy"), "test") as session:
            assert check_finite(session, describe(session, TableMapping()), TableMapping()) == expected


def test_mixed_lengths_are_noted(legacy: Database) -> None:
    fill(legacy, load("nomic768"))
    legacy.execute("UPDATE public.embeddings SET embedding = l2_normalize(embedding)")
    assert not any("normalised" in one.fact for one in check_census(census(legacy), "legacy"))
    legacy.execute(
        "UPDATE public.embeddings SET embedding = (SELECT array_agg(2 * x) FROM unnest(embedding::real[]) x)::vector"
        " WHERE id IN (SELECT id FROM public.embeddings ORDER BY id LIMIT 10)"
    )
    (noted,) = (one for one in check_census(census(legacy), "legacy") if "normalised" in one.fact)
    assert (noted.severity, "the others are not" in noted.fact) == ("note", True)
