"""Latency: how long the application's search takes on each side, one client and several."""

from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from functools import partial
from math import ceil

from psycopg2 import sql

from pipeline.check.annindex import SearchSettings, application_sql
from pipeline.check.ladder import Ladder
from pipeline.check.neighbours import Query
from pipeline.check.sides import role_settings, stored_queries
from pipeline.endpoints import Endpoint
from pipeline.errors import CrowdedError, RefusedError, StatementError
from pipeline.events import CheckDone, Verdict
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Session, clock
from pipeline.postgres.tables import Table
from pipeline.settings import TableMapping

# How many ask at once, the second time: fewer where the server has no room for so many.
CLIENTS = 4
# Sessions of this kind are new ones where a first execution is measured.
PURPOSE = "latency"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    endpoint: Endpoint
    table: Table
    mapping: TableMapping
    settings: SearchSettings
    queries: Sequence[Query]
    k: int


def check_latency(crew: Crew, ladder: Ladder) -> CheckDone:
    """Time the same queries on both sides, one side after the other, each with its settings in force.

    It is information: it fails only where a query does. Raises PipelineError where a side cannot be reached.
    """
    started = clock()
    route, budget = ladder.route, ladder.options.budget_seconds
    with crew.together((route.source, "verify"), (route.target, "verify")) as (here, there):
        queries = stored_queries(ladder, here)
        settings = crew.beside(
            partial(role_settings, here, ladder.pair.source, ladder.options.app_role, own_else=True),
            partial(role_settings, there, ladder.pair.target, ladder.options.app_role),
        )
    figures: dict[str, object] = {"clients": [], "source": {}, "target": {}}
    if not queries:
        return _done("pass", "no row of the source has an embedding that could be asked for", figures, started)
    sides = (
        ("source", route.source, ladder.pair.source, settings[0]),
        ("target", route.target, ladder.pair.target, settings[1]),
    )
    measured: dict[str, dict[int, dict[str, dict[str, float]]]] = {}
    for number, (name, endpoint, table, found) in enumerate(sides, 1):
        side = _Side(
            endpoint=endpoint,
            table=table,
            mapping=route.table,
            settings=found,
            queries=queries,
            k=ladder.options.k,
        )
        try:
            measured[name] = _measure(crew, side, started + budget * (number - 1) / 2, budget / 2)
        except (StatementError, RefusedError) as error:
            fact = f"the application's search fails on {endpoint.name}: {error.fact}"
            return _done("fail", f"{fact}; {error.hint}" if error.hint else fact, figures, started)
        figures[name] = {str(clients): times for clients, times in measured[name].items()}
    figures["clients"] = sorted({clients for times in measured.values() for clients in times})
    return _done("pass", _summary(route.source.name, route.target.name, measured), figures, started)


def _done(verdict: Verdict, summary: str, figures: dict[str, object], started: float) -> CheckDone:
    return CheckDone(name="latency", verdict=verdict, summary=summary, figures=figures, seconds=clock() - started)


def _summary(source: str, target: str, measured: Mapping[str, Mapping[int, Mapping[str, Mapping[str, float]]]]) -> str:
    """Return what a person compares: half of the searches, and all but 5 %, of one client that has asked before."""
    parts = []
    for name, side in ((source, "source"), (target, "target")):
        warm = measured[side][1]["warm"]
        parts.append(f"{name} {warm['p50']:.1f} ms (p95 {warm['p95']:.1f})")
    return f"a search takes {', '.join(parts)}; one client, asked before"


def _measure(crew: Crew, side: _Side, begin: float, budget: float) -> dict[int, dict[str, dict[str, float]]]:
    """Return the times by number of clients, within ``budget`` seconds from ``begin``, or from now where it is late."""
    begin = max(begin, clock())
    times = {1: _together(crew, side, 1, begin + budget / 2)}
    for clients in range(CLIENTS, 1, -1):
        try:
            times[clients] = _together(crew, side, clients, begin + budget)
        except CrowdedError:
            continue
        break
    return times


def _together(crew: Crew, side: _Side, clients: int, deadline: float) -> dict[str, dict[str, float]]:
    """Time ``clients`` that ask at once, each on a session of its own: its share of the queries, twice."""
    wanted = [(side.endpoint, PURPOSE)] * clients
    # Of its kind the session that was made last is taken: those of the round before are warm.
    crew.warm(*wanted)
    crew.warmed()
    with crew.together(*wanted) as sessions:
        half = (clock() + deadline) / 2
        # All queries are asked once, by whichever client: a fleet is not timed for longer than one.
        cold = _round(crew, side, sessions, [ceil(len(side.queries) / clients)] * clients, half)
        warm = _round(crew, side, sessions, [len(times) for times in cold], deadline)
    return {"cold": _percentiles(cold), "warm": _percentiles(warm)}


def _round(
    crew: Crew, side: _Side, sessions: Sequence[Session], counts: Sequence[int], deadline: float
) -> list[list[float]]:
    """Let every session ask so many queries, each beginning elsewhere; return the milliseconds of each."""
    asked = [
        crew.start(_ask, crew, side, session, place * len(side.queries) // len(sessions), count, deadline)
        for place, (session, count) in enumerate(zip(sessions, counts, strict=True))
    ]
    # All of them: one that fails must not take the sessions away from the others.
    wait(asked)
    return [future.result() for future in asked]


def _ask(crew: Crew, side: _Side, session: Session, first: int, count: int, deadline: float) -> list[float]:
    """Ask queries one by one, at least one, until the deadline; return the milliseconds of each."""
    times: list[float] = []
    with session.transaction(read_only=True) as cursor:
        # BEGIN goes out with it, and is not timed.
        cursor.execute(sql.SQL("SELECT 1; ") + side.settings.apply_sql())
        for number in range(count):
            crew.check()
            if times and clock() >= deadline:
                break
            query = side.queries[(first + number) % len(side.queries)]
            statement = application_sql(side.table, side.mapping, query, side.k).as_string(session.connection)
            asked = clock()
            cursor.execute(statement)
            cursor.fetchall()
            times.append((clock() - asked) * 1000)
    return times


def _percentiles(times: Sequence[Sequence[float]]) -> dict[str, float]:
    ordered = sorted(one for client in times for one in client)
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    found = {name: ordered[ceil(share * len(ordered)) - 1] for name, share in shares.items()}
    return {**found, "queries": len(ordered)}
