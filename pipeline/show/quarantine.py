"""The rows that a copy set aside, as a table on stdout."""

from pipeline.events import Retried
from pipeline.show.plain import print_text
from pipeline.show.tables import moment, print_table
from pipeline.status import QuarantineState
from pipeline.wording import counted

# A table of more is nothing to read; all of them are in the JSON document, and in pipeline.quarantine.
LISTED_ROWS = 100


def print_quarantine(found: QuarantineState) -> None:
    """Print keys and reasons, and what to do."""
    if not found.rows:
        print_text(f"nothing in quarantine for {found.table}")
        return
    print_table(
        ("key", "reason", "since"), [(row.text, row.reason, moment(row.at)) for row in found.rows[:LISTED_ROWS]]
    )
    more = f", the first {LISTED_ROWS} of them above" if len(found.rows) > LISTED_ROWS else ""
    print_text("")
    print_text(f"{counted(len(found.rows), 'row')} of run {found.run} into {found.table}{more}")
    print_text("next: correct them on legacy (or change main's table), then: pipeline quarantine --retry")


def retried_line(done: Retried) -> str:
    """Return the last words of a retry."""
    gone = f", {done.gone:,} gone from the source" if done.gone else ""
    left = f"{counted(done.left, 'row')} still in quarantine" if done.left else "none is left in quarantine"
    return f"{counted(done.brought, 'row')} brought{gone}; {left}.\nnext: pipeline verify"
