"""The census of both sides compared: what the vectors are like, in as many figures as say it."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial

from pipeline.check.census import QUANTILES, Census, take_census, why_no_census
from pipeline.check.ladder import Ladder
from pipeline.endpoints import Endpoint
from pipeline.events import CheckDone
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import clock
from pipeline.postgres.tables import Table
from pipeline.settings import TableMapping
from pipeline.wording import counted

# Relative: two servers add up the same squares in another order, by the instructions of their processors.
NORM_TOLERANCE = 1e-6
# The others are among the figures; a row that is missing changes most of them.
LISTED_DIFFERENCES = 3
# The counts that must be equal, by what they are called to people.
_COUNTS: Mapping[str, str] = {
    "rows": "rows",
    "null_embeddings": "rows without an embedding",
    "zero_norms": "vectors of zero length",
    "not_finite": "vectors with NaN or infinity",
    "duplicate_groups": "groups of equal vectors",
    "duplicate_rows": "rows that share their vector",
    "null_contents": "rows without content",
    "null_metadata": "rows without metadata",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Difference:
    """A figure that is not equal, and both values, for people."""

    name: str
    text: str


def check_census(crew: Crew, ladder: Ladder) -> CheckDone:
    """Take the census of both sides at the same time, by one scan of each, and compare the figures.

    The source is looked at as it is carried: without the rows that are left out, and with the casts, so
    that equal rows give equal figures whatever their types. Columns that are not carried are not compared.
    Where they differ it is taken once more, after the settle time.
    Raises PipelineError.
    """
    started = clock()
    mapping, pair = ladder.route.table, ladder.pair
    beside = [name for name in (mapping.content, mapping.metadata) if name not in pair.columns]
    source, target = _without(pair.source, beside), _without(pair.target, beside)
    take = partial(
        crew.beside,
        partial(_census, crew, ladder.route.source, source, mapping),
        partial(_census, crew, ladder.route.target, target, mapping),
    )
    here, there = take()
    if isinstance(here, Census) and isinstance(there, Census) and any(_differences(here, there)):
        # Each was taken in a snapshot of its own: what was written in between may differ for a moment.
        crew.pause(ladder.options.settle_seconds)
        here, there = take()
    figures: dict[str, object] = {"source": _figures(here), "target": _figures(there), "differences": []}
    if isinstance(here, str) or isinstance(there, str):
        reasons = [
            f"{endpoint.name}: {found}"
            for endpoint, found in ((ladder.route.source, here), (ladder.route.target, there))
            if isinstance(found, str)
        ]
        summary = f"not every row could be looked at: {'; '.join(reasons)}: grant the right, or use the table's owner"
        return CheckDone(name="census", verdict="partial", summary=summary, figures=figures, seconds=clock() - started)
    differences = list(_differences(here, there))
    figures["differences"] = [one.name for one in differences]
    uncompared = [name for name in beside if pair.source.column(name) or pair.target.column(name)]
    return CheckDone(
        name="census",
        verdict="fail" if differences else "pass",
        summary=(_unequal(differences) if differences else _alike(here))
        + (f"; not compared: {', '.join(uncompared)}" if uncompared else ""),
        figures=figures,
        seconds=clock() - started,
    )


def _without(table: Table, names: list[str]) -> Table:
    return replace(table, columns=tuple(column for column in table.columns if column.name not in names))


def _census(crew: Crew, endpoint: Endpoint, table: Table, mapping: TableMapping) -> Census | str:
    """Return the census of one side, or why there is none."""
    if (why := why_no_census(table, mapping)) is not None:
        return why
    with crew.session(endpoint, "verify") as session:
        return take_census(session, table, mapping)


def _figures(census: Census | str) -> dict[str, object] | None:
    if isinstance(census, str):
        return None
    quantiles = census.norm_quantiles
    return {
        **{name: getattr(census, name) for name in _COUNTS},
        "dimensions": [list(pair) for pair in census.dimensions],
        "norms": None if census.norms is None else asdict(census.norms),
        "norm_quantiles": None if quantiles is None else list(quantiles),
    }


def _differences(here: Census, there: Census) -> Iterator[_Difference]:
    for name, words in _COUNTS.items():
        mine, theirs = getattr(here, name), getattr(there, name)
        if mine != theirs:
            yield _Difference(name=name, text=f"{words}: {_count(mine)} on the source, {_count(theirs)} on the target")
    if here.dimensions != there.dimensions:
        text = f"dimensions: {_with_rows(here)} on the source, {_with_rows(there)} on the target"
        yield _Difference(name="dimensions", text=text)
    if (unequal := _unequal_quantile(here, there)) is not None:
        yield _Difference(name="norm_quantiles", text=f"norms: {unequal}")


def _count(count: int | None) -> str:
    return "not known" if count is None else f"{count:,}"


def _with_rows(census: Census) -> str:
    return ", ".join(f"{dimension:,} ({counted(rows, 'row')})" for dimension, rows in census.dimensions) or "none"


def _unequal_quantile(here: Census, there: Census) -> str | None:
    """Return the quantile at which the lengths differ most, with both, or None where all are equal."""
    mine, theirs = here.norm_quantiles, there.norm_quantiles
    if mine is None or theirs is None:
        sides = [side for side, found in (("source", mine), ("target", theirs)) if found is None]
        return f"none on the {sides[0]}" if len(sides) == 1 else None
    apart, share, left, right = max(
        (abs(left - right) / (max(left, right) or 1.0), share, left, right)
        for share, left, right in zip(QUANTILES, mine, theirs, strict=True)
    )
    if apart <= NORM_TOLERANCE:
        return None
    return f"at {share:.0%}, {left:.9g} on the source and {right:.9g} on the target"


def _unequal(differences: list[_Difference]) -> str:
    first = "; ".join(one.text for one in differences[:LISTED_DIFFERENCES])
    more = len(differences) - LISTED_DIFFERENCES
    return first + (f"; and {counted(more, 'more figure')}" if more > 0 else "") + ": pipeline diff names the rows"


def _alike(census: Census) -> str:
    if not census.rows:
        return "both tables are empty"
    parts = [f"{counted(census.rows, 'row')} alike on both sides"]
    if census.norms is not None:
        dimensions = f"{census.dimensions[0][0]:,}" if len(census.dimensions) == 1 else _with_rows(census)
        low, high = census.norms.minimum, census.norms.maximum
        parts.append(f"{dimensions} dimensions, norms {low:.4g} to {high:.4g}")
    parts += [
        f"{words}: {count:,}" for name, words in _COUNTS.items() if name != "rows" if (count := getattr(census, name))
    ]
    return ", ".join(parts)
