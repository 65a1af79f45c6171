"""A terminal of our own: a pseudo terminal that a process runs on, and what a person would see on it."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support import command_line

# What an emulator obeys here; anything else that begins with an escape is a fault of the test or the program.
SEQUENCE = re.compile(r"\x1b\[(\d*)([A-Za-z])")


class Emulator:
    """Lines of cells with a cursor. Text beyond the edge wraps; a narrower window cuts lines, as xterm does."""

    def __init__(self, columns: int, lines: int = 24) -> None:
        self.columns, self.height = columns, lines
        self.cells: list[list[str]] = [[]]
        self.row = self.column = 0
        self.top = 0
        self.wrapped = 0

    def resize(self, columns: int) -> None:
        self.columns = columns
        self.cells = [line[:columns] for line in self.cells]
        self.column = min(self.column, columns - 1)

    def feed(self, text: str) -> None:
        place = 0
        while place < len(text):
            if match := SEQUENCE.match(text, place):
                self._obey(match[2], int(match[1] or 1))
                place = match.end()
                continue
            assert text[place] != "\x1b", f"an unknown sequence: {text[place : place + 12]!r}"
            self._type(text[place])
            place += 1

    def _obey(self, command: str, count: int) -> None:
        if command == "A":
            # The window's first line stops it: what scrolled out of sight can't be drawn on.
            self.row = max(self.top, self.row - count)
        elif command == "J":
            del self.cells[self.row + 1 :]
            del self.cells[self.row][self.column :]
        else:
            raise AssertionError(f"an unknown sequence: {command}")

    def _type(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self._down()
        else:
            if self.column >= self.columns:
                self.wrapped += 1
                self.column = 0
                self._down()
            line = self.cells[self.row]
            line.extend(" " * (self.column + 1 - len(line)))
            line[self.column] = character
            self.column += 1

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.cells):
            self.cells.append([])
        self.top = max(self.top, self.row - self.height + 1)

    def text(self) -> list[str]:
        return ["".join(line).rstrip() for line in self.cells]


class Running:
    """A process whose stderr is a pseudo terminal; ``written`` grows as it writes."""

    def __init__(self, process: "subprocess.Popen[str]", controller: int) -> None:
        self.process, self._controller = process, controller
        self._read = bytearray()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    @property
    def written(self) -> str:
        return bytes(self._read).decode(errors="replace")

    def resize(self, columns: int, lines: int = 24) -> None:
        fcntl.ioctl(self._controller, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def end(self, seconds: float = 60) -> tuple[int, str, str]:
        """Wait for the end; return exit code, stdout, and what the terminal got."""
        out, _ = self.process.communicate(timeout=seconds)
        self._thread.join(seconds)
        return self.process.returncode, out, self.written

    def _collect(self) -> None:
        while True:
            try:
                data = os.read(self._controller, 65536)
            except OSError:  # the other end is closed
                return
            if not data:
                return
            self._read += data


@contextmanager
def on_terminal(*arguments: str, env: dict[str, str], columns: int, lines: int = 24) -> Iterator[Running]:
    """Start ``pipeline`` with stderr on a terminal of that size, and stdout in a pipe."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    process = subprocess.Popen(
        command_line("pipeline", arguments), env=env, cwd="/", stdout=subprocess.PIPE, stderr=terminal, text=True
    )
    os.close(terminal)
    try:
        yield Running(process, controller)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
        os.close(controller)
