"""The last words of a capture."""

from pipeline.check.baseline import BaselineDone
from pipeline.show.figures import duration
from pipeline.show.tables import moment
from pipeline.wording import counted


def captured_lines(done: BaselineDone) -> str:
    """Return what was kept, where, and what to type next."""
    texts = f" and {counted(done.text_queries, 'text')}" if done.text_queries else ""
    by = " and ".join(metric.replace("_", " ") for metric in done.metrics)
    return (
        f"captured at {moment(done.captured_at)}, in {duration(done.seconds)}: the exact {done.k} nearest rows of"
        f" {counted(done.stored_queries, 'stored vector')}{texts}, by {by}\n"
        f"  from  {done.source}, read only\n"
        f"  into  pipeline.baseline on {done.target}, for {done.table}; earlier captures stay, the newest is used\n"
        "next: pipeline verify, which asks both sides the same again"
    )
