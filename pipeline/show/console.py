"""A long command on a terminal: bars that move. Everything goes to stderr; stdout is for results."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from pipeline import events
from pipeline.show.figures import duration, rate
from pipeline.show.words import event_line


class TerminalObserver:
    """Show events on a terminal: lines that stay, and one bar for what is under way."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[right]}", justify="right"),
            console=self._console,
            transient=True,
            expand=True,
        )
        self._task: TaskID | None = None
        self._estimate = 1
        self._rows_estimate = 0
        self._bytes_before = 0

    def __enter__(self) -> "TerminalObserver":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def on(self, event: events.Event) -> None:
        """Take one event."""
        if (line := event_line(event)) is not None:
            self._console.print(Text(line))
        match event:
            case events.Planned():
                self._estimate = max(1, event.bytes_estimate)
                self._rows_estimate = event.rows_estimate
                left = event.slices - event.slices_done
                self._estimate = max(1, event.bytes_estimate * left // max(1, event.slices))
                self._show("copying", total=self._estimate)
            case events.Progress():
                self._update(event.bytes, progress_words(event, self._estimate))
            case events.Loaded():
                self._show("what changed meanwhile", total=None)
            case events.IndexProgress():
                words = f"{event.phase} · {duration(event.seconds)}"
                self._show(f"index {event.name}", total=1.0)
                self._update(event.fraction or 0.0, words)
            case events.CheckStarted():
                self._show(f"checking {event.name}", total=None)
            case events.CheckDone() | events.IndexBuilt() | events.CopyDone():
                self._hide()

    def _show(self, description: str, total: float | None) -> None:
        if self._task is None:
            self._task = self._bars.add_task(description, total=total, right="")
        else:
            self._bars.update(self._task, description=description, total=total, completed=0, right="")

    def _update(self, completed: float, right: str) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=completed, right=right)

    def _hide(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None


def progress_words(event: events.Progress, estimate: int) -> str:
    """Return rows, rate and time left of a copy under way."""
    left = (estimate - event.bytes) * event.seconds / event.bytes if event.bytes else float("inf")
    return f"{event.rows:,} rows · {rate(event.bytes, event.seconds)} · {duration(max(0.0, left))} left"
