"""Verify: counts, digests with the keys that differ, and parity of search, each a check with a verdict."""

from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from itertools import islice

from psycopg2 import sql

from pipeline.check.digests import BucketMap, Difference, bucket_map, open_buckets
from pipeline.check.neighbours import (
    DISTANCE_TOLERANCE,
    disagreement,
    exact_neighbours,
    sample_queries,
)
from pipeline.check.pair import Pair, read_pair
from pipeline.endpoints import Endpoint
from pipeline.events import CheckDone, CheckStarted, Event, Verdict
from pipeline.ledger import runs, verdicts
from pipeline.ledger.quarantine import count_quarantine, read_quarantine
from pipeline.options import VerifyOptions
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import clock
from pipeline.postgres.tables import Table
from pipeline.postgres.values import Key, key_texts_sql
from pipeline.settings import Route, TableMapping
from pipeline.wording import counted

# Keys that are named; all are counted.
LISTED_KEYS = 20


def verify(route: Route, options: VerifyOptions) -> Generator[Event, None, None]:
    """Compare the two tables and their search; yield a CheckDone for every check.

    Both sides are read at once, nothing is written but the verdicts, in the target's ledger. Raises
    PipelineError where a side cannot be read; a difference is a verdict, not an error.
    """
    with Crew() as crew:
        pair = crew.call(_read_pair, crew, route)
        results: list[CheckDone] = []
        for event in _checks(crew, route, pair, options):
            if isinstance(event, CheckDone):
                results.append(event)
            yield event
        crew.call(_record, crew, route, pair, results)


def _read_pair(crew: Crew, route: Route) -> Pair:
    """Read both tables; where a run has set rows aside, such rows are left out, and looked for in quarantine."""
    with crew.session(route.source, "verify") as source, crew.session(route.target, "verify") as target:
        runs.check_revision(target)
        with target.transaction(read_only=True) as cursor:
            run = runs.latest_run(cursor, route.table)
            set_aside = run is not None and count_quarantine(cursor, run.id) > 0
        return read_pair(crew, source, target, route, to_write=False, set_aside=set_aside)


def _checks(crew: Crew, route: Route, pair: Pair, options: VerifyOptions) -> Iterator[Event]:
    yield CheckStarted(name="rows")
    started = clock()
    sides = ((route.source, pair.source), (route.target, pair.target))
    maps = [crew.start(_read_map, crew, endpoint, table, pair.columns, route.table) for endpoint, table in sides]
    yield from crew.follow(maps)
    here, there = (future.result() for future in maps)
    yield _counts(here, there, clock() - started)
    opened = crew.start(_differences, crew, sides, pair.columns, here.differing(there))
    yield from crew.follow([opened])
    yield _digests(here, there, opened.result(), pair.ignored, clock() - started)
    if pair.unfit:
        looked = crew.start(_quarantine, crew, route, pair)
        yield from crew.follow([looked])
        yield looked.result()
    yield CheckStarted(name="parity")
    parity = crew.start(_parity, crew, route, pair, options)
    yield from crew.follow([parity])
    yield parity.result()


def _read_map(
    crew: Crew, endpoint: Endpoint, table: Table, columns: tuple[str, ...], mapping: TableMapping
) -> BucketMap:
    with crew.session(endpoint, "verify") as session:
        return bucket_map(session, table, columns, mapping.embedding)


def _counts(here: BucketMap, there: BucketMap, seconds: float) -> CheckDone:
    figures: dict[str, object] = {
        "source_rows": here.rows,
        "target_rows": there.rows,
        "source_embeddings": here.embeddings,
        "target_embeddings": there.embeddings,
    }
    same = (here.rows, here.embeddings) == (there.rows, there.embeddings)
    summary = (
        f"{counted(here.rows, 'row')}, {here.embeddings:,} with an embedding, on both sides"
        if same
        else f"{counted(here.rows, 'row')} and {counted(here.embeddings, 'embedding')} on the source,"
        f" {there.rows:,} and {there.embeddings:,} on the target"
    )
    return CheckDone(
        name="counts", verdict="pass" if same else "fail", summary=summary, figures=figures, seconds=seconds
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Differences:
    first: tuple[Difference, ...]
    counts: dict[str, int]


def _differences(
    crew: Crew,
    sides: tuple[tuple[Endpoint, Table], tuple[Endpoint, Table]],
    columns: tuple[str, ...],
    buckets: list[int],
) -> _Differences:
    """Open the buckets that differ: name the first keys, count all."""
    counts = {"missing": 0, "extra": 0, "different": 0}
    if not buckets:
        return _Differences(first=(), counts=counts)
    with crew.session(sides[0][0], "verify") as here, crew.session(sides[1][0], "verify") as there:
        found = open_buckets((here, sides[0][1]), (there, sides[1][1]), columns, buckets)
        first = tuple(islice(found, LISTED_KEYS))
        for difference in first:
            counts[difference.kind] += 1
        for difference in found:
            counts[difference.kind] += 1
    return _Differences(first=first, counts=counts)


def _digests(
    here: BucketMap, there: BucketMap, found: _Differences, ignored: tuple[str, ...], seconds: float
) -> CheckDone:
    buckets = here.differing(there)
    total = sum(found.counts.values())
    figures: dict[str, object] = {
        "rows": here.rows,
        "differing_rows": total,
        **{f"{kind}_rows": count for kind, count in found.counts.items()},
        "ignored_columns": list(ignored),
        "keys": [{"kind": difference.kind, "key": difference.text} for difference in found.first],
    }
    # Unequal sums whose rows are equal when they are opened mean that somebody wrote in between.
    verdict: Verdict = "pass" if not buckets else "fail" if total else "partial"
    summary = {
        "pass": f"every byte of {counted(here.rows, 'row')} is equal",
        "fail": f"{counted(total, 'differing row')}: {found.counts['missing']:,} missing on the target,"
        f" {found.counts['extra']:,} only there, {found.counts['different']:,} with other content",
        "partial": "rows changed while they were compared: run verify again when the writers are quiet",
    }[verdict] + (f"; not compared: {', '.join(ignored)}" if ignored else "")
    return CheckDone(name="digests", verdict=verdict, summary=summary, figures=figures, seconds=seconds)


def _quarantine(crew: Crew, route: Route, pair: Pair) -> CheckDone:
    """Check that every row which was left out of the comparison lies in quarantine, and say how many those are."""
    started = clock()
    with crew.session(route.source, "verify") as source, crew.session(route.target, "verify") as target:
        with target.transaction(read_only=True) as cursor:
            run = runs.latest_run(cursor, route.table)
            aside = {row.key for row in read_quarantine(cursor, run.id)} if run is not None else set()
        table = pair.source.only_left_out()
        query = sql.SQL("SELECT {} FROM {}").format(key_texts_sql(table), table.scanned)
        left_out = 0
        lost: list[Key] = []
        for batch in source.stream(query):
            left_out += len(batch)
            lost += [tuple(key) for key in batch if tuple(key) not in aside]
    figures: dict[str, object] = {
        "quarantined_rows": left_out - len(lost),
        "unknown_rows": len(lost),
        "keys": [{"kind": "not set aside", "key": ", ".join(key)} for key in lost[:LISTED_KEYS]],
    }
    summary = (
        f"{counted(len(lost), 'row')} of the source cannot be carried, and {'is' if len(lost) == 1 else 'are'} not in"
        " quarantine: run pipeline quarantine --retry"
        if lost
        else f"{counted(left_out, 'row')} of the source cannot be carried, and {'lies' if left_out == 1 else 'lie'} in"
        " quarantine: pipeline quarantine"
    )
    return CheckDone(
        name="quarantine",
        verdict="fail" if lost else "pass",
        summary=summary,
        figures=figures,
        seconds=clock() - started,
    )


def _parity(crew: Crew, route: Route, pair: Pair, options: VerifyOptions) -> CheckDone:
    started = clock()
    with crew.session(route.source, "verify") as here, crew.session(route.target, "verify") as there:
        queries = sample_queries(here, pair.source, route.table, options.queries)
        theirs = crew.start(exact_neighbours, there, pair.target, route.table, queries, options.k)
        mine = exact_neighbours(here, pair.source, route.table, queries, options.k)
        answers = zip(queries, mine, theirs.result(), strict=True)
        wrong = [found for query, left, right in answers if (found := disagreement(query, left, right)) is not None]
    figures: dict[str, object] = {
        "queries": len(queries),
        "k": options.k,
        "metric": "cosine",
        "tolerance": DISTANCE_TOLERANCE,
        "disagreements": [asdict(one) for one in wrong],
    }
    if wrong:
        summary = f"{len(wrong)} of {len(queries)} queries are answered differently"
    elif queries:
        summary = f"{len(queries)} stored vectors find the same {options.k} nearest rows on both sides"
    else:
        summary = "no row of the source has an embedding that could be asked for"
    return CheckDone(
        name="parity",
        verdict="fail" if wrong else "pass",
        summary=summary,
        figures=figures,
        seconds=clock() - started,
    )


def _record(crew: Crew, route: Route, pair: Pair, results: list[CheckDone]) -> None:
    with crew.session(route.target, "verify") as session, session.transaction() as cursor:
        for result in results:
            verdicts.record_verdict(cursor, result, pair.target, route.labels, pair.horizons)
