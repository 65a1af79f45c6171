"""Servers before 14: rows go by ranges of the key and are compared by md5. The servers here are 16 and 18, told older.

What the engine asks of an old server is not more than 13 knows; what it does with the answers is the same everywhere.
"""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import pytest
from psycopg2 import sql

from pipeline.check.digests import hash_sql
from pipeline.check.verify import verify
from pipeline.errors import RefusedError
from pipeline.events import CheckDone, CopyDone, Event, Loaded, SliceDone
from pipeline.move.copy import copy
from pipeline.options import CopyOptions, VerifyOptions
from pipeline.postgres.database import Session
from pipeline.postgres.tables import describe
from pipeline.settings import Route, Settings, TableMapping
from tests.data import TABLE_SQL, content
from tests.moves import Move
from tests.preflights import endpoint
from tests.support import Database

ROWS = 2_000
# Some ten slices of these rows.
OPTIONS = CopyOptions(workers=2, slice_bytes=20_000)
# What came with 14 or later, as it would stand in a statement to an older server.
NEWER = (
    *("hash_record_extended", "pg_column_compression", "pg_input_is_valid", "IS JSON", "pg_catalog.tid"),
    *("client_connection_check_interval", "transaction_timeout", "idle_session_timeout", "date_bin"),
)
FILL = """INSERT INTO public.embeddings (id, content, metadata, embedding) SELECT md5('row' || i)::uuid,
    CASE WHEN i %% 7 > 0 THEN 'text ' || i END, jsonb_build_object('n', i, 'price', 1.10), ARRAY[i, 1, sin(i)]::real[]
    FROM generate_series(1, %s) AS i"""


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: int) -> None:
    """Let sessions believe that an endpoint's server is of another version."""

    def version(session: Session) -> int:
        return versions.get(session.endpoint.name, session.connection.server_version)

    monkeypatch.setattr(Session, "version", property(version, lambda session, value: None), raising=False)


@pytest.fixture
def move(new_move: Callable[..., Move], monkeypatch: pytest.MonkeyPatch) -> Move:
    made = new_move(TABLE_SQL.format(3), "")
    made.legacy.execute(FILL, ROWS)
    pretend(monkeypatch, legacy=130000)
    return made


def way(move: Move, source: str = "legacy", target: str = "main") -> Route:
    return Settings.load(environ=move.env).route(source, target)


def copied(move: Move, on: Callable[[Event], object] = lambda event: None) -> CopyDone:
    with closing(copy(way(move), OPTIONS)) as events:
        for event in events:
            on(event)
            if isinstance(event, CopyDone):
                return event
    raise AssertionError("the copy ended without an end")


def checked(move: Move) -> dict[str, CheckDone]:
    with closing(verify(way(move), VerifyOptions(queries=5, k=5, checks=("rows", "parity")))) as events:
        return {event.name: event for event in events if isinstance(event, CheckDone)}


def differences(move: Move) -> set[tuple[str, str]]:
    keys: Any = checked(move)["digests"].figures["keys"]
    return {(one["kind"], one["key"]) for one in keys}


def key(number: int) -> str:
    return f"(md5('row{number}')::uuid)"


@contextmanager
def logged(database: Database) -> Iterator[list[str]]:
    """Yield a list that holds, after the block, the log of every statement in this database meanwhile."""
    database.execute(sql.SQL("ALTER DATABASE {} SET log_statement = 'all'").format(sql.Identifier(database.name)))
    log, lines = database.server.log, list[str]()
    begin = log.stat().st_size
    yield lines
    with log.open("rb") as file:
        file.seek(begin)
        lines.append(file.read().decode())
    database.execute(sql.SQL("ALTER DATABASE {} RESET log_statement").format(sql.Identifier(database.name)))


@contextmanager
def writer(legacy: Database, seed: int) -> Iterator[Callable[[], None]]:
    """Change rows in every way, in short and long transactions, until the function that is yielded is called."""
    dice, stop, failed = random.Random(seed), threading.Event(), list[BaseException]()
    statements = (
        "UPDATE public.embeddings SET content = 'new ' || content WHERE id = {}",
        "UPDATE public.embeddings SET embedding = embedding + embedding WHERE id = {}",
        "UPDATE public.embeddings SET id = gen_random_uuid() WHERE id = {}",
        "DELETE FROM public.embeddings WHERE id = {}",
        "INSERT INTO public.embeddings (id, content) SELECT gen_random_uuid(), 'added ' || {}",
    )

    def write() -> None:
        try:
            with closing(legacy.connect()) as connection, connection.cursor() as cursor:
                while not stop.is_set():
                    for _ in range(dice.randint(1, 5)):
                        cursor.execute(dice.choice(statements).format(key(dice.randint(1, ROWS))))
                    connection.rollback() if dice.random() < 0.2 else connection.commit()
        except BaseException as error:  # noqa: BLE001 - raised again where the thread is joined
            failed.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield stop.set
    finally:
        stop.set()
        thread.join()
    if failed:
        raise failed[0]


def test_rows_go_by_key_while_a_writer_is_at_work_and_both_sides_are_equal_then(move: Move) -> None:
    seed = random.randrange(2**32)
    # Open across the start: it began before the run's horizon, and commits once slices are on main.
    with closing(move.legacy.connect()) as early, writer(move.legacy, seed) as rest:
        early.cursor().execute(f"INSERT INTO public.embeddings (id, content) VALUES (md5('early')::uuid, '{seed}')")

        def on(event: Event) -> None:
            if isinstance(event, SliceDone):
                early.commit()
            elif isinstance(event, Loaded):
                rest()

        done = copied(move, on)
    assert done.settled and done.changed_rows > 0, f"seed {seed}"
    assert content(move.main) == content(move.legacy), f"seed {seed}"
    assert {name: check.verdict for name, check in checked(move).items()} == {
        "counts": "pass",
        "digests": "pass",
        "parity": "pass",
    }
    slices = move.main.rows("SELECT kind, lower IS NULL, upper IS NULL FROM pipeline.slice ORDER BY ordinal")
    assert len(slices) > 5
    assert slices == [("keys", n == 0, n == len(slices) - 1) for n in range(len(slices))]


def test_copy_goes_on_with_the_boundaries_that_were_drawn(move: Move) -> None:
    boundaries = "SELECT ordinal, lower, upper FROM pipeline.slice ORDER BY ordinal"
    with closing(copy(way(move), replace(OPTIONS, workers=1, max_bytes_per_second=200_000))) as events:
        next(event for event in events if isinstance(event, SliceDone))
    drawn = move.main.rows(boundaries)
    # As many rows again, which would move every boundary.
    move.legacy.execute("INSERT INTO public.embeddings (id, content) SELECT gen_random_uuid(), content FROM embeddings")
    done = copied(move)
    assert 0 < done.moved_slices < done.slices
    assert move.main.rows(boundaries) == drawn
    assert content(move.main) == content(move.legacy)


def test_every_planted_difference_is_found(move: Move) -> None:
    copied(move)
    planted = {
        1: ("missing", "DELETE FROM embeddings WHERE id = {}"),
        2: ("different", "UPDATE embeddings SET content = content || ' ' WHERE id = {}"),
        7: ("different", "UPDATE embeddings SET content = '' WHERE id = {}"),
        3: ("different", "UPDATE embeddings SET embedding = '[3, 1, 0.1411201]' WHERE id = {}"),
        4: ("different", """UPDATE embeddings SET metadata = '{{"n": 4, "price": 1.1}}' WHERE id = {}"""),
        5: ("different", "UPDATE embeddings SET content = NULL, metadata = to_jsonb(content) WHERE id = {}"),
        ROWS + 1: ("extra", "INSERT INTO embeddings (id) VALUES ({})"),
    }
    for number, (_, statement) in planted.items():
        move.main.execute(statement.format(key(number)))
    names = {number: str(move.main.value(f"SELECT {key(number)}::text")) for number in planted}
    assert differences(move) == {(kind, names[number]) for number, (kind, _) in planted.items()}


def test_sign_of_zero_is_a_difference(move: Move) -> None:
    move.legacy.execute(f"UPDATE embeddings SET embedding = '[0, 1, 2]' WHERE id = {key(9)}")
    copied(move)
    assert differences(move) == set()
    move.main.execute(f"UPDATE embeddings SET embedding = '[-0, 1, 2]' WHERE id = {key(9)}")
    assert {kind for kind, _ in differences(move)} == {"different"}


def test_rows_that_main_has_already_are_known_as_equal_or_refused(move: Move) -> None:
    copied(move)
    move.main.execute(
        "DELETE FROM pipeline.run; DELETE FROM embeddings WHERE id < '80000000-0000-0000-0000-000000000000'"
    )
    assert copied(move).rows_before > 0
    move.main.execute(f"DELETE FROM pipeline.run; UPDATE embeddings SET content = 'other' WHERE id = {key(1)}")
    with pytest.raises(RefusedError, match="1 row with a key of the source's and other content"):
        copied(move)


def test_old_server_is_asked_for_nothing_that_it_does_not_know(move: Move) -> None:
    with logged(move.legacy) as here, logged(move.main) as there:
        # A conflict in a slice, so that rows are compared in the staging table too.
        move.main.execute(
            sql.SQL("INSERT INTO embeddings (id, content) VALUES ({}, NULL)").format(
                sql.Literal(move.legacy.value(f"SELECT {key(1)}::text"))
            )
        )
        move.legacy.execute(
            f"UPDATE embeddings SET content = NULL, metadata = NULL, embedding = NULL WHERE id = {key(1)}"
        )
        copied(move)
        move.main.execute(f"DELETE FROM embeddings WHERE id = {key(5)}")
        differences(move)
    assert "COPY (SELECT" in here[0] and "pg_catalog.md5(" in here[0] and "OPERATOR(pg_catalog.>) (" in here[0]
    assert [name for name in NEWER if name in here[0]] == []
    # And the newer one hashes as the older one does.
    assert "pg_catalog.md5(" in there[0] and "ON CONFLICT" in there[0]
    assert "hash_record_extended" not in there[0]


def test_every_partition_and_every_part_of_a_key_is_in_a_slice(
    new_move: Callable[..., Move], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = """CREATE TABLE embeddings (tenant text COLLATE "C", id bigint, content text, metadata jsonb,
        embedding vector(3), PRIMARY KEY (tenant, id))"""
    move = new_move(
        f"""{table} PARTITION BY HASH (id);
        CREATE TABLE part0 PARTITION OF embeddings FOR VALUES WITH (MODULUS 2, REMAINDER 0);
        CREATE TABLE part1 PARTITION OF embeddings FOR VALUES WITH (MODULUS 2, REMAINDER 1);
        INSERT INTO embeddings SELECT chr(97 + i % 5) || '''é', i, 'text ' || i, NULL, ARRAY[i, 1, sin(i)]::real[]
        FROM generate_series(1, 1000) AS i""",
        table,
    )
    pretend(monkeypatch, legacy=130000)
    done = copied(move)
    assert (done.rows, done.slices > 1) == (1000, True)
    rows = "SELECT tenant, id, content, embedding::text FROM embeddings ORDER BY id"
    assert move.main.rows(rows) == move.legacy.rows(rows)
    assert {check.verdict for check in checked(move).values()} == {"pass"}


def test_hash_of_an_old_server_is_the_same_on_every_version_and_of_other_values_another(
    legacy: Database, empty_main: Database
) -> None:
    values = (
        *("(NULL, NULL, NULL)", "('', NULL, NULL)", "(NULL, '', NULL)", "('', '', NULL)", "('ab', 'c', NULL)"),
        *("('a', 'bc', NULL)", "('abc', '', NULL)", "('a', 'b ', NULL)", "(NULL, NULL, 0)", "(NULL, NULL, '-0')"),
    )
    found = []
    for database in (legacy, empty_main):
        database.execute("CREATE TABLE embeddings (id int PRIMARY KEY, a text, b varchar, c float8)")
        for number, row in enumerate(values):
            database.execute(f"INSERT INTO embeddings VALUES ({number}, {row[1:-1]})")
        with Session(endpoint(database, "legacy"), "test") as session:
            table = replace(describe(session, TableMapping()), peer_version=130000)
            query = sql.SQL("SELECT {} FROM {} ORDER BY id").format(hash_sql(table, ("a", "b", "c")), table.scanned)
            found.append([digest for (digest,) in session.rows(query)])
    assert found[0] == found[1]
    assert len(set(found[0])) == len(values)
    assert all(-(2**63) <= digest < 2**63 for digest in found[0])


@pytest.mark.parametrize(
    ("versions", "fact", "hint"),
    [
        ({"legacy": 110022}, "legacy ({legacy}) is PostgreSQL 11, a source must be 12 or newer", "pg_restore"),
        ({"main": 130010}, "main ({main}) is PostgreSQL 13, a target must be 14 or newer", "--to"),
    ],
)
def test_server_that_is_too_old_is_refused(
    versions: dict[str, int], fact: str, hint: str, move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, **versions)
    route = way(move)
    for work in (lambda: copied(move), lambda: checked(move)):
        with pytest.raises(RefusedError) as refused:
            work()
        assert refused.value.fact == fact.format(legacy=route.source.label, main=route.target.label)
        assert hint in refused.value.hint
    assert move.main.rows("SELECT * FROM pipeline.run") == []
