"""A long command on a terminal: lines that stay, and below them what is under way. All on stderr; stdout is data."""

import sys
import time
from types import TracebackType

from pipeline import events
from pipeline.show.board import Board, glyphs_for
from pipeline.show.figures import printable
from pipeline.show.screen import Screen
from pipeline.show.ticker import Ticker
from pipeline.show.words import event_line


class TerminalObserver:
    """Show events on a terminal."""

    def __init__(self) -> None:
        self._screen = Screen(sys.stderr)
        self._board = Board(glyphs_for(sys.stderr.encoding))
        self._ticker = Ticker(self._draw, self._tell)
        self.ask = self._ticker.ask
        self.forget = self._screen.forget

    def __enter__(self) -> "TerminalObserver":
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ticker.stop()
        self._screen.clear()

    def on(self, event: events.Event) -> None:
        """Take one event."""
        self._board.take(event, time.monotonic())
        if (line := event_line(event)) is not None:
            self._screen.say(printable(line))

    def _draw(self) -> None:
        self._screen.draw(lambda width, height: self._board.lines(width, height, time.monotonic()))

    def _tell(self) -> None:
        self._screen.say(self._board.sentence(time.monotonic()))
