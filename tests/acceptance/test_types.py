"""Types: what is cast on the way and what is refused, keys of all types, columns of all types, vectors, encodings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from psycopg2 import sql

from tests import moves
from tests.data import TABLE_SQL
from tests.moves import Move
from tests.support import Database, environment, run, start

TABLE = "CREATE TABLE embeddings (id {} PRIMARY KEY, content text, embedding vector(3){})"
INSERT = "INSERT INTO embeddings (id, content, embedding) VALUES ({}, 'text', '[1,2,3]')"


@pytest.fixture
def new_move(new_database: Callable[..., Database], ledger_template: str) -> Callable[..., Move]:
    """Return a function as its namesake's; main has its ledger already, so that a hundred cases take minutes."""

    def make(legacy_sql: str, main_sql: str, legacy: Database | None = None, **env: str) -> Move:
        main = new_database("18", ledger_template)
        return moves.new_move(legacy or new_database("16"), main, legacy_sql, main_sql, **env)

    return make


def with_column(kind: str) -> str:
    return TABLE.format("bigint", f", x {kind}")


def filled(kind: str, *values: str) -> str:
    rows = ", ".join(f"({place}, 'text', '[{place},1,2]', {value})" for place, value in enumerate(values, 1))
    return f"{with_column(kind)}; INSERT INTO embeddings VALUES {rows}"


# ---------------------------------------------------------------- casts


@dataclass(frozen=True, kw_only=True)
class Cast:
    """Two types, values of the first, and another value of the second that only its bytes tell from the first row's."""

    source: str
    target: str
    values: tuple[str, ...]
    planted: str


CASTS = {
    "json to jsonb": Cast(
        source="json",
        target="jsonb",
        values=("""'{"b":  1.10, "a": [null, 1e3]}'""", "'\"x\"'", "'7'", "'null'"),
        planted="""'{"a": [null, 1000], "b": 1.1}'""",
    ),
    "jsonb to json": Cast(source="jsonb", target="json", values=("'{\"a\": 1}'", "NULL"), planted="'{\"a\":1}'"),
    "varchar to text": Cast(source="varchar(9)", target="text", values=("'a '", "''", "'é'"), planted="'a'"),
    "text to varchar": Cast(source="text", target="varchar(3)", values=("'a '", "'äöü'", "NULL"), planted="'a'"),
    "varchar to a longer one": Cast(source="varchar(3)", target="varchar(5)", values=("'abc'",), planted="'abcd'"),
    "char to text": Cast(source="char(5)", target="text", values=("'a'", "''"), planted="'a    '"),
    "char without its length": Cast(source="char(5)", target="bpchar", values=("'a'",), planted="'a'"),
    "name to text": Cast(source="name", target="text", values=("'pg'",), planted="'pg '"),
    "uuid to text": Cast(
        source="uuid", target="text", values=("'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'",), planted="'a0eebc99'"
    ),
    "smallint to bigint": Cast(source="smallint", target="bigint", values=("-32768", "32767"), planted="32768"),
    "smallint to integer": Cast(source="smallint", target="integer", values=("-1",), planted="65535"),
    "integer to bigint": Cast(source="int", target="bigint", values=("-2147483648", "NULL"), planted="2147483648"),
    "bigint to text": Cast(
        source="bigint", target="text", values=("9223372036854775807",), planted="'9223372036854775806'"
    ),
    "real to double precision": Cast(
        source="real", target="double precision", values=("0.1", "'-0'", "'NaN'", "1e-45"), planted="0.1"
    ),
    "numeric without its scale": Cast(source="numeric(9,2)", target="numeric", values=("1.10",), planted="1.1"),
    "enum to text": Cast(source="mood", target="text", values=("'so-so'",), planted="'happy'"),
    "enum with more labels": Cast(source="mood", target="moods", values=("'so-so'",), planted="'new'"),
    "domain to its type": Cast(source="short", target="text", values=("'a'",), planted="'b'"),
    "type to a domain": Cast(source="text", target="short", values=("'a'",), planted="'b'"),
    "halfvec to vector": Cast(source="halfvec(2)", target="vector(2)", values=("'[0.1,-0]'",), planted="'[0.1,-0]'"),
    "vector to one without a dimension": Cast(
        source="vector(2)", target="vector", values=("'[0.1,-0]'",), planted="'[0.1,0]'"
    ),
}
TYPES = """CREATE TYPE mood AS ENUM ('sad', 'so-so', 'happy');
    CREATE TYPE moods AS ENUM ('new', 'happy', 'so-so', 'sad');
    CREATE DOMAIN short AS text CHECK (length(VALUE) < 5)"""


@pytest.mark.parametrize("name", CASTS)
def test_lossless_cast_is_made_on_the_way_and_compared(name: str, new_move: Callable[..., Move]) -> None:
    cast = CASTS[name]
    move = new_move(f"{TYPES}; {filled(cast.source, *cast.values)}", f"{TYPES}; {with_column(cast.target)}")
    with move.copy_held():
        move.legacy.execute(f"UPDATE embeddings SET content = 'new' WHERE id = 1; {INSERT.format(1000)}")
    move.verify().expect(0)
    assert move.main.rows("SELECT content FROM embeddings WHERE id = 1") == [("new",)]
    expected = f"SELECT (x::{'text::' if cast.source == 'mood' else ''}{cast.target})::text FROM embeddings ORDER BY id"
    if "halfvec" not in cast.source:
        found = move.main.rows("SELECT x::text FROM embeddings ORDER BY id")
        assert found == move.legacy.rows(expected.replace("short)", "text)"))
    move.main.execute(f"UPDATE embeddings SET x = {cast.planted} WHERE id = 1")
    if name == "char without its length":
        # A char without a length is as long as its text: the blanks that filled it up are data now.
        assert move.main.value("SELECT octet_length(x) FROM embeddings WHERE id = 1") == 1
    move.finds("different", "1")


UNCARRIED = {
    "timestamp to timestamptz": (
        ("timestamp", "'2026-01-01'", "timestamptz"),
        "column x is timestamp without time zone on legacy and timestamp with time zone on main: which moment",
    ),
    "vector to halfvec": (("vector(2)", "'[1,2]'", "halfvec(2)"), "half the digits of every number would be lost"),
    "text to uuid": (("text", "'a'", "uuid"), "column x is text on legacy and uuid on main"),
    "bigint to integer": (("bigint", "1", "int"), "column x is bigint on legacy and integer on main"),
    "numeric to a scale": (("numeric", "1.234", "numeric(9,2)"), "values would be rounded or filled up"),
    "char to a longer one": (("char(3)", "'a'", "char(5)"), "values would be rounded or filled up"),
    "timestamp to fewer digits": (("timestamp", "'2026-01-01'", "timestamp(0)"), "rounded or filled up"),
    "vector to another dimension": (
        ("vector(2)", "'[1,2]'", "vector(3)"),
        "column x is vector(2) on legacy and vector(3)",
    ),
    "text to char": (("text", "'a'", "char(5)"), "column x is text on legacy and character(5) on main"),
    "array of other elements": (("int[]", "'{1}'", "bigint[]"), "column x is integer[] on legacy and bigint[] on main"),
    "enum without a label": (("mood", "'sad'", "fewer"), "the enum there has no 'happy', 'sad'"),
    "too long a text": (
        ("text", "'äöü'), (2, 'text', NULL, 'abcd'", "varchar(3)"),
        "legacy's public.embeddings: 1 row with more than 3 characters in column x, which is character varying(3)"
        " on the target, first: 2",
    ),
    "no binary form": (("aclitem", "NULL", "aclitem"), "aclitem has no binary form"),
}


@pytest.mark.parametrize("name", UNCARRIED)
def test_what_would_be_lost_is_refused_before_the_start(name: str, new_move: Callable[..., Move]) -> None:
    (source, value, target), fact = UNCARRIED[name]
    types = f"{TYPES}; CREATE TYPE fewer AS ENUM ('so-so')"
    move = new_move(f"{types}; {filled(source, value)}", f"{types}; {with_column(target)}")
    refused = move.copy().expect(4)
    assert fact in refused.err
    assert move.main.value("SELECT (SELECT count(*) FROM embeddings) + (SELECT count(*) FROM pipeline.run)") == 0


def test_text_that_grew_too_long_meanwhile_stops_the_copy_and_is_not_cut(new_move: Callable[..., Move]) -> None:
    move = new_move(filled("text", "'abc'"), with_column("varchar(3)"))
    with move.main.cursor() as blocker:
        blocker.execute("LOCK TABLE embeddings IN SHARE MODE")
        process = start("copy", env=move.env)
        while not move.main.value("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            assert process.poll() is None
        move.legacy.execute("UPDATE embeddings SET x = 'abcd'")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "abcd" not in err
    assert move.main.value("SELECT count(*) FROM embeddings WHERE x = 'abcd'") == 0


BAD_JSON = {
    "NUL": r"""'{"a": "\u0000"}'""",
    "half a pair": r"""'{"a": "\ud83d"}'""",
    "the other half": r"""'{"a": "\ude00 \ud83d"}'""",
}
GOOD_JSON = (
    r"""'{"a": "\\u0000", "b": "\ud83d\ude00", "c": "\\\\ud83d"}'""",
    r"""'{"a": {"b": 1}, "b": {"a": 1}, "c": [{"a": 1}, {"a": 2}]}'""",
)


@pytest.mark.parametrize("case", BAD_JSON)
def test_json_that_jsonb_does_not_take_is_refused_with_the_keys(case: str, new_move: Callable[..., Move]) -> None:
    values = (GOOD_JSON[0], BAD_JSON[case], GOOD_JSON[1], BAD_JSON[case])
    move = new_move(filled("json", *values), with_column("jsonb"))
    assert "2 rows with json in column x that jsonb does not take" in (err := move.copy().expect(4).err)
    assert "first: 2, 4" in err
    move.legacy.execute("DELETE FROM embeddings WHERE id IN (2, 4)")
    move.copy_and_verify()


def test_json_goes_into_json_whatever_it_holds(new_move: Callable[..., Move]) -> None:
    move = new_move(filled("json", *BAD_JSON.values(), *GOOD_JSON, """'{"a": 1, "a": 2}'"""), with_column("json"))
    move.copy_and_verify()


def test_keys_that_occur_twice_in_json_are_refused_until_the_line_of_the_hint(new_move: Callable[..., Move]) -> None:
    twice = ("""'{"a": 1, "a": 2}'""", """'{"x": [{"b": {"a": 1, "a": null}}]}'""")
    move = new_move(filled("json", GOOD_JSON[0], *twice), with_column("jsonb"))
    refused = move.copy().expect(4)
    assert "2 rows with a key that occurs twice in one object of column x" in refused.err
    assert "first: 2, 3" in refused.err
    line = refused.err.split("write them anew on legacy: ")[1].split(";")[0]
    move.legacy.execute(f"UPDATE embeddings {line} WHERE id IN (2, 3)")
    move.copy_and_verify()


# ---------------------------------------------------------------- keys

KEYS = {
    "bigint": ("bigint", ("-9223372036854775808", "-1", "0", "7", "9223372036854775807"), None),
    "integer": ("int", ("-2147483648", "5", "2147483647"), None),
    "integer into bigint": ("int", ("-2147483648", "5", "2147483647"), "bigint"),
    "uuid": ("uuid", ("'00000000-0000-0000-0000-000000000000'", "'ffffffff-ffff-ffff-ffff-ffffffffffff'"), None),
    "uuid into text": (
        "uuid",
        ("'00000000-0000-0000-0000-000000000000'", "'ffffffff-ffff-ffff-ffff-ffffffffffff'"),
        "text",
    ),
    "text": ("text", ("''", "' '", "'a'", "'A'", "'ä'", "'z'", "E'a\\\\b\\n''%s'", "'🙂'"), None),
    "text by other rules": ('text COLLATE "C.utf8"', ("'Z'", "'ä'", "'z'", "'-a'"), 'text COLLATE "pg_unicode_fast"'),
    "varchar": ("varchar(8)", ("'a'", "'B'"), None),
    "char into text": ("char(4)", ("'a'", "'abcd'"), "text"),
    "timestamptz": ("timestamptz", ("'2026-01-01 00:00:00.000001+00'", "'infinity'", "'0044-03-15 12:00+00 BC'"), None),
    "numeric": ("numeric", ("1.10", "1e30", "-0.5"), None),
    "double precision": ("float8", ("0.1", "1e-300", "'Infinity'"), None),
    "bytea": ("bytea", (r"'\x00ff'", r"'\x'"), None),
    "enum": ("mood", ("'happy'", "'sad'"), None),
}


@pytest.mark.parametrize("kind", ["TABLE", "VIEW"])
@pytest.mark.parametrize("name", KEYS)
def test_key_of_every_type_finds_its_rows(name: str, kind: str, new_move: Callable[..., Move]) -> None:
    source, keys, target = KEYS[name]
    made = f"{TYPES}; {TABLE.format(source, '')}; {'; '.join(INSERT.format(key) for key in keys)}"
    relation = "embeddings"
    if kind == "VIEW":
        made = made.replace("embeddings", "store") + "; CREATE VIEW embeddings AS SELECT * FROM store"
        relation = "store"
    move = new_move(made, f"{TYPES}; {TABLE.format(target or source, '')}")
    with move.copy_held():
        move.legacy.execute(f"UPDATE {relation} SET content = 'new' WHERE id = {keys[0]}")
        move.legacy.execute(f"DELETE FROM {relation} WHERE id = {keys[1]}")
    move.verify().expect(0)
    expected = len(keys) - 1
    assert move.main.rows("SELECT count(*), count(*) FILTER (WHERE content = 'new') FROM embeddings") == [(expected, 1)]
    move.main.execute(f"UPDATE embeddings SET content = 'x' WHERE id = {keys[0]}")
    move.finds("different", move.main.value("SELECT id::text FROM embeddings WHERE content = 'x'"))


@pytest.mark.parametrize("order", ["a, b, c", "c, a, b"])
def test_composite_keys_are_compared_as_wholes(order: str, new_move: Callable[..., Move]) -> None:
    made = "CREATE TABLE {} (a text, b bigint, c uuid, content text, embedding vector(3), PRIMARY KEY ({}))"
    move = new_move(
        f"""{made.format("store", "a, b, c")}; CREATE VIEW embeddings AS TABLE store;
        INSERT INTO store SELECT repeat('1', i % 3), i / 3, md5(i::text)::uuid, repeat(md5(i::text), 400), '[1,2,3]'
        FROM generate_series(-500, 500) AS i""",
        made.format("embeddings", order),
        PGVECTOR_COL_ID="c",
    )
    with move.copy_held("--slice-size", "1"):
        move.legacy.execute("UPDATE store SET content = 'new' WHERE b = 7; DELETE FROM store WHERE b = 8")
    move.verify().expect(0)
    assert move.main.value("SELECT count(*) FROM pipeline.slice") > 5
    move.main.execute("UPDATE embeddings SET b = 1000 WHERE a = '' AND b = 7")
    found = move.verify("--check", "rows", "--settle", "0").expect(3)
    figures = found.json["checks"][1]["figures"]
    assert (figures["missing_rows"], figures["extra_rows"], figures["different_rows"]) == (1, 1, 0)


# ---------------------------------------------------------------- columns of all types

COLUMNS = {
    "enum": ("mood", "'sad'", "'happy'"),
    "enum array": ("mood[]", "'{sad,NULL}'", "'{sad,happy}'"),
    "domain": ("short", "'a'", "'b'"),
    "composite": ("pair", "ROW(1, 'a')", "ROW(1, 'a ')"),
    "composite array": ("pair[]", "ARRAY[ROW(1, 'a')::pair]", "ARRAY[ROW(1, NULL)::pair]"),
    "range of a type of ours": ("span", "'[1.5,2.5)'", "'[1.5,2.5]'"),
    "array": ("text[]", "ARRAY['a', NULL, '']", "ARRAY['a', '', NULL]"),
    "array with other bounds": ("int[]", "'[2:3]={1,2}'", "'{1,2}'"),
    "vector array": ("vector[]", "ARRAY['[0,1]'::vector]", "ARRAY['[-0,1]'::vector]"),
    "vector array with a dimension": ("vector(2)[]", "ARRAY['[0,1]'::vector]", "ARRAY['[-0,1]'::vector]"),
    "bytea": ("bytea", r"'\x00'", r"'\x'"),
    "timestamptz": ("timestamptz", "'2026-01-01 00:00+02'", "'2026-01-01 00:00+01'"),
    "interval": ("interval", "'1 day'", "'24 hours'"),
    "numeric": ("numeric", "1.10", "1.1"),
    "double precision": ("float8", "0", "'-0'"),
    "bit": ("bit(5)", "B'10101'", "B'10100'"),
    "bit varying": ("varbit", "B'101'", "B'1010'"),
    "inet": ("inet", "'10.0.0.1/8'", "'10.0.0.1'"),
    "tsvector": ("tsvector", "'a:1'", "'a:2'"),
    "multirange": ("int4multirange", "'{[1,2)}'", "'{}'"),
}
OURS = f"""{TYPES}; CREATE TYPE pair AS (a int, b text);
    CREATE TYPE span AS RANGE (subtype = float8, subtype_diff = float8mi)"""
# Types of ours are numbered otherwise on main.
SHIFT = "CREATE TYPE other AS ENUM ('a'); CREATE DOMAIN another AS text; CREATE TABLE unrelated (a other, b another)"


@pytest.mark.parametrize("name", COLUMNS)
def test_column_of_every_type_is_carried_and_compared(name: str, new_move: Callable[..., Move]) -> None:
    kind, value, planted = COLUMNS[name]
    move = new_move(f"{OURS}; {filled(kind, value, 'NULL')}", f"{SHIFT}; {OURS}; {with_column(kind)}")
    with move.copy_held():
        move.legacy.execute("UPDATE embeddings SET content = 'new' WHERE id = 1")
    move.verify().expect(0)
    assert move.main.rows("SELECT x::text FROM embeddings") == move.legacy.rows("SELECT x::text FROM embeddings")
    move.main.execute(f"UPDATE embeddings SET x = {planted} WHERE id = 1")
    move.finds("different", "1")


def test_array_of_vectors_is_the_same_in_whatever_schema_the_extension_is(
    new_move: Callable[..., Move], new_database: Callable[..., Database]
) -> None:
    legacy = new_database("16")
    made = filled("vector[]", "ARRAY['[1,2]'::vector]")
    legacy.execute(f"CREATE SCHEMA ai; CREATE EXTENSION vector SCHEMA ai; SET search_path = public, ai; {made}")
    move = new_move("SELECT", with_column("vector[]"), legacy=legacy)
    move.copy_and_verify()


# ---------------------------------------------------------------- vectors

VECTORS = {
    "vector": ("'[1,2,3]'", "'[1,2]'", "'[1,2,3.5]'"),
    "halfvec": ("'[1,2,3]'", "'[1,2]'", "'[1,2,3.5]'"),
    "sparsevec": ("'{1:1,3:2}/3'", "'{1:1}/2'", "'{1:1,3:2.5}/3'"),
}
BARE = "CREATE TABLE embeddings (id bigint PRIMARY KEY, content text, metadata jsonb, embedding {})"


@pytest.mark.parametrize("source_typed", [True, False])
@pytest.mark.parametrize("target_typed", [True, False])
@pytest.mark.parametrize("kind", VECTORS)
def test_vectors_of_every_type_are_carried_and_asked_for(
    kind: str, source_typed: bool, target_typed: bool, new_move: Callable[..., Move]
) -> None:
    value, short, planted = VECTORS[kind]
    move = new_move(
        BARE.format(f"{kind}(3)" if source_typed else kind), BARE.format(f"{kind}(3)" if target_typed else kind)
    )
    move.legacy.execute(f"INSERT INTO embeddings SELECT i, 'text', NULL, {value} FROM generate_series(1, 5) AS i")
    move.legacy.execute("INSERT INTO embeddings VALUES (6)")
    if not source_typed:
        move.legacy.execute(f"INSERT INTO embeddings VALUES (7, 'text', NULL, {short})")
        refused = move.copy().expect(4)
        assert f"is an untyped {kind} and holds 3 dimensions: 5 rows, 2 dimensions: 1 row;" in refused.err
        move.legacy.execute("DELETE FROM embeddings WHERE id = 7")
    move.copy_and_verify()
    checks = {check["name"]: check for check in move.verify().expect(0).json["checks"]}
    # All have the same one.
    assert checks["parity"]["figures"]["queries"] == 1
    assert checks["counts"]["figures"]["target_embeddings"] == 5
    move.main.execute(f"UPDATE embeddings SET embedding = {planted} WHERE id = 1")
    checks = {check["name"]: check["verdict"] for check in move.verify().expect(3).json["checks"]}
    assert (checks["digests"], checks["parity"]) == ("fail", "fail")


def test_half_vectors_go_into_vectors_and_search_is_asked_the_same(new_move: Callable[..., Move]) -> None:
    move = new_move(BARE.format("halfvec"), BARE.format("vector(3)"))
    move.legacy.execute(
        "INSERT INTO embeddings SELECT i, 'text', NULL, ARRAY[sin(i), cos(i), 1]::real[]::vector::halfvec"
        " FROM generate_series(1, 50) AS i"
    )
    move.copy_and_verify()
    assert move.main.rows("SELECT embedding::halfvec::text FROM embeddings ORDER BY id") == move.legacy.rows(
        "SELECT embedding::text FROM embeddings ORDER BY id"
    )


@pytest.mark.parametrize(
    ("source", "target", "fact"),
    [
        ("vector(3)", "halfvec(3)", "column embedding is vector(3) on legacy and halfvec(3) on main: half the digits"),
        ("vector(3)", "sparsevec(3)", "column embedding is vector(3) on legacy and sparsevec(3) on main"),
        ("bit(3)", "bit(3)", "column embedding is bit(3), not a vector: bits have no cosine distance"),
    ],
)
def test_embeddings_that_search_would_not_find_again_are_refused(
    source: str, target: str, fact: str, new_move: Callable[..., Move]
) -> None:
    move = new_move(BARE.format(source), BARE.format(target))
    assert fact in move.copy().expect(4).err


# ---------------------------------------------------------------- encodings


@pytest.fixture
def encoded(new_database: Callable[..., Database]) -> Callable[[str], Database]:
    """Return a function that makes a legacy database of another encoding."""

    def make(encoding: str) -> Database:
        database = new_database("16")
        other = Database(server=database.server, name="postgres").connect()
        other.autocommit = True
        with other.cursor() as cursor:
            name = sql.Identifier(database.name)
            cursor.execute(sql.SQL("DROP DATABASE {}").format(name))
            statement = "CREATE DATABASE {} TEMPLATE template0 LOCALE 'C' ENCODING {}"
            cursor.execute(sql.SQL(statement).format(name, sql.Literal(encoding)))
        other.close()
        return database

    return make


def alembic_made(legacy: Database, main: Database, statements: str) -> Move:
    legacy.execute(f"CREATE EXTENSION vector; {TABLE_SQL.format(3)}; {statements}")
    env = environment(legacy=legacy, main=main, EMBEDDING_DIMENSIONS="3")
    run("alembic", "upgrade", "head", env=env).expect(0)
    return Move(legacy=legacy, main=main, table="embeddings", env=env)


def test_texts_of_latin1_arrive_as_the_same_texts(encoded: Callable[[str], Database], empty_main: Database) -> None:
    move = alembic_made(
        encoded("LATIN1"),
        empty_main,
        """INSERT INTO embeddings (content, metadata, embedding) SELECT 'é ü ' || i, '{"ß": "ø"}', '[1,2,3]'
        FROM generate_series(1, 50) AS i; ALTER TABLE embeddings ADD ü text DEFAULT 'ä'""",
    )
    empty_main.execute("ALTER TABLE embeddings ADD ü varchar(1)")
    with move.copy_held():
        move.legacy.execute("UPDATE embeddings SET content = 'ç' WHERE content = 'é ü 7'")
    move.verify().expect(0)
    columns = "SELECT id::text, content, metadata::text, ü FROM embeddings ORDER BY id"
    connection = move.legacy.connect()
    connection.set_client_encoding("UTF8")
    with connection.cursor() as cursor:
        cursor.execute(columns)
        expected = cursor.fetchall()
    connection.close()
    assert move.main.rows(columns) == expected
    assert ("ç",) in move.main.rows("SELECT content FROM embeddings")


def test_bytes_that_are_no_utf8_are_refused_with_the_encoding_and_the_keys(
    encoded: Callable[[str], Database], empty_main: Database
) -> None:
    move = alembic_made(
        encoded("SQL_ASCII"),
        empty_main,
        r"""INSERT INTO embeddings (id, content, embedding) VALUES
        ('00000000-0000-0000-0000-000000000001', E'right: \xc3\xa9 \xf0\x9f\x99\x82', '[1,2,3]'),
        ('00000000-0000-0000-0000-000000000002', E'Latin: caf\xe9', '[1,2,3]'),
        ('00000000-0000-0000-0000-000000000003', E'overlong: \xc0\xaf', '[1,2,3]')""",
    )
    refused = move.copy().expect(4)
    assert (
        "2 rows with bytes in column content that are not UTF-8, in a database of the encoding SQL_ASCII" in refused.err
    )
    assert "first: 00000000-0000-0000-0000-000000000002, 00000000-0000-0000-0000-000000000003" in refused.err
    line = refused.err.split("write them anew on legacy: ")[1].splitlines()[0]
    move.legacy.execute(f"UPDATE embeddings {line} WHERE id::text ~ '[23]$'")
    move.copy_and_verify()
    found: Any = move.main.rows("SELECT content FROM embeddings ORDER BY id")
    assert found[:2] == [("right: é 🙂",), ("Latin: café",)]


def test_main_that_lacks_characters_is_refused(encoded: Callable[[str], Database], legacy: Database) -> None:
    main = encoded("LATIN1")
    legacy.execute(TABLE_SQL.format(3))
    env = environment(legacy=legacy, main=main, EMBEDDING_DIMENSIONS="3")
    run("alembic", "upgrade", "head", env=env).expect(0)
    move = Move(legacy=legacy, main=main, table="embeddings", env=env)
    assert "main's database has the encoding LATIN1, legacy's has UTF8" in move.copy().expect(4).err
