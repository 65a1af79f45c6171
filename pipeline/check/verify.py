"""Verify: the ladder of checks, each with a verdict, and the horizons that the verdicts speak of."""

from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from types import MappingProxyType

from pipeline import __version__
from pipeline.check.application import check_application
from pipeline.check.censuses import check_census
from pipeline.check.ladder import Ladder
from pipeline.check.latency import check_latency
from pipeline.check.pair import Pair, read_pair
from pipeline.check.parity import check_parity
from pipeline.check.recall import check_recall
from pipeline.check.rows import Rows, check_quarantine, compare_rows, renew_rows
from pipeline.check.searchplan import check_plan
from pipeline.errors import SettingsError
from pipeline.events import CheckDone, CheckStarted, Event, VerifyDone
from pipeline.ledger import runs, verdicts
from pipeline.ledger.passes import record_pass
from pipeline.ledger.quarantine import count_quarantine
from pipeline.options import CHECKS, VerifyOptions
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Cursor
from pipeline.postgres.tables import Table
from pipeline.settings import Route

Rung = Callable[[Crew, Ladder], CheckDone]
# After the rows, in this order: parity leaves its exact answers to those that follow.
_RUNGS: MappingProxyType[str, Rung] = MappingProxyType(
    {
        "census": check_census,
        "parity": check_parity,
        "recall": check_recall,
        "plan": check_plan,
        "latency": check_latency,
        "application": check_application,
    }
)


def verify(route: Route, options: VerifyOptions, shared: Crew | None = None) -> Generator[Event, None, None]:
    """Compare the two tables and their search; yield a CheckDone for every check, at the end VerifyDone.

    Both sides are read at once, nothing is written but the verdicts, in the target's ledger. A longer piece of
    work shares its crew. Raises PipelineError where a side cannot be read; a difference is a verdict, not an error.
    """
    _check_names(options)
    with Crew() if shared is None else nullcontext(shared) as crew:
        began, pair = crew.call(_read_pair, crew, route)
        ladder = Ladder(route=route, pair=pair, options=options)
        results: list[CheckDone] = []
        rows: Rows | None = None
        if not options.checks or "rows" in options.checks:
            rows = yield from _compare(crew, ladder)
            results += rows.checks
            yield from rows.checks
        for name, rung in _rungs(ladder):
            yield CheckStarted(name=name)
            work = crew.start(rung, crew, ladder)
            yield from crew.follow([work])
            results.append(work.result())
            yield work.result()
        ended = crew.call(_record, crew, ladder, rows, results)
        yield _done(ladder, results, (began, ended))


def _check_names(options: VerifyOptions) -> None:
    if options.incremental and any(name != "rows" for name in options.checks):
        raise SettingsError("--incremental renews the verdict on the rows alone", "leave --check out, or --incremental")
    for name in options.checks:
        if name not in CHECKS:
            raise SettingsError(f"there is no check named {name}", f"the checks are {', '.join(CHECKS)}")


def _read_pair(crew: Crew, route: Route) -> tuple[datetime, Pair]:
    """Read the target's clock, and both tables.

    Where a run has set rows aside, such rows are left out, and looked for in quarantine.
    """
    with crew.session(route.source, "verify") as source, crew.session(route.target, "verify") as target:
        runs.check_revision(target)
        with target.transaction(read_only=True) as cursor:
            run = runs.latest_run(cursor, route.table)
            set_aside = run is not None and count_quarantine(cursor, run.id) > 0
            began = _clock(cursor)
        return began, read_pair(crew, source, target, route, to_write=False, set_aside=set_aside)


def _clock(cursor: Cursor) -> datetime:
    """Return the server's time, in UTC."""
    cursor.execute("SELECT pg_catalog.clock_timestamp()")
    ((now,),) = cursor.fetchall()
    assert isinstance(now, datetime)
    return now.astimezone(UTC)


def _compare(crew: Crew, ladder: Ladder) -> Generator[Event, None, Rows]:
    yield CheckStarted(name="rows")
    work = crew.start(renew_rows if ladder.options.incremental else compare_rows, crew, ladder)
    yield from crew.follow([work])
    return work.result()


def _rungs(ladder: Ladder) -> Iterator[tuple[str, Rung]]:
    """Yield the checks that follow the rows: all, those that were asked for, or none where a verdict is renewed."""
    wanted = ladder.options.checks
    if ladder.pair.unfit and (not wanted or "rows" in wanted):
        yield "quarantine", check_quarantine
    if not (ladder.options.incremental and not wanted):
        yield from ((name, rung) for name, rung in _RUNGS.items() if not wanted or name in wanted)


def _record(crew: Crew, ladder: Ladder, rows: Rows | None, results: list[CheckDone]) -> datetime:
    """Store the pass and every verdict, in one transaction; return the time."""
    route, pair = ladder.route, ladder.pair
    horizons = pair.horizons if rows is None else (rows.horizons[0].horizon, rows.horizons[1].horizon)
    with crew.session(route.target, "verify") as session, session.transaction() as cursor:
        run = runs.latest_run(cursor, route.table)
        number = None
        if rows is not None:
            number = record_pass(
                cursor,
                "incremental" if ladder.options.incremental else "verify",
                None if run is None else run.id,
                route.labels,
                route.table,
                runs.fingerprint(pair.source, pair.target, pair.columns),
                (rows.horizons[0].to_json(), rows.horizons[1].to_json()),
                covered=rows.covered,
                equal=rows.equal,
                figures={"checks": [result.name for result in results]},
            )
        for result in results:
            verdicts.record_verdict(cursor, result, pair.target, route.labels, horizons, number)
        return _clock(cursor)


def _done(ladder: Ladder, results: list[CheckDone], times: tuple[datetime, datetime]) -> VerifyDone:
    pair, route = ladder.pair, ladder.route
    return VerifyDone(
        verdict="pass" if all(result.verdict == "pass" for result in results) else "fail",
        kind="incremental" if ladder.options.incremental else "full",
        source=route.source.label,
        target=route.target.label,
        source_server=_server(pair.source),
        target_server=_server(pair.target),
        table=pair.target.qualified,
        columns=pair.columns,
        ignored=pair.ignored,
        began=times[0],
        ended=times[1],
        tool_version=__version__,
        checks=tuple(results),
    )


def _server(table: Table) -> str:
    """Return what serves a table, in words."""
    extension = "no pgvector" if table.extension is None else f"pgvector {table.extension.text}"
    return f"PostgreSQL {table.version // 10000}.{table.version % 10000}, {extension}"
