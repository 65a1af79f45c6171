"""What preflight says of servers and the ways to them: room, rights to write, TLS, poolers, who else is at work."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace

import pytest

from pipeline.check.conditions import check_conditions, read_conditions
from pipeline.check.footing import Room, check_footings, copy_need, read_footing
from pipeline.postgres.database import Session
from tests.acceptance.test_copy import wait_until
from tests.data import TABLE_SQL, fill, load
from tests.preflights import administrate, endpoint, findings, has, inspected, preflight, route, standby
from tests.support import Database, environment


@pytest.fixture
def small_legacy(legacy: Database) -> Database:
    """Return a legacy with a hundred real rows."""
    fill(legacy, load("nomic768"))
    return legacy


@pytest.fixture
def env(small_legacy: Database, main: Database) -> dict[str, str]:
    return environment(legacy=small_legacy, main=main)


@contextmanager
def narrow(database: Database, limit: int) -> Iterator[Database]:
    """Make a role that may have so many sessions, for as long as this lasts."""
    database.execute(f"CREATE ROLE pf_narrow LOGIN PASSWORD 'pf' CONNECTION LIMIT {limit}")
    try:
        yield database.as_role("pf_narrow", "pf")
    finally:
        database.execute("DROP OWNED BY pf_narrow; DROP ROLE pf_narrow")


def test_role_with_few_sessions_is_refused_and_one_with_some_is_warned(main: Database, env: dict[str, str]) -> None:
    for limit, workers, severity, fact, hint in (
        (6, 2, "warn", "main: a copy with 2 workers takes up to 7 sessions, and the role pf_narrow has 6 free", "1"),
        (6, 4, "warn", "main: a copy with 4 workers takes up to 11 sessions, and the role pf_narrow has 6 free", "1"),
        (3, 1, "refuse", "main: a copy takes 4 sessions at least, and the role pf_narrow has 3 free", ""),
    ):
        with narrow(main, limit) as role:
            variables = env | {"DB_USER": role.user, "DB_PASSWORD": role.password}
            found = findings(preflight(variables, "--workers", str(workers), code=4))
        typed = f"pipeline copy --workers {hint}" if hint else "ALTER ROLE pf_narrow CONNECTION LIMIT 5"
        assert has(found, severity, fact, typed), found
    with narrow(main, 6) as role:
        found = findings(preflight(variables, "--workers", "1", code=4))
    assert not any("sessions" in fact for _, fact, _ in found)


def test_both_ends_on_one_server_are_added_up(
    main: Database, new_database: Callable[..., Database], env: dict[str, str]
) -> None:
    beside = new_database("18")
    beside.execute("CREATE EXTENSION vector; " + TABLE_SQL.format(768))
    for limit, severity, fact in (
        (
            13,
            "warn",
            "legacy and main: a copy with 2 workers takes up to 14 sessions, and the role pf_narrow has 13 free",
        ),
        (5, "refuse", "legacy and main: a copy takes 6 sessions at least, and the role pf_narrow has 5 free for both"),
    ):
        with narrow(main, limit) as role:
            on_beside = Database(server=beside.server, name=beside.name, user=role.user, password=role.password)
            found = findings(preflight(environment(legacy=on_beside, main=role), code=4))
        assert has(found, severity, fact), found
    # Superusers: only the server's own limit binds, which is the same one for both.
    with Session(endpoint(beside, "legacy"), "test") as mine, Session(endpoint(main, "main"), "test") as theirs:
        sides = [replace(read_footing(one), rooms=(Room(limit="server", free=12),)) for one in (mine, theirs)]
    (warned,) = check_footings(sides[0], sides[1], need=copy_need(2))
    assert warned.hint == "pipeline copy --workers 1"
    assert check_footings(None, sides[1], need=copy_need(2)) == ()


def test_database_limit_binds_a_plain_role(main: Database) -> None:
    administrate(main, f'ALTER DATABASE "{main.name}" CONNECTION LIMIT 4')
    with narrow(main, -1) as role, main.cursor(), Session(endpoint(role, "main"), "test") as session:
        # A session that was closed just now may still count.
        wait_until(lambda: read_footing(session).room == Room(limit="database", free=3))
        conditions = read_conditions(session, 300)
    (refused,) = check_footings(None, conditions.footing, need=copy_need(1))
    assert refused.fact == "main: a copy takes 4 sessions at least, and the database has 3 free"
    assert refused.hint == f"on main, as an administrator: ALTER DATABASE {main.name} CONNECTION LIMIT 5"
    # The session of another role does not show what it does.
    assert conditions.hidden_sessions >= 1
    found = check_conditions(conditions)
    assert any(one.severity == "note" and one.hint.endswith("GRANT pg_read_all_stats TO pf_narrow") for one in found)


def test_full_server_is_refused(main: Database, env: dict[str, str]) -> None:
    with ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(closing(main.connect()))
        found = findings(preflight(env, "--workers", "4"))
        assert has(found, "warn", "main: a copy with 4 workers takes up to 11 sessions, and the server has 10 free")
        for _ in range(7):
            stack.enter_context(closing(main.connect()))
        found = findings(preflight(env, code=4))
    assert has(found, "refuse", "takes 4 sessions at least, and the server has 3 free", "raise its max_connections")


def test_standby_takes_no_writes_and_may_be_read(main: Database, env: dict[str, str]) -> None:
    with standby(main):
        found = findings(preflight(env, code=4))
        assert has(found, "refuse", "is a standby and takes no writes", "name the primary")
        backwards = findings(preflight(env, "--from", "main", "--to", "legacy", code=4))
    assert has(backwards, "note", "main is a standby; a read that its replay cancels is tried again")
    assert not has(backwards, "refuse", "standby")


def test_unverified_connection_to_another_host_is_warned_of(env: dict[str, str]) -> None:
    # The name is another host's, the address stays this one's.
    found = findings(preflight(env | {"DB_HOST": "db.example.test", "PGHOSTADDR": "127.0.0.1"}))
    assert has(found, "warn", "main (postgres@db.example.test:", "set DB_SSLROOTCERT")
    assert has(found, "warn", "is reached without TLS")
    assert not has(found, "warn", "legacy (")


def test_verified_connection_is_not_warned_of(main: Database) -> None:
    with Session(endpoint(main, "main"), "test") as session:
        conditions = read_conditions(session, 300)
    away = replace(conditions.footing.endpoint, host="db.example.test", sslmode="require")
    unverified = replace(
        conditions, footing=replace(conditions.footing, endpoint=away), tls="TLSv1.3", tls_at_server=True
    )
    (found,) = check_conditions(unverified)
    assert "by TLSv1.3, but nothing verified whose it is" in found.fact
    assert "set DB_SSLROOTCERT" in found.hint and "and DB_SSL to true" in found.hint
    verified = replace(unverified, footing=replace(conditions.footing, endpoint=replace(away, sslmode="verify-full")))
    assert check_conditions(verified) == ()
    (ended,) = check_conditions(replace(verified, tls_at_server=False))
    assert (ended.severity, "TLS ends before main's server" in ended.fact) == ("note", True)


@contextmanager
def pooler(port: int) -> Iterator[int]:
    """Relay connections, and announce another process id to the client than the server's, as poolers do."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        open_sockets: list[socket.socket] = []

        def pump(reader: socket.socket, writer: socket.socket, disguise: bool) -> None:
            with suppress(OSError):
                while data := reader.recv(65536):
                    if disguise and (place := data.find(b"K\x00\x00\x00\x0c")) >= 0:
                        data = data[: place + 5] + b"\x00\x01\x02\x03" + data[place + 9 :]
                        disguise = False
                    writer.sendall(data)
                writer.shutdown(socket.SHUT_WR)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    server = socket.create_connection(("127.0.0.1", port))
                    open_sockets.extend((client, server))
                    threading.Thread(target=pump, args=(client, server, False), daemon=True).start()
                    threading.Thread(target=pump, args=(server, client, True), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for one in open_sockets:
                one.close()


def test_pooler_between_is_warned_of(main: Database, env: dict[str, str]) -> None:
    with pooler(main.server.port) as port:
        outcome = preflight(env | {"DB_PORT": str(port)})
    assert has(findings(outcome), "warn", "main is reached through a pooler", "set DB_HOST and DB_PORT to the server")
    assert outcome.json["preflight"]["target"]["pooled"] is True
    assert outcome.json["preflight"]["source"]["pooled"] is False


@pytest.fixture
def preparing(small_legacy: Database) -> Iterator[Database]:
    """Return a legacy whose server lets transactions be prepared."""
    administrate(small_legacy, "ALTER SYSTEM SET max_prepared_transactions = 2")
    small_legacy.server.restart()
    yield small_legacy
    administrate(small_legacy, "ALTER SYSTEM RESET max_prepared_transactions")
    small_legacy.server.restart()


def test_long_and_prepared_transactions_are_named_with_age_and_program(preparing: Database, main: Database) -> None:
    administrate(preparing, "BEGIN; UPDATE public.embeddings SET content = content; PREPARE TRANSACTION 'kept'")
    try:
        with preparing.cursor() as sleeper:
            sleeper.execute("SET application_name = 'nightly'; SELECT 1")
            time.sleep(0.1)
            found = inspected(route(preparing, main), old_transaction_seconds=0.05).findings
    finally:
        administrate(preparing, "ROLLBACK PREPARED 'kept'")
    hints = {one.fact: one.hint for one in found if one.severity == "warn"}
    assert len(hints) == 2
    (open_one,) = (fact for fact in hints if "'nightly'" in fact)
    assert open_one == "legacy: a transaction of 'nightly' of the role postgres is open for 0 s"
    assert "pg_stat_activity on legacy" in hints.pop(open_one)
    ((fact, hint),) = hints.items()
    assert fact.startswith("legacy: 1 prepared transaction, the oldest for 0 s")
    assert "ROLLBACK PREPARED" in hint


def test_young_transactions_are_nobodys_business(small_legacy: Database, main: Database) -> None:
    with small_legacy.cursor() as cursor:
        cursor.execute("SELECT 1")
        assert [one for one in inspected(route(small_legacy, main)).findings if one.severity == "warn"] == []


def test_encoding_without_rules_is_warned_of(main: Database, legacy: Database) -> None:
    name = f"{legacy.name}_ascii"
    administrate(legacy, f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'")
    try:
        ascii_only = Database(server=legacy.server, name=name)
        ascii_only.execute("CREATE EXTENSION vector; " + TABLE_SQL.format(768))
        found = findings(preflight(environment(legacy=ascii_only, main=main)))
    finally:
        administrate(legacy, f"DROP DATABASE {name} WITH (FORCE)")
    assert has(found, "warn", "legacy's database has the encoding SQL_ASCII", "leave the census on")
    assert has(found, "warn", "legacy's table is empty")
