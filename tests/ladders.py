"""What the tests of verify's rungs share: a ladder over two databases, and tables of generated vectors."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from psycopg2.extras import execute_values

from pipeline.check.ladder import Ladder
from pipeline.check.pair import read_pair
from pipeline.events import CheckDone
from pipeline.options import VerifyOptions
from pipeline.postgres.crew import Crew
from pipeline.settings import Route, TableMapping
from tests.preflights import endpoint
from tests.support import Database

TABLE = "CREATE TABLE public.embeddings (id int PRIMARY KEY, content text, metadata jsonb, embedding {})"


def climb(
    check: Callable[[Crew, Ladder], CheckDone], legacy: Database, main: Database, dimensions: int, **options: Any
) -> CheckDone:
    """Run one check over the tables of two databases."""
    route = Route(
        source=endpoint(legacy, "legacy"), target=endpoint(main, "main"), table=TableMapping(), dimensions=dimensions
    )
    with Crew() as crew:

        def work() -> CheckDone:
            with crew.together((route.source, "verify"), (route.target, "verify")) as (source, target):
                pair = read_pair(crew, source, target, route, to_write=False)
            return check(crew, Ladder(route=route, pair=pair, options=VerifyOptions(**options)))

        return crew.call(work)


def make(
    databases: tuple[Database, ...],
    vectors: NDArray[np.float32],
    type_name: str | None = None,
    schema: str = "public",
    before: str = "",
) -> None:
    """Make the same table of these vectors in each database; row ``i`` has the metadata ``{"n": i}``.

    ``before`` is what is executed on the empty table.
    """
    rows = [(i, f"text {i}", f'{{"n": {i}}}', str(vector.tolist())) for i, vector in enumerate(vectors)]
    for database in databases:
        with database.cursor() as cursor:
            cursor.execute(TABLE.format(type_name or f"{schema}.vector({vectors.shape[1]})"))
            if before:
                cursor.execute(before)
            execute_values(
                cursor, "INSERT INTO public.embeddings VALUES %s", rows, template=f"(%s, %s, %s, %s::{schema}.vector)"
            )
            cursor.execute("ANALYZE public.embeddings")


def random_vectors(rows: int, dimensions: int) -> NDArray[np.float32]:
    """Return vectors in all directions, which a graph finds hard."""
    return np.random.default_rng(7).standard_normal((rows, dimensions)).astype(np.float32)


def grouped_vectors(rows: int, dimensions: int, groups: int, spread: float) -> NDArray[np.float32]:
    """Return vectors around as many centers, like the texts of as many subjects."""
    dice = np.random.default_rng(7)
    centers = dice.standard_normal((groups, dimensions))
    noise = dice.standard_normal((rows, dimensions)) * spread
    return (centers[np.arange(rows) % groups] + noise).astype(np.float32)
