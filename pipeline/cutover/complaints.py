"""What pg_dump and pg_restore complain of, as our errors: without secrets, and without what they were sent."""

import re
from pathlib import Path

from pipeline.endpoints import Endpoint
from pipeline.errors import ConflictError, PipelineError, RefusedError, StatementError, UnreachableError
from pipeline.postgres.failures import connect_error

LONGEST = 200
# What both programs and the server write, by the part that is the same in every release; the fact; the hint.
_FACTS: tuple[tuple[str, type[PipelineError], str, str], ...] = (
    (
        "SSL support is not compiled in",
        RefusedError,
        "this pg_dump was built without TLS",
        "name another with --pg-dump PATH, as of the package postgresql-client",
    ),
    (
        "server version mismatch",
        RefusedError,
        "this pg_dump is older than the server",
        "name one of the server's version with --pg-dump PATH",
    ),
    (
        r"due to (statement|lock) timeout",
        ConflictError,
        "a lock was waited for in vain; another transaction holds the table",
        "end that transaction, or wait for it; then run the command again",
    ),
    (
        "No space left|Disk quota exceeded|File too large",
        StatementError,
        "the disk of {folder} is full",
        "free space, or name another folder with --backup-dir; then run the command again",
    ),
    (
        "row-level security|row security",
        RefusedError,
        "the table has row-level security, which would keep rows from this role",
        "connect as the table's owner, or as a role with BYPASSRLS",
    ),
    (
        "no matching (tables|schemas) were found",
        RefusedError,
        "the table, or a part of it, is not there any more",
        "run the command again",
    ),
    (
        r"permission denied for (?P<what>\w+ \S+)",
        RefusedError,
        "permission denied for {what}",
        "grant SELECT on the table and its sequences, and USAGE on the schema, or use a role that has it",
    ),
    (
        r"server closed the connection|terminating connection|connection to server was lost|could not receive data"
        r"|PQgetCopyData\(\) failed|lost synchronization|could not send data",
        UnreachableError,
        "the connection was lost",
        "run the command again",
    ),
)


def dump_error(endpoint: Endpoint, words: str, folder: Path) -> PipelineError:
    """Turn what pg_dump wrote before it failed into our error."""
    # Its own lines; what the server was asked stands behind, and may go on for lines.
    lines = [line for line in words.splitlines() if re.search(r"(error|detail|FATAL|ERROR): ", line)]
    lines = [line for line in lines if not re.search(r"(query|[Cc]ommand) was: ", line)]
    text = "\n".join(lines) or "it said nothing"
    for pattern, kind, fact, hint in _FACTS:
        if found := re.search(pattern, text):
            fact = fact.format(folder=folder, **found.groupdict())
            return kind(f"{endpoint.name} ({endpoint.label}), pg_dump: {fact}", hint)
    if re.search("connection to (server|database)|could not translate host name", text):
        return connect_error(endpoint, text)
    line = _plain(text, endpoint)
    return StatementError(f"{endpoint.name} ({endpoint.label}), pg_dump: {line}", "look into the server's log")


def archive_error(words: str, file: Path) -> RefusedError:
    """Turn what pg_restore wrote about an archive that it cannot read into our error."""
    line = _plain(words, None)
    return RefusedError(f"{file} cannot be read back: {line}", "take the file away, and run the command again")


def _plain(text: str, endpoint: Endpoint | None) -> str:
    line = re.sub(r"^pg_\w+: (error: )?", "", (text.strip().splitlines() or ["it said nothing"])[0])
    if endpoint is not None and endpoint.password is not None:
        line = line.replace(endpoint.password.reveal(), "********")
    return line[:LONGEST]
