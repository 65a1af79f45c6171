"""What the checks of search begin with: each side's indexes and settings, the queries, and their exact answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from pipeline.check.annindex import AnnIndex, SearchSettings, ann_indexes, search_settings
from pipeline.check.ladder import Exact, Ladder
from pipeline.check.neighbours import (
    SCAN_QUERIES,
    Neighbour,
    Query,
    TimeUpError,
    exact_neighbours,
    sample_queries,
)
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Session, clock
from pipeline.postgres.tables import Table
from pipeline.settings import TableMapping

# As many as are asked first, in one scan; with fewer, parity gives no verdict.
LEAST_QUERIES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One table with its ANN indexes, and the settings that the application's role searches with."""

    session: Session
    table: Table
    mapping: TableMapping
    indexes: tuple[AnnIndex, ...]
    settings: SearchSettings


def role_settings(session: Session, table: Table, role: str | None, *, own_else: bool = False) -> SearchSettings:
    """Return the settings of the application's role (None: the connecting one).

    With ``own_else`` those of the connecting role where there is none of that name: on the source it may have another.
    """
    settings = search_settings(session, table, role)
    return settings if settings.role_exists or not own_else else search_settings(session, table)


def open_sides(crew: Crew, ladder: Ladder, here: Session, there: Session) -> tuple[Side, Side]:
    """Read both sides' ANN indexes, and the settings that the application has there, at once."""
    mapping, role = ladder.route.table, ladder.options.app_role

    def open_side(session: Session, table: Table, own_else: bool) -> Side:
        settings = role_settings(session, table, role, own_else=own_else)
        with session.transaction(read_only=True) as cursor:
            indexes = ann_indexes(cursor, table, mapping)
        return Side(session=session, table=table, mapping=mapping, indexes=indexes, settings=settings)

    return crew.beside(
        partial(open_side, here, ladder.pair.source, True), partial(open_side, there, ladder.pair.target, False)
    )


def stored_queries(ladder: Ladder, session: Session) -> Sequence[Query]:
    """Return the queries that a rung before has asked, else stored vectors of the source, read by ``session``."""
    for exact in ladder.exact.values():
        return exact.queries
    return sample_queries(session, ladder.pair.source, ladder.route.table, ladder.options.queries)


def exact_answers(crew: Crew, ladder: Ladder, metric: str, here: Session, there: Session) -> Exact:
    """Return the exact answers by a metric: those of parity, else its own, as many as half of the budget allows."""
    if metric not in ladder.exact:
        deadline = clock() + ladder.options.budget_seconds / 2
        queries = stored_queries(ladder, here)
        # The first ones are waited for: without them there would be nothing to say.
        ladder.exact |= ask_both(crew, ladder, (here, there), queries, (metric,), deadline, at_least_some=True)
    return ladder.exact[metric]


def ask_both(
    crew: Crew,
    ladder: Ladder,
    sessions: tuple[Session, Session],
    queries: Sequence[Query],
    metrics: Sequence[str],
    deadline: float,
    *,
    at_least_some: bool = False,
) -> dict[str, Exact]:
    """Ask both sides at the same time for exact answers, some queries in each scan, until the deadline (by ``clock``).

    With ``at_least_some`` the first scan has no deadline.
    """
    answers: dict[str, tuple[list[list[Neighbour]], list[list[Neighbour]]]] = {metric: ([], []) for metric in metrics}
    place, size = 0, LEAST_QUERIES
    while place < len(queries):
        batch, began = queries[place : place + size], clock()
        try:
            for metric in metrics:
                crew.check()
                ends = None if at_least_some and not place else deadline
                mine, theirs = _both(crew, ladder, sessions, batch, metric, ends)
                answers[metric][0].extend(mine)
                answers[metric][1].extend(theirs)
        except TimeUpError:
            break
        place += len(batch)
        # More queries in a scan take less time each, so these will be done in the time that is left.
        fitting = (deadline - clock()) / max(clock() - began, 1e-9) * len(batch)
        size = int(min(SCAN_QUERIES, max(1.0, fitting)))
    # A stop cancels the statements too: then it is no matter of time.
    crew.check()
    return {
        metric: Exact(queries=queries[: len(mine)], source=mine, target=theirs)
        for metric, (mine, theirs) in answers.items()
    }


def _both(
    crew: Crew,
    ladder: Ladder,
    sessions: tuple[Session, Session],
    queries: Sequence[Query],
    metric: str,
    deadline: float | None,
) -> tuple[list[list[Neighbour]], list[list[Neighbour]]]:
    seconds = None if deadline is None else deadline - clock()
    if seconds is not None and seconds <= 0:
        raise TimeUpError("the time of the check is up", "give it more: --budget")
    here, there = (
        partial(exact_neighbours, session, table, ladder.route.table, queries, ladder.options.k, metric, seconds)
        for session, table in zip(sessions, (ladder.pair.source, ladder.pair.target), strict=True)
    )
    return crew.beside(here, there)
