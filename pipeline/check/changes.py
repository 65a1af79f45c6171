"""What changed since a horizon: keys by one scan of the heap, and key sums that show deletes."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from psycopg2 import sql

from pipeline.check.digests import BUCKETS, BucketMap, key_hash_sql
from pipeline.errors import StatementError
from pipeline.postgres.database import Session
from pipeline.postgres.facts import gather, horizon_sql
from pipeline.postgres.tables import HEAPS_SQL, Table, heap_files
from pipeline.postgres.values import Key, key_texts_sql

# age() is a signed 32-bit distance: beyond this many transactions it would count backwards.
MAX_AGE = 2**31 - 10_000_000
# Of a table with more rows, changed keys are asked for by themselves: collected, they could take 100 MB.
COLLECTED_ROWS = 1_000_000
# The planner takes every row for a group of its own, and would sort or write to disk what is some thousand buckets.
_IN_MEMORY = sql.SQL("SET LOCAL work_mem = '64MB'; SET LOCAL enable_sort = off; ")


def changed_keys(
    session: Session, table: Table, horizon: int, but: sql.Composable | None = None
) -> Iterator[list[Key]]:
    """Yield, in batches, the keys of row versions that a pass with this horizon cannot have seen.

    The heap is scanned, TOAST is not touched. Inserts and updates of transactions that were open at
    the horizon are included; a frozen row of wrapped age only makes the answer larger. Rows ``r`` that
    meet the condition ``but`` are left out. Raises StatementError where the horizon is too old to be
    compared with.
    """
    query = sql.SQL("SELECT {} FROM {} WHERE {}").format(
        key_texts_sql(table), table.scanned, _since_sql(sql.Literal(str(horizon % 2**32)))
    )
    if but is not None:
        query += sql.SQL(" AND NOT ({})").format(but)
    ((now,),) = session.rows(_now_sql(session.version))
    _check_age(session, now, horizon)
    yield from session.stream(query)


def _since_sql(xid: sql.Composable) -> sql.Composable:
    # In a subquery, the horizon's age is found once, and not once a row.
    return sql.SQL("pg_catalog.age(xmin) <= (SELECT pg_catalog.age({}::pg_catalog.xid))").format(xid)


def _now_sql(version: int) -> str:
    return (
        "SELECT pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::pg_catalog.text::pg_catalog.int8"
        if version >= 130000
        else "SELECT pg_catalog.txid_snapshot_xmax(pg_catalog.txid_current_snapshot())"
    )


def _check_age(session: Session, now: int, horizon: int) -> None:
    if not 0 <= now - horizon < MAX_AGE:
        raise StatementError(
            f"{session.label} is at transaction {now}, the last pass was at {horizon}: they cannot be compared",
            "the server was restored or replaced, or two billion transactions have passed; run pipeline verify",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A table at one moment: its horizon, its heaps' files, its rows, and what of them is recent.

    ``recent`` row versions are of transactions at or after the horizon: those that ended a moment ago
    while an older one was still open; ``recent_sum`` adds up a hash of their keys and transactions.
    ``timeline`` is the server's.
    ``changed`` and ``changed_sum`` are the same since the horizon that was asked for. None: not known, as
    of a view, whose rows have no transactions.
    """

    horizon: int
    timeline: int | None = None
    files: tuple[int, ...] = ()
    rows: int | None = None
    recent: int | None = None
    recent_sum: int | None = None
    changed: int | None = None
    changed_sum: int | None = None

    def holds(self, table: Table, horizon: int) -> bool:
        """Return whether the table's server still has that history: it was not set back, and no standby took its place.

        ``horizon`` is the server's own by now. A timeline that was not written down is not compared.
        """
        same = self.timeline is None or self.timeline == table.timeline
        return same and horizon >= self.horizon

    def since(self, before: "Look") -> bool:
        """Return whether anything was written since an earlier look, which this one was taken with the horizon of.

        A new row version changes the sum, a row that is gone the number of rows.
        """
        now = (self.rows, self.changed, self.changed_sum)
        return None in now or now != (before.rows, before.recent or 0, before.recent_sum or 0)

    def to_json(self) -> dict[str, Any]:
        """Return what a later pass needs of it, as plain JSON; the sum has more digits than JSON's numbers."""
        kept = {name: value for name, value in asdict(self).items() if not name.startswith("changed")}
        return {**kept, "recent_sum": None if self.recent_sum is None else str(self.recent_sum)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Look":
        """Return the look that ``to_json`` wrote."""
        total = found.get("recent_sum")
        return cls(
            horizon=found["horizon"],
            timeline=found.get("timeline"),
            files=tuple(found.get("files", ())),
            rows=found.get("rows"),
            recent=found.get("recent"),
            recent_sum=None if total is None else int(total),
        )


def look(session: Session, table: Table, since: int | None = None, but: sql.Composable | None = None) -> Look:
    """Look at a table by one scan of its heap, in one snapshot. Raises StatementError as ``changed_keys``.

    Rows that meet the condition ``but`` count as not changed.
    """
    horizon = horizon_sql(session.version)
    if not table.heaps:
        ((here,),) = session.rows(horizon)
        return Look(horizon=here, timeline=table.timeline)
    own = _xid_sql(horizon)
    asked = own if since is None else sql.SQL("(SELECT {})").format(sql.Literal(str(since % 2**32)))
    count = sql.SQL(
        "SELECT pg_catalog.count(*), pg_catalog.count(*) FILTER (WHERE {recent}),"
        " ({sum} FILTER (WHERE {recent}))::pg_catalog.text, pg_catalog.count(*) FILTER (WHERE {changed}),"
        " ({sum} FILTER (WHERE {changed}))::pg_catalog.text FROM {table}"
    ).format(
        recent=_since_sql(own),
        changed=_since_sql(asked) if but is None else sql.SQL("{} AND NOT ({})").format(_since_sql(asked), but),
        sum=sql.SQL("pg_catalog.sum({})").format(_version_sql(table)),
        table=table.scanned,
    )
    queries = (horizon, _now_sql(session.version), HEAPS_SQL, count)
    with session.transaction(read_only=True, single=True) as cursor:
        names = {"schema": table.schema, "name": table.name}
        ((here,),), ((now,),), heaps, ((rows, recent, recent_sum, changed, changed_sum),) = gather(
            cursor, queries, names
        )
    _check_age(session, now, here if since is None else since)
    return Look(
        horizon=here,
        timeline=table.timeline,
        files=heap_files(heaps),
        rows=rows,
        recent=recent,
        recent_sum=int(recent_sum or 0),
        changed=changed,
        changed_sum=int(changed_sum or 0),
    )


def is_written(session: Session, table: Table, before: Look) -> bool:
    """Return whether a table was written since a look at it; where only its horizon is known, by new rows alone."""
    now = look(session, table, before.horizon)
    if before.rows is None:
        return now.changed is None or now.changed > 0
    return now.since(before)


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseLook:
    """A look, the sums of the keys, and the keys of the rows that were changed; None: too many to come with it."""

    look: Look
    sums: BucketMap
    keys: tuple[Key, ...] | None


def look_closely(session: Session, table: Table, since: int, but: sql.Composable | None = None) -> CloseLook:
    """Do by one scan what ``look``, ``key_sums`` and ``changed_keys`` do by three; arguments and errors as there.

    Of a large table the keys do not come with it: the server would have to collect them in its memory.
    """
    if table.rows_estimate > COLLECTED_ROWS:
        return _look_without_keys(session, table, since, but)
    # Of few rows more is asked than key and count: each filter would cost all the others something.
    of_changed = sql.SQL(", ").join(
        [
            sql.SQL("{}::pg_catalog.text").format(_version_sql(table)),
            sql.SQL("({})::pg_catalog.text").format(_since_sql(_xid_sql(horizon_sql(session.version)))),
            sql.SQL("({})::pg_catalog.text").format(sql.SQL("false") if but is None else but),
            key_texts_sql(table),
        ]
    )
    collected = sql.SQL("pg_catalog.array_agg(ARRAY[{}]) FILTER (WHERE {})").format(of_changed, _changed_sql(since))
    here, buckets = _by_bucket(session, table, since, collected)
    changed = [one for *_, rows in buckets for one in rows or ()]
    recent = [int(version) for version, is_recent, *_ in changed if is_recent == "true"]
    foreign = [(int(version), tuple(key)) for version, _, is_left_out, *key in changed if is_left_out != "true"]
    return CloseLook(
        look=Look(
            horizon=here,
            timeline=table.timeline,
            rows=sum(rows for _, rows, *_ in buckets),
            recent=len(recent),
            recent_sum=sum(recent),
            changed=len(foreign),
            changed_sum=sum(version for version, _ in foreign),
        ),
        sums=BucketMap(buckets={bucket: (rows, 0, int(total)) for bucket, rows, total, _ in buckets}),
        keys=tuple(key for _, key in foreign),
    )


def _look_without_keys(session: Session, table: Table, since: int, but: sql.Composable | None) -> CloseLook:
    changed = _changed_sql(since)
    counted = sql.SQL(
        "pg_catalog.count(*) FILTER (WHERE {recent}), pg_catalog.sum({version}) FILTER (WHERE {recent}),"
        " pg_catalog.count(*) FILTER (WHERE {changed}), pg_catalog.sum({version}) FILTER (WHERE {changed})"
    ).format(
        version=_version_sql(table),
        recent=_since_sql(_xid_sql(horizon_sql(session.version))),
        changed=changed if but is None else sql.SQL("{} AND NOT ({})").format(changed, but),
    )
    here, buckets = _by_bucket(session, table, since, counted)
    return CloseLook(
        look=Look(
            horizon=here,
            timeline=table.timeline,
            rows=sum(rows for _, rows, *_ in buckets),
            recent=sum(row[3] for row in buckets),
            recent_sum=sum(int(row[4] or 0) for row in buckets),
            changed=sum(row[5] for row in buckets),
            changed_sum=sum(int(row[6] or 0) for row in buckets),
        ),
        sums=BucketMap(buckets={bucket: (rows, 0, int(total)) for bucket, rows, total, *_ in buckets}),
        keys=None,
    )


def _by_bucket(session: Session, table: Table, since: int, more: sql.Composable) -> tuple[int, list[tuple[Any, ...]]]:
    """Return the horizon, and of each bucket number, rows, sum of the key hashes, and ``more``; in one snapshot."""
    query = sql.SQL(
        "SELECT m.horizon, m.now, q.* FROM (SELECT ({horizon}), ({now})) AS m (horizon, now) LEFT JOIN"
        " (SELECT {hash} & {mask}, pg_catalog.count(*), pg_catalog.sum({hash}), {more} FROM {table} GROUP BY 1) q"
        " ON true"
    ).format(
        horizon=sql.SQL(horizon_sql(session.version)),
        now=sql.SQL(_now_sql(session.version)),
        hash=key_hash_sql(table),
        mask=sql.Literal(BUCKETS - 1),
        more=more,
        table=table.scanned,
    )
    found = session.rows(_IN_MEMORY + query)
    here, there = found[0][:2]
    _check_age(session, there, since)
    return here, [row[2:] for row in found if row[2] is not None]


def _changed_sql(since: int) -> sql.Composable:
    return _since_sql(sql.SQL("(SELECT {})").format(sql.Literal(str(since % 2**32))))


def _xid_sql(horizon: str) -> sql.Composable:
    """Return the low 32 bits of what a horizon's query finds, as a text: what xmin can be compared with."""
    return sql.SQL("(SELECT (q.h % 4294967296)::pg_catalog.text FROM ({}) AS q(h))").format(sql.SQL(horizon))


def _version_sql(table: Table) -> sql.Composable:
    """Return a hash of a row's key and transaction: another one for every row version."""
    return sql.SQL("pg_catalog.hashint8extended({}, xmin::pg_catalog.text::pg_catalog.int8)").format(
        key_hash_sql(table)
    )


def key_sums(session: Session, table: Table) -> BucketMap:
    """Return a map of the keys alone, by one scan of the heap: count and sum of the key hashes per bucket."""
    query = sql.SQL(
        "SELECT h & {mask}, pg_catalog.count(*), pg_catalog.sum(h) FROM (SELECT {hash} AS h FROM {table}) q GROUP BY 1"
    ).format(mask=sql.Literal(BUCKETS - 1), hash=key_hash_sql(table), table=table.scanned)
    found = session.rows(_IN_MEMORY + query)
    return BucketMap(buckets={bucket: (rows, 0, int(total)) for bucket, rows, total in found})
