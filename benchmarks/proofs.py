"""What it takes to prove and to sync, by the engine's own functions; and the raw upsert of as many rows beside it.

Run as: python proofs.py FILE FEW MANY, the endpoints in the environment, both tables equal. FEW rows are
changed on legacy before a sync, again before a deep one, and before the fence of a cutover; MANY before a
sync whose rate is told. FILE takes the figures as JSON.
"""

import json
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

from psycopg2 import sql

from changed_pass import change
from pipeline.check.verify import verify
from pipeline.events import Event, SyncDone, VerifyDone
from pipeline.move.sync import sync
from pipeline.options import SyncOptions, VerifyOptions
from pipeline.postgres.database import Session
from pipeline.settings import Route, Settings, TableMapping
from switched import fence_held


def timed(events: Generator[Event, None, None]) -> tuple[float, list[Event]]:
    """Run an engine function to its end; return seconds and events."""
    started = time.monotonic()
    with closing(events) as running:
        found = list(running)
    return time.monotonic() - started, found


def proven(route: Route, *, incremental: bool) -> float:
    """Verify the rows; return the seconds. Raises AssertionError where both sides are not equal."""
    seconds, events = timed(verify(route, VerifyOptions(incremental=incremental, checks=("rows",))))
    assert [one.verdict for one in events if isinstance(one, VerifyDone)] == ["pass"]
    return seconds


def synced(route: Route, *, deep: bool, rows: int) -> float:
    """Sync; return the seconds. Raises AssertionError unless it brought ``rows`` changes and both sides are equal."""
    seconds, events = timed(sync(route, SyncOptions(deep=deep)))
    (done,) = (one for one in events if isinstance(one, SyncDone))
    assert done.equal and done.inserted + done.updated + done.deleted == rows, done
    return seconds


def upsert(route: Route, mapping: TableMapping, rows: int) -> float:
    """Write so many of legacy's rows over main's, as a person would: COPY, a temporary table, one upsert."""
    names = [sql.Identifier(name) for name in mapping.columns]
    table, columns = sql.Identifier(mapping.schema, mapping.table), sql.SQL(", ").join(names)
    out = sql.SQL("COPY (SELECT {} FROM {} ORDER BY {} LIMIT {}) TO STDOUT (FORMAT binary)")
    sets = sql.SQL(", ").join(sql.SQL("{0} = EXCLUDED.{0}").format(name) for name in names[1:])
    with Session(route.source, "bench") as source, Session(route.target, "bench") as target:
        started = time.monotonic()
        with tempfile.TemporaryFile() as file:
            with source.transaction(read_only=True) as cursor:
                cursor.copy_expert(out.format(columns, table, names[0], sql.Literal(rows)), file)
            file.seek(0)
            with target.transaction() as cursor:
                cursor.execute(
                    sql.SQL("CREATE TEMPORARY TABLE raw_stage ON COMMIT DROP AS SELECT {} FROM {} WITH NO DATA").format(
                        columns, table
                    )
                )
                cursor.copy_expert("COPY pg_temp.raw_stage FROM STDIN (FORMAT binary)", file)
                cursor.execute(
                    sql.SQL(
                        "INSERT INTO {} ({}) SELECT {} FROM pg_temp.raw_stage ON CONFLICT ({}) DO UPDATE SET {}"
                    ).format(table, columns, columns, names[0], sets)
                )
        return time.monotonic() - started


def main(file: str, few: str, many: str) -> None:
    """Measure, one after the other, and write everything down."""
    settings = Settings.load(None)
    route = settings.route("legacy", "main")
    figures: dict[str, float] = {"deep_compare_seconds": proven(route, incremental=False)}
    with Session(route.source, "bench") as source:
        change(source, settings.table, int(few))
        figures["sync_seconds"] = synced(route, deep=False, rows=int(few))
        figures["incremental_seconds"] = proven(route, incremental=True)
        change(source, settings.table, int(few))
        figures["deep_sync_seconds"] = synced(route, deep=True, rows=int(few))
        change(source, settings.table, int(many))
    figures["many_seconds"] = synced(route, deep=False, rows=int(many))
    figures["upsert_seconds"] = upsert(route, settings.table, int(many))
    # Raw SQL has just written rows over, with the same content: the pass that a cutover goes on from comes after it.
    proven(route, incremental=False)
    figures |= fence_held(route, settings, int(few))
    Path(file).write_text(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
