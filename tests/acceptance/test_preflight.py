"""Preflight finds what was planted, all of it at once, says what to type, and leaves both servers as they were."""

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest

from pipeline.check.conditions import Room, check_conditions, read_conditions
from pipeline.check.inspection import Inspected, inspect
from pipeline.check.obstacles import Obstacles, check_collations, check_extensions, check_obstacles, read_obstacles
from pipeline.endpoints import Endpoint, Secret
from pipeline.options import PreflightOptions
from pipeline.postgres.database import Session
from pipeline.postgres.tables import Extension, describe
from pipeline.settings import Route, TableMapping
from tests.data import TABLE_SQL, fill, fill_generated, load
from tests.support import Database, Outcome, environment, pipeline, start

TRIGGER_FUNCTION = "CREATE FUNCTION public.loud() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'"
INSERT = "INSERT INTO public.embeddings (id, content, metadata, embedding) VALUES (gen_random_uuid(), %s, %s, %s)"
ZERO = "[" + ",".join("0" * 768) + "]"
ONES = "[" + ",".join("1" * 768) + "]"


def findings(outcome: Outcome) -> list[tuple[str, str, str]]:
    return [(one["severity"], one["fact"], one["hint"]) for one in outcome.json["preflight"]["findings"]]


def preflight(env: dict[str, str], *more: str, code: int = 0) -> Outcome:
    return pipeline("preflight", "--json", *more, env=env).expect(code)


def has(found: list[tuple[str, str, str]], severity: str, fact: str, hint: str = "") -> bool:
    return any(one[0] == severity and fact in one[1] and hint in one[2] for one in found)


def endpoint(database: Database, name: str) -> Endpoint:
    return Endpoint(
        name=name,
        host=database.server.host,
        port=database.server.port,
        user=database.user,
        database=database.name,
        password=Secret(database.password),
    )


def route(legacy: Database, main: Database) -> Route:
    return Route(source=endpoint(legacy, "legacy"), target=endpoint(main, "main"), table=TableMapping(), dimensions=768)


@pytest.fixture
def small_legacy(legacy: Database) -> Database:
    """Return a legacy with a hundred real rows."""
    fill(legacy, load("nomic768"))
    return legacy


@pytest.fixture
def env(small_legacy: Database, main: Database) -> dict[str, str]:
    return environment(legacy=small_legacy, main=main)


def test_clear_route_ends_with_0_and_says_what_comes_next(env: dict[str, str], small_legacy: Database) -> None:
    rows = small_legacy.value("SELECT count(*) FROM public.embeddings")
    document = preflight(env).json["preflight"]
    assert document["verdict"] == "clear"
    assert {one["severity"] for one in document["findings"]} == {"note"}
    assert document["source"]["census"]["rows"] == rows
    assert document["source"]["census"]["dimensions"] == [[768, rows]]
    assert document["target"]["deferred_indexes"] == ["embeddings_embedding_hnsw"]
    assert document["estimate"]["rows"] == rows
    assert document["estimate"]["read_seconds"] > 0
    plain = pipeline("preflight", env=env).expect(0)
    assert plain.out.rstrip().endswith("next: pipeline copy --from legacy --to main")
    assert "PostgreSQL 16." in plain.out
    assert "PostgreSQL 18." in plain.out
    pipeline("copy", env=env).expect(0)
    again = findings(preflight(env))
    assert has(again, "note", "run 1 has filled main's public.embeddings", "pipeline verify")


# On main, all at once: the statement, and the severity, fact and hint that must come of it.
PLANTED_ON_MAIN = (
    (
        f'{TRIGGER_FUNCTION}; CREATE TRIGGER "Loud one" BEFORE INSERT ON public.embeddings FOR EACH ROW'
        " EXECUTE FUNCTION public.loud()",
        "refuse",
        "main's trigger Loud one would fire for every row",
        'on main: ALTER TABLE public.embeddings DISABLE TRIGGER "Loud one"',
    ),
    (
        "CREATE TRIGGER each AFTER INSERT ON public.embeddings FOR EACH STATEMENT EXECUTE FUNCTION public.loud()",
        "warn",
        "main's trigger each fires for every statement",
        "DISABLE TRIGGER each",
    ),
    (
        "CREATE TRIGGER late AFTER DELETE ON public.embeddings FOR EACH ROW EXECUTE FUNCTION public.loud()",
        "warn",
        "main's trigger late fires where the copy writes over a row",
        "DISABLE TRIGGER late",
    ),
    (
        "CREATE RULE silent AS ON UPDATE TO public.embeddings DO INSTEAD NOTHING",
        "refuse",
        "main's rule silent rewrites",
        "ALTER TABLE public.embeddings DISABLE RULE silent",
    ),
    (
        "CREATE TABLE public.people (id int PRIMARY KEY);"
        " ALTER TABLE public.embeddings ADD COLUMN person int REFERENCES public.people",
        "warn",
        "1 foreign key (embeddings_person_fkey)",
        "bring the rows that they point to to main first",
    ),
    (
        "ALTER TABLE public.embeddings ADD CONSTRAINT sensible CHECK (content <> 'x')",
        "note",
        "main checks every row by 1 constraint: sensible",
        "",
    ),
    (
        "ALTER TABLE public.embeddings ADD COLUMN length int GENERATED ALWAYS AS (length(content)) STORED",
        "note",
        "main makes the column length itself",
        "",
    ),
    (
        'ALTER TABLE public.embeddings ADD COLUMN "No" int GENERATED BY DEFAULT AS IDENTITY',
        "note",
        "main's column No is filled by a sequence",
        "",
    ),
    (
        "UPDATE pipeline.alembic_version SET version_num = '0002'",
        "refuse",
        "is at revision 0002",
        "alembic upgrade head",
    ),
    (
        "UPDATE pg_extension SET extversion = '0.7.4' WHERE extname = 'vector'",
        "warn",
        "CVE-2026-3172",
        "ALTER EXTENSION vector UPDATE",
    ),
    (
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'embeddings_embedding_hnsw'::regclass",
        "warn",
        "embeddings_embedding_hnsw is invalid",
        "REINDEX",
    ),
    ("SELECT", "note", "VACUUM", ""),
    ("ALTER DATABASE {} SET statement_timeout = '30s'", "note", "main sets statement_timeout = 30 s", ""),
    (
        "ALTER DATABASE {} SET idle_session_timeout = '20s'",
        "warn",
        "ends sessions of the role postgres that rest for 20 s",
        "idle_session_timeout = 0",
    ),
    ("ALTER DATABASE {} SET default_transaction_read_only = on", "refuse", "main takes no writes", "\\drds"),
)
# What the census of legacy has to say of rows added to it.
PLANTED_ON_LEGACY = (
    ((None, "{}", ONES), "note", "legacy: 1 row without content: LangChain drops them"),
    (("no metadata", None, ONES), "note", "legacy: 1 row without metadata"),
    (("no vector", "{}", None), "note", "legacy: 1 row without embedding: no search finds them"),
    (("zero", "{}", ZERO), "warn", "legacy: 1 vector of zero length"),
    ((None, None, None), "note", "legacy: 2 rows share their vector with another, in 1 group"),
)


def test_everything_that_was_planted_is_found_at_once(
    small_legacy: Database, main: Database, env: dict[str, str]
) -> None:
    for row, _, _ in PLANTED_ON_LEGACY[:-1]:
        small_legacy.execute(INSERT, *row)
    for statement, *_ in PLANTED_ON_MAIN:
        main.execute(statement.replace("{}", f'"{main.name}"'))
    outcome = preflight(env, code=4)
    found = findings(outcome)
    for _, severity, fact, hint in PLANTED_ON_MAIN:
        assert has(found, severity, fact, hint), (fact, found)
    for _, severity, fact in PLANTED_ON_LEGACY:
        assert has(found, severity, fact), (fact, found)
    assert outcome.json["preflight"]["verdict"] == "refused"
    # Refusals first, then warnings, then notes; nothing twice.
    order = ["refuse", "warn", "note"]
    assert [one[0] for one in found] == sorted((one[0] for one in found), key=order.index)
    assert len(set(found)) == len(found)
    plain = pipeline("preflight", env=env).expect(4)
    for _, fact, hint in found:
        assert fact in plain.out
        assert all(line in plain.out for line in hint.splitlines())
    counts = [sum(one[0] == severity for one in found) for severity in order]
    assert f"{counts[0]} refusals, {counts[1]} warnings, {counts[2]} notes." in plain.out


def test_disabled_trigger_and_rule_are_no_obstacle(main: Database, env: dict[str, str]) -> None:
    main.execute(PLANTED_ON_MAIN[0][0])
    main.execute(PLANTED_ON_MAIN[3][0])
    assert len([one for one in findings(preflight(env, code=4)) if one[0] == "refuse"]) == 2
    main.execute(
        'ALTER TABLE public.embeddings DISABLE TRIGGER "Loud one"; ALTER TABLE public.embeddings DISABLE RULE silent'
    )
    preflight(env)


def test_rows_that_no_run_brought_are_refused(main: Database, env: dict[str, str]) -> None:
    main.execute(INSERT, "mine", "{}", ONES)
    found = findings(preflight(env, code=4))
    assert has(found, "refuse", "main's public.embeddings is not empty", "on main: TRUNCATE public.embeddings")


def test_unreachable_legacy_is_a_finding_and_main_is_looked_at_all_the_same(
    main: Database, env: dict[str, str]
) -> None:
    main.execute(PLANTED_ON_MAIN[0][0])
    with closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        outcome = preflight(env | {"PGVECTOR_PORT": str(unused.getsockname()[1])}, code=4)
    found = findings(outcome)
    assert has(found, "refuse", "nothing answers at 127.0.0.1", "check PGVECTOR_HOST")
    assert has(found, "refuse", "main's trigger Loud one")
    assert has(found, "note", "the rows of legacy were not looked at")
    assert outcome.json["preflight"]["source"]["server"] is None
    assert outcome.json["preflight"]["target"]["server"].startswith("18.")


def test_missing_table_is_a_finding_beside_the_other_side(main: Database, legacy: Database) -> None:
    main.execute(PLANTED_ON_MAIN[0][0])
    found = findings(preflight(environment(legacy=legacy, main=main), code=4))
    assert has(found, "refuse", "has no table public.embeddings", "check PGVECTOR_TABLE")
    assert has(found, "refuse", "main's trigger Loud one")


def test_shape_and_rights_are_judged_with_the_rest(small_legacy: Database, main: Database, env: dict[str, str]) -> None:
    small_legacy.execute("ALTER TABLE public.embeddings ADD COLUMN source text")
    small_legacy.execute("DROP ROLE IF EXISTS pf_nobody")
    small_legacy.execute("CREATE ROLE pf_nobody LOGIN PASSWORD 'pf'")
    try:
        as_nobody = env | {"PGVECTOR_USER": "pf_nobody", "PGVECTOR_PASSWORD": "pf"}
        found = findings(preflight(as_nobody, code=4))
    finally:
        small_legacy.execute("DROP ROLE pf_nobody")
    assert has(found, "refuse", "main has no column source", "ADD COLUMN source text")
    assert has(found, "note", "were not searched for what cannot be carried", "run it again")
    assert has(found, "refuse", "the role pf_nobody may not SELECT", "GRANT SELECT ON public.embeddings TO pf_nobody")
    assert has(found, "note", "the rows of legacy were not looked at")


def test_rows_that_cannot_be_carried_are_found_by_key(
    small_legacy: Database, main: Database, env: dict[str, str]
) -> None:
    small_legacy.execute("ALTER TABLE public.embeddings ALTER COLUMN metadata TYPE json")
    key = small_legacy.value(
        """UPDATE public.embeddings SET metadata = '{"a": "\\u0000"}'"""
        " WHERE id = (SELECT id FROM public.embeddings LIMIT 1) RETURNING id::text"
    )
    small_legacy.execute("ALTER TABLE public.embeddings ALTER COLUMN embedding TYPE vector")
    small_legacy.execute("UPDATE public.embeddings SET embedding = '[1,2]' WHERE id = %s", key)
    outcome = preflight(env, code=4)
    assert has(findings(outcome), "refuse", "json in column metadata that jsonb does not take", "correct these rows")
    assert any(key in fact for _, fact, _ in findings(outcome))
    assert has(findings(outcome), "refuse", "2 dimensions: 1 row", "EMBEDDING_DIMENSIONS")
    assert outcome.json["preflight"]["source"]["census"]["dimensions"][1] == [2, 1]
    # What the census reads is not judged without it.
    assert [one for one in findings(preflight(env, "--no-census")) if one[0] == "refuse"] == []


def test_same_table_under_two_names_is_refused(main: Database) -> None:
    found = findings(preflight(environment(legacy=main, main=main), code=4))
    assert has(found, "refuse", "are the same table of the same server")


def test_role_with_few_sessions_is_refused_and_one_with_some_is_warned(main: Database, env: dict[str, str]) -> None:
    main.execute("DROP ROLE IF EXISTS pf_narrow")
    main.execute("CREATE ROLE pf_narrow LOGIN PASSWORD 'pf' CONNECTION LIMIT 6")
    narrow = env | {"DB_USER": "pf_narrow", "DB_PASSWORD": "pf"}
    try:
        found = findings(preflight(narrow, code=4))
        assert has(
            found,
            "warn",
            "main: a copy with 2 workers takes up to 7 sessions, and the role pf_narrow has 6 free",
            "pipeline copy --workers 1",
        )
        found = findings(preflight(narrow, "--workers", "4", code=4))
        assert has(found, "refuse", "up to 11 sessions, and the role pf_narrow has 6 free", "--workers 1")
        found = findings(preflight(narrow, "--workers", "1", code=4))
        assert not any("sessions" in fact for _, fact, _ in found)
    finally:
        main.execute("DROP ROLE pf_narrow")


@pytest.mark.parametrize("limit", ["server", "database"])
def test_every_limit_of_sessions_counts(limit: str, main: Database) -> None:
    with Session(endpoint(main, "main"), "test") as session:
        conditions = read_conditions(session, 300)
    assert conditions.room.limit == "server"
    assert 0 < conditions.room.free <= 60
    tight = replace(conditions, rooms=(Room(limit=limit, free=1), Room(limit="role", free=9)))
    (found,) = check_conditions(tight, workers=2, writes=True)
    assert (found.severity, f"the {limit} has 1 free" in found.fact) == ("refuse", True)
    assert found.hint == "end sessions on main, or raise the limit"


def test_database_limit_binds_a_plain_role(main: Database) -> None:
    main.execute("DROP ROLE IF EXISTS pf_plain")
    main.execute("CREATE ROLE pf_plain LOGIN PASSWORD 'pf'")
    main.execute(f'ALTER DATABASE "{main.name}" CONNECTION LIMIT 5')
    try:
        with main.cursor(), Session(endpoint(main.as_role("pf_plain", "pf"), "main"), "test") as session:
            conditions = read_conditions(session, 300)
    finally:
        main.execute("DROP ROLE pf_plain")
    assert conditions.room == Room(limit="database", free=4)
    # The session of another role does not show what it does.
    assert conditions.hidden_sessions >= 1
    found = check_conditions(conditions, workers=1, writes=True)
    assert any(one.severity == "note" and "GRANT pg_read_all_stats" in one.hint for one in found)


def test_standby_takes_no_writes_and_may_be_read(main: Database) -> None:
    with Session(endpoint(main, "main"), "test") as session:
        standby = replace(read_conditions(session, 300), in_recovery=True)
    (refused,) = check_conditions(standby, workers=1, writes=True)
    (noted,) = check_conditions(standby, workers=1, writes=False)
    assert (refused.severity, refused.hint) == ("refuse", "name the primary")
    assert (noted.severity, "is a standby" in noted.fact) == ("note", True)


def test_unverified_connection_to_another_host_is_warned_of(env: dict[str, str]) -> None:
    # The name is another host's, the address stays this one's.
    found = findings(preflight(env | {"DB_HOST": "db.example.test", "PGHOSTADDR": "127.0.0.1"}))
    assert has(found, "warn", "main (postgres@db.example.test:", "set DB_SSLROOTCERT")
    assert has(found, "warn", "is reached without TLS")
    assert not has(found, "warn", "legacy (")


def test_verified_connection_is_not_warned_of(main: Database) -> None:
    with Session(endpoint(main, "main"), "test") as session:
        conditions = read_conditions(session, 300)
    away = replace(conditions.endpoint, host="db.example.test", sslmode="require")
    unverified = replace(conditions, endpoint=away, tls="TLSv1.3", tls_at_server=True)
    (found,) = check_conditions(unverified, workers=1, writes=True)
    assert "by TLSv1.3, but nothing verified whose it is" in found.fact
    verified = replace(unverified, endpoint=replace(away, sslmode="verify-full"))
    assert check_conditions(verified, workers=1, writes=True) == ()
    (ended,) = check_conditions(replace(verified, tls_at_server=False), workers=1, writes=True)
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


def inspected(legacy: Database, main: Database, **options: Any) -> Inspected:
    (found,) = (
        event for event in inspect(route(legacy, main), PreflightOptions(**options)) if isinstance(event, Inspected)
    )
    return found


@pytest.fixture
def preparing(small_legacy: Database) -> Iterator[Database]:
    """Return a legacy whose server lets transactions be prepared."""
    _administrate(small_legacy, "ALTER SYSTEM SET max_prepared_transactions = 2")
    small_legacy.server.restart()
    yield small_legacy
    _administrate(small_legacy, "ALTER SYSTEM RESET max_prepared_transactions")
    small_legacy.server.restart()


def _administrate(database: Database, *statements: str) -> None:
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        for statement in statements:
            cursor.execute(statement)


def test_long_and_prepared_transactions_are_named_with_age_and_program(preparing: Database, main: Database) -> None:
    _administrate(preparing, "BEGIN; UPDATE public.embeddings SET content = content; PREPARE TRANSACTION 'kept'")
    try:
        with preparing.cursor() as sleeper:
            sleeper.execute("SET application_name = 'nightly'; SELECT 1")
            time.sleep(0.1)
            found = inspected(preparing, main, old_transaction_seconds=0.05).findings
    finally:
        _administrate(preparing, "ROLLBACK PREPARED 'kept'")
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
        assert [one for one in inspected(small_legacy, main).findings if one.severity == "warn"] == []


def test_encoding_without_rules_is_warned_of(main: Database, legacy: Database) -> None:
    name = f"{legacy.name}_ascii"
    _administrate(legacy, f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'")
    try:
        ascii_only = Database(server=legacy.server, name=name)
        ascii_only.execute("CREATE EXTENSION vector; " + TABLE_SQL.format(768))
        found = findings(preflight(environment(legacy=ascii_only, main=main)))
    finally:
        _administrate(legacy, f"DROP DATABASE {name} WITH (FORCE)")
    assert has(found, "warn", "legacy's database has the encoding SQL_ASCII", "leave the census on")
    assert has(found, "warn", "legacy's table is empty")


STATE = (
    "SELECT 'class', oid::text, xmin::text, relname, relfilenode::text FROM pg_class",
    "SELECT 'attribute', attrelid::text, xmin::text, attname, attnum::text FROM pg_attribute",
    "SELECT 'index', indexrelid::text, xmin::text, '', '' FROM pg_index",
    "SELECT 'depend', objid::text, xmin::text, '', refobjid::text FROM pg_depend",
    "SELECT 'database', oid::text, xmin::text, '', '' FROM pg_database WHERE datname = current_database()",
    "SELECT 'row', id::text, xmin::text, ctid::text, xmax::text FROM public.embeddings",
)
LEDGER = "SELECT 'ledger', id::text, xmin::text, ctid::text, lease_generation::text FROM pipeline.run"


def test_both_servers_are_exactly_as_before(small_legacy: Database, main: Database, env: dict[str, str]) -> None:
    pipeline("copy", env=env).expect(0)

    def state() -> list[Any]:
        return [
            sorted(small_legacy.rows(" UNION ALL ".join(STATE))),
            sorted(main.rows(" UNION ALL ".join((*STATE, LEDGER)))),
            main.rows(
                "SELECT id, xmin::text FROM pipeline.verdict UNION ALL SELECT run_id, xmin::text FROM pipeline.slice"
            ),
        ]

    before = state()
    preflight(env)
    pipeline("preflight", "--no-census", env=env).expect(0)
    assert state() == before


def test_reader_with_select_alone_can_look(small_legacy: Database, env: dict[str, str]) -> None:
    small_legacy.execute("DROP ROLE IF EXISTS pf_reader")
    small_legacy.execute("CREATE ROLE pf_reader LOGIN PASSWORD 'pf'; GRANT SELECT ON public.embeddings TO pf_reader")
    try:
        document = preflight(env | {"PGVECTOR_USER": "pf_reader", "PGVECTOR_PASSWORD": "pf"}).json["preflight"]
    finally:
        small_legacy.execute("DROP OWNED BY pf_reader; DROP ROLE pf_reader")
    assert document["verdict"] == "clear"
    assert document["source"]["census"]["rows"] > 0
    assert document["estimate"]["sample_bytes"] > 0


def test_without_the_census_no_row_is_judged_and_it_says_so(
    small_legacy: Database, main: Database, env: dict[str, str]
) -> None:
    small_legacy.execute(INSERT, "zero", "{}", ZERO)
    # What the planner believes is all that is known then: ten million rows.
    small_legacy.execute("ANALYZE public.embeddings; UPDATE pg_class SET reltuples = 1e7 WHERE relname = 'embeddings'")
    outcome = preflight(env, "--no-census")
    found = findings(outcome)
    assert has(found, "note", "the rows of legacy were not looked at (--no-census)")
    assert not has(found, "warn", "zero length")
    assert outcome.json["preflight"]["source"]["census"] is None
    assert has(found, "warn", "the HNSW graph of 10,000,000 rows wants 40,720 MB", "pipeline copy --index-memory 38834")
    assert "dimensions" not in pipeline("preflight", "--no-census", env=env).expect(0).out.split("note")[0]


def test_estimate_of_the_index_and_the_wal_holds(main: Database, legacy: Database) -> None:
    fill_generated(legacy, 1500)
    env = environment(legacy=legacy, main=main)
    estimate = preflight(env).json["preflight"]["estimate"]
    before = main.value("SELECT pg_current_wal_lsn()")
    pipeline("copy", env=env).expect(0)
    logged = main.value("SELECT pg_current_wal_lsn() - %s::pg_lsn", before)
    assert main.value("SELECT pg_relation_size('embeddings_embedding_hnsw')") == pytest.approx(
        estimate["index_bytes"], rel=0.1
    )
    assert main.value("SELECT pg_total_relation_size('embeddings')") == pytest.approx(estimate["disk_bytes"], rel=0.1)
    assert float(logged) == pytest.approx(estimate["wal_bytes"], rel=0.25)


def test_ctrl_c_ends_it_at_once_with_130(small_legacy: Database, env: dict[str, str]) -> None:
    with small_legacy.cursor() as blocker:
        blocker.execute("LOCK TABLE public.embeddings IN ACCESS EXCLUSIVE MODE")
        process = start("preflight", env=env)
        deadline = time.monotonic() + 10
        while not small_legacy.value("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert time.monotonic() - began < 2.5
    assert "Traceback" not in err
    assert out == ""


def test_locked_table_is_a_finding_after_five_seconds(small_legacy: Database, env: dict[str, str]) -> None:
    with small_legacy.cursor() as blocker:
        blocker.execute("LOCK TABLE public.embeddings IN ACCESS EXCLUSIVE MODE")
        found = findings(preflight(env, code=4))
    assert has(found, "refuse", "a lock was waited for in vain")


def obstacles_of(database: Database, name: str) -> Obstacles:
    with Session(endpoint(database, name), "test") as session:
        return read_obstacles(session, describe(session, TableMapping()))


def test_collations_of_text_keys_are_compared(small_legacy: Database, main: Database) -> None:
    for database, collation in ((small_legacy, '"C.utf8"'), (main, '"ucs_basic"')):
        database.execute(
            f"ALTER TABLE public.embeddings ALTER COLUMN id DROP DEFAULT, ALTER COLUMN id TYPE text COLLATE {collation}"
        )
    mine, theirs = obstacles_of(small_legacy, "legacy"), obstacles_of(main, "main")
    (found,) = check_collations(mine, theirs, ("legacy", "main"))
    assert found.fact == "the key id sorts by C.utf8 on legacy, and by ucs_basic on main"
    assert check_collations(mine, mine, ("legacy", "main")) == ()
    with Session(endpoint(main, "main"), "test") as session:
        table = describe(session, TableMapping())
    warned = check_obstacles(table, replace(theirs, loose_collations=("id",)), "main")
    assert any(one.severity == "warn" and "takes different texts for equal" in one.fact for one in warned)


def test_index_that_cannot_be_set_aside_is_warned_of(main: Database) -> None:
    main.execute("ALTER TABLE public.embeddings CLUSTER ON embeddings_pkey")
    with Session(endpoint(main, "main"), "test") as session:
        table = replace(describe(session, TableMapping()), owned=False)
        found = check_obstacles(table, read_obstacles(session, table), "main")
    (warned,) = (one for one in found if one.severity == "warn")
    assert "HNSW index embeddings_embedding_hnsw cannot be set aside" in warned.fact
    assert warned.hint == "copy as the owner of the table"


@pytest.mark.parametrize(
    ("version", "severities"),
    [
        ((0, 4, 4), ["refuse"]),
        ((0, 5, 1), ["note"]),
        ((0, 6, 0), ["warn", "note"]),
        ((0, 8, 1), ["warn", "note"]),
        ((0, 8, 2), ["note"]),
        ((0, 8, 3), ["note"]),
        ((0, 8, 4), []),
    ],
)
def test_known_dangers_of_pgvector_are_told_by_its_version(version: tuple[int, ...], severities: list[str]) -> None:
    extension = Extension(schema="public", version=version)
    assert [one.severity for one in check_extensions(extension, extension, ("legacy", "main"))] == severities


def test_other_schema_of_the_extension_is_noted() -> None:
    sides = [Extension(schema=schema, version=(0, 8, 5)) for schema in ("public", "extensions")]
    (found,) = check_extensions(sides[0], sides[1], ("legacy", "main"))
    assert (found.severity, "in schema public on legacy, and in extensions on main" in found.fact) == ("note", True)
    assert "search_path" in found.hint


def test_preflight_on_an_old_server_in_another_schema(new_database: Callable[..., Database], main: Database) -> None:
    old = new_database("16.2")
    old.execute("CREATE SCHEMA ai; CREATE EXTENSION vector SCHEMA ai")
    old.execute("SET search_path = ai, public; " + TABLE_SQL.format(768))
    document = preflight(environment(legacy=old, main=main)).json["preflight"]
    assert (document["source"]["pgvector"], document["source"]["pgvector_schema"]) == ("0.6.2", "ai")
    assert any("in schema ai on legacy" in one["fact"] for one in document["findings"])
