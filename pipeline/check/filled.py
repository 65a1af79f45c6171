"""What a copy finds in the target's table before it begins: rows, and the run that brought them."""

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg2 import sql

from pipeline.check.preflight import Finding
from pipeline.errors import RefusedError
from pipeline.ledger.leases import Holder, read_holder
from pipeline.ledger.runs import Run, fingerprint, latest_run
from pipeline.postgres.database import Session
from pipeline.postgres.tables import Table
from pipeline.settings import TableMapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """Whether the table holds a row, the last run into it that was not given up, and who is at work on it."""

    any_row: bool
    run: Run | None
    holder: Holder | None

    @property
    def is_foreign(self) -> bool:
        """Return whether a copy would begin with rows in the table that no run brought."""
        return self.any_row and self.run is None


def read_filled(session: Session, table: Table, mapping: TableMapping) -> Filled:
    """Look at the table and the ledger, in one read-only transaction. Raises PipelineError."""
    with session.transaction(read_only=True) as cursor:
        run = latest_run(cursor, mapping)
        holder = None if run is None else read_holder(cursor, run)
        cursor.execute(sql.SQL("SELECT EXISTS (SELECT 1 FROM {})").format(table.identifier))
        return Filled(any_row=cursor.fetchone() == (True,), run=run, holder=holder)


def check_filled(
    filled: Filled, source: Table | None, target: Table, columns: Sequence[str], name: str
) -> tuple[Finding, ...]:
    """Judge what is there by the rules of a copy; no query. ``name`` is the target's."""
    where, run = f"{name}'s {target.qualified}", filled.run
    # What the rows are that no run brought, only the rows tell: check/existing.py.
    if run is None or (run.finished is not None and not filled.any_row):
        return ()
    if filled.holder is not None and filled.holder.alive:
        return (
            Finding(
                severity="warn",
                fact=f"run {run.id} into {where} is under way: {filled.holder.owner} copies now",
                hint="pipeline status shows it; a second copy ends at once",
            ),
        )
    if source is not None and run.fingerprint != fingerprint(source, target, columns):
        error = other_plan(run, source, target, name)
        return (Finding(severity="refuse", fact=error.fact, hint=error.hint),)
    if run.finished is None:
        return (_note(f"run {run.id} into {where} is not finished: a copy goes on with it"),)
    return (_note(f"run {run.id} has filled {where}: a copy has nothing to do", "pipeline verify"),)


def _note(fact: str, hint: str = "") -> Finding:
    return Finding(severity="note", fact=fact, hint=hint)


def other_plan(run: Run, source: Table, target: Table, name: str) -> RefusedError:
    """Return the error of a run that is bound to other tables or columns than those that are there now."""
    state = "finished" if run.finished else "unfinished"
    what = (
        "that was another server"
        if run.source_system != source.server.system_identifier
        else "one of the tables was made anew since, or its columns have changed"
    )
    return RefusedError(
        f"the {state} run {run.id} into {run.target_table} copied {run.source_table} of {run.source_label}: {what}",
        f"on {name}: TRUNCATE {target.quoted}, then: pipeline copy --restart",
    )
