"""Rows that could not be carried, looked for where the types alone do not rule them out. Read-only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from psycopg2 import sql

from pipeline.check.casts import length_limit
from pipeline.check.preflight import EXAMPLES, Finding
from pipeline.postgres.columns import Column
from pipeline.postgres.database import Session
from pipeline.postgres.tables import Table
from pipeline.postgres.values import key_text_sql, value_sql
from pipeline.settings import TableMapping
from pipeline.wording import counted

# The first version that can try an input, or look for a key that occurs twice, without raising an error.
INPUT_TEST_VERSION = 160000
_TEXT_TYPES = frozenset({"text", "varchar", "bpchar", "name", "json", "jsonb"})
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Suspicion:
    """A condition that no row may meet, what is wrong with one that does, and what to do."""

    condition: sql.Composable
    what: str
    hint: str


def check_contents(
    session: Session, source: Table, target: Table, columns: Sequence[str], *, count_keys: bool
) -> tuple[Finding, ...]:
    """Count the rows that cannot be carried, and name the first; one scan, and none where nothing is suspect.

    ``source`` is as it is carried, with the target's key; ``count_keys`` says that nothing on the source
    keeps that key unique.
    """
    name = session.endpoint.name
    suspicions = [
        suspicion
        for column in columns
        for suspicion in _suspicions(session, source, target, column, is_key=count_keys and column in target.key)
    ]
    findings = []
    if suspicions:
        counts = sql.SQL(", ").join(
            sql.SQL("pg_catalog.count(*) FILTER (WHERE {})").format(suspicion.condition) for suspicion in suspicions
        )
        (found,) = session.rows(sql.SQL("SELECT {} FROM {}").format(counts, source.scanned))
        findings = [
            _refuse(
                f"{name}'s {source.qualified}: {counted(rows, 'row')} {suspicion.what}"
                f"{_first(session, source, suspicion.condition)}",
                suspicion.hint,
            )
            for suspicion, rows in zip(suspicions, found, strict=True)
            if rows
        ]
    if count_keys and not findings:
        findings += _check_unique(session, source)
    return tuple(findings)


def _suspicions(session: Session, source: Table, target: Table, name: str, *, is_key: bool) -> Iterator[_Suspicion]:
    column, there = source.column(name), target.column(name)
    assert column is not None and there is not None
    place = sql.Identifier(name)
    if source.encoding == "SQL_ASCII" and column.is_builtin and column.base_type in _TEXT_TYPES:
        yield _Suspicion(
            condition=sql.SQL("NOT {}").format(_is_utf8_sql(place)),
            what=f"with bytes in column {name} that are not UTF-8, in a database of the encoding SQL_ASCII",
            hint=f"if they are LATIN1, write them anew on {session.endpoint.name}: SET {column.quoted} = convert_from("
            f"convert(convert_to({column.quoted}, 'SQL_ASCII'), 'LATIN1', 'UTF8'), 'UTF8')",
        )
    if (column.base_type, there.base_type) == ("json", "jsonb"):
        yield from _json_suspicions(session, source, column)
    if (limit := length_limit(column, there)) is not None:
        yield _Suspicion(
            condition=sql.SQL("pg_catalog.char_length({}) > {}").format(value_sql(source, name), sql.Literal(limit)),
            what=f"with more than {limit} characters in column {name}, which is {there.type} on the target",
            hint=f"on the target: ALTER TABLE {target.quoted} ALTER COLUMN {there.quoted} TYPE text",
        )
    if is_key and not column.not_null:
        yield _Suspicion(
            condition=sql.SQL("{} IS NULL").format(place),
            what=f"without a value in column {name}, which is in the key",
            hint="leave such rows out of the view, or name another table in PGVECTOR_TABLE",
        )


def _is_utf8_sql(text: sql.Composable) -> sql.Composable:
    return sql.SQL('({}::pg_catalog.text COLLATE pg_catalog."C" ~ {})').format(text, sql.Literal(_UTF8))


def _json_suspicions(session: Session, source: Table, column: Column) -> Iterator[_Suspicion]:
    place = sql.Identifier(column.name)
    refused = refused_by_jsonb_sql(place, session.version)
    yield _Suspicion(
        condition=refused,
        what=f"with json in column {column.name} that jsonb does not take (\\u0000, half a surrogate pair)",
        hint="correct these rows, or give the target's column the type json",
    )
    twice = (
        sql.SQL("NOT ({} IS JSON WITH UNIQUE KEYS)").format(place)
        if session.version >= INPUT_TEST_VERSION
        else sql.SQL(
            "CASE WHEN pg_catalog.json_typeof({place}) = 'object' THEN (SELECT pg_catalog.count(*) <> pg_catalog.count("
            "DISTINCT k) FROM pg_catalog.json_object_keys({place}) AS k) END"
        ).format(place=place)
    )
    yield _Suspicion(
        condition=sql.SQL("CASE WHEN {} THEN false ELSE {} END").format(refused, twice),
        what=f"with a key that occurs twice in one object of column {column.name}; jsonb keeps the last value alone",
        hint=f"if that is right, write them anew on {session.endpoint.name}: SET {column.quoted} ="
        f" {column.quoted}::jsonb; else give the target's column the type json",
    )


def refused_by_jsonb_sql(value: sql.Composable, version: int) -> sql.Composable:
    """Return the condition that a json value is none for jsonb, which raises no error itself."""
    text = sql.SQL("{}::pg_catalog.text").format(value)
    if version >= INPUT_TEST_VERSION:
        return sql.SQL("NOT pg_catalog.pg_input_is_valid({}, 'pg_catalog.jsonb')").format(text)
    return sql.SQL("pg_catalog.regexp_replace(pg_catalog.regexp_replace({}, {}, '-', 'g'), {}, '', 'g') ~ {}").format(
        text, *map(sql.Literal, (_ESCAPED_BACKSLASH, _SURROGATE_PAIR, _REFUSED_ESCAPE))
    )


def _first(session: Session, table: Table, condition: sql.Composable) -> str:
    """Return the keys of the first rows that meet a condition, as the end of a sentence."""
    if not table.key:
        return ""
    key = sql.SQL("({})").format(key_text_sql(table))
    # A key that is no text for us cannot be shown, not even escaped.
    shown = _is_utf8_sql(key) if table.encoding == "SQL_ASCII" else sql.SQL("{} IS NOT NULL").format(key)
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


def check_vector_dimensions(
    session: Session, table: Table, mapping: TableMapping, dimensions: int
) -> tuple[Finding, ...]:
    """Count the rows per dimension where the column's type does not tell. Reads every vector.

    A typed column needs no scan, and gets none.
    """
    column = table.column(mapping.embedding)
    if column is None or column.dimensions is not None or not column.is_vector:
        return ()
    query = sql.SQL(
        "SELECT d, pg_catalog.count(*) FROM (SELECT {} AS d FROM {}) q"
        " WHERE d IS NOT NULL GROUP BY d ORDER BY 2 DESC, 1"
    )
    counts = session.rows(query.format(dimensions_sql(table, mapping.embedding), table.scanned))
    if all(found == dimensions for found, _ in counts):
        return ()
    listed = ", ".join(f"{found} dimensions: {counted(rows, 'row')}" for found, rows in counts[:EXAMPLES])
    return (
        _refuse(
            f"{session.endpoint.name}'s column {mapping.embedding} is an untyped {column.base_type} and holds {listed};"
            f" EMBEDDING_DIMENSIONS says {dimensions}",
            "set EMBEDDING_DIMENSIONS to the model's dimension, and embed or delete the other rows first",
        ),
    )


def dimensions_sql(table: Table, embedding: str) -> sql.Composable:
    """Return the dimension of a vector of any of the extension's types."""
    column = table.column(embedding)
    assert column is not None and column.send is not None and table.extension is not None
    place = sql.Identifier(embedding)
    if column.base_type != "sparsevec":
        return sql.SQL("{}({})").format(sql.Identifier(table.extension.schema, "vector_dims"), place)
    # No function tells it; the binary form begins with it, as four bytes.
    first = sql.SQL("pg_catalog.encode(pg_catalog.substring({}({}), 1, 4), 'hex')").format(
        sql.Identifier(*column.send), place
    )
    return sql.SQL("('x' || {})::pg_catalog.bit(32)::pg_catalog.int4").format(first)


def _refuse(fact: str, hint: str) -> Finding:
    return Finding(severity="refuse", fact=fact, hint=hint)
