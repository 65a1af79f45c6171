"""What an operator may set for a command, with the defaults that help and engine share."""

from dataclasses import dataclass

DEFAULT_WORKERS = 2
DEFAULT_SLICE_BYTES = 32 * 1024 * 1024
DEFAULT_DEADLINE_SECONDS = 60.0
DEFAULT_QUERIES = 10
DEFAULT_K = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyOptions:
    """How to copy.

    ``deadline_seconds`` bounds how long one step is tried again after lost connections. ``restart``
    gives an unfinished run up and begins a new one, into an empty table.
    """

    workers: int = DEFAULT_WORKERS
    slice_bytes: int = DEFAULT_SLICE_BYTES
    deadline_seconds: float = DEFAULT_DEADLINE_SECONDS
    restart: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """How many stored vectors are asked for, and how many neighbours each."""

    queries: int = DEFAULT_QUERIES
    k: int = DEFAULT_K
