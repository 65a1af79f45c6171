"""A thread beside a long command: it shows that time passes, and answers who asks for the state."""

import queue
import threading
from collections.abc import Callable

TICK_SECONDS = 0.2


class Ticker:
    """Calls ``tick`` five times a second, and ``tell`` soon after every ``ask``, always in its own thread."""

    def __init__(self, tick: Callable[[], None], tell: Callable[[], None]) -> None:
        self._tick, self._tell = tick, tell
        # The one queue that a signal handler may put into, whatever it interrupted.
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def ask(self) -> None:
        """Have the state told; returns at once, fit for a signal handler."""
        self._asked.put(True)

    def stop(self) -> None:
        """End, after what was asked for before was told."""
        self._asked.put(False)
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                if not self._asked.get(timeout=TICK_SECONDS):
                    return
                self._tell()
            except queue.Empty:
                self._tick()
