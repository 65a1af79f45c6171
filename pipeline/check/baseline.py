"""The capture of a baseline: queries, and what the source finds for them today, frozen in the target's ledger."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from pipeline.check.neighbours import SCAN_QUERIES, Query, exact_neighbours, sample_queries
from pipeline.check.pair import Pair, read_pair
from pipeline.check.parity import search_metrics
from pipeline.errors import RefusedError
from pipeline.events import CheckStarted, Event
from pipeline.ledger import runs
from pipeline.ledger.baselines import Frozen, add_baseline
from pipeline.options import DEFAULT_K, DEFAULT_QUERIES
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Session, clock
from pipeline.settings import Route, TableMapping


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureOptions:
    """How many stored vectors are asked for, how many neighbours each, and texts with their vectors besides."""

    queries: int = DEFAULT_QUERIES
    k: int = DEFAULT_K
    texts: tuple[tuple[str, tuple[float, ...]], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineDone(Event):
    """The end of a capture: what was kept. ``answers`` counts each query once for every metric."""

    captured_at: datetime
    source: str
    target: str
    table: str
    stored_queries: int
    text_queries: int
    k: int
    metrics: tuple[str, ...]
    answers: int
    seconds: float


def capture(route: Route, options: CaptureOptions) -> Generator[Event, None, None]:
    """Freeze what the source finds today; yield a BaselineDone at the end.

    Stored vectors and the options' texts are asked for by cosine, and by the metric of the target's ANN index.
    The source is only read; of the target only the ledger is written. Rows that cannot be carried are left
    out. Raises RefusedError where the tables do not fit, or the source has no vector that could be asked for.
    """
    started = clock()
    with Crew() as crew:
        yield CheckStarted(name="what the source finds")
        future = crew.start(_capture, crew, route, options, started)
        yield from crew.follow([future])
        yield future.result()


def _capture(crew: Crew, route: Route, options: CaptureOptions, started: float) -> BaselineDone:
    with crew.together((route.source, "baseline"), (route.target, "baseline")) as (source, target):
        runs.check_revision(target)
        pair = read_pair(crew, source, target, route, to_write=False, set_aside=True)
        metrics = search_metrics(target, pair.target, route.table)
        stored = sample_queries(source, pair.source, route.table, options.queries)
        if not stored:
            raise RefusedError(
                f"{source.label} has no embedding in {pair.source.qualified} that could be asked for",
                "pipeline settings shows which table is read",
            )
        asked = [*((query, None) for query in stored), *_text_queries(pair, route, options.texts)]
        frozen = [
            one for metric in metrics for one in _freeze(crew, source, pair, route.table, asked, options.k, metric)
        ]
        with target.transaction() as cursor:
            at = add_baseline(cursor, route.source.label, route.table, frozen)
    return BaselineDone(
        captured_at=at,
        source=route.source.label,
        target=route.target.label,
        table=pair.target.qualified,
        stored_queries=len(stored),
        text_queries=len(asked) - len(stored),
        k=options.k,
        metrics=metrics,
        answers=len(frozen),
        seconds=clock() - started,
    )


def _text_queries(
    pair: Pair, route: Route, texts: Sequence[tuple[str, Sequence[float]]]
) -> Iterator[tuple[Query, str | None]]:
    """Yield each text's vector in the text form of the type that is compared."""
    column = pair.target.column(route.table.embedding)
    assert column is not None
    for number, (text, vector) in enumerate(texts, 1):
        # Nine digits give back the same float4.
        numbers = [format(component, ".9g") for component in vector]
        if column.base_type == "sparsevec":
            places = ",".join(f"{place}:{one}" for place, one in enumerate(numbers, 1) if float(one))
            written = f"{{{places}}}/{len(numbers)}"
        else:
            written = f"[{','.join(numbers)}]"
        yield Query(key=f"text {number}", vector=written, origin="text"), text


def _freeze(
    crew: Crew,
    source: Session,
    pair: Pair,
    mapping: TableMapping,
    asked: Sequence[tuple[Query, str | None]],
    k: int,
    metric: str,
) -> Iterator[Frozen]:
    """Ask the source, some queries in each scan, so that a stop is heard in between."""
    for start in range(0, len(asked), SCAN_QUERIES):
        crew.check()
        some = asked[start : start + SCAN_QUERIES]
        answers = exact_neighbours(source, pair.source, mapping, [query for query, _ in some], k, metric)
        for (query, text), found in zip(some, answers, strict=True):
            yield Frozen(
                metric=metric,
                k=k,
                vector=query.vector,
                answers=tuple((neighbour.key, neighbour.distance) for neighbour in found),
                origin=query.origin,
                key=query.key if query.origin == "stored" else None,
                text=text,
            )
