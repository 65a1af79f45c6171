"""What is under way, at any width: a bar with its figures, a line for every worker, and all of it in one sentence."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from pipeline import events
from pipeline.show.figures import duration, printable, size, time_left
from pipeline.show.pace import Meter, Pace
from pipeline.wording import counted

# Less of a bar says nothing; more of it says nothing more.
LEAST_BAR, WIDEST_BAR = 8, 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Glyphs:
    """What lines are drawn with: characters that the terminal's encoding has."""

    done: str = "━"
    left: str = "─"
    between: str = " · "
    cut: str = "…"


PLAIN = Glyphs(done="#", left="-", between=", ", cut="~")


def glyphs_for(encoding: str | None) -> Glyphs:
    """Return the glyphs that an encoding can say."""
    fine = Glyphs()
    try:
        f"{fine.done}{fine.left}{fine.between}{fine.cut}".encode(encoding or "ascii")
    except (UnicodeError, LookupError):
        return PLAIN
    return fine


class Board:
    """Follow a command's events; tell where it is. Times are seconds of one clock, the caller's."""

    def __init__(self, glyphs: Glyphs = PLAIN) -> None:
        self._glyphs = glyphs
        self._what = "looking at both sides"
        self._since: float | None = None
        self._fraction: float | None = None
        self._slices = 0
        self._pace: Pace | None = None
        self._progress = events.Progress(rows=0, bytes=0, slices=0, seconds=0.0)
        self._meters: dict[int, Meter] = {}

    def take(self, event: events.Event, now: float) -> None:
        """Take one event."""
        match event:
            case events.Planned():
                self._begin("copying", now)
                self._pace = Pace(event)
                self._slices = event.slices
            case events.Progress() if self._pace is not None:
                self._pace.progress(event)
                self._progress = event
                for worker in event.workers:
                    self._meters.setdefault(worker.worker, Meter()).take(event.seconds, worker.bytes_moved)
            case events.SliceDone() if self._pace is not None:
                self._pace.slice_done(event)
            case events.Loaded():
                self._pace = None
                self._begin("bringing what changed meanwhile", now)
            case events.Reconciled():
                self._begin("bringing what changed meanwhile", self._since if self._since is not None else now)
            case events.IndexProgress():
                self._begin(f"index {event.name}, {event.phase}", now - event.seconds)
                self._fraction = event.fraction
            case events.IndexBuilt():
                self._begin("finishing", now)
            case events.CheckStarted():
                self._begin(f"checking {event.name}", now)
            case events.SyncPlanned():
                self._begin("comparing" if event.since is None else "looking at what was written since", now)
            case events.Compared():
                self._fraction = event.slices_done / max(1, event.slices)
            case events.CheckDone():
                self._begin("at work", now)
            case events.StepStarted():
                self._begin(event.name, now)
            case events.OwnerNeeded():
                self._begin("waiting for the table's owner", now)
            case events.Watching():
                self._begin(_watching(event), now - event.seconds)
                self._fraction = min(1.0, event.seconds / event.of_seconds) if event.of_seconds else None

    def _begin(self, what: str, since: float) -> None:
        self._what, self._since, self._fraction = printable(what).replace("\n", " "), since, None

    def _seconds(self, now: float) -> float:
        if self._since is None:
            self._since = now
        return max(0.0, now - self._since)

    def figures(self, now: float) -> dict[str, object]:
        """Return where the work is, for a log line."""
        if self._pace is None:
            percent = None if self._fraction is None else int(self._fraction * 100)
            return {"seconds": round(self._seconds(now)), **({} if percent is None else {"percent": percent})}
        left, silent = self._pace.left_seconds, self._pace.silent_seconds
        return {
            "percent": int(self._pace.fraction * 100),
            "slices": f"{self._pace.slices_done}/{self._slices}",
            "rows": self._progress.rows,
            "mb": round(self._pace.done_bytes / 1e6, 1),
            "mb_per_s": round(self._pace.rate / 1e6, 1),
            **({"silent": duration(silent)} if silent else {} if left is None else {"left": time_left(left)}),
        }

    @property
    def what(self) -> str:
        """Return the name of what is under way."""
        return self._what

    def sentence(self, now: float) -> str:
        """Return where the work is in one line, for somebody who asks in between."""
        if self._pace is None:
            percent = "" if self._fraction is None else f"{int(self._fraction * 100)} %, "
            return f"{self._what}: {percent}for {duration(self._seconds(now))} so far"
        percent, rows = f"copying: {int(self._pace.fraction * 100)} %", counted(self._progress.rows, "row")
        return ", ".join([percent, rows, *(detail for _, detail in self._details())])

    def _details(self) -> Iterator[tuple[int, str]]:
        """Yield the figures of a load, each with its weight: where room is short, the lightest go first."""
        assert self._pace is not None
        pace = self._pace
        yield 1, f"{pace.slices_done:,} of {counted(self._slices, 'slice')}"
        yield 2, f"{size(pace.done_bytes)} of {size(pace.done_bytes + pace.left_bytes)}"
        if pace.silent_seconds:
            yield 4, f"no byte for {duration(pace.silent_seconds)}"
            return
        if pace.rate:
            yield 3, f"{size(pace.rate)}/s"
        if pace.left_seconds is not None:
            yield 4, f"{time_left(pace.left_seconds)} left"

    def lines(self, width: int, height: int, now: float) -> list[str]:
        """Return what to draw on at most ``height`` lines of at most ``width`` cells."""
        if self._pace is None:
            return [self._bar(self._what, self._fraction, [(1, duration(self._seconds(now)))], width)]
        drawn = [self._bar("copying", self._pace.fraction, list(self._details()), width)]
        workers = self._progress.workers
        room = height - 1
        shown = workers if len(workers) <= room else workers[: max(0, room - 1)]
        drawn += [self._fit(self._worker_lines(worker), width) for worker in shown]
        if len(shown) < len(workers) and room > 0:
            drawn.append(self._fit([f"  and {counted(len(workers) - len(shown), 'worker')} more"], width))
        return drawn

    def _worker_lines(self, worker: events.WorkerProgress) -> list[str]:
        """Return a worker's line in several lengths, the longest first."""
        rows = "" if worker.rows is None else counted(worker.rows, "row")
        speed = self._meters[worker.worker].rate(self._progress.seconds)
        fast = f"{size(speed)}/s" if speed else ""
        moved = size(worker.bytes)
        return [
            f"  worker {worker.worker:<2}  slice {worker.ordinal:<5}  {rows:>14}  {moved:>7}  {fast:>9}".rstrip(),
            f"  {worker.worker:<2}  slice {worker.ordinal:<5}  {moved:>7}  {fast:>9}".rstrip(),
            f" {worker.worker:<2} #{worker.ordinal} {moved}",
        ]

    def _bar(self, what: str, fraction: float | None, details: Sequence[tuple[int, str]], width: int) -> str:
        """Return one line: what, a bar with its percentage, details; what does not fit goes, the lightest first."""
        percent = "" if fraction is None else f"{int(fraction * 100):>3}%"
        kept = list(details)
        while True:
            right = self._glyphs.between.join(detail for _, detail in kept)
            words = "  ".join(part for part in (percent, right) if part)
            room = width - cell_len(what) - cell_len(words) - 2
            if fraction is not None and room >= LEAST_BAR:
                long = min(room, WIDEST_BAR)
                done = int(fraction * long)
                return f"{what} {self._glyphs.done * done}{self._glyphs.left * (long - done)} {words}"
            if fraction is None and room >= -1:
                return f"{what} {words}"
            if not kept:
                return self._fit([f"{what} {percent.strip()}".rstrip(), percent.strip() or what], width)
            kept.remove(min(kept))

    def _fit(self, versions: Sequence[str], width: int) -> str:
        """Return the first version that fits, or the last one cut."""
        for version in versions:
            if cell_len(version) <= width:
                return version
        text = versions[-1]
        while text and cell_len(text) + 1 > width:
            text = text[:-1]
        return text + self._glyphs.cut if width > 0 else ""


def _watching(event: events.Watching) -> str:
    failed = f", {event.errors:,} failed" if event.errors else ""
    slow = "" if event.p95_ms is None else f", p95 {event.p95_ms:.0f} ms"
    return (
        f"watching: {counted(event.strays, 'client')} at legacy,"
        f" {counted(event.searches, 'search')} on main{failed}{slow}"
    )
