"""Preflight: everything that could stand in the way of a copy, collected from both sides, which are only read."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

from pipeline.check.casts import carried_as
from pipeline.check.census import Census, can_take_census, check_census, take_census
from pipeline.check.conditions import Conditions, check_conditions, read_conditions
from pipeline.check.contents import check_contents
from pipeline.check.digests import check_version
from pipeline.check.dimensions import check_vector_dimensions
from pipeline.check.existing import check_existing, compare_existing
from pipeline.check.filled import Filled, check_filled, read_filled
from pipeline.check.footing import check_footings, copy_need
from pipeline.check.obstacles import (
    Obstacles,
    check_collations,
    check_exclusive,
    check_extensions,
    check_obstacles,
    read_obstacles,
)
from pipeline.check.pair import Pair
from pipeline.check.preflight import Finding, carried_columns, check_tables, has_own_key, note_columns
from pipeline.check.sizing import (
    Estimate,
    Sample,
    check_memory,
    check_space,
    estimate,
    read_free_bytes,
    take_sample,
)
from pipeline.endpoints import Endpoint
from pipeline.errors import PipelineError, StatementError, StoppedError
from pipeline.events import CheckStarted, Event
from pipeline.ledger.runs import check_revision
from pipeline.options import PreflightOptions
from pipeline.postgres.crew import Crew
from pipeline.postgres.tables import KINDS, Table, describe
from pipeline.settings import Route

_ORDER = {"refuse": 0, "warn": 1, "note": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side as it was found, in figures; None where it could not be asked for, or was not.

    ``system_identifier`` is what a server and its standbys share, ``started`` tells one from the others.
    ``sessions_free`` is by the tightest of the server's, the role's and the database's limits.
    ``rows_estimate`` is the server's own.
    """

    name: str
    address: str
    server: str | None
    system_identifier: int | None
    started: str | None
    role: str | None
    tls: str | None
    pooled: bool | None
    sessions_free: int | None
    encoding: str | None
    collation: str | None
    pgvector: str | None
    pgvector_schema: str | None
    table: str
    kind: str | None
    key: tuple[str, ...]
    bytes: int | None
    rows_estimate: int | None
    indexes: tuple[str, ...]
    deferred_indexes: tuple[str, ...]
    census: Census | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected(Event):
    """The end of a preflight: all that was found, refusals first, and what the copy would take."""

    findings: tuple[Finding, ...]
    source: Side
    target: Side
    estimate: Estimate | None

    @property
    def verdict(self) -> Literal["refused", "clear"]:
        """Return whether a copy would be refused."""
        return "refused" if any(finding.severity == "refuse" for finding in self.findings) else "clear"


@dataclass(slots=True)
class _Look:
    """What one thread saw of one side: as much as it got to see.

    ``unread`` is what a server said where it would not read a sample.
    """

    endpoint: Endpoint
    findings: list[Finding] = field(default_factory=list)
    conditions: Conditions | None = None
    table: Table | None = None
    obstacles: Obstacles | None = None
    sample: Sample | None = None
    unread: Finding | None = None
    census: Census | None = None
    filled: Filled | None = None
    free_bytes: int | None = None

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Turn an error inside into a finding, so that the rest is looked at all the same."""
        try:
            yield
        except StoppedError:
            raise
        except PipelineError as error:
            self.findings.append(Finding(severity="refuse", fact=error.fact, hint=error.hint))


def inspect(route: Route, options: PreflightOptions) -> Generator[Event, None, None]:
    """Look at both sides and yield Inspected at the end; nothing is written anywhere.

    What one side refuses to tell is a finding, and the rest is looked at all the same. With the census
    every row is read, by one scan on each side; else only a sample. Raises StoppedError.
    """
    with Crew() as crew:
        yield CheckStarted(name="servers")
        looks = (_Look(endpoint=route.source), _Look(endpoint=route.target))
        yield from crew.follow([crew.start(_look, crew, look, route, options) for look in looks])
        source, target = looks
        if source.table is not None and target.table is not None:
            yield CheckStarted(name="how fast rows are read")
            columns = carried_columns(source.table, target.table, route.ignore_columns)
            yield from crew.follow([crew.start(_sample, crew, source, columns)])
        if options.census:
            yield CheckStarted(name="vectors")
            work = [crew.start(_take_census, crew, look, route) for look in looks]
            work.append(crew.start(_check_contents, crew, source, target, route))
            yield from crew.follow(work)
        yield _inspected(source, target, route, options)


def _look(crew: Crew, look: _Look, route: Route, options: PreflightOptions) -> None:
    """See the side's server and table, step by step."""
    with look.noting(), crew.session(look.endpoint, "preflight") as session:
        with look.noting():
            look.conditions = read_conditions(session, options.old_transaction_seconds)
        with look.noting():
            check_version(session, is_target=look.endpoint is route.target)
        with look.noting():
            look.table = describe(session, route.table)
            look.obstacles = read_obstacles(session, look.table)
        if look.endpoint is route.target:
            with look.noting():
                check_revision(session)
                if look.table is not None:
                    look.filled = read_filled(session, look.table, route.table)
                    if look.filled.is_foreign and look.obstacles is not None:
                        look.obstacles = look.obstacles.standing()
            with look.noting():
                if look.table is not None:
                    look.free_bytes = read_free_bytes(session, look.table)


def _note(fact: str, hint: str = "") -> Finding:
    return Finding(severity="note", fact=fact, hint=hint)


def _check_both(source: _Look, target: _Look, route: Route, options: PreflightOptions) -> list[Finding]:
    """Judge what was seen: each side by itself, then one against the other."""
    names = (route.source.name, route.target.name)
    findings = [*source.findings, *target.findings]
    footings = [look.conditions.footing if look.conditions is not None else None for look in (source, target)]
    findings += check_footings(*footings, need=copy_need(options.workers))
    for look in (source, target):
        if look.conditions is not None:
            findings += check_conditions(look.conditions)
    findings += _check_tables(source, target, route)
    if target.table is not None:
        findings += check_extensions(source.table.extension if source.table else None, target.table.extension, names)
        if target.filled is not None:
            columns = carried_columns(source.table, target.table, route.ignore_columns) if source.table else ()
            findings += check_filled(target.filled, source.table, target.table, columns, names[1])
        if target.obstacles is not None:
            findings += check_obstacles(target.table, target.obstacles, names[1])
            if source.obstacles is not None:
                findings += check_exclusive(source.obstacles, target.obstacles, target.table.key, names)
                findings += check_collations(source.obstacles, target.obstacles, names)
        if source.table is not None:
            findings += note_columns(source.table, target.table, names, route.ignore_columns)
    return findings


def _check_tables(source: _Look, target: _Look, route: Route) -> tuple[Finding, ...]:
    if source.table is None or target.table is None:
        return ()
    return check_tables(
        source.table,
        target.table,
        route.table,
        route.dimensions,
        (route.source.name, route.target.name),
        to_write=True,
        ignored=route.ignore_columns,
        rounding=route.rounding,
    )


def _sample(crew: Crew, look: _Look, columns: Sequence[str]) -> None:
    table = look.table
    if table is None or not columns:
        return
    readable = {column.name for column in table.columns if column.may_select}
    # A missing right is a finding already.
    if readable.issuperset(columns) and table.may_use_schema and not table.row_security:
        with look.noting(), crew.session(look.endpoint, "preflight") as session:
            try:
                look.sample = take_sample(session, table, columns)
            except StatementError as error:
                look.unread = Finding(severity="refuse", fact=error.fact, hint=error.hint)


def _take_census(crew: Crew, look: _Look, route: Route) -> None:
    if look.table is None:
        return
    with look.noting(), crew.session(look.endpoint, "preflight") as session:
        if can_take_census(session, look.table, route.table):
            look.census = take_census(session, look.table, route.table)


def _check_contents(crew: Crew, source: _Look, target: _Look, route: Route) -> None:
    """Look for rows that cannot be carried, where the descriptions alone do not rule them out."""
    if source.table is None or target.table is None:
        return
    if any(finding.severity == "refuse" for finding in _check_tables(source, target, route)):
        fact = f"the rows of {route.source.name} were not searched for what cannot be carried: the tables do not fit"
        source.findings.append(_note(fact, "run it again when they do"))
        return
    columns = carried_columns(source.table, target.table, route.ignore_columns)
    carried = replace(carried_as(source.table, target.table, columns), key=target.table.key)
    own_key = has_own_key(source.table, target.table)
    with source.noting(), crew.session(source.endpoint, "preflight") as session:
        source.findings += check_vector_dimensions(session, source.table, route.table, route.dimensions)
        source.findings += check_contents(session, carried, target.table, columns, count_keys=not own_key)
    if target.filled is not None and target.filled.is_foreign:
        pair = Pair(source=carried, target=target.table, columns=columns, ignored=route.ignore_columns, horizons=(0, 0))
        with (
            target.noting(),
            crew.session(source.endpoint, "preflight") as here,
            crew.session(target.endpoint, "preflight") as there,
        ):
            target.findings += check_existing(compare_existing(here, there, pair), target.table, target.endpoint.name)


def _check_rows_of_source(look: _Look, options: PreflightOptions) -> tuple[Finding, ...]:
    name = look.endpoint.name
    if look.census is not None:
        return check_census(look.census, name)
    what = f"the rows of {name} were not looked at"
    if options.census:
        return (_note(f"{what}: something else stands in the way", "run it again when that is gone"),)
    unseen = "nulls, dimensions, zero vectors, duplicates, and what cannot be carried"
    return (_note(f"{what} (--no-census): {unseen}", "leave the option out"),)


def _estimate(source: _Look, target: _Look, route: Route) -> Estimate | None:
    if source.table is None or target.obstacles is None:
        return None
    rows = source.census.rows if source.census is not None else source.table.rows_estimate
    return estimate(source.table, source.sample, rows, route.dimensions, target.obstacles, target.free_bytes)


def _inspected(source: _Look, target: _Look, route: Route, options: PreflightOptions) -> Inspected:
    findings = [*_check_both(source, target, route, options), *_check_rows_of_source(source, options)]
    figures = _estimate(source, target, route)
    if figures is not None and target.obstacles is not None:
        findings += check_memory(target.obstacles, figures.rows, route.dimensions, route.target.name)
        findings += check_space(figures, route.target.name)
    # What cannot be read cannot be copied; but whatever refuses by name says better why.
    if source.unread is not None and not any(finding.severity == "refuse" for finding in findings):
        findings.append(source.unread)
    # What stopped one check stopped the next ones too, in the same words.
    distinct = dict.fromkeys(findings)
    return Inspected(
        findings=tuple(sorted(distinct, key=lambda finding: _ORDER[finding.severity])),
        source=_side(source, route),
        target=_side(target, route),
        estimate=figures,
    )


def _side(look: _Look, route: Route) -> Side:
    conditions, table, obstacles = look.conditions, look.table, look.obstacles
    extension = table.extension if table is not None else None
    indexes = obstacles.indexes if obstacles is not None else ()
    return Side(
        name=look.endpoint.name,
        address=look.endpoint.label,
        server=conditions.version if conditions else None,
        system_identifier=conditions.footing.server.system_identifier if conditions else None,
        started=conditions.footing.server.started if conditions else None,
        role=conditions.footing.role if conditions else None,
        tls=conditions.tls if conditions else None,
        pooled=conditions.pooled if conditions else None,
        sessions_free=conditions.footing.room.free if conditions else None,
        encoding=conditions.encoding if conditions else None,
        collation=conditions.collation if conditions else None,
        pgvector=extension.text if extension else None,
        pgvector_schema=extension.schema if extension else None,
        table=route.table.qualified,
        kind=KINDS[table.kind] if table else None,
        key=table.key if table else (),
        bytes=table.bytes if table else None,
        rows_estimate=table.rows_estimate if table else None,
        indexes=tuple(index.name for index in indexes),
        deferred_indexes=tuple(index.name for index in indexes if index.deferred and look.endpoint is route.target),
        census=look.census,
    )
