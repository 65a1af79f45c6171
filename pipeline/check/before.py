"""The last pass that found both sides equal, by the ledger of either; the source's is turned round."""

from dataclasses import replace

from pipeline.check.pair import Pair
from pipeline.ledger import runs
from pipeline.ledger.passes import Pass, latest_pass
from pipeline.postgres.database import Session
from pipeline.settings import TableMapping


def pass_before(
    source: Session, target: Session | None, mapping: TableMapping, pair: Pair, *, verified: bool = False
) -> Pass | None:
    """Return the last pass over both tables that found every row of the source on the target, equal.

    Where both sides have a ledger it is the later one: rows may have gone back in between. ``target`` is None
    where it has none. ``verified`` as for ``latest_pass``. Raises PipelineError.
    """
    found: list[Pass] = []
    if target is not None:
        bound = runs.fingerprint(pair.source, pair.target, pair.columns)
        with target.transaction(read_only=True, single=True) as cursor:
            if (here := latest_pass(cursor, mapping, bound, verified=verified)) is not None:
                found.append(here)
    if has_passes(source):
        turned = runs.fingerprint(pair.target, pair.source, pair.columns)
        with source.transaction(read_only=True, single=True) as cursor:
            there = latest_pass(cursor, mapping, turned, verified=verified)
        if there is not None:
            here_first = replace(there, source_horizon=there.target_horizon, target_horizon=there.source_horizon)
            found.append(here_first)
    # By a horizon of one server: the clocks of two do not compare.
    return max(found, key=lambda one: one.target_horizon["horizon"], default=None)


def has_passes(session: Session) -> bool:
    """Return whether a side has a ledger with passes that its role may read."""
    ((found,),) = session.rows(
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = 'pipeline' AND c.relname = 'pass' AND pg_catalog.has_table_privilege(c.oid, 'SELECT')"
        " AND pg_catalog.has_schema_privilege(n.oid, 'USAGE'))"
    )
    return bool(found)
