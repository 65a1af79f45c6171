"""The changed-since pass finds what a horizon cannot have seen, and key sums find deletes."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from psycopg2 import sql

from pipeline.check import changes, onesided
from pipeline.check.changes import changed_keys, key_sums, look, look_closely
from pipeline.check.differences import open_buckets
from pipeline.check.onesided import one_sided_keys
from pipeline.errors import StatementError
from pipeline.postgres.database import Session
from pipeline.postgres.facts import horizon_sql
from pipeline.postgres.tables import Table, describe
from pipeline.settings import TableMapping
from tests.data import fill_generated
from tests.preflights import endpoint
from tests.support import Database


@pytest.fixture
def side(legacy: Database) -> Iterator[tuple[Session, Table]]:
    fill_generated(legacy, 500, 8)
    with Session(endpoint(legacy, "legacy"), "test") as session:
        yield session, describe(session, TableMapping())


def now(session: Session) -> int:
    ((horizon,),) = session.rows(horizon_sql(session.version))
    return int(horizon)


def found(session: Session, table: Table, since: int) -> set[str]:
    return {key for batch in changed_keys(session, table, since) for (key,) in batch}


def counts(session: Session, table: Table, since: int) -> tuple[int | None, int | None]:
    seen = look(session, table, since)
    return seen.rows, seen.changed


def key(legacy: Database, number: int) -> str:
    return str(legacy.value("SELECT md5('row' || %s)::uuid::text", number))


def test_quiet_table_has_no_changed_keys(side: tuple[Session, Table]) -> None:
    assert found(*side, now(side[0])) == set()


def test_inserts_updates_and_key_changes_are_found_and_rollbacks_are_not(
    legacy: Database, side: tuple[Session, Table]
) -> None:
    since = now(side[0])
    legacy.execute("UPDATE public.embeddings SET content = 'x' WHERE id = %s", key(legacy, 1))
    legacy.execute("UPDATE public.embeddings SET id = %s WHERE id = %s", key(legacy, 9001), key(legacy, 2))
    legacy.execute("INSERT INTO public.embeddings (id) VALUES (%s)", key(legacy, 9002))
    with legacy.connect() as connection, connection.cursor() as cursor:
        cursor.execute("UPDATE public.embeddings SET content = 'undone'")
        connection.rollback()
    connection.close()
    assert found(*side, since) == {key(legacy, number) for number in (1, 9001, 9002)}


def test_transaction_that_was_open_at_the_horizon_is_found_after_its_commit(
    legacy: Database, side: tuple[Session, Table]
) -> None:
    connection = legacy.connect()
    with connection.cursor() as cursor:
        cursor.execute("UPDATE public.embeddings SET content = 'late' WHERE id = %s", (key(legacy, 3),))
        legacy.execute("UPDATE public.embeddings SET content = 'other' WHERE id = %s", key(legacy, 4))
        since = now(side[0])
        assert key(legacy, 3) not in found(*side, since)
        connection.commit()
    connection.close()
    # The other one lies before the horizon's newest transaction, but not before its oldest.
    assert found(*side, since) == {key(legacy, 3), key(legacy, 4)}


def test_savepoints_of_an_open_transaction_are_found(legacy: Database, side: tuple[Session, Table]) -> None:
    connection = legacy.connect()
    with connection.cursor() as cursor:
        cursor.execute("UPDATE public.embeddings SET content = 'a' WHERE id = %s", (key(legacy, 5),))
        cursor.execute("SAVEPOINT one")
        cursor.execute("UPDATE public.embeddings SET content = 'b' WHERE id = %s", (key(legacy, 6),))
        since = now(side[0])
        connection.commit()
    connection.close()
    assert found(*side, since) == {key(legacy, 5), key(legacy, 6)}


def test_frozen_rows_do_not_come_back(legacy: Database, side: tuple[Session, Table]) -> None:
    since = now(side[0])
    connection = legacy.connect()
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("VACUUM (FREEZE) public.embeddings")
    connection.close()
    assert found(*side, since) == set()


def test_horizon_of_another_history_is_refused(side: tuple[Session, Table]) -> None:
    for wrong in (now(side[0]) + 10**6, now(side[0]) - 2**31):
        with pytest.raises(StatementError, match="cannot be compared"):
            list(changed_keys(*side, wrong))


def test_key_sums_are_equal_on_both_versions_and_show_a_delete(
    legacy: Database, side: tuple[Session, Table], empty_main: Database
) -> None:
    empty_main.execute("CREATE SCHEMA ext; CREATE EXTENSION vector SCHEMA ext")
    empty_main.execute("CREATE TABLE public.embeddings (embedding ext.vector, id uuid PRIMARY KEY)")
    with empty_main.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO public.embeddings (id) VALUES (%s)", legacy.rows("SELECT id::text FROM public.embeddings")
        )
    with Session(endpoint(empty_main, "main"), "test") as session:
        mirrored = describe(session, TableMapping())
        here, there = key_sums(*side), key_sums(session, mirrored)
        assert here == there
        assert here.rows == 500
        empty_main.execute("DELETE FROM public.embeddings WHERE id = %s", key(legacy, 17))
        buckets = here.differing(key_sums(session, mirrored))
        assert len(buckets) == 1
        found = list(open_buckets(side, (session, mirrored), (), buckets))
        assert [(one.kind, one.key) for one in found] == [("missing", (key(legacy, 17),))]


@pytest.mark.parametrize("hashes", [1, 50_000])
@pytest.mark.parametrize("keys", [0, 50_000])
def test_keys_of_one_side_are_found_among_few_and_many(
    legacy: Database, side: tuple[Session, Table], monkeypatch: pytest.MonkeyPatch, keys: int, hashes: int
) -> None:
    monkeypatch.setattr(onesided, "KEYS_WITH_HASHES", keys)
    monkeypatch.setattr(onesided, "FETCHED_HASHES", hashes)
    # No key guards the other table, so that one can be there twice.
    legacy.execute("CREATE TABLE public.other AS SELECT * FROM public.embeddings")
    gone, new, doubled = key(legacy, 17), key(legacy, 9017), key(legacy, 18)
    legacy.execute("DELETE FROM public.other WHERE id = %s", gone)
    legacy.execute("INSERT INTO public.other SELECT %s::uuid, content FROM public.embeddings LIMIT 1", new)
    legacy.execute("INSERT INTO public.other SELECT * FROM public.embeddings WHERE id = %s", doubled)
    session, table = side
    with Session(endpoint(legacy, "legacy"), "test") as another:
        other = replace(describe(another, TableMapping(table="other")), key=table.key)
        sums = key_sums(session, table), key_sums(another, other)
        found = [one for batch in one_sided_keys(side, (another, other), sums) for (one,) in batch]
        assert set(found) == {gone, new, doubled}
        assert list(one_sided_keys(side, side, (sums[0], sums[0]))) == []


def test_key_columns_may_have_any_name(legacy: Database) -> None:
    for name in ("one", "other"):
        legacy.execute(f'CREATE TABLE public.{name} (h int, "key 0" text, embedding vector, PRIMARY KEY (h, "key 0"))')
        legacy.execute(f"INSERT INTO public.{name} VALUES (1, 'a'), (1, 'b'), (2, 'a')")
    legacy.execute("DELETE FROM public.other WHERE h = 1 AND \"key 0\" = 'b'")
    with Session(endpoint(legacy, "legacy"), "test") as session, Session(endpoint(legacy, "legacy"), "test") as another:
        one = session, describe(session, TableMapping(table="one", id="h"))
        other = another, describe(another, TableMapping(table="other", id="h"))
        sums = key_sums(*one), key_sums(*other)
        assert list(one_sided_keys(one, other, sums)) == [[("1", "b")]]


def test_one_scan_counts_rows_and_changes(legacy: Database, side: tuple[Session, Table]) -> None:
    since = now(side[0])
    assert counts(*side, since) == (500, 0)
    legacy.execute("UPDATE public.embeddings SET content = 'x' WHERE id = %s", key(legacy, 1))
    legacy.execute("DELETE FROM public.embeddings WHERE id = %s", key(legacy, 2))
    assert counts(*side, since) == (499, 1)


def test_large_table_is_looked_at_as_closely_without_its_keys(
    legacy: Database, side: tuple[Session, Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    with legacy.connect() as open_one, open_one.cursor() as cursor:
        # While it is open, what others have just written is recent.
        cursor.execute("SELECT pg_current_xact_id()")
        since = now(side[0])
        legacy.execute("UPDATE public.embeddings SET content = 'x' WHERE id = %s", key(legacy, 1))
        legacy.execute("DELETE FROM public.embeddings WHERE id = %s", key(legacy, 2))
        legacy.execute("INSERT INTO public.embeddings (id, content) VALUES (%s, 'ours')", key(legacy, 9002))
        for but, expected in ((None, {1, 9002}), (sql.SQL("r.content = 'ours'"), {1})):
            closely = look_closely(*side, since, but)
            assert {one for (one,) in closely.keys or ()} == {key(legacy, number) for number in expected}
            monkeypatch.setattr(changes, "COLLECTED_ROWS", -2)
            without = look_closely(*side, since, but)
            monkeypatch.undo()
            assert (without.look, without.sums, without.keys) == (closely.look, closely.sums, None)
            assert (without.look.rows, without.look.recent, without.look.changed) == (500, 2, len(expected))
            plain = look(*side, since, but)
            assert replace(plain, files=()) == without.look
            assert key_sums(*side) == without.sums
    open_one.close()
    legacy.execute("TRUNCATE public.embeddings")
    monkeypatch.setattr(changes, "COLLECTED_ROWS", -2)
    empty = look_closely(*side, since)
    assert (empty.look.rows, empty.look.changed, empty.look.changed_sum) == (0, 0, 0)
