"""One copy by the engine's own function, whose source changes the moment the load is done; and what its passes took.

Run as: python changed_pass.py FILE ROWS, the endpoints in the environment. ROWS rows are changed: three
fifths updated, one fifth deleted, one fifth new. FILE takes the figures as JSON.
"""

import json
import sys
import time
from contextlib import closing
from pathlib import Path

from psycopg2 import sql

from pipeline.events import CopyDone, Loaded, Planned, Reconciled
from pipeline.move.copy import copy
from pipeline.options import CopyOptions
from pipeline.postgres.database import Session
from pipeline.settings import Settings, TableMapping


def change(session: Session, mapping: TableMapping, rows: int) -> None:
    """Update, delete and insert in one transaction: at the smallest keys, which lie all over the table."""
    names = dict(zip(("id", "content", "metadata", "embedding"), map(sql.Identifier, mapping.columns), strict=True))
    names["table"] = sql.Identifier(mapping.schema, mapping.table)
    fifth = rows // 5
    with session.transaction() as cursor:
        cursor.execute(
            sql.SQL("DELETE FROM {table} WHERE {id} IN (SELECT {id} FROM {table} ORDER BY {id} LIMIT %s)").format(
                **names
            ),
            (fifth,),
        )
        cursor.execute(
            sql.SQL(
                "UPDATE {table} SET {content} = {content} || ' (changed)'"
                " WHERE {id} IN (SELECT {id} FROM {table} ORDER BY {id} LIMIT %s)"
            ).format(**names),
            (rows - 2 * fifth,),
        )
        cursor.execute(
            sql.SQL(
                "INSERT INTO {table} ({id}, {content}, {metadata}, {embedding}) SELECT pg_catalog.gen_random_uuid(),"
                " {content}, {metadata}, {embedding} FROM {table} ORDER BY {id} LIMIT %s"
            ).format(**names),
            (fifth,),
        )


def main(file: str, rows: str) -> None:
    """Copy, and write down what took how many seconds, and what every pass brought."""
    settings = Settings.load(None)
    route = settings.route("legacy", "main")
    figures: dict[str, float] = {}
    passes = []
    changing = 0.0
    with Session(route.source, "bench") as session, closing(copy(route, CopyOptions())) as events:
        started = time.monotonic()
        for event in events:
            match event:
                case Planned():
                    figures["before_seconds"] = time.monotonic() - started
                case Loaded():
                    # The engine waits for us here, between its load and its first pass.
                    begun = time.monotonic()
                    change(session, settings.table, int(rows))
                    changing = time.monotonic() - begun
                    figures["load_seconds"] = event.seconds
                case Reconciled():
                    passes.append(
                        {
                            "seconds": event.seconds,
                            "changed": event.changed,
                            "written": event.upserted + event.deleted,
                        }
                    )
                case CopyDone():
                    figures["copy_seconds"] = event.seconds - changing - passes[0]["seconds"]
    Path(file).write_text(json.dumps(figures | {"passes": passes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
