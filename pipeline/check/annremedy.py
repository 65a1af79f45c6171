"""Why an ANN index finds too little, and the statement that cures it."""

from math import sqrt

from psycopg2 import sql

from pipeline.check.annindex import DEFAULT_OPTIONS, AnnIndex, SearchSettings
from pipeline.postgres.database import Session
from pipeline.postgres.tables import Table

# An IVFFlat index that fits its rows finds enough within this share of its lists, or twice their square root.
FITTING_SHARE = 0.2
# With so large a share of rows that came later, its lists were made of too few.
LATE_SHARE = 0.5
# pgvector's limits.
MAX_M = 100
MAX_EF_CONSTRUCTION = 1_000


def diagnose(
    session: Session, table: Table, index: AnnIndex, settings: SearchSettings, recommended: int | None
) -> tuple[str, str]:
    """Return what is wrong with an index, and what to type.

    ``recommended`` is the smallest value of its knob that finds enough, None: none of those that were tried.
    What is wrong is empty where the index is as it should be, and only the knob too small. Raises PipelineError.
    """
    larger = None if recommended is None else settings.remedy(index.knob, recommended)
    if index.method == "hnsw":
        again = _rebuild(index)
        if not is_thin(index):
            return ("", larger) if larger is not None else (f"it was built with {_built(index)}", again)
        usual = " and ".join(str(value) for value in DEFAULT_OPTIONS["hnsw"].values())
        why = f"it was built with {_built(index)}, where pgvector's own are {usual}: its graph is too thin"
        return why, again if larger is None else f"{larger} (or {again})"
    why = _late(session, table, index) or _unfit(index, recommended)
    if not why:
        return "", str(larger)
    again = " ".join(("REINDEX INDEX CONCURRENTLY", f"{index.quoted};"))
    return why, again if larger is None else f"{again} (until then {larger})"


def is_thin(index: AnnIndex) -> bool:
    """Return whether a graph was built with less than pgvector's own defaults."""
    return any(index.options[name] < value for name, value in DEFAULT_OPTIONS["hnsw"].items())


def _built(index: AnnIndex) -> str:
    return ", ".join(f"{name} = {index.options[name]}" for name in DEFAULT_OPTIONS[index.method])


def _late(session: Session, table: Table, index: AnnIndex) -> str:
    """Return that most rows came after an IVFFlat index was built, where their transactions tell it."""
    if len(table.heaps) != 1:
        return ""
    # A frozen transaction has the greatest age there is: of those it cannot be said when they were.
    query = sql.SQL(
        "SELECT pg_catalog.count(*) FILTER (WHERE pg_catalog.age(r.xmin) < b.age), pg_catalog.count(*)"
        " FROM {table}, (SELECT pg_catalog.age(c.xmin) AS age FROM pg_catalog.pg_class c WHERE c.oid = {index}) b"
        " WHERE b.age < 2147483647"
    )
    ((late, rows),) = session.rows(query.format(table=table.scanned, index=sql.Literal(index.oid)))
    if not rows or late < LATE_SHARE * rows:
        return ""
    return f"{late:,} of {rows:,} rows were written after it was built: its {_built(index)} are not made from them"


def _unfit(index: AnnIndex, enough: int | None) -> str:
    """Return that an IVFFlat index finds enough only where a large share of its lists is read, or never."""
    lists = index.options["lists"]
    if enough is not None and enough <= max(FITTING_SHARE * lists, 2 * sqrt(lists)):
        return ""
    return (
        f"it was built with {_built(index)}, which do not fit the rows of today, as where there were few or none then"
    )


def _rebuild(index: AnnIndex) -> str:
    """Return how an HNSW index is built again: as pgvector would, or finer where that was not enough."""
    usual = DEFAULT_OPTIONS["hnsw"]
    if is_thin(index):
        m, ef_construction = (max(index.options[name], value) for name, value in usual.items())
    else:
        m, ef_construction = (2 * index.options[name] for name in usual)
    m = min(MAX_M, m)
    # pgvector wants twice m at least.
    options = f"(m = {m}, ef_construction = {min(MAX_EF_CONSTRUCTION, max(ef_construction, 2 * m))})"
    return " ".join(
        ("ALTER INDEX", index.quoted, "SET", f"{options};", "REINDEX INDEX CONCURRENTLY", f"{index.quoted};")
    )
