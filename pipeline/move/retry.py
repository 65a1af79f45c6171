"""Trying again: what may pass, for how long, and never after the crew was told to stop."""

from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential_jitter

from pipeline.errors import PipelineError
from pipeline.events import Retrying as RetryingEvent
from pipeline.postgres.crew import Crew

T = TypeVar("T")
FIRST_WAIT_SECONDS = 0.2
LONGEST_WAIT_SECONDS = 5.0


def with_retries(crew: Crew, what: str, deadline_seconds: float, work: Callable[[int], T]) -> T:
    """Call ``work(attempt)``, attempts counted from 1, until it succeeds or the deadline has passed.

    Only errors that are marked retryable are tried again, with exponential back-off and jitter.
    Raises the last error, or StoppedError once the crew stops.
    """

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
        wait=wait_exponential_jitter(initial=FIRST_WAIT_SECONDS, max=LONGEST_WAIT_SECONDS, jitter=FIRST_WAIT_SECONDS),
        stop=stop_after_delay(deadline_seconds),
        sleep=crew.pause,
        before_sleep=announce,
        reraise=True,
    ):
        with attempt:
            crew.check()
            return work(attempt.retry_state.attempt_number)
    raise AssertionError("unreachable: the last attempt returned or raised")
