"""Numbers as people read them."""

import math


def size(count: float) -> str:
    """Return bytes in the largest decimal unit that fits: ``1.2 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Return a time span in at most two units: ``0.4 s``, ``12 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def time_left(seconds: float) -> str:
    """Return a time that is only estimated, as coarse as it deserves: ``25 s``, ``3 min 20 s``, ``2 h 10 min``."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 10:
        return f"{math.ceil(max(1.0, seconds))} s"
    for below, step in ((60, 5), (600, 10)):
        if seconds < below:
            return duration(round(seconds / step) * step)
    if seconds < 3570:
        return f"{round(seconds / 60)} min"
    return duration(round(seconds / 600) * 600)


def rate(count: float, seconds: float) -> str:
    """Return bytes per second as text, or ``-`` where no time has passed."""
    return f"{size(count / seconds)}/s" if seconds > 0 else "-"


def printable(text: str) -> str:
    """Return text without control characters: a server's message may carry escape sequences."""
    return "".join(
        character if character.isprintable() or character == "\n" else "\N{REPLACEMENT CHARACTER}" for character in text
    )
