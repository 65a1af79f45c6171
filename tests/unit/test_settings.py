"""Settings: the environment, .env files, endpoints, URLs, the table's names, and secrets that stay secret."""

import copy
import json
import pickle
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.endpoints import SSL_MODES, Endpoint, Secret
from pipeline.envfile import Value, read_env_file
from pipeline.errors import EXIT_USAGE, SettingsError
from pipeline.settings import DEFAULTS, SECRET_VARIABLES, Settings, TableMapping, check_identifier

CANARY = "c4n@ry/%41'pa$$ wörd"
MAIN = {"DB_HOST": "main.test", "DB_USER": "app", "DB_NAME": "application"}
LEGACY = {"PGVECTOR_HOST": "legacy.test", "PGVECTOR_USER": "reader", "PGVECTOR_DB": "vectors"}
# Text that a file can hold and a variable can have: no NUL, no half surrogate pair.
TEXTS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1)


def load(**environ: str) -> Settings:
    return Settings.load(environ=environ)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def env_file(tmp_path: Path) -> Path:
    return tmp_path / "settings.env"


def failure(error: pytest.ExceptionInfo[SettingsError], *secrets: str) -> str:
    """Return fact and hint, and check that no log of the error would hold a secret."""
    shown = "".join(traceback.format_exception(error.value)) + error.value.hint
    for secret in (CANARY, *secrets):
        assert secret not in shown
    assert error.value.exit_code == EXIT_USAGE
    assert error.value.hint
    return f"{error.value.fact} | {error.value.hint}"


def test_nothing_set_gives_the_documented_defaults() -> None:
    settings = load()
    assert settings.table == TableMapping(
        schema="public",
        table="embeddings",
        id="id",
        content="content",
        metadata="metadata",
        embedding="embedding",
    )
    assert (settings.dimensions, settings.ollama_url) == (768, "http://localhost:11434")
    assert (settings.ollama_model, settings.use_mock) == ("nomic-embed-text", False)


def test_environment_goes_over_the_file(env_file: Path) -> None:
    env_file.write_text("DB_HOST=file.test\nDB_USER=file\nDB_NAME=file\nOTHER=x\n")
    settings = Settings.load(env_file, {"DB_USER": "environment"})
    main = settings.endpoint("main")
    assert (main.host, main.user, main.database) == ("file.test", "environment", "file")
    assert settings.values["DB_HOST"].where == f"{env_file}:1"
    assert settings.values["DB_USER"].where == "environment"
    assert "OTHER" not in settings.values


def test_file_of_the_working_directory_is_read_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("EMBEDDING_DIMENSIONS=384\n")
    assert load().dimensions == 384
    assert load(EMBEDDING_DIMENSIONS="512").dimensions == 512
    (tmp_path / "other").write_text("")
    assert Settings.load(tmp_path / "other", {}).dimensions == 768


def test_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nowhere cannot be read: No such file") as error:
        Settings.load(tmp_path / "nowhere", {})
    assert "--env-file" in failure(error)
    with pytest.raises(SettingsError, match="Is a directory"):
        Settings.load(tmp_path, {})


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("DB_PASSWORD=plain", "plain"),
        ("DB_PASSWORD = spaced ", "spaced"),
        ("export DB_PASSWORD=exported", "exported"),
        ("DB_PASSWORD=", ""),
        ("DB_PASSWORD='p@ss #word'", "p@ss #word"),
        ('DB_PASSWORD="p@ss #word" # a remark', "p@ss #word"),
        ("DB_PASSWORD=p@ss#word", "p@ss#word"),
        ("DB_PASSWORD='${HOME}'", "${HOME}"),
        ('DB_PASSWORD="${HOME}$HOME"', "${HOME}$HOME"),
        ("DB_PASSWORD=${HOME}", "${HOME}"),
        ("DB_PASSWORD=a=b==", "a=b=="),
        ("DB_PASSWORD='a\"b'", 'a"b'),
        ('DB_PASSWORD="a\'b"', "a'b"),
        (r"DB_PASSWORD='a\\b\'c'", "a\\b'c"),
        ("DB_PASSWORD='@:/?#[] %\"$é'", '@:/?#[] %"$é'),
        ("DB_PASSWORD='two\nlines'", "two\nlines"),
    ],
)
def test_value_of_a_file_is_what_its_author_meant(line: str, value: str, env_file: Path) -> None:
    env_file.write_text(f"# first\n\n{line}\nDB_HOST=after\n", encoding="utf-8")
    values = read_env_file(env_file)
    assert values["DB_PASSWORD"] == Value(text=value, where=f"{env_file}:3")
    assert values["DB_HOST"].text == "after"


def test_byte_order_mark_and_crlf_are_understood(env_file: Path) -> None:
    env_file.write_bytes(b"\xef\xbb\xbfDB_HOST=h\r\n\r\nDB_PASSWORD='p #w'\r\nDB_USER=u")
    assert {k: (v.text, v.where) for k, v in read_env_file(env_file).items()} == {
        "DB_HOST": ("h", f"{env_file}:1"),
        "DB_PASSWORD": ("p #w", f"{env_file}:3"),
        "DB_USER": ("u", f"{env_file}:4"),
    }


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        (b"DB_HOST=h\n\n\nthis is: no line %s\n", 4, "cannot be read"),
        (b"DB_HOST=h\nDB_PASSWORD='%s\nDB_USER=u\n", 2, "cannot be read"),
        (b'DB_HOST=h\nDB_PASSWORD="%s\nDB_USER=u\n', 2, "cannot be read"),
        (b"DB_HOST=h\nDB_PASSWORD='%s' x\n", 2, "cannot be read"),
        (b"DB_HOST=h\n\nDB_PASSWORD\n", 3, "DB_PASSWORD has no ="),
        (b"DB_PASSWORD=%s\n# x\nDB_PASSWORD=%s\n", 3, "DB_PASSWORD is set twice, first at {file}:1"),
        (b"DB_PASSWORD=%s\r\n\r\nDB_PASSWORD=\r\n", 3, "DB_PASSWORD is set twice"),
        (b"DB_HOST=h\nDB_PASSWORD=%s\xe9\n", 2, "not UTF-8"),
        (b"\xff\xfeD\0B\0", 1, "not UTF-8"),
        (b"DB_HOST=h\nDB_PASSWORD=%s #word\n", 2, "DB_PASSWORD is cut at a blank and #"),
        (b"DB_HOST=h\nAPP_KEY='%s\nDB_PASSWORD=x\nDB_NAME='\n", 2, "APP_KEY swallows the assignments"),
    ],
)
def test_bad_line_is_named_and_its_value_is_not(text: bytes, line: int, what: str, env_file: Path) -> None:
    secret = "s3cr3t-canary"
    env_file.write_bytes(text.replace(b"%s", secret.encode()))
    with pytest.raises(SettingsError) as error:
        read_env_file(env_file)
    said = failure(error, secret)
    assert f"{env_file}, line {line}:" in said
    assert what.format(file=env_file) in said


def test_key_of_many_lines_is_left_alone(env_file: Path) -> None:
    env_file.write_text('APP_KEY="-----BEGIN\nQUJD=\nQUJD==\n-----END"\nDB_HOST=h\n')
    assert read_env_file(env_file)["DB_HOST"] == Value(text="h", where=f"{env_file}:5")


@given(TEXTS)
def test_quoted_password_survives_the_file(password: str) -> None:
    path = Path("settings.env")
    quoted = password.replace("\\", "\\\\").replace("'", "\\'")
    path.write_bytes(f"DB_PASSWORD='{quoted}'\n".encode())
    try:
        text = read_env_file(path)["DB_PASSWORD"].text
    except SettingsError as error:
        # A value that looks as if it had swallowed other lines.
        assert "swallows" in error.fact
    else:
        assert text == password.replace("\r\n", "\n")


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_nul_and_bytes_that_are_not_utf8_are_refused(name: str, env_file: Path) -> None:
    with pytest.raises(SettingsError, match=rf"{name} \(environment\) is not UTF-8") as error:
        load(**{name: "caf\udce9" + CANARY})
    failure(error)
    env_file.write_text(f"{name}='a\0{CANARY.replace(chr(39), '')}'\n")
    with pytest.raises(SettingsError, match="NUL") as error:
        Settings.load(env_file, {})
    failure(error, CANARY.replace("'", ""))


@pytest.mark.parametrize(("text", "port"), [("1", 1), ("65535", 65535), (" 6432 ", 6432), ("05432", 5432)])
def test_port_is_a_whole_number(text: str, port: int) -> None:
    assert load(**MAIN, DB_PORT=text).endpoint("main").port == port


@pytest.mark.parametrize(
    "text", ["0", "65536", "-1", "5432.0", "0x10", "five", "٥", "1e3", "99999999999999999999", "+5"]
)
def test_unusable_port_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"DB_PORT \(environment\) is not a whole number from 1 to 65535"):
        load(**MAIN, DB_PORT=text).endpoint("main")


@pytest.mark.parametrize("text", ["0", "16001", "-768", "768.0", "many", "٧"])
def test_unusable_dimensions_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"EMBEDDING_DIMENSIONS .* is not a whole number from 1 to 16000"):
        load(EMBEDDING_DIMENSIONS=text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, True) for text in ("true", " TRUE ", "1", "yes", "on")),
        *((text, False) for text in ("false", "False", "0", "no", "OFF")),
    ],
)
def test_boolean_is_read_whatever_its_case(text: str, value: bool) -> None:
    assert load(USE_MOCK_EMBEDDINGS=text).use_mock is value


@pytest.mark.parametrize(
    "name", ["USE_MOCK_EMBEDDINGS", "OLLAMA_EMBEDDINGS_MODEL", "EMBEDDING_DIMENSIONS", "PGVECTOR_TABLE"]
)
@pytest.mark.parametrize("text", ["", "  "])
def test_empty_value_is_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} .environment. is empty") as error:
        load(**{name: text})
    assert f"give {name} a value, or take the line out" in failure(error)


def test_boolean_that_is_none_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"USE_MOCK_EMBEDDINGS .* is neither true nor false"):
        load(USE_MOCK_EMBEDDINGS="maybe")


@pytest.mark.parametrize("url", ["localhost:11434", "ftp://x", f"user:{CANARY}@host"])
def test_address_of_ollama_must_be_http(url: str) -> None:
    with pytest.raises(SettingsError, match=r"OLLAMA_BASE_URL .* is not an http") as error:
        load(OLLAMA_BASE_URL=url)
    failure(error)
    assert load(OLLAMA_BASE_URL="https://host/ollama/").ollama_url == "https://host/ollama"


@pytest.mark.parametrize(
    ("text", "mode", "mode_with_certificate"),
    [
        (None, "prefer", "verify-full"),
        ("", "prefer", "verify-full"),
        ("true", "require", "verify-full"),
        ("1", "require", "verify-full"),
        ("false", "prefer", "prefer"),
        *((mode, mode, mode) for mode in SSL_MODES),
        ("Verify-CA", "verify-ca", "verify-ca"),
    ],
)
@pytest.mark.parametrize(("prefix", "base", "name"), [("DB", MAIN, "main"), ("PGVECTOR", LEGACY, "legacy")])
def test_ssl_takes_a_boolean_or_a_mode(
    text: str | None, mode: str, mode_with_certificate: str, prefix: str, base: dict[str, str], name: str
) -> None:
    more = {} if text is None else {f"{prefix}_SSL": text}
    assert load(**base, **more).endpoint(name).sslmode == mode
    endpoint = load(**base, **more, **{f"{prefix}_SSLROOTCERT": "/ca.pem"}).endpoint(name)
    assert (endpoint.sslmode, endpoint.sslrootcert) == (mode_with_certificate, "/ca.pem")


def test_unknown_ssl_mode_is_refused_with_the_modes() -> None:
    with pytest.raises(SettingsError, match=r"DB_SSL .* is neither true, false nor an SSL mode") as error:
        load(**MAIN, DB_SSL="tls").endpoint("main")
    assert "verify-full" in failure(error)


def test_endpoint_takes_its_own_variables_and_no_others() -> None:
    settings = load(**MAIN, **LEGACY, DB_PASSWORD=CANARY, DB_PORT="6000", PGVECTOR_SSL="require")
    assert settings.endpoint("main") == Endpoint(
        name="main", host="main.test", port=6000, user="app", database="application", password=Secret(CANARY)
    )
    assert settings.endpoint("legacy") == Endpoint(
        name="legacy", host="legacy.test", port=5432, user="reader", database="vectors", sslmode="require"
    )
    assert settings.endpoint("main").label == "app@main.test:6000/application"


@pytest.mark.parametrize("missing", sorted(MAIN))
def test_missing_variable_is_named(missing: str) -> None:
    with pytest.raises(SettingsError, match=f"{missing} is not set") as error:
        load(**{k: v for k, v in MAIN.items() if k != missing}, DB_PASSWORD=CANARY).endpoint("main")
    assert f"set {missing} in the environment or in .env" in failure(error)


@pytest.mark.parametrize(
    "host",
    ["postgresql://u:{}@h/d", "u:{}@h", "host=h password={}", "h/{}", "two {}", "h@{}"],
)
def test_host_that_is_a_connection_string_is_refused_unseen(host: str) -> None:
    settings = load(**MAIN | {"DB_HOST": host.format("s3cr3t")}, **LEGACY)
    with pytest.raises(SettingsError, match=r"DB_HOST .* is not a host name") as error:
        settings.endpoint("main")
    failure(error, "s3cr3t")


@pytest.mark.parametrize(
    ("host", "local", "label"),
    [
        ("/run/my sockets", True, "app@/run/my sockets:5432/application"),
        ("@abstract", True, "app@@abstract:5432/application"),
        ("localhost", True, "app@localhost:5432/application"),
        ("127.8.9.1", True, "app@127.8.9.1:5432/application"),
        ("::1", True, "app@[::1]:5432/application"),
        ("fe80::1", False, "app@[fe80::1]:5432/application"),
        ("10.0.0.1", False, "app@10.0.0.1:5432/application"),
        (" localhost.example ", False, "app@localhost.example:5432/application"),
    ],
)
def test_host_may_be_a_name_an_address_or_a_socket_folder(host: str, local: bool, label: str) -> None:
    endpoint = load(**MAIN | {"DB_HOST": host}).endpoint("main")
    assert (endpoint.is_local, endpoint.label) == (local, label)


def test_legacy_variables_come_before_those_of_pgvector() -> None:
    new = {"LEGACY_HOST": "old.test", "LEGACY_USER": "old", "LEGACY_DB": "old"}
    settings = load(**MAIN, **LEGACY, **new, PGVECTOR_PASSWORD=CANARY, PGVECTOR_PORT="7000", PGVECTOR_SSL="require")
    assert settings.legacy_prefix == "LEGACY"
    assert settings.endpoint("legacy") == Endpoint(
        name="legacy", host="old.test", port=5432, user="old", database="old"
    )


@pytest.mark.parametrize("missing", ["LEGACY_HOST", "LEGACY_USER", "LEGACY_DB"])
def test_legacy_group_is_never_filled_up_from_pgvector(missing: str) -> None:
    new = {"LEGACY_HOST": "old.test", "LEGACY_USER": "old", "LEGACY_DB": "old"}
    del new[missing]
    with pytest.raises(SettingsError, match=f"{missing} is not set"):
        load(**LEGACY, **new).endpoint("legacy")


def test_legacy_group_in_the_file_beats_pgvector_in_the_environment(env_file: Path) -> None:
    env_file.write_text("LEGACY_HOST=old.test\nLEGACY_USER=old\nLEGACY_DB=old\n")
    assert Settings.load(env_file, LEGACY).endpoint("legacy").host == "old.test"


@pytest.mark.parametrize("name", ["staging", "MAIN", "", f"host=h password={CANARY}", f"u:{CANARY}@h", "pass word"])
def test_unknown_endpoint_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(SettingsError, match="endpoint") as error:
        load(**MAIN).endpoint(name)
    said = failure(error)
    assert "say legacy, main, or postgresql://user@host:port/database" in said
    assert ("staging" in said) == (name == "staging")
    assert "pass word" not in said


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://u@h/d", {}),
        ("postgres://u@h/d", {}),
        ("postgresql+psycopg2://u@h/d", {}),
        ("postgresql://u@h:6432/d", {"port": 6432}),
        ("postgresql://us%40er%2F@h/d%20b%2F%C3%A9", {"user": "us@er/", "database": "d b/é"}),
        ("postgresql://u@[2001:db8::1]:6000/d", {"host": "2001:db8::1", "port": 6000}),
        ("postgresql://u@[::1]/d", {"host": "::1"}),
        ("postgresql://u@%2Frun%2FMy%20Sockets:6000/d", {"host": "/run/My Sockets", "port": 6000}),
        ("postgresql://u@/d?host=/run/My%20Sockets", {"host": "/run/My Sockets"}),
        ("postgresql://u@h/d?sslmode=verify-ca", {"sslmode": "verify-ca"}),
        ("postgresql://u@h/d?sslrootcert=/c%20a.pem", {"sslmode": "verify-full", "sslrootcert": "/c a.pem"}),
        ("postgresql://u@h/d?sslmode=require&sslrootcert=/c", {"sslmode": "require", "sslrootcert": "/c"}),
        ("postgresql://u@Host.Example/d", {"host": "Host.Example"}),
    ],
)
def test_url_is_an_endpoint(url: str, expected: dict[str, Any]) -> None:
    plain = Endpoint(name="url", host="h", port=5432, user="u", database="d")
    assert load().endpoint(url) == replace(plain, **expected)


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("postgresql://u:s3cr3t@h/d", "holds a password"),
        ("postgresql://u:@h/d", "holds a password"),
        ("postgresql://u:s3cr3t%40x@h/d", "holds a password"),
        ("postgresql://u:p@s3cr3t@h/d", "holds a password"),
        ("postgresql://u@h/d?password=s3cr3t", "holds a password"),
        ("postgresql://u:p/s3cr3t@h/d", "cannot be read"),
        ("postgresql://u:s3cr3t/x@h/d", "cannot be read"),
        ("postgresql://u:1?s3cr3t@h/d", "cannot be read"),
        ("postgresql://u:1?s3cr3t=x@h/d", "names no user"),
        ("postgresql://u:1#s3cr3t@h/d", "part after #"),
        ("postgresql://u:[s3cr3t@h/d", "cannot be read"),
        ("postgresql://u:s3cr3t\u2100@h/d", "cannot be read"),
        ("postgresql://u@h:0/d", "port is not from 1"),
        ("postgresql://u@h:65536/d", "cannot be read"),
        ("postgresql://u@h:s3cr3t/d", "cannot be read"),
        ("postgresql://u@h/d%FF", "cannot be read"),
        ("postgresql://u@h/d%00s3cr3t", "names no database"),
        ("postgresql://u@h/d?sslmode=s3cr3t", "sslmode is unknown"),
        ("postgresql://u@h/d?connect_timeout=3", "option 'connect_timeout' is not known"),
        ("postgresql://u@h/d?sslmode=require&sslmode=disable", "something twice"),
        ("postgresql://u@h/d?host=/tmp", "something twice"),
        ("postgresql://u@h", "names no database"),
        ("postgresql://u@h/", "names no database"),
        ("postgresql://h/d", "names no user"),
        ("postgresql://u@/d", "names no host"),
        ("mysql://u:s3cr3t@h/d", "does not begin with postgresql://"),
        ("postgresql+asyncpg://u@h/d", "does not begin with postgresql://"),
    ],
)
def test_unusable_url_is_refused_without_being_shown(url: str, what: str) -> None:
    with pytest.raises(SettingsError) as error:
        load().endpoint(url)
    assert what in failure(error, "s3cr3t")


@given(TEXTS)
def test_no_password_in_a_url_is_ever_shown(password: str) -> None:
    marked = f"s3cr3t{password}s3cr3t"
    with pytest.raises(SettingsError) as error:
        load().endpoint(f"postgresql://u:{marked}@h/d")
    failure(error, "s3cr3t")


@pytest.mark.parametrize(
    ("text", "schema", "table"),
    [
        ("docs", "public", "docs"),
        (" docs ", "public", "docs"),
        ("ai.docs", "ai", "docs"),
        ("MyDocs", "public", "MyDocs"),
        ('"My.Schema"."my ""docs"""', "My.Schema", 'my "docs"'),
        ('ai."a.b"', "ai", "a.b"),
        ('"a.b".docs', "a.b", "docs"),
        ('"a.b"', "public", "a.b"),
        ("größe.表", "größe", "表"),
        ("é" * 31, "public", "é" * 31),
        ("a" * 63 + "." + "b" * 63, "a" * 63, "b" * 63),
        ("select; drop", "public", "select; drop"),
    ],
)
def test_table_may_have_a_schema_and_quotes(text: str, schema: str, table: str) -> None:
    mapping = load(PGVECTOR_TABLE=text).table
    assert (mapping.schema, mapping.table) == (schema, table)
    assert mapping.qualified == f"{schema}.{table}"


@pytest.mark.parametrize("text", ["a.b.c", ".a", "a.", "a..b", '"a', 'a"b', '"a"b', '""', '"".a', '"a".', "."])
def test_table_that_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"PGVECTOR_TABLE .* is not a table name") as error:
        load(PGVECTOR_TABLE=text)
    assert 'write table, schema.table or "Schema"."Table"' in failure(error)


@pytest.mark.parametrize("variable", ["PGVECTOR_TABLE", "PGVECTOR_COL_ID", "PGVECTOR_COL_VECTOR"])
@pytest.mark.parametrize("text", ["a" * 64, "é" * 32])
def test_name_that_the_server_would_cut_is_refused(variable: str, text: str) -> None:
    with pytest.raises(SettingsError, match=f"{variable} .* is longer than 63 bytes"):
        load(**{variable: text})


@given(schema=TEXTS, table=TEXTS)
def test_quoted_table_is_read_back_exactly(schema: str, table: str) -> None:
    quoted = ".".join('"{}"'.format(name.replace('"', '""')) for name in (schema, table))
    if check_identifier(schema) or check_identifier(table):
        with pytest.raises(SettingsError, match="longer than 63 bytes"):
            load(PGVECTOR_TABLE=quoted)
    else:
        mapping = load(PGVECTOR_TABLE=quoted).table
        assert (mapping.schema, mapping.table) == (schema, table)


def test_columns_are_taken_as_they_are() -> None:
    mapping = load(
        PGVECTOR_COL_ID="Doc Id",
        PGVECTOR_COL_CONTENT="text",
        PGVECTOR_COL_METADATA='a"b.c',
        PGVECTOR_COL_VECTOR="表",
    ).table
    assert mapping.columns == ("Doc Id", "text", 'a"b.c', "表")


def test_two_columns_of_one_name_are_refused() -> None:
    with pytest.raises(SettingsError, match="names a column that another variable names too") as error:
        load(PGVECTOR_COL_CONTENT="embedding")
    assert "PGVECTOR_COL_CONTENT" in failure(error)


def shown_forms(thing: object) -> list[str]:
    return [repr(thing), str(thing), f"{thing}", f"{thing!a}", f"{thing!r:>200}", f"{[thing]} {(thing,)}"]


@given(TEXTS)
def test_secret_is_shown_nowhere(password: str) -> None:
    """Whatever the password is, every shown form is that of any other password."""
    for text, other in ((password, "another"), (CANARY, "another")):
        assert shown_forms(Secret(text)) == shown_forms(Secret(other))
        assert f"{Secret(text):>20}" == f"{Secret(other):>20}"
        endpoint = load(**MAIN, DB_PASSWORD=text).endpoint("main")
        assert endpoint.password is not None
        assert endpoint.password.reveal() == text
        assert shown_forms(endpoint) == shown_forms(load(**MAIN, DB_PASSWORD=other).endpoint("main"))
        settings = load(**MAIN, DB_PASSWORD=text)
        assert shown_forms(settings) == shown_forms(load(**MAIN, DB_PASSWORD=other))
        assert shown_forms(dict(settings.values)) == shown_forms(dict(load(**MAIN, DB_PASSWORD=other).values))
        assert list(settings.origins()) == list(load(**MAIN, DB_PASSWORD=other).origins())


def test_secret_is_neither_pickled_nor_copied_nor_written_as_json() -> None:
    endpoint = load(**MAIN, DB_PASSWORD=CANARY).endpoint("main")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for thing in (Secret(CANARY), endpoint):
            with pytest.raises(TypeError) as error:
                pickle.dumps(thing, protocol)
            assert CANARY not in str(error.value)
    for action in (copy.deepcopy, asdict, lambda e: json.dumps(e.password)):
        with pytest.raises(TypeError) as error:
            action(endpoint)
        assert CANARY not in str(error.value)


def test_secrets_are_equal_by_their_text_alone() -> None:
    assert Secret("a") == Secret("a") != Secret("b")
    assert Secret("a") != "a"
    assert len({Secret("a"), Secret("a"), Secret("b")}) == 2


def test_empty_password_leaves_it_to_libpq() -> None:
    assert load(**MAIN, DB_PASSWORD="").endpoint("main").password is None


def test_origins_show_every_variable_once_with_its_place(env_file: Path) -> None:
    env_file.write_text(f"\nDB_HOST=file.test\nDB_PASSWORD='{CANARY.replace(chr(39), chr(92) + chr(39))}'\n")
    settings = Settings.load(env_file, {"DB_USER": "app", "PGVECTOR_PASSWORD": "", "LEGACY_PASSWORD": CANARY})
    origins = {origin.variable: (origin.shown, origin.where) for origin in settings.origins()}
    assert list(origins) == list(DEFAULTS)
    assert origins["DB_HOST"] == ("file.test", f"{env_file}:2")
    assert origins["DB_USER"] == ("app", "environment")
    assert origins["DB_PORT"] == ("5432", "default")
    assert origins["DB_NAME"] == ("", "not set")
    assert origins["DB_PASSWORD"] == ("********", f"{env_file}:3")
    assert origins["LEGACY_PASSWORD"] == ("********", "environment")
    assert origins["PGVECTOR_PASSWORD"] == ("", "environment")
    assert CANARY not in repr(list(settings.origins()))
    assert {name for name in DEFAULTS if "PASSWORD" in name} == SECRET_VARIABLES


@pytest.mark.parametrize("password", ["s3cr3t", "s3@cr3t", "s3/cr3t", "p@ss/s3cr3t@x", "s3 cr3t"])
def test_origins_hide_the_user_part_of_an_address(password: str) -> None:
    address = f"http://user:{password}@host:11434"
    for variable in ("OLLAMA_BASE_URL", "DB_HOST"):
        shown = {o.variable: o.shown for o in load(**{variable: address}).origins()}[variable]
        assert shown == "http://********@host:11434"
