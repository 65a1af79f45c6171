"""What a copy finds in the target's table before it begins: rows, and the run that brought them."""

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg2 import sql

from pipeline.check.preflight import Finding
from pipeline.ledger.leases import Holder, read_holder
from pipeline.ledger.runs import Run, fingerprint, latest_run
from pipeline.postgres.database import Session
from pipeline.postgres.tables import Table


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


def read_filled(session: Session, table: Table) -> Filled:
    """Look at the table and the ledger, in one read-only transaction. Raises PipelineError."""
    with session.transaction(read_only=True) as cursor:
        run = latest_run(cursor, table)
        holder = None if run is None else read_holder(cursor, run)
        cursor.execute(sql.SQL("SELECT EXISTS (SELECT 1 FROM {})").format(table.identifier))
        return Filled(any_row=cursor.fetchone() == (True,), run=run, holder=holder)


def check_filled(
    filled: Filled, source: Table | None, target: Table, columns: Sequence[str], name: str
) -> tuple[Finding, ...]:
    """Judge what is there by the rules of a copy; no query. ``name`` is the target's."""
    where, run = f"{name}'s {target.qualified}", filled.run
    if run is not None and run.finished is not None and not filled.any_row:
        return ()
    if run is None:
        # What the rows are, only the rows tell: check/existing.py.
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
        return (_other_plan(run, where, target, name),)
    if run.finished is None:
        return (_note(f"run {run.id} into {where} is not finished: a copy goes on with it"),)
    return (_note(f"run {run.id} has filled {where}: a copy has nothing to do", "pipeline verify"),)


def _note(fact: str, hint: str = "") -> Finding:
    return Finding(severity="note", fact=fact, hint=hint)


def _other_plan(run: Run, where: str, target: Table, name: str) -> Finding:
    state = "finished" if run.finished else "unfinished"
    return Finding(
        severity="refuse",
        fact=f"the {state} run {run.id} into {where} copied {run.source_table} of {run.source_label}, with other tables"
        " or columns than now",
        hint=f"on {name}: TRUNCATE {target.quoted}, then: pipeline copy --restart",
    )
