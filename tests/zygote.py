"""Processes without their start: one that has imported everything forks for each command of a test.

What runs is a real process, with its own pid, environment, working directory and exit code; only the
second of imports before its first line is spared. Commands that a test signals are started as always.
"""

import gc
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

# Read once, at the interpreter's start: with another value a process of its own is needed.
AT_START = ("PYTHONIOENCODING", "PYTHONUTF8", "LC_ALL", "LC_CTYPE", "LANG", "PYTHONPATH", "PYTHONWARNINGS")
# What commands import when they come to it.
MORE = (
    *("structlog", "structlog.dev", "structlog.stdlib", "rich.columns", "rich.traceback", "rich._emoji_codes"),
    *("logging.config", "logging.handlers", "difflib", "click._textwrap"),
)
_lock = threading.Lock()
_zygote: "subprocess.Popen[str] | None" = None


def can_fork(env: dict[str, str]) -> bool:
    """Return whether a fork would see what a new process would."""
    return hasattr(os, "fork") and all(env.get(name) == os.environ.get(name) for name in AT_START)


def run_forked(name: str, arguments: list[str], env: dict[str, str], cwd: str, timeout: float) -> tuple[int, str, str]:
    """Run ``pipeline`` or ``alembic`` in a fork; return exit code (negative: the signal), stdout and stderr.

    Raises TimeoutExpired, as subprocess does, and BlockingIOError while another thread's command runs.
    """
    global _zygote
    if not _lock.acquire(blocking=False):
        raise BlockingIOError
    try:
        if _zygote is None or _zygote.poll() is not None:
            _zygote = subprocess.Popen(
                [sys.executable, "-c", "from tests.zygote import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parent.parent,
            )
        assert _zygote.stdin is not None and _zygote.stdout is not None
        with tempfile.TemporaryDirectory(prefix="pipeline-test-output-") as folder:
            wanted = {"name": name, "argv": arguments, "env": env, "cwd": cwd, "folder": folder, "timeout": timeout}
            _zygote.stdin.write(json.dumps(wanted) + "\n")
            _zygote.stdin.flush()
            code = json.loads(_zygote.stdout.readline())
            if code is None:
                raise subprocess.TimeoutExpired([name, *arguments], timeout)
            out, err = (Path(folder, stream).read_text(encoding="utf-8") for stream in ("out", "err"))
        return code, out, err
    finally:
        _lock.release()


def serve() -> None:
    """Fork for every request on stdin, until it ends; answer with the exit code, null where time ran out."""
    import alembic.config
    import sqlalchemy.dialects.postgresql  # noqa: F401

    import pipeline.cli

    ours = (module.name for module in pkgutil.walk_packages(pipeline.__path__, "pipeline."))
    for name in (*ours, *MORE):
        # What cannot be imported is reported by the command that needs it.
        with suppress(ImportError, SyntaxError):
            if not name.endswith("__main__"):
                importlib.import_module(name)
    # Forks leave what is there in the pages that they share.
    gc.freeze()

    mains: dict[str, Callable[[], object]] = {"pipeline": pipeline.cli.main, "alembic": alembic.config.main}
    for line in sys.stdin:
        wanted = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(wanted, mains[wanted["name"]])
        sys.stdout.write(json.dumps(_wait(child, wanted["timeout"])) + "\n")
        sys.stdout.flush()


def _become(wanted: dict[str, Any], main: Callable[[], object]) -> None:
    """Be the process that was asked for, to its end."""
    os.environ.clear()
    os.environ.update(wanted["env"])
    os.chdir(wanted["cwd"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, stream in ((1, "out"), (2, "err")):
        file = os.open(Path(wanted["folder"], stream), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.argv = [wanted["name"], *wanted["argv"]]
    code = 1
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            sys.stderr.write(end.code + "\n")
    except BaseException:  # noqa: BLE001 - what ends an interpreter is printed by it
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, timeout: float) -> int | None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.003)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
