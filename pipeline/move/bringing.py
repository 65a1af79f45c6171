"""Batches of keys reconciled side by side, while more of them are being found."""

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager

from pipeline.check.pair import Pair
from pipeline.move.lease import Lease
from pipeline.move.reconcile import Outcome, Policy, reconcile
from pipeline.postgres.crew import TICK_SECONDS, Crew
from pipeline.postgres.values import Key
from pipeline.settings import Route

# Two, because one's source is read while the other's target writes; more only wait for the target's disk.
BRINGERS = 2


class Bringers:
    """Threads that reconcile batches, each on sessions of its own; the first is made for the first batch.

    Reconciling does not depend on order. A batch is one transaction of the target: whoever is interrupted
    leaves whole batches.
    """

    def __init__(self, crew: Crew, route: Route, pair: Pair, lease: Lease, policy: Policy) -> None:
        self._crew = crew
        self._route = route
        self._pair = pair
        self._lease = lease
        self._policy = policy
        self._batches: queue.Queue[Sequence[Key] | None] = queue.Queue(BRINGERS)
        self._threads: list[Future[None]] = []
        self._lock = threading.Lock()
        self._left = 0
        self._idle = threading.Condition(self._lock)
        self.outcome = Outcome()
        self.touched = 0

    def bring(self, keys: Sequence[Key]) -> None:
        """Hand a batch over; waits while all are busy. Raises the failure of an earlier one."""
        with self._lock:
            self._left += 1
            self.touched += len(keys)
            busy = self._left > len(self._threads)
        if busy and len(self._threads) < BRINGERS:
            self._threads.append(self._crew.start(self._work))
        self._put(keys)

    def settle(self) -> Outcome:
        """Wait until every batch is committed; return what all of them did. Raises the first failure."""
        with self._lock:
            while self._left and not any(thread.done() for thread in self._threads):
                self._idle.wait(TICK_SECONDS)
        self._check()
        return self.outcome

    def _put(self, keys: Sequence[Key] | None) -> None:
        while True:
            self._check()
            try:
                self._batches.put(keys, timeout=TICK_SECONDS)
                return
            except queue.Full:
                continue

    def _check(self) -> None:
        self._crew.check()
        for thread in self._threads:
            if thread.done():
                thread.result()

    def _work(self) -> None:
        purpose = self._lease.purpose
        with self._crew.together((self._route.source, purpose), (self._route.target, purpose)) as (source, target):
            while True:
                try:
                    keys = self._batches.get(timeout=TICK_SECONDS)
                except queue.Empty:
                    self._crew.check()
                    continue
                if keys is None:
                    return
                done = reconcile(source, target, self._pair, keys, self._lease, self._policy)
                with self._lock:
                    self.outcome = self.outcome.plus(done)
                    self._left -= 1
                    self._idle.notify_all()

    def close(self) -> None:
        """End the threads; batches that were not begun are given up."""
        for _ in self._threads:
            while True:
                try:
                    self._batches.put_nowait(None)
                    break
                except queue.Full:
                    try:
                        self._batches.get_nowait()
                    except queue.Empty:
                        continue
        wait(self._threads)


@contextmanager
def bringing(crew: Crew, route: Route, pair: Pair, lease: Lease, policy: Policy) -> Iterator[Bringers]:
    """Yield bringers; at the end every batch is committed, or their failure is raised."""
    bringers = Bringers(crew, route, pair, lease, policy)
    try:
        yield bringers
        bringers.settle()
    finally:
        bringers.close()
