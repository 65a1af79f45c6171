"""What a document shows of a command beside what it prints: the same lines, but for times, places and numbers."""

import re
from collections.abc import Iterator

LEFT_OUT = "…"
# A line of the log, which on a terminal has its text alone; one with further fields is drawn there, and does not stay.
_LOGGED = re.compile(r'timestamp=\S+ level=\w+ event=(?:"(?P<text>(?:[^"\\]|\\.)*)"|\w+)(?P<fields> .*)?')
_SAME: tuple[tuple[str, str], ...] = (
    (r"[\w.-]+@[\w.-]+:\d+/\w+", "ADDRESS"),
    (r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22}", "ID"),
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:Z|\+00:00)", "MOMENT"),
    (r"\d{8}T\d{6}Z", "MOMENT"),
    (r"\S*/(?=backups\b|\.env)", "/"),
    (r"(?:\d+ min )?[\d.,]+ (?:m?s)\b", "TIME"),
    (r"[\d.,]*\d (?:k|M|G)?B\b", "SIZE"),
    (r"\d[\d,]*(?:\.\d+)?", "N"),
    (r"\bN (change|changed row|client|command|copie|dump|row|search|slice|vector|write|writer)e?s?\b", r"N \1"),
)


def find_difference(shown: str, printed: str) -> str | None:
    """Return the first line that is shown and not printed, or printed and not shown; None where all are alike.

    A line that begins with a blank goes on with the one above it, as a terminal folds. A line of ``…`` alone stands
    for any lines, an ``…`` within one for any text. Empty lines do not count.
    """
    there = list(_lines(_logged_as_shown(printed)))
    place, skipping = 0, False
    for line in _lines(shown.splitlines()):
        if line == LEFT_OUT:
            skipping = True
            continue
        pattern = ".*".join(re.escape(part) for part in line.split(LEFT_OUT))
        found = next((at for at in range(place, len(there)) if re.fullmatch(pattern, there[at])), None)
        if found is None or (found > place and not skipping):
            left = "\n".join(there[place:]) or "nothing more"
            return f"shown:   {line}\nprinted: {left}"
        place, skipping = found + 1, False
    if place < len(there) and not skipping:
        return "shown:   nothing more\nprinted: " + "\n".join(there[place:])
    return None


def _logged_as_shown(printed: str) -> Iterator[str]:
    for line in printed.splitlines():
        if (logged := _LOGGED.fullmatch(line)) is None:
            yield line
        elif logged["text"] is not None and logged["fields"] is None:
            yield re.sub(r"\\(.)", r"\1", logged["text"])


def _lines(raw: Iterator[str] | list[str]) -> Iterator[str]:
    """Yield whole lines, with one blank for many, and the same words for what differs each time."""
    whole: list[str] = []
    for line in raw:
        if line.startswith(" ") and whole:
            whole[-1] += line
        elif line.strip():
            whole.append(line)
    for line in whole:
        text = " ".join(line.split())
        for pattern, word in _SAME:
            text = re.sub(pattern, word, text)
        yield text
