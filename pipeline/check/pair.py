"""Both tables as they were found, checked against each other: what every comparison and every move begins with."""

from dataclasses import dataclass, replace
from functools import partial

from psycopg2 import sql

from pipeline.check.casts import carried_as
from pipeline.check.census import check_finite
from pipeline.check.contents import Unfit, check_contents, other_dimension, unfit_rows
from pipeline.check.digests import check_version
from pipeline.check.dimensions import check_vector_dimensions
from pipeline.check.preflight import carried_columns, check_tables, has_own_key, refuse_if_needed
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Session
from pipeline.postgres.tables import Table, survey
from pipeline.settings import Route


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two tables that may be compared or copied, and the columns for it.

    Both have the target's key. Where types differ, the source's columns bear the cast to the target's.
    ``ignored`` are columns of the source that the operator leaves behind. ``horizons`` were taken before a
    row was read: what a later transaction changes is found from there. ``unfit`` are the conditions by
    which rows of the source are left out, for the quarantine.
    """

    source: Table
    target: Table
    columns: tuple[str, ...]
    ignored: tuple[str, ...]
    horizons: tuple[int, int]
    unfit: tuple[Unfit, ...] = ()


def read_pair(
    crew: Crew, source: Session, target: Session, route: Route, *, to_write: bool, set_aside: bool = False
) -> Pair:
    """Describe both tables, and check everything that could stand in the way; nothing is written.

    With ``to_write`` the rights that a copy needs on the target are checked too, and that no key occurs twice
    on the source. With ``set_aside`` rows
    that cannot be carried are left out of the source; else they stand in the way.

    Raises RefusedError with all of it.
    """
    check_version(source, is_target=False)
    check_version(target, is_target=True)
    (here, source_horizon), (there, target_horizon) = crew.beside(
        partial(survey, source, route.table), partial(survey, target, route.table)
    )
    here, there = replace(here, peer_version=there.version), replace(there, peer_version=here.version)
    names = (source.endpoint.name, target.endpoint.name)
    ignored = route.ignore_columns
    count_keys = not has_own_key(here, there)
    if not to_write:
        here, there = _comparable(here, there, route)
    refuse_if_needed(
        check_tables(
            here,
            there,
            route.table,
            route.dimensions,
            names,
            to_write=to_write,
            ignored=ignored,
            rounding=route.rounding,
        )
    )
    columns = carried_columns(here, there, ignored)
    carried = replace(carried_as(here, there, columns), key=there.key)
    unfit: tuple[Unfit, ...] = ()
    if set_aside:
        found = unfit_rows(source, carried, there, columns, count_keys=count_keys)
        unfit = (*other_dimension(source, here, route.table, route.dimensions), *(one for one in found if one.may_rest))
    if unfit:
        carried = replace(carried, left_out=sql.SQL(" OR ").join(one.condition for one in unfit))
    refuse_if_needed(
        (
            *(() if set_aside else check_vector_dimensions(source, here, route.table, route.dimensions)),
            *(check_finite(source, here, route.table) if to_write else ()),
            *check_contents(
                source, carried, there, columns, count_keys=count_keys, set_aside=set_aside, unique=to_write
            ),
        )
    )
    return Pair(
        source=carried,
        target=there,
        columns=columns,
        ignored=ignored,
        horizons=(source_horizon, target_horizon),
        unfit=unfit,
    )


def _comparable(here: Table, there: Table, route: Route) -> tuple[Table, Table]:
    """Return both tables with a key to compare rows by, where one has lost its own: a key that is doubled is found."""
    if here.kind != "r" or (here.key and there.key):
        return here, there
    key = there.key or here.key or (route.table.id,)
    if any(table.column(name) is None for table in (here, there) for name in key):
        return here, there
    return replace(here, key=key), replace(there, key=key)
