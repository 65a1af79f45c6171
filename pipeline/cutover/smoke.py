"""The smoke search: by the new settings alone, as the application will, stored vectors find their own rows."""

import math
from collections.abc import Callable, Sequence
from functools import partial

from pipeline.check.neighbours import Query, sample_queries
from pipeline.cutover.switching import new_settings
from pipeline.cutover.work import PURPOSE, Deed, Work
from pipeline.errors import DifferencesError, RefusedError
from pipeline.postgres.tables import describe
from pipeline.wording import counted

QUERIES, K = 5, 4
# An index may leave a row out; a search that finds none of its own rows is at another table.
FOUND = 4
# Each takes a moment, in which few rows are written.
DRAWS = 3
# A stored vector is as near to itself as the rounding of its distance.
SAME_DISTANCE = 1e-4
# Keys and distances of the nearest rows, nearest first.
Hits = Sequence[tuple[str, float]]


def smoke(work: Work) -> Deed:
    """Search by the new settings alone, as the application will; stored vectors have to find their own rows."""
    settings = new_settings(work)
    where = work.route.target if work.rehearsal else settings.application()

    def search(vector: Sequence[float]) -> Hits:
        return work.crew.call(work.tools.search.by_vector, where, settings, vector, K)

    nearest = search_stored(partial(work.crew.call, _sample, work), search)
    answers = {}
    for text in work.options.smoke_texts:
        answers[text] = len(work.crew.call(work.tools.search.by_text, where, settings, text, K))
        if not answers[text]:
            raise DifferencesError(f"by the new settings nothing is found for {text!r}", "pipeline search tries it")
    yield from ()
    found = _found(nearest)
    texts = f", {counted(len(answers), 'text')} answered" if answers else ""
    finite = [distance for distance in nearest if math.isfinite(distance)]
    evidence = {"queries": len(nearest), "found": found, "nearest": finite, "texts": len(answers)}
    return (
        evidence,
        f"{found} of {counted(len(nearest), 'stored vector')} found their own rows by the new settings{texts}",
    )


def search_stored(draw: Callable[[], Sequence[Query]], search: Callable[[Sequence[float]], Hits]) -> list[float]:
    """Search for stored vectors; return how far what is nearest to each of them is, infinite where nothing is.

    Main is open by now: a row that is not found, and that is there no more as it was drawn, does not count.
    Where too few are left that count, others are drawn. Raises DifferencesError where too few are found,
    and RefusedError where none is left in the end.
    """
    for _ in range(DRAWS):
        drawn = draw()
        nearest = {}
        for query in drawn:
            hits = search([float(number) for number in query.vector.strip("[]").split(",")])
            nearest[query] = hits[0][1] if hits else math.inf
        missed = {query for query in drawn if nearest[query] > SAME_DISTANCE}
        # The same rows are drawn each time, as long as they are there.
        gone = missed - set(draw()) if missed else set()
        distances = [nearest[query] for query in drawn if query not in gone]
        wanted = min(FOUND, len(drawn))
        if len(distances) >= wanted:
            break
    found = _found(distances)
    if drawn and not distances:
        raise RefusedError(
            f"by the new settings nothing is proved: of {DRAWS} times {counted(len(drawn), 'row')} that were searched"
            " for, each was written over or deleted meanwhile",
            "run the same command again, which goes on here",
        )
    if len(distances) - found > len(drawn) - wanted or (distances and not found):
        raise DifferencesError(
            f"by the new settings {found} of {len(distances)} searches for a stored vector found its row",
            "pipeline settings shows where they point; pipeline verify --check recall looks at the index; to go"
            " back: pipeline rollback",
        )
    return distances


def _found(nearest: Sequence[float]) -> int:
    return sum(distance <= SAME_DISTANCE for distance in nearest)


def _sample(work: Work) -> list[Query]:
    with work.crew.session(work.route.target, PURPOSE) as session:
        return sample_queries(session, describe(session, work.route.table), work.route.table, QUERIES)
