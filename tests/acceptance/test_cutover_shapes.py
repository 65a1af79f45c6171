"""The same cutover, there and back, on other servers, tables and files: nothing of it depends on the plain case."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.demo.servers import Server
from pipeline.errors import EXIT_OK, EXIT_REFUSED
from tests.acceptance.test_pooler import pgbouncer, pooled  # noqa: F401 - a fixture
from tests.cutovers import BACK, DIMENSIONS, Cutover, new_cutover, points_to
from tests.data import content
from tests.support import Database
from tests.switches import FAST, copies, refuses, standing, write

Servers = Callable[[str], Server]
New = Callable[..., Cutover]
ROWS_SQL = f"""INSERT INTO public.embeddings (id, content, metadata, embedding)
    SELECT md5(i::text)::uuid, 'row ' || i, jsonb_build_object('n', i), (SELECT array_agg(sin(i * 0.37 + d * d))
    FROM generate_series(1, {DIMENSIONS}) AS d)::{{schema}}.vector FROM generate_series(1, 200) AS i"""
TABLE_SQL = f"""CREATE TABLE public.embeddings (id uuid NOT NULL DEFAULT gen_random_uuid() PRIMARY KEY,
    content text, metadata jsonb, embedding {{schema}}.vector({DIMENSIONS}))"""


def statements() -> tuple[str, str, str]:
    """Return what makes and fills the plain table."""
    return "CREATE EXTENSION vector", TABLE_SQL.format(schema="public"), ROWS_SQL.format(schema="public")


@pytest.fixture
def new(
    servers: Servers, main_template: Callable[[int], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[New]:
    """Return a function that makes a bench whose legacy is made by statements; the pair of servers may be others."""
    with ExitStack() as stack:

        def make(*statements: str, get: Servers = servers) -> Cutover:
            def fill(legacy: Database) -> None:
                for statement in statements:
                    legacy.execute(statement)

            folder = tmp_path_factory.mktemp("shape")
            return stack.enter_context(new_cutover(get, "template1", main_template, folder, fill=fill))

        yield make


def there_and_back(bench: Cutover) -> None:
    """Switch, write on main, go back, and switch again: legacy is closed in between, and no row is lost."""
    before = bench.env_file.read_bytes()
    bench.pipeline(*FAST).expect(EXIT_OK)
    assert points_to(bench) == "main"
    for statement in (
        "INSERT INTO public.embeddings (content) VALUES ('x')",
        "UPDATE public.embeddings SET content = 'x'",
        "DELETE FROM public.embeddings",
        "TRUNCATE public.embeddings",
    ):
        assert "has moved to" in refuses(bench.legacy, statement)
    write(bench.main, "DELETE FROM public.embeddings WHERE id = md5('7')::uuid")
    write(bench.main, "UPDATE public.embeddings SET content = 'on main' WHERE id = md5('8')::uuid")
    write(bench.main, "INSERT INTO public.embeddings (content) SELECT 'on main' FROM generate_series(1, 20)")
    bench.pipeline(*BACK).expect(EXIT_OK)
    assert content(bench.legacy) == content(bench.main)
    assert bench.legacy.value("SELECT count(*) FROM public.embeddings WHERE content = 'on main'") == 21
    assert bench.env_file.read_bytes() == before
    write(bench.legacy)
    bench.pipeline(*FAST).expect(EXIT_OK)
    assert bench.main.value("SELECT count(*) FROM public.embeddings") == 220
    bench.pipeline("finalize", "--yes").expect(EXIT_OK)
    write(bench.legacy, "TRUNCATE public.embeddings")


def test_old_legacy_with_the_extension_in_another_schema(new: New, servers: Servers) -> None:
    extension = "CREATE SCHEMA extensions; CREATE EXTENSION vector SCHEMA extensions"
    table, rows = (text.format(schema="extensions") for text in (TABLE_SQL, ROWS_SQL))
    bench = new(extension, table, rows, get=lambda release: servers("16.2" if release == "16" else release))
    assert bench.legacy.value("SHOW server_version").startswith("16.2")
    legacy = bench.legacy
    legacy.execute(f"ALTER DATABASE {legacy.name} SET search_path = public, extensions")
    there_and_back(bench)


def test_partitioned_legacy(new: New) -> None:
    parts = "; ".join(
        f"CREATE TABLE public.part{number} PARTITION OF public.embeddings FOR VALUES WITH"
        f" (MODULUS 3, REMAINDER {number})"
        for number in range(3)
    )
    table = f"{TABLE_SQL.format(schema='public')} PARTITION BY HASH (id)"
    bench = new("CREATE EXTENSION vector", table, parts, ROWS_SQL.format(schema="public"))
    bench.pipeline(*FAST, "--until", "fence").expect(EXIT_OK)
    # A part cannot be written behind the table's back either.
    for statement in ("DELETE FROM public.part1", "TRUNCATE public.part2", "UPDATE public.part0 SET content = 'x'"):
        assert "has moved to" in refuses(bench.legacy, statement)
    bench.pipeline(*BACK).expect(EXIT_OK)
    said = bench.pipeline(*FAST).expect(EXIT_OK)
    assert "is a partitioned table: once main is open, a rollback could not bring its new writes back" in said.err
    assert content(bench.main) == content(bench.legacy)
    # Nothing is closed on a way that has no end.
    before = standing(bench)
    said = bench.pipeline(*BACK).expect(EXIT_REFUSED)
    assert "rows are copied into ordinary tables only" in said.err
    assert standing(bench) == before
    write(bench.main)


@pytest.fixture
def pools(pgbouncer: Path, servers: Servers) -> Iterator[dict[str, int]]:  # noqa: F811 - the fixture
    """Return the port of a pooler before each server; it outlives the databases that are made through it."""
    with ExitStack() as stack:
        yield {release: stack.enter_context(pooled(pgbouncer, servers(release))) for release in ("16", "18")}


def test_pooler_in_transaction_mode_before_both_servers(pools: dict[str, int], new: New, servers: Servers) -> None:
    bench = new(*statements(), get=lambda release: replace(servers(release), port=pools[release]))
    assert bench.main.server.port == pools["18"]
    there_and_back(bench)


def test_files_that_override_each_other_are_switched_together(new: New) -> None:
    bench = new(*statements())
    common = bench.env_file.read_text()
    own = f"# this machine\nexport PGVECTOR_DB={bench.legacy.name}\r\nUSE_MOCK_EMBEDDINGS='true' # here\nOTHER=1"
    bench.env_file.write_text(common.replace(f"PGVECTOR_DB={bench.legacy.name}", "PGVECTOR_DB=nowhere"))
    development = bench.folder / ".env.development"
    development.write_text(own, newline="")
    before = {path.name: path.read_bytes() for path in bench.folder.iterdir()}
    files = ("--env-file", ".env.development", "--env-file", ".env")
    plan = bench.pipeline("cutover", *files).expect(EXIT_OK)
    assert ".env.development, .env" in plan.out
    bench.pipeline(*FAST, *files).expect(EXIT_OK)
    assert (
        development.read_bytes()
        == own.replace(
            f"export PGVECTOR_DB={bench.legacy.name}\r\n",
            f"export PGVECTOR_DB={bench.main.name}\r\nexport LEGACY_DB={bench.legacy.name}\r\n",
        )
        .replace("'true'", "'false'")
        .encode()
    )
    text = bench.env_file.read_text()
    assert f"PGVECTOR_DB={bench.main.name}\nLEGACY_DB=nowhere\n" in text
    assert f"PGVECTOR_PORT={bench.main.server.port}\nLEGACY_PORT={bench.legacy.server.port}\n" in text
    assert "USE_MOCK_EMBEDDINGS=false  # for now" in text
    assert len(copies(bench.folder)) == 2
    # With one of them alone it is another cutover.
    bench.pipeline(*BACK, "--env-file", ".env").expect(EXIT_REFUSED)
    bench.pipeline(*BACK, *files).expect(EXIT_OK)
    assert {name: (bench.folder / name).read_bytes() for name in before} == before


def test_address_of_which_half_stands_in_the_environment_is_refused(new: New) -> None:
    bench = new(*statements())
    text = bench.env_file.read_text()
    lines = text.splitlines(keepends=True)
    bench.env_file.write_text("".join(line for line in lines if not line.startswith("PGVECTOR_HOST")))
    said = bench.pipeline(*FAST, PGVECTOR_HOST=bench.legacy.server.host).expect(EXIT_REFUSED)
    assert "the files alone would not say where the application searches: PGVECTOR_HOST is not set" in said.err
    write(bench.legacy, "DELETE FROM public.embeddings WHERE content = 'nothing'")
    # What says the same in both places is no more than worth a remark.
    bench.env_file.write_text(text)
    said = bench.pipeline(*FAST, "--until", "preflight", PGVECTOR_HOST=bench.legacy.server.host).expect(EXIT_OK)
    assert "PGVECTOR_HOST: set in this environment, which goes before any .env file" in said.err
