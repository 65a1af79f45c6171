"""What preflight says of the target's table: indexes, sequences, collations, the extension, and what a copy takes."""

import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest

from pipeline.check.attached import check_attached
from pipeline.check.obstacles import Obstacles, check_collations, check_extensions, check_obstacles, read_obstacles
from pipeline.postgres.database import Session
from pipeline.postgres.tables import Extension, describe
from pipeline.settings import TableMapping
from tests.data import TABLE_SQL, fill, fill_generated, load
from tests.preflights import endpoint, findings, has, preflight
from tests.support import Database, environment, pipeline


@pytest.fixture
def small_legacy(legacy: Database) -> Database:
    """Return a legacy with a hundred real rows."""
    fill(legacy, load("nomic768"))
    return legacy


@pytest.fixture
def env(small_legacy: Database, main: Database) -> dict[str, str]:
    return environment(legacy=small_legacy, main=main)


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


def test_free_space_is_told_where_the_server_is_on_this_machine(main: Database, env: dict[str, str]) -> None:
    free = shutil.disk_usage(main.server.data.parent).free
    outcome = preflight(env)
    assert outcome.json["preflight"]["estimate"]["free_bytes"] == pytest.approx(free, rel=0.2)
    assert "are free there" in pipeline("preflight", env=env).expect(0).out


def test_free_space_is_unknown_to_a_plain_role_and_for_another_host(main: Database, env: dict[str, str]) -> None:
    elsewhere = env | {"DB_HOST": "db.example.test", "PGHOSTADDR": "127.0.0.1"}
    assert preflight(elsewhere).json["preflight"]["estimate"]["free_bytes"] is None
    main.execute("CREATE ROLE pf_space LOGIN PASSWORD 'pf'")
    try:
        plain = env | {"DB_USER": "pf_space", "DB_PASSWORD": "pf"}
        assert preflight(plain, code=4).json["preflight"]["estimate"]["free_bytes"] is None
        assert "does not show from here" in pipeline("preflight", env=plain).expect(4).out
    finally:
        main.execute("DROP ROLE pf_space")


def test_disk_too_small_for_what_comes_is_warned_of(small_legacy: Database, env: dict[str, str]) -> None:
    # What the planner believes is all that is known without the census: a billion rows.
    small_legacy.execute("ANALYZE public.embeddings; UPDATE pg_class SET reltuples = 1e9 WHERE relname = 'embeddings'")
    found = findings(preflight(env, "--no-census"))
    assert has(found, "warn", "the table and its indexes want about 4,", "goes on when it is run again")


def test_unlogged_table_is_refused(main: Database, env: dict[str, str]) -> None:
    main.execute("ALTER TABLE public.embeddings SET UNLOGGED")
    found = findings(preflight(env, code=4))
    fact = "main's public.embeddings is UNLOGGED: a crash of its server empties it"
    assert has(found, "refuse", fact, "on main: ALTER TABLE public.embeddings SET LOGGED")


def test_replica_role_fires_other_triggers(main: Database) -> None:
    main.execute(
        "CREATE FUNCTION public.loud() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
        "CREATE TRIGGER usual BEFORE INSERT ON public.embeddings FOR EACH ROW EXECUTE FUNCTION public.loud();"
        "CREATE TRIGGER other BEFORE INSERT ON public.embeddings FOR EACH ROW EXECUTE FUNCTION public.loud();"
        "ALTER TABLE public.embeddings ENABLE REPLICA TRIGGER other;"
        f'ALTER DATABASE "{main.name}" SET session_replication_role = replica'
    )
    with Session(endpoint(main, "main"), "test") as session:
        table = describe(session, TableMapping())
        found = check_attached(table, read_obstacles(session, table).attached, "main")
    assert [one.fact for one in found] == ["main's trigger other would fire for every row that comes in"]


def test_unique_index_that_both_sides_have_is_no_danger(
    small_legacy: Database, main: Database, env: dict[str, str]
) -> None:
    for database in (small_legacy, main):
        database.execute("CREATE UNIQUE INDEX once ON public.embeddings (id, content)")
    main.execute("CREATE UNIQUE INDEX wider ON public.embeddings (content, metadata, id)")
    assert not any("allows no two rows" in fact for _, fact, _ in findings(preflight(env)))
    main.execute("CREATE UNIQUE INDEX inside ON public.embeddings (md5(content))")
    assert has(findings(preflight(env)), "warn", "main's index inside allows no two rows with the same values, and")


def test_sequence_that_the_role_may_not_set_is_warned_of(main: Database, env: dict[str, str]) -> None:
    main.execute('ALTER TABLE public.embeddings ADD COLUMN "No" int GENERATED BY DEFAULT AS IDENTITY')
    assert has(findings(preflight(env)), "note", "main's column No is filled by a sequence, which the copy sets")
    main.execute("CREATE ROLE pf_plain LOGIN PASSWORD 'pf'")
    try:
        found = findings(preflight(env | {"DB_USER": "pf_plain", "DB_PASSWORD": "pf"}, code=4))
    finally:
        main.execute("DROP ROLE pf_plain")
    assert has(found, "warn", "which the role pf_plain may not set", "GRANT ALL ON SEQUENCE ... TO pf_plain")


def test_pgvector_without_hnsw_is_refused(main: Database, env: dict[str, str]) -> None:
    main.execute("UPDATE pg_extension SET extversion = '0.4.4' WHERE extname = 'vector'")
    found = findings(preflight(env, code=4))
    assert has(found, "refuse", "main's pgvector 0.4.4 has no HNSW index; 0.5.0 brought it", "EXTENSION vector UPDATE")


def test_casts_and_columns_left_behind_are_noted(small_legacy: Database, env: dict[str, str]) -> None:
    small_legacy.execute(
        "ALTER TABLE public.embeddings ALTER COLUMN metadata TYPE json, ADD COLUMN more text, ALTER COLUMN content TYPE"
        " varchar"
    )
    found = findings(preflight(env, "--ignore-column", "more"))
    assert has(found, "note", "column metadata is json on legacy and jsonb on main: carried as the latter")
    assert has(found, "note", "column content is character varying on legacy and text on main")
    assert has(found, "note", "legacy's column more stays behind: --ignore-column")
