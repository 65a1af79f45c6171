"""Events and results in words: one line each, the same on a terminal and in a log."""

from pipeline import events
from pipeline.errors import PipelineError
from pipeline.show.figures import duration, printable, rate, size
from pipeline.wording import counted

# Less than that is no time to wait, for a person.
SOON_SECONDS = 0.05


def event_line(event: events.Event) -> str | None:
    """Return an event as one line for people, or None where it is only progress."""
    match event:
        case events.Planned():
            return _planned(event)
        case events.FoundRows():
            return _found_rows(event)
        case events.Quarantined():
            return f"{counted(event.rows, 'row')} cannot be carried: set aside in pipeline.quarantine"
        case events.IndexDeferred():
            return f"index {event.name} is dropped until the rows are in; the ledger has its definition"
        case events.Retrying():
            when = f"in {duration(event.delay)}" if event.delay >= SOON_SECONDS else "now"
            return f"{event.what}: {event.fact}; try {event.attempt + 1} {when}"
        case events.Warned():
            return f"warning: {event.fact}" + (f" ({event.hint})" if event.hint else "")
        case events.Loaded() if event.rows:
            return (
                f"loaded {counted(event.rows, 'row')}, {size(event.bytes)} in {duration(event.seconds)}"
                f" ({rate(event.bytes, event.seconds)})"
            )
        case events.Reconciled() if event.upserted or event.deleted:
            return (
                f"pass {event.number}: {counted(event.changed, 'changed row')}, {event.upserted:,} written,"
                f" {event.deleted:,} deleted"
            )
        case events.SyncPlanned():
            return _sync_planned(event)
        case events.StepStarted():
            return f"step {event.number} of {event.steps}, {event.name}: {event.title}"
        case events.StepDone():
            ended = "done before" if event.before else f"done in {duration(event.seconds)}"
            return f"{event.name} {ended}: {event.summary}"
        case events.OwnerNeeded():
            return f"{event.fact}:\n{event.script}"
        case events.IndexBuilt():
            return f"index {event.name} is built again, in {duration(event.seconds)}"
    return None


def _planned(event: events.Planned) -> str:
    weighs = f"{size(event.bytes_estimate)} in {counted(event.slices, 'slice')}"
    if not event.resumed:
        what = f"begins: {event.table}, {weighs}, {counted(event.workers, 'worker')}"
    elif event.slices_done < event.slices:
        before = f"{event.slices_done:,} of them done before with {counted(event.rows_done, 'row')}"
        what = f"goes on: {event.table}, {weighs}, {before}; {counted(event.workers, 'worker')}"
    else:
        what = f"goes on: {event.table}, {weighs}, all done before; what follows the load is left"
    return f"run {event.run} {what}\n  from {event.source}\n  to   {event.target}"


def _sync_planned(event: events.SyncPlanned) -> str:
    what = (
        "every row is compared"
        if event.since is None
        else f"rows written since the {event.since_kind} of {event.since:%Y-%m-%d %H:%M:%S}Z are looked at"
    )
    return f"{event.table}: {what}\n  from {event.source}\n  to   {event.target}"


def _found_rows(event: events.FoundRows) -> str:
    parts = [f"{event.equal:,} equal to the source's"]
    if event.different:
        fate = "stay as they are" if event.on_conflict == "keep" else "are written over"
        parts.append(f"{event.different:,} with other content, which {fate}")
    if event.only_there:
        parts.append(f"{event.only_there:,} that only it has, which stay")
    rows = event.equal + event.different + event.only_there
    return f"{event.table} holds {counted(rows, 'row')} already: {', '.join(parts)}; its indexes stay"


def copy_summary(done: events.CopyDone) -> str:
    """Return the last words of a copy."""
    if done.already_done:
        return (
            f"nothing to do: run {done.run} has copied all {counted(done.rows, 'row')} before. What changed on the"
            " source since then was not looked for.\nnext: pipeline sync"
        )
    if done.moved_slices:
        loaded = (
            f"copied {counted(done.moved_rows, 'row')} ({size(done.moved_bytes)}) in {duration(done.seconds)}:"
            f" {counted(done.moved_slices, 'slice')} at {rate(done.moved_bytes, done.load_seconds)}"
        )
    else:
        loaded = f"finished run {done.run} in {duration(done.seconds)}: every slice was there already"
    more = [
        *([f"{counted(len(done.indexes), 'index')} in {duration(done.index_seconds)}"] if done.indexes else []),
        *([counted(done.retries, "retry")] if done.retries else []),
    ]
    lines = [", ".join([loaded, *more]) + "."]
    if 0 < done.moved_slices < done.slices:
        before = counted(done.slices - done.moved_slices, "slice")
        lines.append(f"{before} of the run had been done before; it has {counted(done.rows, 'row')}.")
    if done.quarantined_rows:
        lines.append(f"{counted(done.quarantined_rows, 'row')} set aside: pipeline quarantine lists them.")
    lines.append(_changes(done))
    lines.append("next: pipeline verify" + ("" if done.settled else ", once the writers of the source are quiet"))
    return "\n".join(lines)


def _changes(done: events.CopyDone) -> str:
    """Return how much changed while the rows moved, and what the last pass over the source found."""
    changes = (
        f"{counted(done.changed_rows, 'change')} on the source meanwhile came after"
        if done.changed_rows
        else "nothing changed on the source meanwhile"
    )
    if not done.settled:
        return f"{changes}; the source still changes, and the two sides were not equal at the last pass."
    if done.foreign_rows:
        others = f"{counted(done.foreign_rows, 'row')} that only the target has and no copy brought"
        return f"{changes}; at the last pass nothing was left to bring. Left alone: {others}."
    if done.rows_before:
        return f"{changes}; at the last pass nothing was left to bring."
    return f"{changes}; source and target were equal at the last pass."


def sync_summary(done: events.SyncDone, ends: str = "") -> str:
    """Return the last words of a sync, of its dry run, or of a list of differences.

    ``ends`` are the options that name both ends, for what is to be typed next.
    """
    looked = "all rows were compared" if done.deep else f"{counted(done.touched, 'row')} written since were looked at"
    if done.dry:
        if done.equal:
            return f"nothing differs: {looked}, in {duration(done.seconds)}."
        differ = f"{counted(done.touched, 'row')} {'differs' if done.touched == 1 else 'differ'}"
        return (
            f"{differ}: {done.inserted:,} missing on the target, {done.deleted:,} only"
            f" there, {done.updated:,} with other content; looked for in {duration(done.seconds)}.\n"
            f"next: pipeline sync{ends}{'' if ends else ', unless the switch is made'}"
        )
    wrote = [
        *([f"{done.inserted:,} added"] if done.inserted else []),
        *([f"{done.updated:,} written over"] if done.updated else []),
        *([f"{done.deleted:,} deleted"] if done.deleted else []),
    ]
    lines = [
        f"{', '.join(wrote)}: {looked}, in {duration(done.seconds)}."
        if wrote
        else f"nothing to write: {looked}, in {duration(done.seconds)}."
    ]
    if done.kept:
        lines.append(
            f"left different, written by somebody else: {counted(done.kept, 'row')} of the target."
            f" To take the source's: pipeline sync{ends} --on-conflict overwrite"
        )
    if done.foreign:
        lines.append(
            f"left alone, brought by no run: {counted(done.foreign, 'row')} that only the target has."
            f" To delete: pipeline sync{ends} --delete"
        )
    lines += [f"  {kind}  {', '.join(key)}" for kind, key in done.left]
    if not done.settled:
        lines.append("the source still changes: run pipeline sync again, once its writers are quiet for the last time")
    elif done.equal:
        lines.append(f"source and target were equal at the last pass.\nnext: pipeline verify{ends} --incremental")
    return "\n".join(lines)


def preview_lines(plan: events.Previewed, workers: int) -> str:
    """Return what a copy would do, for --dry-run."""
    if plan.finished:
        return f"nothing to do: run {plan.run} into {plan.table} is done.\nnext: pipeline verify"
    begins = "begins a new run" if plan.run is None else f"goes on with run {plan.run}"
    streams = min(workers, max(1, plan.slices_left))
    rows = f"about {plan.rows_estimate:,} by the source's own statistics" if plan.rows_estimate > 0 else "not known"
    written = [*(["the run"] if plan.run is None else []), "a mark for every slice"]
    lines = [
        f"the copy {begins}; nothing was written yet.",
        f"  from    {plan.source}, read only",
        f"  to      {plan.target}, table {plan.table}, columns {', '.join(plan.columns)}",
        f"  slices  {plan.slices_left:,} left of {plan.slices:,}, {size(plan.bytes_left)},"
        f" by {counted(streams, 'worker')}",
        f"  rows    {rows}" + (f"; {plan.rows_before:,} are there already, and stay" if plan.rows_before else ""),
    ]
    if plan.read_seconds is not None:
        lines.append(
            f"  time    about {duration(plan.read_seconds)} to read by one stream; how fast the target writes,"
            " and building indexes, is not in it"
        )
    lines.append(f"  ledger  schema pipeline on the target: {', '.join(written)}")
    lines += [f"  index   {name} is dropped first and built again after the load" for name in plan.indexes]
    lines.append("  after   ANALYZE of the table, and its sequences set behind the rows")
    return "\n".join([*lines, "next: pipeline copy, without --dry-run"])


def error_lines(error: PipelineError) -> str:
    """Return an error as fact and hint, each line of them marked."""
    facts = [f"error: {line}" for line in printable(error.fact).split("\n")]
    hints = [f"hint:  {line}" for line in printable(error.hint).split("\n") if line]
    return "\n".join([*facts, *hints])
