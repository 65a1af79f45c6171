"""Threads that work on servers while the main thread waits, and that stop within two seconds.

Ctrl-C does nothing while psycopg2 is inside libpq in the main thread, so nothing of ours is there.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, ParamSpec, TypeVar

from pipeline.endpoints import Endpoint
from pipeline.errors import CrowdedError, PipelineError, StoppedError
from pipeline.events import Event
from pipeline.options import DEFAULT_STALL_SECONDS
from pipeline.postgres.database import Session, clock
from pipeline.postgres.idle import IdleSessions
from pipeline.postgres.watch import Watch

P = ParamSpec("P")
T = TypeVar("T")
U = TypeVar("U")
# How long a polite cancel may take before the connections are cut, and then the threads' last wait.
CANCEL_SECONDS = 0.7
ABORT_SECONDS = 0.8
TICK_SECONDS = 0.25
_EVENTS_HELD = 1000


class Crew:
    """Daemon threads, the sessions that they hold, and one bounded queue of their events."""

    def __init__(self, stall_seconds: float = DEFAULT_STALL_SECONDS) -> None:
        self.stopping = threading.Event()
        # None wakes the main thread: a thread has ended.
        self._events: queue.Queue[Event | None] = queue.Queue(_EVENTS_HELD)
        self._threads: list[threading.Thread] = []
        self._sessions: set[Session] = set()
        self._idle = IdleSessions()
        self._warming: list[Future[None]] = []
        # Backends whose connection was lost: behind a dead network they live on, and hold their locks.
        self._lost: dict[Endpoint, list[int]] = {}
        self._lock = threading.Lock()
        self.stall_seconds = stall_seconds
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        watch = Watch(self.stall_seconds)
        while not self.stopping.wait(TICK_SECONDS):
            with self._lock:
                sessions = list(self._sessions)
            watch.look(sessions)
            self._idle.end_old()

    @contextmanager
    def session(self, endpoint: Endpoint, purpose: str, patience: float | None = None) -> Iterator[Session]:
        """Yield a session that ``close`` can cancel from outside: one that just came free, or a new one.

        After ``patience`` seconds without a byte it is cut; None is for statements that may be long. Afterwards
        it waits a while for its next use. Raises PipelineError.
        """
        self.check()
        session = self._idle.take(endpoint, purpose) or self._connect(endpoint, purpose)
        session.purpose = purpose
        session.pulse.patience = patience
        unharmed = False
        with self._lock:
            self._sessions.add(session)
            lost = tuple(self._lost.get(endpoint, ()))
        try:
            self.check()
            if lost:
                session.end_backends(lost)
                # Only now: a connection that is lost here leaves them to the next one.
                self._forget(endpoint, lost)
            yield session
            unharmed = True
        finally:
            with self._lock:
                self._sessions.discard(session)
                if session.lost:
                    self._lost.setdefault(endpoint, []).append(session.backend)
            if not (unharmed and self._idle.give(session)):
                session.close()

    def _connect(self, endpoint: Endpoint, purpose: str) -> Session:
        try:
            return Session(endpoint, purpose)
        except CrowdedError:
            # Those that wait for their next use take the room of this one.
            if not self._idle.end_old(0.0):
                raise
        return Session(endpoint, purpose)

    @contextmanager
    def together(self, *wanted: tuple[Endpoint, str], patience: float | None = None) -> Iterator[tuple[Session, ...]]:
        """Yield several sessions, made at the same time: a distant server takes as long for all as for one."""
        with ExitStack() as stack:
            managers = [self.session(endpoint, purpose, patience) for endpoint, purpose in wanted]
            entered = [self.start(manager.__enter__) for manager in managers]
            wait(entered)
            for manager, future in zip(managers, entered, strict=True):
                if future.exception() is None:
                    stack.push(manager)
            yield tuple(future.result() for future in entered)

    def warm(self, *wanted: tuple[Endpoint, str]) -> None:
        """Make sessions in the background, for whoever wants such a one next; one that cannot be made is not."""

        def make(endpoint: Endpoint, purpose: str) -> None:
            with suppress(PipelineError):
                session = Session(endpoint, purpose)
                if not self._idle.give(session):
                    session.close()

        self._warming += [self.start(make, *one) for one in wanted]

    def warmed(self) -> None:
        """Wait until the sessions that are being made in the background are there."""
        wait(self._warming)

    def _forget(self, endpoint: Endpoint, ended: Sequence[int]) -> None:
        with self._lock:
            self._lost[endpoint] = [backend for backend in self._lost[endpoint] if backend not in ended]

    def check(self) -> None:
        """Raise StoppedError once the crew is stopping: called between steps of long work."""
        if self.stopping.is_set():
            raise StoppedError("stopped", "run the command again to go on")

    def emit(self, event: Event) -> None:
        """Hand an event to the main thread; waits while it is behind, unless the crew is stopping."""
        while not self.stopping.is_set():
            with suppress(queue.Full):
                self._events.put(event, timeout=TICK_SECONDS)
                return

    def start(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Run ``work`` in a thread of its own."""
        future: Future[T] = Future()

        def body() -> None:
            try:
                future.set_result(work(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - raised again where the future is asked
                future.set_exception(error)
            with suppress(queue.Full):
                self._events.put_nowait(None)

        thread = threading.Thread(target=body, daemon=True)
        self._threads.append(thread)
        thread.start()
        return future

    def call(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``work`` in a thread and wait for its result; signals reach the waiting main thread."""
        return self.start(work, *args, **kwargs).result()

    def beside(self, one: Callable[[], T], other: Callable[[], U]) -> tuple[T, U]:
        """Do two things at the same time; return both results, or raise the first one's failure when both ended."""
        first, second = self.start(one), self.start(other)
        both: tuple[Future[Any], ...] = (first, second)
        wait(both)
        return first.result(), second.result()

    def pause(self, seconds: float) -> None:
        """Sleep, but no longer than until the crew stops. Raises StoppedError then."""
        self.stopping.wait(seconds)
        self.check()

    def follow(
        self,
        futures: "Sequence[Future[T]]",
        tick: Callable[[], Event] | None = None,
        guards: "Sequence[Future[None]]" = (),
    ) -> Iterator[Event]:
        """Yield events until every future is done; then raise the first failure, if there was one.

        ``tick`` makes an event every quarter of a second. ``guards`` are not waited for, but their
        failure counts. A failure stops the whole crew.
        """
        pending: set[Future[T]] = set(futures)
        ticked = clock()
        while pending:
            done, pending = wait(pending, timeout=0, return_when=FIRST_COMPLETED)
            ended: list[Future[Any]] = [*done, *(guard for guard in guards if guard.done())]
            for future in ended:
                if future.exception() is not None:
                    yield from self._drain()
                    self.close()
                    future.result()
            if pending:
                with suppress(queue.Empty):
                    if (event := self._events.get(timeout=TICK_SECONDS)) is not None:
                        yield event
            if tick is not None and clock() - ticked >= TICK_SECONDS:
                ticked = clock()
                yield tick()
        yield from self._drain()
        if tick is not None:
            yield tick()

    def _drain(self) -> Iterator[Event]:
        with suppress(queue.Empty):
            while True:
                if (event := self._events.get_nowait()) is not None:
                    yield event

    def close(self) -> None:
        """Stop everything: first cancel the statements, then cut the connections, then let go."""
        self.stopping.set()
        self._idle.close()
        for how, seconds in (("cancel", CANCEL_SECONDS), ("abort", ABORT_SECONDS)):
            if not any(thread.is_alive() for thread in self._threads):
                return
            with self._lock:
                sessions = list(self._sessions)
            for session in sessions:
                # A cancel is a connection of its own, which a dead network swallows.
                threading.Thread(target=getattr(session, how), daemon=True).start()
            self._join(seconds)

    def _join(self, seconds: float) -> None:
        deadline = clock() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - clock()))

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
