"""Measuring from outside: whole processes, by the clock and by what the kernel charges them."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from pipeline.errors import PipelineError, StoppedError, TerminatedError

LAUNCHER = Path(__file__).with_name("launcher.py")
# Of what a failed process said: enough for an error with its hint.
SHOWN_LINES = 8
HINT = "what was measured so far is lost; the servers and their folder are removed"

# A command's argv (its program by absolute path); commands joined by pipes; pipes that run at once.
Command = tuple[str, ...]
Pipe = tuple[Command, ...]
Step = tuple[Pipe, ...]


class BenchError(PipelineError):
    """A contender failed, or did not bring what the others bring."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one turn took: wall seconds, CPU seconds (user and system), and peak bytes.

    CPU and memory are those of the contender's processes; the servers' are not in it. The peaks of
    processes that run at once are added up, shared libraries counted each time.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def measure(steps: tuple[Step, ...], environment: Mapping[str, str], folder: Path) -> Measurement:
    """Run the steps one after the other, in ``folder``, to their end.

    Raises BenchError with what the processes said where one failed.
    """
    with tempfile.TemporaryFile("w+", dir=folder, errors="replace") as said:
        launcher = subprocess.Popen(
            (sys.executable, "-I", "-S", str(LAUNCHER)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            cwd=folder,
            env=dict(environment),
            text=True,
            start_new_session=True,
        )
        try:
            out, _ = launcher.communicate(json.dumps(steps))
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.communicate()
            raise
        # The launcher itself fails where a program cannot be started.
        figures = json.loads(out) if launcher.returncode == 0 else {}
        codes = figures.pop("codes", [launcher.returncode])
        if any(codes):
            said.seek(0)
            raise BenchError(
                f"a process ended with an error (exit codes {', '.join(map(str, codes))})",
                "\n".join(said.read().splitlines()[-SHOWN_LINES:]),
            )
    return Measurement(**figures)


class Signals:
    """SIGINT, SIGTERM, SIGHUP: raised as StoppedError or TerminatedError, or kept until ``held`` ends.

    A server whose start is interrupted has no pid file yet and would never be found again.
    """

    def __init__(self) -> None:
        self._held = False
        self._kept: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # nohup, or a shell's background job, asks for one of them to be ignored.
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let no signal interrupt what is inside; what came meanwhile is raised after it."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._kept:
            raise _stopped(self._kept[0])

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if not self._held:
            raise _stopped(number)
        self._kept.append(number)


def _stopped(number: int) -> StoppedError:
    return StoppedError("interrupted", HINT) if number == signal.SIGINT else TerminatedError("terminated", HINT)
