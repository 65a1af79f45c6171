"""The revisions on real servers, run by ``alembic`` as an operator would."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2.errors
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from psycopg2 import sql

from pipeline.demo.servers import free_port
from pipeline.errors import EXIT_INTERRUPTED, EXIT_REFUSED, EXIT_UNREACHABLE, EXIT_USAGE, RefusedError
from pipeline.ledger import REVISION
from pipeline.search.table import hnsw_index_name
from pipeline.settings import Settings, TableMapping
from tests.support import CANARY, ROOT, Database, Outcome, clean_environment, command_line, environment, run

NewDatabase = Callable[..., Database]
LANGCHAIN = """CREATE TABLE embeddings ("id" uuid NOT NULL DEFAULT {} PRIMARY KEY,
    "content" text, "metadata" jsonb, "embedding" vector(768))"""
ROW = "INSERT INTO embeddings (content, embedding) SELECT 'a text', array_fill(0.1, ARRAY[768])::vector"
LEDGER = {"run", "slice", "deferred_index", "quarantine", "verdict", "baseline", "step"}
RELATIONS = """SELECT n.nspname, c.relname, c.relkind::text, c.oid FROM pg_class c JOIN pg_namespace n
    ON n.oid = c.relnamespace WHERE n.nspname !~ '^(pg_|information_schema)' ORDER BY c.oid"""
RUN = """INSERT INTO pipeline.run (source_label, target_label, source_system, source_database, source_schema,
    source_table, source_oid, target_schema, target_table, target_oid, column_names, column_types, key_columns,
    slice_bytes, fingerprint, source_horizon, target_horizon, tool_version)
    VALUES ('s', 't', 18446744073709551615, 'd', 's', 't', 1, 'public', 'embeddings', 2,
    '{a}', '{text}', '{a}', 1, 'f', 1, 1, '0') RETURNING id"""
NAMES = {
    "plain": {},
    "reserved words": {"PGVECTOR_TABLE": "order.select", "PGVECTOR_COL_ID": "user", "PGVECTOR_COL_CONTENT": "from"},
    "capitals": {"PGVECTOR_TABLE": "Ai.MyDocs", "PGVECTOR_COL_VECTOR": "Embedding"},
    "quotes and marks": {
        "PGVECTOR_TABLE": '"My ""ai.%s"" Sch\'ema"."Docs $$ \\ ""2024"".é%(x)s :y %% {z}"',
        "PGVECTOR_COL_ID": "I d",
        "PGVECTOR_COL_CONTENT": "con%tent:c",
        "PGVECTOR_COL_VECTOR": "Vec\"tor'\\",
    },
    "63 bytes": {"PGVECTOR_TABLE": f"{'ü' * 31}s.{'é' * 31}t", "PGVECTOR_COL_VECTOR": "v" * 63},
}


def alembic(database: Database, *arguments: str, **more: str) -> Outcome:
    return run("alembic", *arguments, env=environment(main=database, **more))


def relations(database: Database) -> list[tuple[Any, ...]]:
    return database.rows(RELATIONS)


def ledger_tables(database: Database) -> set[str]:
    return {name for (name,) in database.rows("SELECT tablename FROM pg_tables WHERE schemaname = 'pipeline'")}


def index_definitions(database: Database) -> list[str]:
    return [d for (d,) in database.rows("SELECT indexdef FROM pg_indexes WHERE indexdef LIKE '%USING hnsw%'")]


def error_lines(outcome: Outcome) -> str:
    """Return the error as the operator sees it, and check that it is two lines and the last ones."""
    error, hint = outcome.err.splitlines()[-2:]
    assert error.startswith("error: ") and hint.startswith("hint: "), outcome.err
    return f"{error}\n{hint}"


def refused(database: Database, *arguments: str, **more: str) -> str:
    """Run a command that must be refused with nothing changed; return its two lines."""
    before = relations(database)
    lines = error_lines(alembic(database, *arguments, **more).expect(EXIT_REFUSED))
    assert relations(database) == before
    return lines


def client(database: Database, program: str, *arguments: str, script: str = "") -> "subprocess.CompletedProcess[str]":
    server = database.server
    return subprocess.run(
        [str(server.programs / program), "-h", server.host, "-p", str(server.port), "-U", database.user, *arguments],
        env=clean_environment() | {"PGPASSWORD": database.password, "PGDATABASE": database.name},
        input=script,
        capture_output=True,
        text=True,
        check=False,
    )


def psql(database: Database, script: str) -> "subprocess.CompletedProcess[str]":
    return client(database, "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", "-", script=script)


def schema_dump(database: Database) -> str:
    done = client(database, "pg_dump", "--schema-only", "--no-owner")
    assert done.returncode == 0, done.stderr
    return re.sub(r"^\\(un)?restrict .*$", "", done.stdout, flags=re.MULTILINE)


def test_second_upgrade_changes_nothing(main: Database) -> None:
    before = relations(main)
    again = alembic(main, "upgrade", "head").expect(0)
    assert "Running" not in again.err
    assert relations(main) == before
    assert alembic(main, "current").expect(0).out.strip() == f"{REVISION} (head)"


def test_upgrade_makes_the_table_that_langchain_makes(main: Database, empty_main: Database) -> None:
    empty_main.execute("CREATE EXTENSION vector")
    empty_main.execute(LANGCHAIN.format("gen_random_uuid()"))
    columns = """SELECT attname, format_type(atttypid, atttypmod), attnotnull, attstorage, pg_get_expr(adbin, adrelid)
        FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        WHERE attrelid = 'public.embeddings'::regclass AND attnum > 0 ORDER BY attnum"""
    assert main.rows(columns) == empty_main.rows(columns)
    assert index_definitions(main) == [
        "CREATE INDEX embeddings_embedding_hnsw ON public.embeddings USING hnsw (embedding vector_cosine_ops)"
        " WITH (m='16', ef_construction='64')"
    ]


def test_downgrade_to_base_and_up_again(main: Database) -> None:
    first = schema_dump(main)
    alembic(main, "downgrade", "base").expect(0)
    assert ledger_tables(main) == {"alembic_version"}
    assert main.value("SELECT to_regclass('public.embeddings') IS NULL")
    assert main.value("SELECT count(*) FROM pg_extension WHERE extname = 'vector'") == 1
    alembic(main, "upgrade", "head").expect(0)
    assert schema_dump(main) == first


def test_read_only_commands_write_nothing_to_an_empty_database(empty_main: Database) -> None:
    assert alembic(empty_main, "current").expect(0).out.strip() == ""
    assert alembic(empty_main, "check").code != 0
    assert relations(empty_main) == []
    assert empty_main.value("SELECT count(*) FROM pg_namespace WHERE nspname = 'pipeline'") == 0


# ---- adoption ----


@pytest.mark.parametrize("default", ["gen_random_uuid()", "uuid_generate_v4()"])
def test_adopts_langchains_table_with_its_rows(empty_main: Database, default: str) -> None:
    empty_main.execute("CREATE EXTENSION vector")
    empty_main.execute("CREATE FUNCTION public.uuid_generate_v4() RETURNS uuid LANGUAGE sql RETURN gen_random_uuid()")
    empty_main.execute(LANGCHAIN.format(default))
    empty_main.execute(ROW)
    rows = empty_main.rows("SELECT id, content, xmin::text FROM embeddings")
    alembic(empty_main, "upgrade", "head").expect(0)
    alembic(empty_main, "check").expect(0)
    assert len(index_definitions(empty_main)) == 1
    alembic(empty_main, "downgrade", "base").expect(0)
    assert empty_main.rows("SELECT id, content, xmin::text FROM embeddings") == rows
    assert index_definitions(empty_main) == []


def test_an_adopted_table_is_never_dropped_not_even_empty(empty_main: Database) -> None:
    empty_main.execute("CREATE EXTENSION vector")
    empty_main.execute(LANGCHAIN.format("gen_random_uuid()"))
    oid = empty_main.value("SELECT 'embeddings'::regclass::oid")
    alembic(empty_main, "upgrade", "head").expect(0)
    alembic(empty_main, "-x", "drop_rows=yes", "downgrade", "base").expect(0)
    assert empty_main.value("SELECT 'embeddings'::regclass::oid") == oid


def test_adopts_other_column_order_further_columns_and_the_index_that_is_there(empty_main: Database) -> None:
    empty_main.execute("CREATE EXTENSION vector; CREATE TYPE mood AS ENUM ('good'); CREATE TYPE pair AS (a int, b int)")
    empty_main.execute(
        "CREATE TABLE collections (uuid uuid PRIMARY KEY);"
        "CREATE TABLE embeddings (embedding vector(768), metadata jsonb, mood mood NOT NULL DEFAULT 'good', pair pair,"
        " id uuid DEFAULT gen_random_uuid() PRIMARY KEY, content text, collection_id uuid REFERENCES collections,"
        " number bigint GENERATED ALWAYS AS IDENTITY, doubled text GENERATED ALWAYS AS (content || content) STORED);"
        "CREATE INDEX embedding_embedding_hnsw_idx ON embeddings"
        " USING hnsw ((embedding::vector(768)) vector_cosine_ops) WITH (m = 16, ef_construction = 64);"
        "CREATE INDEX ON embeddings USING gin (metadata);"
    )
    indexes = empty_main.rows("SELECT indexdef FROM pg_indexes WHERE tablename = 'embeddings'")
    done = alembic(empty_main, "upgrade", "head").expect(0)
    assert "embedding_embedding_hnsw_idx" in done.err
    alembic(empty_main, "check").expect(0)
    alembic(empty_main, "downgrade", "base").expect(0)
    assert empty_main.rows("SELECT indexdef FROM pg_indexes WHERE tablename = 'embeddings'") == indexes


def test_refuses_another_shape_and_names_every_column(empty_main: Database) -> None:
    empty_main.execute("CREATE EXTENSION vector")
    empty_main.execute(
        "CREATE TABLE embeddings (id character varying(40), metadata json, embedding vector(384) NOT NULL,"
        " tenant integer NOT NULL)"
    )
    lines = refused(empty_main, "upgrade", "head")
    assert lines.splitlines()[0].removeprefix("error: public.embeddings exists and has another shape: ").split(
        "; "
    ) == [
        "id is character varying(40), expected uuid",
        "content is missing, expected text",
        "metadata is json, expected jsonb",
        "embedding is vector(384), expected vector(768)",
        "embedding is not null, expected nullable",
        "id is not the primary key",
        "id has no default, expected gen_random_uuid()",
        "tenant is not null without a default, so no row can be added without it",
    ]
    assert empty_main.value("SELECT count(*) FROM pg_namespace WHERE nspname = 'pipeline'") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("ALTER TABLE embeddings ALTER embedding TYPE vector", "embedding is vector, expected vector(768)"),
        ("ALTER TABLE embeddings DROP CONSTRAINT embeddings_pkey", "id is not the primary key"),
        ("ALTER TABLE embeddings ALTER id DROP DEFAULT", "id has no default, expected gen_random_uuid()"),
        ("ALTER TABLE embeddings SET UNLOGGED", "it is unlogged, so a crash of the server empties it"),
        ("ALTER TABLE embeddings DROP embedding", "embedding is missing, expected vector(768)"),
        (
            "ALTER TABLE embeddings RENAME TO e; CREATE VIEW embeddings AS TABLE e",
            "public.embeddings is a view, expected a table",
        ),
    ],
)
def test_refuses_one_deviation(empty_main: Database, change: str, message: str) -> None:
    empty_main.execute("CREATE EXTENSION vector")
    empty_main.execute(LANGCHAIN.format("gen_random_uuid()"))
    empty_main.execute(change)
    assert refused(empty_main, "upgrade", "head").splitlines()[0].endswith(message)


# ---- the extension ----


def test_extension_goes_to_the_schema_extensions_where_there_is_one(empty_main: Database) -> None:
    empty_main.execute("CREATE SCHEMA extensions")
    alembic(empty_main, "upgrade", "head").expect(0)
    alembic(empty_main, "check").expect(0)
    assert "extensions.vector_cosine_ops" in index_definitions(empty_main)[0]


def test_extension_is_found_where_it_is_installed(empty_main: Database) -> None:
    empty_main.execute(
        'CREATE SCHEMA extensions; CREATE SCHEMA "My %s Ext"; CREATE EXTENSION vector SCHEMA "My %s Ext"'
    )
    lines = refused(empty_main, "-x", "extension_schema=extensions", "upgrade", "head")
    assert "installed in schema My %s Ext already" in lines
    alembic(empty_main, "upgrade", "head").expect(0)
    alembic(empty_main, "check").expect(0)
    assert '"My %s Ext".vector_cosine_ops' in index_definitions(empty_main)[0]


def test_extension_schema_option_decides_and_must_exist(empty_main: Database) -> None:
    missing = alembic(empty_main, "-x", "extension_schema=O'Types", "upgrade", "head").expect(EXIT_USAGE)
    line = re.search(r"CREATE SCHEMA .*;", error_lines(missing))
    assert line is not None
    assert relations(empty_main) == []
    empty_main.execute(line.group())
    alembic(empty_main, "-x", "extension_schema=O'Types", "upgrade", "head").expect(0)
    assert '"O\'Types".vector_cosine_ops' in index_definitions(empty_main)[0]


def test_says_that_the_server_has_no_pgvector(empty_main: Database) -> None:
    empty_main.execute(
        sql.SQL("ALTER DATABASE {} SET extension_control_path = '/nowhere'").format(sql.Identifier(empty_main.name))
    )
    assert "error: pgvector is not installed on the server" in refused(empty_main, "upgrade", "head")


def test_refuses_a_pgvector_without_hnsw(empty_main: Database) -> None:
    empty_main.execute("CREATE EXTENSION vector; UPDATE pg_extension SET extversion = '0.4.4' WHERE extname = 'vector'")
    lines = refused(empty_main, "upgrade", "head")
    assert "pgvector 0.4.4 has no HNSW index" in lines and "ALTER EXTENSION vector UPDATE;" in lines


def test_old_pgvector_serves_768_and_refuses_3072_dimensions(new_database: NewDatabase) -> None:
    database = new_database("16.2")
    database.execute("CREATE EXTENSION vector")
    lines = refused(database, "upgrade", "head", EMBEDDING_DIMENSIONS="3072")
    assert "pgvector 0.6.2 cannot index 3072 dimensions" in lines
    alembic(database, "upgrade", "head").expect(0)
    alembic(database, "check").expect(0)


def test_plain_role_needs_the_line_of_the_hint_and_nothing_more(empty_main: Database) -> None:
    role = sql.Identifier(f'Plain "{empty_main.name}"')
    empty_main.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'a word'").format(role))
    plain = empty_main.as_role(f'Plain "{empty_main.name}"', "a word")
    for needed in (r"GRANT CREATE ON DATABASE .*;", r"CREATE EXTENSION .*;", r"GRANT USAGE, CREATE ON SCHEMA .*;"):
        outcome = alembic(plain, "upgrade", "head").expect(EXIT_REFUSED)
        line = re.search(needed, error_lines(outcome))
        assert line is not None, outcome.err
        empty_main.execute(line.group())
    alembic(plain, "upgrade", "head").expect(0)
    assert empty_main.value("SELECT tableowner FROM pg_tables WHERE tablename = 'embeddings'") == plain.user


def test_missing_privilege_for_the_extension_leaves_nothing_behind(empty_main: Database) -> None:
    role = f"plain_{empty_main.name}"
    empty_main.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'a word'").format(sql.Identifier(role)))
    empty_main.execute(
        sql.SQL("GRANT CREATE ON DATABASE {} TO {}").format(sql.Identifier(empty_main.name), sql.Identifier(role))
    )
    lines = error_lines(alembic(empty_main.as_role(role, "a word"), "upgrade", "head").expect(EXIT_REFUSED))
    assert 'CREATE EXTENSION vector WITH SCHEMA "public";' in lines
    assert empty_main.value("SELECT count(*) FROM pg_namespace WHERE nspname = 'pipeline'") == 0


# ---- the index ----


def test_above_2000_dimensions_the_index_is_on_halfvec(new_database: NewDatabase, main_template: Any) -> None:
    database = new_database("18", main_template(3072))
    assert "((embedding)::halfvec(3072)) halfvec_cosine_ops" in index_definitions(database)[0]
    database.execute("ALTER INDEX embeddings_embedding_hnsw RENAME TO another_name")
    alembic(database, "downgrade", "0002", EMBEDDING_DIMENSIONS="3072").expect(0)
    alembic(database, "upgrade", "head", EMBEDDING_DIMENSIONS="3072").expect(0)
    assert len(index_definitions(database)) == 1, "the index that serves is kept, whatever its name"
    alembic(database, "check", EMBEDDING_DIMENSIONS="3072").expect(0)


def test_above_4000_dimensions_there_is_no_index_and_it_says_so(empty_main: Database) -> None:
    done = alembic(empty_main, "upgrade", "head", EMBEDDING_DIMENSIONS="5000").expect(0)
    assert "no ANN index" in done.err and "5000" in done.err
    assert index_definitions(empty_main) == []
    alembic(empty_main, "check", EMBEDDING_DIMENSIONS="5000").expect(0)
    alembic(empty_main, "downgrade", "base", EMBEDDING_DIMENSIONS="5000").expect(0)


def test_an_invalid_leftover_is_rebuilt(main: Database) -> None:
    alembic(main, "downgrade", "0002").expect(0)
    main.execute(ROW)
    main.execute("CREATE INDEX embeddings_embedding_hnsw ON embeddings USING hnsw (embedding vector_cosine_ops)")
    main.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'embeddings_embedding_hnsw'::regclass")
    alembic(main, "upgrade", "head").expect(0)
    assert main.value("SELECT indisvalid FROM pg_index WHERE indexrelid = 'embeddings_embedding_hnsw'::regclass")


@pytest.mark.parametrize(
    "taker",
    [
        "CREATE TABLE embeddings_embedding_hnsw (id int)",
        "CREATE INDEX embeddings_embedding_hnsw ON embeddings USING hnsw (embedding vector_l2_ops)",
    ],
)
def test_refuses_where_the_name_of_the_index_is_taken(main: Database, taker: str) -> None:
    alembic(main, "downgrade", "0002").expect(0)
    main.execute(taker)
    assert "public.embeddings_embedding_hnsw is taken" in refused(main, "upgrade", "head")


def test_index_names_fit_63_bytes_and_stay_apart() -> None:
    long = TableMapping(table="é" * 31, embedding="v" * 63)
    names = {hnsw_index_name(long), hnsw_index_name(TableMapping(table="é" * 31, embedding="v" * 62))}
    assert len(names) == 2
    assert all(len(name.encode()) <= 63 and name.endswith("_hnsw") for name in names)
    assert hnsw_index_name(TableMapping()) == "embeddings_embedding_hnsw"


# ---- names, scripts and neighbours ----


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES.keys())
def test_script_makes_the_same_schema_as_upgrade(new_database: NewDatabase, names: dict[str, str]) -> None:
    by_upgrade, by_script = new_database("18"), new_database("18")
    alembic(by_upgrade, "upgrade", "head", **names).expect(0)
    alembic(by_upgrade, "check", **names).expect(0)
    script = run("alembic", "upgrade", "head", "--sql", env=clean_environment() | names).expect(0).out
    applied = psql(by_script, script)
    assert applied.returncode == 0, applied.stderr
    assert schema_dump(by_script) == schema_dump(by_upgrade)
    assert alembic(by_script, "current", **names).expect(0).out.strip() == f"{REVISION} (head)"
    alembic(by_script, "check", **names).expect(0)
    down = run("alembic", "downgrade", f"{REVISION}:base", "--sql", env=clean_environment() | names).expect(0).out
    applied = psql(by_script, down)
    assert applied.returncode == 0, applied.stderr
    alembic(by_upgrade, "downgrade", "base", **names).expect(0)
    assert schema_dump(by_script) == schema_dump(by_upgrade)
    assert ledger_tables(by_script) == {"alembic_version"}


def test_script_applied_twice_fails_and_changes_nothing(main: Database) -> None:
    script = run("alembic", "upgrade", "0003:head", "--sql", env=clean_environment()).expect(0).out
    before = relations(main)
    applied = psql(main, script)
    assert applied.returncode != 0
    assert "this database is not at revision 0003" in applied.stderr
    assert relations(main) == before


def test_script_names_the_schema_where_pgvector_is(empty_main: Database) -> None:
    empty_main.execute("CREATE SCHEMA types; CREATE EXTENSION vector SCHEMA types")
    applied = psql(empty_main, run("alembic", "upgrade", "head", "--sql", env=clean_environment()).expect(0).out)
    assert "pgvector is installed in schema types" in applied.stderr
    empty_main.execute("DROP SCHEMA pipeline CASCADE")
    arguments = ("-x", "extension_schema=types", "upgrade", "head", "--sql")
    applied = psql(empty_main, run("alembic", *arguments, env=clean_environment()).expect(0).out)
    assert applied.returncode == 0, applied.stderr
    alembic(empty_main, "check").expect(0)


def test_downgrade_script_keeps_rows_runs_and_adopted_tables(main: Database, empty_main: Database) -> None:
    script = run("alembic", "downgrade", "0004:base", "--sql", env=clean_environment()).expect(0).out
    run_id = main.value(RUN)
    assert "a run is unfinished" in psql(main, script).stderr
    main.execute("UPDATE pipeline.run SET abandoned_at = now() WHERE id = %s", run_id)
    main.execute(ROW)
    assert "the embeddings table holds rows" in psql(main, script).stderr
    assert main.value("SELECT count(*) FROM embeddings") == 1
    empty_main.execute("CREATE EXTENSION vector")
    empty_main.execute(LANGCHAIN.format("gen_random_uuid()"))
    alembic(empty_main, "upgrade", "head").expect(0)
    assert psql(empty_main, script).returncode == 0
    assert empty_main.value("SELECT count(*) FROM embeddings") == 0


def application(database: Database) -> None:
    """Make what an application has in the same database: schemas, types, indexes, its own Alembic."""
    database.execute(
        "CREATE SCHEMA shop; CREATE SCHEMA extensions; CREATE TYPE shop.state AS ENUM ('new', 'paid');"
        "CREATE DOMAIN public.email AS text CHECK (VALUE LIKE '%@%');"
        "CREATE TABLE public.users (id serial PRIMARY KEY, email public.email UNIQUE, at tstzrange);"
        "CREATE TABLE shop.orders (id bigint PRIMARY KEY, state shop.state[], user_id int REFERENCES public.users);"
        "CREATE INDEX ON shop.orders (lower(id::text)) WHERE id > 0;"
        "CREATE TABLE shop.embeddings (id int, embedding text); CREATE TABLE public.run (id int);"
        "CREATE TABLE public.alembic_version (version_num varchar(32) PRIMARY KEY);"
        "INSERT INTO public.alembic_version VALUES ('0042'); CREATE VIEW shop.v AS SELECT 1 AS one;"
    )


@pytest.mark.parametrize("dimensions", ["768", "3072", "5000"])
def test_check_is_clean_beside_an_application(empty_main: Database, dimensions: str) -> None:
    application(empty_main)
    theirs = relations(empty_main)
    alembic(empty_main, "upgrade", "head", EMBEDDING_DIMENSIONS=dimensions).expect(0)
    assert "No new upgrade operations" in alembic(empty_main, "check", EMBEDDING_DIMENSIONS=dimensions).expect(0).out
    alembic(empty_main, "downgrade", "base", EMBEDDING_DIMENSIONS=dimensions).expect(0)
    assert set(theirs) <= set(relations(empty_main))
    assert empty_main.value("SELECT version_num FROM public.alembic_version") == "0042"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("ALTER TABLE pipeline.slice DROP COLUMN bytes", "add_column"),
        ("DROP INDEX pipeline.run_one_unfinished", "add_index"),
        ("ALTER TABLE public.embeddings DROP COLUMN embedding", "add_column"),
        ("ALTER TABLE public.embeddings ALTER embedding TYPE vector(9) USING NULL", "modify_type"),
    ],
)
def test_check_sees_a_change_of_our_own_tables(main: Database, change: str, word: str) -> None:
    main.execute(change)
    outcome = alembic(main, "check")
    assert outcome.code != 0 and word in outcome.out + outcome.err


# ---- the ledger, and downgrades that would lose something ----


def test_ledger_has_its_tables_each_with_a_sentence(main: Database) -> None:
    assert ledger_tables(main) == LEDGER | {"alembic_version"}
    for table in LEDGER:
        assert str(main.value("SELECT obj_description(to_regclass(%s), 'pg_class')", f"pipeline.{table}")).endswith(".")


def test_the_database_guards_the_ledger(main: Database) -> None:
    first = main.value(RUN)
    with pytest.raises(psycopg2.errors.UniqueViolation):
        main.execute(RUN)
    for statement in (
        "UPDATE pipeline.run SET finished_at = now()",
        "UPDATE pipeline.run SET column_types = '{}'",
        "INSERT INTO pipeline.slice (run_id, ordinal, kind, finished_at) VALUES (%(id)s, 1, 'pages', now())",
        "INSERT INTO pipeline.slice (run_id, ordinal, kind) VALUES (%(id)s, 1, 'rows')",
        "INSERT INTO pipeline.baseline (source_label, metric, k, query, answers) VALUES ('', '', 0, '', '[]')",
        "INSERT INTO pipeline.verdict (source_label, target_label, target_schema, target_table, check_name, verdict,"
        " figures, source_horizon, target_horizon) VALUES ('', '', '', '', '', 'maybe', '{}', 1, 1)",
    ):
        with pytest.raises(psycopg2.errors.CheckViolation), main.cursor() as cursor:
            cursor.execute(statement, {"id": first})
    main.execute("UPDATE pipeline.run SET loaded_at = now(), finished_at = now()")
    assert main.value(RUN) > first


def test_downgrade_keeps_rows_until_told(main: Database) -> None:
    main.execute(ROW)
    lines = refused(main, "downgrade", "base")
    assert "public.embeddings holds 1 row," in lines and "-x drop_rows=yes" in lines
    alembic(main, "-x", "drop_rows=yes", "downgrade", "base").expect(0)
    assert main.value("SELECT to_regclass('public.embeddings') IS NULL")


def test_downgrade_keeps_an_unfinished_run_until_told(main: Database) -> None:
    main.execute(RUN)
    assert "1 unfinished run" in refused(main, "downgrade", "0003")
    alembic(main, "-x", "drop_rows=yes", "downgrade", "0003").expect(0)
    assert ledger_tables(main) == {"alembic_version"}


def test_downgrade_counts_rows_that_row_security_hides(main: Database) -> None:
    role = f"owner_{main.name}"
    main.execute(ROW)
    main.execute(
        sql.SQL(
            "CREATE ROLE {role} LOGIN PASSWORD 'a word'; GRANT ALL ON SCHEMA pipeline, public TO {role};"
            "GRANT ALL ON ALL TABLES IN SCHEMA pipeline TO {role}; ALTER TABLE embeddings OWNER TO {role};"
            "ALTER TABLE embeddings ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;"
        ).format(role=sql.Identifier(role))
    )
    before = relations(main)
    assert alembic(main.as_role(role, "a word"), "downgrade", "base").code != 0
    assert relations(main) == before


# ---- the process ----


def failing(database: Database, case: str) -> dict[str, str]:
    variables = environment(main=database)
    changes: dict[str, dict[str, str]] = {
        "wrong password": {"DB_PASSWORD": f"{CANARY} not"},
        "closed port": {"DB_PORT": str(free_port())},
        "missing database": {"DB_NAME": "nowhere"},
        "unusable dimensions": {"EMBEDDING_DIMENSIONS": "many"},
        "missing variable": {},
    }
    if case == "missing variable":
        del variables["DB_USER"]
    return variables | changes[case]


@pytest.mark.parametrize(
    ("case", "code", "word"),
    [
        ("wrong password", 1, "password"),
        ("closed port", EXIT_UNREACHABLE, "DB_PORT"),
        ("missing database", 1, "'nowhere'"),
        ("unusable dimensions", EXIT_USAGE, "EMBEDDING_DIMENSIONS"),
        ("missing variable", EXIT_USAGE, "DB_USER is not set"),
    ],
)
def test_failure_is_two_lines_and_an_exit_code(empty_main: Database, case: str, code: int, word: str) -> None:
    outcome = run("alembic", "upgrade", "head", env=failing(empty_main, case)).expect(code)
    assert word in error_lines(outcome)
    assert len(outcome.err.splitlines()) == 2


@pytest.mark.parametrize("option", ["drop_row=yes", "drop_rows=no", "drop_rows"])
def test_unknown_option_is_refused_as_usage(main: Database, option: str) -> None:
    lines = error_lines(alembic(main, "-x", option, "downgrade", "base").expect(EXIT_USAGE))
    assert "drop_rows=yes" in lines


def test_env_file_option_names_the_settings(main: Database, tmp_path: Path) -> None:
    file = tmp_path / "main.env"
    variables = {k: v for k, v in main.variables("DB", "DB_NAME").items() if k != "DB_PASSWORD"}
    file.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    env = clean_environment() | {"DB_PASSWORD": CANARY}
    assert run("alembic", "-x", f"env_file={file}", "current", env=env).expect(0).out.startswith(REVISION)
    lines = error_lines(run("alembic", "-x", f"env_file={file}x", "current", env=env).expect(EXIT_USAGE))
    assert "cannot be read" in lines


def test_upgrades_at_once_all_succeed(empty_main: Database) -> None:
    processes = [
        subprocess.Popen(
            command_line("alembic", ["upgrade", "head"]),
            env=environment(main=empty_main),
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    results = [(*process.communicate(timeout=60), process.returncode) for process in processes]
    assert [code for _, _, code in results] == [0, 0, 0], results
    ran = "".join(err for _, err, _ in results)
    assert ran.count("Running upgrade 0003 -> 0004") >= 1
    assert empty_main.rows("SELECT version_num FROM pipeline.alembic_version") == [(REVISION,)]


def test_a_held_lock_is_a_conflict_within_seconds_and_ctrl_c_ends_it_at_once(main: Database) -> None:
    alembic(main, "downgrade", "0002").expect(0)
    with main.cursor() as cursor:
        cursor.execute("LOCK TABLE embeddings IN ACCESS EXCLUSIVE MODE")
        process = subprocess.Popen(
            command_line("alembic", ["upgrade", "head"]),
            env=environment(main=main),
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        waiting = "SELECT count(*) FROM pg_locks WHERE relation = 'embeddings'::regclass AND NOT granted"
        while not main.value(waiting):
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=4)
        assert process.returncode == EXIT_INTERRUPTED, err
        assert "Traceback" not in err and err.splitlines()[-2].startswith("error: ")
        conflict = alembic(main, "upgrade", "head").expect(EXIT_UNREACHABLE)
    assert "another transaction" in error_lines(conflict)
    alembic(main, "upgrade", "head").expect(0)


def in_process(connection: sa.Connection, database: Database) -> Config:
    config = Config(str(ROOT / "alembic.ini"))
    config.attributes["connection"] = connection
    config.attributes["settings"] = Settings.load(environ=database.variables("DB", "DB_NAME"))
    return config


def test_open_connection_is_used_and_keeps_its_session_as_it_was(empty_main: Database) -> None:
    engine = sa.create_engine("postgresql+psycopg2://", creator=empty_main.connect, poolclass=sa.NullPool)
    kept = "SELECT current_setting('search_path'), current_setting('lock_timeout'), current_setting('row_security')"
    with engine.connect() as connection:
        before = connection.execute(sa.text(kept)).one()
        connection.rollback()
        command.upgrade(in_process(connection, empty_main), "head")
        assert connection.execute(sa.text(kept)).one() == before
        assert connection.execute(sa.text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")).scalar() == 0
        connection.rollback()
        empty_main.execute(ROW)
        with pytest.raises(RefusedError, match="holds 1 row"):
            command.downgrade(in_process(connection, empty_main), "base")
    engine.dispose()


def test_open_transaction_of_the_caller_decides(empty_main: Database) -> None:
    engine = sa.create_engine("postgresql+psycopg2://", creator=empty_main.connect, poolclass=sa.NullPool)
    with engine.connect() as connection, closing(connection.begin()) as transaction:
        command.upgrade(in_process(connection, empty_main), "head")
        transaction.rollback()
    engine.dispose()
    assert relations(empty_main) == []
