"""What the tests of preflight share: its document, and both ends as the engine knows them."""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager

from pipeline.check.inspection import Inspected, inspect
from pipeline.endpoints import Endpoint, Secret
from pipeline.options import DEFAULT_OLD_TRANSACTION_SECONDS, PreflightOptions
from pipeline.settings import Route, TableMapping
from tests.support import Database, Outcome, pipeline

TRIGGER_FUNCTION = "CREATE FUNCTION public.loud() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'"
INSERT = "INSERT INTO public.embeddings (id, content, metadata, embedding) VALUES (gen_random_uuid(), %s, %s, %s)"
ZERO = "[" + ",".join("0" * 768) + "]"
ONES = "[" + ",".join("1" * 768) + "]"


def findings(outcome: Outcome) -> list[tuple[str, str, str]]:
    return [(one["severity"], one["fact"], one["hint"]) for one in outcome.json["preflight"]["findings"]]


def preflight(env: dict[str, str], *more: str, code: int = 0) -> Outcome:
    return pipeline("preflight", "--json", *more, env=env).expect(code)


def has(found: list[tuple[str, str, str]], severity: str, fact: str, hint: str = "") -> bool:
    return any(one[0] == severity and fact in one[1] and hint in one[2] for one in found)


def endpoint(database: Database, name: str) -> Endpoint:
    return Endpoint(
        name=name,
        host=database.server.host,
        port=database.server.port,
        user=database.user,
        database=database.name,
        password=Secret(database.password),
    )


def route(legacy: Database, main: Database) -> Route:
    return Route(source=endpoint(legacy, "legacy"), target=endpoint(main, "main"), table=TableMapping(), dimensions=768)


def inspected(way: Route, old_transaction_seconds: float = DEFAULT_OLD_TRANSACTION_SECONDS) -> Inspected:
    """Run a preflight inside of this process."""
    chosen = PreflightOptions(old_transaction_seconds=old_transaction_seconds)
    (found,) = (event for event in inspect(way, chosen) if isinstance(event, Inspected))
    return found


def administrate(database: Database, *statements: str) -> None:
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        for statement in statements:
            cursor.execute(statement)


@contextmanager
def standby(database: Database) -> Iterator[None]:
    """Make the database's server a standby, which waits for a primary that never comes, while this lasts."""
    server = database.server
    signal_file = server.data / "standby.signal"
    server.stop()
    signal_file.touch()
    os.chown(signal_file, server.data.stat().st_uid, -1)
    server.start()
    try:
        yield
    finally:
        server.stop()
        signal_file.unlink()
        server.start()
