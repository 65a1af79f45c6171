"""A cutover for people: its plan, and its end in a few lines."""

from collections.abc import Iterator

from pipeline.cutover.outline import Outline
from pipeline.cutover.steps import Step
from pipeline.events import CutoverDone
from pipeline.show.figures import duration, printable

_ENDS = {
    "rehearsed": "rehearsed: nothing was switched, and both sides are as before",
    "switched": "switched: the application's settings point to main",
    "rolled back": "rolled back: the application's settings point to legacy, which takes writes again",
    "cleared": "finalized: what the rollback had left is removed",
    "finalized": "finalized: there is no way back by the pipeline any more",
}


def outline_lines(outline: Outline) -> str:
    """Return the plan: what each step reads and writes, how long it takes, and the way back from it."""
    return "\n".join(printable(line) for line in _lines(outline))


def _lines(outline: Outline) -> Iterator[str]:
    state = "nothing is under way" if outline.cutover is None else f"{outline.under_way} {outline.cutover} is under way"
    yield f"{outline.kind} of {outline.table}: the plan. {state}; nothing is done without --execute."
    yield f"  legacy  {outline.source}"
    yield f"  main    {outline.target}"
    for number, step in enumerate(outline.steps, 1):
        yield f"{number}. {step.name}: {step.title}{_when(step, outline)}"
        for name, text in (("reads", step.reads), ("writes", step.writes), ("back", step.undo)):
            if text:
                yield f"     {name:<6}  {text}"
    if outline.kind != "rollback" and not any(step.seconds for step in outline.steps if step.name == "fence"):
        yield "How long it takes is not known yet: pipeline cutover --rehearse measures it."
    yield f"next: pipeline {_NEXT[outline.kind]}"


_NEXT = {"cutover": "cutover --execute", "rollback": "rollback --execute"}


def _when(step: Step, outline: Outline) -> str:
    if step.name in outline.done:
        return " (done)"
    return "" if step.seconds is None else f" (about {duration(step.seconds)})"


def cutover_summary(done: CutoverDone) -> str:
    """Return the last words of a cutover, a rehearsal, a way back or a finalize."""
    lines = []
    if done.outcome == "stopped":
        lines.append(f"stopped before {done.next_step}, as asked for.\nnext: pipeline cutover --execute")
    else:
        lines.append(f"{_ENDS[done.outcome]}.")
    if done.fence_seconds is not None and done.outcome in ("rehearsed", "switched"):
        lines.append(f"fence held for {done.fence_seconds:.2f} s")
    lines += [f"  remains: {one}" for one in done.remains]
    if done.outcome == "rehearsed":
        lines.append("next: pipeline cutover, which shows the plan with these times")
    elif done.outcome == "switched":
        lines.append("next: pipeline finalize, once you are sure; until then pipeline rollback goes back")
    return "\n".join(lines)
