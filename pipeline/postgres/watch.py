"""The watch over a crew's connections: none is waited for without end.

A thread inside libpq waits for as long as the connection stands, and a server that hangs, or a network
that swallows everything, never ends one. Keepalives do not help: a hung server's kernel, and every
proxy, answers them.
"""

import threading

from pipeline.endpoints import Endpoint
from pipeline.errors import CrowdedError, PipelineError, UnreachableError
from pipeline.postgres.database import Session, clock

# Less than the lock timeout: the one who holds the lock can only be asked for while it is waited for.
LOOK_SECONDS = 2.5
# What connecting and one question may take: the connection's own timeout, and a little more.
ANSWER_SECONDS = 12.0
# Our backend as the server sees it. One that waits for us, while we wait for it, has lost the way here. One
# that computes waits for nothing: its wait is NULL. Without track_activities its state is 'disabled'.
_BACKEND_SQL = """
SELECT pg_catalog.pg_backend_pid(),
       (SELECT COALESCE(a.state NOT IN ('active', 'disabled'), false) OR COALESCE(a.wait_event_type = 'Client', false)
        FROM pg_catalog.pg_stat_activity a WHERE a.pid = %(backend)s),
       (SELECT pg_catalog.string_agg(pg_catalog.format('pid %%s (%%s, %%s)', b.pid,
            COALESCE(NULLIF(b.application_name, ''), b.usename::pg_catalog.text), b.state), ', ')
        FROM pg_catalog.pg_stat_activity b WHERE b.pid = ANY (pg_catalog.pg_blocking_pids(%(backend)s)))
"""


class Probe:
    """A question to a server, on a connection and a thread of its own: is it at work for us, and who blocks it?

    ``working`` is None until there is an answer.
    """

    def __init__(self, session: Session, silence: float) -> None:
        self.asked = clock()
        self.silence = silence
        self.working: bool | None = None
        self.blockers: str | None = None
        threading.Thread(target=self._ask, args=(session.endpoint, session.backend), daemon=True).start()

    @property
    def age(self) -> float:
        """Return the seconds since the question."""
        return clock() - self.asked

    @property
    def in_vain(self) -> bool:
        """Return whether there is nothing to wait for."""
        return self.working is False or (self.working is None and self.age > ANSWER_SECONDS)

    def _ask(self, endpoint: Endpoint, backend: int) -> None:
        try:
            with Session(endpoint, "watch") as session:
                ((own, waiting, self.blockers),) = session.rows(_BACKEND_SQL, {"backend": backend})
                # A pooler invents process ids: then nothing is known of a backend that is not found.
                self.working = not waiting if waiting is not None else own != session.backend
        except UnreachableError as error:
            # A server without a connection to spare is there all the same.
            self.working = isinstance(error, CrowdedError)
        except PipelineError:
            self.working = True


class Watch:
    """What is known of the silent ones among a crew's sessions. Used by one thread.

    A statement that is known to be short is cut after its session's patience, unless a lock is what
    it waits for. Any other may last for as long as the server, asked beside it, says that it works.
    """

    def __init__(self, stall_seconds: float) -> None:
        self._stall_seconds = stall_seconds
        self._probes: dict[Session, Probe] = {}

    def look(self, sessions: list[Session]) -> None:
        """Look at every session once: ask about the silent ones, cut the hopeless ones."""
        self._probes = {session: probe for session, probe in self._probes.items() if session in sessions}
        for session in sessions:
            self._look_at(session, session.silence())

    def _look_at(self, session: Session, silence: float) -> None:
        patience = session.pulse.patience
        if silence < min(LOOK_SECONDS, patience or self._stall_seconds):
            self._probes.pop(session, None)
            session.blockers = None
            return
        probe = self._probes.get(session)
        session.blockers = None if probe is None else probe.blockers
        if self._is_hopeless(session, silence, probe):
            session.cut(silence)
        elif probe is None or self._is_outdated(probe, silence):
            self._probes[session] = Probe(session, silence)

    def _is_hopeless(self, session: Session, silence: float, probe: Probe | None) -> bool:
        patience = session.pulse.patience
        if patience is not None:
            return silence > patience and not session.blockers
        # What was asked early tells nothing: the statement may just have been on its way.
        return probe is not None and probe.silence > self._stall_seconds and probe.in_vain

    def _is_outdated(self, probe: Probe, silence: float) -> bool:
        early = probe.silence <= self._stall_seconds < silence
        return early or (probe.working is not None and probe.age > self._stall_seconds)
