"""Clients that are still connected to legacy's database after the switch, and whether they try to write."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.postgres.database import Session
from pipeline.settings import TableMapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Stray:
    """A session of somebody else. Times in seconds, by its server.

    ``writes`` says that its last statement begins a write to the table, and came after the fence; None where our
    role is not shown it, nor then ``address``, ``state`` and the times. A subscription's worker is one too.
    The statement itself stays on the server.
    """

    pid: int
    role: str
    application: str
    address: str | None
    state: str | None
    connected_seconds: float | None
    quiet_seconds: float | None
    writes: bool | None

    @property
    def label(self) -> str:
        """Return who it is, for people."""
        who = f"{self.application!r}" if self.application else "a client without a name"
        return f"{who} (role {self.role}, {self.address or 'address not shown'}, pid {self.pid})"


_HIDDEN = "<insufficient privilege>"
_STRAYS_SQL = """
SELECT pid, coalesce(usename, ''), coalesce(application_name, ''),
       CASE WHEN query = %(hidden)s THEN NULL ELSE coalesce(pg_catalog.host(client_addr), 'local') END, state,
       extract(epoch FROM pg_catalog.clock_timestamp() - backend_start)::pg_catalog.float8,
       extract(epoch FROM pg_catalog.clock_timestamp() - coalesce(state_change, query_start))::pg_catalog.float8,
       CASE WHEN query = %(hidden)s THEN NULL
            WHEN backend_type <> 'client backend' THEN EXISTS (
                 SELECT 1 FROM pg_catalog.pg_stat_subscription s
                 JOIN pg_catalog.pg_subscription_rel r ON r.srsubid = s.subid
                 WHERE s.pid = a.pid AND r.srrelid = ANY (%(oids)s::pg_catalog.oid[]))
            ELSE coalesce(query_start >= %(since)s::pg_catalog.timestamptz, false)
                 AND query OPERATOR(pg_catalog.~*) %(pattern)s END
FROM pg_catalog.pg_stat_activity a
WHERE datname = pg_catalog.current_database() AND pid <> pg_catalog.pg_backend_pid() AND usesysid IS NOT NULL
  AND (backend_type IS NULL OR backend_type IN ('client backend', 'logical replication worker',
       'logical replication apply worker', 'logical replication parallel worker'))
  AND NOT (usename = SESSION_USER AND coalesce(application_name, '') LIKE 'pipeline %%')
ORDER BY backend_start, pid
"""
# The table and all below it, also what only divides.
_PLACES_SQL = """
WITH RECURSIVE tree AS (
    SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = %(schema)s AND c.relname = %(name)s
    UNION SELECT i.inhrelid FROM pg_catalog.pg_inherits i JOIN tree ON i.inhparent = tree.oid)
SELECT c.oid::pg_catalog.int8, c.relname FROM tree JOIN pg_catalog.pg_class c ON c.oid = tree.oid ORDER BY c.oid
"""


def write_pattern(names: Sequence[str]) -> str:
    """Return what a statement looks like that writes to a table of one of these names, in PostgreSQL's expressions.

    COPY counts with FROM alone. A comment, a string or a WITH may stand before, so it is looked for anywhere.
    """
    plain = "|".join(re.escape(name) for name in names)
    quoted = "|".join(re.escape(name.replace('"', '""')) for name in names)
    table = rf'(?:(?:"(?:[^"]|"")+"|[^\s".(]+)\s*\.\s*)?(?:"(?:{quoted})"|(?:{plain})(?![\w$]))'
    verbs = r"insert\s+into|update(?:\s+only)?|delete\s+from(?:\s+only)?|merge\s+into(?:\s+only)?"
    truncate = r"truncate(?:\s+table)?(?:\s+only)?"
    return rf"\m(?:(?:{verbs}|{truncate})\s+{table}|copy\s+{table}[^;']*\mfrom\M)"


def read_strays(session: Session, mapping: TableMapping, since: str) -> tuple[Stray, ...]:
    """Return the sessions of others in this database; ``since`` is the time of the fence, by this server."""
    places = session.rows(_PLACES_SQL, {"schema": mapping.schema, "name": mapping.table})
    names = dict.fromkeys((mapping.table, *(name for _, name in places)))
    arguments = {
        "hidden": _HIDDEN,
        "since": since,
        "pattern": write_pattern(tuple(names)),
        "oids": [oid for oid, _ in places],
    }
    return tuple(
        Stray(
            pid=pid,
            role=role,
            application=application,
            address=address,
            state=state,
            connected_seconds=connected,
            quiet_seconds=quiet,
            writes=writes,
        )
        for pid, role, application, address, state, connected, quiet, writes in session.rows(_STRAYS_SQL, arguments)
    )
