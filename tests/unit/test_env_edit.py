"""The switch in a .env file and the way back: which lines change, to what, and when a person has to do it."""

from pathlib import Path

import pytest

from pipeline.cutover.envfile import plan_switch
from pipeline.cutover.envrestore import plan_restore
from pipeline.cutover.envwrite import EnvEdit
from pipeline.errors import RefusedError, SettingsError
from pipeline.settings import Settings

CANARY = "c4n@ry/%41'pa$$ wörd"
DB = "DB_HOST=main.test\nDB_PORT=5433\nDB_USER=app\nDB_PASSWORD=new-p\nDB_NAME=application\n"
PGVECTOR = (
    "PGVECTOR_HOST=legacy.test\nPGVECTOR_PORT=5432\nPGVECTOR_USER=reader\nPGVECTOR_PASSWORD=old-p\nPGVECTOR_DB=vec\n"
)
SWITCHED = (
    "PGVECTOR_HOST=main.test\nLEGACY_HOST=legacy.test\nPGVECTOR_PORT=5433\nLEGACY_PORT=5432\n"
    "PGVECTOR_USER=app\nLEGACY_USER=reader\nPGVECTOR_PASSWORD=new-p\nLEGACY_PASSWORD=old-p\n"
    "PGVECTOR_DB=application\nLEGACY_DB=vec\n"
)


@pytest.fixture
def env(tmp_path: Path) -> Path:
    return tmp_path / ".env"


def write(path: Path, text: str) -> None:
    path.write_bytes(text.encode())


def switch(path: Path, **environ: str) -> EnvEdit:
    return plan_switch(path, Settings.load(path, environ), with_mock_line=False)


def with_mock(path: Path, environ: dict[str, str]) -> EnvEdit:
    return plan_switch(path, Settings.load(path, environ), with_mock_line=True)


def switched(path: Path, text: str, **environ: str) -> str:
    """Return what the switch makes of a text, and check the second run, the endpoints, and the way back."""
    write(path, text)
    before = Settings.load(path, environ)
    edit = plan_switch(path, before, with_mock_line=False)
    assert edit.before == text.encode()
    path.write_bytes(edit.after)
    after = Settings.load(path, {})
    assert after.endpoint("legacy") == before.endpoint("legacy")
    assert not after.use_mock
    again = plan_switch(path, Settings.load(path, environ), with_mock_line=False)
    assert not again.changed and again.changes == ()
    copy = path.with_name("copy")
    write(copy, text)
    assert plan_restore(path, copy, Settings.load(path, environ)).after == edit.before
    return edit.after.decode()


def refusal(path: Path, *secrets: str, **environ: str) -> str:
    with pytest.raises(RefusedError) as raised:
        switch(path, **environ)
    error = raised.value
    assert error.hint
    assert not any(secret in error.fact + error.hint + repr(error.__context__) for secret in (CANARY, *secrets))
    return error.fact


def test_every_line_of_legacy_becomes_mains_with_the_old_one_below(env: Path) -> None:
    assert switched(env, DB + PGVECTOR) == DB + SWITCHED


def test_remark_behind_an_empty_value_stays_a_remark(env: Path) -> None:
    text = DB + PGVECTOR + "DB_SSLROOTCERT=/new.pem\nPGVECTOR_SSLROOTCERT=  # none yet\n"
    after = "DB_SSLROOTCERT=/new.pem\nPGVECTOR_SSLROOTCERT=  /new.pem  # none yet\nLEGACY_SSLROOTCERT=\n"
    assert switched(env, text) == DB + SWITCHED + after


def test_bare_password_gets_quotes_in_front_of_a_remark(env: Path) -> None:
    after = switched(env, DB + PGVECTOR.replace("=old-p", "='old-p' # mine"))
    assert "PGVECTOR_PASSWORD='new-p' # mine\nLEGACY_PASSWORD='old-p'\n" in after


def test_only_the_lines_that_have_to_change_are_changed(env: Path) -> None:
    text = (
        "\ufeff# The application's settings\r\n\r\nexport DB_HOST='main.test'  # 'the' host\r\nDB_USER=app\n"
        'DB_PASSWORD="p#1 x"\r\nDB_NAME = application\n\n\n'
        "#PGVECTOR_HOST=older.test\r\n  export PGVECTOR_HOST = legacy.test # don't touch\r\n"
        "KEY='-----BEGIN\r\nPGVECTOR is no = line\r\n-----END'\n"
        "PGVECTOR_USER=reader\t\nPGVECTOR_PASSWORD='it #is' # quoted\r\n\t\nPGVECTOR_DB=vec\n"
        'USE_MOCK_EMBEDDINGS="TRUE"\r\nPGVECTOR_TABLE=embeddings\nLAST=1'
    )
    assert switched(env, text) == (
        "\ufeff# The application's settings\r\n\r\nexport DB_HOST='main.test'  # 'the' host\r\nDB_USER=app\n"
        'DB_PASSWORD="p#1 x"\r\nDB_NAME = application\n\n\n'
        "#PGVECTOR_HOST=older.test\r\n  export PGVECTOR_HOST = 'main.test' # don't touch\r\n"
        "  export LEGACY_HOST = legacy.test\r\n"
        "KEY='-----BEGIN\r\nPGVECTOR is no = line\r\n-----END'\n"
        "PGVECTOR_USER=app\t\nLEGACY_USER=reader\n"
        "PGVECTOR_PASSWORD=\"p#1 x\" # quoted\r\nLEGACY_PASSWORD='it #is'\r\n\t\n"
        "PGVECTOR_DB=application\nLEGACY_DB=vec\n"
        'USE_MOCK_EMBEDDINGS="false"\r\nPGVECTOR_TABLE=embeddings\nLAST=1'
    )


def test_what_main_does_not_have_is_renamed_and_what_legacy_lacks_is_added(env: Path) -> None:
    main = "DB_HOST=main.test\nDB_USER=app\nDB_NAME=application\nDB_SSL=require\n"
    text = main + "PGVECTOR_HOST=l\nPGVECTOR_PORT=5440\nPGVECTOR_USER=r\nPGVECTOR_DB=v\n\n# the end\n"
    assert switched(env, text) == main + (
        "PGVECTOR_HOST=main.test\nLEGACY_HOST=l\nLEGACY_PORT=5440\nPGVECTOR_USER=app\nLEGACY_USER=r\n"
        "PGVECTOR_DB=application\nLEGACY_DB=v\nPGVECTOR_SSL=require\n\n# the end\n"
    )


def test_missing_final_line_end_stays_missing(env: Path) -> None:
    text = DB.replace("\n", "\r\n") + PGVECTOR.replace("\n", "\r\n").removesuffix("\r\n")
    assert switched(env, text) == (DB + SWITCHED).replace("\n", "\r\n").removesuffix("\r\n")


def test_legacy_lines_that_are_there_are_not_written_twice(env: Path) -> None:
    text = DB + PGVECTOR + "LEGACY_HOST='legacy.test'\nLEGACY_USER=reader\nLEGACY_PASSWORD=old-p\nLEGACY_DB=vec\n"
    after = switched(env, text)
    assert after.count("LEGACY_HOST") == after.count("LEGACY_DB") == after.count("LEGACY_PORT") == 1
    assert after.endswith("LEGACY_HOST='legacy.test'\nLEGACY_USER=reader\nLEGACY_PASSWORD=old-p\nLEGACY_DB=vec\n")


def test_what_main_does_not_have_becomes_the_default_where_legacy_has_its_own_line(env: Path) -> None:
    group = "LEGACY_HOST=l\nLEGACY_PORT=5440\nLEGACY_USER=r\nLEGACY_DB=v\nLEGACY_SSL=require\n"
    main = "DB_HOST=main.test\nDB_USER=app\nDB_NAME=application\n"
    after = switched(env, main + group.replace("LEGACY", "PGVECTOR").replace("5440", "'5440' # own") + group)
    assert after == main + (
        "PGVECTOR_HOST=main.test\nPGVECTOR_PORT=5432 # own\nPGVECTOR_USER=app\nPGVECTOR_DB=application\n"
        "PGVECTOR_SSL=\n" + group
    )


def test_line_that_the_application_cannot_see_stays_unseen(env: Path) -> None:
    text = DB + PGVECTOR.replace("PGVECTOR_DB=", "'PGVECTOR_DB'=")
    after = DB + SWITCHED.replace("PGVECTOR_DB=", "'PGVECTOR_DB'=").replace("LEGACY_DB=", "'LEGACY_DB'=")
    assert switched(env, text) == after


def test_part_of_a_group_leaves_the_rest_to_the_other_file(env: Path) -> None:
    write(env, "PGVECTOR_HOST=dev.test # mine\nX=1\n")
    environ = dict(line.split("=") for line in (DB + PGVECTOR.replace("PGVECTOR_PORT=5432\n", "")).splitlines())
    after = switch(env, **environ | {"PGVECTOR_HOST": "dev.test"}).after.decode()
    assert after == "PGVECTOR_HOST=main.test # mine\nLEGACY_HOST=dev.test\nPGVECTOR_PORT=5433\nX=1\n"


def test_legacy_lines_of_a_third_database_are_refused(env: Path) -> None:
    write(env, DB + PGVECTOR + "LEGACY_HOST=third.test\nLEGACY_USER=reader\nLEGACY_DB=vec\n")
    assert "two databases" in refusal(env, "third.test")


@pytest.mark.parametrize(
    ("line", "after"),
    [
        ("USE_MOCK_EMBEDDINGS=true", "USE_MOCK_EMBEDDINGS=false"),
        ("export USE_MOCK_EMBEDDINGS = 'yes' # for now", "export USE_MOCK_EMBEDDINGS = 'false' # for now"),
        ("USE_MOCK_EMBEDDINGS=0", "USE_MOCK_EMBEDDINGS=false"),
        ("USE_MOCK_EMBEDDINGS=false", "USE_MOCK_EMBEDDINGS=false"),
        ("USE_MOCK_EMBEDDINGS='false'", "USE_MOCK_EMBEDDINGS='false'"),
        ("# USE_MOCK_EMBEDDINGS=true", "# USE_MOCK_EMBEDDINGS=true"),
    ],
)
def test_mock_becomes_false_in_its_own_style(line: str, after: str, env: Path) -> None:
    assert switched(env, f"{line}\n{DB}{PGVECTOR}") == f"{after}\n{DB}{SWITCHED}"


@pytest.mark.parametrize("text", ["", "A=1", "A=1\r\n", "A=1\n\n", "A=1\n  ", "\ufeff", "USE_MOCK_EMBEDDINGS=true"])
def test_mock_line_is_added_where_asked_and_taken_out_again(text: str, env: Path) -> None:
    write(env, text)
    environ = dict(line.split("=") for line in (DB + PGVECTOR).splitlines())
    edit = with_mock(env, environ)
    env.write_bytes(edit.after)
    assert Settings.load(env, {}).values["USE_MOCK_EMBEDDINGS"].text == "false"
    assert not with_mock(env, environ).changed
    copy = env.with_name("copy")
    write(copy, text)
    assert plan_restore(env, copy, Settings.load(env, environ)).after == text.encode()


def test_files_of_a_group_are_edited_each_by_itself(env: Path, tmp_path: Path) -> None:
    base = DB + PGVECTOR
    over = "PGVECTOR_HOST=dev.test\nDB_HOST=dev-main.test\n"
    development = tmp_path / ".env.development"
    write(env, base)
    write(development, over)
    merged = {**dict(line.split("=") for line in (base + over).splitlines())}
    loose = tmp_path / "merged"
    write(loose, "".join(f"{name}={value}\n" for name, value in merged.items()))
    settings = Settings.load(loose, {})
    first = plan_switch(development, settings, with_mock_line=False).after.decode()
    second = plan_switch(env, settings, with_mock_line=False).after.decode()
    assert first == "PGVECTOR_HOST=dev-main.test\nLEGACY_HOST=dev.test\nDB_HOST=dev-main.test\n"
    assert second == DB + SWITCHED.replace("main.test", "dev-main.test")


@pytest.mark.parametrize(
    ("old", "password", "line"),
    [
        ("old", "plain-1", "PGVECTOR_PASSWORD=plain-1"),
        ("'old'", "plain-1", "PGVECTOR_PASSWORD='plain-1'"),
        ('"old"', "plain-1", 'PGVECTOR_PASSWORD="plain-1"'),
        ("old", "a #b", "PGVECTOR_PASSWORD='a #b'"),
        ("old", "a'b", 'PGVECTOR_PASSWORD="a\'b"'),
        ("'old'", "a'$b", 'PGVECTOR_PASSWORD="a\'$b"'),
        ('"old"', 'a"b', "PGVECTOR_PASSWORD='a\"b'"),
        ('"old"', r"a\nb", r"PGVECTOR_PASSWORD='a\nb'"),
        ("old", r"a\x'b", r'''PGVECTOR_PASSWORD="a\x'b"'''),
        ("'old' # both", "a", "PGVECTOR_PASSWORD='a' # both"),
    ],
)
def test_value_of_the_environment_is_quoted_for_both_readers(old: str, password: str, line: str, env: Path) -> None:
    text = PGVECTOR.replace("=old-p", f"={old}")
    environ = dict(line.split("=") for line in DB.splitlines()) | {"DB_PASSWORD": password}
    assert line in switched(env, text, **environ).splitlines()


@pytest.mark.parametrize("password", ["a'b\"c", "a\\", "'\\n", "two\nlines", f"{CANARY}\\n"])
def test_value_that_no_quotes_hold_for_both_is_left_to_a_person(password: str, env: Path) -> None:
    write(env, PGVECTOR)
    environ = dict(line.split("=") for line in DB.splitlines()) | {"DB_PASSWORD": password}
    assert "PGVECTOR_PASSWORD" in refusal(env, password, **environ)


@pytest.mark.parametrize("name", ["DB_HOST", "DB_PASSWORD", "PGVECTOR_HOST"])
def test_environment_that_says_otherwise_than_the_file_is_refused(name: str, env: Path) -> None:
    write(env, DB + PGVECTOR)
    assert name in refusal(env, "elsewhere", **{name: "elsewhere"})


def test_bad_file_is_an_error_with_its_line(env: Path) -> None:
    write(env, DB + PGVECTOR + "PGVECTOR_HOST=again\n")
    with pytest.raises(SettingsError, match=r"PGVECTOR_HOST is set twice"):
        plan_switch(env, Settings.load(None, {"DB_HOST": "x"}), with_mock_line=False)


def test_edit_shows_no_value(env: Path) -> None:
    write(env, DB.replace("new-p", "c4nary") + PGVECTOR.replace("old-p", "c4nary2"))
    edit = switch(env)
    assert "c4nary" not in repr(edit) + str(edit.changes)
    assert edit.changes[:2] == ("PGVECTOR_HOST: main's", "LEGACY_HOST: added, the old PGVECTOR_HOST")


@pytest.fixture
def copy(env: Path) -> Path:
    """Switch a file and return the copy from before."""
    text = "FIRST=1\n" + DB + PGVECTOR + "PGVECTOR_SSL=require # old\nUSE_MOCK_EMBEDDINGS=true\nLAST=1\n"
    write(env, text)
    copy = env.with_name(".env.before")
    write(copy, text)
    env.write_bytes(switch(env).after)
    return copy


def restored(env: Path, copy: Path) -> str:
    return plan_restore(env, copy, Settings.load(env, {})).after.decode()


def test_other_edits_since_are_kept_by_the_way_back(env: Path, copy: Path) -> None:
    text = env.read_text()
    assert "LEGACY_SSL=require # old\n" in text
    text = text.replace("FIRST=1\n", "# a word\nFIRST=2\n").replace("LAST=1\n", "NEW=1\n").replace("# old", "# older")
    write(env, text.replace("LEGACY_HOST", "# between\r\n\nLEGACY_HOST") + "MORE=1")
    before = copy.read_text().replace("FIRST=1\n", "# a word\nFIRST=2\n").replace("LAST=1\n", "NEW=1\n")
    before = before.replace("# old", "# older").replace("legacy.test\n", "legacy.test\n# between\r\n\n")
    assert restored(env, copy) == before + "MORE=1"


def test_restored_file_is_left_alone(env: Path, copy: Path) -> None:
    write(env, restored(env, copy) + "# since\n")
    edit = plan_restore(env, copy, Settings.load(env, {}))
    assert not edit.changed and edit.changes == ()


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("PGVECTOR_HOST=main.test", "PGVECTOR_HOST=other.test", "PGVECTOR_HOST"),
        ("PGVECTOR_HOST=main.test\n", "", "PGVECTOR_HOST"),
        ("LEGACY_PASSWORD=old-p", "LEGACY_PASSWORD=c4nary", "LEGACY_PASSWORD"),
        ("USE_MOCK_EMBEDDINGS=false", "USE_MOCK_EMBEDDINGS=no", "USE_MOCK_EMBEDDINGS"),
        ("LEGACY_SSL=require", "LEGACY_SSL=prefer", "LEGACY_SSL"),
    ],
)
def test_switched_variable_with_another_value_is_left_to_a_person(
    old: str, new: str, name: str, env: Path, copy: Path
) -> None:
    write(env, env.read_text().replace(old, new, 1))
    settings = Settings.load(env, {})
    with pytest.raises(RefusedError) as raised:
        plan_restore(env, copy, settings)
    assert name in raised.value.fact and str(copy) in raised.value.hint
    assert not any(value in raised.value.fact + raised.value.hint for value in ("c4nary", "other.test", "old-p"))
