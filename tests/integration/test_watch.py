"""The watch names who is still at legacy, sees every accepted write by the counters, and asks main all the time."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import psycopg2
import psycopg2.extensions
import pytest
from psycopg2 import sql

from pipeline.check.changes import Look, look
from pipeline.cutover.canary import Canary, CanaryFigures
from pipeline.cutover.counters import Counters, read_counters, written_since
from pipeline.cutover.strays import Stray, read_strays, write_pattern
from pipeline.cutover.watch import Watched, watch
from pipeline.errors import StoppedError
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Session
from pipeline.postgres.fence import lift_fence, put_fence
from pipeline.postgres.fence_sql import Fence
from pipeline.postgres.tables import describe
from pipeline.settings import TableMapping
from tests.ladders import make, random_vectors
from tests.preflights import administrate, endpoint
from tests.proxy import Proxy
from tests.support import Database

ROWS = 50
TABLE = TableMapping()
FENCE = Fence(message="the table has moved to main", through="cutover-1")
SECRET = "a text that nobody may see"
WRITE = "UPDATE embeddings SET content = 'new' WHERE id = 1"


@pytest.fixture
def crew() -> Iterator[Crew]:
    with Crew() as made:
        yield made


@pytest.fixture
def pair(legacy: Database, empty_main: Database) -> tuple[Database, Database]:
    empty_main.execute("CREATE EXTENSION vector")
    make((legacy, empty_main), random_vectors(ROWS, 3))
    return legacy, empty_main


def fence(database: Database) -> tuple[Counters, Look]:
    """Put the fence, and read what a cutover reads once it stands."""

    def work(crew: Crew) -> tuple[Counters, Look]:
        with crew.session(endpoint(database, "legacy"), "cutover") as session:
            table = describe(session, TABLE)
            put_fence(crew, session, table, FENCE)
            return read_counters(session, TABLE), look(session, table)

    with Crew() as crew:
        return crew.call(work, crew)


def lift(database: Database) -> None:
    def work(crew: Crew) -> None:
        with crew.session(endpoint(database, "legacy"), "cutover") as session:
            lift_fence(crew, session, describe(session, TABLE))

    with Crew() as crew:
        crew.call(work, crew)


def watched(crew: Crew, pair: tuple[Database, Database], before: Counters, **options: Any) -> Watched:
    options = {"seconds": 0.0, "interval_seconds": 0.05, **options}
    return crew.call(watch, crew, endpoint(pair[0], "legacy"), endpoint(pair[1], "main"), TABLE, before, **options)


def flushed(database: Database, connection: psycopg2.extensions.connection) -> None:
    """Let a session hand in what it has counted: a session does when it ends."""
    pid = connection.info.backend_pid
    connection.close()
    while database.value("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", pid):
        time.sleep(0.01)


def write(database: Database, statement: str) -> None:
    connection = database.connect()
    with connection, connection.cursor() as cursor:
        cursor.execute(statement)
    flushed(database, connection)


def refused(connection: psycopg2.extensions.connection, statement: str) -> None:
    with pytest.raises(psycopg2.Error) as error:
        connection.cursor().execute(statement)
    assert error.value.pgcode == "PF001"


def test_quiet_legacy_and_main_that_answers_pass(crew: Crew, pair: tuple[Database, Database]) -> None:
    before, seen = fence(pair[0])
    found = watched(crew, pair, before, look=seen, seconds=0.5, max_latency_ms=60_000)
    assert (found.verdict, found.reasons, found.strays, found.fenced) == ("pass", (), (), True)
    assert found.written is not None and found.written.written is False
    figures = found.canary
    assert figures.searches > 0 and figures.errors == 0 and not figures.nothing_stored
    assert figures.p50_ms and figures.p95_ms and figures.max_ms
    assert 0 < figures.p50_ms <= figures.p95_ms <= figures.max_ms
    assert json.loads(json.dumps(found.to_json()))["verdict"] == "pass"


def test_refused_writer_is_named_and_nothing_was_written(crew: Crew, pair: tuple[Database, Database]) -> None:
    before, seen = fence(pair[0])
    told = list[tuple[Stray, ...]]()
    with closing(pair[0].connect()) as connection:
        connection.autocommit = True
        connection.cursor().execute("SET application_name = 'old app'")
        refused(connection, f"INSERT INTO public.embeddings VALUES (1000, '{SECRET}')")
        found = watched(crew, pair, before, look=seen, tell=lambda seconds, now, canary: told.append(now))
    (stray,) = found.strays
    assert (stray.application, stray.role, stray.address, stray.writes) == ("old app", "postgres", "127.0.0.1", True)
    assert stray.connected_seconds is not None and stray.quiet_seconds is not None
    assert stray.connected_seconds >= stray.quiet_seconds >= 0
    assert found.verdict == "fail"
    assert found.reasons == (f"writes are still sent to legacy, by {stray.label}",)
    assert "'old app' (role postgres, 127.0.0.1, pid " in found.reasons[0]
    assert found.written is not None and (found.written.written, found.written.inserted) == (False, 0)
    assert SECRET not in json.dumps(found.to_json()) and told and told[0][0].pid == stray.pid


def test_client_that_rolls_a_refused_write_back_shows_in_what_was_rolled_back(
    crew: Crew, pair: tuple[Database, Database]
) -> None:
    before, seen = fence(pair[0])
    with closing(pair[0].connect()) as other:
        other.cursor().execute("SELECT 1")
        connection = pair[0].connect()
        refused(connection, WRITE)
        connection.rollback()
        flushed(pair[0], connection)
        found = watched(crew, pair, before, look=seen)
    assert found.verdict == "pass"
    assert found.notes[1] == "rolled back in legacy's database since the fence: 1 transaction"


def test_client_that_only_reads_or_wrote_before_is_named_and_no_failure(
    crew: Crew, pair: tuple[Database, Database]
) -> None:
    with closing(pair[0].connect()) as writer, closing(pair[0].connect()) as reader:
        writer.autocommit = True
        writer.cursor().execute(WRITE)
        before, seen = fence(pair[0])
        reader.cursor().execute("SELECT content, 'insert into' FROM embeddings")
        found = watched(crew, pair, before, look=seen)
    assert found.verdict == "pass"
    assert [(stray.writes, stray.state) for stray in found.strays] == [(False, "idle"), (False, "idle in transaction")]
    assert found.notes[0].startswith("still connected to legacy: ")


@pytest.mark.parametrize(
    ("statement", "counts"),
    [
        (f"INSERT INTO embeddings VALUES (1000, '{SECRET}')", (1, 0, 0)),
        (WRITE, (0, 1, 0)),
        ("DELETE FROM embeddings WHERE id < 3", (0, 0, 3)),
        ("TRUNCATE embeddings", None),
    ],
)
def test_write_where_the_fence_was_lifted_is_seen(
    statement: str, counts: tuple[int, int, int] | None, crew: Crew, pair: tuple[Database, Database]
) -> None:
    before, seen = fence(pair[0])
    lift(pair[0])
    write(pair[0], statement)
    found = watched(crew, pair, before, look=seen)
    assert (found.verdict, found.fenced) == ("fail", False)
    assert found.written is not None and found.written.written is True
    shown = (
        "" if counts is None else f" ({counts[0]} inserted, {counts[1]} updated, {counts[2]} deleted, by its counters)"
    )
    assert found.reasons == (
        "legacy's fence does not stand whole any more",
        f"legacy's table was written since the fence{shown}",
    )


def test_write_that_passed_the_fence_is_seen_while_it_stands(crew: Crew, pair: tuple[Database, Database]) -> None:
    before, seen = fence(pair[0])
    write(pair[0], f"SET pipeline.through = '{FENCE.through}'; {WRITE}")
    found = watched(crew, pair, before, look=seen)
    assert (found.verdict, found.fenced) == ("fail", True)
    assert found.reasons == (
        "legacy's table was written since the fence (0 inserted, 1 updated, 0 deleted, by its counters)",
    )


def test_numbers_handed_in_late_are_no_write(crew: Crew, pair: tuple[Database, Database]) -> None:
    late = pair[0].connect()
    late.autocommit = True
    # What it has counted waits for the end of the transaction that it is in.
    late.cursor().execute(f"BEGIN; {WRITE}; COMMIT; BEGIN")
    before, seen = fence(pair[0])
    flushed(pair[0], late)
    found = watched(crew, pair, before, look=seen)
    assert found.written is not None
    assert (found.verdict, found.written.updated, found.written.looked) == ("pass", 1, True)
    # Without a look it cannot be told from a write.
    blind = watched(crew, pair, before)
    assert blind.verdict == "partial" and blind.written is not None and blind.written.written is None
    assert "count more than at the fence (0 inserted, 1 updated, 0 deleted)" in blind.notes[0]


@pytest.mark.parametrize("how", ["reset", "crash"])
def test_counters_that_were_set_back_are_replaced_by_a_look(
    how: str, crew: Crew, pair: tuple[Database, Database]
) -> None:
    before, seen = fence(pair[0])
    if how == "reset":
        pair[0].execute("SELECT pg_stat_reset()")
    else:
        pair[0].server.restart("immediate")
    with Session(endpoint(pair[0], "legacy"), "test") as session:
        assert written_since(session, TABLE, before, None).written is None
        found = written_since(session, TABLE, before, seen)
        assert (found.comparable, found.looked, found.written) == (False, True, False)
    lift(pair[0])
    write(pair[0], WRITE)
    with Session(endpoint(pair[0], "legacy"), "test") as session:
        assert written_since(session, TABLE, before, seen).written is True
    blind = watched(crew, pair, before)
    assert "were set back" in " ".join(blind.notes)


def test_counters_of_all_partitions_are_summed_and_come_back_from_json(crew: Crew, new_database: Any) -> None:
    database = new_database("16")
    database.execute(
        """CREATE TABLE embeddings (id int PRIMARY KEY, content text) PARTITION BY HASH (id);
        CREATE TABLE part0 PARTITION OF embeddings FOR VALUES WITH (MODULUS 2, REMAINDER 0);
        CREATE TABLE part1 PARTITION OF embeddings FOR VALUES WITH (MODULUS 2, REMAINDER 1)"""
    )
    with Session(endpoint(database, "legacy"), "test") as session:
        before = read_counters(session, TABLE)
        assert Counters.from_json(json.loads(json.dumps(before.to_json()))) == before
        write(database, "INSERT INTO embeddings SELECT i FROM generate_series(1, 100) AS i")
        found = written_since(session, TABLE, before, None)
    assert (len(before.heaps), found.inserted) == (2, 100)


@pytest.mark.parametrize("release", ["16", "18", "16.2"])
def test_every_release_can_be_asked(release: str, new_database: Callable[..., Database]) -> None:
    database = new_database(release)
    database.execute("CREATE EXTENSION vector")
    make((database,), random_vectors(5, 3))
    with closing(database.connect()) as other, Session(endpoint(database, "legacy"), "test") as session:
        other.cursor().execute("SELECT 1")
        before = read_counters(session, TABLE)
        assert written_since(session, TABLE, before, None).written in (False, None)
        assert [stray.pid for stray in read_strays(session, TABLE, before.at)] == [other.info.backend_pid]


def test_what_is_hidden_from_the_role_is_said(crew: Crew, pair: tuple[Database, Database]) -> None:
    before, seen = fence(pair[0])
    role = f"narrow_{pair[0].name}"
    pair[0].execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'; GRANT SELECT ON embeddings TO {role}")
    try:
        with closing(pair[0].connect()) as connection:
            connection.autocommit = True
            refused(connection, WRITE)
            narrow = (pair[0].as_role(role, "x"), pair[1])
            found = watched(crew, narrow, before, look=seen)
            (stray,) = found.strays
            assert (stray.writes, stray.address, stray.state) == (None, None, None)
            assert (found.verdict, stray.role) == ("partial", "postgres")
            assert f"what 1 session on legacy do does not show to the role {role}" in found.notes[0]
            assert "pg_read_all_stats" in found.notes[0]
            pair[0].execute(f"GRANT pg_read_all_stats TO {role}")
            assert [stray.writes for stray in watched(crew, narrow, before, look=seen).strays] == [True]
    finally:
        pair[0].execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_subscription_that_brings_rows_into_the_table_is_a_writer(pair: tuple[Database, Database]) -> None:
    legacy, main = pair
    secret = main.password.replace("\\", "\\\\").replace("'", "\\'")
    where = f"host={main.server.host} port={main.server.port} user={main.user} password='{secret}' dbname={main.name}"
    legacy.execute("CREATE TABLE other (id int)")
    main.execute("CREATE TABLE other (id int); CREATE PUBLICATION there FOR TABLE embeddings, other")
    before, _ = fence(legacy)

    def seen(expected: set[bool | None]) -> None:
        """Wait until this is what is said of the worker, which has no name, and nothing of any other."""
        deadline = time.monotonic() + 30
        with Session(endpoint(legacy, "legacy"), "test") as session:
            while {stray.writes for stray in read_strays(session, TABLE, before.at)} != expected:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    with closing(legacy.connect()) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        # It makes a slot on the other server, which is not done inside a transaction.
        subscribe = sql.SQL("CREATE SUBSCRIPTION {} CONNECTION {} PUBLICATION there WITH (copy_data = false)")
        cursor.execute(subscribe.format(sql.Identifier(legacy.name), sql.Literal(where)))
    try:
        seen({True})
        main.execute("ALTER PUBLICATION there DROP TABLE embeddings")
        administrate(legacy, f"ALTER SUBSCRIPTION {legacy.name} REFRESH PUBLICATION")
        seen({False})
    finally:
        administrate(legacy, f"DROP SUBSCRIPTION {legacy.name}")


WRITING = (
    "insert into embeddings values (1)",
    "/* app */ INSERT INTO public.embeddings (id) VALUES ($1)",
    'INSERT INTO "public"."embeddings"("content") VALUES ($1)',
    'insert into "embeddings" default values',
    "WITH x AS (SELECT 1) UPDATE ONLY public . embeddings SET content = ''",
    "UPDATE embeddings e SET id = 1",
    "DELETE FROM embeddings",
    "MERGE INTO embeddings USING x ON true WHEN MATCHED THEN DELETE",
    "TRUNCATE TABLE ONLY embeddings",
    "COPY public.embeddings (id, content) FROM STDIN",
)
READING = (
    "SELECT * FROM embeddings",
    "SELECT 'insert into' || content FROM embeddings",
    "INSERT INTO embeddings_archive SELECT * FROM embeddings",
    "INSERT INTO my_embeddings SELECT 1",
    "COPY embeddings TO STDOUT",
    "UPDATE other SET n = (SELECT count(*) FROM embeddings)",
    "DELETE FROM embeddings$old",
)


def test_statement_that_writes_to_the_table_is_known_by_its_text(legacy: Database) -> None:
    pattern = write_pattern(("embeddings",))
    for statements, expected in ((WRITING, True), (READING, False)):
        found = {text: legacy.value("SELECT %s ~* %s", text, pattern) for text in statements}
        assert found == dict.fromkeys(statements, expected)


def test_names_in_a_pattern_are_taken_literally(legacy: Database) -> None:
    for name in ('My "T" (1)*', "a.b", "é|x", "a\\d"):
        pattern = write_pattern((name,))
        text = sql.SQL("INSERT INTO {} VALUES (1)")
        with legacy.cursor() as cursor:
            written = text.format(sql.Identifier("public", name)).as_string(cursor)
        assert legacy.value("SELECT %s ~* %s", written, pattern)
        assert not legacy.value("SELECT %s ~* %s", 'INSERT INTO "other"', pattern)


def sung(crew: Crew, canary: Canary) -> CanaryFigures:
    """Let a canary ask once more."""
    crew.call(canary.sing, crew, 0.0, 0.0)
    return canary.figures()


def test_failing_searches_are_counted_with_their_reason(crew: Crew, pair: tuple[Database, Database]) -> None:
    before, seen = fence(pair[0])
    canary = Canary(endpoint(pair[1], "main"), TABLE, None, 10)
    assert sung(crew, canary).errors == 0
    pair[1].execute("ALTER TABLE embeddings RENAME TO gone")
    figures = sung(crew, canary)
    assert (figures.searches, figures.errors) == (2, 1)
    assert figures.first_error is not None and 'relation "public.embeddings" does not exist' in figures.first_error
    found = watched(crew, pair, before, look=seen)
    assert found.verdict == "fail"
    assert found.reasons[0].startswith("1 of 1 searches on main failed; the first: main (")
    pair[1].execute("ALTER TABLE gone RENAME TO embeddings")
    figures = sung(crew, canary)
    assert (figures.searches, figures.errors) == (3, 1)


def test_slow_searches_are_out_of_bounds(crew: Crew, pair: tuple[Database, Database]) -> None:
    before, seen = fence(pair[0])
    found = watched(crew, pair, before, look=seen, max_latency_ms=0.0)
    assert found.verdict == "fail" and "0 ms are allowed" in found.reasons[0]


def test_search_that_finds_nothing_is_an_error_and_an_empty_table_is_said(
    crew: Crew, pair: tuple[Database, Database]
) -> None:
    before, seen = fence(pair[0])
    pair[1].execute("DELETE FROM embeddings")
    found = watched(crew, pair, before, look=seen)
    assert (found.verdict, found.notes) == ("partial", ("main has no vector that could be searched for",))
    again = "INSERT INTO embeddings SELECT i, '', NULL, ARRAY[i, 1, 1]::real[] FROM generate_series(1, 5) AS i"
    pair[1].execute(again)
    canary = Canary(endpoint(pair[1], "main"), TABLE, None, 10)
    assert sung(crew, canary).errors == 0
    pair[1].execute("DELETE FROM embeddings")
    figures = sung(crew, canary)
    assert figures.first_error is not None and "a search for a stored vector found no row" in figures.first_error


def test_servers_that_go_away_are_counted_and_come_back(crew: Crew, pair: tuple[Database, Database]) -> None:
    before, seen = fence(pair[0])
    with Proxy(pair[1].server.host, pair[1].server.port) as proxy:
        canary = Canary(replace(endpoint(pair[1], "main"), port=proxy.port), TABLE, None, 10)
        assert sung(crew, canary).errors == 0
        proxy.refuse()
        proxy.cut()
        assert [sung(crew, canary).errors for _ in range(3)] == [1, 2, 3]
        proxy.allow()
        figures = sung(crew, canary)
        assert (figures.searches, figures.errors) == (5, 3)
    with Proxy(pair[0].server.host, pair[0].server.port) as proxy:
        proxy.refuse()
        away = replace(endpoint(pair[0], "legacy"), port=proxy.port)
        lost = crew.call(watch, crew, away, endpoint(pair[1], "main"), TABLE, before, seconds=0.0, look=seen)
    assert (lost.verdict, lost.written, lost.fenced, lost.legacy_errors) == ("partial", None, None, 2)
    assert lost.notes[0].startswith("legacy could not be asked 2 times: ")


def test_stop_ends_it_at_once(pair: tuple[Database, Database]) -> None:
    with Crew() as crew:
        before, _ = fence(pair[0])
        begun = threading.Event()
        ends = endpoint(pair[0], "legacy"), endpoint(pair[1], "main")
        future = crew.start(watch, crew, *ends, TABLE, before, seconds=600.0, tell=lambda *_: begun.set())
        assert begun.wait(30)
        crew.close()
        with pytest.raises(StoppedError):
            future.result(timeout=0)
