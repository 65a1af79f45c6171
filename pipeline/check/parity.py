"""Parity: the exact nearest rows of many queries are the same on both sides, as near as they were before."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC
from functools import partial
from itertools import zip_longest

from pipeline.check.annindex import ann_indexes
from pipeline.check.ladder import Exact, Ladder
from pipeline.check.neighbours import (
    DISTANCE_TOLERANCE,
    Disagreement,
    Excluded,
    Neighbour,
    Query,
    TimeUpError,
    count_excluded,
    disagreement,
    sample_queries,
)
from pipeline.check.sides import LEAST_QUERIES, ask_both
from pipeline.events import CheckDone, Verdict
from pipeline.ledger.baselines import Baseline, Frozen, latest_baseline
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Session, clock
from pipeline.postgres.tables import Table
from pipeline.settings import TableMapping
from pipeline.wording import counted

# By which the application searches.
FIRST_METRIC = "cosine"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A query, and what the source answered at the capture of the baseline, by metric."""

    query: Query
    frozen: dict[str, Frozen] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class _Found:
    """What came of the queries by one metric; ``changed`` are those that the source itself answers differently."""

    reached: int
    disagreements: list[Disagreement]
    frozen: int
    changed: int


def search_metrics(session: Session, table: Table, mapping: TableMapping) -> tuple[str, ...]:
    """Return cosine, and the metrics of the ANN indexes on the embedding, where these are others."""
    with session.transaction(read_only=True) as cursor:
        indexes = ann_indexes(cursor, table, mapping)
    found = [index.metric for index in indexes if index.valid and index.metric is not None]
    return tuple(dict.fromkeys((FIRST_METRIC, *found)))


def check_parity(crew: Crew, ladder: Ladder) -> CheckDone:
    """Ask both sides for the exact nearest rows of stored vectors, and of the newest baseline's queries.

    By cosine, and by the metric of the target's ANN index. Ends when the budget does: with fewer than
    LEAST_QUERIES reached it is partial. Leaves the answers in ``ladder.exact``. Where the source answers a frozen
    query otherwise than at the capture, and the target as the source, the source has changed: that is
    counted, and no failure. Raises PipelineError where a side cannot be asked.
    """
    started = clock()
    route, pair, options = ladder.route, ladder.pair, ladder.options
    deadline = started + options.budget_seconds
    with crew.together((route.source, "verify"), (route.target, "verify")) as (here, there):
        metrics = search_metrics(there, pair.target, route.table)
        with there.transaction(read_only=True) as cursor:
            baseline = latest_baseline(cursor, route.table)
        stored = sample_queries(here, pair.source, route.table, options.queries)
        asked = _merged(stored, _frozen_queries(baseline, pair.target, ladder))
        exact = ask_both(crew, ladder, (here, there), [one.query for one in asked], metrics, deadline)
        excluded = _count_excluded(crew, ladder, (here, there), deadline)
    found = {metric: _compare(asked, exact[metric], metric, options.k) for metric in metrics}
    ladder.exact |= {metric: one for metric, one in exact.items() if one.queries or not asked}
    first = asked[: found[FIRST_METRIC].reached]
    drawn = {query.vector for query in stored}
    figures: dict[str, object] = {
        "k": options.k,
        "tolerance": DISTANCE_TOLERANCE,
        "budget_seconds": options.budget_seconds,
        "metrics": {
            metric: {
                "queries": one.reached,
                "asked": len(asked),
                "disagreements": [{"query": wrong.query, "reason": wrong.reason} for wrong in one.disagreements],
            }
            for metric, one in found.items()
        },
        "queries": len(first),
        "asked": len(asked),
        "stored_queries": sum(one.query.vector in drawn for one in first),
        "baseline_queries": sum(bool(one.frozen) for one in first),
        "text_queries": sum(one.query.origin == "text" for one in first),
        "baseline_at": None if baseline is None else _iso(baseline),
        "baseline_changed": sum(one.changed for one in found.values()),
        "excluded": {side: _excluded_figures(one) for side, one in zip(("source", "target"), excluded, strict=True)},
        "disagreements": [
            {"query": wrong.query, "reason": wrong.reason, "metric": metric}
            for metric, one in found.items()
            for wrong in one.disagreements
        ],
    }
    least = min(one.reached for one in found.values())
    verdict: Verdict = "partial" if least < min(LEAST_QUERIES, len(asked)) else "pass"
    if any(one.disagreements for one in found.values()):
        verdict = "fail"
    summary = _summary(verdict, ladder, [one.query for one in first], len(asked), found)
    if baseline is not None and verdict != "partial":
        summary += _since_capture(baseline, found)
    return CheckDone(name="parity", verdict=verdict, summary=summary, figures=figures, seconds=clock() - started)


def _iso(baseline: Baseline) -> str:
    return baseline.captured_at.astimezone(UTC).isoformat(timespec="seconds")


def _excluded_figures(excluded: Excluded | None) -> dict[str, int] | None:
    if excluded is None:
        return None
    return {"nulls": excluded.nulls, "not_a_number": excluded.not_a_number}


def _frozen_queries(baseline: Baseline | None, target: Table, ladder: Ladder) -> list[_Asked]:
    """Return the baseline's queries that can be asked today: the column may have become another one since."""
    column = target.column(ladder.route.table.embedding)
    assert column is not None
    found: dict[str, _Asked] = {}
    texts: dict[str | None, int] = {}
    for one in () if baseline is None else baseline.queries:
        if _shape(one.vector) != (column.base_type == "sparsevec", ladder.route.dimensions):
            continue
        if one.origin == "text":
            key = f"text {texts.setdefault(one.text, len(texts) + 1)}"
            query = Query(key=key, vector=one.vector, origin="text")
        else:
            query = Query(key=one.key or "", vector=one.vector)
        found.setdefault(one.vector, _Asked(query=query)).frozen[one.metric] = one
    return list(found.values())


def _shape(vector: str) -> tuple[bool, int]:
    """Return whether a vector's text is a sparse one's, and its dimension."""
    if vector.startswith("{"):
        return True, int(vector.rpartition("/")[2])
    return False, vector.count(",") + 1


def _merged(stored: Sequence[Query], frozen: Sequence[_Asked]) -> list[_Asked]:
    """Return all queries, each once, by turns: whenever the time is up, some of both were asked."""
    found: dict[str, _Asked] = {}
    known = {one.query.vector: one for one in frozen}
    for query, one in zip_longest(stored, frozen):
        for asked in (None if query is None else known.get(query.vector, _Asked(query=query)), one):
            if asked is not None:
                found.setdefault(asked.query.vector, asked)
    return list(found.values())


def _count_excluded(
    crew: Crew, ladder: Ladder, sessions: tuple[Session, Session], deadline: float
) -> tuple[Excluded | None, Excluded | None]:
    """Count on both sides what no search finds, where there is time left for the scan."""
    seconds = deadline - clock()

    def count(session: Session, table: Table) -> Excluded | None:
        try:
            return count_excluded(session, table, ladder.route.table, seconds) if seconds > 0 else None
        except TimeUpError:
            crew.check()
            return None

    here, there = sessions
    return crew.beside(partial(count, here, ladder.pair.source), partial(count, there, ladder.pair.target))


def _compare(asked: Sequence[_Asked], exact: Exact, metric: str, k: int) -> _Found:
    found = _Found(reached=len(exact.queries), disagreements=[], frozen=0, changed=0)
    for one, mine, theirs in zip(asked[: found.reached], exact.source, exact.target, strict=True):
        wrong = disagreement(one.query, mine, theirs)
        if (frozen := one.frozen.get(metric)) is not None:
            found.frozen += 1
            then, common = _answers(frozen), min(k, frozen.k)
            here = disagreement(one.query, then[:common], mine[:common])
            there = disagreement(one.query, then[:common], theirs[:common])
            if wrong is not None:
                wrong = Disagreement(query=wrong.query, reason=wrong.reason + _blame(here, there))
            elif here is None:
                wrong = there
            else:
                found.changed += 1
        if wrong is not None:
            found.disagreements.append(wrong)
    return found


def _answers(frozen: Frozen) -> list[Neighbour]:
    return [Neighbour(key=key, distance=distance) for key, distance in frozen.answers]


def _blame(here: Disagreement | None, there: Disagreement | None) -> str:
    """Return which side answers as at the capture, where it is one of them."""
    if (here is None) == (there is None):
        return ""
    return f"; the {'source' if here is None else 'target'} answers as the source did at the capture"


def _summary(verdict: Verdict, ladder: Ladder, first: Sequence[Query], asked: int, found: Mapping[str, _Found]) -> str:
    least = min(one.reached for one in found.values())
    if not asked:
        return "no row of the source has an embedding that could be asked for"
    budget = f"{least:,} of {asked:,} queries in {ladder.options.budget_seconds:g} s"
    if verdict == "partial":
        return f"{budget}, too few to say anything: give it more time, --budget SECONDS"
    by = f", by {' and '.join(metric.replace('_', ' ') for metric in found)}" if len(found) > 1 else ""
    if verdict == "fail":
        return f"{_failure(found, len(first))}; the check digests names the rows, pipeline sync brings them"
    subject = budget if least < asked else " and ".join(_subjects(first))
    return f"{subject} find the same {ladder.options.k} nearest rows on both sides{by}"


def _failure(found: Mapping[str, _Found], reached: int) -> str:
    """Return how many queries are answered differently, and how the first of them is."""
    queries = len({wrong.query for one in found.values() for wrong in one.disagreements})
    metric, first = next((metric, one.disagreements[0]) for metric, one in found.items() if one.disagreements)
    by = f" by {metric.replace('_', ' ')}" if len(found) > 1 else ""
    return f"{queries:,} of {reached:,} queries are answered differently, the first{by}: {first.query}: {first.reason}"


def _subjects(queries: Sequence[Query]) -> Iterator[str]:
    texts = sum(query.origin == "text" for query in queries)
    if texts < len(queries):
        yield counted(len(queries) - texts, "stored vector")
    if texts:
        yield counted(texts, "text")


def _since_capture(baseline: Baseline, found: Mapping[str, _Found]) -> str:
    """Return how many answers are still as they were at the capture."""
    frozen, changed = (sum(getattr(one, name) for one in found.values()) for name in ("frozen", "changed"))
    at = _iso(baseline)
    if changed:
        return f"; {changed:,} of {frozen:,} frozen answers: the source itself answers differently since {at}"
    if not frozen or any(one.disagreements for one in found.values()):
        return ""
    return f"; so does what was frozen at {at} ({counted(frozen, 'answer')})"
