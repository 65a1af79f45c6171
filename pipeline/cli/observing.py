"""A long command's events, shown as they come: on a terminal as bars, elsewhere as log lines."""

import os
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import closing
from typing import TypeVar

from pipeline.events import Event

E = TypeVar("E", bound=Event)


def observed(
    events: Generator[Event, None, None], kept: type[E], seen: Callable[[Event], None] = lambda event: None
) -> list[E]:
    """Show all events, to the end; return those of one kind. ``seen`` is called with every one.

    SIGUSR1 has the state told meanwhile. After a stop (Ctrl-Z) the bars are drawn anew, below.
    """
    from pipeline.postgres.pulse import hush_driver
    from pipeline.show.log import LogObserver

    hush_driver()

    if draws():
        from pipeline.show.console import TerminalObserver

        observer: TerminalObserver | LogObserver = TerminalObserver()
    else:
        observer = LogObserver()
    found: list[E] = []
    with observer, closing(events) as running:
        signal.signal(signal.SIGUSR1, lambda *_: observer.ask())
        signal.signal(signal.SIGCONT, lambda *_: observer.forget())
        for event in running:
            observer.on(event)
            seen(event)
            if isinstance(event, kept):
                found.append(event)
    return found


def draws() -> bool:
    """Return whether stderr is a terminal that can draw a line again."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
