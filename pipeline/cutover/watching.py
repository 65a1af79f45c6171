"""The last step: for a while, who still tries to write to legacy is named, and main's searches are timed."""

from dataclasses import replace

from pipeline.check.before import pass_before
from pipeline.check.changes import Look
from pipeline.check.pair import read_pair
from pipeline.cutover import closing
from pipeline.cutover.canary import CanaryFigures
from pipeline.cutover.counters import Counters
from pipeline.cutover.strays import Stray
from pipeline.cutover.switching import new_settings
from pipeline.cutover.watch import watch as watch_both
from pipeline.cutover.work import PURPOSE, Deed, Work
from pipeline.errors import DifferencesError
from pipeline.events import Warned, Watching
from pipeline.wording import counted


def watch(work: Work) -> Deed:
    """Watch both sides; a write to legacy, or a search that fails or is slow, fails the step, and undoes nothing."""
    counters = work.evidence("fence").get("counters") or closing.read_legacy_counters(work)
    look = work.crew.call(_look_at_the_proof, work)

    def tell(seconds: float, strays: tuple[Stray, ...], figures: CanaryFigures) -> None:
        work.crew.emit(
            Watching(
                seconds=seconds,
                of_seconds=work.options.watch_seconds,
                strays=len(strays),
                searches=figures.searches,
                errors=figures.errors,
                p95_ms=figures.p95_ms,
            )
        )

    done = work.crew.start(
        watch_both,
        work.crew,
        work.source,
        replace(new_settings(work).application(), name=work.route.target.name),
        work.route.table,
        Counters.from_json(counters),
        seconds=work.options.watch_seconds,
        look=look,
        max_latency_ms=work.options.max_latency_ms,
        app_role=work.options.app_role,
        tell=tell,
    )
    yield from work.crew.follow([done], guards=[work.lease.future])
    watched = done.result()
    for note in watched.notes:
        yield Warned(fact=note, hint="")
    if watched.verdict == "fail":
        raise DifferencesError(
            f"the switch is made, and the watch found: {'; '.join(watched.reasons)}",
            "mend it and run this again, which watches anew; or go back: pipeline rollback",
        )
    canary = watched.canary
    p95 = "" if canary.p95_ms is None else f", 95 of 100 within {canary.p95_ms:.0f} ms"
    known = watched.written is not None and watched.written.written is False
    wrote = "nobody wrote to legacy" if known else "whether legacy was written is not known"
    summary = (
        f"{wrote}; {counted(len(watched.strays), 'client')} still connected there;"
        f" {counted(canary.searches, 'search')} on main{p95}"
    )
    return watched.to_json(), summary


def _look_at_the_proof(work: Work) -> Look | None:
    """Return how legacy's table stood when both sides were equal under the fence."""
    with work.crew.together((work.source, PURPOSE), (work.target, PURPOSE)) as (source, target):
        pair = read_pair(work.crew, source, target, work.route, to_write=False)
        before = pass_before(source, target, work.route.table, pair, verified=True)
    return None if before is None else Look.from_json(before.source_horizon)
