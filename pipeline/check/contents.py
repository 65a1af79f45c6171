"""Rows that could not be carried, looked for where the types alone do not rule them out. Read-only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from psycopg2 import sql

from pipeline.check.casts import length_limit
from pipeline.check.dimensions import other_dimension_sql
from pipeline.check.preflight import EXAMPLES, Finding
from pipeline.postgres.columns import Column
from pipeline.postgres.database import Session
from pipeline.postgres.tables import Table
from pipeline.postgres.values import key_text_sql, value_sql
from pipeline.settings import TableMapping
from pipeline.wording import counted

# The first version that can try an input, or look for a key that occurs twice, without raising an error.
INPUT_TEST_VERSION = 160000
# Types whose values are texts, in the encoding of the database.
UTF8_TYPES = frozenset({"text", "varchar", "bpchar", "name", "json", "jsonb"})
# Escaped backslashes are taken out first (what follows one is plain text), then pairs of surrogates;
# a U+0000 or a surrogate that is left is what jsonb refuses.
_ESCAPED_BACKSLASH = r"\\\\"
_SURROGATE_PAIR = r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_REFUSED_ESCAPE = r"\\u(0000|[dD][89a-fA-F][0-9a-fA-F]{2})"
# What UTF-8 allows, byte by byte: in a database that knows no encoding, a character is a byte.
_UTF8 = (
    r"^([\x01-\x7f]|[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}"
    r"|\xed[\x80-\x9f][\x80-\xbf]|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}"
    r"|\xf4[\x80-\x8f][\x80-\xbf]{2})*$"
)


SET_ASIDE = "or set them aside: pipeline copy --quarantine"
# The smallest number that halfvec's input calls out of range; up to there it rounds to 65,504.
_HALFVEC_END = 65_520


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfit:
    """A condition that no row may meet to be carried, what is wrong with one that does, and what to do.

    ``may_rest`` says that such a row has a key, and may go to quarantine.
    """

    condition: sql.Composable
    what: str
    hint: str
    may_rest: bool = True


def unfit_rows(
    session: Session, source: Table, target: Table, columns: Sequence[str], *, count_keys: bool
) -> tuple[Unfit, ...]:
    """Return every way in which a row of the source could be unfit to be carried; none for most tables. No query.

    ``source`` is as it is carried, with the target's key; ``count_keys`` says that nothing on the source
    keeps that key unique.
    """
    return tuple(
        unfit
        for column in columns
        for unfit in _unfit(session, source, target, column, is_key=count_keys and column in target.key)
    )


def check_contents(
    session: Session,
    source: Table,
    target: Table,
    columns: Sequence[str],
    *,
    count_keys: bool,
    set_aside: bool = False,
    unique: bool = True,
) -> tuple[Finding, ...]:
    """Count the rows that cannot be carried, and name the first; one scan, and none where no row can be unfit.

    Arguments as for ``unfit_rows``. With ``set_aside`` those that may go to quarantine are not counted; without
    ``unique`` no key is looked for that occurs twice.
    """
    unfit = unfit_rows(session, source, target, columns, count_keys=count_keys)
    findings = _check_unfit(session, source, [one for one in unfit if not (set_aside and one.may_rest)])
    if count_keys and unique and not findings:
        findings += _check_unique(session, source)
    return tuple(findings)


def _check_unfit(session: Session, source: Table, unfit: Sequence[Unfit]) -> list[Finding]:
    if not unfit:
        return []
    counts = sql.SQL(", ").join(sql.SQL("pg_catalog.count(*) FILTER (WHERE {})").format(one.condition) for one in unfit)
    (found,) = session.rows(sql.SQL("SELECT {} FROM {}").format(counts, source.scanned))
    return [
        _refuse(
            f"{session.endpoint.name}'s {source.qualified}: {counted(rows, 'row')} {one.what}"
            f"{_first(session, source, one.condition)}",
            one.hint + (f"\n{SET_ASIDE}" if one.may_rest else ""),
        )
        for one, rows in zip(unfit, found, strict=True)
        if rows
    ]


def _unfit(session: Session, source: Table, target: Table, name: str, *, is_key: bool) -> Iterator[Unfit]:
    column, there = source.column(name), target.column(name)
    assert column is not None and there is not None
    place = sql.Identifier(name)
    if source.encoding == "SQL_ASCII" and column.is_builtin and column.base_type in UTF8_TYPES:
        yield Unfit(
            condition=sql.SQL("NOT {}").format(is_utf8_sql(place)),
            what=f"with bytes in column {name} that are not UTF-8, in a database of the encoding SQL_ASCII",
            hint=f"if they are LATIN1, write them anew on {session.endpoint.name}: SET {column.quoted} = convert_from("
            f"convert(convert_to({column.quoted}, 'SQL_ASCII'), 'LATIN1', 'UTF8'), 'UTF8')",
        )
    if (column.base_type, there.base_type) == ("json", "jsonb"):
        yield from _unfit_json(session, source, column)
    if column.cast is not None and (column.base_type, there.base_type) == ("vector", "halfvec"):
        yield _beyond_halfvec(source, column)
    if (limit := length_limit(column, there)) is not None:
        yield Unfit(
            condition=sql.SQL("pg_catalog.char_length({}) > {}").format(value_sql(source, name), sql.Literal(limit)),
            what=f"with more than {limit} characters in column {name}, which is {there.type} on the target",
            hint=f"on the target: ALTER TABLE {target.quoted} ALTER COLUMN {there.quoted} TYPE text",
        )
    if is_key and not column.not_null:
        yield Unfit(
            condition=sql.SQL("{} IS NULL").format(place),
            what=f"without a value in column {name}, which is in the key",
            hint="leave such rows out of the view, or name another table in PGVECTOR_TABLE",
            may_rest=False,
        )
    elif there.not_null and not column.not_null:
        yield Unfit(
            condition=sql.SQL("{} IS NULL").format(place),
            what=f"without a value in column {name}, which is NOT NULL on the target",
            hint=f"on the target: ALTER TABLE {target.quoted} ALTER COLUMN {there.quoted} DROP NOT NULL",
        )


def is_utf8_sql(text: sql.Composable) -> sql.Composable:
    """Return that a text of a database without an encoding (SQL_ASCII) is UTF-8."""
    return sql.SQL('({}::pg_catalog.text COLLATE pg_catalog."C" ~ {})').format(text, sql.Literal(_UTF8))


def _unfit_json(session: Session, source: Table, column: Column) -> Iterator[Unfit]:
    place = sql.Identifier(column.name)
    refused = refused_by_jsonb_sql(place, session.version)
    yield Unfit(
        condition=refused,
        what=f"with json in column {column.name} that jsonb does not take (\\u0000, half a surrogate pair)",
        hint="correct these rows, or give the target's column the type json",
    )
    twice = repeats_a_key_sql(place, session.version)
    yield Unfit(
        condition=sql.SQL("CASE WHEN {} THEN false ELSE {} END").format(refused, twice),
        what=f"with a key that occurs twice in one object of column {column.name}; jsonb keeps the last value alone",
        hint=f"if that is right, write them anew on {session.endpoint.name}: SET {column.quoted} ="
        f" {column.quoted}::jsonb; else give the target's column the type json",
    )


def _beyond_halfvec(source: Table, column: Column) -> Unfit:
    assert source.extension is not None
    place = sql.Identifier(column.name)
    # The length first: below the end no number can lie beyond it, and nearly every row stops there.
    condition = sql.SQL(
        "({norm}({place}) >= {end} AND (SELECT pg_catalog.max(pg_catalog.abs(x)) FROM"
        " pg_catalog.unnest({place}::pg_catalog.float4[]) AS x) >= {end})"
    ).format(norm=sql.Identifier(source.extension.schema, "vector_norm"), place=place, end=sql.Literal(_HALFVEC_END))
    return Unfit(
        condition=condition,
        what=f"with a number in column {column.name} beyond the largest of halfvec, 65,504",
        hint="give the target's column the type vector, or embed these texts again",
    )


def refused_by_jsonb_sql(value: sql.Composable, version: int) -> sql.Composable:
    """Return the condition that a json value is none for jsonb, which raises no error itself."""
    text = sql.SQL("{}::pg_catalog.text").format(value)
    if version >= INPUT_TEST_VERSION:
        return sql.SQL("NOT pg_catalog.pg_input_is_valid({}, 'pg_catalog.jsonb')").format(text)
    return sql.SQL("pg_catalog.regexp_replace(pg_catalog.regexp_replace({}, {}, '-', 'g'), {}, '', 'g') ~ {}").format(
        text, *map(sql.Literal, (_ESCAPED_BACKSLASH, _SURROGATE_PAIR, _REFUSED_ESCAPE))
    )


def repeats_a_key_sql(value: sql.Composable, version: int) -> sql.Composable:
    """Return the condition that an object in a json value, however deep, has a key twice."""
    if version >= INPUT_TEST_VERSION:
        return sql.SQL("NOT ({} IS JSON WITH UNIQUE KEYS)").format(value)
    return sql.SQL("""EXISTS (
        WITH RECURSIVE part (j) AS (
            SELECT {} UNION ALL SELECT inner_part.value FROM part, LATERAL (
                SELECT value FROM pg_catalog.json_each(
                    CASE WHEN pg_catalog.json_typeof(j) = 'object' THEN j ELSE '{{}}' END)
                UNION ALL SELECT value FROM pg_catalog.json_array_elements(
                    CASE WHEN pg_catalog.json_typeof(j) = 'array' THEN j ELSE '[]' END)) AS inner_part)
        SELECT 1 FROM part WHERE pg_catalog.json_typeof(j) = 'object' AND (
            SELECT pg_catalog.count(*) <> pg_catalog.count(DISTINCT k) FROM pg_catalog.json_object_keys(j) AS k))
    """).format(value)


def _first(session: Session, table: Table, condition: sql.Composable) -> str:
    """Return the keys of the first rows that meet a condition, as the end of a sentence."""
    if not table.key:
        return ""
    key = sql.SQL("({})").format(key_text_sql(table))
    # A key that is no text for us cannot be shown, not even escaped.
    shown = is_utf8_sql(key) if table.encoding == "SQL_ASCII" else sql.SQL("{} IS NOT NULL").format(key)
    query = sql.SQL("SELECT {} FROM {} WHERE ({}) AND {} ORDER BY 1 LIMIT {}").format(
        key_text_sql(table), table.scanned, condition, shown, sql.Literal(EXAMPLES)
    )
    keys = [key for (key,) in session.rows(query)]
    return f", first: {', '.join(keys)}" if keys else ""


def _check_unique(session: Session, table: Table) -> list[Finding]:
    """Count the keys that occur more than once: what has no key of its own gets the target's."""
    twice = sql.SQL("SELECT {} AS k FROM {} GROUP BY {} HAVING pg_catalog.count(*) > 1").format(
        key_text_sql(table), table.scanned, sql.SQL(", ").join(value_sql(table, name) for name in table.key)
    )
    query = sql.SQL("SELECT pg_catalog.count(*), (pg_catalog.array_agg(k ORDER BY k))[1:{}] FROM ({}) q")
    ((keys, first),) = session.rows(query.format(sql.Literal(EXAMPLES), twice))
    if not keys:
        return []
    return [
        _refuse(
            f"{session.endpoint.name}'s {table.qualified}: {counted(keys, 'key')} ({', '.join(table.key)})"
            f" {'occurs' if keys == 1 else 'occur'} more than once, first: {', '.join(first)}",
            "leave the doubles out of the view, or give the target's table the key that its rows have",
        )
    ]


def other_dimension(session: Session, table: Table, mapping: TableMapping, dimensions: int) -> tuple[Unfit, ...]:
    """Return the condition of vectors of another dimension, where the column's type does not tell. No query."""
    column = table.column(mapping.embedding)
    if column is None or column.dimensions is not None or not column.is_vector:
        return ()
    return (
        Unfit(
            condition=other_dimension_sql(session, table, mapping.embedding, dimensions),
            what=f"with another dimension than {dimensions} in column {mapping.embedding}",
            hint="set EMBEDDING_DIMENSIONS to the model's dimension, or embed these texts again",
        ),
    )


def _refuse(fact: str, hint: str) -> Finding:
    return Finding(severity="refuse", fact=fact, hint=hint)
