"""A search that is asked again and again, as the application asks: how many fail, and how long they take."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from psycopg2 import sql

from pipeline.check.annindex import SearchSettings, application_sql, search_settings
from pipeline.check.neighbours import Query, norm_sql
from pipeline.endpoints import Endpoint
from pipeline.errors import PipelineError, StoppedError
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Session, clock
from pipeline.postgres.tables import Table, describe
from pipeline.postgres.values import key_text_sql, value_sql
from pipeline.settings import TableMapping

PURPOSE = "canary"
# Of so many stored vectors each is asked for in turn.
QUERIES = 10
# A search that shows no byte for so long has failed.
PATIENCE_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryFigures:
    """Searches that were asked, those that failed, and how long the others took, in milliseconds (None: no other).

    ``first_error`` and ``last_error`` are facts as an operator reads them. ``nothing_stored``: no row has a vector.
    """

    searches: int
    errors: int
    p50_ms: float | None
    p95_ms: float | None
    max_ms: float | None
    first_error: str | None
    last_error: str | None
    nothing_stored: bool


class Canary:
    """The searches of one watch. One thread asks; any may read the figures."""

    def __init__(self, endpoint: Endpoint, mapping: TableMapping, app_role: str | None, k: int) -> None:
        self._endpoint, self._mapping, self._app_role, self._k = endpoint, mapping, app_role, k
        self._prepared: tuple[Table, SearchSettings, Sequence[Query]] | None = None
        self._lock = threading.Lock()
        self._times: list[float] = []
        self._errors: list[str] = []

    def sing(self, crew: Crew, seconds: float, interval_seconds: float) -> None:
        """Ask once every interval for so long, at least once. Raises StoppedError alone: what fails is counted."""
        deadline = clock() + seconds
        while True:
            began = clock()
            self._ask_once(crew)
            rest = min(interval_seconds - (clock() - began), deadline - clock())
            crew.pause(max(0.0, rest))
            if clock() >= deadline:
                return

    def _ask_once(self, crew: Crew) -> None:
        try:
            with crew.session(self._endpoint, PURPOSE, PATIENCE_SECONDS) as session:
                milliseconds = self._ask(session)
        except StoppedError:
            raise
        except PipelineError as error:
            crew.check()
            with self._lock:
                self._errors.append(error.fact)
        else:
            with self._lock:
                self._times += [] if milliseconds is None else [milliseconds]

    def _ask(self, session: Session) -> float | None:
        """Return how long one search took; None where there is nothing to ask for. Raises PipelineError."""
        if self._prepared is None or not self._prepared[2]:
            table = describe(session, self._mapping)
            settings = search_settings(session, table, self._app_role)
            self._prepared = (table, settings, _stored_vectors(session, table, self._mapping))
        table, settings, queries = self._prepared
        if not queries:
            return None
        query = queries[len(self._times) % len(queries)]
        statement = application_sql(table, self._mapping, query, self._k).as_string(session.connection)
        with session.transaction(read_only=True) as cursor:
            # BEGIN goes out with it, and is not timed.
            cursor.execute(sql.SQL("SELECT 1; ") + settings.apply_sql())
            asked = clock()
            cursor.execute(statement)
            found = cursor.fetchall()
            milliseconds = (clock() - asked) * 1000
        if not found:
            # Every row may be gone: then the next one draws other vectors, or finds that there is none.
            self._prepared = None
            raise PipelineError(f"{session.label}: a search for a stored vector found no row")
        return milliseconds

    def figures(self) -> CanaryFigures:
        """Return what is known so far."""
        with self._lock:
            times, errors = sorted(self._times), list(self._errors)
        asked = len(times) + len(errors)
        return CanaryFigures(
            searches=asked,
            errors=len(errors),
            p50_ms=_share(times, 0.5),
            p95_ms=_share(times, 0.95),
            max_ms=_share(times, 1.0),
            first_error=errors[0] if errors else None,
            last_error=errors[-1] if errors else None,
            nothing_stored=not asked and self._prepared is not None,
        )


def _share(ordered: Sequence[float], share: float) -> float | None:
    return round(ordered[ceil(share * len(ordered)) - 1], 3) if ordered else None


def _stored_vectors(session: Session, table: Table, mapping: TableMapping) -> list[Query]:
    """Return the first vectors that have a direction, without reading more of the table than it takes."""
    norm = norm_sql(table, mapping.embedding)
    query = sql.SQL(
        "SELECT {key}, {value}::pg_catalog.text FROM {table} WHERE {embedding} IS NOT NULL"
        " AND {norm} > 0 AND {norm} < 'Infinity' LIMIT {count}"
    ).format(
        key=key_text_sql(table, "r"),
        value=value_sql(table, mapping.embedding, "r"),
        table=table.scanned,
        embedding=sql.Identifier(mapping.embedding),
        norm=norm,
        count=sql.Literal(QUERIES),
    )
    return [Query(key=key, vector=vector) for key, vector in session.rows(query)]
