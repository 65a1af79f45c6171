"""The watch after the switch: who is still at legacy, whether it was written all the same, and how main answers."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.check.changes import Look
from pipeline.cutover.canary import Canary, CanaryFigures
from pipeline.cutover.counters import Counters, Written, written_since
from pipeline.cutover.strays import Stray, read_strays
from pipeline.endpoints import Endpoint
from pipeline.errors import PipelineError, StoppedError
from pipeline.events import Verdict
from pipeline.options import DEFAULT_K, DEFAULT_LATENCY_MILLISECONDS, DEFAULT_WATCH_SECONDS
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import clock
from pipeline.postgres.fence import read_fence
from pipeline.postgres.tables import describe
from pipeline.settings import TableMapping
from pipeline.wording import counted

PURPOSE = "cutover watch"
# Both sides are looked at once in so many seconds.
INTERVAL_SECONDS = 1.0
# Questions about sessions and counters are short.
_PATIENCE_SECONDS = 10.0
_NAMED = 5
Tell = Callable[[float, tuple[Stray, ...], CanaryFigures], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What a watch has seen. ``fail`` has ``reasons``; ``partial``: nothing failed, ``notes`` tell what is not known.

    ``strays`` are all that were seen, each as it was seen last, or as it was seen writing. ``written`` is None, and
    ``fenced`` too, where legacy could not be asked at the end. ``legacy_errors`` counts looks that failed.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    strays: tuple[Stray, ...]
    written: Written | None
    fenced: bool | None
    canary: CanaryFigures
    legacy_errors: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON, for evidence."""
        return {**asdict(self), "reasons": list(self.reasons), "notes": list(self.notes)} | {
            "strays": [asdict(stray) for stray in self.strays]
        }


def watch(
    crew: Crew,
    legacy: Endpoint,
    main: Endpoint,
    mapping: TableMapping,
    before: Counters,
    *,
    seconds: float = DEFAULT_WATCH_SECONDS,
    look: Look | None = None,
    max_latency_ms: float = DEFAULT_LATENCY_MILLISECONDS,
    app_role: str | None = None,
    k: int = DEFAULT_K,
    interval_seconds: float = INTERVAL_SECONDS,
    tell: Tell | None = None,
) -> Watched:
    """Watch both sides for so many seconds, then judge. Runs in a thread of the crew.

    ``before`` are legacy's counters, read once its fence stood; ``look`` is a look at its table under the fence, by
    which counters that differ are explained. ``main`` is what the application's new settings name. ``tell`` is told
    the seconds so far, who is at legacy, and main's figures, once an interval. Nothing is written. Raises
    StoppedError; what cannot be reached counts against the verdict.
    """
    started, canary = clock(), Canary(main, mapping, app_role, k)
    singing = crew.start(canary.sing, crew, seconds, interval_seconds)
    seen: dict[int, Stray] = {}
    errors = list[str]()
    while True:
        began = clock()
        try:
            now = _strays(crew, legacy, mapping, before)
        except StoppedError:
            raise
        except PipelineError as error:
            crew.check()
            now = ()
            errors.append(error.fact)
        for stray in now:
            # What it was seen doing is not forgotten when it does something else.
            if not (stray.pid in seen and seen[stray.pid].writes):
                seen[stray.pid] = stray
        if tell is not None:
            tell(clock() - started, now, canary.figures())
        rest = started + seconds - clock()
        if rest <= 0:
            break
        crew.pause(max(0.0, min(rest, interval_seconds - (clock() - began))))
    singing.result()
    written, fenced, end_error = _end(crew, legacy, mapping, before, look)
    return _judge(
        legacy,
        main,
        tuple(seen.values()),
        written,
        fenced,
        errors + end_error,
        canary.figures(),
        max_latency_ms,
        clock() - started,
    )


def _strays(crew: Crew, legacy: Endpoint, mapping: TableMapping, before: Counters) -> tuple[Stray, ...]:
    with crew.session(legacy, PURPOSE, _PATIENCE_SECONDS) as session:
        return read_strays(session, mapping, before.at)


def _end(
    crew: Crew, legacy: Endpoint, mapping: TableMapping, before: Counters, look: Look | None
) -> tuple[Written | None, bool | None, list[str]]:
    """Return whether legacy was written, whether its fence stands, and why neither is known."""
    found = list[str]()
    # Once more: a session that was kept since the last look may have died meanwhile.
    for _ in range(2):
        try:
            with crew.session(legacy, PURPOSE) as session:
                written = written_since(session, mapping, before, look)
                return written, read_fence(session, describe(session, mapping)).standing, []
        except StoppedError:
            raise
        except PipelineError as error:
            crew.check()
            found = [error.fact]
    return None, None, found


def _judge(
    legacy: Endpoint,
    main: Endpoint,
    strays: tuple[Stray, ...],
    written: Written | None,
    fenced: bool | None,
    legacy_errors: list[str],
    canary: CanaryFigures,
    max_latency_ms: float,
    seconds: float,
) -> Watched:
    reasons = [*_of_writes(legacy, written, fenced), *_of_strays(legacy, strays)]
    reasons += _of_searches(main, canary, max_latency_ms)
    unknown = _unknown(legacy, strays, written, legacy_errors)
    if canary.nothing_stored:
        unknown.append(f"{main.name} has no vector that could be searched for")
    others = [stray for stray in strays if not stray.writes]
    notes = [f"still connected to {legacy.name}: {_names(others)}"] if others else []
    if strays and written is not None and written.rolled_back:
        # A client that rolls a refused write back is seen at its ROLLBACK.
        rolled_back = counted(written.rolled_back, "transaction")
        notes.append(f"rolled back in {legacy.name}'s database since the fence: {rolled_back}")
    return Watched(
        verdict="fail" if reasons else "partial" if unknown else "pass",
        reasons=tuple(reasons),
        notes=(*unknown, *notes),
        strays=strays,
        written=written,
        fenced=fenced,
        canary=canary,
        legacy_errors=len(legacy_errors),
        seconds=round(seconds, 3),
    )


def _of_writes(legacy: Endpoint, written: Written | None, fenced: bool | None) -> list[str]:
    found = []
    if fenced is False:
        found.append(f"{legacy.name}'s fence does not stand whole any more")
    if written is not None and written.written:
        counts = f" ({_counts(written)}, by its counters)" if written.comparable else ""
        found.append(f"{legacy.name}'s table was written since the fence{counts}")
    return found


def _counts(written: Written) -> str:
    return f"{written.inserted:,} inserted, {written.updated:,} updated, {written.deleted:,} deleted"


def _of_strays(legacy: Endpoint, strays: tuple[Stray, ...]) -> list[str]:
    writers = [stray for stray in strays if stray.writes]
    return [f"writes are still sent to {legacy.name}, by {_names(writers)}"] if writers else []


def _names(strays: list[Stray]) -> str:
    more = f", and {counted(len(strays) - _NAMED, 'other')}" if len(strays) > _NAMED else ""
    return ", ".join(stray.label for stray in strays[:_NAMED]) + more


def _of_searches(main: Endpoint, canary: CanaryFigures, max_latency_ms: float) -> list[str]:
    found = []
    if canary.errors:
        found.append(
            f"{canary.errors:,} of {canary.searches:,} searches on {main.name} failed; the first: {canary.first_error}"
        )
    if canary.p95_ms is not None and canary.p95_ms > max_latency_ms:
        found.append(
            f"95 of 100 searches on {main.name} take up to {canary.p95_ms:,.0f} ms; up to {max_latency_ms:,.0f} ms"
            " are allowed"
        )
    return found


def _unknown(
    legacy: Endpoint, strays: tuple[Stray, ...], written: Written | None, legacy_errors: list[str]
) -> list[str]:
    found = []
    if legacy_errors:
        found.append(f"{legacy.name} could not be asked {counted(len(legacy_errors), 'time')}: {legacy_errors[0]}")
    if written is not None and written.written is None:
        why = f"count more than at the fence ({_counts(written)})" if written.comparable else "were set back"
        found.append(f"{legacy.name}'s counters {why}, so whether its table was written is not known by them")
    hidden = sum(stray.writes is None for stray in strays)
    if hidden:
        found.append(
            f"what {counted(hidden, 'session')} on {legacy.name} do does not show to the role {legacy.user}; to see it:"
            " GRANT pg_read_all_stats"
        )
    return found
