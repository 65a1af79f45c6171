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
    if (known := ladder.exact.get(metric)) is not None:
        return known
    deadline = clock() + ladder.options.budget_seconds / 2
    queries = stored_queries(ladder, here)
    mine: list[list[Neighbour]] = []
    theirs: list[list[Neighbour]] = []
    size = 2
    while len(mine) < len(queries):
        crew.check()
        some = queries[len(mine) : len(mine) + size]
        # The first ones are waited for: without them there would be nothing to say.
        seconds = deadline - clock() if mine else None
        if seconds is not None and seconds <= 0:
            break
        here_and_there = (
            partial(exact_neighbours, session, table, ladder.route.table, some, ladder.options.k, metric, seconds)
            for session, table in ((here, ladder.pair.source), (there, ladder.pair.target))
        )
        try:
            one, other = crew.beside(*here_and_there)
        except TimeUpError:
            # A stop cancels the statements too: then it is no matter of time.
            crew.check()
            break
        mine += one
        theirs += other
        # One scan answers many queries, in little more time.
        size = min(4 * size, SCAN_QUERIES)
    ladder.exact[metric] = Exact(queries=queries[: len(mine)], source=mine, target=theirs)
    return ladder.exact[metric]
