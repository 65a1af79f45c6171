"""The last pass that found both sides equal, by the ledger of either; the source's is turned round."""

from dataclasses import replace

from pipeline.check.pair import Pair
from pipeline.ledger import runs
from pipeline.ledger.passes import Pass, latest_pass
from pipeline.postgres.database import Session
from pipeline.settings import TableMapping


def pass_before(
    source: Session, target: Session, mapping: TableMapping, pair: Pair, *, verified: bool = False
) -> Pass | None:
    """Return the last pass over both tables that found every row of the source on the target, equal.

    Where both sides have a ledger it is the later one: rows may have gone back in between. ``verified`` as for
    ``latest_pass``. Raises PipelineError.
    """
    here = pass_on_target(target, mapping, pair, verified=verified)
    return later_pass(here, pass_on_source(source, mapping, pair, verified=verified) if has_passes(source) else None)


def pass_on_target(target: Session, mapping: TableMapping, pair: Pair, *, verified: bool = False) -> Pass | None:
    """Return the last pass by the target's ledger."""
    bound = runs.fingerprint(pair.source, pair.target, pair.columns)
    with target.transaction(read_only=True, single=True) as cursor:
        return latest_pass(cursor, mapping, bound, verified=verified)


def pass_on_source(source: Session, mapping: TableMapping, pair: Pair, *, verified: bool = False) -> Pass | None:
    """Return the last pass by the source's ledger, which it has, turned round."""
    turned = runs.fingerprint(pair.target, pair.source, pair.columns)
    with source.transaction(read_only=True, single=True) as cursor:
        found = latest_pass(cursor, mapping, turned, verified=verified)
    if found is None:
        return None
    return replace(found, source_horizon=found.target_horizon, target_horizon=found.source_horizon)


def later_pass(*found: Pass | None) -> Pass | None:
    """Return the latest of passes over the same tables: by a horizon of one server, since clocks do not compare."""
    known = [one for one in found if one is not None]
    return max(known, key=lambda one: one.target_horizon["horizon"], default=None)


def has_passes(session: Session) -> bool:
    """Return whether a side has a ledger with passes that its role may read."""
    ((found,),) = session.rows(
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = 'pipeline' AND c.relname = 'pass' AND pg_catalog.has_table_privilege(c.oid, 'SELECT')"
        " AND pg_catalog.has_schema_privilege(n.oid, 'USAGE'))"
    )
    return bool(found)
