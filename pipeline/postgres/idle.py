"""Sessions between two uses: to make one takes several round trips, which a distant server makes long."""

import threading

from pipeline.endpoints import Endpoint
from pipeline.postgres.database import Session, clock, kind

# Not for longer: what lies between us and a server forgets a connection without a word.
IDLE_SECONDS = 5.0


class IdleSessions:
    """Sessions that are not in use. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[tuple[float, Session]] = []
        self._closed = False

    def take(self, endpoint: Endpoint, purpose: str) -> Session | None:
        """Return a session that was made for such a purpose, else the one that was used last, or None."""
        with self._lock:
            fitting = [one for one in self._waiting if one[1].endpoint == endpoint]
            if not fitting:
                return None
            found = max(fitting, key=lambda one: (one[1].kind == kind(purpose), one[0]))
            self._waiting.remove(found)
            return found[1]

    def give(self, session: Session) -> bool:
        """Keep a session for its next use; False where it is of none: then the caller closes it."""
        with self._lock:
            if self._closed or not session.reusable:
                return False
            self._waiting.append((clock(), session))
            return True

    def end_old(self, seconds: float = IDLE_SECONDS) -> bool:
        """Close those that were not used for so many seconds; return whether there were any."""
        with self._lock:
            old = [one for one in self._waiting if clock() - one[0] >= seconds]
            self._waiting = [one for one in self._waiting if one not in old]
        for _, session in old:
            session.close()
        return bool(old)

    def close(self) -> None:
        """Close all of them, and keep no more."""
        with self._lock:
            self._closed = True
        self.end_old(0.0)
