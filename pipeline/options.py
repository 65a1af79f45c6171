"""What an operator may set for a command, with the defaults that help and engine share."""

from dataclasses import dataclass
from typing import Literal

# What becomes of a row of the target that no run brought, whose key the source has with other content.
OnConflict = Literal["refuse", "keep", "overwrite"]
DEFAULT_WORKERS = 2
DEFAULT_SLICE_BYTES = 64 * 1024 * 1024
DEFAULT_DEADLINE_SECONDS = 60.0
DEFAULT_STALL_SECONDS = 30.0
DEFAULT_QUERIES = 10
DEFAULT_K = 10
DEFAULT_OLD_TRANSACTION_SECONDS = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyOptions:
    """How to copy.

    ``deadline_seconds`` bounds how long one step is tried again after lost connections, counted from
    the first. A connection through which no byte moved for ``stall_seconds`` counts as lost. ``restart``
    gives an unfinished run up and begins a new one, into an empty table. ``max_bytes_per_second``
    bounds the load of all workers together (None: as fast as it goes). ``index_bytes`` and
    ``index_workers`` replace what is planned for building indexes: maintenance_work_mem, and parallel
    processes beside the first. ``quarantine`` sets rows aside that cannot be carried. Passes over what
    changed meanwhile end with one that writes ``settle_rows`` rows or fewer.
    """

    workers: int = DEFAULT_WORKERS
    slice_bytes: int = DEFAULT_SLICE_BYTES
    deadline_seconds: float = DEFAULT_DEADLINE_SECONDS
    stall_seconds: float = DEFAULT_STALL_SECONDS
    restart: bool = False
    max_bytes_per_second: float | None = None
    index_bytes: int | None = None
    index_workers: int | None = None
    quarantine: bool = False
    on_conflict: OnConflict = "refuse"
    settle_rows: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """How many stored vectors are asked for, and how many neighbours each."""

    queries: int = DEFAULT_QUERIES
    k: int = DEFAULT_K


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightOptions:
    """For how many workers room is asked for, and whether every row is read for the census.

    A transaction of somebody else that is older than ``old_transaction_seconds`` is worth a warning.
    """

    workers: int = DEFAULT_WORKERS
    census: bool = True
    old_transaction_seconds: float = DEFAULT_OLD_TRANSACTION_SECONDS
