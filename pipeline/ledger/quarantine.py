"""Rows that could not be carried, kept in the ledger with key and reason until they can be."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from psycopg2.extras import execute_values

from pipeline.postgres.database import Cursor
from pipeline.postgres.values import Key


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAside:
    """A row in quarantine: its key, why it could not be carried, and since when."""

    key: Key
    reason: str
    at: datetime

    @property
    def text(self) -> str:
        """Return the key as one text, for people."""
        return ", ".join(self.key)


def clear_quarantine(cursor: Cursor, run_id: int) -> None:
    """Forget what a run set aside, in the transaction that writes down what is to be set aside now."""
    cursor.execute("DELETE FROM pipeline.quarantine WHERE run_id = %s", (run_id,))


def add_to_quarantine(cursor: Cursor, run_id: int, rows: Sequence[tuple[Key, str, str]]) -> None:
    """Set rows aside: of each its key, the reason, and the row as a JSON object of texts by column."""
    execute_values(
        cursor,
        "INSERT INTO pipeline.quarantine (run_id, key, key_values, reason, row) VALUES %s",
        [(run_id, ", ".join(key), list(key), reason, row) for key, reason, row in rows],
        template="(%s, %s, %s::pg_catalog.text[], %s, %s::pg_catalog.jsonb)",
    )


def read_quarantine(cursor: Cursor, run_id: int) -> tuple[SetAside, ...]:
    """Return what a run has set aside, in the order of the keys' texts."""
    cursor.execute(
        "SELECT key_values, reason, at FROM pipeline.quarantine WHERE run_id = %s ORDER BY key, id", (run_id,)
    )
    return tuple(SetAside(key=tuple(key), reason=reason, at=at) for key, reason, at in cursor.fetchall())


def count_quarantine(cursor: Cursor, run_id: int) -> int:
    """Return how many rows a run has set aside."""
    cursor.execute("SELECT pg_catalog.count(*) FROM pipeline.quarantine WHERE run_id = %s", (run_id,))
    row = cursor.fetchone()
    assert row is not None
    return int(row[0])
