"""Short questions to a server: who it is, how far its transactions are, and several at once."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psycopg2 import sql

from pipeline.postgres.database import Cursor, Query


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerIdentity:
    """What tells two servers apart, whatever they are called.

    ``system_identifier`` is shared by a primary, its standbys and every clone of its files;
    ``started`` is not, so both together name one running server.
    """

    system_identifier: int
    started: str
    database_oid: int


IDENTITY_SQL = """
SELECT (SELECT system_identifier FROM pg_catalog.pg_control_system()),
       pg_catalog.pg_postmaster_start_time()::pg_catalog.text,
       (SELECT oid::pg_catalog.int8 FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()),
       (SELECT timeline_id FROM pg_catalog.pg_control_checkpoint())
"""


def identity(system: int, started: str, database: int) -> ServerIdentity:
    """Return a server's identity from what IDENTITY_SQL found first; its timeline is the last."""
    # The catalog shows the unsigned identifier as a signed number.
    return ServerIdentity(system_identifier=system % 2**64, started=started, database_oid=database)


def gather(cursor: Cursor, queries: Sequence[Query], arguments: Mapping[str, Any] | None = None) -> list[list[Any]]:
    """Return the rows of each of several queries, by one statement: one snapshot, one round trip.

    Those given as text take the arguments; composed ones are complete. Rows come as JSON, so the queries
    have to cast what JSON has no name for: numbers of objects to int8, other types to text.
    """
    parts = [
        sql.SQL(
            "(SELECT coalesce(pg_catalog.json_agg(pipeline_row), '[]')::pg_catalog.text FROM ({}) AS pipeline_row)"
        ).format(sql.SQL(cursor.mogrify(query, arguments).decode()) if isinstance(query, str) else query)
        for query in queries
    ]
    cursor.execute(sql.SQL("SELECT {}").format(sql.SQL(", ").join(parts)))
    ((*found,),) = cursor.fetchall()
    # As pairs: two columns may have the same name.
    return [json.loads(text, object_pairs_hook=lambda pairs: [value for _, value in pairs]) for text in found]


def horizon_sql(version: int) -> str:
    """Return the query of the oldest transaction (64-bit id) that a snapshot taken now may not see.

    On a standby it is the primary's, as far as it was replayed. Works from version 10 on.
    """
    return (
        "SELECT pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())::pg_catalog.text::pg_catalog.int8"
        if version >= 130000
        else "SELECT pg_catalog.txid_snapshot_xmin(pg_catalog.txid_current_snapshot())"
    )
