"""Which types may stand against each other on the two sides, and what a value is carried as then."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.postgres.columns import Column
from pipeline.postgres.tables import Table

_TEXTS = frozenset({"text", "varchar"})
# From each type, those that hold every value of it. What a type throws away of another one's text (json's
# blanks and order of keys, the blanks that fill up a char) means nothing; what means something, and would
# be lost, is looked for in the rows.
LOSSLESS: Mapping[str, frozenset[str]] = {
    "int2": _TEXTS | {"int4", "int8"},
    "int4": _TEXTS | {"int8"},
    "int8": _TEXTS,
    "float4": frozenset({"float8"}),
    "uuid": _TEXTS,
    "text": frozenset({"varchar"}),
    "varchar": frozenset({"text"}),
    "bpchar": _TEXTS,
    "name": _TEXTS,
    "json": frozenset({"jsonb"}),
    "jsonb": frozenset({"json"}),
    "halfvec": frozenset({"vector"}),
}
# Half the digits of every number are lost, which an operator may want: it halves table and index.
ROUNDING: Mapping[str, frozenset[str]] = {"vector": frozenset({"halfvec"})}
# Types whose input takes what does not fit their modifier, and rounds or fills it up.
_ADAPTING = frozenset({"numeric", "bpchar", "time", "timetz", "timestamp", "timestamptz", "interval"})
_SAME_TYPE = "give both columns the same type: COPY would refuse or reinterpret the bytes"
_REASONS: Mapping[tuple[str, str], tuple[str, str]] = {
    ("timestamp", "timestamptz"): (
        "which moment a time without a zone means is not in the data",
        "give both columns the same type, with AT TIME ZONE where you know the zone",
    ),
    ("timestamptz", "timestamp"): ("the zone would be lost", _SAME_TYPE),
    ("vector", "halfvec"): (
        "half the digits of every number would be lost, and search could answer otherwise",
        "give both columns the type vector (an index can be over its halfvec form), or round them: --allow-rounding",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """Why a column's values cannot be carried (empty: the types alone say it), and what to do."""

    reason: str
    hint: str


def misfit(column: Column, there: Column, *, rounding: bool = False) -> Misfit | None:
    """Return why the values of a column do not go into the one on the target, or None where they do.

    With ``rounding`` a vector goes into a halfvec.
    """
    for one in (column, there):
        if one.send is None:
            return Misfit(reason=f"{one.type} has no binary form", hint="leave it behind: --ignore-column")
    if missing := sorted(set(column.labels) - set(there.labels)) if column.labels and there.labels else []:
        return Misfit(
            reason=f"the enum there has no {', '.join(map(repr, missing))}", hint="add them there: ALTER TYPE ADD VALUE"
        )
    if _same_bytes(column, there) or _castable(column, there, LOSSLESS):
        return None
    if rounding and _castable(column, there, ROUNDING):
        return None
    if _base(column) == _base(there) and column.base_type in _ADAPTING:
        return Misfit(reason="values would be rounded or filled up", hint=_SAME_TYPE)
    reason, hint = _REASONS.get((column.base_type, there.base_type), ("", _SAME_TYPE))
    return Misfit(reason=reason, hint=hint)


def _base(column: Column) -> tuple[str, str]:
    """Return what a type is behind a domain; the extension's types are the same in whatever schema."""
    return ("vector" if column.is_vector else column.base_schema, column.base_type)


def _same_bytes(column: Column, there: Column) -> bool:
    """Return whether the bytes are those of the target's type, which refuses what is too long for it itself."""
    if column.type == there.type or (column.labels and there.labels):
        return True
    if _base(column) != _base(there) or column.holds_oids:
        return False
    if column.is_vector:
        return there.dimensions in (None, column.dimensions) or column.dimensions is None
    return there.modifier in (-1, column.modifier) or there.base_type in ("varchar", "varbit")


def _castable(column: Column, there: Column, casts: Mapping[str, frozenset[str]]) -> bool:
    if column.labels:
        return there.is_builtin and there.base_type in _TEXTS
    same_house = (column.is_vector and there.is_vector) or (column.is_builtin and there.is_builtin)
    fits = column.dimensions is None or there.dimensions in (None, column.dimensions)
    return same_house and fits and there.base_type in casts.get(column.base_type, ())


def carried_as(source: Table, target: Table, columns: Sequence[str]) -> Table:
    """Return the source with a cast at every column whose type on the target is another one.

    Its form is the target's then, so that digests compare what was to be carried. No cast has a length:
    an explicit one cuts silently, while the target's column refuses.
    """
    return replace(
        source,
        columns=tuple(
            _carried_as(source, column, there)
            if column.name in columns and (there := target.column(column.name)) is not None
            else column
            for column in source.columns
        ),
    )


def _carried_as(source: Table, column: Column, there: Column) -> Column:
    if _same_bytes(column, there):
        return column
    assert there.send is not None
    if not there.is_vector:
        return replace(column, cast=("pg_catalog", there.base_type), send=there.send, holds_oids=False)
    assert source.extension is not None
    schema = source.extension.schema
    return replace(column, cast=(schema, there.base_type), send=(schema, there.send[1]), holds_oids=False)


def length_limit(column: Column, there: Column) -> int | None:
    """Return how many characters the target's column takes, where the source's may hold more; else None."""
    if there.base_type != "varchar" or there.modifier < 0 or there.modifier == column.modifier:
        return None
    # The modifier counts a header of four bytes.
    return there.modifier - 4
