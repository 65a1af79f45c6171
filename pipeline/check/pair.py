"""Both tables as they were found, checked against each other: what every comparison and every move begins with."""

from dataclasses import dataclass, replace

from pipeline.check.digests import check_versions
from pipeline.check.preflight import carried_columns, check_tables, check_vector_dimensions, refuse_if_needed
from pipeline.ledger.runs import check_revision
from pipeline.postgres.database import Session, horizon
from pipeline.postgres.tables import Table, describe
from pipeline.settings import Route


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two tables that may be compared or copied, and the columns for it.

    Both name their key's columns in the target's order. ``horizons`` were taken before a row was read:
    what a later transaction changes is found from there.
    """

    source: Table
    target: Table
    columns: tuple[str, ...]
    horizons: tuple[int, int]


def read_pair(source: Session, target: Session, route: Route, *, to_write: bool) -> Pair:
    """Describe both tables, and check everything that could stand in the way; nothing is written.

    With ``to_write`` the rights that a copy needs on the target are checked too.

    Raises RefusedError with all of it.
    """
    check_versions((source, target))
    check_revision(target)
    there = describe(target, route.table)
    here = describe(source, route.table)
    names = (source.endpoint.name, target.endpoint.name)
    refuse_if_needed(check_tables(here, there, route.table, route.dimensions, names, to_write=to_write))
    refuse_if_needed(check_vector_dimensions(source, here, route.table, route.dimensions))
    with source.transaction(read_only=True) as mine, target.transaction(read_only=True) as theirs:
        horizons = (horizon(mine), horizon(theirs))
    return Pair(
        source=replace(here, key=there.key),
        target=there,
        columns=carried_columns(here, there),
        horizons=horizons,
    )
