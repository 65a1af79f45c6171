"""The census counts exactly what is there, by one scan, in every type of vector and on every server."""

from collections.abc import Callable

import numpy as np
import pytest

from pipeline.check.census import Census, Norms, can_take_census, check_census, take_census
from pipeline.endpoints import Endpoint, Secret
from pipeline.postgres.database import Session
from pipeline.postgres.tables import describe
from pipeline.settings import TableMapping
from tests.data import DataSet, fill, load
from tests.support import Database


def census(database: Database) -> Census:
    endpoint = Endpoint(
        name="legacy",
        host=database.server.host,
        port=database.server.port,
        user=database.user,
        database=database.name,
        password=Secret(database.password),
    )
    with Session(endpoint, "test") as session:
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


def test_figures_that_no_server_here_can_hold_are_judged_too() -> None:
    norms = Norms(minimum=1.0, p05=1.0, median=1.0, p95=22.0, maximum=23.0, normalised=0.8)
    found = Census(
        rows=10,
        null_embeddings=0,
        zero_norms=0,
        not_finite=1,
        dimensions=((768, 10),),
        norms=norms,
        duplicate_groups=0,
        duplicate_rows=0,
        null_contents=0,
        null_metadata=0,
        seconds=0.1,
    )
    refused, noted = check_census(found, "legacy")
    assert (refused.severity, "1 vector with NaN or infinity" in refused.fact) == ("refuse", True)
    assert (noted.severity, "80% of the vectors are normalised" in noted.fact) == ("note", True)
