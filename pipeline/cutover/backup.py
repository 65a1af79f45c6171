"""The backup of a table before the switch: pg_dump's archive, read back whole, with its checksum beside it.

The archive keeps owners, rights, indexes and triggers, which pg_restore can leave out. It holds neither the
schema nor the extension: both have to stand where it is restored.
"""

import hashlib
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import psycopg2.extensions

from pipeline.cutover.client import Client, clean_environment, connection_environment, ended, find_client, start, tail
from pipeline.cutover.complaints import archive_error, dump_error
from pipeline.endpoints import Endpoint
from pipeline.errors import RefusedError
from pipeline.options import DEFAULT_FREE_BYTES
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import clock
from pipeline.postgres.fence_sql import FUNCTION
from pipeline.settings import TableMapping

# An archive's bytes for each byte of the table. It holds numbers as text, about 11 characters where a vector
# has 4 bytes and a halfvec 2; packed, 1.4 and 2.6 times as much.
ARCHIVE_FACTOR, HALF_ARCHIVE_FACTOR = 1.5, 2.8
# The packing of numbers as text gains 12 % from the lowest level to the usual one, and takes seven times as long.
PACKING_LEVEL = 1
LOCK_WAIT_SECONDS = 5.0
SUMS_FILE = "SHA256SUMS"
# What Debian's servers since late 2026 write into every column's options. Their own pg_dump leaves it out, others
# hand it on, and then no server but such a one makes the table.
_MARK = b"pg_attver"
_MARKED = (
    "the archive sets pg_attver, which only Debian's own servers know; elsewhere it is restored by:"
    " pg_restore --file=- FILE | grep -v pg_attver | psql DATABASE"
)
_GUARDED = (
    "the pipeline's own triggers are in it without their function: pg_restore complains of these, and passes them over"
)
_LOOK_SECONDS = 0.1
_CHUNK_BYTES = 1 << 20
_CHECKED_ROWS = 5_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """A table, or one of its parts; ``has_rows`` is False for what only divides. ``bytes`` count TOAST."""

    schema: str
    name: str
    has_rows: bool
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupPlan:
    """What would be dumped, by which client, and how many bytes that takes at most.

    ``codec`` is Python's name of the database's encoding, in which names go into a command line; ``tls`` says
    that our own sessions are encrypted, so that the client's have to be.
    """

    endpoint: Endpoint
    table: TableMapping
    relations: tuple[Relation, ...]
    client: Client
    server_version: int
    codec: str
    tls: bool
    bytes: int
    needed_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Dump:
    """An archive that was read back whole: ``rows`` are those in it, ``entries`` its list's lines.

    ``restored_by`` is the command that brings it back; ``notes`` are what has to be known before.
    """

    path: Path
    bytes: int
    sha256: str
    rows: int
    entries: int
    client: str
    seconds: float
    restored_by: str
    notes: tuple[str, ...] = ()


_RELATIONS_SQL = """
WITH RECURSIVE tree AS (
    SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = %(schema)s AND c.relname = %(name)s AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
    UNION SELECT i.inhrelid FROM pg_catalog.pg_inherits i JOIN tree ON i.inhparent = tree.oid)
SELECT n.nspname, c.relname, c.relkind::pg_catalog.text,
       CASE WHEN c.relkind = 'r' THEN pg_catalog.pg_table_size(c.oid) ELSE 0 END,
       EXISTS (SELECT 1 FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
               WHERE a.attrelid = c.oid AND NOT a.attisdropped AND t.typname = 'halfvec'),
       pg_catalog.getdatabaseencoding()::pg_catalog.text
FROM tree JOIN pg_catalog.pg_class c ON c.oid = tree.oid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
ORDER BY n.nspname, c.relname
"""


def plan_backup(crew: Crew, endpoint: Endpoint, mapping: TableMapping, named: Path | None = None) -> BackupPlan:
    """Look what a backup of a table would be; nothing is written. ``named`` is the pg_dump that is to be taken.

    Raises RefusedError where there is no such table, its rows lie elsewhere, or no client fits.
    """
    with crew.session(endpoint, "backup") as session:
        found = session.rows(_RELATIONS_SQL, {"schema": mapping.schema, "name": mapping.table})
        version, tls = session.version, session.connection.info.ssl_in_use
    skip = "--skip-backup goes on without a backup"
    if not found:
        raise RefusedError(f"{endpoint.name} ({endpoint.label}) has no table {mapping.qualified}", skip)
    for schema, name, kind, *_ in found:
        if kind not in ("r", "p"):
            fact = f"{endpoint.name}: {schema}.{name} is no plain table, and pg_dump would leave its rows out"
            raise RefusedError(fact, f"back up what its rows lie in by your own means; {skip}")
    size = sum(row[3] for row in found)
    factor = HALF_ARCHIVE_FACTOR if any(row[4] for row in found) else ARCHIVE_FACTOR
    return BackupPlan(
        endpoint=endpoint,
        table=mapping,
        relations=tuple(
            Relation(schema=schema, name=name, has_rows=kind == "r", bytes=size)
            for schema, name, kind, size, *_ in found
        ),
        client=find_client(version, named, tls=tls),
        server_version=version,
        # Of SQL_ASCII the bytes are kept, and ours are UTF-8.
        codec="utf-8" if found[0][5] == "SQL_ASCII" else psycopg2.extensions.encodings.get(found[0][5], "utf-8"),
        tls=tls,
        bytes=size,
        needed_bytes=int(size * factor),
    )


def file_name(plan: BackupPlan, stamp: str) -> str:
    """Return a name for the archive that every file system takes: side, table and ``stamp``."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", f"{plan.endpoint.name}-{plan.table.qualified}-{stamp}.dump")


def check_room(
    folder: Path, needed_bytes: int, minimum_free_bytes: int = DEFAULT_FREE_BYTES, *, make: bool = False
) -> int:
    """Return the bytes that are free in a folder, where that is enough and some stay; ``make`` it where it is missing.

    Raises RefusedError where it is none, is not writable, or has no room.
    """
    hint = "name another with --backup-dir; --skip-backup goes on without a backup"
    place = folder
    try:
        if make:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Root may write where nobody can: what is asked is whether a file can be made.
            with TemporaryFile(dir=folder):
                pass
        while not place.exists():
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise RefusedError(f"no backup can be written into {folder}", hint)
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise RefusedError(f"no backup can be written into {folder}: {error.strerror}", hint) from error
    if free < needed_bytes + minimum_free_bytes:
        need = f"{_size(needed_bytes)} are needed and {_size(minimum_free_bytes)} have to stay free"
        raise RefusedError(f"{folder} has {_size(free)} free; {need}", f"free some, or {hint}")
    return free


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def dump_table(crew: Crew, plan: BackupPlan, file: Path, tell: Callable[[int], None] | None = None) -> Dump:
    """Dump a table with all its parts into a new file, and read it back; ``tell`` is told the bytes so far.

    It is written as FILE.partial, with mode 0600, and renamed once it is known to be whole. The table is locked
    as by a SELECT. A pg_dump that outlives this process (kill -9) writes into a file that the next one removes
    from the folder. Raises RefusedError where the file is there already, PipelineError as pg_dump's words say,
    StoppedError within a second after the crew is stopped.
    """
    started = clock()
    if file.exists():
        raise RefusedError(f"{file} is there already", "a backup is never written over: name another folder or file")
    partial = file.with_name(f"{file.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        _write(crew, plan, partial, tell)
        rows, entries, notes = _read_back(crew, plan, partial)
        found = _dump(crew, plan, partial, file, (rows, entries, notes), started)
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(file.parent)
    _write_sum(file.parent / SUMS_FILE, file.name, found.sha256)
    return found


def look_at_dump(crew: Crew, plan: BackupPlan, file: Path) -> Dump:
    """Read an archive that is there already, as after a dump, and write its checksum down again.

    Raises RefusedError where it is not whole, or not of this table.
    """
    started = clock()
    found = _dump(crew, plan, file, file, _read_back(crew, plan, file), started)
    _write_sum(file.parent / SUMS_FILE, file.name, found.sha256)
    return found


def _dump(
    crew: Crew, plan: BackupPlan, written: Path, file: Path, content: tuple[int, int, tuple[str, ...]], started: float
) -> Dump:
    rows, entries, notes = content
    return Dump(
        path=file,
        bytes=written.stat().st_size,
        sha256=_checksum(crew, written),
        rows=rows,
        entries=entries,
        client=plan.client.text,
        seconds=clock() - started,
        restored_by=shlex.join([str(plan.client.restore), "--dbname=DATABASE", str(file)]),
        notes=notes,
    )


def _write(crew: Crew, plan: BackupPlan, partial: Path, tell: Callable[[int], None] | None) -> None:
    command: list[str | bytes] = [
        *(str(plan.client.dump), "--format=custom", f"--compress={PACKING_LEVEL}", "--no-password", "--strict-names"),
        f"--lock-wait-timeout={int(LOCK_WAIT_SECONDS * 1000)}",
        # A dead network would be waited for without end; none of this is a secret, and what is one stands elsewhere.
        "--dbname=keepalives_idle=30 keepalives_interval=10 keepalives_count=3 tcp_user_timeout=30000",
    ]
    command += [b"--table=" + _pattern(relation).encode(plan.codec) for relation in plan.relations]
    environment = connection_environment(plan.endpoint, "backup", tls=plan.tls)
    with _new_file(partial) as file, TemporaryFile() as complaints:
        # Into our own file, not by its name: it has its mode from the beginning, and cannot be another's.
        with ended(start(command, environment, file.fileno(), complaints)) as child:
            while child.poll() is None:
                crew.stopping.wait(_LOOK_SECONDS)
                crew.check()
                if tell is not None:
                    tell(os.fstat(file.fileno()).st_size)
        if child.returncode:
            raise dump_error(plan.endpoint, tail(complaints), partial.parent)
        os.fsync(file.fileno())


def _new_file(path: Path) -> BinaryIO:
    """Make a file that only its owner can read, and that was not there."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode=0o600), "wb")


def _pattern(relation: Relation) -> str:
    """Return the pattern that only this relation meets."""
    return ".".join('"' + name.replace('"', '""') + '"' for name in (relation.schema, relation.name))


def _read_back(crew: Crew, plan: BackupPlan, file: Path) -> tuple[int, int, tuple[str, ...]]:
    """Read an archive from its first byte to its last; return its rows, its list's entries, and notes.

    The list alone stands at the beginning, and is there also where the rows are cut off.
    """
    listed = list[str]()
    for line in _restore_lines(crew, plan, "--list", str(file)):
        text = line.decode(plan.codec, errors="replace").rstrip("\n")
        if text and not text.startswith(";"):
            listed.append(text)
    for relation in plan.relations:
        # Line ends in a name are blanks in the list.
        entry = re.sub(r"[\r\n]", " ", f" TABLE DATA {relation.schema} {relation.name} ")
        if relation.has_rows and not any(entry in line for line in listed):
            fact = f"{file} holds no rows of {relation.schema}.{relation.name}: it is no backup of this table"
            raise RefusedError(fact, "take the file away, and run the command again")
    rows, copying, marked = 0, False, False
    for line in _restore_lines(crew, plan, "--file=-", str(file)):
        if copying:
            copying = line != b"\\.\n"
            rows += copying
        else:
            copying = line.endswith(b" FROM stdin;\n")
            marked = marked or _MARK in line
    guarded = any(" TRIGGER " in line and FUNCTION in line for line in listed)
    return rows, len(listed), (*((_MARKED,) if marked else ()), *((_GUARDED,) if guarded else ()))


def _restore_lines(crew: Crew, plan: BackupPlan, *arguments: str) -> Iterator[bytes]:
    """Yield the lines that pg_restore writes of an archive. Raises RefusedError where it cannot read it."""
    source, output = os.pipe()
    with TemporaryFile() as complaints, os.fdopen(source, "rb", buffering=_CHUNK_BYTES) as lines:
        try:
            command = (str(plan.client.restore), *arguments)
            child = start(command, clean_environment(), output, complaints)
        finally:
            os.close(output)
        with ended(child):
            for number, line in enumerate(lines):
                if number % _CHECKED_ROWS == 0:
                    crew.check()
                yield line
            crew.check()
            child.wait()
        if child.returncode:
            raise archive_error(tail(complaints), Path(arguments[-1]))


def _checksum(crew: Crew, file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK_BYTES):
            crew.check()
            digest.update(chunk)
    return digest.hexdigest()


def _write_sum(sums: Path, name: str, digest: str) -> None:
    """Write a file's line for ``sha256sum -c`` instead of the one it had; the file of sums is whole at any moment."""
    lines = sums.read_text().splitlines(keepends=True) if sums.exists() else []
    kept = [line for line in lines if line.rstrip("\n").partition("  ")[2] != name]
    partial = sums.with_name(f"{sums.name}.partial")
    partial.unlink(missing_ok=True)
    with _new_file(partial) as file:
        file.write("".join([*kept, f"{digest}  {name}\n"]).encode())
        file.flush()
        os.fsync(file.fileno())
    partial.rename(sums)
    _sync_folder(sums.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
