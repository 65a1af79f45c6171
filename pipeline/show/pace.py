"""How fast a copy goes and how long it will take yet: a steady rate, and a time left that does not jump."""

import math
from collections import deque

from pipeline.events import Planned, Progress, SliceDone

# The rate is that of the last while: so long, and over so many moments at which bytes moved, so that
# neither a pause between two slices nor a narrow --max-rate makes it jump.
WINDOW_SECONDS = 20.0
WINDOW_MOVES = 12
# Before that no rate is told: the first chunks come in a burst.
FIRST_SECONDS = 2.0
# The time left runs down like a clock, and is drawn towards what is measured within about so long.
DRAWN_SECONDS = 6.0
# No byte for so long is worth a word.
SILENT_SECONDS = 10.0
# A slice that is heavier than expected still has a little to go.
LEAST_LEFT = 0.02


class Meter:
    """The rate of a count that grows, in units a second; what is taken back makes it begin anew."""

    def __init__(self) -> None:
        self._moves: deque[tuple[float, float]] = deque()

    def take(self, seconds: float, count: float) -> None:
        """Note the count at a time; times never go back."""
        if self._moves and count < self._moves[-1][1]:
            self._moves.clear()
        if not self._moves or count > self._moves[-1][1]:
            self._moves.append((seconds, count))
        while len(self._moves) > WINDOW_MOVES and seconds - self._moves[1][0] > WINDOW_SECONDS:
            self._moves.popleft()

    def rate(self, seconds: float) -> float:
        """Return units a second, 0 where nothing is known yet."""
        if len(self._moves) < 2:
            return 0.0
        (first, before), (_, after) = self._moves[0], self._moves[-1]
        return (after - before) / (seconds - first) if seconds > first else 0.0

    def silent(self, seconds: float) -> float:
        """Return for how long the count has not grown."""
        return seconds - self._moves[-1][0] if self._moves else 0.0


class Pace:
    """Where a load is: bytes on the wire, those of the run's earlier processes too, and what is left of them.

    What a slice weighs on the wire shows only once it has moved: until then the table's bytes stand for
    it, and count as much as one slice that was seen.
    """

    def __init__(self, planned: Planned) -> None:
        self._planned = planned
        self._first_guess = planned.bytes_estimate / max(1, planned.slices)
        self._seen_bytes = float(planned.bytes_done)
        self._seen_slices = planned.slices_done if planned.bytes_done else 0
        self._meter = Meter()
        self._progress = Progress(rows=0, bytes=0, slices=0, seconds=0.0)
        self._left_seconds: float | None = None
        self._furthest = 0.0
        self._count()

    def slice_done(self, event: SliceDone) -> None:
        """Learn what a slice weighs."""
        self._seen_bytes += event.bytes
        self._seen_slices += 1

    def progress(self, event: Progress) -> None:
        """Take the totals of this moment."""
        passed = event.seconds - self._progress.seconds
        self._progress = event
        self._meter.take(event.seconds, event.bytes)
        self._count()
        measured = self.left_bytes / self.rate if self.rate else math.inf
        if event.seconds < FIRST_SECONDS or not math.isfinite(measured):
            return
        if self._left_seconds is None:
            self._left_seconds = measured
        else:
            running_down = max(0.0, self._left_seconds - passed)
            drawn = 1 - math.exp(-max(0.0, passed) / DRAWN_SECONDS)
            self._left_seconds = running_down + (measured - running_down) * drawn

    def _count(self) -> None:
        slice_bytes = (self._first_guess + self._seen_bytes) / (1 + self._seen_slices)
        before = self._planned.bytes_done or slice_bytes * self._planned.slices_done
        waiting = self._planned.slices - self._planned.slices_done - self._progress.slices
        under_way = [worker.bytes for worker in self._progress.workers][:waiting]
        left = slice_bytes * (waiting - len(under_way))
        left += sum(max(LEAST_LEFT * slice_bytes, slice_bytes - moved) for moved in under_way)
        self.done_bytes = before + self._progress.bytes
        self.left_bytes = max(0.0, left)
        self.slices_done = self._planned.slices_done + self._progress.slices
        total = self.done_bytes + self.left_bytes
        self._furthest = max(self._furthest, self.done_bytes / total if total else 0.0)

    @property
    def fraction(self) -> float:
        """Return how much is done, 0 to 1; it never goes back."""
        return self._furthest

    @property
    def rate(self) -> float:
        """Return bytes a second of the last while, 0 where that is not known."""
        return self._meter.rate(self._progress.seconds)

    @property
    def left_seconds(self) -> float | None:
        """Return the time left, None where it is not known."""
        return self._left_seconds

    @property
    def silent_seconds(self) -> float:
        """Return for how long no byte has moved, 0 where that is no more than a pause."""
        silent = self._meter.silent(self._progress.seconds)
        return silent if silent >= SILENT_SECONDS else 0.0
