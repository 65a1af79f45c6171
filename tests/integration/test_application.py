"""The application after the move: by its role's search_path and rights it finds the table, and may do what it does."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psycopg2.errors
import pytest

from pipeline.check.application import check_application
from pipeline.check.ladder import Ladder
from pipeline.check.pair import read_pair
from pipeline.events import CheckDone
from pipeline.options import VerifyOptions
from pipeline.postgres.crew import Crew
from pipeline.settings import Route, TableMapping
from tests.data import TABLE_SQL, fill, load
from tests.preflights import administrate, endpoint, route
from tests.support import Database, environment, pipeline

ALL = "GRANT ALL ON SCHEMA public TO {role}; GRANT SELECT, INSERT, UPDATE, DELETE ON public.embeddings TO {role}"
GRANTS = f"{ALL}; ALTER TABLE public.embeddings OWNER TO {{role}}"


def application(way: Route, role: str | None = None) -> CheckDone:
    with Crew() as crew, crew.session(way.source, "test") as source, crew.session(way.target, "test") as target:
        pair = read_pair(crew, source, target, way, to_write=False)
        return check_application(crew, Ladder(route=way, pair=pair, options=VerifyOptions(app_role=role)))


# Said of every table with an HNSW index; it has a test of its own.
STANDING = ("note", "TypeORM, where the table is an entity with synchronize: true")


def found(done: CheckDone) -> list[tuple[str, str, str]]:
    findings: Any = done.figures["findings"]
    return [
        (one["severity"], one["fact"], one["hint"])
        for one in findings
        if one["severity"] != STANDING[0] or STANDING[1] not in one["fact"]
    ]


def facts(done: CheckDone, severity: str) -> list[str]:
    return [fact for kind, fact, _ in found(done) if kind == severity]


@pytest.fixture
def small_legacy(legacy: Database) -> Database:
    """Return a legacy with a hundred real rows, on whose server uuids come from where main's come from."""
    fill(legacy, load("nomic768"))
    return legacy


@pytest.fixture
def way(small_legacy: Database, main: Database) -> Route:
    return route(small_legacy, main)


@pytest.fixture
def new_role(main: Database) -> Iterator[Callable[..., Database]]:
    """Return a function that makes a role on main's server, with grants; all are dropped after the test."""
    made: list[str] = []

    def make(grants: str = GRANTS, more: str = "LOGIN PASSWORD 'app'") -> Database:
        role = f"app_{main.name}_{len(made)}"
        main.execute(f"CREATE ROLE {role} {more}")
        made.append(role)
        main.execute(grants.format(role=role) or "SELECT")
        return main.as_role(role, "app")

    yield make
    for role in made:
        main.execute(f"REASSIGN OWNED BY {role} TO postgres; DROP OWNED BY {role}; DROP ROLE {role}")


def moved_to(main: Database, small_legacy: Database, schema: str, table: str, role: str) -> Route:
    """Return the route to main's table under another name, which belongs to the role."""
    for database, owner in ((small_legacy, "postgres"), (main, role)):
        database.execute(
            f'CREATE SCHEMA IF NOT EXISTS "{schema}"; ALTER TABLE public.embeddings RENAME TO "{table}";'
            + (f'ALTER TABLE public."{table}" SET SCHEMA "{schema}";' if schema != "public" else "")
            + f'GRANT ALL ON SCHEMA "{schema}" TO {owner}; ALTER TABLE "{schema}"."{table}" OWNER TO {owner}'
        )
    return replace(route(small_legacy, main), table=TableMapping(schema=schema, table=table))


# ---------------------------------------------------------------- where all is well


def test_default_layout_passes_as_the_connecting_role(small_legacy: Database, main: Database, way: Route) -> None:
    pipeline("copy", env=environment(legacy=small_legacy, main=main)).expect(0)
    done = application(way)
    assert (done.name, done.verdict, found(done)) == ("application", "pass", [])
    summary = "the role postgres finds public.embeddings as embeddings, and may read and write it"
    assert done.summary == f"{summary} (1 note)"
    assert (done.figures["role"], done.figures["resolves_to"]) == ("postgres", "public.embeddings")
    assert done.figures["search_path"] == ["$user", "public"]


def test_indexes_that_typeorm_would_drop_are_noted(way: Route, main: Database) -> None:
    main.execute("CREATE INDEX by_metadata ON embeddings USING gin (metadata); CREATE INDEX ON embeddings (content)")
    findings: Any = application(way).figures["findings"]
    (note,) = findings
    assert note["severity"] == "note"
    assert note["fact"].endswith("drops the indexes by_metadata, embeddings_embedding_hnsw at its next start")
    assert "@Index(name, { synchronize: false })" in note["hint"]
    main.execute("DROP INDEX by_metadata, embeddings_embedding_hnsw")
    assert application(way).figures["findings"] == []


def test_owner_passes_as_the_application(way: Route, new_role: Callable[..., Database]) -> None:
    role = new_role().user
    done = application(way, role)
    assert (done.verdict, found(done), done.figures["role"]) == ("pass", [], role)


def test_nothing_is_written(way: Route, main: Database, new_role: Callable[..., Database]) -> None:
    role = new_role().user
    state = (
        "SELECT (SELECT md5(string_agg(c::text, '' ORDER BY c.oid)) FROM pg_class c WHERE relkind <> 't'),"
        " (SELECT md5(string_agg(r::text, '' ORDER BY r.oid)) FROM pg_authid r),"
        " (SELECT md5(string_agg(n::text, '' ORDER BY n.oid)) FROM pg_namespace n),"
        " (SELECT count(*) FROM pg_db_role_setting)"
    )
    before = main.rows(state)
    application(way, role)
    application(way, "nobody")
    assert main.rows(state) == before


# ---------------------------------------------------------------- the name


def test_table_of_that_name_before_it_on_the_path_shadows_it(
    way: Route, main: Database, new_role: Callable[..., Database]
) -> None:
    app = new_role()
    main.execute(f"CREATE SCHEMA {app.user} AUTHORIZATION {app.user}; CREATE TABLE {app.user}.embeddings (id int)")
    done = application(way, app.user)
    assert (done.verdict, done.figures["resolves_to"]) == ("fail", f"{app.user}.embeddings")
    ((severity, fact, hint),) = found(done)
    assert severity == "fail"
    assert f"the bare name embeddings leads to {app.user}.embeddings for the role {app.user}" in fact
    assert done.summary == f"{fact}; {hint}"
    # The line of the hint repairs it.
    main.execute(hint.split("on main: ")[1])
    assert application(way, app.user).verdict == "pass"
    assert app.value("SELECT 'embeddings'::regclass = 'public.embeddings'::regclass")


def test_schema_before_the_tables_own_takes_the_table_that_the_client_makes(
    way: Route, main: Database, new_role: Callable[..., Database]
) -> None:
    app = new_role()
    main.execute(f"CREATE SCHEMA {app.user} AUTHORIZATION {app.user}")
    done = application(way, app.user)
    assert done.figures["resolves_to"] == "public.embeddings"
    (fact,) = facts(done, "fail")
    assert f"the search_path of {app.user} begins with the schema {app.user}" in fact
    # As the client does.
    app.execute("CREATE TABLE IF NOT EXISTS embeddings (id int)")
    assert application(way, app.user).figures["resolves_to"] == f"{app.user}.embeddings"


def test_capitals_are_folded_away(small_legacy: Database, main: Database, new_role: Callable[..., Database]) -> None:
    role = new_role().user
    way = moved_to(main, small_legacy, "public", "MyDocs", role)
    done = application(way, role)
    assert (done.verdict, done.figures["resolves_to"]) == ("fail", None)
    ((_, fact, hint),) = found(done)
    assert fact.startswith(f"without quotes MyDocs is mydocs, which leads to nothing for the role {role}")
    assert "a new, empty table" in fact
    assert hint == (
        "pass schemaName: 'public' to the client, which quotes both names then, or on main:"
        ' ALTER TABLE public."MyDocs" RENAME TO mydocs'
    )
    main.execute("CREATE TABLE public.mydocs (id int)")
    done = application(way, role)
    assert done.figures["resolves_to"] == "public.mydocs"
    assert "which leads to public.mydocs" in done.summary
    # A move that somebody made on purpose: whose search_path it is, nobody said.
    unnamed = application(way)
    assert unnamed.verdict == "pass"
    assert facts(unnamed, "fail") == []
    assert "MyDocs is mydocs" in facts(unnamed, "note")[0]
    assert "does not find it by its bare name: pass schemaName" in unnamed.summary


@pytest.mark.parametrize("table", ["user", "my docs", "a.b", "1st", 'a"b'])
def test_name_that_needs_quotes_is_found_by_no_bare_name(
    table: str, small_legacy: Database, main: Database, new_role: Callable[..., Database]
) -> None:
    role = new_role().user
    way = moved_to(main, small_legacy, "public", table.replace('"', '""'), role)
    way = replace(way, table=TableMapping(table=table))
    done = application(way, role)
    assert (done.verdict, done.figures["resolves_to"]) == ("fail", None)
    assert facts(done, "fail") == [
        f"the name {table} does not go without quotes, which a client without schemaName leaves out"
    ]


@pytest.mark.parametrize("table", ["values", "таблица", "_x$1"])
def test_name_that_needs_no_quotes_is_found(
    table: str, small_legacy: Database, main: Database, new_role: Callable[..., Database]
) -> None:
    app = new_role()
    way = moved_to(main, small_legacy, "public", table, app.user)
    done = application(way, app.user)
    assert (done.verdict, done.figures["resolves_to"]) == ("pass", f"public.{table}")
    assert app.value(f"SELECT count(*) FROM {table}") == 0


def test_search_path_of_the_role_decides(
    small_legacy: Database, main: Database, new_role: Callable[..., Database]
) -> None:
    app = new_role()
    way = moved_to(main, small_legacy, "ai", "docs", app.user)
    done = application(way, app.user)
    assert (done.verdict, done.figures["resolves_to"]) == ("fail", None)
    ((_, fact, hint),) = found(done)
    assert fact.startswith(f"the bare name docs leads to nothing for the role {app.user}, and not to ai.docs")
    with pytest.raises(psycopg2.errors.UndefinedTable):
        app.value("SELECT count(*) FROM docs")
    assert application(way).verdict == "pass"
    main.execute(hint.split("on main: ")[1])
    done = application(way, app.user)
    assert (done.verdict, done.figures["resolves_to"]) == ("pass", "ai.docs")
    assert done.figures["search_path"] == ["ai", "$user", "public"]
    assert app.value("SELECT count(*) FROM docs") == 0


def test_settings_of_role_and_database_come_in_the_servers_order(
    way: Route, main: Database, new_role: Callable[..., Database]
) -> None:
    app = new_role()
    for target, path in (
        (f'DATABASE "{main.name}"', 'public, "Of DB"'),
        (f"ROLE {app.user}", 'public, of_role, "with, comma", "wi""th"'),
        (f'ROLE {app.user} IN DATABASE "{main.name}"', "public, of_both"),
    ):
        main.execute(f"ALTER {target} SET search_path = {path}")
        shown = app.value("SELECT array_agg(n) FROM unnest(string_to_array(current_setting('search_path'), ', ')) n")
        path_seen: Any = application(way, app.user).figures["search_path"]
        assert ", ".join(path_seen) == ", ".join(shown).replace('""', "\0").replace('"', "").replace("\0", '"')
    main.execute(f"ALTER ROLE {app.user} IN DATABASE \"{main.name}\" SET search_path = ''")
    done = application(way, app.user)
    assert (done.figures["search_path"], done.figures["resolves_to"]) == ([], None)
    # Another role's own is not the application's, nor the other way round.
    assert application(way).figures["search_path"] == ["public", "Of DB"]
    main.execute('ALTER ROLE postgres IN DATABASE "' + main.name + '" SET search_path = only_mine')
    main.execute(f'ALTER ROLE {app.user} IN DATABASE "{main.name}" RESET ALL; ALTER ROLE {app.user} RESET ALL')
    assert application(way, app.user).figures["search_path"] == ["public", "Of DB"]


def test_path_of_the_server_itself_is_seen(way: Route, main: Database, new_role: Callable[..., Database]) -> None:
    role = new_role().user
    administrate(main, "ALTER SYSTEM SET search_path = elsewhere", "SELECT pg_reload_conf()")
    try:
        done = application(way, role)
        assert (done.figures["search_path"], done.figures["resolves_to"]) == (["elsewhere"], None)
    finally:
        administrate(main, "ALTER SYSTEM RESET search_path", "SELECT pg_reload_conf()")


# ---------------------------------------------------------------- rights


LACKING = {
    "SELECT": ("REVOKE SELECT ON public.embeddings FROM {role}", "fail", "may not SELECT on main's public.embeddings"),
    "INSERT": ("REVOKE INSERT ON public.embeddings FROM {role}", "fail", "may not INSERT on main's public.embeddings"),
    "DELETE": ("REVOKE DELETE ON public.embeddings FROM {role}", "fail", "may not DELETE on main's public.embeddings"),
    "UPDATE": ("REVOKE UPDATE ON public.embeddings FROM {role}", "note", "may not UPDATE on main's public.embeddings"),
    "a column": (
        "REVOKE SELECT ON public.embeddings FROM {role}; GRANT SELECT (id, content) ON public.embeddings TO {role}",
        "fail",
        "may not SELECT on main's public.embeddings (columns metadata, embedding)",
    ),
    "CREATE": ("REVOKE CREATE ON SCHEMA public FROM {role}", "note", "may not create tables in public"),
    "USAGE": (
        "REVOKE USAGE ON SCHEMA public FROM {role}; REVOKE USAGE ON SCHEMA public FROM PUBLIC",
        "fail",
        "may not use main's schema public",
    ),
    "CONNECT": ('REVOKE CONNECT ON DATABASE "{db}" FROM PUBLIC', "fail", "may not connect to main's database"),
    "policies": (
        "ALTER TABLE public.embeddings ENABLE ROW LEVEL SECURITY",
        "fail",
        "row-level security of public.embeddings is active for the role {role}: no policy lets it see a row",
    ),
    "a policy": (
        "ALTER TABLE public.embeddings ENABLE ROW LEVEL SECURITY; CREATE POLICY mine ON public.embeddings TO {role}"
        " USING (content = 'mine'); CREATE POLICY theirs ON public.embeddings FOR INSERT WITH CHECK (true)",
        "note",
        "it sees what 1 policy lets through",
    ),
}


@pytest.mark.parametrize("case", LACKING)
def test_right_that_is_missing_is_found_and_its_hint_repairs_it(
    case: str, way: Route, main: Database, new_role: Callable[..., Database]
) -> None:
    statement, severity, words = LACKING[case]
    role = new_role(ALL).user
    before = application(way, role)
    # Only what a role that does not own the table cannot do.
    assert (before.verdict, len(found(before))) == ("pass", 1)
    assert f"the role {role} can make no index on it" in facts(before, "note")[0]
    main.execute(statement.format(role=role, db=main.name))
    done = application(way, role)
    new = [one for one in found(done) if one not in found(before)]
    matching = [one for one in new if words.format(role=role) in one[1]]
    assert [one[0] for one in matching] == [severity], new
    assert done.verdict == ("fail" if severity == "fail" else "pass")
    if severity == "fail":
        assert done.summary.startswith(matching[0][1])
    grant = matching[0][2].split("on main: ")[1]
    if grant.startswith("GRANT"):
        main.execute(grant)
        assert matching[0] not in found(application(way, role))


def test_rights_of_the_group_count_and_a_group_itself_cannot_log_in(
    way: Route, main: Database, new_role: Callable[..., Database]
) -> None:
    group, member = new_role(GRANTS, "NOLOGIN").user, new_role("").user
    assert application(way, member).verdict == "fail"
    main.execute(f"GRANT {group} TO {member}")
    assert (application(way, member).verdict, found(application(way, member))) == ("pass", [])
    assert "may not log in" in facts(application(way, group), "note")[0]
    main.execute("ALTER TABLE public.embeddings ENABLE ROW LEVEL SECURITY")
    assert found(application(way, member)) == []
    main.execute("ALTER TABLE public.embeddings FORCE ROW LEVEL SECURITY")
    assert "no policy lets it see a row" in application(way, member).summary


def test_role_that_is_not_there_fails(way: Route) -> None:
    done = application(way, "nobody's role")
    assert (done.verdict, done.figures["role"], done.figures["resolves_to"]) == ("fail", "nobody's role", None)
    assert done.summary.startswith("main has no role nobody's role; check --app-role")


def test_sequence_behind_a_default_has_to_be_allowed(
    small_legacy: Database, main: Database, new_role: Callable[..., Database]
) -> None:
    app = new_role(ALL)
    for database in (small_legacy, main):
        database.execute("ALTER TABLE public.embeddings ADD COLUMN n bigserial")
    way = route(small_legacy, main)
    done = application(way, app.user)
    (fact,) = facts(done, "fail")
    assert "draws from public.embeddings_n_seq, which the role" in fact
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        app.execute("INSERT INTO public.embeddings (content) VALUES ('x')")
    main.execute(done.summary.split("on main: ")[1])
    assert application(way, app.user).verdict == "pass"
    app.execute("INSERT INTO public.embeddings (content) VALUES ('x')")
    # Nobody is asked for the sequence of an identity.
    main.execute("ALTER TABLE public.embeddings DROP COLUMN n, ADD COLUMN n bigint GENERATED BY DEFAULT AS IDENTITY")
    assert application(way, app.user).verdict == "pass"
    app.execute("INSERT INTO public.embeddings (content) VALUES ('x')")


def test_catalog_that_does_not_show_is_partial(way: Route, main: Database, new_role: Callable[..., Database]) -> None:
    app = new_role()
    seen = replace(way, target=endpoint(app, "main"))
    assert application(seen).verdict == "pass"
    main.execute("REVOKE SELECT ON pg_catalog.pg_db_role_setting FROM PUBLIC")
    done = application(seen)
    assert done.verdict == "partial"
    assert "what the role may do does not show from here: main (" in done.summary


# ---------------------------------------------------------------- columns, rows, extension


def test_missing_default_of_the_id_fails_where_the_source_has_one(
    way: Route, small_legacy: Database, main: Database
) -> None:
    main.execute("ALTER TABLE public.embeddings ALTER COLUMN id DROP DEFAULT")
    done = application(way)
    assert done.verdict == "fail"
    (fact,) = facts(done, "fail")
    assert (
        fact == "main's column id has no default, and the source's has one: a row that comes without an id is refused"
    )
    small_legacy.execute("ALTER TABLE public.embeddings ALTER COLUMN id DROP DEFAULT")
    done = application(way)
    assert (done.verdict, len(facts(done, "note"))) == ("pass", 1)
    main.execute(found(done)[0][2].split("on main: ")[1])
    assert found(application(way)) == []


def test_default_of_uuid_ossp_is_noted_where_main_lacks_it(way: Route, small_legacy: Database) -> None:
    small_legacy.execute(
        "CREATE FUNCTION public.uuid_generate_v4() RETURNS uuid LANGUAGE sql AS 'SELECT gen_random_uuid()';"
        "ALTER TABLE public.embeddings ALTER COLUMN id SET DEFAULT public.uuid_generate_v4()"
    )
    (note,) = facts(application(way), "note")
    assert "LangChain before 0.3.42 asks for that extension" in note


def test_column_that_no_client_fills_fails_unless_the_source_has_the_same(
    small_legacy: Database, main: Database
) -> None:
    way = route(small_legacy, main)
    small_legacy.execute(
        "ALTER TABLE public.embeddings ADD COLUMN tenant text; UPDATE public.embeddings SET tenant = 'a'"
    )
    main.execute("ALTER TABLE public.embeddings ADD COLUMN tenant text NOT NULL")
    done = application(way)
    assert done.summary.startswith("main's column tenant is NOT NULL without a default: a client that does not fill it")
    small_legacy.execute("ALTER TABLE public.embeddings ALTER COLUMN tenant SET NOT NULL")
    done = application(way)
    assert (done.verdict, len(facts(done, "note"))) == ("pass", 1)


def test_rows_without_content_or_metadata_are_noted(way: Route, small_legacy: Database, main: Database) -> None:
    pipeline("copy", env=environment(legacy=small_legacy, main=main)).expect(0)
    main.execute(
        "UPDATE public.embeddings SET metadata = NULL WHERE id IN (SELECT id FROM public.embeddings LIMIT 3);"
        "UPDATE public.embeddings SET content = NULL WHERE id = (SELECT id FROM public.embeddings LIMIT 1)"
    )
    done = application(way)
    assert done.verdict == "pass"
    assert done.summary.endswith(" (3 notes)")
    assert facts(done, "note") == [
        "main's public.embeddings: 1 row without content: LangChain drops them from what a search returns",
        "main's public.embeddings: 3 rows without metadata: a filter, and some clients always, leave them out",
    ]


@pytest.mark.parametrize(
    ("column", "kind", "words"),
    [
        ("metadata", "json", "main's column metadata is json: filters by what an array contains fail"),
        ("metadata", "text", "main's column metadata is text: the client gets a string, and filters by metadata fail"),
    ],
)
def test_type_that_a_client_does_not_expect_is_noted(
    column: str, kind: str, words: str, way: Route, small_legacy: Database, main: Database
) -> None:
    for database in (small_legacy, main):
        database.execute(
            f"ALTER TABLE public.embeddings ALTER COLUMN {column} DROP DEFAULT,"
            f" ALTER COLUMN {column} TYPE {kind} USING {column}::text::{kind}"
        )
    done = application(way)
    assert done.verdict == "pass"
    assert words in facts(done, "note")


def test_ids_that_are_texts_are_noted_where_they_were_uuids(way: Route, small_legacy: Database, main: Database) -> None:
    to_text = (
        "ALTER TABLE public.embeddings ALTER COLUMN id DROP DEFAULT, ALTER COLUMN id TYPE text,"
        " ALTER COLUMN id SET DEFAULT gen_random_uuid()::text"
    )
    main.execute(to_text)
    done = application(way)
    assert (done.verdict, facts(done, "note")) == (
        "pass",
        ["main's column id is text: a delete by id fails, since the client sends uuids"],
    )
    small_legacy.execute(to_text)
    assert found(application(way)) == []


def test_extension_off_the_path_fails_unless_the_source_has_it_so_too(
    small_legacy: Database, main: Database, new_role: Callable[..., Database]
) -> None:
    app = new_role()
    way = route(small_legacy, main)
    main.execute("CREATE SCHEMA extensions; ALTER EXTENSION vector SET SCHEMA extensions")
    done = application(way, app.user)
    (fact,) = facts(done, "fail")
    assert fact == (f"the role {app.user} may not use main's schema extensions, which pgvector is in: no search works")
    main.execute(done.summary.split("on main: ")[1])
    done = application(way, app.user)
    (fact,) = facts(done, "fail")
    assert f"pgvector's schema extensions is not on the search_path of the role {app.user}" in fact
    query = "SELECT id FROM public.embeddings ORDER BY embedding <=> (SELECT embedding FROM public.embeddings LIMIT 1)"
    with pytest.raises(psycopg2.errors.UndefinedFunction):
        app.rows(query)
    assert application(way).verdict == "pass"
    small_legacy.execute("CREATE SCHEMA ai; ALTER EXTENSION vector SET SCHEMA ai")
    assert application(way, app.user).verdict == "pass"
    assert "extensionSchemaName: 'extensions'" in found(application(way, app.user))[0][2]
    main.execute(f"ALTER ROLE {app.user} SET search_path = public, extensions")
    assert found(application(way, app.user)) == []
    assert app.rows(query) == []


def test_old_source_with_a_view_in_another_schema_passes(new_database: Callable[..., Database], main: Database) -> None:
    old = new_database("16.2")
    old.execute("CREATE SCHEMA ai; CREATE EXTENSION vector SCHEMA ai")
    old.execute("SET search_path = ai, public; " + TABLE_SQL.format(768))
    old.execute(
        "ALTER TABLE public.embeddings RENAME TO store; CREATE VIEW public.embeddings AS SELECT * FROM public.store"
    )
    done = application(route(old, main))
    assert (done.verdict, found(done)) == ("pass", [])
