"""Trying again: what may pass, for how long, and never after the crew was told to stop."""

import random
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception

from pipeline.errors import PipelineError
from pipeline.events import Retrying as RetryingEvent
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import clock

T = TypeVar("T")
FIRST_WAIT_SECONDS = 0.2
LONGEST_WAIT_SECONDS = 5.0


def with_retries(crew: Crew, what: str, deadline_seconds: float, work: Callable[[int], T]) -> T:
    """Call ``work(attempt)``, attempts counted from 1, until it succeeds or the deadline has passed.

    Only errors that are marked retryable are tried again, with exponential back-off and jitter. The
    deadline counts from the first failure: what was lost may have worked for hours. Raises the last
    error, or StoppedError once the crew stops.
    """
    failing_since: float | None = None

    def expired(_state: RetryCallState) -> bool:
        nonlocal failing_since
        if failing_since is None:
            failing_since = clock()
        return clock() - failing_since >= deadline_seconds

    def announce(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        crew.emit(
            RetryingEvent(
                what=what,
                attempt=state.attempt_number,
                delay=state.next_action.sleep if state.next_action else 0.0,
                fact=error.fact if isinstance(error, PipelineError) else type(error).__name__,
            )
        )

    for attempt in Retrying(
        retry=retry_if_exception(
            lambda error: isinstance(error, PipelineError) and error.retryable and not crew.stopping.is_set()
        ),
        wait=_delay,
        stop=expired,
        sleep=crew.pause,
        before_sleep=announce,
        reraise=True,
    ):
        with attempt:
            crew.check()
            return work(attempt.retry_state.attempt_number)
    raise AssertionError("unreachable: the last attempt returned or raised")


def _delay(state: RetryCallState) -> float:
    """Return the seconds until the next attempt: doubled each time, and never the same for two workers."""
    doubled = FIRST_WAIT_SECONDS * 2.0 ** min(state.attempt_number - 1, 16)
    return min(doubled + random.uniform(0, FIRST_WAIT_SECONDS), LONGEST_WAIT_SECONDS)
