"""A table's write counters, read once its fence stands and compared later: whether somebody wrote all the same."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from psycopg2 import sql

from pipeline.check.changes import Look, is_written
from pipeline.errors import StatementError
from pipeline.postgres.database import Session
from pipeline.postgres.tables import HEAPS_SQL, describe
from pipeline.settings import TableMapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """What the server has counted of a table's heaps together, since ``reset`` or a crash.

    Rows of transactions that were rolled back are in it; a write that the fence refuses is not. A session hands in
    its numbers up to 10 seconds after its transaction, and later while it is in the next one. ``files`` are the
    numbers of the heaps' files, which a TRUNCATE changes and the other numbers do not show. ``rolled_back`` counts the
    whole database's transactions. ``at`` and ``started`` (of the server) are the server's times.
    """

    inserted: int
    updated: int
    deleted: int
    heaps: tuple[int, ...]
    files: tuple[int, ...]
    rolled_back: int
    reset: str
    started: str
    at: str

    def to_json(self) -> dict[str, Any]:
        """Return them as plain JSON."""
        return {**asdict(self), "heaps": list(self.heaps), "files": list(self.files)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Counters":
        """Return what ``to_json`` wrote."""
        return cls(**{**found, "heaps": tuple(found["heaps"]), "files": tuple(found["files"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was counted between two readings, and whether the table was written; ``written`` None: not known.

    ``comparable`` is False where the counters were set back, or the heaps are others. ``looked`` says that the
    table itself was asked, by its row versions.
    """

    inserted: int
    updated: int
    deleted: int
    rolled_back: int
    comparable: bool
    looked: bool
    written: bool | None


_COUNTERS_SQL = sql.SQL("""
SELECT coalesce(pg_catalog.sum(pg_catalog.pg_stat_get_tuples_inserted(h.heap)), 0)::pg_catalog.int8,
       coalesce(pg_catalog.sum(pg_catalog.pg_stat_get_tuples_updated(h.heap)), 0)::pg_catalog.int8,
       coalesce(pg_catalog.sum(pg_catalog.pg_stat_get_tuples_deleted(h.heap)), 0)::pg_catalog.int8,
       coalesce(pg_catalog.array_agg(h.heap::pg_catalog.int8 ORDER BY h.heap), ARRAY[]::pg_catalog.int8[]),
       coalesce(pg_catalog.array_agg(h.file ORDER BY h.heap), ARRAY[]::pg_catalog.int8[]),
       (SELECT pg_catalog.pg_stat_get_db_xact_rollback(d.oid) FROM pg_catalog.pg_database d
        WHERE d.datname = pg_catalog.current_database()),
       (SELECT coalesce(pg_catalog.pg_stat_get_db_stat_reset_time(d.oid)::pg_catalog.text, '')
        FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()),
       pg_catalog.pg_postmaster_start_time()::pg_catalog.text, pg_catalog.clock_timestamp()::pg_catalog.text
FROM (SELECT f.oid::pg_catalog.oid, f.file
      FROM ({heaps}) AS f (oid, file, schema, name, paged, pages, bytes, estimate)) AS h (heap, file)
""").format(heaps=sql.SQL(HEAPS_SQL))


def read_counters(session: Session, mapping: TableMapping) -> Counters:
    """Read the counters of a table's heaps. In a transaction of its own: within one they stay as first seen."""
    ((inserted, updated, deleted, heaps, files, rolled_back, reset, started, at),) = session.rows(
        _COUNTERS_SQL, {"schema": mapping.schema, "name": mapping.table}
    )
    return Counters(
        inserted=inserted,
        updated=updated,
        deleted=deleted,
        heaps=tuple(heaps),
        files=tuple(files),
        rolled_back=rolled_back,
        reset=reset,
        started=started,
        at=at,
    )


def written_since(session: Session, mapping: TableMapping, before: Counters, look: Look | None) -> Written:
    """Say whether a table was written since its counters were read, with nobody writing at that time.

    The same numbers say no. Others say nothing yet: they may have been handed in late, or set back; then the
    table is looked at, by a scan of its heap, where there is a ``look`` of that time. Raises PipelineError.
    """
    now = read_counters(session, mapping)
    # A clean restart keeps them, and a crash does not; the start tells the two not apart.
    same_place = (now.heaps, now.files, now.reset, now.started) == (
        before.heaps,
        before.files,
        before.reset,
        before.started,
    )
    counts = [now.inserted - before.inserted, now.updated - before.updated, now.deleted - before.deleted]
    comparable = same_place and min(counts) >= 0
    written: bool | None = False
    looked = False
    if not comparable or any(counts):
        written = None
        if look is not None:
            table = describe(session, mapping)
            try:
                written, looked = is_written(session, table, look), True
            except StatementError:
                # Set back to a backup, or so old that transactions cannot be compared.
                written = None
    inserted, updated, deleted = counts if comparable else (0, 0, 0)
    return Written(
        inserted=inserted,
        updated=updated,
        deleted=deleted,
        rolled_back=max(0, now.rolled_back - before.rolled_back) if comparable else 0,
        comparable=comparable,
        looked=looked,
        written=written,
    )
