"""A verify as one HTML page: no script, nothing from elsewhere; to be attached, printed, and read from disk."""

import os
import secrets
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

from pipeline.errors import PipelineError, SettingsError
from pipeline.events import VerifyDone
from pipeline.show import views
from pipeline.show.exhibits import Chart, Exhibit, Grid, Listing, number
from pipeline.show.figures import duration
from pipeline.wording import counted

TEMPLATE = Path(__file__).with_name("report.html.jinja")
_LIBRARIES = ("jinja2", "matplotlib")
_EXTRA = "embeddings-pipeline[report]"
_KINDS = {
    "full": "full: every row of both sides",
    "incremental": "incremental: the rows touched since the last full verdict, on either side",
}


def check_report_path(path: Path) -> None:
    """See that a report can be written there, before the long work; leaves nothing behind.

    Raises SettingsError where the libraries of the extra are not installed, where the folder is not there
    or cannot be written to, and where the path is something else than a file.
    """
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        names, are = " and ".join(missing), "is" if len(missing) == 1 else "are"
        raise SettingsError(f"a report needs {names}, which {are} not installed", f"pip install '{_EXTRA}'")
    try:
        _refuse_other_than_file(path)
        probe = _temporary_beside(path)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise SettingsError(
            f"no report can be written to {path}: {error.strerror or error}",
            "name a file in a folder that is there and that you may write to: --report FILE.html",
        ) from error


def _refuse_other_than_file(path: Path) -> None:
    """Raise SettingsError for a folder, a device or a pipe: the page would take its place."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            raise SettingsError(
                f"no report can be written to {path}: it is not a file", "name another: --report FILE.html"
            )


def _temporary_beside(path: Path) -> Path:
    """Return a name in the folder of the file itself, of the one that a link leads to; short, as names are limited."""
    return Path(os.path.realpath(path)).with_name(f".report-{secrets.token_hex(6)}.tmp")


def write_report(path: Path, done: VerifyDone, settings: Sequence[tuple[str, str]]) -> None:
    """Write the page in one step: a reader finds the old one or the new one, whole.

    ``settings`` are names with their values as they may be shown. Raises SettingsError as
    ``check_report_path`` does, and PipelineError where the disk is full or fails.
    """
    check_report_path(path)
    # A character that UTF-8 cannot say has been named by then; nothing of this may end in half a page.
    page = render(done, settings).encode("utf-8", "backslashreplace")
    temporary = _temporary_beside(path)
    try:
        with temporary.open("xb") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(os.path.realpath(path))
    except OSError as error:
        raise PipelineError(
            f"the report could not be written to {path}: {error.strerror or error}",
            "make room there, or name another file: --report FILE.html; the verdicts are in the ledger",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def render(done: VerifyDone, settings: Sequence[tuple[str, str]]) -> str:
    """Return the page; the same input makes the same text."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "pieces": pieces,
        "spelled": spelled,
        "moment": moment,
        "duration": duration,
        "counted": counted,
    }
    environment.tests |= {
        "chart": lambda one: isinstance(one, Chart),
        "wide": _is_wide,
        "listing": lambda one: isinstance(one, Listing),
    }
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    numbered = [(f"check-{place}", check) for place, check in enumerate(done.checks, start=1)]
    names = {check.name for check in done.checks}
    return template.render(
        done=done,
        settings=settings,
        # The number keeps names of the page apart, whatever a check is called.
        shown=[(anchor, check, views.exhibits(check, anchor)) for anchor, check in numbered],
        failed=[(anchor, check) for anchor, check in numbered if check.verdict != "pass"],
        passed=[(anchor, check) for anchor, check in numbered if check.verdict == "pass"],
        not_run=[name for name in views.LADDER if name not in names],
        rows=_rows(done),
        kind=_KINDS.get(done.kind, done.kind),
        seconds=(done.ended - done.began).total_seconds(),
    )


def _is_wide(exhibit: Exhibit) -> bool:
    """Return whether an exhibit needs the whole width: lines as they are, keys, many columns."""
    if isinstance(exhibit, Grid):
        return len(exhibit.heads) > 4 or any(cell.kind == "exact" for row in exhibit.rows for cell in row[1:])
    return isinstance(exhibit, Listing)


def _rows(done: VerifyDone) -> str | None:
    """Return how many rows each side has, from the check that counted them; None where none did."""
    for check in done.checks:
        sides = [number(check.figures.get(f"{side}_rows")) for side in ("source", "target")]
        if check.name == "counts" and None not in sides:
            source, target = (f"{side or 0:,.0f}" for side in sides)
            return f"{source} on both sides" if source == target else f"{source} on the source, {target} on the target"
    return None


def moment(at: datetime) -> str:
    """Return a time of day in UTC, to the second."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def pieces(text: object, exact: bool = False) -> Iterator[tuple[str, str]]:
    """Yield a text in pieces, each with the name of the character where it is one that no reader would see.

    Those are control characters, blanks of other kinds, and what turns the direction of writing: the piece is
    then its code point. A line's end is one of them where ``exact`` is true.
    """
    plain: list[str] = []
    for character in str(text):
        if character.isprintable() or (character == "\n" and not exact):
            plain.append(character)
            continue
        if plain:
            yield "".join(plain), ""
            plain.clear()
        yield f"U+{ord(character):04X}", unicodedata.name(character, "control character")
    if plain:
        yield "".join(plain), ""


def spelled(text: object) -> str:
    """Return a text as ``pieces`` has it, for places of a page that take no markup."""
    return "".join(piece for piece, _ in pieces(text))
