"""The fence: who is refused, who passes, how it is put, replaced and lifted, and what shows that it holds."""

import io
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psycopg2
import psycopg2.extensions
import pytest
from psycopg2 import sql

from pipeline.demo.servers import Server, create_server, kill_server
from pipeline.endpoints import Endpoint
from pipeline.errors import ConflictError, RefusedError
from pipeline.postgres.database import Session
from pipeline.postgres.fence import (
    fence_script,
    lift_fence,
    lift_script,
    put_fence,
    read_fence,
    rights_missing,
)
from pipeline.postgres.fence_proof import FORBIDDEN, prove_fence
from pipeline.postgres.fence_proof import REFUSED as PROBE_REFUSED
from pipeline.postgres.fence_sql import ROW_TRIGGER, STATEMENT_TRIGGER, Fence
from pipeline.postgres.tables import describe
from pipeline.settings import TableMapping
from tests.conftest import FOLDER_PREFIX, SERVER_SETTINGS
from tests.data import TABLE_SQL
from tests.fences import FENCE, GUARD, INSERT, MESSAGE, Place, objects, place_at, refused, writer
from tests.support import CANARY, Database

# What anybody may send, once a fence stands.
WRITES = (
    INSERT,
    "INSERT INTO public.embeddings (id, content) SELECT id, 'x' FROM public.embeddings ON CONFLICT (id) DO UPDATE"
    " SET content = 'x'",
    "INSERT INTO public.embeddings (id) SELECT id FROM public.embeddings ON CONFLICT DO NOTHING",
    "UPDATE public.embeddings SET content = 'x'",
    "UPDATE public.embeddings SET content = 'x' WHERE false",
    "DELETE FROM public.embeddings",
    "WITH gone AS (DELETE FROM public.embeddings RETURNING id) SELECT count(*) FROM gone",
    "TRUNCATE public.embeddings",
    "TRUNCATE public.embeddings CASCADE",
    "MERGE INTO public.embeddings t USING (SELECT gen_random_uuid() AS id) s ON t.id = s.id"
    " WHEN NOT MATCHED THEN INSERT (id) VALUES (s.id)",
    "DO $$BEGIN EXECUTE 'DELETE FROM public.embeddings'; END$$",
    # A search path on which somebody else's operators come first.
    "SET search_path = evil, pg_catalog; DELETE FROM public.embeddings",
)
EVIL = (
    "CREATE SCHEMA evil; CREATE FUNCTION evil.yes(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT true';"
    "CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.yes)"
)
PARTED = """
CREATE TABLE public.embeddings (id uuid NOT NULL DEFAULT gen_random_uuid(), content text, metadata jsonb,
    embedding vector(3)) PARTITION BY LIST (content);
CREATE TABLE public.a PARTITION OF public.embeddings FOR VALUES IN ('old');
CREATE TABLE public.b PARTITION OF public.embeddings FOR VALUES IN ('new', 'newer') PARTITION BY LIST (content);
CREATE SCHEMA "Far Away";
CREATE TABLE "Far Away"."B""1" PARTITION OF public.b FOR VALUES IN ('new');
"""


@pytest.fixture
def place(new_database: Callable[..., Database]) -> Iterator[Place]:
    with place_at(new_database("16")) as made:
        yield made


@pytest.fixture
def parted(new_database: Callable[..., Database]) -> Iterator[Place]:
    with place_at(new_database("18"), PARTED) as made:
        yield made


@pytest.mark.parametrize("release", ["16", "18", "16.2"])
def test_every_kind_of_write_is_refused(new_database: Callable[..., Database], release: str) -> None:
    database = new_database(release)
    with place_at(database) as place, ExitStack() as stack:
        database.execute(EVIL)
        begun, frozen, readied, plain, replica = (stack.enter_context(writer(database)) for _ in range(5))
        begun.execute("BEGIN; SELECT 1")
        frozen.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM public.embeddings")
        readied.execute("PREPARE late AS DELETE FROM public.embeddings WHERE content = $1")
        readied.execute("EXECUTE late('none')")
        before = database.rows("SELECT * FROM public.embeddings ORDER BY id")
        put_fence(place.crew, place.session, place.table, FENCE)
        replica.execute("SET session_replication_role = replica")
        for cursor, write in (
            *((begun, INSERT), (frozen, INSERT), (readied, "EXECUTE late('none')")),
            # Nobody who reads may be left, for TRUNCATE.
            *((plain, write) for write in WRITES),
            *((replica, write) for write in WRITES),
        ):
            with refused():
                cursor.execute(write)
            if cursor in (begun, frozen):
                cursor.execute("ROLLBACK")
        with refused():
            plain.copy_expert("COPY public.embeddings (content) FROM STDIN", io.StringIO("new\n"))
        for through in ("", "cutover-70", "pipeline"):
            with refused():
                plain.execute(f"BEGIN; SET LOCAL pipeline.through = '{through}'; {INSERT}")
            plain.execute("ROLLBACK")
        assert database.rows("SELECT * FROM public.embeddings ORDER BY id") == before


def test_rows_that_replication_applies_are_refused(new_database: Callable[..., Database]) -> None:
    origin = new_database("16")
    with place_at(new_database("16")) as place, place_at(origin) as source:
        dsn = psycopg2.extensions.make_dsn(
            host=origin.server.host,
            port=origin.server.port,
            user=origin.user,
            password=origin.password,
            dbname=origin.name,
        )
        origin.execute("CREATE PUBLICATION p FOR TABLE public.embeddings")
        slot = f"fence_{origin.name}"
        origin.rows("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", slot)
        with writer(place.database) as subscriber:
            subscriber.execute(
                f"CREATE SUBSCRIPTION s CONNECTION %s PUBLICATION p WITH (slot_name = {slot}, create_slot = false,"
                " copy_data = false, enabled = false)",
                (dsn,),
            )
            put_fence(place.crew, place.session, place.table, FENCE)
            try:
                subscriber.execute("ALTER SUBSCRIPTION s ENABLE")
                origin.execute(INSERT)
                failures = "SELECT apply_error_count FROM pg_stat_subscription_stats"
                wait_for(lambda: place.database.value(failures) > 0)
                assert (place.count, source.count) == (3, 4)
                lift_fence(place.crew, place.session, place.table)
                wait_for(lambda: place.count == 4)
            finally:
                subscriber.execute("ALTER SUBSCRIPTION s DISABLE; ALTER SUBSCRIPTION s SET (slot_name = NONE)")
                subscriber.execute("DROP SUBSCRIPTION s")
                wait_for(lambda: not origin.value("SELECT active FROM pg_replication_slots WHERE slot_name = %s", slot))
                origin.rows("SELECT pg_drop_replication_slot(%s)", slot)


def wait_for(there: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_only_the_pass_goes_through(place: Place) -> None:
    table = place.table
    put_fence(place.crew, place.session, table, FENCE)
    with place.as_pipeline("cutover-7") as passing, place.as_pipeline(None) as plain:
        with pytest.raises(RefusedError) as caught, plain.transaction() as cursor:
            cursor.execute(INSERT)
        assert caught.value.fact.endswith(MESSAGE)
        assert "pipeline status" in caught.value.hint
        with passing.transaction() as cursor:
            cursor.execute("UPDATE public.embeddings SET content = 'changed', embedding = NULL")
            cursor.execute(INSERT)
            cursor.execute("DELETE FROM public.embeddings WHERE content = 'changed'")
            cursor.copy_expert("COPY public.embeddings (content) FROM STDIN", io.StringIO("copied\n"))
        with passing.transaction(single=True) as cursor:
            cursor.execute(INSERT)
        # What went through leaves nothing behind by which the next one would.
        with pytest.raises(psycopg2.Error), passing.connection.cursor() as cursor:
            cursor.execute(INSERT)
        assert place.database.rows("SELECT content, count(*)::int FROM public.embeddings GROUP BY 1 ORDER BY 1") == [
            ("copied", 1),
            ("new", 2),
        ]
        put_fence(place.crew, place.session, table, GUARD)
        with plain.transaction() as cursor:
            cursor.execute("TRUNCATE public.embeddings")
        with pytest.raises(RefusedError), passing.transaction() as cursor:
            cursor.execute(INSERT)
    assert place.count == 0


def test_pass_is_part_of_an_endpoint_and_of_nothing_shown() -> None:
    plain = Endpoint(name="main", host="h", port=1, user="u", database="d")
    passing = replace(plain, through="cutover-7")
    assert (passing.label, passing == plain) == (plain.label, False)
    for through in ("", "a'b", "a%sb", "a b", "a\n", "-a"):
        with pytest.raises(ValueError, match="is no pass"):
            replace(plain, through=through)
        with pytest.raises(ValueError, match="is no pass"):
            Fence(message="m", through=through)
    for message in ("", "two\nlines", "a\0b"):
        with pytest.raises(ValueError, match="one line"):
            Fence(message=message, through="p")


def test_writer_under_way_is_waited_for(place: Place) -> None:
    """His rows are there when the fence is, and he is refused afterwards."""
    table = place.table
    with writer(place.database) as under_way, place.as_pipeline(None) as other:
        under_way.execute("BEGIN; " + INSERT)
        future = place.crew.start(put_fence, place.crew, place.session, table, FENCE)
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'public.embeddings'::regclass"
        wait_for(lambda: place.database.value(waiting) == 1)
        assert not read_fence(other, table).there
        under_way.execute(INSERT + "; COMMIT")
        assert future.result().changed
        with refused():
            under_way.execute(INSERT)
    assert place.count == 5


def test_writer_that_stays_is_named(place: Place) -> None:
    before = objects(place.database)
    with writer(place.database, "nightly import") as under_way:
        under_way.execute("BEGIN; " + INSERT)
        with pytest.raises(ConflictError) as caught:
            put_fence(place.crew, place.session, place.table, FENCE, wait_seconds=0.1, deadline_seconds=0)
        assert f"pid {under_way.connection.info.backend_pid} (nightly import, idle in transaction)" in caught.value.fact
        assert objects(place.database) == before
        # Nobody waits for us after that.
        with writer(place.database) as other:
            other.execute(INSERT)
    assert put_fence(place.crew, place.session, place.table, FENCE).changed


@pytest.mark.parametrize("version", [130000, 160000])
def test_fence_is_replaced_without_a_gap(place: Place, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    """Also where a trigger has to be dropped and made again, as before 14."""
    table = replace(place.table, version=version)
    assert put_fence(place.crew, place.session, table, GUARD).changed
    assert not put_fence(place.crew, place.session, table, GUARD).changed
    ended, refusals, accepted = threading.Event(), [0], [0]

    def hammer() -> None:
        with writer(place.database) as cursor:
            while not ended.is_set():
                try:
                    cursor.execute(INSERT)
                    accepted[0] += 1
                except psycopg2.Error as error:
                    assert error.pgcode == "PF001", error
                    refusals[0] += 1

    threads = [place.crew.start(hammer) for _ in range(2)]
    for fence in (FENCE, GUARD) * 5:
        met = refusals[0]
        assert put_fence(place.crew, place.session, table, fence).changed
        assert read_fence(place.session, table).is_like(fence)
        wait_for(lambda met=met: refusals[0] > met)  # type: ignore[misc]
    ended.set()
    for thread in threads:
        thread.result()
    assert (accepted[0], place.count) == (0, 3)


@pytest.mark.parametrize("release", ["16", "18", "16.2"])
def test_lift_leaves_nothing(new_database: Callable[..., Database], release: str) -> None:
    with place_at(new_database(release)) as place:
        table, before = place.table, objects(place.database)
        assert not lift_fence(place.crew, place.session, table).changed
        put_fence(place.crew, place.session, table, FENCE)
        standing = read_fence(place.session, table)
        assert (standing.standing, standing.refusing, standing.there, standing.missing) == (True, True, True, ())
        assert (standing.message, standing.through) == (FENCE.message, FENCE.through)
        assert objects(place.database) != before
        lifted = lift_fence(place.crew, place.session, table)
        assert (lifted.changed, lifted.in_the_way) == (True, "")
        assert objects(place.database) == before
        assert not lift_fence(place.crew, place.session, table).changed
        gone = read_fence(place.session, table)
        assert (gone.standing, gone.refusing, gone.there, gone.message, gone.through) == (False,) * 3 + (None, None)
        place.database.execute(INSERT)


def test_two_tables_share_the_function(place: Place) -> None:
    before = objects(place.database)
    place.database.execute("CREATE TABLE public.other (id int PRIMARY KEY)")
    other = describe(place.session, TableMapping(table="other"))
    for table in (place.table, other):
        put_fence(place.crew, place.session, table, FENCE)
    lift_fence(place.crew, place.session, place.table)
    assert read_fence(place.session, other).is_like(FENCE)
    lift_fence(place.crew, place.session, other)
    place.database.execute("DROP TABLE public.other")
    assert objects(place.database) == before


def test_reader_in_the_way_does_not_keep_a_table_closed(place: Place) -> None:
    table, before = place.table, objects(place.database)
    put_fence(place.crew, place.session, table, FENCE)
    with writer(place.database, "a backup") as reader:
        reader.execute("BEGIN; SELECT count(*) FROM public.embeddings")
        lifted = lift_fence(place.crew, place.session, table, wait_seconds=0.1, deadline_seconds=0)
        assert lifted.changed
        assert "a backup" in lifted.in_the_way
        place.database.execute(INSERT)
        opened = read_fence(place.session, table)
        assert (opened.standing, opened.refusing, opened.there) == (False, False, True)
        # Readers do not keep it from standing again, nor from being another one.
        assert put_fence(place.crew, place.session, table, GUARD).changed
        assert read_fence(place.session, table).is_like(GUARD)
    assert lift_fence(place.crew, place.session, table).in_the_way == ""
    assert objects(place.database) == before


@pytest.mark.parametrize(
    "foreign",
    [
        "CREATE FUNCTION public.pipeline_fence() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
        "CREATE FUNCTION public.own() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'; CREATE TRIGGER"
        f' "{ROW_TRIGGER}" BEFORE INSERT ON public.embeddings FOR EACH ROW EXECUTE FUNCTION public.own()',
    ],
)
def test_what_only_bears_the_name_is_not_touched(place: Place, foreign: str) -> None:
    place.database.execute(foreign)
    before = objects(place.database)
    with pytest.raises(RefusedError, match="not the pipeline's"):
        put_fence(place.crew, place.session, place.table, FENCE)
    for ask in (lambda: rights_missing(place.session, place.table), lambda: script(place)):
        with pytest.raises(RefusedError, match="not the pipeline's"):
            ask()
    assert not lift_fence(place.crew, place.session, place.table).changed
    assert not read_fence(place.session, place.table).standing
    assert objects(place.database) == before


def script(place: Place) -> str:
    return fence_script(place.session, place.table, FENCE)


def test_every_part_is_fenced(parted: Place) -> None:
    database, table, before = parted.database, parted.table, objects(parted.database)
    put_fence(parted.crew, parted.session, table, FENCE)
    with writer(database) as cursor:
        for name in ("public.embeddings", "public.a", "public.b", '"Far Away"."B""1"'):
            for write in (f"INSERT INTO {name} (content) VALUES ('old')", f"DELETE FROM {name}", f"TRUNCATE {name}"):
                with refused():
                    cursor.execute(write)
        proof = prove_fence(parted.session, table, FENCE)
        assert (proof.holds, len(proof.probes)) == (True, 4 * 3 * 2)
        # What is attached later has no fence yet.
        cursor.execute("CREATE TABLE public.b2 PARTITION OF public.b FOR VALUES IN ('newer')")
        missing = read_fence(parted.session, table).missing
        assert missing == tuple(f"public.b2 has no trigger {name}" for name in (STATEMENT_TRIGGER, ROW_TRIGGER))
        assert not prove_fence(parted.session, table, FENCE).holds
        assert put_fence(parted.crew, parted.session, table, FENCE).changed
        with refused():
            cursor.execute("INSERT INTO public.b2 (content) VALUES ('newer')")
        # What is detached takes its triggers along, and is freed of them all the same.
        cursor.execute("ALTER TABLE public.embeddings DETACH PARTITION public.a")
        lift_fence(parted.crew, parted.session, parted.table)
        cursor.execute("INSERT INTO public.a (content) VALUES ('old')")
        cursor.execute("ALTER TABLE public.embeddings ATTACH PARTITION public.a FOR VALUES IN ('old')")
        cursor.execute("DROP TABLE public.b2")
    left = [one for one in objects(database) if one[0] in ("trigger", "function")]
    assert left == [one for one in before if one[0] in ("trigger", "function")]


def test_heirs_are_fenced(place: Place) -> None:
    place.database.execute("CREATE TABLE public.heir (more int) INHERITS (public.embeddings)")
    put_fence(place.crew, place.session, place.table, FENCE)
    with writer(place.database) as cursor, refused():
        cursor.execute("INSERT INTO public.heir (more) VALUES (1)")


def test_what_has_no_triggers_of_its_own_is_refused(place: Place) -> None:
    place.database.execute("ALTER TABLE public.embeddings RENAME TO below")
    place.database.execute("CREATE VIEW public.embeddings AS SELECT * FROM public.below")
    with pytest.raises(RefusedError, match="is a view, which no trigger can guard"):
        put_fence(place.crew, place.session, place.table, FENCE)
    assert not read_fence(place.session, place.table).standing


ROLES = """
DO $$BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'fence_role') THEN CREATE ROLE fence_role LOGIN; END IF;
END$$;
GRANT SELECT, UPDATE ON public.embeddings TO fence_role
"""


def test_owner_fences_for_a_role_that_may_not(place: Place) -> None:
    place.database.execute(ROLES)
    place.database.execute(sql.SQL("ALTER ROLE fence_role PASSWORD {}").format(sql.Literal(CANARY)))
    before = objects(place.database)
    with Session(replace(place.session.endpoint, user="fence_role"), "test") as session:
        table = describe(session, TableMapping())
        assert rights_missing(session, table) == (
            "public.embeddings belongs to another role",
            "no right to create a function in the schema public",
        )
        with pytest.raises(RefusedError, match="belongs to another role"):
            put_fence(place.crew, session, table, FENCE)
        assert objects(place.database) == before
        text = fence_script(session, table, FENCE)
        psql(place.database, text)
        assert read_fence(session, table).is_like(FENCE)
        assert not put_fence(place.crew, session, table, FENCE).changed
        # A role that may write rows at all is shown the fence, and the rest is shown by the catalog.
        proof = prove_fence(session, table, FENCE)
        assert proof.holds
        assert [(one.statement, one.outcome) for one in proof.probes] == [
            ("INSERT", FORBIDDEN),
            ("UPDATE", PROBE_REFUSED),
            ("DELETE", FORBIDDEN),
            ("any write", FORBIDDEN),
        ]
        with pytest.raises(RefusedError, match="belongs to another role"):
            lift_fence(place.crew, session, table)
        psql(place.database, lift_script(session, table))
        assert objects(place.database) == before


def psql(database: Database, text: str) -> None:
    """Run a script as an owner would, with a search path of his own."""
    server = database.server
    to = ("-h", server.host, "-p", str(server.port), "-U", database.user, "-d", database.name)
    subprocess.run(
        [str(server.programs / "psql"), "-X", "-v", "ON_ERROR_STOP=1", *to],
        input="SET search_path = 'public';\n" + text,
        env={"PGPASSWORD": database.password, "PGCLIENTENCODING": "UTF8"},
        text=True,
        check=True,
        capture_output=True,
    )


def test_function_goes_where_the_role_may_make_one(place: Place) -> None:
    place.database.execute(ROLES)
    place.database.execute(sql.SQL("ALTER ROLE fence_role PASSWORD {}").format(sql.Literal(CANARY)))
    place.database.execute("ALTER TABLE public.embeddings OWNER TO fence_role")
    with Session(replace(place.session.endpoint, user="fence_role"), "test") as session:
        table = describe(session, TableMapping())
        with pytest.raises(RefusedError, match="no right to create a function in the schema public"):
            put_fence(place.crew, session, table, FENCE)
        place.database.execute("CREATE SCHEMA pipeline; GRANT CREATE, USAGE ON SCHEMA pipeline TO fence_role")
        before = objects(place.database)
        put_fence(place.crew, session, table, FENCE)
        assert prove_fence(session, table, FENCE).holds
        assert place.database.value("SELECT 'pipeline.pipeline_fence'::regproc::text")
        with writer(place.database) as cursor, refused():
            cursor.execute(INSERT)
        lift_fence(place.crew, session, table)
        assert objects(place.database) == before


BREACHES = {
    "nothing": (
        "DROP TRIGGER {row} ON public.embeddings; DROP TRIGGER {statement} ON public.embeddings",
        "has no trigger",
    ),
    "rows": ("DROP TRIGGER {row} ON public.embeddings", "has no trigger"),
    "not always": ("ALTER TABLE public.embeddings ENABLE TRIGGER {statement}", "as replica: was accepted"),
    "rows not always": ("ALTER TABLE public.embeddings ENABLE TRIGGER {row}", "is not enabled ALWAYS"),
    "disabled": ("ALTER TABLE public.embeddings DISABLE TRIGGER ALL", "as origin: was accepted"),
    "another function": (
        "CREATE OR REPLACE FUNCTION public.pipeline_fence() RETURNS trigger LANGUAGE plpgsql"
        " AS 'BEGIN RETURN NEW; END'",
        "is not the pipeline's",
    ),
    "a condition": (
        "DROP TRIGGER {row} ON public.embeddings; CREATE TRIGGER {row} BEFORE INSERT OR UPDATE OR DELETE"
        " ON public.embeddings FOR EACH ROW WHEN (false) EXECUTE FUNCTION public.pipeline_fence('m', 'cutover-7');"
        " ALTER TABLE public.embeddings ENABLE ALWAYS TRIGGER {row}",
        "is another one",
    ),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_proof_shows_a_breach(place: Place, breach: str) -> None:
    put_fence(place.crew, place.session, place.table, FENCE)
    proof = prove_fence(place.session, place.table, FENCE)
    assert (proof.broken, {one.outcome for one in proof.probes}, len(proof.probes)) == ((), {PROBE_REFUSED}, 6)
    assert proof.evidence()["probes_refused"] == 6
    assert not prove_fence(place.session, place.table, GUARD).holds
    statement, words = BREACHES[breach]
    before = place.database.rows("SELECT * FROM public.embeddings ORDER BY id")
    place.database.execute(statement.format(row=f'"{ROW_TRIGGER}"', statement=f'"{STATEMENT_TRIGGER}"'))
    broken = prove_fence(place.session, place.table, FENCE)
    assert any(words in fact for fact in broken.broken)
    assert not read_fence(place.session, place.table).standing
    assert place.database.rows("SELECT * FROM public.embeddings ORDER BY id") == before


def test_proof_reaches_odd_columns(place: Place) -> None:
    place.database.execute(
        "DROP TABLE public.embeddings; CREATE TABLE public.embeddings (twice int GENERATED ALWAYS AS (2) STORED,"
        ' "a%s ""b" int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, embedding vector(3) NOT NULL)'
    )
    put_fence(place.crew, place.session, place.table, FENCE)
    assert {one.outcome for one in prove_fence(place.session, place.table, FENCE).probes} == {PROBE_REFUSED}


@pytest.fixture(scope="module")
def busy() -> Iterator[Server]:
    """Return a server on which transactions can be prepared, and autovacuum is never far and never done."""
    settings = {**SERVER_SETTINGS, "max_prepared_transactions": "5", "autovacuum_naptime": "1s"}
    root = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-"))
    root.chmod(0o711)
    server = create_server(root / "16", "16", CANARY, settings)
    yield server
    kill_server(server.folder)
    shutil.rmtree(root, ignore_errors=True)


def test_prepared_transaction_is_refused_at_once(busy: Server) -> None:
    with place_at(
        Database(server=busy, name="postgres"), "DROP TABLE IF EXISTS public.embeddings; " + TABLE_SQL.format(3)
    ) as place:
        with writer(place.database) as cursor:
            cursor.execute("BEGIN; SELECT count(*) FROM public.embeddings; PREPARE TRANSACTION 'a reader'")
            cursor.execute(f"BEGIN; {INSERT}; PREPARE TRANSACTION 'it''s late'")
            with pytest.raises(RefusedError) as caught:
                put_fence(place.crew, place.session, place.table, FENCE)
            assert "it's late" in caught.value.fact
            assert "a reader" not in caught.value.fact
            assert "COMMIT PREPARED" in caught.value.hint
            cursor.execute("COMMIT PREPARED 'it''s late'")
            put_fence(place.crew, place.session, place.table, FENCE)
            # One that had the pass, and would come to light later.
            cursor.execute(f"BEGIN; SET LOCAL pipeline.through = 'cutover-7'; {INSERT}; PREPARE TRANSACTION 'passed'")
            (broken,) = prove_fence(place.session, place.table, FENCE).broken
            assert "'passed'" in broken
            cursor.execute("ROLLBACK PREPARED 'passed'")
            assert prove_fence(place.session, place.table, FENCE).holds
            lifted = lift_fence(place.crew, place.session, place.table, wait_seconds=0.1, deadline_seconds=0)
            assert "a reader" in lifted.in_the_way
            cursor.execute("ROLLBACK PREPARED 'a reader'")
        assert place.count == 4


def test_autovacuum_makes_way(busy: Server) -> None:
    """The server ends it only for one who waits longer than it takes to suspect a deadlock."""
    slow = "; ALTER TABLE public.embeddings SET (autovacuum_vacuum_threshold = 1, autovacuum_vacuum_scale_factor = 0,"
    slow += " autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1)"
    table_sql = "DROP TABLE IF EXISTS public.embeddings; " + TABLE_SQL.format(3) + slow
    with place_at(Database(server=busy, name="postgres"), table_sql) as place:
        place.database.execute(
            "INSERT INTO public.embeddings (content) SELECT repeat('x', 1500) FROM generate_series(1, 20000)"
        )
        place.database.execute("DELETE FROM public.embeddings")
        wait_for(lambda: place.database.value("SELECT count(*) FROM pg_stat_progress_vacuum") > 0)
        put = put_fence(place.crew, place.session, place.table, FENCE, deadline_seconds=20)
        assert (put.changed, put.waited.attempts > 1) == (True, True)
        assert read_fence(place.session, place.table).is_like(FENCE)


def test_fence_with_an_end_opens_by_itself(place: Place) -> None:
    soon = place.database.value("SELECT (clock_timestamp() + interval '1 second')::text")
    late = place.database.value("SELECT (clock_timestamp() + interval '1 hour')::text")
    put_fence(place.crew, place.session, place.table, replace(FENCE, until=late))
    with pytest.raises(psycopg2.Error) as caught:
        place.database.execute(INSERT)
    assert caught.value.pgcode == "PF001"
    put_fence(place.crew, place.session, place.table, replace(FENCE, until=soon))
    wait_for(lambda: place.database.value("SELECT clock_timestamp() > %s::timestamptz", soon))
    place.database.execute("SET datestyle = 'German, DMY'; SET timezone = 'Asia/Kolkata'; " + INSERT)
    assert place.count == 4
    ended = read_fence(place.session, place.table)
    assert (ended.there, ended.standing, ended.refusing) == (True, False, False)
    assert "its time is over" in ended.missing
    put_fence(place.crew, place.session, place.table, FENCE)
    assert read_fence(place.session, place.table).is_like(FENCE)
