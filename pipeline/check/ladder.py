"""What every rung of verify is given: the two tables, the options, and what rungs before it have found."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.check.neighbours import Neighbour, Query
from pipeline.check.pair import Pair
from pipeline.options import VerifyOptions
from pipeline.settings import Route


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """Queries and the exact answers of both sides, in the queries' order; by one metric, without any index."""

    queries: Sequence[Query]
    source: Sequence[Sequence[Neighbour]]
    target: Sequence[Sequence[Neighbour]]


@dataclass(slots=True, kw_only=True)
class Ladder:
    """One verify. ``exact`` are the answers by metric, left by parity for the rungs after it."""

    route: Route
    pair: Pair
    options: VerifyOptions
    exact: dict[str, Exact] = field(default_factory=dict)
