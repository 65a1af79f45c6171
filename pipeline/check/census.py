"""The census of a table's vectors: nulls, zero norms, dimensions, norms, duplicates, in one scan."""

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg2 import sql

from pipeline.check.digests import hash_sql
from pipeline.check.dimensions import dimensions_sql
from pipeline.check.neighbours import norm_sql
from pipeline.check.preflight import Finding, Severity
from pipeline.postgres.database import Session, clock
from pipeline.postgres.tables import Table
from pipeline.postgres.values import value_sql
from pipeline.settings import TableMapping
from pipeline.wording import counted

# The first pgvector that takes no NaN and no infinity from a binary COPY; none ever took them from text.
FIRST_FINITE = (0, 4, 3)
# A vector is called normalised when its length is 1 to this; models answer float4, some of them rounded.
NORMALISED_WITHIN = 1e-3
# With a share of normalised vectors between this and its complement, two kinds were mixed.
MIXED_SHARE = 0.001
# Of a column without a dimension, the most frequent ones are named.
LISTED_DIMENSIONS = 20
# The norms' quantiles: every 5 %, from the least to the largest.
QUANTILES = tuple(place / 20 for place in range(21))


@dataclass(frozen=True, slots=True, kw_only=True)
class Norms:
    """Lengths of the finite vectors: exact percentiles, and the share (0 to 1) whose length is 1."""

    minimum: float
    p05: float
    median: float
    p95: float
    maximum: float
    normalised: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """What is in the vectors of one table. ``dimensions`` are (dimension, rows), the most frequent first.

    ``zero_norms`` and ``not_finite`` have no direction: a cosine index leaves them out.
    ``duplicate_rows`` counts every row of the ``duplicate_groups`` that share a vector, to the bit.
    ``norms`` and ``norm_quantiles`` (the lengths at QUANTILES) are None where there is no finite vector;
    ``null_contents`` and ``null_metadata`` are None where the table has no such column.
    """

    rows: int
    null_embeddings: int
    zero_norms: int
    not_finite: int
    dimensions: tuple[tuple[int, int], ...]
    norms: Norms | None
    norm_quantiles: tuple[float, ...] | None
    duplicate_groups: int
    duplicate_rows: int
    null_contents: int | None
    null_metadata: int | None
    seconds: float


def can_take_census(session: Session, table: Table, mapping: TableMapping) -> bool:
    """Return whether the server and the table have what a census reads, and show it to this role."""
    return why_no_census(table, mapping) is None


def why_no_census(table: Table, mapping: TableMapping) -> str | None:
    """Return what keeps this role from a census of the table, or None where nothing does."""
    if table.extension is None:
        return "the extension vector is not there"
    if not table.may_use_schema:
        return f"the role {table.role} may not use the schema {table.schema}"
    if table.row_security:
        return f"row-level security hides rows of {table.qualified} from the role {table.role}"
    embedding = table.column(mapping.embedding)
    if embedding is None or not embedding.is_vector:
        return f"{table.qualified} has no column {mapping.embedding} of vectors"
    columns = (embedding, table.column(mapping.content), table.column(mapping.metadata))
    hidden = [column.name for column in columns if column is not None and not column.may_select]
    if hidden:
        return f"the role {table.role} may not read {', '.join(hidden)} of {table.qualified}"
    return None


def take_census(session: Session, table: Table, mapping: TableMapping) -> Census:
    """Read every row that is not left out once, in one snapshot; vectors as they are carried.

    The server keeps some 40 bytes a row meanwhile, in temporary files beyond its work_mem. Asks for
    ``can_take_census``. Raises PipelineError.
    """
    started = clock()
    (row,) = session.rows(_census_sql(table, mapping))
    rows, nulls, zeros, not_finite, percentiles, normalised, groups, duplicates, contents, metadata, dimensions = row
    finite = rows - nulls - not_finite
    return Census(
        rows=rows,
        null_embeddings=nulls,
        zero_norms=zeros,
        not_finite=not_finite,
        dimensions=tuple((dimension, count) for dimension, count in dimensions or ()),
        norms=_norms(percentiles, normalised / finite) if finite else None,
        norm_quantiles=tuple(percentiles) if finite else None,
        duplicate_groups=groups,
        duplicate_rows=duplicates,
        null_contents=contents,
        null_metadata=metadata,
        seconds=clock() - started,
    )


def _norms(percentiles: Sequence[float], normalised: float) -> Norms:
    low, p05, median, p95, high = (percentiles[QUANTILES.index(share)] for share in (0, 0.05, 0.5, 0.95, 1))
    return Norms(minimum=low, p05=p05, median=median, p95=p95, maximum=high, normalised=normalised)


# The vectors are read once, into a few numbers a row; everything is counted from those.
_CENSUS_SQL = sql.SQL("""
WITH v AS MATERIALIZED (
    SELECT {norm} AS norm, {dimension} AS dimension, {hash} AS hash, {embedding} IS NULL AS no_embedding,
           {no_content} AS no_content, {no_metadata} AS no_metadata
    FROM {table}),
g AS (SELECT pg_catalog.count(*) AS n FROM v WHERE NOT no_embedding GROUP BY hash HAVING pg_catalog.count(*) > 1)
SELECT pg_catalog.count(*), pg_catalog.count(*) FILTER (WHERE no_embedding),
       pg_catalog.count(*) FILTER (WHERE norm = 0),
       pg_catalog.count(*) FILTER (WHERE norm IN ('NaN', 'Infinity')),
       pg_catalog.percentile_disc({quantiles}::pg_catalog.float8[])
           WITHIN GROUP (ORDER BY norm) FILTER (WHERE norm NOT IN ('NaN', 'Infinity')),
       pg_catalog.count(*) FILTER (WHERE pg_catalog.abs(norm - 1) <= {within}),
       (SELECT pg_catalog.count(*) FROM g),
       (SELECT coalesce(pg_catalog.sum(n), 0)::pg_catalog.int8 FROM g),
       pg_catalog.sum(no_content::pg_catalog.int4), pg_catalog.sum(no_metadata::pg_catalog.int4),
       (SELECT pg_catalog.json_agg(pg_catalog.json_build_array(d, n))
        FROM (SELECT dimension AS d, pg_catalog.count(*) AS n FROM v WHERE dimension IS NOT NULL
              GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT {listed}) q)
FROM v""")


def _census_sql(table: Table, mapping: TableMapping) -> sql.Composable:
    embedding = sql.Identifier(mapping.embedding)
    # A column that is not there has no nulls, and no count of them.
    missing, counted_nulls = sql.SQL("NULL::pg_catalog.bool"), {}
    for name in (mapping.content, mapping.metadata):
        there = table.column(name) is not None
        counted_nulls[name] = sql.SQL("{} IS NULL").format(sql.Identifier(name)) if there else missing
    return _CENSUS_SQL.format(
        norm=_carried_norm_sql(table, mapping.embedding),
        quantiles=sql.Literal(list(QUANTILES)),
        dimension=dimensions_sql(table, mapping.embedding),
        hash=hash_sql(table, [mapping.embedding]),
        embedding=embedding,
        no_content=counted_nulls[mapping.content],
        no_metadata=counted_nulls[mapping.metadata],
        table=table.scanned,
        within=sql.Literal(NORMALISED_WITHIN),
        listed=sql.Literal(LISTED_DIMENSIONS),
    )


def _carried_norm_sql(table: Table, embedding: str) -> sql.Composable:
    """Return the length of the vector as it is carried: with the cast, both sides hold the same numbers."""
    column = table.column(embedding)
    assert column is not None and table.extension is not None
    if column.cast is None:
        return norm_sql(table, embedding)
    function = "vector_norm" if column.cast[1] == "vector" else "l2_norm"
    name = sql.Identifier(table.extension.schema, function)
    return sql.SQL("{}({})").format(name, value_sql(table, embedding))


def check_census(census: Census, name: str) -> tuple[Finding, ...]:
    """Judge the source's census; no query. ``name`` is the endpoint's."""
    return (*_check_found(census, name), *_check_alike(census, name))


def check_finite(session: Session, table: Table, mapping: TableMapping) -> tuple[Finding, ...]:
    """Count the vectors with NaN or infinity where the extension lets them in: before 0.4.3. Else no scan.

    What an older one let in stays after an update of the extension: then only the census finds it, and a
    copy stops at it. Raises PipelineError.
    """
    column = table.column(mapping.embedding)
    if table.extension is None or table.extension.version >= FIRST_FINITE or column is None or not column.is_vector:
        return ()
    query = sql.SQL("SELECT pg_catalog.count(*) FROM {} WHERE {} IN ('NaN', 'Infinity')")
    ((count,),) = session.rows(query.format(table.scanned, norm_sql(table, mapping.embedding)))
    return (_not_finite(count, session.endpoint.name),) if count else ()


def _not_finite(count: int, name: str) -> Finding:
    return _finding(
        "refuse",
        f"{name}: {counted(count, 'vector')} with NaN or infinity, which pgvector takes no more since 0.4.3",
        "embed these texts again, or delete the rows",
    )


def _finding(severity: Severity, fact: str, hint: str = "") -> Finding:
    return Finding(severity=severity, fact=fact, hint=hint)


def _check_found(census: Census, name: str) -> list[Finding]:
    """Return what a search will not find, on either side."""
    if not census.rows:
        return [_finding("warn", f"{name}'s table is empty", "pipeline settings shows which one is read")]
    found = []
    if census.not_finite:
        found.append(_not_finite(census.not_finite, name))
    if census.zero_norms:
        found.append(
            _finding(
                "warn",
                f"{name}: {counted(census.zero_norms, 'vector')} of zero length: without a direction, in no cosine"
                " index, and found by no search",
                "they are copied as they are; embed these texts again",
            )
        )
    for count, what, effect in (
        (census.null_embeddings, "embedding", "no search finds them"),
        (census.null_contents, "content", "LangChain drops them from what a search returns"),
        (census.null_metadata, "metadata", "a filter, and some clients always, leave them out"),
    ):
        if count:
            found.append(_finding("note", f"{name}: {counted(count, 'row')} without {what}: {effect}"))
    return found


def _check_alike(census: Census, name: str) -> list[Finding]:
    """Return where the vectors do not look as if one model had made each of them once."""
    found = []
    if census.duplicate_groups:
        found.append(
            _finding(
                "note",
                f"{name}: {counted(census.duplicate_rows, 'row')} share their vector with another, in"
                f" {counted(census.duplicate_groups, 'group')}: the same texts, more than once",
            )
        )
    if census.norms is not None and MIXED_SHARE < census.norms.normalised < 1 - MIXED_SHARE:
        found.append(
            _finding(
                "note",
                f"{name}: {census.norms.normalised:.0%} of the vectors are normalised, the others are not: cosine"
                " distance does not mind, inner product does",
            )
        )
    return found
