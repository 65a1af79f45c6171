"""The SQL of LangChain JS's PGVectorStore, letter by letter, on tables that were moved from 16 to 18."""

import json
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
from psycopg2 import sql

from tests.data import DataSet, content, fill, load
from tests.moves import Move
from tests.support import Database, environment, pipeline

# @langchain/community 1.1.29, dist/vectorstores/pgvector.js, for tableName "embeddings" without schemaName.
INITIALIZE = (
    "CREATE EXTENSION IF NOT EXISTS vector;",
    """
      CREATE TABLE IF NOT EXISTS embeddings (
        "id" uuid NOT NULL DEFAULT gen_random_uuid() PRIMARY KEY,
        "content" text,
        "metadata" jsonb,
        "embedding" vector(768)
      );
    """,
)
SEARCH = """
      SELECT *, "embedding" {} $1 as "_distance"
      FROM embeddings
      {}
      ORDER BY "_distance" ASC
      LIMIT $2;
      """
INSERT = """
      INSERT INTO embeddings(
        {}
      )
      VALUES {}
    """
DELETE = """
      DELETE FROM embeddings
      WHERE {}
    """
INDEX = """CREATE INDEX IF NOT EXISTS embedding_embedding_hnsw_idx
        ON embeddings USING hnsw ((embedding::vector(768)) vector_cosine_ops)
        WITH (
            m=16,
            ef_construction=64
        );"""
COLUMNS = '"content", "embedding", "metadata"'
COLLECTIONS = """
        CREATE TABLE IF NOT EXISTS collections (
          uuid uuid NOT NULL DEFAULT gen_random_uuid() PRIMARY KEY,
          name character varying,
          cmetadata jsonb
        );

        CREATE INDEX IF NOT EXISTS idx_collections_name ON collections(name);

        ALTER TABLE embeddings
          ADD COLUMN collection_id uuid;

        ALTER TABLE embeddings
          ADD CONSTRAINT embeddings_collection_id_fkey
          FOREIGN KEY (collection_id)
          REFERENCES collections(uuid)
          ON DELETE CASCADE;
      """
COLLECTION = """
      SELECT uuid from collections
      WHERE name = $1;
    """
NEW_COLLECTION = """
        INSERT INTO collections(
          uuid,
          name,
          cmetadata
        )
        VALUES (
          gen_random_uuid(),
          $1,
          $2
        )
        RETURNING uuid;
      """


def send(database: Database, statement: str, *parameters: str | int | None) -> list[dict[str, Any]]:
    """Run a statement with $1, $2, ... as node-postgres does: the text as it is, every parameter of no type."""
    with database.cursor() as cursor:
        cursor.execute("PREPARE client AS " + statement)
        values = [sql.Literal(None if value is None else str(value)) for value in parameters]
        arguments = sql.SQL("({})").format(sql.SQL(", ").join(values)) if values else sql.SQL("")
        cursor.execute(sql.SQL("EXECUTE client{}").format(arguments))
        if cursor.description is None:
            return []
        names = [column.name for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def array(ids: list[str]) -> str:
    """Return ids as node-postgres writes an array."""
    return "{" + ",".join(f'"{one}"' for one in ids) + "}"


def vector(numbers: Any) -> str:
    return "[" + ",".join(str(number) for number in numbers) + "]"


@pytest.fixture
def data(legacy: Database, main: Database) -> DataSet:
    """Return the real embeddings that were copied from legacy to main."""
    data = load("nomic768")
    fill(legacy, data)
    pipeline("copy", env=environment(legacy=legacy, main=main)).expect(0)
    return data


def test_initialize_and_its_index_leave_the_moved_table_as_it_is(
    data: DataSet, legacy: Database, main: Database
) -> None:
    columns = """SELECT attname, format_type(atttypid, atttypmod), attnotnull FROM pg_attribute
        WHERE attrelid = 'embeddings'::regclass AND attnum > 0 ORDER BY attnum"""
    before = main.rows(columns)
    for statement in (*INITIALIZE, INDEX):
        main.execute(statement)
    assert main.rows(columns) == before
    assert main.value("SELECT count(*) FROM pg_class WHERE relkind = 'r' AND relname = 'embeddings'") == 1
    assert content(main) == content(legacy)


@pytest.mark.parametrize("operator", ["<=>", "<->", "<#>"])
def test_search_finds_on_main_what_it_found_on_legacy(
    operator: str, data: DataSet, legacy: Database, main: Database
) -> None:
    for query in data.vectors[:3]:
        found, before = (send(one, SEARCH.format(operator, ""), vector(query.tolist()), 4) for one in (main, legacy))
        assert [row["id"] for row in found] == [row["id"] for row in before]
        assert [row["content"] for row in found] == [row["content"] for row in before]
        assert [row["metadata"] for row in found] == [row["metadata"] for row in before]
        assert [row["_distance"] for row in found] == pytest.approx([row["_distance"] for row in before], abs=1e-6)
    assert len(found) == 4


# Of buildFilterClauses; the data's own keys differ from set to set, so rows with these are added.
FILTERS: dict[str, tuple[str, tuple[str | int, ...], set[int]]] = {
    "equal": ("metadata->>'shelf' = $3", ("b",), {2}),
    "in": ("metadata->>'shelf' IN ($3,$4)", ("a", "b"), {1, 2}),
    "notIn": ("metadata->>'shelf' NOT IN ($3,$4)", ("a", "b"), {3}),
    "gte": ("(metadata->>'number')::numeric >= $3", (2,), {2, 3}),
    "two": ("(metadata->>'number')::numeric > $3 AND (metadata->>'number')::numeric <= $4", (1, 2), {2}),
    "neq": (
        "(metadata->>'shelf' IS NULL OR (metadata->>'shelf')::text != $3) AND metadata->>'shelf' IN ($4,$5)",
        ("a", "a", "c"),
        {3},
    ),
    "arrayContains": ("metadata->'words' ?| array[$3,$4]", ("two", "three"), {2, 3}),
}


def test_rows_are_added_filtered_and_deleted(data: DataSet, legacy: Database, main: Database) -> None:
    rows = [
        (f"text {number}", vector(data.vectors[number].tolist()), json.dumps(metadata))
        for number, metadata in (
            (1, {"shelf": "a", "number": 1, "words": ["one"]}),
            (2, {"shelf": "b", "number": 2, "words": ["one", "two"]}),
            (3, {"shelf": "c", "number": 3, "words": ["three"]}),
        )
    ]
    # Without ids the table's own default makes them, which the copy has left in place.
    send(main, INSERT.format(COLUMNS, "($1, $2, $3), ($4, $5, $6)"), *rows[0], *rows[1])
    given = str(uuid4())
    send(main, INSERT.format(f'{COLUMNS}, "id"', "($1, $2, $3, $4)"), *rows[2], given)
    query = vector(data.vectors[0].tolist())
    # With more rows asked for than an index returns, the planner has to scan.
    wanted = len(data.rows) + len(rows)
    for name, (clause, parameters, expected) in FILTERS.items():
        found = send(main, SEARCH.format("<=>", f"WHERE {clause}"), query, wanted, *parameters)
        assert {row["metadata"]["number"] for row in found} == expected, name
        distances = [row["_distance"] for row in found]
        assert distances == sorted(distances)
    nearest = send(main, SEARCH.format("<=>", ""), rows[2][1], 2)
    assert given in {row["id"] for row in nearest}

    send(main, DELETE.format("id = ANY($1::uuid[])"), array([given, str(uuid4())]))
    assert main.value("SELECT count(*) FROM embeddings") == len(data.rows) + 2
    send(main, DELETE.format("metadata->>'shelf' = $1 AND (metadata->>'number')::numeric < $2"), "a", 2)
    send(main, DELETE.format("metadata->>'shelf' IN ($1,$2)"), "b", "c")
    assert content(main) == content(legacy)


def add_to(database: Database, collection: str, number: int) -> None:
    columns = f'{COLUMNS}, "collection_id"'
    row = (f"text {number}", vector([number, 1, 0]), json.dumps({"number": number}))
    send(database, INSERT.format(columns, "($1, $2, $3, $4)"), *row, collection)


def test_collections_are_kept_apart_after_the_move(new_move: Callable[..., Move]) -> None:
    table = INITIALIZE[1].replace("768", "3") + COLLECTIONS
    move = new_move(table, table)
    ids = {name: send(move.legacy, NEW_COLLECTION, name, "{}")[0]["uuid"] for name in ("docs", "notes")}
    for number in range(1, 7):
        add_to(move.legacy, ids["docs" if number % 2 else "notes"], number)
    # The collections are a table of a few rows without an embedding: they go by hand, before.
    for row in move.legacy.rows("SELECT uuid::text, name, cmetadata::text FROM collections"):
        move.main.execute("INSERT INTO collections VALUES (%s, %s, %s)", *row)
    assert move.copy_and_verify()["rows"] == 6

    assert {name: send(move.main, COLLECTION, name)[0]["uuid"] for name in ids} == ids
    search = SEARCH.format("<=>", "WHERE collection_id = $3")
    found = send(move.main, search, "[1,1,0]", 10, ids["docs"])
    assert [row["metadata"]["number"] for row in found] == [1, 3, 5]
    add_to(move.main, ids["docs"], 7)
    filtered = SEARCH.format("<=>", "WHERE collection_id = $3 AND (metadata->>'number')::numeric >= $4")
    (added,) = send(move.main, filtered, "[1,1,0]", 10, ids["docs"], 6)
    # Of another collection nothing is deleted, whatever its id.
    delete = DELETE.format("collection_id = $2 AND id = ANY($1::uuid[])")
    send(move.main, delete, array([added["id"]]), ids["notes"])
    assert len(send(move.main, search, "[1,1,0]", 10, ids["docs"])) == 4
    send(move.main, delete, array([added["id"]]), ids["docs"])
    send(move.main, DELETE.format("collection_id = $1 AND metadata->>'number' = $2"), ids["notes"], "1")
    move.verify("--check", "rows").expect(0)
    # A deleted collection takes its rows along, as the client's constraint says.
    move.main.execute("DELETE FROM collections WHERE name = 'notes'")
    assert move.main.value("SELECT count(*) FROM embeddings") == 3
