"""What can go wrong, as the operator sees it: a fact, a hint and an exit code.

PipelineError (1)
├── SettingsError (2)      a setting, an option or an endpoint's name is missing or unusable
├── RejectedError (1)      a server answered, and turned the connection down
├── StatementError (1)     a server refused a statement for a reason that no retry cures
│   └── DuplicateKeyError  a row's key is on the target already
├── RefusedError (4)       a check or a gate said no; nothing was changed
├── DifferencesError (3)   a step that needs both sides equal found that they are not
├── UnreachableError (5)   a server cannot be reached, or a connection stayed lost; resumable
│   └── CrowdedError       it answered, and has no connection free
├── ConflictError (5)      two transactions stood in each other's way; resumable
├── BusyError (6)          another run holds the lease
└── StoppedError (130)     stopped by a signal; resumable
    └── TerminatedError (143)

Differences that a comparison was asked for are a result with exit code 3, not an error.
"""

from typing import ClassVar

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_DIFFERENCES = 3
EXIT_REFUSED = 4
EXIT_UNREACHABLE = 5
EXIT_BUSY = 6
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class PipelineError(Exception):
    """Tell what is wrong and where (``fact``) and what to type next (``hint``).

    Neither may hold a secret or the content of a row. ``sqlstate`` is the server's code, where there
    was one. ``retryable`` says that the same step,
    tried again on new connections after reading the ledger, may succeed.
    """

    exit_code: ClassVar[int] = EXIT_ERROR
    retryable: ClassVar[bool] = False

    def __init__(self, fact: str, hint: str = "", sqlstate: str = "") -> None:
        super().__init__(fact)
        self.fact = fact
        self.hint = hint
        self.sqlstate = sqlstate


class SettingsError(PipelineError):
    """A setting, an option or an endpoint's name is missing or unusable."""

    exit_code = EXIT_USAGE


class RejectedError(PipelineError):
    """The server answered the connection and turned it down: password, role or database."""


class StatementError(PipelineError):
    """A server refused a statement for a reason that no retry cures."""


class DuplicateKeyError(StatementError):
    """A row's key is on the target already."""


class RefusedError(PipelineError):
    """A check or a gate said no before anything was changed."""

    exit_code = EXIT_REFUSED


class DifferencesError(PipelineError):
    """A step that needs both sides equal found that they are not."""

    exit_code = EXIT_DIFFERENCES


class UnreachableError(PipelineError):
    """A server cannot be reached, or a connection was lost. What was done stays done."""

    exit_code = EXIT_UNREACHABLE
    retryable = True


class CrowdedError(UnreachableError):
    """A server answered, and has no connection free for this role or at all."""


class ConflictError(PipelineError):
    """Two transactions stood in each other's way (deadlock, serialization, lock timeout)."""

    exit_code = EXIT_UNREACHABLE
    retryable = True


class BusyError(PipelineError):
    """Another run holds the lease on the table, or took it over."""

    exit_code = EXIT_BUSY


class StoppedError(PipelineError):
    """A signal ended the work. It can be resumed."""

    exit_code = EXIT_INTERRUPTED


class TerminatedError(StoppedError):
    """SIGTERM ended the work. It can be resumed."""

    exit_code = EXIT_TERMINATED
