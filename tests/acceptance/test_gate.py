"""What preflight refuses, copy refuses too: with exit code 4, the same words, and nothing written."""

from collections.abc import Callable
from contextlib import AbstractContextManager, closing

import pytest

from pipeline.check.gate import check_gate
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Session
from pipeline.postgres.tables import describe
from pipeline.settings import TableMapping
from tests.data import TABLE_SQL, fill, fill_generated, load
from tests.preflights import TRIGGER_FUNCTION, administrate, endpoint, findings, has, preflight, standby
from tests.support import Database, environment, pipeline


@pytest.fixture
def small_legacy(legacy: Database) -> Database:
    """Return a legacy with a hundred real rows."""
    fill(legacy, load("nomic768"))
    return legacy


@pytest.fixture
def env(small_legacy: Database, main: Database) -> dict[str, str]:
    return environment(legacy=small_legacy, main=main)


def check_untouched(main: Database) -> None:
    """Check that no copy began: no run, no row, and the index stands."""
    assert main.value("SELECT count(*) FROM pipeline.run") == 0
    assert main.value("SELECT count(*) FROM public.embeddings") == 0
    assert main.value("SELECT count(*) FROM pg_class WHERE relname = 'embeddings_embedding_hnsw'") == 1


def refused(env: dict[str, str], fact: str, hint: str) -> None:
    """Check that preflight and copy refuse for one and the same reason."""
    assert has(findings(preflight(env, code=4)), "refuse", fact, hint)
    done = pipeline("copy", env=env).expect(4)
    assert fact in done.err
    assert hint in done.err
    assert "Traceback" not in done.err


PLANTED = {
    "a trigger for every row": (
        f'{TRIGGER_FUNCTION}; CREATE TRIGGER "Loud one" BEFORE INSERT ON public.embeddings FOR EACH ROW'
        " EXECUTE FUNCTION public.loud()",
        "main's trigger Loud one would fire for every row that comes in",
        'on main: ALTER TABLE public.embeddings DISABLE TRIGGER "Loud one", and ENABLE it after the copy',
    ),
    "a rule": (
        'CREATE RULE "Silent one" AS ON INSERT TO public.embeddings DO INSTEAD NOTHING',
        "main's rule Silent one rewrites what is written to public.embeddings",
        'on main: ALTER TABLE public.embeddings DISABLE RULE "Silent one", and ENABLE it after the copy',
    ),
    "an unlogged table": (
        "ALTER TABLE public.embeddings SET UNLOGGED",
        "main's public.embeddings is UNLOGGED: a crash of its server empties it, whatever was copied",
        "on main: ALTER TABLE public.embeddings SET LOGGED",
    ),
    "an old pgvector": (
        "UPDATE pg_extension SET extversion = '0.4.4' WHERE extname = 'vector'",
        "main's pgvector 0.4.4 has no HNSW index; 0.5.0 brought it",
        "on main, as an administrator, once its packages are new: ALTER EXTENSION vector UPDATE",
    ),
    "a read-only database": (
        "ALTER DATABASE {} SET default_transaction_read_only = on",
        ") takes no writes: default_transaction_read_only is on for the role postgres",
        "find out who set it (\\drds in psql), and end its read-only mode",
    ),
}


@pytest.mark.parametrize("case", PLANTED)
def test_copy_refuses_what_preflight_refuses(case: str, main: Database, env: dict[str, str]) -> None:
    statement, fact, hint = PLANTED[case]
    main.execute(statement.replace("{}", f'"{main.name}"'))
    refused(env, fact, hint)
    check_untouched(main)


def test_everything_is_told_at_once(main: Database, env: dict[str, str]) -> None:
    for statement, _, _ in PLANTED.values():
        main.execute(statement.replace("{}", f'"{main.name}"'))
    done = pipeline("copy", env=env).expect(4)
    for _, fact, hint in PLANTED.values():
        assert fact in done.err
        assert hint in done.err
    check_untouched(main)


def test_standby_is_no_target(main: Database, env: dict[str, str]) -> None:
    with standby(main):
        refused(env, ") is a standby and takes no writes", "name the primary")
    check_untouched(main)


@pytest.mark.parametrize(("side", "least"), [("legacy", 2), ("main", 4)])
def test_no_room_for_the_sessions_of_a_copy(
    side: str, least: int, small_legacy: Database, main: Database, env: dict[str, str]
) -> None:
    database = main if side == "main" else small_legacy
    prefix = "DB" if side == "main" else "PGVECTOR"
    database.execute(
        f"CREATE ROLE gate_narrow LOGIN PASSWORD 'pf' CONNECTION LIMIT {least + 1};"
        "GRANT SELECT, INSERT, UPDATE, DELETE ON public.embeddings TO gate_narrow"
    )
    if side == "main":
        database.execute(
            "GRANT USAGE ON SCHEMA pipeline TO gate_narrow; GRANT ALL ON ALL TABLES IN SCHEMA pipeline TO gate_narrow;"
            "GRANT ALL ON ALL SEQUENCES IN SCHEMA pipeline TO gate_narrow"
        )
    try:
        role = database.as_role("gate_narrow", "pf")
        with closing(role.connect()), closing(role.connect()):
            refused(
                env | {f"{prefix}_USER": role.user, f"{prefix}_PASSWORD": role.password},
                f"{side}: a copy takes {least} sessions at least, and the role gate_narrow has {least - 1} free",
                f"on {side}, as an administrator: ALTER ROLE gate_narrow CONNECTION LIMIT 7",
            )
    finally:
        administrate(database, "DROP OWNED BY gate_narrow", "DROP ROLE gate_narrow")
    check_untouched(main)


def test_what_preflight_only_warns_of_stops_no_copy(main: Database, env: dict[str, str]) -> None:
    main.execute(
        f"{TRIGGER_FUNCTION}; CREATE TRIGGER each AFTER INSERT ON public.embeddings FOR EACH STATEMENT"
        " EXECUTE FUNCTION public.loud();"
        "CREATE UNIQUE INDEX once ON public.embeddings (id, content);"
        "ALTER TABLE public.embeddings ADD COLUMN later timestamptz DEFAULT now()"
    )
    assert any(severity == "warn" for severity, _, _ in findings(preflight(env)))
    pipeline("copy", env=env).expect(0)


def sides(crew: Crew, source: Database, target: Database) -> AbstractContextManager[tuple[Session, ...]]:
    return crew.together((endpoint(source, "legacy"), "test"), (endpoint(target, "main"), "test"))


def test_nothing_is_refused_between_two_plain_tables_on_any_server(
    new_database: Callable[..., Database], main: Database
) -> None:
    for release in ("16", "16.2", "18"):
        source = new_database(release)
        source.execute("CREATE EXTENSION vector; " + TABLE_SQL.format(768))
        with Crew() as crew, sides(crew, source, main) as (mine, theirs):
            here, there = (describe(session, TableMapping()) for session in (mine, theirs))
            assert check_gate(crew, mine, theirs, here, there, workers=4) == ()


def test_gate_reads_no_row(legacy: Database, main: Database) -> None:
    fill_generated(legacy, 500, 8)
    with Crew() as crew, sides(crew, legacy, main) as (mine, theirs):
        here, there = (describe(session, TableMapping()) for session in (mine, theirs))
        # Whoever reads a row waits for this lock, and gives up after five seconds.
        with legacy.cursor() as one, main.cursor() as other:
            for cursor in (one, other):
                cursor.execute("LOCK TABLE public.embeddings IN ACCESS EXCLUSIVE MODE")
            assert check_gate(crew, mine, theirs, here, there, workers=2) == ()
