"""Every refusal by the shape of the tables, the role's rights and the rows: its fact, and what it says to type."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace

import pytest

from pipeline.errors import RefusedError
from pipeline.move.copy import copy
from pipeline.options import CopyOptions
from tests.data import TABLE_SQL
from tests.preflights import administrate, inspected, route
from tests.support import Database

TYPED = "ALTER TABLE public.embeddings ALTER COLUMN {}"
KEYLESS = "ALTER TABLE public.embeddings DROP CONSTRAINT embeddings_pkey"
AS_VIEW = "ALTER TABLE public.embeddings RENAME TO store; CREATE VIEW public.embeddings AS SELECT {} FROM public.store"
ROW = "INSERT INTO public.embeddings (id, content) VALUES ('00000000-0000-0000-0000-00000000000{}', '{}')"
ASIDE = "\nor set them aside: pipeline copy --quarantine"
SAME_TYPE = "give both columns the same type: COPY would refuse or reinterpret the bytes"


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """What is done to a good pair of empty tables, and the whole of what must come of it."""

    legacy: str = ""
    main: str = ""
    ignored: tuple[str, ...] = ()
    dimensions: int = 768
    fact: str
    hint: str


REFUSALS = {
    "legacy has heirs": Refusal(
        legacy="CREATE TABLE public.heir () INHERITS (public.embeddings)",
        fact="legacy's public.embeddings has tables that inherit from it, whose rows are read as its own",
        hint="on legacy: make them partitions, or ALTER TABLE ... NO INHERIT public.embeddings",
    ),
    "main has heirs": Refusal(
        main="CREATE TABLE public.heir () INHERITS (public.embeddings)",
        fact="main's public.embeddings has tables that inherit from it, whose rows are read as its own",
        hint="on main: make them partitions, or ALTER TABLE ... NO INHERIT public.embeddings",
    ),
    "main is a view": Refusal(
        main=AS_VIEW.format("*"),
        fact="main's public.embeddings is a view; rows are copied into ordinary tables only",
        hint="name an ordinary table in PGVECTOR_TABLE",
    ),
    "main is a materialized view": Refusal(
        main=AS_VIEW.format("*").replace("VIEW", "MATERIALIZED VIEW"),
        fact="main's public.embeddings is a materialized view; rows are copied into ordinary tables only",
        hint="name an ordinary table in PGVECTOR_TABLE",
    ),
    "legacy has no key": Refusal(
        legacy=KEYLESS,
        fact="legacy's public.embeddings has no key: no primary key, and no unique index over NOT NULL columns",
        hint="on legacy: ALTER TABLE public.embeddings ADD PRIMARY KEY (id)",
    ),
    "main has no key": Refusal(
        main=KEYLESS,
        fact="main's public.embeddings has no key: no primary key, and no unique index over NOT NULL columns",
        hint="on main: ALTER TABLE public.embeddings ADD PRIMARY KEY (id)",
    ),
    "the keys differ": Refusal(
        main=f"{KEYLESS}, ADD PRIMARY KEY (id, content)",
        fact="the keys differ: (id) on legacy, (id, content) on main",
        hint="give both tables the same primary key",
    ),
    "a view lacks the key": Refusal(
        legacy=AS_VIEW.format("id, content, metadata, embedding"),
        main=f"ALTER TABLE public.embeddings ADD COLUMN part int DEFAULT 0; {KEYLESS}, ADD PRIMARY KEY (id, part)",
        fact="the key of main's public.embeddings has the column part, which legacy's public.embeddings has not",
        hint="give the target's table a key of columns that both sides have",
    ),
    "an ignored column is not there": Refusal(
        ignored=("contents",),
        fact="--ignore-column: legacy's public.embeddings has no column 'contents'; it has id, content, metadata,"
        " embedding",
        hint="name a column as it stands in the catalog, or leave the option out",
    ),
    "the key is ignored": Refusal(
        ignored=("id",),
        fact="--ignore-column: id is the embedding, or in the key",
        hint="nothing is left to copy without it",
    ),
    "main wants a column that is ignored": Refusal(
        legacy="ALTER TABLE public.embeddings ADD COLUMN tenant int",
        main="ALTER TABLE public.embeddings ADD COLUMN tenant int NOT NULL",
        ignored=("tenant",),
        fact="main's column tenant is NOT NULL without a default, and --ignore-column names it",
        hint="give it a default, or on main: ALTER TABLE public.embeddings ALTER COLUMN tenant DROP NOT NULL",
    ),
    "main wants a column that legacy lacks": Refusal(
        main="ALTER TABLE public.embeddings ADD COLUMN tenant int NOT NULL",
        fact="main's column tenant is NOT NULL without a default, and legacy has no such column",
        hint="give it a default, or on main: ALTER TABLE public.embeddings ALTER COLUMN tenant DROP NOT NULL",
    ),
    "identity beside the key": Refusal(
        legacy="ALTER TABLE public.embeddings ADD COLUMN n int",
        main="ALTER TABLE public.embeddings ADD COLUMN n int GENERATED ALWAYS AS IDENTITY",
        fact="main's column n is GENERATED ALWAYS AS IDENTITY and not in the key: a row that changes meanwhile could"
        " not be written over",
        hint="on main: ALTER TABLE public.embeddings ALTER COLUMN n SET GENERATED BY DEFAULT",
    ),
    "legacy calls its content otherwise": Refusal(
        legacy="ALTER TABLE public.embeddings RENAME content TO body",
        fact="legacy's public.embeddings has no column 'content'; it has id, body, metadata, embedding",
        hint="set PGVECTOR_COL_CONTENT to the name that the column has",
    ),
    "main calls its vector otherwise": Refusal(
        main="ALTER TABLE public.embeddings RENAME embedding TO vector",
        fact="main's public.embeddings has no column 'embedding'; it has id, content, metadata, vector",
        hint="set PGVECTOR_COL_VECTOR to the name that the column has",
    ),
    "main lacks a column": Refusal(
        legacy='ALTER TABLE public.embeddings ADD COLUMN "Source" text',
        fact="main has no column Source (text), which legacy's public.embeddings has",
        hint='on main: ALTER TABLE public.embeddings ADD COLUMN "Source" text'
        ' (or leave it behind: --ignore-column "Source")',
    ),
    "types differ": Refusal(
        legacy=TYPED.format("metadata TYPE text"),
        fact="column metadata is text on legacy and jsonb on main",
        hint=SAME_TYPE,
    ),
    "a time without a zone": Refusal(
        legacy="ALTER TABLE public.embeddings ADD COLUMN at timestamp",
        main="ALTER TABLE public.embeddings ADD COLUMN at timestamptz",
        fact="column at is timestamp without time zone on legacy and timestamp with time zone on main: which moment a"
        " time without a zone means is not in the data",
        hint="give both columns the same type, with AT TIME ZONE where you know the zone",
    ),
    "an enum lacks a label": Refusal(
        legacy="CREATE TYPE mood AS ENUM ('good', 'bad'); ALTER TABLE public.embeddings ADD COLUMN mood mood",
        main="CREATE TYPE mood AS ENUM ('good'); ALTER TABLE public.embeddings ADD COLUMN mood mood",
        fact="column mood is public.mood on legacy and public.mood on main: the enum there has no 'bad'",
        hint="add them there: ALTER TYPE ADD VALUE",
    ),
    "no binary form": Refusal(
        legacy="ALTER TABLE public.embeddings ADD COLUMN rights aclitem",
        main="ALTER TABLE public.embeddings ADD COLUMN rights aclitem",
        fact="column rights is aclitem on legacy and aclitem on main: aclitem has no binary form",
        hint="leave it behind: --ignore-column",
    ),
    "numbers would be rounded": Refusal(
        legacy="ALTER TABLE public.embeddings ADD COLUMN price numeric(10,4)",
        main="ALTER TABLE public.embeddings ADD COLUMN price numeric(10,2)",
        fact="column price is numeric(10,4) on legacy and numeric(10,2) on main: values would be rounded or filled up",
        hint=SAME_TYPE,
    ),
    "the embedding is an array": Refusal(
        legacy=TYPED.format("embedding TYPE real[] USING embedding::real[]"),
        fact="legacy's column embedding is real[], not a vector",
        hint="set PGVECTOR_COL_VECTOR to the column that holds the embeddings",
    ),
    "the embedding is bits": Refusal(
        legacy=TYPED.format("embedding TYPE bit(768) USING NULL"),
        fact="legacy's column embedding is bit(768), not a vector: bits have no cosine distance that search could be"
        " compared by",
        hint="set PGVECTOR_COL_VECTOR to the column that holds the embeddings",
    ),
    "main's vectors are halved": Refusal(
        main="DROP INDEX public.embeddings_embedding_hnsw; " + TYPED.format("embedding TYPE halfvec(768)"),
        fact="column embedding is vector(768) on legacy and halfvec(768) on main: half the digits of every number would"
        " be lost, and search could answer otherwise",
        hint="give both columns the type vector (an index can be over its halfvec form), or round them:"
        " --allow-rounding",
    ),
    "legacy has another dimension": Refusal(
        legacy=TYPED.format("embedding TYPE vector(384)"),
        fact="legacy's column embedding has 384 dimensions, EMBEDDING_DIMENSIONS says 768",
        hint="if legacy is right: set EMBEDDING_DIMENSIONS=384 before alembic upgrade head, on an empty main",
    ),
    "main has another dimension": Refusal(
        legacy=TYPED.format("embedding TYPE vector(384)"),
        dimensions=384,
        fact="main's column embedding has 768 dimensions, EMBEDDING_DIMENSIONS says 384",
        hint="if main is right: set EMBEDDING_DIMENSIONS=768",
    ),
    "json that jsonb refuses": Refusal(
        legacy=TYPED.format("metadata TYPE json")
        + "; INSERT INTO public.embeddings (id, metadata) VALUES ('00000000-0000-0000-0000-000000000001',"
        """ '{"a": "\\u0000"}')""",
        fact="legacy's public.embeddings: 1 row with json in column metadata that jsonb does not take (\\u0000, half a"
        " surrogate pair), first: 00000000-0000-0000-0000-000000000001",
        hint="correct these rows, or give the target's column the type json" + ASIDE,
    ),
    "a key twice in json": Refusal(
        legacy=TYPED.format("metadata TYPE json")
        + "; INSERT INTO public.embeddings (id, metadata) VALUES ('00000000-0000-0000-0000-000000000001',"
        """ '{"a": 1, "a": 2}')""",
        fact="legacy's public.embeddings: 1 row with a key that occurs twice in one object of column metadata; jsonb"
        " keeps the last value alone, first: 00000000-0000-0000-0000-000000000001",
        hint="if that is right, write them anew on legacy: SET metadata = metadata::jsonb; else give the target's"
        " column the type json" + ASIDE,
    ),
    "a text too long": Refusal(
        legacy=ROW.format(1, "four"),
        main=TYPED.format("content TYPE varchar(3)"),
        fact="legacy's public.embeddings: 1 row with more than 3 characters in column content, which is character"
        " varying(3) on the target, first: 00000000-0000-0000-0000-000000000001",
        hint="on the target: ALTER TABLE public.embeddings ALTER COLUMN content TYPE text" + ASIDE,
    ),
    "a view with a key that is null": Refusal(
        legacy=KEYLESS
        + ", ALTER id DROP NOT NULL; INSERT INTO public.embeddings (id) VALUES (NULL); "
        + AS_VIEW.format("*"),
        fact="legacy's public.embeddings: 1 row without a value in column id, which is in the key",
        hint="leave such rows out of the view, or name another table in PGVECTOR_TABLE",
    ),
    "a view with a key twice": Refusal(
        legacy=f"{KEYLESS}; {ROW.format(1, 'a')}; {ROW.format(1, 'b')}; {AS_VIEW.format('*')}",
        fact="legacy's public.embeddings: 1 key (id) occurs more than once, first:"
        " 00000000-0000-0000-0000-000000000001",
        hint="leave the doubles out of the view, or give the target's table the key that its rows have",
    ),
    "vectors of another dimension": Refusal(
        legacy=TYPED.format("embedding TYPE vector") + "; INSERT INTO public.embeddings (embedding) VALUES ('[1,2]')",
        fact="legacy's column embedding is an untyped vector and holds 2 dimensions: 1 row; EMBEDDING_DIMENSIONS says"
        " 768",
        hint="set EMBEDDING_DIMENSIONS to the model's dimension, and embed or delete the other rows first" + ASIDE,
    ),
}


def refusals(legacy: Database, main: Database, ignored: tuple[str, ...] = (), dimensions: int = 768) -> dict[str, str]:
    """Return fact and hint of everything that is refused."""
    way = replace(route(legacy, main), ignore_columns=ignored, dimensions=dimensions)
    return {one.fact: one.hint for one in inspected(way).findings if one.severity == "refuse"}


@pytest.fixture
def empty_legacy(legacy: Database) -> Database:
    legacy.execute(TABLE_SQL.format(768))
    return legacy


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_says_what_to_type_and_copy_says_the_same(case: str, empty_legacy: Database, main: Database) -> None:
    refusal = REFUSALS[case]
    for database, statements in ((empty_legacy, refusal.legacy), (main, refusal.main)):
        if statements:
            database.execute(statements)
    found = refusals(empty_legacy, main, refusal.ignored, refusal.dimensions)
    assert found == {refusal.fact: refusal.hint}
    way = replace(route(empty_legacy, main), ignore_columns=refusal.ignored, dimensions=refusal.dimensions)
    with pytest.raises(RefusedError) as refused, closing(copy(way, CopyOptions())) as events:
        next(events)
    assert (refused.value.fact, refused.value.hint) == (refusal.fact, refusal.hint)
    assert main.value("SELECT count(*) FROM pipeline.run") == 0


def test_bytes_that_are_no_text(empty_legacy: Database, main: Database) -> None:
    name = f"{empty_legacy.name}_ascii"
    administrate(empty_legacy, f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'")
    try:
        ascii_only = Database(server=empty_legacy.server, name=name)
        ascii_only.execute("CREATE EXTENSION vector; " + TABLE_SQL.format(768))
        ascii_only.execute(ROW.format(1, "' || convert_from('\\xe4', 'SQL_ASCII') || '"))
        found = refusals(ascii_only, main)
    finally:
        administrate(empty_legacy, f"DROP DATABASE {name} WITH (FORCE)")
    ((fact, hint),) = found.items()
    assert fact == (
        "legacy's public.embeddings: 1 row with bytes in column content that are not UTF-8, in a database of the"
        " encoding SQL_ASCII, first: 00000000-0000-0000-0000-000000000001"
    )
    assert hint == (
        "if they are LATIN1, write them anew on legacy: SET content = convert_from(convert(convert_to(content,"
        " 'SQL_ASCII'), 'LATIN1', 'UTF8'), 'UTF8')" + ASIDE
    )


def test_target_that_lacks_characters(empty_legacy: Database, main: Database) -> None:
    name = f"{main.name}_latin"
    administrate(main, f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'")
    try:
        latin = Database(server=main.server, name=name)
        latin.execute("CREATE EXTENSION vector; " + TABLE_SQL.format(768))
        found = refusals(empty_legacy, latin)
    finally:
        administrate(main, f"DROP DATABASE {name} WITH (FORCE)")
    fact = "main's database has the encoding LATIN1, legacy's has UTF8: not every text fits"
    assert found[fact] == "use a database of the encoding UTF8 for main"


@pytest.fixture
def plain(new_role: Callable[[Database], Database], main: Database) -> Database:
    return new_role(main)


@pytest.fixture
def new_role() -> Iterator[Callable[[Database], Database]]:
    """Return a function that makes a role without rights in a database."""
    made: list[Database] = []

    def make(database: Database) -> Database:
        database.execute("CREATE ROLE pf_plain LOGIN PASSWORD 'pf'")
        made.append(database)
        return database.as_role("pf_plain", "pf")

    yield make
    for database in made:
        database.execute("DROP OWNED BY pf_plain; DROP ROLE pf_plain")


def test_rights_that_a_reader_lacks(
    empty_legacy: Database, main: Database, new_role: Callable[[Database], Database]
) -> None:
    reader = new_role(empty_legacy)
    empty_legacy.execute(
        "GRANT SELECT (id, content) ON public.embeddings TO pf_plain; REVOKE USAGE ON SCHEMA public FROM PUBLIC"
    )
    found = refusals(reader, main)
    assert found == {
        "the role pf_plain may not use legacy's schema public": "on legacy: GRANT USAGE ON SCHEMA public TO pf_plain",
        "the role pf_plain may not SELECT on legacy's public.embeddings (columns metadata, embedding)": "on legacy:"
        " GRANT SELECT ON public.embeddings TO pf_plain",
    }


def test_rights_that_a_writer_lacks(empty_legacy: Database, main: Database, plain: Database) -> None:
    main.execute(
        f"REVOKE TEMPORARY ON DATABASE {main.name} FROM PUBLIC; GRANT USAGE ON SCHEMA pipeline TO pf_plain;"
        "GRANT SELECT ON ALL TABLES IN SCHEMA pipeline TO pf_plain"
    )
    lacking = {
        f"the role pf_plain may not {right} on main's public.embeddings": f"on main: GRANT {right} ON"
        " public.embeddings TO pf_plain"
        for right in ("SELECT", "INSERT", "UPDATE", "DELETE")
    }
    temporary = {
        "the role pf_plain may not make temporary tables on main": "on main: GRANT TEMPORARY ON DATABASE"
        f" {main.name} TO pf_plain"
    }
    found = refusals(empty_legacy, plain)
    assert lacking.items() | temporary.items() <= found.items()
    main.execute("GRANT ALL ON public.embeddings TO pf_plain")
    assert refusals(empty_legacy, plain) == temporary


def test_rows_that_a_policy_hides(
    empty_legacy: Database, main: Database, new_role: Callable[[Database], Database]
) -> None:
    reader = new_role(empty_legacy)
    empty_legacy.execute(
        "GRANT SELECT ON public.embeddings TO pf_plain; ALTER TABLE public.embeddings ENABLE ROW LEVEL SECURITY"
    )
    assert refusals(reader, main) == {
        "row-level security hides rows of legacy's public.embeddings from the role pf_plain": "use the table's owner,"
        " or on legacy: ALTER ROLE pf_plain BYPASSRLS"
    }
