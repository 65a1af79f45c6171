"""Run the processes of one contender and tell what they took; a program of its own, kept small on purpose.

Linux counts into a child's peak memory what its parent held when it was started, so a parent with numpy
and a corpus would be what is measured. The least that can be told is this interpreter's own, some 10 MB.
"""

import json
import os
import signal
import sys
import time

# What ru_maxrss counts in: kilobytes, and on macOS bytes.
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def start_pipe(commands: list[list[str]]) -> list[int]:
    """Start the commands with stdout of each on stdin of the next; return their process ids."""
    started = []
    reading = os.open(os.devnull, os.O_RDONLY)
    for number, command in enumerate(commands, 1):
        following, writing = os.pipe() if number < len(commands) else (-1, os.open(os.devnull, os.O_WRONLY))
        actions = [(os.POSIX_SPAWN_DUP2, reading, 0), (os.POSIX_SPAWN_DUP2, writing, 1)]
        # Python ignores SIGPIPE, and its children would inherit that: a shell's do not.
        started.append(
            os.posix_spawn(command[0], command, os.environ, file_actions=actions, setsigdef=[signal.SIGPIPE])
        )
        os.close(reading)
        os.close(writing)
        reading = following
    return started


def run_step(pipes: list[list[list[str]]]) -> tuple[list[int], float, int]:
    """Run pipes at the same time; return exit codes, CPU seconds and the sum of peak bytes of all processes."""
    codes, cpu, peak = [], 0.0, 0
    for process in [process for pipe in pipes for process in start_pipe(pipe)]:
        _, status, usage = os.wait4(process, 0)
        codes.append(os.waitstatus_to_exitcode(status))
        cpu += usage.ru_utime + usage.ru_stime
        peak += usage.ru_maxrss * RSS_UNIT
    return codes, cpu, peak


def main() -> None:
    """Read steps as JSON on stdin, run one after the other, and write the figures as JSON on stdout.

    Ends after the first step of which a process failed.
    """
    steps = json.load(sys.stdin)
    codes: list[int] = []
    cpu, peak = 0.0, 0
    started = time.monotonic()
    for pipes in steps:
        codes, used, held = run_step(pipes)
        cpu += used
        peak = max(peak, held)
        if any(codes):
            break
    seconds = time.monotonic() - started
    json.dump({"codes": codes, "seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak}, sys.stdout)


if __name__ == "__main__":
    main()
