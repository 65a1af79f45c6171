"""The fence: triggers that refuse every write to a table, but those of transactions that show its pass.

It stands on the table and on all that its rows lie in, is enabled ALWAYS, and binds every role. The pass is the
setting ``pipeline.through`` of a transaction: no secret, it keeps accidents out. A *guard* is the fence that our
own commands pass. Putting one waits out every transaction that has written, so nothing is under way afterwards.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from psycopg2 import sql

from pipeline.errors import ConflictError, RefusedError
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Cursor, Session
from pipeline.postgres.fence_sql import (
    STATEMENT_TRIGGER,
    Catalog,
    Fence,
    disable_statements,
    drop_statements,
    lock_sql,
    put_statements,
    read_catalog,
)
from pipeline.postgres.holders import EVERYBODY, WRITERS, Waited, check_prepared, named, read_holders, under_lock
from pipeline.postgres.tables import Table

WAIT_SECONDS = 0.5
DEADLINE_SECONDS = 60.0
_SCRIPT_WAIT_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceState:
    """What the catalog shows of a table's fence.

    ``standing``: whole, on every part, enabled ALWAYS. ``refusing``: at least one of its triggers is enabled.
    ``there``: there is anything of it at all. ``missing`` is what a whole one lacks, for people.
    """

    standing: bool
    refusing: bool
    there: bool
    message: str | None
    through: str | None
    until: str | None
    missing: tuple[str, ...]

    def is_like(self, fence: Fence) -> bool:
        """Return whether it is that fence that stands, whenever it ends."""
        return self.standing and (self.message, self.through) == (fence.message, fence.through)


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    """A fence that stands: ``changed`` where it did not before, and what that took."""

    changed: bool
    waited: Waited


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifted:
    """A fence that refuses nobody any more: ``changed`` where there was one.

    ``in_the_way`` names those who kept its triggers, disabled now, from being dropped; empty where nothing is left.
    """

    changed: bool
    waited: Waited
    in_the_way: str = ""


def read_state(cursor: Cursor, table: Table) -> FenceState:
    """Read what there is of a fence, by one query. Raises RefusedError where the table is gone."""
    return state(read_catalog(cursor, table))


def read_fence(session: Session, table: Table) -> FenceState:
    """Read what there is of a fence, in a transaction of its own. Raises RefusedError where the table is gone."""
    return state(_catalog(session, table))


def state(catalog: Catalog) -> FenceState:
    """Return what the catalog shows as the state of the fence."""
    first = catalog.trigger(catalog.parts[0], STATEMENT_TRIGGER)
    told = first.arguments if first is not None and first.ours and len(first.arguments) == 4 else None
    ended = told is not None and told[3] != "" and datetime.fromisoformat(told[3]) < catalog.now
    missing = (*_missing(catalog, told), *(["its time is over"] if ended else []))
    return FenceState(
        standing=not missing,
        refusing=not ended and any(one.enabled != "D" for one in catalog.ours),
        there=bool(catalog.ours),
        message=told[0] if told else None,
        through=told[1] if told else None,
        until=told[3] if told else None,
        missing=missing,
    )


def _missing(catalog: Catalog, told: tuple[str, ...] | None) -> Iterable[str]:
    for part in catalog.parts:
        place = f"{part.schema}.{part.name}"
        if part.kind not in ("r", "p"):
            yield f"{place} cannot be fenced"
        for name in part.triggers:
            trigger = catalog.trigger(part, name)
            if trigger is None:
                yield f"{place} has no trigger {name}"
            elif not trigger.ours:
                yield f"the trigger {name} on {place} is not the pipeline's"
            elif told is None or not trigger.is_whole(told[0], told[1], told[3]):
                yield f"the trigger {name} on {place} is another one than the table's"
            elif trigger.enabled != "A":
                yield f"the trigger {name} on {place} is not enabled ALWAYS"


def rights_missing(session: Session, table: Table) -> tuple[str, ...]:
    """Return what the role lacks for putting or lifting a fence, for people; empty where it may.

    Raises RefusedError where no fence can stand there, or where somebody else's object has a name of its parts.
    """
    catalog = _catalog(session, table)
    catalog.check()
    return _rights_missing(catalog)


def _rights_missing(catalog: Catalog) -> tuple[str, ...]:
    missing = [f"{part.schema}.{part.name} belongs to another role" for part in catalog.parts if not part.owned]
    if catalog.function_schema is None:
        missing.append(f"no right to create a function in the schema {catalog.table.schema}")
    return tuple(missing)


def put_fence(
    crew: Crew,
    session: Session,
    table: Table,
    fence: Fence,
    *,
    wait_seconds: float = WAIT_SECONDS,
    deadline_seconds: float = DEADLINE_SECONDS,
) -> Put:
    """Make the fence stand, in one transaction, after every transaction that has written has ended.

    Another message or pass is replaced without a moment between; where this fence stands, nothing is done.
    Nobody waits behind us for more than ``wait_seconds`` at a time (longer where an autovacuum has to be
    ended). Raises ConflictError, with those in the way, at the deadline; RefusedError for a prepared transaction,
    a missing right, a table that cannot be fenced, and somebody else's object of the same name.
    """
    catalog = _catalog(session, table)
    if (standing := state(catalog)).is_like(fence) and standing.until == fence.until:
        return Put(changed=False, waited=Waited())
    catalog.check()
    _check_rights(session, catalog)
    oids = [part.oid for part in catalog.parts]
    check_prepared(session, oids, table.qualified)

    def put(cursor: Cursor, seconds: float) -> None:
        cursor.execute(lock_sql(table, WRITERS, seconds))
        locked = read_catalog(cursor, table)
        locked.check()
        schema = locked.function_schema or table.schema
        _execute_all(cursor, put_statements(locked, fence, schema))

    _, waited = under_lock(
        crew,
        session,
        oids,
        WRITERS,
        put,
        what=table.qualified,
        wait_seconds=wait_seconds,
        deadline_seconds=deadline_seconds,
    )
    return Put(changed=True, waited=waited)


def lift_fence(
    crew: Crew,
    session: Session,
    table: Table,
    *,
    wait_seconds: float = WAIT_SECONDS,
    deadline_seconds: float = DEADLINE_SECONDS,
    at_once: bool = False,
) -> Lifted:
    """Take the fence away, and what was left of one; nothing is done where there is nothing of ours.

    To drop a trigger waits out readers too. Where one is in the way the triggers are disabled first, which takes
    none but writers: the table is open then, and dropping is tried until the deadline; not with ``at_once``.
    Raises as ``put_fence``.
    """
    catalog = _catalog(session, table)
    if not catalog.ours:
        return Lifted(changed=False, waited=Waited())
    _check_rights(session, catalog)
    oids = [one.oid for one in {part.oid: part for part in (*catalog.parts, *(t.part for t in catalog.ours))}.values()]

    def drop(cursor: Cursor, seconds: float) -> None:
        cursor.execute(lock_sql(table, EVERYBODY, seconds))
        _execute_all(cursor, drop_statements(read_catalog(cursor, table)))

    def disable(cursor: Cursor, seconds: float) -> None:
        cursor.execute(lock_sql(table, WRITERS, seconds))
        _execute_all(cursor, disable_statements(read_catalog(cursor, table)))

    try:
        _, waited = under_lock(
            crew, session, oids, EVERYBODY, drop, what=table.qualified, wait_seconds=wait_seconds, deadline_seconds=0.0
        )
        return Lifted(changed=True, waited=waited)
    except ConflictError:
        check_prepared(session, oids, table.qualified)
    _, opened = under_lock(
        crew,
        session,
        oids,
        WRITERS,
        disable,
        what=table.qualified,
        wait_seconds=wait_seconds,
        deadline_seconds=deadline_seconds,
    )
    if at_once:
        return Lifted(changed=True, waited=opened, in_the_way=named(read_holders(session, oids, EVERYBODY)))
    try:
        under_lock(
            crew,
            session,
            oids,
            EVERYBODY,
            drop,
            what=table.qualified,
            wait_seconds=wait_seconds,
            deadline_seconds=deadline_seconds,
        )
    except ConflictError:
        return Lifted(changed=True, waited=opened, in_the_way=named(read_holders(session, oids, EVERYBODY)))
    return Lifted(changed=True, waited=opened)


def fence_script(session: Session, table: Table, fence: Fence) -> str:
    """Return what the owner runs in psql to make the fence stand. Raises RefusedError as ``put_fence`` does."""
    catalog = _catalog(session, table)
    catalog.check()
    schema = catalog.function_schema or table.schema
    return _script(session, table, WRITERS, put_statements(catalog, fence, schema))


def lift_script(session: Session, table: Table) -> str:
    """Return what the owner runs in psql to take the fence away."""
    return _script(session, table, EVERYBODY, drop_statements(_catalog(session, table), by_owner=True))


def _script(session: Session, table: Table, mode: str, statements: Iterable[sql.Composable]) -> str:
    lock = lock_sql(table, mode, _SCRIPT_WAIT_SECONDS)
    lines = [sql.SQL("BEGIN"), lock, *statements, sql.SQL("COMMIT")]
    return "".join(f"{line.as_string(session.connection)};\n" for line in lines)


def _check_rights(session: Session, catalog: Catalog) -> None:
    if missing := _rights_missing(catalog):
        fact = f"{session.label}: the role may not fence {catalog.table.qualified}: {'; '.join(missing)}"
        raise RefusedError(fact, "let the owner run the statements, or use the owner's role")


def _catalog(session: Session, table: Table) -> Catalog:
    with session.transaction(read_only=True, single=True) as cursor:
        return read_catalog(cursor, table)


def _execute_all(cursor: Cursor, statements: Iterable[sql.Composable]) -> None:
    """Execute statements in one round trip: the table is locked."""
    if text := sql.SQL(";\n").join(statements).as_string(cursor):
        cursor.execute(text)
