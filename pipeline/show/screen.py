"""The last lines of a terminal, drawn again and again below lines that stay. No state of the terminal is changed."""

import os
import threading
from collections.abc import Callable
from typing import TextIO

_UP, _ERASE_BELOW = "\x1b[{}A", "\x1b[J"
# A terminal that does not tell its size (a serial line) has zero of everything.
_UNKNOWN_SIZE = (80, 24)


class Screen:
    """A terminal. Every drawing is one write: what another program writes in between does not tear a line.

    The cursor is neither hidden nor is any mode set, so that kill -9 leaves nothing behind. A line is
    never as wide as the terminal: at the edge, terminals differ. Where the terminal is gone (a session
    that was cut), nothing is drawn any more, and the work goes on.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._drawn = 0
        self._gone = False
        self._lock = threading.Lock()

    def size(self) -> tuple[int, int]:
        """Return columns and lines that may be drawn on."""
        try:
            columns, lines = os.get_terminal_size(self._stream.fileno())
        except OSError:
            columns, lines = _UNKNOWN_SIZE
        return max(1, (columns or _UNKNOWN_SIZE[0]) - 1), max(1, (lines or _UNKNOWN_SIZE[1]) - 1)

    def say(self, text: str) -> None:
        """Write lines that stay; what was drawn goes, until it is drawn again."""
        with self._lock:
            self._write(self._erasure() + text + "\n")
            self._drawn = 0

    def draw(self, lines: Callable[[int, int], list[str]]) -> None:
        """Draw lines, made for the size that the terminal has now, in the place of those drawn before."""
        with self._lock:
            columns, height = self.size()
            made = lines(columns, height)
            self._write(self._erasure() + "\n".join(made))
            self._drawn = len(made)

    def clear(self) -> None:
        """Take away what was drawn."""
        with self._lock:
            if self._drawn:
                self._write(self._erasure())
            self._drawn = 0

    def forget(self) -> None:
        """Leave what was drawn where it is, and draw below: somebody else wrote meanwhile. Fit for a signal."""
        self._drawn = 0

    def _erasure(self) -> str:
        up = _UP.format(self._drawn - 1) if self._drawn > 1 else ""
        return f"\r{up}{_ERASE_BELOW}" if self._drawn else ""

    def _write(self, text: str) -> None:
        if self._gone or not text:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._gone = True
