"""Events and results in words: one line each, the same on a terminal and in a log."""

from pipeline import events
from pipeline.errors import PipelineError
from pipeline.show.figures import duration, printable, rate, size
from pipeline.wording import counted


def event_line(event: events.Event) -> str | None:
    """Return an event as one line for people, or None where it is only progress."""
    match event:
        case events.Planned():
            return _planned(event)
        case events.IndexDeferred():
            return f"index {event.name} is set aside until the rows are in"
        case events.Retrying():
            return f"{event.what}: {event.fact}; try {event.attempt + 1} in {duration(event.delay)}"
        case events.Warned():
            return f"warning: {event.fact}" + (f" ({event.hint})" if event.hint else "")
        case events.Loaded() if event.rows:
            return (
                f"{counted(event.rows, 'row')}, {size(event.bytes)} in {duration(event.seconds)}"
                f" ({rate(event.bytes, event.seconds)})"
            )
        case events.Reconciled() if event.upserted or event.deleted:
            return (
                f"pass {event.number}: {counted(event.changed, 'key')} changed on the source meanwhile;"
                f" {event.upserted:,} written, {event.deleted:,} deleted"
            )
        case events.IndexBuilt():
            return f"index {event.name} stands again, {duration(event.seconds)}"
    return None


def _planned(event: events.Planned) -> str:
    verb = "goes on" if event.resumed else "begins"
    done = f", {event.slices_done} of them done before" if event.resumed else ""
    return (
        f"run {event.run} {verb}: {event.table}, {size(event.bytes_estimate)} in {counted(event.slices, 'slice')}"
        f"{done}, {counted(event.workers, 'worker')}\n  from {event.source}\n  to   {event.target}"
    )


def copy_summary(done: events.CopyDone) -> str:
    """Return the last words of a copy."""
    if done.already_done:
        return (
            f"nothing to do: run {done.run} has copied all {counted(done.rows, 'row')} before.\nnext: pipeline verify"
        )
    lines = [
        f"copied {counted(done.moved_rows, 'row')} ({size(done.moved_bytes)}) in {duration(done.seconds)}:"
        f" {counted(done.moved_slices, 'slice')} at {rate(done.moved_bytes, done.load_seconds)}"
        + (f", {counted(len(done.indexes), 'index')} in {duration(done.index_seconds)}" if done.indexes else "")
        + (f", {counted(done.retries, 'retry')}" if done.retries else "")
        + "."
    ]
    if done.moved_slices < done.slices:
        lines.append(f"{done.slices - done.moved_slices} slices were there already; the run has {done.rows:,} rows.")
    if done.changed_rows:
        lines.append(f"{counted(done.changed_rows, 'row')} changed on the source meanwhile and were brought after.")
    if not done.settled:
        lines.append("the source still changes: the two sides were not equal at the last pass.")
    lines.append("next: pipeline verify")
    return "\n".join(lines)


def error_lines(error: PipelineError) -> str:
    """Return an error as fact and hint, each line of them marked."""
    facts = [f"error: {line}" for line in printable(error.fact).split("\n")]
    hints = [f"hint:  {line}" for line in printable(error.hint).split("\n") if line]
    return "\n".join([*facts, *hints])
