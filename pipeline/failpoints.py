"""Points at which a test ends, stops or delays this process; nothing happens outside a test.

``PIPELINE_FAILPOINT=name[:action][@n]`` together with ``PIPELINE_TESTING=1``: at the n-th passage
(default 1) of the point, do ``kill`` (the default: SIGKILL to ourselves), ``raise`` (a lost
connection), ``stop`` (SIGSTOP) or ``sleep=SECONDS``.
"""

import os
import re
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import SettingsError, UnreachableError

# In the order in which a copy passes them; then those of a comparison, of a sync and of the edit of an env file.
NAMES = (
    "after_lease",
    "in_quarantine",
    "after_defer",
    "after_copy",
    "before_commit",
    "after_commit",
    "before_loaded",
    "in_reconcile",
    "before_horizon",
    "in_index_build",
    "before_finish",
    "after_compared",
    "before_pass",
    "before_step",
    "in_step",
    "after_step",
    "before_open",
    "after_open",
    "in_env_edit",
    "after_env_edit",
)
_SYNTAX = re.compile(
    r"(?P<name>\w+)(?::(?P<action>kill|raise|stop|sleep)(?:=(?P<seconds>[0-9.]+))?)?(?:@(?P<passage>[1-9][0-9]*))?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Armed:
    """What is to happen, and at which passage of which point."""

    name: str
    action: str
    seconds: float
    passage: int


def read_armed(variables: Mapping[str, str]) -> Armed | None:
    """Return what a process's environment asks for, None outside a test. Raises SettingsError."""
    text = variables.get("PIPELINE_FAILPOINT", "")
    if not text or variables.get("PIPELINE_TESTING") != "1":
        return None
    match = _SYNTAX.fullmatch(text)
    if match is None or match["name"] not in NAMES:
        raise SettingsError(
            "PIPELINE_FAILPOINT is not NAME[:kill|raise|stop|sleep=SECONDS][@n]", f"the names: {', '.join(NAMES)}"
        )
    return Armed(
        name=match["name"],
        action=match["action"] or "kill",
        seconds=float(match["seconds"] or 0),
        passage=int(match["passage"] or 1),
    )


_passages = 0
_lock = threading.Lock()


def failpoint(name: str) -> None:
    """Do what the environment asks for at this point: in most processes nothing."""
    armed = read_armed(os.environ)
    if armed is None or armed.name != name:
        return
    global _passages
    with _lock:
        _passages += 1
        if _passages != armed.passage:
            return
    if armed.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif armed.action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif armed.action == "sleep":
        time.sleep(armed.seconds)
    else:
        raise UnreachableError(f"the failpoint {name} was reached", "this is a test")
