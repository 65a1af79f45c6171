"""What an operator may set for a command, with the defaults that help and engine share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# What becomes of a row of the target that no run brought, whose key the source has with other content.
OnConflict = Literal["refuse", "keep", "overwrite"]
DEFAULT_WORKERS = 2
DEFAULT_SLICE_BYTES = 64 * 1024 * 1024
DEFAULT_DEADLINE_SECONDS = 60.0
DEFAULT_STALL_SECONDS = 30.0
DEFAULT_QUERIES = 50
DEFAULT_K = 10
# The rungs of verify that can be asked for by name; ``rows`` are counts and digests.
CHECKS = ("rows", "census", "parity", "recall", "plan", "latency", "application")
DEFAULT_BUDGET_SECONDS = 60.0
DEFAULT_MIN_RECALL = 0.9
DEFAULT_SETTLE_SECONDS = 2.0
DEFAULT_OLD_TRANSACTION_SECONDS = 300.0
# The steps of a cutover, in their order.
STEPS = ("preflight", "backup", "catchup", "fence", "prove", "switch", "smoke", "watch")
DEFAULT_MAX_LAG_ROWS = 10_000
DEFAULT_BACKUP_FOLDER = Path("backups")
DEFAULT_FREE_BYTES = 1024**3
DEFAULT_FENCE_SECONDS = 30.0
DEFAULT_OWNER_SECONDS = 600.0
DEFAULT_FENCE_LIMIT_SECONDS = 60.0
DEFAULT_WATCH_SECONDS = 30.0
DEFAULT_LATENCY_MILLISECONDS = 1_000.0


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
    """What verify looks at.

    ``queries`` vectors are asked for, ``k`` neighbours each; each check of search ends after
    ``budget_seconds``, with as many queries as were reached. The ANN index has to find ``min_recall``
    (0 to 1) of what exact search finds. ``app_role`` is the role that the application connects as (None:
    the target's own). ``workers`` read each side; a difference counts if it is still there after
    ``settle_seconds``. With ``incremental`` only rows are compared that were touched since the last full
    verdict; with ``restart`` an interrupted comparison is not gone on with. ``checks`` are the names of
    those that are run (empty: all).
    """

    queries: int = DEFAULT_QUERIES
    k: int = DEFAULT_K
    budget_seconds: float = DEFAULT_BUDGET_SECONDS
    min_recall: float = DEFAULT_MIN_RECALL
    app_role: str | None = None
    workers: int = 1
    settle_seconds: float = DEFAULT_SETTLE_SECONDS
    incremental: bool = False
    restart: bool = False
    checks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncOptions:
    """How to sync, and how to list what a sync would look at.

    With ``deep`` every row is compared, also where it is known what was touched. Rows of the target that
    somebody else wrote: ``on_conflict`` says what becomes of one with other content than the source's,
    ``delete`` that those go which only the target has, ``delete_equal`` only of those that both sides had equal
    once, and that nobody has touched on the target since: these were deleted on the source. The other options
    as for copy and verify.
    """

    deep: bool = False
    delete: bool = False
    delete_equal: bool = False
    on_conflict: OnConflict = "keep"
    workers: int = 1
    settle_seconds: float = DEFAULT_SETTLE_SECONDS
    restart: bool = False
    deadline_seconds: float = DEFAULT_DEADLINE_SECONDS
    stall_seconds: float = DEFAULT_STALL_SECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightOptions:
    """For how many workers room is asked for, and whether every row is read for the census.

    A transaction of somebody else that is older than ``old_transaction_seconds`` is worth a warning.
    """

    workers: int = DEFAULT_WORKERS
    census: bool = True
    old_transaction_seconds: float = DEFAULT_OLD_TRANSACTION_SECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class CutoverOptions:
    """How to cut over, and how to go back.

    ``env_files`` are edited by the switch, the first one is where the settings come from; ``after_switch`` are
    commands for a shell, run after them. ``until`` is the last step that is
    done (None: all of them). The dumps go to ``backup_folder``,
    where ``free_bytes`` stay free, unless ``skip_backup``. Up to ``max_lag_rows`` may differ when it begins.
    The fence is tried for ``fence_seconds``, its owner is waited for ``owner_seconds``; a rehearsal's
    ends by itself after ``fence_limit_seconds``. With ``deep`` the proof
    under the fence compares every row. With ``take_main`` the way back overwrites what legacy took although it was
    closed. ``watch_seconds`` after the switch, main's searches have to take no
    longer than ``max_latency_ms`` (95 of 100). ``smoke_texts`` are searched for as the application would.
    """

    env_files: tuple[Path, ...] = ()
    after_switch: tuple[str, ...] = ()
    until: str | None = None
    backup_folder: Path = DEFAULT_BACKUP_FOLDER
    free_bytes: int = DEFAULT_FREE_BYTES
    skip_backup: bool = False
    pg_dump: Path | None = None
    app_role: str | None = None
    max_lag_rows: int = DEFAULT_MAX_LAG_ROWS
    fence_seconds: float = DEFAULT_FENCE_SECONDS
    owner_seconds: float = DEFAULT_OWNER_SECONDS
    fence_limit_seconds: float = DEFAULT_FENCE_LIMIT_SECONDS
    deep: bool = False
    take_main: bool = False
    watch_seconds: float = DEFAULT_WATCH_SECONDS
    max_latency_ms: float = DEFAULT_LATENCY_MILLISECONDS
    smoke_texts: tuple[str, ...] = ()
