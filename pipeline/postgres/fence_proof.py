"""The proof that a fence holds: the catalog, writes that are tried and rolled back, and no prepared transaction."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg2
from psycopg2 import sql

from pipeline.postgres.database import Cursor, Session
from pipeline.postgres.failures import FENCE_STATE
from pipeline.postgres.fence import state
from pipeline.postgres.fence_sql import Catalog, Fence, Part, read_catalog
from pipeline.postgres.holders import WRITERS, read_holders
from pipeline.postgres.tables import Table

# Each probe is a round trip while everybody waits: of many partitions the first ones stand for all, whose
# triggers the catalog shows to be the same.
PROBED_PARTS = 9
REFUSED, FORBIDDEN = "refused", "not allowed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A write of no rows that was tried without the pass, as ``origin`` or ``replica``, and rolled back.

    ``outcome`` is ``refused`` by the fence, ``not allowed`` to this role in any case, or what happened instead.
    """

    part: str
    statement: str
    mode: str
    outcome: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What shows that a fence holds. ``missing`` is what the catalog lacks, ``prepared`` are names of transactions.

    TRUNCATE is shown by the catalog alone, and so is the trigger for rows: a statement of no rows reaches neither.
    """

    missing: tuple[str, ...]
    probes: tuple[Probe, ...]
    prepared: tuple[str, ...]

    @property
    def broken(self) -> tuple[str, ...]:
        """Return what speaks against the fence, for people; empty where it holds."""
        accepted = [one for one in self.probes if one.outcome not in (REFUSED, FORBIDDEN)]
        return (
            *self.missing,
            *(f"{one.statement} on {one.part} as {one.mode}: {one.outcome}" for one in accepted),
            *(f"the prepared transaction {gid!r} holds a lock on it" for gid in self.prepared),
        )

    @property
    def holds(self) -> bool:
        """Return whether nothing speaks against the fence."""
        return not self.broken

    def evidence(self) -> dict[str, Any]:
        """Return the proof as figures for the ledger."""
        outcomes = [one.outcome for one in self.probes]
        return {
            "holds": self.holds,
            "broken": list(self.broken),
            "probes_refused": outcomes.count(REFUSED),
            "probes_not_allowed": [
                f"{one.statement} on {one.part} as {one.mode}" for one in self.probes if one.outcome == FORBIDDEN
            ],
        }


def prove_fence(session: Session, table: Table, fence: Fence) -> Proof:
    """Prove that this fence stands on the table, and on every part of it; nothing is changed.

    Whatever pass the session has, the probes show none. Raises RefusedError where the table is gone.
    """
    with session.transaction() as cursor:
        catalog = read_catalog(cursor, table)
        probes = tuple(_probe_all(cursor, catalog))
    found = state(catalog)
    missing = found.missing
    if found.standing and not found.is_like(fence):
        missing = (f"the fence on {table.qualified} is another one, with the pass {found.through}",)
    holders = read_holders(session, [part.oid for part in catalog.parts], WRITERS)
    prepared = tuple(one.gid or "" for one in holders if one.pid is None)
    return Proof(missing=missing, probes=probes, prepared=prepared)


def _probe_all(cursor: Cursor, catalog: Catalog) -> Iterator[Probe]:
    cursor.execute("SELECT pg_catalog.set_config('pipeline.through', '', true)")
    for part in catalog.parts[:PROBED_PARTS]:
        yield from (_probe(cursor, part, name, "origin", one) for name, one in _writes(catalog.table, part))
    try:
        cursor.execute("SAVEPOINT pipeline_mode; SET LOCAL session_replication_role = replica")
    except psycopg2.errors.InsufficientPrivilege:
        cursor.execute("ROLLBACK TO SAVEPOINT pipeline_mode")
        yield Probe(part=catalog.table.qualified, statement="any write", mode="replica", outcome=FORBIDDEN)
        return
    for part in catalog.parts[:PROBED_PARTS]:
        yield from (_probe(cursor, part, name, "replica", one) for name, one in _writes(catalog.table, part))
    cursor.execute("ROLLBACK TO SAVEPOINT pipeline_mode")


def _probe(cursor: Cursor, part: Part, name: str, mode: str, statement: sql.Composable) -> Probe:
    try:
        cursor.execute(sql.SQL("SAVEPOINT pipeline_probe; ") + statement)
        outcome = "was accepted"
    except psycopg2.Error as error:
        if error.pgcode is None:
            raise
        known = {FENCE_STATE: REFUSED, "42501": FORBIDDEN}
        outcome = known.get(error.pgcode, f"failed for another reason ({error.pgcode})")
    cursor.execute("ROLLBACK TO SAVEPOINT pipeline_probe")
    return Probe(part=f"{part.schema}.{part.name}", statement=name, mode=mode, outcome=outcome)


def _writes(table: Table, part: Part) -> Iterator[tuple[str, sql.Composable]]:
    """Yield writes of no rows: a trigger for statements fires all the same."""
    # Not a generated column: nothing is written to one, nor would the statement get so far.
    column = sql.Identifier(next(one.name for one in table.columns if not one.generated))
    names = {"table": part.identifier, "column": column}
    for name, text in (
        ("INSERT", "INSERT INTO {table} ({column}) OVERRIDING SYSTEM VALUE SELECT NULL WHERE false"),
        ("UPDATE", "UPDATE {table} SET {column} = DEFAULT WHERE false"),
        ("DELETE", "DELETE FROM {table} WHERE false"),
    ):
        yield name, sql.SQL(text).format(**names)
