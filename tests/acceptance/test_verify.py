"""Verify finds what was planted, names it, and says nothing where nothing is."""

from collections.abc import Callable, Iterator

import pytest

from tests.data import TABLE_SQL, fill, load
from tests.support import Database, Outcome, environment, pipeline, run

# One row of the set, fixed: the changes below are made to it on main.
PLANTED = {
    "one float changed": (
        "different",
        "UPDATE public.embeddings SET embedding = (SELECT array_agg(CASE WHEN place = 100 THEN x + 1e-6 ELSE x END"
        " ORDER BY place) FROM unnest(embedding::real[]) WITH ORDINALITY AS u(x, place))::vector WHERE id = %s",
    ),
    "zero became minus zero": (
        "different",
        "UPDATE public.embeddings SET embedding = (SELECT array_agg(CASE WHEN x = 0 THEN '-0'::real ELSE x END"
        " ORDER BY place) FROM unnest(embedding::real[]) WITH ORDINALITY AS u(x, place))::vector WHERE id = %s",
    ),
    "trailing blank": ("different", "UPDATE public.embeddings SET content = content || ' ' WHERE id = %s"),
    "metadata number": (
        "different",
        """UPDATE public.embeddings SET metadata = metadata || '{"price": 1.1}' WHERE id = %s""",
    ),
    "row missing": ("missing", "DELETE FROM public.embeddings WHERE id = %s"),
    "row extra": (
        "extra",
        "INSERT INTO public.embeddings (id, content, metadata, embedding)"
        " SELECT '00000000-0000-4000-8000-000000000001', content, metadata, embedding FROM public.embeddings"
        " WHERE id = %s",
    ),
    "null for empty text": ("different", "UPDATE public.embeddings SET content = NULL WHERE id = %s"),
}


@pytest.fixture
def verified(
    legacy: Database, new_database: Callable[..., Database], main_template: Callable[[int], str]
) -> Iterator[tuple[Database, dict[str, str], str]]:
    """Return a main that holds equal rows, the environment, and the key of a row with every oddity."""
    data = load("nomic768")
    fill(legacy, data, load("google768"))
    key = data.rows[7]["id"]
    legacy.execute(
        """UPDATE public.embeddings SET content = '', metadata = '{"price": 1.10}',"""
        " embedding = (SELECT array_agg(CASE WHEN place = 3 THEN 0 ELSE x END ORDER BY place)"
        " FROM unnest(embedding::real[]) WITH ORDINALITY AS u(x, place))::vector WHERE id = %s",
        key,
    )
    main = new_database("18", main_template(768))
    env = environment(legacy=legacy, main=main)
    pipeline("copy", env=env).expect(0)
    yield main, env, key


def test_every_planted_difference_is_found_with_its_key(verified: tuple[Database, dict[str, str], str]) -> None:
    main, env, key = verified
    rows = main.value("SELECT count(*) FROM public.embeddings")
    for name, (kind, statement) in PLANTED.items():
        main.execute("CREATE TABLE public.kept AS SELECT * FROM public.embeddings WHERE id = %s", key)
        before = main.value("SELECT vector_send(embedding)::text || content FROM public.embeddings WHERE id = %s", key)
        main.execute(statement, key)
        found = verify(env).expect(3).json
        checks = {check["name"]: check for check in found["checks"]}
        planted = key if kind != "extra" else "00000000-0000-4000-8000-000000000001"
        assert checks["digests"]["figures"]["keys"] == [{"kind": kind, "key": planted}], name
        assert checks["digests"]["figures"]["differing_rows"] == 1, name
        assert found["verdict"] == "fail", name
        plain = pipeline("verify", env=env).expect(3)
        assert planted in plain.out, name
        main.execute("DELETE FROM public.embeddings WHERE id IN (%s, %s)", key, planted)
        main.execute("INSERT INTO public.embeddings SELECT * FROM public.kept")
        main.execute("DROP TABLE public.kept")
        after = main.value("SELECT vector_send(embedding)::text || content FROM public.embeddings WHERE id = %s", key)
        assert before == after
        assert main.value("SELECT count(*) FROM public.embeddings") == rows
    verify(env).expect(0)


def verify(env: dict[str, str], *more: str) -> Outcome:
    return pipeline("verify", "--json", *more, env=env)


def test_first_20_of_many_differing_keys_are_listed_and_all_counted(
    verified: tuple[Database, dict[str, str], str],
) -> None:
    main, env, _ = verified
    main.execute("UPDATE public.embeddings SET content = content || '!'")
    figures = verify(env).expect(3).json["checks"][1]["figures"]
    assert figures["differing_rows"] == main.value("SELECT count(*) FROM public.embeddings")
    listed = [entry["key"] for entry in figures["keys"]]
    assert len(listed) == 20
    assert listed == [key for (key,) in main.rows("SELECT id::text FROM public.embeddings ORDER BY id LIMIT 20")]


def test_swapped_vectors_fail_the_digests_and_the_parity(verified: tuple[Database, dict[str, str], str]) -> None:
    main, env, _ = verified
    main.execute(
        "WITH numbered AS (SELECT id, embedding, row_number() OVER (ORDER BY id) AS n, count(*) OVER () AS total"
        " FROM public.embeddings)"
        " UPDATE public.embeddings AS a SET embedding = b.embedding FROM numbered AS me"
        " JOIN numbered AS b ON b.n = me.n % me.total + 1 WHERE a.id = me.id"
    )
    checks = {check["name"]: check for check in verify(env).expect(3).json["checks"]}
    assert (checks["counts"]["verdict"], checks["digests"]["verdict"], checks["parity"]["verdict"]) == (
        "pass",
        "fail",
        "fail",
    )
    assert len(checks["parity"]["figures"]["disagreements"]) == checks["parity"]["figures"]["queries"]


def test_null_and_zero_vectors_pass_and_are_no_neighbours(
    legacy: Database, new_database: Callable[..., Database], main_template: Callable[[int], str]
) -> None:
    data = load("nomic768")
    fill(legacy, data)
    zero = "[" + ",".join("0" * 768) + "]"
    legacy.execute("UPDATE public.embeddings SET embedding = NULL WHERE id = %s", data.rows[0]["id"])
    legacy.execute("UPDATE public.embeddings SET embedding = %s::vector WHERE id = %s", zero, data.rows[1]["id"])
    main = new_database("18", main_template(768))
    env = environment(legacy=legacy, main=main)
    pipeline("copy", env=env).expect(0)
    checks = {check["name"]: check for check in verify(env, "--queries", "200", "--k", "200").expect(0).json["checks"]}
    assert checks["counts"]["figures"]["target_embeddings"] == len(data.rows) - 1
    # Every vector but the two is asked for.
    assert checks["parity"]["figures"]["queries"] == len(data.rows) - 2


def test_empty_table_is_copied_and_verified(legacy: Database, main: Database) -> None:
    legacy.execute(TABLE_SQL.format(768))
    env = environment(legacy=legacy, main=main)
    pipeline("copy", env=env).expect(0)
    verify(env).expect(0)


def test_verdicts_are_kept_and_status_shows_the_last_of_each(verified: tuple[Database, dict[str, str], str]) -> None:
    main, env, key = verified
    verify(env).expect(0)
    main.execute("DELETE FROM public.embeddings WHERE id = %s", key)
    verify(env).expect(3)
    kept = main.rows("SELECT check_name, verdict FROM pipeline.verdict ORDER BY id")
    assert kept == [
        *(("counts", "pass"), ("digests", "pass"), ("parity", "pass")),
        *(("counts", "fail"), ("digests", "fail"), ("parity", kept[-1][1])),
    ]
    verdicts = pipeline("status", "--json", env=env).expect(0).json["verdicts"]
    assert [verdict["verdict"] for verdict in verdicts] == ["fail", "fail", kept[-1][1]]


def test_verify_writes_nothing_but_its_verdicts(
    legacy: Database, verified: tuple[Database, dict[str, str], str]
) -> None:
    main, env, _ = verified

    def state(database: Database) -> object:
        return database.rows("SELECT id, xmin::text, ctid::text FROM public.embeddings ORDER BY id")

    before = state(legacy), state(main), main.value("SELECT count(*) FROM pg_class")
    verify(env).expect(0)
    assert (state(legacy), state(main), main.value("SELECT count(*) FROM pg_class")) == before
    assert main.value("SELECT count(*) FROM pipeline.verdict") == 3


def test_old_legacy_and_extension_in_another_schema_agree(
    new_database: Callable[..., Database], empty_main: Database
) -> None:
    old = new_database("16.2")
    old.execute("CREATE SCHEMA ai; CREATE EXTENSION vector SCHEMA ai")
    old.execute("ALTER ROLE postgres SET search_path = public, ai")
    try:
        data = load("google768")
        fill(old, data)
    finally:
        old.execute("ALTER ROLE postgres RESET search_path")
    empty_main.execute("CREATE SCHEMA extensions")
    env = environment(legacy=old, main=empty_main)
    run("alembic", "upgrade", "head", env=env).expect(0)
    pipeline("copy", env=env).expect(0)
    verify(env).expect(0)
    schema = "SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE extname = %s"
    assert empty_main.value(schema, "vector") == "extensions"
