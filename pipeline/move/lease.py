"""Holding the lease of a run: taken once, renewed on a connection of its own, lost loudly."""

import threading
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from psycopg2 import sql

from pipeline.endpoints import Endpoint
from pipeline.errors import BusyError, ConflictError, PipelineError, UnreachableError
from pipeline.ledger import leases, runs
from pipeline.postgres.crew import TICK_SECONDS, Crew
from pipeline.postgres.database import Session, clock

# A killed copier's backend needs a moment to notice; a living one is still there after this long.
GRACE_SECONDS = 2.0
# What the session is called that keeps a lease, and those that move rows; in a run's transactions its number
# and generation are added.
LEASE, RUN = "lease", "run"
# Each costs a lock timeout; what still holds the lease's row then is nobody of ours.
MAX_EVICTIONS = 3
RETRY_SECONDS = 0.5


def purpose(run_id: int, generation: int) -> str:
    """Return what a run's sessions are called in pg_stat_activity, by generation."""
    return f"{RUN} {run_id}.{generation}"


class Lease:
    """The lease of one run, held by a thread of the crew until ``release``."""

    def __init__(
        self, crew: Crew, target: Endpoint, run: runs.Run, deadline_seconds: float, *, wait_for_it: bool = True
    ) -> None:
        """Take the lease. Raises BusyError where another copier holds it.

        A server out of reach is tried again until the deadline. A lease that ran out meanwhile is
        still ours until somebody takes it over. Without ``wait_for_it`` whatever needs it first waits, and
        raises what ``future`` fails with.
        """
        self.run_id = run.id
        self._crew = crew
        self._target = target
        self._deadline_seconds = deadline_seconds
        self._done = threading.Event()
        self._left = False
        self._renewed = clock()
        self._taken: Future[int] = Future()
        self.future = crew.start(self._hold, run)
        if wait_for_it:
            _ = self.generation

    @property
    def generation(self) -> int:
        """Return which taking of the lease is ours; waits until it is taken."""
        both: tuple[Future[Any], ...] = (self._taken, self.future)
        wait(both, return_when=FIRST_COMPLETED)
        if not self._taken.done():
            self.future.result()
        return self._taken.result()

    @property
    def guard(self) -> sql.Composable:
        """Return the statement that begins every transaction of this run."""
        return sql.SQL(leases.GUARD_SQL).format(sql.Literal(self.run_id), sql.Literal(self.generation))

    @property
    def raising_guard(self) -> sql.Composable:
        """Return the guard that raises, for where a COPY follows in the same round trip."""
        return sql.SQL(leases.RAISING_GUARD_SQL).format(sql.Literal(self.run_id), sql.Literal(self.generation))

    @property
    def purpose(self) -> str:
        """Return the purpose of this generation's sessions."""
        return purpose(self.run_id, self.generation)

    def release(self) -> None:
        """Give the lease back and wait until that is done."""
        self._done.set()
        self.future.result()

    def leave(self) -> None:
        """Renew it no more: what follows closes the run, and the lease with it, long before it runs out."""
        self._left = True
        self.release()

    def _hold(self, run: runs.Run) -> None:
        """Take the lease and keep it, on new connections for as long as it can still be ours."""
        generation: int | None = None
        failing_since: float | None = None
        while True:
            try:
                with self._crew.session(self._target, LEASE, self._crew.stall_seconds) as session:
                    if generation is None:
                        generation = _take(self._crew, session, run)
                        self._taken.set_result(generation)
                    else:
                        # At once: a connection that was lost may be lost again before the next time.
                        self._renew(session, generation)
                    self._renewed = clock()
                    failing_since = None
                    self._renew_on(session, generation)
                    return
            except PipelineError as error:
                # Not since the last renewal, which may be older than the deadline.
                failing_since = clock() if failing_since is None else failing_since
                expired = clock() - failing_since > self._deadline_seconds
                passing = isinstance(error, UnreachableError) if generation is None else error.retryable
                if expired or not passing:
                    raise
                self._crew.pause(RETRY_SECONDS)

    def _renew_on(self, session: Session, generation: int) -> None:
        while self._wait():
            self._renew(session, generation)
            self._renewed = clock()
        if self._left:
            return
        with session.transaction(single=True) as cursor:
            leases.release_lease(cursor, self.run_id, generation)

    def _renew(self, session: Session, generation: int) -> None:
        with session.transaction(single=True) as cursor:
            leases.renew_lease(cursor, self.run_id, generation)

    def _wait(self) -> bool:
        """Wait until the lease is to be renewed; False once it is to be given back."""
        while clock() - self._renewed < leases.RENEW_SECONDS:
            if self._done.wait(TICK_SECONDS) or self._crew.stopping.is_set():
                return False
        return True


def _take(crew: Crew, session: Session, run: runs.Run) -> int:
    if not run.generation:
        with session.transaction(single=True) as cursor:
            if (first := leases.take_first_lease(cursor, run)) is not None:
                return first
    deadline = clock() + GRACE_SECONDS
    evictions = 0
    while True:
        try:
            with session.transaction() as cursor:
                generation = leases.take_lease(cursor, run)
                holder = None if generation is not None else leases.read_holder(cursor, run)
        except ConflictError:
            # A transaction of the old generation is still open, and it cannot be waited for.
            evictions += 1
            if evictions > MAX_EVICTIONS:
                raise
            end_lapsed_generations(session)
            crew.check()
            continue
        if generation is not None:
            return generation
        if clock() > deadline:
            raise BusyError(
                f"another copy of this table is running: {holder.owner if holder else 'unknown'}",
                "pipeline status shows it; wait for it, or stop it with Ctrl-C there",
            )
        crew.pause(0.1)


def end_lapsed_generations(session: Session) -> None:
    """End the sessions of copiers whose lease ran out: stopped, or behind a dead network.

    What they have not committed is rolled back, and the locks that they held are free.
    """
    session.rows(
        "SELECT pg_catalog.pg_terminate_backend(a.pid) FROM pg_catalog.pg_stat_activity a"
        " JOIN pipeline.run r ON a.application_name = 'pipeline run ' || r.id || '.' || r.lease_generation"
        " WHERE r.lease_until < pg_catalog.clock_timestamp()"
    )
