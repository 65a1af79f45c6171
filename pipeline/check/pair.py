"""Both tables as they were found, checked against each other: what every comparison and every move begins with."""

from dataclasses import dataclass, replace

from pipeline.check.casts import carried_as
from pipeline.check.contents import check_contents, check_vector_dimensions
from pipeline.check.digests import check_versions
from pipeline.check.preflight import carried_columns, check_tables, has_own_key, refuse_if_needed
from pipeline.ledger.runs import check_revision
from pipeline.postgres.database import Session, horizon
from pipeline.postgres.tables import Table, describe
from pipeline.settings import Route


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two tables that may be compared or copied, and the columns for it.

    Both have the target's key. Where types differ, the source's columns bear the cast to the target's.
    ``ignored`` are columns of the source that the operator leaves behind. ``horizons`` were taken before a
    row was read: what a later transaction changes is found from there.
    """

    source: Table
    target: Table
    columns: tuple[str, ...]
    ignored: tuple[str, ...]
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
    ignored = route.ignore_columns
    refuse_if_needed(
        check_tables(here, there, route.table, route.dimensions, names, to_write=to_write, ignored=ignored)
    )
    columns = carried_columns(here, there, ignored)
    carried = replace(carried_as(here, there, columns), key=there.key)
    refuse_if_needed(
        (
            *check_vector_dimensions(source, here, route.table, route.dimensions),
            *check_contents(source, carried, there, columns, count_keys=not has_own_key(here, there)),
        )
    )
    with source.transaction(read_only=True) as mine, target.transaction(read_only=True) as theirs:
        horizons = (horizon(mine), horizon(theirs))
    return Pair(
        source=carried,
        target=there,
        columns=columns,
        ignored=ignored,
        horizons=horizons,
    )
