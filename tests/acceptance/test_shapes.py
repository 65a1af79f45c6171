"""Every shape that a legacy table has: the layouts of the programs that make one, odd names, all kinds of tables.

Each is copied into a table that another program made on main, verified, and one planted difference is found.
"""

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from psycopg2 import sql

from tests.moves import Move
from tests.support import Database, environment, pipeline, run, start

ROWS = 300


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A table as a program makes it, on both sides; ``main`` is empty where Alembic makes it there.

    ``rows`` fills it on legacy with 300 rows; ``planted`` changes one row on main, whose key is ``key``.
    """

    table: str
    legacy: str
    rows: str
    planted: str
    key: str
    main: str = ""
    extension: str = "public"
    env: Mapping[str, str] = field(default_factory=dict)


def vectors(number: str = "i") -> str:
    """Return the SQL of a vector that differs from row to row."""
    return f"ARRAY[{number}, 1, sin({number})]::real[]"


def filled(table: str, columns: str, values: str) -> str:
    return f"INSERT INTO {table} ({columns}) SELECT {values} FROM generate_series(1, {ROWS}) AS i"


TEXTS = "'text ' || i || ' — é'"
OBJECTS = """jsonb_build_object('n', i, 'price', 1.10, 'tags', jsonb_build_array('a', null))"""
# json keeps its blanks, its order of keys and 1e3; jsonb takes the values.
JSON = """('{"z": ' || i || ',  "a": "\\u00e9", "n": 1e3}')::json"""
UUIDS = "md5('row' || i)::uuid"
FIRST = "md5('row1')::uuid"

LLAMA = """CREATE TABLE data_llamaindex (id bigserial PRIMARY KEY, text {text} NOT NULL, metadata_ {json},
    node_id varchar, embedding vector(3),
    text_search_tsv tsvector GENERATED ALWAYS AS (to_tsvector('english', text)) STORED);
    CREATE INDEX llamaindex_idx_1 ON data_llamaindex ((metadata_->>'ref_doc_id'))"""
PGVECTOR = """
    CREATE TABLE langchain_pg_collection (uuid uuid PRIMARY KEY, name varchar NOT NULL UNIQUE, cmetadata json);
    CREATE TABLE langchain_pg_embedding (id varchar PRIMARY KEY, collection_id uuid REFERENCES
        langchain_pg_collection (uuid) ON DELETE CASCADE, embedding vector, document varchar, cmetadata jsonb);
    CREATE INDEX ix_cmetadata_gin ON langchain_pg_embedding USING gin (cmetadata jsonb_path_ops);
    INSERT INTO langchain_pg_collection VALUES ('00000000-0000-4000-8000-000000000001', 'docs', '{}')"""
PGVECTOR_STORE = """CREATE TABLE embeddings (langchain_id uuid PRIMARY KEY, content text NOT NULL,
    embedding vector(3) NOT NULL, langchain_metadata {})"""
PGVECTOR_STORE_ROWS = filled(
    "embeddings", "langchain_id, content, embedding, langchain_metadata", f"{UUIDS}, {TEXTS}, {vectors()}, {JSON}"
)
PGVECTOR_STORE_ENV = {"PGVECTOR_COL_ID": "langchain_id", "PGVECTOR_COL_METADATA": "langchain_metadata"}
VECS = """CREATE SCHEMA vecs; CREATE TABLE vecs.docs (id varchar PRIMARY KEY, vec vector(3) NOT NULL,
    metadata jsonb NOT NULL DEFAULT '{}')"""
SUPABASE = """CREATE TABLE documents (id bigserial PRIMARY KEY, content text, metadata jsonb,
    embedding extensions.vector(3))"""
PGAI = """CREATE TABLE blog_embeddings_store (embedding_uuid uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    id int NOT NULL, chunk_seq int NOT NULL, chunk text NOT NULL, embedding vector(3) NOT NULL, UNIQUE (id, chunk_seq));
    ALTER TABLE blog_embeddings_store ALTER embedding SET STORAGE MAIN"""
PGAI_ROWS = filled(
    "blog_embeddings_store",
    "embedding_uuid, id, chunk_seq, chunk, embedding",
    f"{UUIDS}, i / 3, i % 3, {TEXTS}, {vectors()}",
)
PGAI_ENV = {"PGVECTOR_COL_ID": "embedding_uuid", "PGVECTOR_COL_CONTENT": "chunk"}
LAYOUTS = {
    "LangChain JS": Layout(
        table="embeddings",
        legacy="""CREATE TABLE embeddings ("id" uuid NOT NULL DEFAULT gen_random_uuid() PRIMARY KEY, "content" text,
            "metadata" jsonb, "embedding" vector(3))""",
        rows=filled("embeddings", "id, content, metadata, embedding", f"{UUIDS}, {TEXTS}, {OBJECTS}, {vectors()}"),
        planted=f"UPDATE embeddings SET content = 'x' WHERE id = {FIRST}",
        key=FIRST,
    ),
    "LangChain JS before 0.3.42": Layout(
        table="embeddings",
        # Stands for the one of uuid-ossp, which main does not have.
        legacy="""CREATE FUNCTION uuid_generate_v4() RETURNS uuid LANGUAGE sql AS 'SELECT gen_random_uuid()';
            CREATE TABLE embeddings ("id" uuid NOT NULL DEFAULT uuid_generate_v4() PRIMARY KEY, "content" text,
            "metadata" jsonb, "embedding" vector)""",
        rows=filled("embeddings", "id, content, metadata, embedding", f"{UUIDS}, {TEXTS}, {OBJECTS}, {vectors()}"),
        planted=f"""UPDATE embeddings SET metadata = metadata || '{{"price": 1.1}}' WHERE id = {FIRST}""",
        key=FIRST,
    ),
    "TypeORMVectorStore, Flowise": Layout(
        table="documents",
        legacy="""CREATE TABLE documents ("id" uuid NOT NULL DEFAULT gen_random_uuid() PRIMARY KEY, "pageContent" text,
            metadata jsonb, embedding vector)""",
        rows=filled("documents", 'id, "pageContent", metadata, embedding', f"{UUIDS}, {TEXTS}, NULL, {vectors()}"),
        planted=f"""UPDATE documents SET "pageContent" = "pageContent" || ' ' WHERE id = {FIRST}""",
        key=FIRST,
        env={"PGVECTOR_COL_CONTENT": "pageContent"},
    ),
    "n8n": Layout(
        table="n8n_vectors",
        legacy="CREATE TABLE n8n_vectors (id uuid PRIMARY KEY, text text, metadata jsonb, embedding vector)",
        rows=filled("n8n_vectors", "id, text, metadata, embedding", f"{UUIDS}, {TEXTS}, {OBJECTS}, {vectors()}"),
        planted=f"UPDATE n8n_vectors SET embedding = NULL WHERE id = {FIRST}",
        key=FIRST,
        env={"PGVECTOR_COL_CONTENT": "text"},
    ),
    "LangChain PGVector": Layout(
        table="langchain_pg_embedding",
        legacy=PGVECTOR,
        main=PGVECTOR,
        rows=filled(
            "langchain_pg_embedding",
            "id, collection_id, embedding, document, cmetadata",
            f"'doc/' || i, (SELECT uuid FROM langchain_pg_collection), {vectors()}, {TEXTS}, {OBJECTS}",
        ),
        planted="UPDATE langchain_pg_embedding SET collection_id = NULL WHERE id = 'doc/1'",
        key="'doc/1'",
        env={"PGVECTOR_COL_CONTENT": "document", "PGVECTOR_COL_METADATA": "cmetadata"},
    ),
    "LangChain PGVector before 0.0.1": Layout(
        table="langchain_pg_embedding",
        legacy="""CREATE TABLE langchain_pg_embedding (uuid uuid PRIMARY KEY, collection_id uuid, embedding vector,
            document varchar, cmetadata json, custom_id varchar)""",
        main="""CREATE TABLE langchain_pg_embedding (uuid varchar PRIMARY KEY, collection_id uuid, embedding vector(3),
            document text, cmetadata jsonb, custom_id varchar(20))""",
        rows=filled(
            "langchain_pg_embedding",
            "uuid, embedding, document, cmetadata, custom_id",
            f"{UUIDS}, {vectors()}, {TEXTS}, {JSON}, 'custom ' || i",
        ),
        planted=f"UPDATE langchain_pg_embedding SET custom_id = 'x' WHERE uuid = ({FIRST})::text",
        key=FIRST,
        env={
            "PGVECTOR_COL_ID": "uuid",
            "PGVECTOR_COL_CONTENT": "document",
            "PGVECTOR_COL_METADATA": "cmetadata",
        },
    ),
    "PGVectorStore into json": Layout(
        table="embeddings",
        legacy=PGVECTOR_STORE.format("json"),
        main=PGVECTOR_STORE.format("json"),
        rows=PGVECTOR_STORE_ROWS,
        # Another text of the same value: json keeps texts.
        planted=f"""UPDATE embeddings SET langchain_metadata = langchain_metadata::jsonb::json
            WHERE langchain_id = {FIRST}""",
        key=FIRST,
        env=PGVECTOR_STORE_ENV,
    ),
    "PGVectorStore into jsonb": Layout(
        table="embeddings",
        legacy=PGVECTOR_STORE.format("json"),
        main=PGVECTOR_STORE.format("jsonb"),
        rows=PGVECTOR_STORE_ROWS,
        planted=f"""UPDATE embeddings SET langchain_metadata = langchain_metadata || '{{"n": 1001}}'
            WHERE langchain_id = {FIRST}""",
        key=FIRST,
        env=PGVECTOR_STORE_ENV,
    ),
    "LlamaIndex": Layout(
        table="data_llamaindex",
        legacy=LLAMA.format(text="varchar", json="json"),
        main=LLAMA.format(text="text", json="jsonb"),
        rows=filled(
            "data_llamaindex", "text, metadata_, node_id, embedding", f"{TEXTS}, {JSON}, ({UUIDS})::text, {vectors()}"
        ),
        planted="UPDATE data_llamaindex SET node_id = 'x' WHERE id = 1",
        key="1",
        env={"PGVECTOR_COL_CONTENT": "text", "PGVECTOR_COL_METADATA": "metadata_"},
    ),
    "vecs": Layout(
        table="vecs.docs",
        legacy=VECS,
        main=VECS,
        rows=filled("vecs.docs", "id, vec, metadata", f"'doc ' || i, {vectors()}, {OBJECTS}"),
        planted="UPDATE vecs.docs SET vec = '[1,2,3]' WHERE id = 'doc 1'",
        key="'doc 1'",
        env={"PGVECTOR_COL_VECTOR": "vec"},
    ),
    "Supabase": Layout(
        table="documents",
        extension="extensions",
        legacy=SUPABASE,
        main=SUPABASE,
        rows=filled(
            "documents", "content, metadata, embedding", f"{TEXTS}, {OBJECTS}, ({vectors()})::extensions.vector"
        ),
        planted="UPDATE documents SET metadata = NULL WHERE id = 1",
        key="1",
    ),
    "pgai's store": Layout(
        table="blog_embeddings_store",
        legacy=PGAI,
        main=PGAI,
        rows=PGAI_ROWS,
        planted=f"UPDATE blog_embeddings_store SET chunk_seq = 9 WHERE embedding_uuid = {FIRST}",
        key=FIRST,
        env=PGAI_ENV,
    ),
    "pgai's view": Layout(
        table="blog_embeddings",
        legacy=f"""{PGAI}; CREATE TABLE blog (id int PRIMARY KEY, title text, body text);
            INSERT INTO blog SELECT i, 'title ' || i, 'body' FROM generate_series(0, 50) AS i;
            CREATE VIEW blog_embeddings AS
            SELECT t.*, s.title, s.body FROM blog_embeddings_store t LEFT JOIN blog s ON t.id = s.id""",
        main="""CREATE TABLE blog_embeddings (embedding_uuid uuid PRIMARY KEY, id bigint, chunk_seq int, chunk text,
            embedding vector(3), title text, body text)""",
        rows=PGAI_ROWS,
        planted=f"UPDATE blog_embeddings SET title = 'x' WHERE embedding_uuid = {FIRST}",
        key=FIRST,
        env=PGAI_ENV,
    ),
}


def hashed(database: Database, table: str, columns: str = "*") -> str:
    return str(
        database.value(f"SELECT md5(string_agg(q::text, '|' ORDER BY q::text)) FROM (SELECT {columns} FROM {table}) q")
    )


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_carried_whole_and_a_planted_difference_is_found(name: str, new_move: Callable[..., Move]) -> None:
    layout = LAYOUTS[name]
    move = new_move(layout.legacy, layout.main, layout.table, layout.extension, **layout.env)
    move.legacy.execute(layout.rows)
    assert move.copy_and_verify()["rows"] == ROWS
    # json as the value that it stands for; its text is compared by verify, where both sides keep it.
    columns = ", ".join(
        f'"{column}"::jsonb::text' if kind.startswith("json") else f'"{column}"::text'
        for column, kind in move.main.rows(
            "SELECT attname, format_type(atttypid, -1) FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0",
            layout.table,
        )
    )
    assert hashed(move.main, layout.table, columns) == hashed(move.legacy, layout.table, columns)
    move.main.execute(layout.planted)
    move.finds("different", move.main.value(f"SELECT ({layout.key})::text"))


def test_table_that_alembic_is_to_adopt_must_be_there(empty_main: Database) -> None:
    refused = run("alembic", "-x", "adopt=yes", "upgrade", "head", env=environment(main=empty_main)).expect(4)
    assert "there is no table public.embeddings" in refused.err


def test_adopted_table_keeps_its_indexes_and_survives_a_downgrade(new_move: Callable[..., Move]) -> None:
    move = new_move("SELECT", f"{VECS}; CREATE INDEX own ON vecs.docs USING hnsw (vec vector_l2_ops)", "vecs.docs")
    indexes = "SELECT indexname FROM pg_indexes WHERE schemaname = 'vecs' ORDER BY 1"
    assert move.main.rows(indexes) == [("docs_pkey",), ("own",)]
    run("alembic", "downgrade", "base", env=move.env).expect(0)
    assert move.main.rows(indexes) == [("docs_pkey",), ("own",)]


# ---------------------------------------------------------------- columns beyond the four


EMBEDDINGS = "CREATE TABLE {} (id {} PRIMARY KEY, content text, metadata jsonb, embedding vector(3)"
PLAIN = EMBEDDINGS.format("embeddings", "bigint") + ")"
PLAIN_ROWS = filled("embeddings", "id, content, metadata, embedding", f"i, {TEXTS}, {OBJECTS}, {vectors()}")


def test_ignored_column_stays_behind_and_verify_says_so(new_move: Callable[..., Move]) -> None:
    move = new_move(
        f"{PLAIN}; ALTER TABLE embeddings ADD tenant text DEFAULT 'a', ADD \"50%\" int; {PLAIN_ROWS}", PLAIN
    )
    refused = move.copy().expect(4)
    assert "main has no column tenant (text)" in refused.err
    assert "--ignore-column tenant" in refused.err
    assert "has no column 'tenannt'" in move.copy("--ignore-column", "tenannt").expect(4).err
    assert "in the key" in move.copy("--ignore-column", "id").expect(4).err
    ignored = ("--ignore-column", "tenant", "--ignore-column", "50%")
    move.copy(*ignored).expect(0)
    # Without the option, the column that is missing is said again.
    move.verify().expect(4)
    digests = move.verify(*ignored).expect(0).json["checks"][1]
    assert digests["figures"]["ignored_columns"] == ["tenant", "50%"]
    assert digests["summary"].endswith("not compared: tenant, 50%")
    assert hashed(move.main, "embeddings") == hashed(move.legacy, "embeddings", "id, content, metadata, embedding")


def test_column_that_main_has_too_may_be_ignored_and_gets_its_default(new_move: Callable[..., Move]) -> None:
    extra = "ALTER TABLE embeddings ADD tenant text DEFAULT '{}'"
    move = new_move(f"{PLAIN}; {extra.format('a')}; {PLAIN_ROWS}", f"{PLAIN}; {extra.format('b')}")
    move.copy("--ignore-column", "tenant").expect(0)
    move.verify("--ignore-column", "tenant").expect(0)
    assert move.main.rows("SELECT DISTINCT tenant FROM embeddings") == [("b",)]
    # Bound to its columns, the run is another one without the option.
    assert "its columns have changed" in move.copy().expect(4).err


def test_generated_columns_of_either_side_and_identities_are_carried(new_move: Callable[..., Move]) -> None:
    identity = EMBEDDINGS.format("embeddings", "bigint GENERATED ALWAYS AS IDENTITY")
    move = new_move(
        f"{identity}, words int GENERATED ALWAYS AS (length(content)) STORED, here int GENERATED ALWAYS AS (1) STORED)",
        f"{identity}, words int GENERATED ALWAYS AS (length(content)) STORED, here int,"
        " there int GENERATED ALWAYS AS (2) VIRTUAL)",
    )
    move.legacy.execute(PLAIN_ROWS.replace("SELECT", "OVERRIDING SYSTEM VALUE SELECT", 1))
    with move.copy_held():
        move.legacy.execute("UPDATE embeddings SET content = 'changed meanwhile' WHERE id = 7")
    move.verify().expect(0)
    assert move.main.rows("SELECT DISTINCT here, there, words = length(content) FROM embeddings") == [(1, 2, True)]
    move.main.execute("INSERT INTO embeddings (content) VALUES ('next')")
    assert move.main.value("SELECT id FROM embeddings WHERE content = 'next'") == ROWS + 1


def test_identity_beside_the_key_is_refused_with_the_line_that_helps(new_move: Callable[..., Move]) -> None:
    move = new_move(
        f"{PLAIN[:-1]}, n int); {PLAIN_ROWS}; UPDATE embeddings SET n = id",
        f"{PLAIN[:-1]}, n int GENERATED ALWAYS AS IDENTITY)",
    )
    refused = move.copy().expect(4)
    assert "column n is GENERATED ALWAYS AS IDENTITY and not in the key" in refused.err
    move.main.execute(refused.err.split("on main: ")[1].strip())
    move.copy_and_verify()
    move.main.execute("INSERT INTO embeddings (id) VALUES (-1)")
    assert move.main.value("SELECT n FROM embeddings WHERE id = -1") == ROWS + 1


@pytest.mark.parametrize(
    ("ids", "expected"), [("i", ROWS + 1), ("-i", 1), ("i + 9223372036854775507", None), ("i - 250", 51)]
)
def test_sequences_go_on_behind_the_rows(ids: str, expected: int | None, new_move: Callable[..., Move]) -> None:
    serial = EMBEDDINGS.format("embeddings", "bigserial") + ")"
    move = new_move(f"{serial}; {PLAIN_ROWS.replace('SELECT i,', f'SELECT {ids},')}", serial)
    move.copy_and_verify()
    if expected is None:
        # The largest bigint is taken: nothing comes after it, and nothing comes before it again.
        assert move.main.rows("SELECT last_value, is_called FROM embeddings_id_seq") == [(2**63 - 1, True)]
    else:
        assert move.main.value("SELECT nextval('embeddings_id_seq')") == expected


def test_sequence_that_is_ahead_stays_and_one_that_may_not_be_set_is_told(new_move: Callable[..., Move]) -> None:
    serial = EMBEDDINGS.format("embeddings", "bigserial") + ")"
    move = new_move(f"{serial}; {PLAIN_ROWS}", f"{serial}; SELECT setval('embeddings_id_seq', 5000)")
    move.copy_and_verify()
    assert move.main.value("SELECT nextval('embeddings_id_seq')") == 5001
    move.main.execute(
        "TRUNCATE embeddings; SELECT setval('embeddings_id_seq', 1);"
        " CREATE ROLE writer LOGIN PASSWORD 'writer'; GRANT USAGE ON SCHEMA pipeline TO writer;"
        " GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA pipeline, public TO writer"
    )
    try:
        env = move.env | {"DB_USER": "writer", "DB_PASSWORD": "writer"}
        told = pipeline("copy", env=env).expect(0)
        assert "the sequence public.embeddings_id_seq was not set" in told.err
        assert move.main.value("SELECT last_value FROM embeddings_id_seq") == 1
    finally:
        move.main.execute("DROP OWNED BY writer; DROP ROLE writer")


# ---------------------------------------------------------------- names


NAMES = {
    "words of SQL": ("select", "from", "user"),
    "capitals and quotes": ('My "Docs"', 'The "Id"', "It's"),
    "percent signs": ("100%s", "50%", "%(x)s"),
    "63 bytes": ("t" * 63, "i" * 63, "ü" * 31 + "c"),
    "other scripts": ("таблица", "主键", "محتوى 🙂"),
    "dots, blanks and backslashes": ("a.b", " x ", "\\n"),
    "our own aliases": ("q", "k", "t"),
    "our own columns": ("s", "d", "h"),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_that_need_quotes_are_carried_verified_and_told(case: str, new_move: Callable[..., Move]) -> None:
    table, key, content = NAMES[case]
    schema = f"{table[:20]} s"
    names = {
        "schema": sql.Identifier(schema),
        "table": sql.Identifier(schema, table),
        "key": sql.Identifier(key),
        "content": sql.Identifier(content),
    }
    made = "CREATE SCHEMA {schema}; CREATE TABLE {table} ({key} text PRIMARY KEY, {content} text, embedding vector(3))"
    statement: Any = sql.SQL(made).format(**names)
    quoted = ".".join('"' + name.replace('"', '""') + '"' for name in (schema, table))
    env = {"PGVECTOR_COL_ID": key, "PGVECTOR_COL_CONTENT": content}
    move = new_move(statement, statement, quoted, **env)
    rows = """INSERT INTO {table} SELECT '%s ' || chr(37) || i, 'text ' || i, ARRAY[i, 1, 2]
        FROM generate_series(1, 20) AS i"""
    move.legacy.execute(sql.SQL(rows).format(**names))
    with move.copy_held():
        move.legacy.execute(sql.SQL("UPDATE {table} SET {content} = 'new' WHERE {key} = '%s %1'").format(**names))
        move.legacy.execute(sql.SQL("DELETE FROM {table} WHERE {key} = '%s %2'").format(**names))
    move.verify().expect(0)
    move.main.execute(sql.SQL("UPDATE {table} SET {content} = 'x' WHERE {key} = '%s %3'").format(**names))
    move.finds("different", "%s %3")


def test_objects_that_shadow_the_servers_own_are_not_called(new_move: Callable[..., Move]) -> None:
    """The database's search_path puts functions, operators and types of the same names before the server's own."""
    evil = """CREATE SCHEMA evil;
        CREATE FUNCTION evil.fail() RETURNS bool LANGUAGE plpgsql AS $$ BEGIN RAISE 'called'; END $$;
        CREATE FUNCTION evil.textsend(text) RETURNS bytea LANGUAGE sql AS 'SELECT evil.fail()::text::bytea';
        CREATE FUNCTION evil.count(bigint) RETURNS bigint LANGUAGE sql AS 'SELECT evil.fail()::int::bigint';
        CREATE FUNCTION evil.same(bigint, bigint) RETURNS bool LANGUAGE sql AS 'SELECT evil.fail()';
        CREATE FUNCTION evil.far(vector, vector) RETURNS float8 LANGUAGE sql AS 'SELECT evil.fail()::int::float8';
        CREATE OPERATOR evil.= (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = evil.same);
        CREATE OPERATOR evil.<=> (LEFTARG = vector, RIGHTARG = vector, FUNCTION = evil.far);
        CREATE DOMAIN evil.text AS pg_catalog.int4; CREATE DOMAIN evil.tid AS pg_catalog.int4;
        DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET search_path = evil, pg_catalog, public', current_database());
        END $$"""
    move = new_move(f"{PLAIN}; {PLAIN_ROWS}; {evil}", f"{PLAIN}; {evil}")
    with move.copy_held("--slice-size", "1"):
        move.legacy.execute("UPDATE public.embeddings SET content = 'new' WHERE content LIKE 'text 7 %'")
    move.verify().expect(0)


# ---------------------------------------------------------------- kinds of tables

CHANGES = """UPDATE {table} SET content = 'new' WHERE id = 7; DELETE FROM {table} WHERE id = 8;
    INSERT INTO {table} (id, content, embedding) VALUES (1000, 'added', '[1,2,3]')"""


def hashed_both(move: Move) -> tuple[str, str]:
    columns = "id, content, metadata, embedding"
    return hashed(move.legacy, move.table, columns), hashed(move.main, move.table, columns)


PARTITIONED = f"""{PLAIN} PARTITION BY RANGE (id);
    CREATE SCHEMA "Other One";
    CREATE TABLE low PARTITION OF embeddings FOR VALUES FROM (MINVALUE) TO (50);
    CREATE TABLE middle PARTITION OF embeddings FOR VALUES FROM (50) TO (200) PARTITION BY HASH (id);
    CREATE TABLE "Other One"."mid""dle" PARTITION OF middle FOR VALUES WITH (MODULUS 2, REMAINDER 0);
    CREATE TABLE middle_1 PARTITION OF middle FOR VALUES WITH (MODULUS 2, REMAINDER 1);
    CREATE TABLE rest PARTITION OF embeddings DEFAULT; {PLAIN_ROWS}"""


def test_every_partition_is_carried_and_what_changes_meanwhile_too(new_move: Callable[..., Move]) -> None:
    move = new_move(PARTITIONED, PLAIN)
    pipeline("preflight", env=move.env).expect(0)
    with move.copy_held():
        move.legacy.execute(CHANGES.format(table="embeddings"))
        # From one partition into another one, which is a delete and an insert.
        move.legacy.execute("UPDATE embeddings SET id = 1001 WHERE id = 60")
        move.legacy.execute("CREATE TABLE new PARTITION OF embeddings FOR VALUES FROM (2000) TO (3000)")
        move.legacy.execute("INSERT INTO embeddings (id) VALUES (2001)")
    move.verify().expect(0)
    assert len(set(hashed_both(move))) == 1
    relations = move.main.rows("SELECT relation FROM pipeline.slice ORDER BY ordinal")
    assert (["Other One", 'mid"dle'],) in relations
    assert len(relations) == 4
    move.main.execute("DELETE FROM embeddings WHERE id = 200")
    move.finds("missing", "200")


def test_partition_that_is_gone_ends_the_run_with_the_reason(new_move: Callable[..., Move]) -> None:
    move = new_move(PARTITIONED, PLAIN)
    move.copy().expect(0)
    move.legacy.execute("ALTER TABLE embeddings DETACH PARTITION low")
    assert "one of the tables was made anew since" in move.copy().expect(4).err
    move.verify().expect(3)


def test_role_that_may_read_the_parent_alone_reads_it_by_key(new_move: Callable[..., Move]) -> None:
    move = new_move(PARTITIONED, PLAIN)
    move.legacy.execute("CREATE ROLE reader LOGIN PASSWORD 'reader'; GRANT SELECT ON embeddings TO reader")
    try:
        env = move.env | {"PGVECTOR_USER": "reader", "PGVECTOR_PASSWORD": "reader"}
        limited = Move(legacy=move.legacy, main=move.main, table=move.table, env=env)
        limited.copy_and_verify()
        assert move.main.rows("SELECT DISTINCT kind FROM pipeline.slice") == [("keys",)]
    finally:
        move.legacy.execute("DROP OWNED BY reader; DROP ROLE reader")


def test_key_of_a_partitioned_table_may_hold_what_divides_it(new_move: Callable[..., Move]) -> None:
    made = PARTITIONED.replace("id bigint PRIMARY KEY", "id bigint, at date DEFAULT '2026-01-01', PRIMARY KEY (id, at)")
    move = new_move(made, f"{PLAIN[:-1]}, at date)")
    move.copy_and_verify()
    move.legacy.execute("INSERT INTO embeddings (id, at) VALUES (7, '2026-02-02'), (9, '2026-02-02')")
    refused = pipeline("sync", env=move.env).expect(4)
    assert "2 keys (id) occur more than once, first: 7, 9" in refused.err
    figures = move.verify("--check", "rows").expect(3).json["checks"][1]["figures"]
    assert [(one["kind"], one["key"]) for one in figures["keys"]] == [("doubled", "7"), ("doubled", "9")]


def test_tables_that_inherit_are_refused_and_not_left_out(new_move: Callable[..., Move]) -> None:
    move = new_move(f"{PLAIN}; {PLAIN_ROWS}; CREATE TABLE more () INHERITS (embeddings)", PLAIN)
    assert "has tables that inherit from it" in move.copy().expect(4).err
    move.legacy.execute("ALTER TABLE more NO INHERIT embeddings")
    move.copy_and_verify()


WIDE = PLAIN_ROWS.replace(TEXTS, f"repeat({TEXTS}, 2000)")
VIEW = f"{PLAIN}; {WIDE}; CREATE {{}} ".replace("embeddings", "store") + "embeddings AS SELECT * FROM store"


def test_view_is_carried_by_key_and_what_changes_meanwhile_too(new_move: Callable[..., Move]) -> None:
    move = new_move(VIEW.format("VIEW"), PLAIN)
    pipeline("preflight", env=move.env).expect(0)
    planned = move.copy("--dry-run", "--slice-size", "1", "--json").expect(0).json["plan"]
    with move.copy_held("--slice-size", "1"):
        move.legacy.execute(CHANGES.format(table="store"))
    move.verify().expect(0)
    assert len(set(hashed_both(move))) == 1
    slices = move.main.rows("SELECT kind, lower, upper FROM pipeline.slice ORDER BY ordinal")
    assert len(slices) == planned["slices"] > 3
    assert {kind for kind, _, _ in slices} == {"keys"}
    assert (slices[0][1], slices[-1][2]) == (None, None)
    assert [upper for _, _, upper in slices[:-1]] == [lower for _, lower, _ in slices[1:]]
    move.main.execute("UPDATE embeddings SET content = content || ' ' WHERE id = 9")
    move.finds("different", "9")


def test_copy_of_a_view_goes_on_where_it_was_killed(new_move: Callable[..., Move]) -> None:
    move = new_move(VIEW.format("VIEW"), PLAIN)
    gate = "ALTER TABLE embeddings ADD CONSTRAINT slow CHECK (id < 200 OR pg_sleep(0.02) IS NOT NULL)"
    move.main.execute(gate)
    process = start("copy", "--slice-size", "1", "--workers", "1", env=move.env)
    deadline = time.monotonic() + 20
    while not move.main.value("SELECT count(finished_at) FROM pipeline.slice"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    move.main.execute("ALTER TABLE embeddings DROP CONSTRAINT slow")
    before = move.main.rows("SELECT ordinal, lower, upper, finished_at FROM pipeline.slice ORDER BY ordinal")
    done = move.copy_and_verify()
    assert done["moved_slices"] < done["slices"]
    after = move.main.rows("SELECT ordinal, lower, upper, finished_at FROM pipeline.slice ORDER BY ordinal")
    assert [row[:3] for row in before] == [row[:3] for row in after]
    assert {row for row in before if row[3]} <= set(after)


def test_materialized_view_is_carried_and_refreshed_meanwhile(new_move: Callable[..., Move]) -> None:
    move = new_move(VIEW.format("MATERIALIZED VIEW"), PLAIN)
    with move.copy_held("--slice-size", "1"):
        move.legacy.execute(f"{CHANGES.format(table='store')}; REFRESH MATERIALIZED VIEW embeddings")
    move.verify().expect(0)
    assert len(set(hashed_both(move))) == 1


def test_view_whose_keys_are_not_keys_is_refused_with_them(new_move: Callable[..., Move]) -> None:
    doubled = VIEW.format("VIEW").replace("SELECT * FROM store", "TABLE store UNION ALL TABLE store WHERE id IN (3, 4)")
    move = new_move(doubled.replace("TABLE store WHERE", "SELECT * FROM store WHERE"), PLAIN)
    refused = move.copy().expect(4)
    assert "2 keys (id) occur more than once, first: 3, 4" in refused.err
    move.legacy.execute(
        "CREATE OR REPLACE VIEW embeddings AS SELECT nullif(id, 5) AS id, content, metadata, embedding FROM store"
    )
    assert "1 row without a value in column id" in move.copy().expect(4).err
    assert move.main.value("SELECT count(*) FROM pipeline.run") == 0


def test_view_without_the_key_of_main_is_refused(new_move: Callable[..., Move]) -> None:
    made = VIEW.format("VIEW").replace(
        "SELECT * FROM store", "SELECT id AS other, content, metadata, embedding FROM store"
    )
    move = new_move(made, f"{PLAIN[:-1]}, other bigint)", PGVECTOR_COL_ID="other")
    assert "the key of main's public.embeddings has the column id, which legacy's" in move.copy().expect(4).err
