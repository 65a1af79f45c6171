"""A long command without a terminal: structured log lines on stderr, and a heartbeat every few seconds."""

import logging
import sys
from types import TracebackType

import structlog

from pipeline import events
from pipeline.show.figures import printable
from pipeline.show.words import event_line

# A line at least this often while rows move, so that a log shows a copy that lives.
HEARTBEAT_SECONDS = 5.0


def configure(*, as_json: bool = False, verbose: bool = False) -> None:
    """Set up structlog: UTC times, to stderr, never the local variables of a traceback."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%Y-%m-%dT%H:%M:%SZ", utc=True),
            structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
            structlog.processors.JSONRenderer()
            if as_json
            else structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if verbose else logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )


class LogObserver:
    """Write events as log lines."""

    def __init__(self) -> None:
        self._log = structlog.get_logger()
        self._said = 0.0
        self._said_index = 0.0

    def __enter__(self) -> "LogObserver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def on(self, event: events.Event) -> None:
        """Take one event."""
        match event:
            case events.Progress():
                if event.seconds - self._said >= HEARTBEAT_SECONDS:
                    self._said = event.seconds
                    self._log.info(
                        "copying",
                        rows=event.rows,
                        slices=event.slices,
                        mb=round(event.bytes / 1e6, 1),
                        mb_per_s=round(event.bytes / 1e6 / event.seconds, 1),
                    )
            case events.IndexProgress():
                if event.seconds - self._said_index >= HEARTBEAT_SECONDS or event.seconds < self._said_index:
                    self._said_index = event.seconds
                    done = None if event.fraction is None else round(event.fraction * 100)
                    self._log.info("building index", name=event.name, phase=event.phase, percent=done)
            case events.Warned() | events.Retrying():
                self._log.warning(_one_line(event))
            case events.CheckDone():
                self._log.info("check", name=event.name, verdict=event.verdict, summary=event.summary)
            case _:
                if line := _one_line(event):
                    self._log.info(line)


def _one_line(event: events.Event) -> str:
    return " ".join(printable(event_line(event) or "").split())
