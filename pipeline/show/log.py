"""A long command without a terminal: structured log lines on stderr, and now and then one that says where it is."""

import logging
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

from pipeline import events
from pipeline.show.board import Board
from pipeline.show.figures import printable
from pipeline.show.ticker import Ticker
from pipeline.show.words import event_line

# How often a log shows that the command lives: often at first, then at a tenth of the time that it has taken.
SOONEST_SECONDS, LATEST_SECONDS, SHARE = 5.0, 60.0, 0.1


def _open_log() -> Any:
    """Return structlog's logger: UTC times, to stderr, never the local variables of a traceback."""
    import structlog

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%Y-%m-%dT%H:%M:%SZ", utc=True),
            structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    return structlog.get_logger()


class LogObserver:
    """Write events as log lines. What happens thousands of times, like a slice, has none of its own."""

    def __init__(self) -> None:
        # Its import takes as long as the engine's first questions to both servers, which need not wait for it.
        self._opening = ThreadPoolExecutor(1).submit(_open_log)
        self._board = Board()
        self._began = self._said = time.monotonic()
        self._lock = threading.Lock()
        self._ticker = Ticker(lambda: self.tick(time.monotonic()), self._tell)
        self.ask = self._ticker.ask

    def __enter__(self) -> "LogObserver":
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ticker.stop()

    @property
    def _log(self) -> Any:
        return self._opening.result()

    def forget(self) -> None:
        """Do nothing: nothing is drawn here."""

    def on(self, event: events.Event) -> None:
        """Take one event."""
        self._board.take(event, time.monotonic())
        with self._lock:
            match event:
                case events.Warned() | events.Retrying():
                    self._log.warning(_one_line(event))
                case events.OwnerNeeded():
                    self._log.warning(printable(event.fact))
                    # To be copied into psql as it is: in a log line it would be quoted, and its lines joined.
                    sys.stderr.write(f"{event.script.rstrip()}\n")
                    sys.stderr.flush()
                case events.CheckDone():
                    self._log.info("check", name=event.name, verdict=event.verdict, summary=event.summary)
                case _:
                    if line := _one_line(event):
                        self._log.info(line)

    def tick(self, now: float) -> None:
        """Say where the work is, where the last time is long enough ago."""
        if now - self._said < min(LATEST_SECONDS, max(SOONEST_SECONDS, SHARE * (now - self._began))):
            return
        self._said = now
        with self._lock:
            self._log.info(self._board.what, **self._board.figures(now))

    def _tell(self) -> None:
        with self._lock:
            self._log.info(self._board.sentence(time.monotonic()))


def _one_line(event: events.Event) -> str:
    return " ".join(printable(event_line(event) or "").split())
