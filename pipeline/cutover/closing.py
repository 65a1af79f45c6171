"""Closing a table and opening it again: by ourselves, or by its owner, who is shown what to run and waited for."""

from collections.abc import Generator, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from pipeline.cutover.counters import read_counters
from pipeline.cutover.work import PURPOSE, Work
from pipeline.endpoints import DEFAULT_PASS, Endpoint
from pipeline.errors import RefusedError
from pipeline.events import Event, OwnerNeeded
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Session, clock
from pipeline.postgres.fence import (
    FenceState,
    fence_script,
    lift_fence,
    lift_script,
    put_fence,
    read_fence,
    rights_missing,
)
from pipeline.postgres.fence_proof import prove_fence
from pipeline.postgres.fence_sql import Fence
from pipeline.postgres.tables import describe
from pipeline.settings import TableMapping

# How often it is looked whether the owner has run what was printed.
LOOK_SECONDS = 1.0


def guard(work: Work) -> Fence:
    """Return the fence that keeps main's table to the pipeline while it is not the application's."""
    return Fence(
        message=f"{work.route.table.qualified} is filled by the pipeline, and not in use here:"
        f" write to {_place(work.route.source)} until the cutover",
        through=DEFAULT_PASS,
    )


def moved(work: Work) -> Fence:
    """Return the fence of legacy's table, which says where it went."""
    table, there = work.route.table.qualified, _place(work.route.target)
    message = f"{table} has moved to {there}: this one takes no more writes"
    if work.rehearsal:
        message = f"{table} is closed for seconds, while its move to {there} is rehearsed: try again"
    return Fence(message=message, through=work.cutover.through)


def returning(work: Work) -> Fence:
    """Return the fence of main's table while its new rows are taken back to legacy."""
    return Fence(
        message=f"{work.route.table.qualified} goes back to {_place(work.route.source)}: this one takes no more writes",
        through=work.cutover.through,
    )


def _place(endpoint: Endpoint) -> str:
    """Return a server and its database; whose role we are is nobody's business there."""
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    return f"{host}:{endpoint.port}/{endpoint.database}"


def is_closed(crew: Crew, endpoint: Endpoint, mapping: TableMapping) -> bool:
    """Return whether a fence of any kind stands on an endpoint's table."""
    with crew.session(endpoint, PURPOSE) as session:
        return read_fence(session, describe(session, mapping)).standing


def state_of(work: Work, endpoint: Endpoint) -> FenceState:
    """Return what there is of a fence on an endpoint's table."""
    return work.crew.call(_state, work, endpoint)


def _state(work: Work, endpoint: Endpoint) -> FenceState:
    with work.crew.session(endpoint, PURPOSE) as session:
        return read_fence(session, describe(session, work.route.table))


def read_legacy_counters(work: Work) -> Mapping[str, Any]:
    """Return legacy's write counters, as the watch compares them later."""

    def read() -> Mapping[str, Any]:
        with work.crew.session(work.source, PURPOSE) as session:
            return read_counters(session, work.route.table).to_json()

    return work.crew.call(read)


def check_stands(work: Work, endpoint: Endpoint, fence: Fence) -> None:
    """Raise RefusedError where a fence that was put does not stand any more."""
    if not (found := state_of(work, endpoint)).is_like(fence):
        lacks = "; ".join(found.missing) or f"it is another one, with the pass {found.through}"
        raise RefusedError(
            f"{endpoint.name}'s {work.route.table.qualified} was opened by somebody else since: {lacks}",
            "find out who; pipeline rollback tells which rows were written there since",
        )


def prove(work: Work, endpoint: Endpoint, fence: Fence) -> Mapping[str, Any]:
    """Prove that a fence holds; return what was tried. Raises RefusedError with what speaks against it."""

    def look() -> Mapping[str, Any]:
        with work.crew.session(endpoint, PURPOSE) as session:
            table = describe(session, work.route.table)
            proof = prove_fence(session, table, fence)
            if not proof.holds:
                raise RefusedError(
                    f"{session.label}: the fence on {table.qualified} does not hold: {'; '.join(proof.broken)}",
                    "run this again, or go back: pipeline rollback",
                )
            return proof.evidence()

    return work.crew.call(look)


def close(work: Work, endpoint: Endpoint, fence: Fence) -> Generator[Event, None, Mapping[str, Any]]:
    """Make a fence stand on an endpoint's table; return what that took. Raises RefusedError and ConflictError."""
    return (yield from _change(work, endpoint, partial(_put, work, fence), lambda state: state.is_like(fence)))


def open_again(work: Work, endpoint: Endpoint, *, at_once: bool = False) -> Generator[Event, None, Mapping[str, Any]]:
    """Take the fence from an endpoint's table, if there is one; return what that took.

    ``at_once``: nobody who reads is waited for, and what is left of it refuses nobody.
    """
    return (yield from _change(work, endpoint, partial(_lift, work, at_once), lambda state: not state.refusing))


def _change(work: Work, endpoint: Endpoint, change: Any, is_done: Any) -> Generator[Event, None, Mapping[str, Any]]:
    """Do it, or have it done by the owner."""
    started = clock()
    found = work.crew.call(change, endpoint)
    if isinstance(found, OwnerNeeded):
        yield found
        while not is_done(state_of(work, endpoint)):
            if clock() - started > work.options.owner_seconds:
                raise RefusedError(
                    f"{found.fact}; it was waited for {work.options.owner_seconds:.0f} s",
                    "have the owner run the statements above, and run this again",
                )
            work.crew.call(work.crew.pause, LOOK_SECONDS)
        return {"by": "owner", "seconds": round(clock() - started, 3)}
    return {"by": "pipeline", **found, "seconds": round(clock() - started, 3)}


def _put(work: Work, fence: Fence, endpoint: Endpoint) -> OwnerNeeded | Mapping[str, Any]:
    with work.crew.session(endpoint, PURPOSE) as session:
        table = describe(session, work.route.table)
        if work.rehearsal and fence.through != DEFAULT_PASS:
            fence = replace(fence, until=_in_seconds(session, work.options.fence_limit_seconds))
        if read_fence(session, table).is_like(fence):
            return {"changed": False}
        if missing := rights_missing(session, table):
            return _needed(session, table.qualified, missing, fence_script(session, table, fence))
        put = put_fence(work.crew, session, table, fence, deadline_seconds=work.options.fence_seconds)
        return {"changed": put.changed, "waited": asdict(put.waited)}


def _in_seconds(session: Session, seconds: float) -> str:
    """Return a moment by the server's clock."""
    ((until,),) = session.rows(
        "SELECT (pg_catalog.clock_timestamp() + pg_catalog.make_interval(secs => %s))::pg_catalog.text", (seconds,)
    )
    return str(until)


def _lift(work: Work, at_once: bool, endpoint: Endpoint) -> OwnerNeeded | Mapping[str, Any]:
    with work.crew.session(endpoint, PURPOSE) as session:
        table = describe(session, work.route.table)
        if not read_fence(session, table).there:
            return {"changed": False}
        if missing := rights_missing(session, table):
            return _needed(session, table.qualified, missing, lift_script(session, table))
        lifted = lift_fence(work.crew, session, table, deadline_seconds=work.options.fence_seconds, at_once=at_once)
        return {"changed": lifted.changed, "left_for": lifted.in_the_way, "waited": asdict(lifted.waited)}


def _needed(session: Session, table: str, missing: tuple[str, ...], script: str) -> OwnerNeeded:
    return OwnerNeeded(
        fact=f"{session.label}: the role may not close or open {table} ({'; '.join(missing)});"
        " have its owner run this in psql",
        script=script,
    )
