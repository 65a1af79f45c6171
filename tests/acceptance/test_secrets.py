"""A password and a row's text, followed everywhere: outputs, arguments of processes, the ledger, the servers' logs."""

import base64
import json
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
from psycopg2 import sql

from pipeline.cli import cli
from pipeline.demo.servers import free_port
from pipeline.errors import (
    EXIT_DIFFERENCES,
    EXIT_ERROR,
    EXIT_OK,
    EXIT_REFUSED,
    EXIT_TERMINATED,
    EXIT_UNREACHABLE,
    EXIT_USAGE,
)
from tests.support import CANARY, Database, Outcome, environment, pipeline, run, start

DIMENSIONS = 3
# What a message could quote of the password: a parser cuts it at @, / or %, and a URL encodes it.
TOKEN = "canary-token-31c9"
FRAGMENTS = (
    *("canary-pa", "w@rd/%41", "rd/%41'", TOKEN),
    quote(CANARY, safe="")[9:],
    base64.b64encode(CANARY.encode()).decode(),
)
TEXT = "canary-row 7f3a: what only the patient may read"
EMBEDDINGS = f"""CREATE EXTENSION vector; CREATE TABLE public.embeddings (id uuid PRIMARY KEY
    DEFAULT gen_random_uuid(), content text, metadata jsonb, embedding public.vector(3));
    INSERT INTO public.embeddings (content, metadata, embedding) SELECT '{TEXT}', '{{"note": "{TEXT}"}}',
    ARRAY[i, 1, 2]::public.vector FROM generate_series(1, 5) AS i"""
LEDGER = "SELECT relname FROM pg_class WHERE relnamespace = 'pipeline'::regnamespace AND relkind = 'r'"


def hidden(text: str, *, text_too: bool = True) -> None:
    """Check that neither the password, in any form, nor a row's text is shown."""
    for fragment in (*FRAGMENTS, *([TEXT, TEXT[:15]] if text_too else [])):
        assert fragment not in text, f"{fragment!r} is shown in:\n{text}"


@dataclass(frozen=True, kw_only=True)
class Pair:
    legacy: Database
    main: Database
    ollama: str

    def env(self, **more: str) -> dict[str, str]:
        settings = {"EMBEDDING_DIMENSIONS": str(DIMENSIONS), "OLLAMA_BASE_URL": self.ollama}
        return environment(legacy=self.legacy, main=self.main, **(settings | more))

    def logs(self) -> Iterator[tuple[Path, int]]:
        for database in (self.legacy, self.main):
            yield database.server.log, database.server.log.stat().st_size


@pytest.fixture
def ollama() -> Iterator[str]:
    """Return the address of a server that embeds every text alike, with a token in front of it."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
            body = json.dumps({"embeddings": [[1.0, 0.0, 0.0] for _ in texts]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://app:{TOKEN}@127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def pair(new_database: Callable[..., Database], main_template: Callable[[int], str], ollama: str) -> Pair:
    legacy = new_database("16")
    legacy.execute(EMBEDDINGS)
    return Pair(legacy=legacy, main=new_database("18", main_template(DIMENSIONS)), ollama=ollama)


# Every command with arguments that make it work; a new one without a case here fails the first test.
COMMANDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "settings": ((), ("--json",)),
    "mock": ((), ("--json",)),
    "preflight": ((), ("--json",)),
    "copy": ((), ("--json",)),
    "quarantine": ((), ("--json",)),
    "verify": ((), ("--json",)),
    "baseline": (("capture",), ("capture", "--json")),
    "diff": ((), ("--deep",)),
    "sync": ((), ("--json",), ("--dry-run",)),
    "status": ((), ("--json",)),
    "search": (("some words",), ("some words", "--json")),
    "demo": (("--stop",),),
    "cutover": ((), ("--json",)),
    "rollback": ((), ("--json",)),
    "finalize": (("--yes", "--json"),),
}
CONNECTING = (
    *("preflight", "copy", "quarantine", "baseline", "verify", "diff", "sync", "status", "search"),
    *("cutover", "rollback", "finalize"),
)
# A cutover has to be done before these work: all of it is followed in a test of its own.
AFTER_A_CUTOVER = frozenset({"finalize"})
# search is asked for texts, and shows those that it finds.
SHOWS_TEXTS = frozenset({"search"})
# What finds nothing lists nothing.
LISTING = frozenset({"diff", "sync"})


def test_every_command_is_followed() -> None:
    assert set(COMMANDS) == set(cli.commands)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in AFTER_A_CUTOVER])
def test_success_shows_no_secret(pair: Pair, command: str, tmp_path: Path) -> None:
    if command in CONNECTING:
        pipeline("copy", env=pair.env()).expect(EXIT_OK)
    if command == "copy":
        pair.main.execute("TRUNCATE embeddings")
    for arguments in COMMANDS[command]:
        outcome = pipeline(command, *arguments, env=pair.env(TMPDIR=str(tmp_path))).expect(EXIT_OK)
        assert outcome.out or command in LISTING
        hidden(outcome.out + outcome.err, text_too=command not in SHOWS_TEXTS)


FAULTS: dict[str, tuple[dict[str, str], int]] = {
    "password wrong": ({"DB_PASSWORD": "canary-pa2", "PGVECTOR_PASSWORD": "canary-pa2"}, EXIT_ERROR),
    "port closed": ({"DB_PORT": "{closed}", "PGVECTOR_PORT": "{closed}"}, EXIT_UNREACHABLE),
    "host unknown": ({"DB_HOST": "main.invalid", "PGVECTOR_HOST": "legacy.invalid"}, EXIT_UNREACHABLE),
    "password in the host": ({"DB_HOST": f"app:{CANARY}@h", "PGVECTOR_HOST": f"app:{CANARY}@h"}, EXIT_USAGE),
    "password as port": ({"DB_PORT": CANARY, "PGVECTOR_PORT": CANARY}, EXIT_USAGE),
    "password in a number": ({"EMBEDDING_DIMENSIONS": CANARY}, EXIT_USAGE),
}


@pytest.mark.parametrize("command", CONNECTING)
@pytest.mark.parametrize("fault", FAULTS)
def test_failure_to_connect_shows_no_secret(pair: Pair, command: str, fault: str) -> None:
    changes, code = FAULTS[fault]
    closed = str(free_port())
    env = pair.env(**{name: value.replace("{closed}", closed) for name, value in changes.items()})
    # To preflight it is a finding like any other.
    found = command == "preflight" and code != EXIT_USAGE
    outcome = pipeline(command, *COMMANDS[command][-1], env=env).expect(EXIT_REFUSED if found else code)
    assert bool(outcome.out) is found
    assert found or "error: " in outcome.err
    hidden(outcome.out + outcome.err)


BAD_LINES = {
    "no name": f"{CANARY}\n",
    "no equals sign": f"DB_PASSWORD {CANARY}\n",
    "open quote": f"DB_PASSWORD='{CANARY}\nDB_HOST=h\n",
    "twice": f"DB_PASSWORD=a\nDB_PASSWORD={quote(CANARY)}\n",
    "cut": "DB_PASSWORD=canary-pa #b\n",
    "latin-1": "DB_PASSWORD=canary-pa\xe9\n",
    "number": "DB_PORT=canary-pa\nEMBEDDING_DIMENSIONS=canary-pa\n",
}


@pytest.mark.parametrize("line", BAD_LINES)
@pytest.mark.parametrize("command", [*CONNECTING, "settings", "mock"])
def test_bad_line_of_an_env_file_is_not_shown(command: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.env"
    path.write_bytes(BAD_LINES[line].encode("latin-1" if line == "latin-1" else "utf-8"))
    outcome = pipeline(command, *COMMANDS[command][-1], "--env-file", str(path), env=environment()).expect(EXIT_USAGE)
    assert "settings.env" in outcome.err
    hidden(outcome.out + outcome.err)


@pytest.mark.parametrize("command", ["copy", "verify", "status"])
@pytest.mark.parametrize(
    "url", ["postgresql://app:{}@h/db", "postgresql://h/db?password={}&user=a", "host=h password={}"]
)
def test_connection_string_with_a_password_is_not_repeated(command: str, url: str) -> None:
    for password in (CANARY, quote(CANARY, safe="")):
        outcome = pipeline(command, "--to", url.format(password), env=environment()).expect(EXIT_USAGE)
        hidden(outcome.out + outcome.err)


# What a server says of a row: the driver's message quotes it, ours must not.
RAISED = """CREATE FUNCTION public.complain(content text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
        RAISE EXCEPTION 'not this one: %', content USING DETAIL = content, HINT = content; END $$;
    ALTER TABLE public.embeddings ADD CHECK (public.complain(content))"""
REJECTIONS = {
    "check constraint": ("ALTER TABLE embeddings ADD CHECK (length(content) < 9)", EXIT_ERROR),
    "unique text": ("CREATE UNIQUE INDEX ON embeddings (content)", EXIT_ERROR),
    "not null": ("ALTER TABLE embeddings ADD CONSTRAINT m CHECK (metadata IS NULL)", EXIT_ERROR),
    "check that complains": (RAISED, EXIT_ERROR),
    "type that cannot take it": (
        "CREATE DOMAIN short AS text CHECK (length(VALUE) < 9); ALTER TABLE embeddings ALTER content TYPE short",
        EXIT_ERROR,
    ),
}


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("case", REJECTIONS)
def test_rejected_row_is_not_shown(pair: Pair, case: str, as_json: bool) -> None:
    statements, code = REJECTIONS[case]
    pair.main.execute(statements)
    outcome = pipeline("copy", *(["--json"] if as_json else []), env=pair.env()).expect(code)
    hidden(outcome.out + outcome.err)
    hidden(ledger(pair.main))


def ledger(database: Database) -> str:
    """Return everything that the ledger's tables hold, as text."""
    found = []
    for (table,) in database.rows(LEDGER):
        query = sql.SQL("SELECT to_jsonb(t)::text FROM {} AS t").format(sql.Identifier("pipeline", table))
        found += [f"{table}: {row}" for (row,) in database.rows(query)]
    return "\n".join(found)


@pytest.mark.parametrize("as_json", [False, True])
def test_differing_rows_are_named_by_key_alone(pair: Pair, as_json: bool) -> None:
    pipeline("copy", env=pair.env()).expect(EXIT_OK)
    pair.main.execute("UPDATE embeddings SET content = content || ' ' WHERE metadata IS NOT NULL")
    pair.main.execute("DELETE FROM embeddings WHERE ctid = (SELECT min(ctid) FROM embeddings)")
    outcome = pipeline("verify", *(["--json"] if as_json else []), env=pair.env()).expect(EXIT_DIFFERENCES)
    hidden(outcome.out + outcome.err)
    status = pipeline("status", "--json", env=pair.env()).expect(EXIT_OK)
    hidden(status.out + status.err)
    stored = ledger(pair.main)
    assert '"fail"' in stored
    assert '"source_label": "postgres@127.0.0.1:' in stored
    hidden(stored)


GATE = """CREATE FUNCTION public.gate() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
        WHILE NOT pg_catalog.pg_try_advisory_xact_lock_shared(7) LOOP PERFORM pg_catalog.pg_sleep(0.02); END LOOP;
        RETURN true;
    END $$;
    ALTER TABLE public.embeddings ADD CHECK (public.gate())"""


AT_WORK = """SELECT count(*) FROM pg_stat_activity
    WHERE query LIKE '%COPY%FROM STDIN%' AND pid <> pg_backend_pid()"""


def arguments_of_all_processes() -> str:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return "\n".join(found)


def test_running_and_ended_copy_leaves_no_secret_in_arguments_or_logs(pair: Pair) -> None:
    before = list(pair.logs())
    pair.main.execute(GATE)
    with closing(pair.main.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(7)")
        process = start("copy", env=pair.env())
        deadline = time.monotonic() + 20
        sampled = ""
        while not pair.main.value(
            "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%COPY%FROM STDIN%' AND pid <> pg_backend_pid()"
        ):
            sampled += arguments_of_all_processes()
            assert time.monotonic() < deadline
        sampled += arguments_of_all_processes()
        # The source's end of the stream dies first, so that the target hears of it in our words.
        pair.legacy.rows(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'pipeline%'"
        )
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert process.returncode == EXIT_TERMINATED
    assert "-m pipeline copy" in sampled
    hidden(sampled + out + err)
    pipeline("verify", env=pair.env(DB_PASSWORD="canary-pa2")).expect(EXIT_ERROR)
    pipeline("copy", env=pair.env(PGVECTOR_PASSWORD="canary-pa2")).expect(EXIT_ERROR)
    pipeline("copy", env=pair.env(DB_USER=TOKEN[:6], DB_PASSWORD=CANARY)).expect(EXIT_ERROR)
    written = ""
    for log, size in before:
        with log.open("rb") as file:
            file.seek(size)
            written += file.read().decode(errors="replace")
    assert "password authentication failed" in written
    hidden(written)


ALEMBIC = (
    *(("current",), ("history",), ("heads",), ("upgrade", "head", "--sql"), ("upgrade", "head"), ("check",)),
    *(("current", "--verbose"), ("downgrade", "0003:base", "--sql"), ("downgrade", "base")),
)


def test_alembic_shows_no_secret_while_it_works(empty_main: Database) -> None:
    for arguments in ALEMBIC:
        outcome = run("alembic", *arguments, env=environment(main=empty_main)).expect(EXIT_OK)
        hidden(outcome.out + outcome.err)


@pytest.mark.parametrize("arguments", [("upgrade", "head"), ("current",)])
@pytest.mark.parametrize("fault", FAULTS)
def test_alembic_shows_no_secret_where_it_fails(empty_main: Database, fault: str, arguments: tuple[str, ...]) -> None:
    changes, code = FAULTS[fault]
    closed = str(free_port())
    env = environment(main=empty_main) | {name: value.replace("{closed}", closed) for name, value in changes.items()}
    outcome = run("alembic", *arguments, env=env).expect(code)
    hidden(outcome.out + outcome.err)


def test_alembic_shows_no_row_of_the_table_that_it_finds(empty_main: Database) -> None:
    empty_main.execute(f"{EMBEDDINGS}; ALTER TABLE embeddings ALTER metadata TYPE json")
    outcome = run("alembic", "upgrade", "head", env=environment(main=empty_main)).expect(EXIT_REFUSED)
    hidden(outcome.out + outcome.err)


@pytest.mark.parametrize("line", BAD_LINES)
def test_alembic_does_not_show_a_bad_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.env"
    path.write_bytes(BAD_LINES[line].encode("latin-1" if line == "latin-1" else "utf-8"))
    outcome = run("alembic", "-x", f"env_file={path}", "upgrade", "head", env=environment()).expect(EXIT_USAGE)
    hidden(outcome.out + outcome.err)


def test_demo_shows_its_password_nowhere_but_in_its_own_file() -> None:
    folder = Path(tempfile.mkdtemp(prefix="pipeline-secrets-"))
    folder.chmod(0o711)
    env = environment(TMPDIR=str(folder))
    try:
        told = pipeline("demo", "--rows", "40", "--keep", env=env, timeout=180).expect(EXIT_OK)
        (path,) = folder.glob("*/.env")
        assert path.stat().st_mode & 0o777 == 0o600
        lines = dict(line.split("=", 1) for line in path.read_text().splitlines())
        password = lines["DB_PASSWORD"]
        assert len(password) >= 16
        logs = "".join(log.read_text(errors="replace") for log in path.parent.glob("**/*log"))
        assert password not in told.out + told.err + logs + arguments_of_all_processes()
        used = pipeline("settings", "--env-file", str(path), env=env).expect(EXIT_OK)
        assert password not in used.out + used.err
    finally:
        pipeline("demo", "--stop", env=env)
        shutil.rmtree(folder)


def test_fragments_would_be_found() -> None:
    """Nothing above would prove anything if the checker itself saw nothing."""
    outcome = Outcome(code=0, out=f"host {CANARY.split('@')[1]} is unknown", err="")
    for shown in (outcome.out, replace(outcome, out=quote(CANARY)).out, json.dumps(CANARY), repr(CANARY), TEXT):
        with pytest.raises(AssertionError, match="is shown in"):
            hidden(shown)
