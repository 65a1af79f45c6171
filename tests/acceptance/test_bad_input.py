"""What an operator gets wrong, in the settings, the tables or the rights: refused by name, and nothing was changed."""

import itertools
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from psycopg2 import sql

from pipeline.demo.servers import free_port
from pipeline.errors import (
    EXIT_BUSY,
    EXIT_ERROR,
    EXIT_OK,
    EXIT_REFUSED,
    EXIT_TERMINATED,
    EXIT_UNREACHABLE,
    EXIT_USAGE,
)
from pipeline.ledger.runs import REVISION
from tests.support import CANARY, Database, Outcome, environment, pipeline, run, start

DIMENSIONS = 3
# As LangChain JS makes it, with rows of 1.5 kB that are stored as they are.
EMBEDDINGS = """CREATE TABLE public.embeddings (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), content text,
    metadata jsonb, embedding public.vector(3))"""
ROWS = """INSERT INTO public.embeddings (content, metadata, embedding)
    SELECT repeat(md5(i::text), 48), jsonb_build_object('n', i), ARRAY[i, 1, 2]::public.vector
    FROM generate_series(1, {}) AS i"""
# Every table with its columns, indexes and rows. Who took a lease, and when, is no change of the data.
TABLES = """SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'r' AND n.nspname !~ '^pg_|^information_schema$' ORDER BY 1, 2"""
SHAPE = """SELECT ARRAY(SELECT attname || ' ' || format_type(atttypid, atttypmod) FROM pg_attribute
               WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum),
               ARRAY(SELECT indexdef FROM pg_indexes WHERE format('%%I.%%I', schemaname, tablename) = %s ORDER BY 1)"""
CONTENT = """SELECT count(*), coalesce(md5(string_agg(r, ',' ORDER BY r)), '') FROM (SELECT (to_jsonb(t)
    - ARRAY['lease_owner', 'lease_backend', 'lease_generation', 'lease_until'])::text AS r FROM {} AS t) q"""
# A row with the content 'held' is not taken while somebody holds the lock; no lock timeout runs meanwhile.
GATE = """CREATE FUNCTION public.gate(text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
        WHILE $1 = 'held' AND NOT pg_catalog.pg_try_advisory_xact_lock_shared(7) LOOP
            PERFORM pg_catalog.pg_sleep(0.02);
        END LOOP;
        RETURN true;
    END $$;
    ALTER TABLE public.embeddings ADD CONSTRAINT gate CHECK (public.gate(content))"""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A legacy database in LangChain JS's layout, and a main one at ``alembic upgrade head``."""

    legacy: Database
    main: Database

    def env(self, **more: str) -> dict[str, str]:
        return environment(legacy=self.legacy, main=self.main, **{"EMBEDDING_DIMENSIONS": str(DIMENSIONS), **more})

    def copy(self, *arguments: str, **more: str) -> Outcome:
        return pipeline("copy", *arguments, env=self.env(**more))

    def verify(self, **more: str) -> Outcome:
        return pipeline("verify", "--check", "rows", "--check", "parity", env=self.env(**more))

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Check that neither side is another one after what is done inside."""
        before = contents(self.legacy), contents(self.main)
        yield
        assert (contents(self.legacy), contents(self.main)) == before


def contents(database: Database) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with database.cursor() as cursor:
        cursor.execute(TABLES)
        for schema, name in cursor.fetchall():
            table = sql.Identifier(schema, name)
            cursor.execute(SHAPE, [table.as_string(cursor)] * 2)
            shape = cursor.fetchone()
            cursor.execute(sql.SQL(CONTENT).format(table))
            found[f"{schema}.{name}"] = (shape, cursor.fetchone())
    return found


def told(outcome: Outcome, code: int, fact: str, hint: str) -> None:
    """Check code and message: what is wrong and where, what to type, no result, no traceback."""
    outcome.expect(code)
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    facts = "\n".join(line for line in lines if line.startswith(("error: ", "Error: ")))
    hints = "\n".join(line for line in lines if line.startswith("hint:  "))
    assert re.search(fact, facts), outcome.err
    assert re.search(hint, hints), outcome.err
    assert "…" not in hints, "a hint is typed, so it has no gaps"


@pytest.fixture
def new_pair(new_database: Callable[..., Database], main_template: Callable[[int], str]) -> Callable[[], Pair]:
    def make() -> Pair:
        legacy = new_database("16")
        legacy.execute(f"CREATE EXTENSION vector; {EMBEDDINGS}; {ROWS.format(5)}")
        return Pair(legacy=legacy, main=new_database("18", main_template(DIMENSIONS)))

    return make


@pytest.fixture
def pair(new_pair: Callable[[], Pair]) -> Pair:
    """Return a pair that a copy would move: 5 rows, nothing wrong with it yet."""
    return new_pair()


@pytest.fixture
def new_role() -> Iterator[Callable[..., Database]]:
    """Return a function that makes a role with the given rights, and returns the database as it sees it."""
    made: list[Database] = []

    def make(database: Database, *statements: str) -> Database:
        role = database.as_role(f"role_{database.name}_{len(made)}", CANARY)
        database.execute(
            sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(role.user), sql.Literal(CANARY))
        )
        made.append(database.as_role(role.user, database.password))
        for statement in statements:
            names = {"role": sql.Identifier(role.user), "database": sql.Identifier(database.name)}
            database.execute(sql.SQL(statement).format(**names))
        return role

    yield make
    for owned in made:
        administrator = owned.as_role("postgres", owned.password)
        administrator.execute(sql.SQL("DROP OWNED BY {role}; DROP ROLE {role}").format(role=sql.Identifier(owned.user)))


# ---------------------------------------------------------------- connections

UNREACHED = {
    "host unknown": ({"HOST": "{side}.invalid"}, EXIT_UNREACHABLE, r"the host '{side}\.invalid' is unknown", "_HOST"),
    "port closed": (
        {"PORT": "{closed}"},
        EXIT_UNREACHABLE,
        r"nothing answers at 127\.0\.0\.1 port {closed}",
        "_HOST.* and {prefix}_PORT",
    ),
    "password wrong": ({"PASSWORD": "no"}, EXIT_ERROR, "the password of 'postgres' was refused", "_PASSWORD"),
    "role missing": (
        {"USER": "ghost"},
        EXIT_ERROR,
        "password of 'ghost' was refused, or there is no such role",
        "_PASSWORD.* and {prefix}_USER",
    ),
    "database missing": ({"DB": "nowhere"}, EXIT_ERROR, "there is no database 'nowhere'", "_(DB|NAME)"),
}


@pytest.mark.parametrize("side", ["legacy", "main"])
@pytest.mark.parametrize("case", UNREACHED)
def test_a_server_that_lets_nobody_in_is_named_with_its_variable(pair: Pair, side: str, case: str) -> None:
    changes, code, fact, hint = UNREACHED[case]
    words = {"side": side, "closed": str(free_port())}
    prefix = "DB" if side == "main" else "PGVECTOR"
    names = {"DB": "DB_NAME" if side == "main" else "PGVECTOR_DB"}
    env = {names.get(part, f"{prefix}_{part}"): text.format(**words) for part, text in changes.items()}
    with pair.unchanged():
        label = rf"{side} \(\w+@[\w.]+:\d+/\w+\): "
        told(
            pair.copy(**env), code, label + ".*" + fact.format(**words), f"check {prefix}" + hint.format(prefix=prefix)
        )


def test_hint_names_the_variables_that_legacy_was_read_from(pair: Pair) -> None:
    env = pair.env() | {f"LEGACY_{k[9:]}": v for k, v in pair.env().items() if k.startswith("PGVECTOR_")}
    env |= {"LEGACY_PASSWORD": "no"}
    told(pipeline("copy", env=env), EXIT_ERROR, "the password of 'postgres' was refused", "LEGACY_PASSWORD")


def test_hint_for_a_url_names_no_variable_that_does_not_exist(pair: Pair) -> None:
    outcome = pair.copy("--from", f"postgresql://postgres@127.0.0.1:{free_port()}/vectors")
    told(outcome, EXIT_UNREACHABLE, r"url \(postgres@127\.0\.0\.1:\d+/vectors\): nothing answers", "the URL's host")
    assert "_HOST" not in outcome.err


# ---------------------------------------------------------------- tables


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """What is done to a good pair, and what copy must say of it."""

    legacy: str = ""
    main: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    fact: str
    hint: str


REFUSALS = {
    "legacy has no such table": Refusal(
        legacy="DROP TABLE embeddings",
        fact=r"legacy \(postgres@127\.0\.0\.1:\d+/t\d+\) has no table public\.embeddings$",
        hint="check PGVECTOR_TABLE",
    ),
    "legacy spells the table otherwise": Refusal(
        legacy='ALTER TABLE embeddings RENAME TO "Embeddings"',
        fact=r'has no table public\.embeddings; there is public\."Embeddings"',
        hint=r'set PGVECTOR_TABLE=public\."Embeddings"',
    ),
    "settings spell the table otherwise": Refusal(
        env={"PGVECTOR_TABLE": "MyDocs"},
        legacy="ALTER TABLE embeddings RENAME TO mydocs",
        main="ALTER TABLE embeddings RENAME TO mydocs",
        fact=r"has no table public\.MyDocs; there is public\.mydocs",
        hint=r"set PGVECTOR_TABLE=public\.mydocs",
    ),
    "legacy has the table in another schema": Refusal(
        legacy="CREATE SCHEMA ai; ALTER TABLE embeddings SET SCHEMA ai",
        fact=r"there is ai\.embeddings",
        hint=r"set PGVECTOR_TABLE=ai\.embeddings",
    ),
    "main lost its table": Refusal(
        main="DROP TABLE embeddings",
        fact=r"main \(\S+\) has no table public\.embeddings",
        hint="run: alembic downgrade 0001, then alembic upgrade head",
    ),
    "main has no ledger": Refusal(
        main="DROP SCHEMA pipeline CASCADE", fact=r"main \(\S+\) has no ledger", hint="run: alembic upgrade head"
    ),
    "the ledger is at another revision": Refusal(
        main="UPDATE pipeline.alembic_version SET version_num = '0002'",
        fact=rf"is at revision 0002, this pipeline needs {REVISION}",
        hint="run: alembic upgrade head",
    ),
    "the ledger is at no revision": Refusal(
        main="DELETE FROM pipeline.alembic_version", fact="is at revision none", hint="run: alembic upgrade head"
    ),
    "content is bytea": Refusal(
        legacy="ALTER TABLE embeddings ALTER content TYPE bytea USING content::bytea",
        fact="column content is bytea on legacy and text on main",
        hint="same type",
    ),
    "main is partitioned": Refusal(
        main="""DROP TABLE embeddings; CREATE TABLE embeddings (id uuid PRIMARY KEY, content text, metadata jsonb,
            embedding vector(3)) PARTITION BY HASH (id)""",
        fact=r"\Aerror: main's public\.embeddings is a partitioned table; rows are copied into ordinary tables only\Z",
        hint="PGVECTOR_TABLE",
    ),
    "a row of main has a key of legacy's": Refusal(
        legacy="UPDATE embeddings SET id = md5('1')::uuid WHERE (metadata->>'n')::int = 1",
        main="INSERT INTO public.embeddings (id, content) VALUES (md5('1')::uuid, 'other')",
        fact=r"main \(\S+\)'s public\.embeddings has 1 row with a key of the source's and other content",
        hint=r"--on-conflict keep \(they stay\), or --on-conflict overwrite",
    ),
    "two types are wrong": Refusal(
        legacy="ALTER TABLE embeddings ALTER metadata TYPE text, ALTER content TYPE bytea USING NULL",
        fact=r"(?s)column content is bytea.*column metadata is text",
        hint="same type",
    ),
    "two things are wrong": Refusal(
        legacy="ALTER TABLE embeddings ALTER metadata TYPE text, DROP CONSTRAINT embeddings_pkey",
        fact=r"(?s)has no key.*column metadata is text",
        hint="(?s)ADD PRIMARY KEY.*same type",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_copy_refuses_before_anything_is_changed(pair: Pair, case: str) -> None:
    refusal = REFUSALS[case]
    for database, statements in ((pair.legacy, refusal.legacy), (pair.main, refusal.main)):
        if statements:
            database.execute(statements)
    with pair.unchanged():
        told(pair.copy(**refusal.env), EXIT_REFUSED, refusal.fact, refusal.hint)


@pytest.mark.parametrize("case", ["legacy has no such table", "main has no ledger", "two types are wrong"])
def test_verify_refuses_what_it_cannot_compare(pair: Pair, case: str) -> None:
    refusal = REFUSALS[case]
    for database, statements in ((pair.legacy, refusal.legacy), (pair.main, refusal.main)):
        if statements:
            database.execute(statements)
    with pair.unchanged():
        told(pair.verify(), EXIT_REFUSED, refusal.fact, refusal.hint)


def test_hint_for_a_lost_table_brings_it_back(pair: Pair) -> None:
    pair.main.execute("DROP TABLE embeddings")
    env = pair.env()
    run("alembic", "downgrade", "0001", env=env).expect(EXIT_OK)
    run("alembic", "upgrade", "head", env=env).expect(EXIT_OK)
    pair.copy().expect(EXIT_OK)


def test_hints_quote_names_that_need_it(pair: Pair) -> None:
    pair.legacy.execute(
        'ALTER TABLE embeddings DROP CONSTRAINT embeddings_pkey, ADD "Owner Id" int; ALTER TABLE embeddings '
        'RENAME TO "My ""Docs"""'
    )
    pair.main.execute('ALTER TABLE embeddings RENAME TO "My ""Docs"""')
    outcome = pair.copy(PGVECTOR_TABLE='"My ""Docs"""')
    told(
        outcome,
        EXIT_REFUSED,
        "has no column Owner Id",
        re.escape('ALTER TABLE public."My ""Docs""" ADD PRIMARY KEY (id)'),
    )
    told(outcome, EXIT_REFUSED, "has no key", re.escape('ADD COLUMN "Owner Id" integer'))


def test_untyped_column_of_the_right_dimension_is_carried(pair: Pair) -> None:
    pair.legacy.execute("ALTER TABLE embeddings ALTER embedding TYPE vector")
    pair.legacy.execute("INSERT INTO embeddings (content) VALUES ('without a vector')")
    pair.copy().expect(EXIT_OK)
    pair.verify().expect(EXIT_OK)
    assert pair.main.rows("SELECT count(*), count(embedding) FROM embeddings") == [(6, 5)]


def test_column_that_both_sides_have_is_carried(pair: Pair) -> None:
    pair.legacy.execute("ALTER TABLE embeddings ADD collection text DEFAULT 'of legacy', ADD hits int DEFAULT 3")
    pair.main.execute("ALTER TABLE embeddings ADD hits int, ADD collection text")
    pair.copy().expect(EXIT_OK)
    pair.verify().expect(EXIT_OK)
    assert pair.main.rows("SELECT DISTINCT collection, hits FROM embeddings") == [("of legacy", 3)]


def test_the_same_table_under_two_names_is_refused(pair: Pair) -> None:
    for host in ("127.0.0.1", "localhost"):
        same = pair.main.variables("PGVECTOR", "PGVECTOR_DB") | {"PGVECTOR_HOST": host}
        with pair.unchanged():
            outcome = pair.copy(**same)
            told(outcome, EXIT_REFUSED, "legacy and main are the same table of the same server", "pipeline settings")


# ---------------------------------------------------------------- rights

ON_LEGACY = {
    "no SELECT": ((), r"may not SELECT on legacy's public\.embeddings$", "GRANT SELECT ON public.embeddings TO {}"),
    "no SELECT on a column": (
        ("GRANT SELECT (id, metadata, embedding) ON embeddings TO {role}",),
        r"may not SELECT on legacy's public\.embeddings \(columns content\)",
        "GRANT SELECT ON public.embeddings TO {}",
    ),
    "no USAGE on the schema": (
        ("GRANT SELECT ON embeddings TO {role}", "REVOKE USAGE ON SCHEMA public FROM PUBLIC"),
        "may not use legacy's schema public",
        "GRANT USAGE ON SCHEMA public TO {}",
    ),
    "row-level security": (
        ("GRANT SELECT ON embeddings TO {role}", "ALTER TABLE embeddings ENABLE ROW LEVEL SECURITY"),
        r"row-level security hides rows of legacy's public\.embeddings",
        "ALTER ROLE {} BYPASSRLS",
    ),
}
LEDGER = "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA pipeline TO {role}"
ON_MAIN = {
    "no ledger": ((), "permission denied for schema pipeline", "grant the right"),
    "no INSERT": (
        ("GRANT USAGE ON SCHEMA pipeline TO {role}", LEDGER, "GRANT SELECT ON embeddings TO {role}"),
        r"may not INSERT on main's public\.embeddings",
        "GRANT INSERT ON public.embeddings TO {}",
    ),
    "no DELETE": (
        (
            *("GRANT USAGE ON SCHEMA pipeline TO {role}", LEDGER),
            "GRANT SELECT, INSERT, UPDATE ON embeddings TO {role}",
        ),
        r"\Aerror: the role \w+ may not DELETE on main's public\.embeddings\Z",
        "GRANT DELETE ON public.embeddings TO {}",
    ),
    "no temporary tables": (
        (
            *("GRANT USAGE ON SCHEMA pipeline TO {role}", LEDGER, "GRANT ALL ON embeddings TO {role}"),
            "REVOKE TEMPORARY ON DATABASE {database} FROM PUBLIC",
        ),
        r"\Aerror: the role \w+ may not make temporary tables on main\Z",
        "GRANT TEMPORARY ON DATABASE ",
    ),
    "row-level security": (
        (
            *("GRANT USAGE ON SCHEMA pipeline TO {role}", LEDGER, "GRANT ALL ON embeddings TO {role}"),
            "ALTER TABLE embeddings ENABLE ROW LEVEL SECURITY",
            "CREATE POLICY everything ON embeddings USING (true)",
        ),
        r"row-level security hides rows of main's public\.embeddings",
        "ALTER ROLE {} BYPASSRLS",
    ),
}


@pytest.mark.parametrize("case", ON_LEGACY)
def test_a_right_that_lacks_on_legacy_is_named(pair: Pair, new_role: Callable[..., Database], case: str) -> None:
    statements, fact, hint = ON_LEGACY[case]
    role = new_role(pair.legacy, *statements)
    with pair.unchanged():
        outcome = Pair(legacy=role, main=pair.main).copy()
        told(outcome, EXIT_REFUSED, fact, re.escape(hint.format(role.user)))


@pytest.mark.parametrize("case", ON_MAIN)
def test_a_right_that_lacks_on_main_is_named(pair: Pair, new_role: Callable[..., Database], case: str) -> None:
    statements, fact, hint = ON_MAIN[case]
    role = new_role(pair.main, *statements)
    with pair.unchanged():
        outcome = Pair(legacy=pair.legacy, main=role).copy()
        told(outcome, EXIT_REFUSED, fact, re.escape(hint.format(role.user)))


def test_hinted_grants_are_enough_to_copy_and_verify(pair: Pair, new_role: Callable[..., Database]) -> None:
    reader = new_role(pair.legacy, "GRANT SELECT ON embeddings TO {role}")
    writer = new_role(
        pair.main,
        *("GRANT USAGE ON SCHEMA pipeline TO {role}", LEDGER),
        "GRANT SELECT, INSERT, UPDATE, DELETE ON embeddings TO {role}",
    )
    roles = Pair(legacy=reader, main=writer)
    assert "this role does not own it" in roles.copy().expect(EXIT_OK).err
    roles.verify().expect(EXIT_OK)


def test_read_only_main_is_refused_and_not_overruled(pair: Pair) -> None:
    name = sql.Identifier(pair.main.name)
    pair.main.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(name))
    with pair.unchanged():
        told(pair.copy(), EXIT_REFUSED, r"main \(\S+\) takes no writes", "end its read-only mode")


# ---------------------------------------------------------------- runs


def wait_for(database: Database, query: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not database.value(query):
        assert time.monotonic() < deadline, query
        time.sleep(0.05)


def end(process: "subprocess.Popen[str]") -> Outcome:
    out, err = process.communicate(timeout=30)
    return Outcome(code=process.returncode, out=out, err=err)


@contextmanager
def copy_held(pair: Pair, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """Start a copy of 2,000 rows in slices of 1 MiB that stands still in its last one until the block ends."""
    pair.legacy.execute(f"{ROWS.format(2000)}; INSERT INTO public.embeddings (content) VALUES ('held')")
    pair.main.execute(GATE)
    with closing(pair.main.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(7)")
        process = start("copy", "--workers", "1", "--slice-size", "1", *arguments, env=pair.env())
        try:
            wait_for(pair.main, "SELECT count(*) >= 2 AND count(*) = count(finished_at) + 1 FROM pipeline.slice")
            yield process
        except BaseException:
            process.kill()
            process.communicate()
            raise


@pytest.fixture
def interrupted(pair: Pair) -> Pair:
    """Return a pair whose copy was terminated before its last slice."""
    with copy_held(pair) as process:
        process.send_signal(signal.SIGTERM)
        end(process).expect(EXIT_TERMINATED)
    return pair


def test_a_second_copy_is_turned_away_and_the_first_one_undisturbed(pair: Pair) -> None:
    # Longer than the lock timeout: a long slice must not make the second one wait, nor end the first one.
    with copy_held(pair, "--json") as process, pair.unchanged():
        second = pipeline("copy", env=pair.env(), timeout=15)
        fact = rf"another copy of this table is running: \S+ pid {process.pid}\b"
        told(second, EXIT_BUSY, fact, "pipeline status")
    first = end(process).expect(EXIT_OK).json["copy"]
    assert (first["rows"], first["retries"]) == (2006, 0)
    pair.verify().expect(EXIT_OK)


def test_rows_that_somebody_added_meanwhile_stop_the_resume(interrupted: Pair) -> None:
    interrupted.main.execute(ROWS.format(2))
    with interrupted.unchanged():
        told(interrupted.copy(), EXIT_REFUSED, "holds 2 rows that this run did not bring", "take them out")


def test_rows_that_somebody_deleted_meanwhile_stop_the_resume(interrupted: Pair) -> None:
    brought = interrupted.main.value("SELECT count(*) FROM embeddings")
    interrupted.main.execute("DELETE FROM embeddings WHERE ctid IN (SELECT ctid FROM embeddings LIMIT 2)")
    with interrupted.unchanged():
        told(interrupted.copy(), EXIT_REFUSED, f"has lost 2 of the {brought:,} rows", "TRUNCATE.*--restart")


def test_resume_from_another_source_is_refused(interrupted: Pair, new_pair: Callable[[], Pair]) -> None:
    other = Pair(legacy=new_pair().legacy, main=interrupted.main)
    with other.unchanged():
        told(other.copy(), EXIT_REFUSED, rf"the unfinished run 1 into .*/{interrupted.legacy.name}: ", "--restart")


def test_copy_by_urls_goes_both_ways_with_a_password_file(
    pair: Pair, new_pair: Callable[[], Pair], tmp_path: Path
) -> None:
    home = new_pair().legacy
    home.execute("DROP TABLE embeddings")
    env = environment(main=home, EMBEDDING_DIMENSIONS=str(DIMENSIONS))
    run("alembic", "upgrade", "head", env=env).expect(EXIT_OK)
    passwords = tmp_path / "passwords"
    escaped = CANARY.replace("\\", "\\\\").replace(":", "\\:")
    passwords.write_text(f"127.0.0.1:*:*:postgres:{escaped}\n", encoding="utf-8")
    passwords.chmod(0o600)
    env = environment(PGPASSFILE=str(passwords), EMBEDDING_DIMENSIONS=str(DIMENSIONS))
    urls = [f"postgresql://postgres@127.0.0.1:{d.server.port}/{d.name}" for d in (pair.legacy, pair.main, home)]
    for source, target in itertools.pairwise(urls):
        pipeline("copy", "--from", source, "--to", target, env=env).expect(EXIT_OK)
        pipeline("verify", "--check", "rows", "--from", source, "--to", target, env=env).expect(EXIT_OK)
    assert contents(home)["public.embeddings"][1] == contents(pair.legacy)["public.embeddings"][1]


# ---------------------------------------------------------------- settings and options

COMPLETE = {
    "DB_HOST": "main.invalid",
    "DB_USER": "app",
    "DB_PASSWORD": CANARY,
    "DB_NAME": "app",
    "PGVECTOR_HOST": "legacy.invalid",
    "PGVECTOR_USER": "app",
    "PGVECTOR_DB": "vectors",
}
SETTINGS = "pipeline settings shows every value"
MISUSES: dict[str, tuple[tuple[str, ...], dict[str, str | None], str, str]] = {
    "URL with a password": (
        ("--from", f"postgresql://app:{CANARY.split('@')[0]}@legacy.invalid/vectors"),
        {},
        "the URL holds a password",
        r"~/\.pgpass",
    ),
    "URL that cannot be read": (("--from", "postgresql://app@[::1/vectors"), {}, "URL cannot be read", "postgresql://"),
    "unknown endpoint": (
        ("--from", "leagcy"),
        {},
        "there is no endpoint named leagcy",
        "say legacy, main, or postgres",
    ),
    "a connection string as endpoint": (("--to", f"password={CANARY}"), {}, "not an endpoint's name", "say legacy"),
    "variable missing": ((), {"DB_HOST": None}, "DB_HOST is not set", r"set DB_HOST in the environment or in \.env"),
    "variable empty": ((), {"DB_HOST": ""}, r"DB_HOST \(environment\) is empty", "give DB_HOST a value"),
    "host with a port": (
        (),
        {"PGVECTOR_HOST": "app@h:1"},
        r"PGVECTOR_HOST \(environment\) is not a host name",
        "alone",
    ),
    "port no number": ((), {"DB_PORT": "five"}, r"DB_PORT \(environment\) is not a whole number from 1 to", SETTINGS),
    "dimensions zero": ((), {"EMBEDDING_DIMENSIONS": "0"}, "EMBEDDING_DIMENSIONS .* from 1 to 16000", SETTINGS),
    "SSL mode unknown": ((), {"DB_SSL": "maybe"}, "DB_SSL .*neither true, false nor an SSL mode", "the modes are"),
    "table name unreadable": ((), {"PGVECTOR_TABLE": "a.b.c"}, "PGVECTOR_TABLE .* is not a table name", "schema.table"),
    "one column twice": ((), {"PGVECTOR_COL_CONTENT": "id"}, "names a column that another variable names", SETTINGS),
    "slice size zero": (("--slice-size", "0"), {}, "'--slice-size': 0 is not in the range 1<=x<=1024", ""),
    "slice size no number": (("--slice-size", "big"), {}, "'--slice-size': 'big' is not a valid integer", ""),
    "workers too many": (("--workers", "65"), {}, "'--workers': 65 is not in the range 1<=x<=64", ""),
    "unknown option": (("--form", "legacy"), {}, "No such option.*--form", ""),
}


@pytest.mark.parametrize("case", MISUSES)
def test_misuse_is_named_before_any_connection(case: str) -> None:
    arguments, changes, fact, hint = MISUSES[case]
    env = environment() | {name: value for name, value in (COMPLETE | changes).items() if value is not None}
    outcome = pipeline("copy", *arguments, env=env)
    told(outcome, EXIT_USAGE, fact, hint)
    assert "canary" not in outcome.err


ENV_FILES = {
    "no assignment": ("DB_USER=app\nDB HOST main\n", "line 2: this line cannot be read", "write NAME=value"),
    "no equals sign": ("\nDB_USER\n", "line 2: DB_USER has no =", "write DB_USER=value"),
    "twice": ("DB_USER=a\n\nDB_USER=b\n", "line 3: DB_USER is set twice, first at .*:1$", "keep one"),
    "cut password": (f"DB_USER=a\nDB_PASSWORD={CANARY[:9]} #x\n", "line 2: DB_PASSWORD is cut", "quote the value"),
    "open quote": ("DB_PASSWORD='canary\nDB_USER=app\nDB_NAME=a'b\n", "line 1: ", "quote"),
}


@pytest.mark.parametrize("case", ENV_FILES)
@pytest.mark.parametrize("option", [True, False])
def test_bad_line_of_an_env_file_is_named_by_file_and_number(case: str, option: bool, tmp_path: Path) -> None:
    text, fact, hint = ENV_FILES[case]
    path = tmp_path / ("settings.env" if option else ".env")
    path.write_text(text)
    arguments = ("--env-file", str(path)) if option else ()
    outcome = pipeline("copy", *arguments, env=environment() | COMPLETE, cwd=tmp_path)
    told(outcome, EXIT_USAGE, rf"{re.escape(str(path) if option else '.env')}, {fact}", hint)
    assert "canary" not in outcome.err


def test_env_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.env"
    outcome = pipeline("copy", "--env-file", str(path), env=environment() | COMPLETE)
    told(outcome, EXIT_USAGE, rf"{re.escape(str(path))} cannot be read: No such file", "--env-file")


def test_json_is_not_begun_before_a_failure(pair: Pair) -> None:
    pair.legacy.execute("DROP TABLE embeddings")
    outcome = pair.copy("--json")
    told(outcome, EXIT_REFUSED, "has no table", "PGVECTOR_TABLE")
    pair.legacy.execute(EMBEDDINGS)
    assert json.loads(pair.copy("--json").expect(EXIT_OK).out)["copy"]["rows"] == 0
