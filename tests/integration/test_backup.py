"""A backup is pg_dump's archive of the table: by a client that fits, read back whole, without a secret in sight."""

import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg2.extensions
import pytest
from psycopg2 import sql

from pipeline.cutover.backup import (
    SUMS_FILE,
    BackupPlan,
    Dump,
    check_room,
    dump_table,
    file_name,
    look_at_dump,
    plan_backup,
)
from pipeline.cutover.client import find_client
from pipeline.endpoints import Secret
from pipeline.errors import ConflictError, PipelineError, RefusedError, RejectedError, StatementError, StoppedError
from pipeline.postgres.crew import Crew
from pipeline.postgres.fence import put_fence
from pipeline.postgres.fence_sql import Fence
from pipeline.postgres.tables import describe
from pipeline.settings import TableMapping
from tests.data import content, fill_generated
from tests.preflights import endpoint
from tests.proxy import Proxy
from tests.support import CANARY, Database
from tests.tls import TlsFront, make_authority

ROWS = 200


@pytest.fixture
def crew() -> Iterator[Crew]:
    with Crew() as made:
        yield made


def planned(crew: Crew, database: Database, table: TableMapping | None = None, name: str = "legacy") -> BackupPlan:
    return crew.call(plan_backup, crew, endpoint(database, name), table or TableMapping())


def dumped(crew: Crew, plan: BackupPlan, folder: Path, name: str = "x.dump") -> Dump:
    return crew.call(dump_table, crew, plan, folder / name)


def restored(plan: BackupPlan, file: Path, into: Database) -> None:
    """Restore as a person would, by the program that made it."""
    done = restore(plan, file, into, "--exit-on-error")
    done.check_returncode()


def restore(plan: BackupPlan, file: Path, into: Database, *more: str) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "PGPASSWORD": into.password}
    where = ("-h", into.server.host, "-p", str(into.server.port), "-U", into.user, "-d", into.name)
    command = [str(plan.client.restore), "--no-owner", *more, *where, str(file)]
    return subprocess.run(command, env=env, check=False, capture_output=True, text=True)


def answer(*command: str | Path, cwd: Path | None = None) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True, cwd=cwd).stdout


@pytest.mark.parametrize("release", ["16", "18", "16.2"])
def test_backup_of_every_release_is_restored_row_by_row(
    release: str, new_database: Callable[..., Database], crew: Crew, tmp_path: Path
) -> None:
    database, other = new_database(release), new_database(release)
    for one in (database, other):
        one.execute("CREATE EXTENSION vector")
    fill_generated(database, ROWS, dimensions=16)
    database.execute("CREATE INDEX ON embeddings USING hnsw (embedding vector_cosine_ops)")
    plan = planned(crew, database)
    assert plan.client.major == int(release[:2])
    done = dumped(crew, plan, tmp_path)
    assert (done.rows, done.client, done.notes) == (ROWS, plan.client.text, ())
    assert done.bytes == done.path.stat().st_size > 0
    assert done.sha256 == hashlib.sha256(done.path.read_bytes()).hexdigest()
    restored(plan, done.path, other)
    assert content(other) == content(database)
    indexes = "SELECT indexdef FROM pg_indexes WHERE tablename = 'embeddings' ORDER BY 1"
    assert other.rows(indexes) == database.rows(indexes)


def test_files_are_private_and_can_be_checked(legacy: Database, crew: Crew, tmp_path: Path) -> None:
    fill_generated(legacy, ROWS, dimensions=3)
    plan, folder = planned(crew, legacy), tmp_path / "new" / "backups"
    check_room(folder, plan.needed_bytes, 0, make=True)
    # As a process leaves it that was killed; anybody may read it.
    (folder / "one.dump.partial").write_bytes(b"x" * 1_000_000)
    first, second = (dumped(crew, plan, folder, name) for name in ("one.dump", "two.dump"))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in folder.iterdir()} == {"one.dump", "two.dump", SUMS_FILE}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert answer("sha256sum", "-c", SUMS_FILE, cwd=folder) == "one.dump: OK\ntwo.dump: OK\n"
    # After a crash between the archive and its sum.
    (folder / SUMS_FILE).write_text("0  one.dump\n")
    again = crew.call(look_at_dump, crew, plan, first.path)
    assert replace(again, seconds=first.seconds) == first
    assert (folder / SUMS_FILE).read_text() == f"{first.sha256}  one.dump\n"
    with pytest.raises(RefusedError, match="is there already"):
        dumped(crew, plan, folder, "two.dump")
    assert hashlib.sha256(second.path.read_bytes()).hexdigest() == second.sha256


def test_archive_that_is_cut_off_or_of_another_table_is_no_backup(legacy: Database, crew: Crew, tmp_path: Path) -> None:
    fill_generated(legacy, ROWS, dimensions=768)
    legacy.execute("CREATE TABLE other (id int PRIMARY KEY)")
    plan = planned(crew, legacy)
    done = dumped(crew, plan, tmp_path)
    whole = done.path.read_bytes()
    # Its list is whole, and stands at the beginning.
    done.path.write_bytes(whole[: len(whole) // 2])
    assert "TABLE DATA" in answer(plan.client.restore, "--list", done.path)
    with pytest.raises(RefusedError, match="cannot be read back"):
        crew.call(look_at_dump, crew, plan, done.path)
    other = planned(crew, legacy, TableMapping(table="other"))
    elsewhere = dumped(crew, other, tmp_path, "other.dump")
    assert elsewhere.rows == 0
    with pytest.raises(RefusedError, match=r"holds no rows of public\.embeddings"):
        crew.call(look_at_dump, crew, plan, elsewhere.path)


def test_names_that_need_quotes_are_taken_literally(
    new_database: Callable[..., Database], crew: Crew, tmp_path: Path
) -> None:
    database, other = new_database("16"), new_database("16")
    schema, name = 'a.b "c"', "My * Docs? (é|$x) \\d"
    table = sql.Identifier(schema, name)
    for one in (database, other):
        one.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
    database.execute(
        sql.SQL(
            "CREATE TABLE {0} (id serial PRIMARY KEY, content text); CREATE TABLE {1}.decoy (id int);"
            "INSERT INTO {0} (content) VALUES ('one'), (E'two\\nlines\\n\\\\.\\n'), (NULL)"
        ).format(table, sql.Identifier(schema))
    )
    plan = planned(crew, database, TableMapping(schema=schema, table=name))
    done = dumped(crew, plan, tmp_path, file_name(plan, "20260101T000000Z"))
    assert (done.rows, done.path.name) == (3, "legacy-a.b__c_.My___Docs______x___d-20260101T000000Z.dump")
    restored(plan, done.path, other)
    rows = sql.SQL("SELECT * FROM {} ORDER BY id").format(table)
    assert other.rows(rows) == database.rows(rows)
    assert other.rows("SELECT count(*) FROM pg_class WHERE relname = 'decoy'") == [(0,)]


def test_every_part_of_a_partitioned_table_is_in_it(
    new_database: Callable[..., Database], crew: Crew, tmp_path: Path
) -> None:
    database, other = new_database("16"), new_database("16")
    for one in (database, other):
        one.execute("CREATE SCHEMA parts")
    database.execute(
        """CREATE TABLE embeddings (id int PRIMARY KEY, content text) PARTITION BY RANGE (id);
        CREATE TABLE parts.low PARTITION OF embeddings FOR VALUES FROM (0) TO (50);
        CREATE TABLE parts.high PARTITION OF embeddings FOR VALUES FROM (50) TO (100) PARTITION BY RANGE (id);
        CREATE TABLE parts."high 1" PARTITION OF parts.high FOR VALUES FROM (50) TO (75);
        CREATE TABLE parts."high 2" PARTITION OF parts.high FOR VALUES FROM (75) TO (100);
        INSERT INTO embeddings SELECT i, 'text ' || i FROM generate_series(0, 99) AS i"""
    )
    plan = planned(crew, database)
    assert [(one.name, one.has_rows) for one in plan.relations] == [
        *(("high", False), ("high 1", True), ("high 2", True), ("low", True), ("embeddings", False))
    ]
    done = dumped(crew, plan, tmp_path)
    assert done.rows == 100
    restored(plan, done.path, other)
    rows = "SELECT tableoid::regclass::text, * FROM embeddings ORDER BY id"
    assert other.rows(rows) == database.rows(rows)


def test_names_go_in_the_encoding_of_the_database(servers: Callable[[str], Any], crew: Crew, tmp_path: Path) -> None:
    postgres = Database(server=servers("16"), name="postgres")
    with closing(postgres.connect()) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
        try:
            database = Database(server=postgres.server, name="latin")
            database.execute('CREATE TABLE "für" (id int); INSERT INTO "für" VALUES (1)')
            plan = planned(crew, database, TableMapping(table="für"))
            assert plan.codec == "iso8859_1"
            assert dumped(crew, plan, tmp_path).rows == 1
        finally:
            cursor.execute("DROP DATABASE latin WITH (FORCE)")


def test_column_options_of_a_patched_server_are_told_and_can_be_left_out(
    new_database: Callable[..., Database], crew: Crew, tmp_path: Path
) -> None:
    database, other = new_database("16"), new_database("16")
    database.execute("CREATE TABLE embeddings (id int PRIMARY KEY); INSERT INTO embeddings VALUES (1), (2)")
    # As such a server writes them; by hand, because this one refuses it.
    database.execute(
        "SET allow_system_table_mods = on; UPDATE pg_attribute SET attoptions = '{pg_attver=2}'"
        " WHERE attrelid = 'embeddings'::regclass AND attname = 'id'"
    )
    plan = planned(crew, database)
    done = dumped(crew, plan, tmp_path)
    assert done.rows == 2 and "grep -v pg_attver" in done.notes[0]
    with pytest.raises(subprocess.CalledProcessError):
        restored(plan, done.path, other)
    script = answer(plan.client.restore, "--file=-", "--section=pre-data", done.path)
    other.execute("\n".join(line for line in script.splitlines() if "pg_attver" not in line and line[:1] != "\\"))
    assert other.rows("SELECT * FROM public.embeddings") == []


def test_triggers_of_a_fence_are_told_and_passed_over(
    legacy: Database, new_database: Callable[..., Database], crew: Crew, tmp_path: Path
) -> None:
    fill_generated(legacy, ROWS, dimensions=3)
    other = new_database("16")
    other.execute("CREATE EXTENSION vector")
    way = endpoint(legacy, "legacy")

    def fence() -> None:
        with crew.session(way, "cutover") as session:
            put_fence(crew, session, describe(session, TableMapping()), Fence(message="moved", through="pipeline"))

    crew.call(fence)
    plan = planned(crew, legacy)
    done = dumped(crew, plan, tmp_path)
    assert len(done.notes) == 1 and "the pipeline's own triggers" in done.notes[0]
    complaints = restore(plan, done.path, other).stderr
    assert complaints.count("pipeline_fence() does not exist") == 2 and "errors ignored on restore: 2" in complaints
    assert content(other) == content(legacy)


@pytest.mark.parametrize("kind", ["VIEW", "MATERIALIZED VIEW"])
def test_what_holds_no_rows_of_its_own_is_refused(kind: str, legacy: Database, crew: Crew) -> None:
    legacy.execute(f"CREATE TABLE rows (id int); CREATE {kind} embeddings AS SELECT * FROM rows")
    with pytest.raises(RefusedError, match="no plain table") as refused:
        planned(crew, legacy)
    assert "--skip-backup" in refused.value.hint
    with pytest.raises(RefusedError, match=r"has no table public\.nothing"):
        planned(crew, legacy, TableMapping(table="nothing"))


def test_client_of_the_servers_version_is_preferred_then_the_next() -> None:
    assert find_client(160014).major == 16
    assert find_client(180004).major == 18
    # There is none of 17 here.
    assert find_client(170000).major == 18
    # Of two of one version the newer one: wheels carry 16.2 and 16.14.
    assert (find_client(160002).minor, find_client(160002).text) == (14, "16.14")
    for folder in (Path("/usr/lib/postgresql/15/bin"),):
        if (folder / "pg_dump").exists():
            assert find_client(150000).dump == folder / "pg_dump"
    with pytest.raises(RefusedError) as refused:
        find_client(190001)
    assert refused.value.fact.startswith("there is no pg_dump here that fits PostgreSQL 19; found: ")
    assert "18.4 (" in refused.value.fact
    assert all(word in refused.value.hint for word in ("postgresql-client-19", "--pg-dump PATH", "--skip-backup"))


def test_client_that_is_named_is_the_only_one(tmp_path: Path) -> None:
    real = find_client(160000)
    assert find_client(160000, real.dump) == find_client(160000, real.dump.parent) == real
    lonely = tmp_path / "pg_dump"
    lonely.symlink_to(real.dump)
    for named, version, why in (
        (real.dump, 180004, f"found: {real.text} "),
        (lonely, 160000, "without its pg_restore"),
        (tmp_path / "nothing", 160000, "no file"),
        (Path("/bin/true"), 160000, "says no version"),
    ):
        with pytest.raises(RefusedError, match=why):
            find_client(version, named)
    wrapper = Path("/usr/bin/pg_dump")
    if wrapper.resolve().name == "pg_wrapper":
        with pytest.raises(RefusedError, match="runs one version or another"):
            find_client(150000, wrapper)


def test_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with pytest.raises(RefusedError) as refused:
        check_room(folder, 5_000_000_000, 10**18)
    assert "5.0 GB are needed and 1,000,000,000.0 GB have to stay free" in refused.value.fact
    assert str(folder) in refused.value.fact and "--skip-backup" in refused.value.hint
    assert not folder.exists()
    assert check_room(folder, 1, 0) > 0 and not folder.exists()
    (tmp_path / "file").touch()
    for make in (False, True):
        with pytest.raises(RefusedError, match="no backup can be written into"):
            check_room(tmp_path / "file", 1, 0, make=make)


def test_full_disk_leaves_no_file(legacy: Database, crew: Crew, tmp_path: Path) -> None:
    fill_generated(legacy, 2_000, dimensions=768)
    plan = planned(crew, legacy)
    # The programs that this test starts may write files of 1 MB, as where a disk is full.
    limited = tmp_path / "pg_dump"
    limited.write_text(f'#!/bin/sh\nulimit -f 1024\ntrap "" XFSZ\nexec {plan.client.dump} "$@"\n')
    limited.chmod(0o755)
    plan = replace(plan, client=replace(plan.client, dump=limited))
    with pytest.raises(StatementError, match="is full") as failed:
        dumped(crew, plan, tmp_path)
    assert str(tmp_path) in failed.value.fact
    assert [path.name for path in tmp_path.iterdir()] == ["pg_dump"]


def test_no_secret_is_in_a_command_line_an_error_or_another_variable(
    legacy: Database, crew: Crew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_generated(legacy, ROWS, dimensions=3)
    plan = planned(crew, legacy)
    for name in ("DB_PASSWORD", "LEGACY_PASSWORD", "PGVECTOR_PASSWORD", "PGHOST", "PGOPTIONS", "PGSERVICE"):
        monkeypatch.setenv(name, "elsewhere")
    spy = tmp_path / "pg_dump"
    spy.write_text(f'#!/bin/sh\nenv > {tmp_path}/env\necho "$@" > {tmp_path}/arguments\nexec {plan.client.dump} "$@"\n')
    spy.chmod(0o755)
    plan = replace(plan, client=replace(plan.client, dump=spy))
    dumped(crew, plan, tmp_path)
    seen = (tmp_path / "env").read_text()
    assert CANARY not in (tmp_path / "arguments").read_text()
    assert seen.count(CANARY) == 1 and f"PGPASSWORD={CANARY}" in seen and "elsewhere" not in seen
    assert "HOME=" in seen
    wrong = replace(plan, endpoint=replace(plan.endpoint, password=Secret("wrong " + CANARY)))
    with pytest.raises(RejectedError) as failed:
        dumped(crew, wrong, tmp_path, "y.dump")
    assert failed.value.fact.endswith("the password of 'postgres' was refused, or there is no such role")
    assert not (tmp_path / "y.dump").exists()


def test_password_file_is_used_where_no_password_is_set(
    legacy: Database, crew: Crew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_generated(legacy, ROWS, dimensions=3)
    plan, passwords = planned(crew, legacy), tmp_path / "passwords"
    escaped = CANARY.replace("\\", "\\\\").replace(":", "\\:")
    passwords.write_text(f"*:{legacy.server.port}:*:postgres:{escaped}\n")
    passwords.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(passwords))
    plan = replace(plan, endpoint=replace(plan.endpoint, password=None))
    assert dumped(crew, plan, tmp_path).rows == ROWS
    passwords.unlink()
    with pytest.raises(RejectedError, match="a password is needed for postgres"):
        dumped(crew, plan, tmp_path, "y.dump")


def failing(crew: Crew, plan: BackupPlan, folder: Path) -> PipelineError:
    with pytest.raises(PipelineError) as failed:
        dumped(crew, plan, folder)
    assert list(folder.iterdir()) == [] and CANARY not in failed.value.fact + failed.value.hint
    return failed.value


def test_failures_are_told_in_our_words(legacy: Database, crew: Crew, tmp_path: Path) -> None:
    fill_generated(legacy, ROWS, dimensions=3)
    role = f"reader_{legacy.name}"
    legacy.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'")
    try:
        plan = planned(crew, legacy.as_role(role, "x"))
        denied = failing(crew, plan, tmp_path)
        assert isinstance(denied, RefusedError) and "permission denied for table embeddings" in denied.fact
        legacy.execute(f"GRANT SELECT ON embeddings TO {role}; ALTER TABLE embeddings ENABLE ROW LEVEL SECURITY")
        hidden = failing(crew, plan, tmp_path)
        assert isinstance(hidden, RefusedError) and "row-level security" in hidden.fact and "BYPASSRLS" in hidden.hint
        legacy.execute("ALTER TABLE embeddings RENAME TO gone")
        assert "is not there any more" in failing(crew, plan, tmp_path).fact
    finally:
        legacy.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_lock_is_waited_for_only_a_while(
    legacy: Database, connected: psycopg2.extensions.connection, crew: Crew, tmp_path: Path
) -> None:
    fill_generated(legacy, ROWS, dimensions=3)
    plan = planned(crew, legacy)
    connected.cursor().execute("LOCK TABLE embeddings IN ACCESS EXCLUSIVE MODE")
    failed = failing(crew, plan, tmp_path)
    assert isinstance(failed, ConflictError) and "a lock was waited for in vain" in failed.fact


def test_stop_ends_the_program_and_leaves_no_file(
    legacy: Database, connected: psycopg2.extensions.connection, tmp_path: Path
) -> None:
    fill_generated(legacy, ROWS, dimensions=3)
    backends = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pipeline backup' AND state = 'active'"
    with Crew() as crew:
        plan = planned(crew, legacy)
        connected.cursor().execute("LOCK TABLE embeddings IN ACCESS EXCLUSIVE MODE")
        future = crew.start(dump_table, crew, plan, tmp_path / "x.dump")
        while not legacy.value(backends):
            assert not future.done()
            time.sleep(0.02)
        assert [path.name for path in tmp_path.iterdir()] == ["x.dump.partial"]
        crew.close()
        with pytest.raises(StoppedError):
            future.result(timeout=0)
    assert list(tmp_path.iterdir()) == []


def test_program_that_is_ended_from_outside_is_a_failure(
    legacy: Database, connected: psycopg2.extensions.connection, crew: Crew, tmp_path: Path
) -> None:
    fill_generated(legacy, ROWS, dimensions=3)
    plan = planned(crew, legacy)
    connected.cursor().execute("LOCK TABLE embeddings IN ACCESS EXCLUSIVE MODE")
    children: list[int] = []

    def end(size: int) -> None:
        if not children:
            children.append(_child_of(plan.client.dump))
            os.kill(children[0], signal.SIGKILL)

    with pytest.raises(StatementError, match="it said nothing"):
        crew.call(dump_table, crew, plan, tmp_path / "x.dump", end)
    assert list(tmp_path.iterdir()) == []


def _child_of(program: Path) -> int:
    """Return the child of this process that runs a program."""
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        for child in (task / "children").read_text().split():
            if Path(f"/proc/{child}/exe").resolve() == program.resolve():
                return int(child)
    raise AssertionError("no such child")


def test_encryption_of_our_own_session_is_asked_of_the_client_too(legacy: Database, crew: Crew, tmp_path: Path) -> None:
    fill_generated(legacy, ROWS, dimensions=3)
    authority = make_authority(tmp_path)
    wheel = find_client(160000)
    with Proxy(legacy.server.host, legacy.server.port) as proxy, TlsFront(proxy, authority) as front:
        way = replace(endpoint(legacy, "legacy"), port=front.port)
        with pytest.raises(RefusedError, match=r"fits PostgreSQL 16 and speaks TLS; found: .*built without TLS"):
            crew.call(plan_backup, crew, way, TableMapping(), wheel.dump)
        assert front.encrypted > 0


def test_bytes_are_told_while_it_is_written(legacy: Database, crew: Crew, tmp_path: Path) -> None:
    fill_generated(legacy, 3_000, dimensions=768)
    told = list[int]()
    plan = planned(crew, legacy)
    done = crew.call(dump_table, crew, plan, tmp_path / "x.dump", told.append)
    assert told == sorted(told) and len(told) > 0 and told[-1] <= done.bytes
    # What was asked for is enough, and not much more than that.
    assert plan.needed_bytes / 3 < done.bytes < plan.needed_bytes
