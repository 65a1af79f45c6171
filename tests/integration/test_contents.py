"""What is looked for in the rows before a copy: the ways for old servers find what new ones know by themselves."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg2 import extensions, sql

from pipeline.check.contents import refused_by_jsonb_sql, repeats_a_key_sql

# Texts of json, escape by escape: what is told apart is which backslash belongs to which letter.
ESCAPES = st.sampled_from(
    (r"\\", r"\u0000", r"\ud83d", r"\ude00", r"\uD83D", r"\uDE00", r"\u0041", r"\"", "u0000", "ud83d", "a", r"\n", "é")
)


# The connection only asks: nothing is left behind from one text to the next.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(ESCAPES, max_size=8))
def test_regular_expression_refuses_what_jsonb_refuses(parts: list[str], connected: extensions.connection) -> None:
    text = '{"a": "' + "".join(parts) + '"}'
    query = sql.SQL("SELECT {}, {} FROM (SELECT {}::json AS j) q").format(
        *(refused_by_jsonb_sql(sql.Identifier("j"), version) for version in (150000, 160000)), sql.Literal(text)
    )
    with connected, connected.cursor() as cursor:
        cursor.execute(query)
        (found,) = cursor.fetchall()
    assert found[0] == found[1], text


@pytest.mark.parametrize("value", ["x", 1, None, [1], {"a": {"a": "b"}}])
def test_good_json_is_not_refused(value: object, connected: extensions.connection) -> None:
    with connected, connected.cursor() as cursor:
        for version in (150000, 160000):
            cursor.execute(
                sql.SQL("SELECT {} FROM (SELECT {}::json AS j) q").format(
                    refused_by_jsonb_sql(sql.Identifier("j"), version), sql.Literal(json.dumps(value))
                )
            )
            assert cursor.fetchall() == [(False,)]


@pytest.mark.parametrize(
    ("text", "twice"),
    [
        ('{"a": 1, "b": {"a": 2}}', False),
        ('{"a": 1, "a": 1}', True),
        ('{"a": [1, {"b": 1, "c": 2, "b": 3}]}', True),
        ('[[{"x": {"y": 1, "y": 2}}]]', True),
        ("[]", False),
        ('"a"', False),
        ("null", False),
    ],
)
def test_key_that_occurs_twice_is_found_at_any_depth(text: str, twice: bool, connected: extensions.connection) -> None:
    query = sql.SQL("SELECT {}, {} FROM (SELECT {}::json AS j) q").format(
        *(repeats_a_key_sql(sql.Identifier("j"), version) for version in (150000, 160000)), sql.Literal(text)
    )
    with connected, connected.cursor() as cursor:
        cursor.execute(query)
        assert cursor.fetchall() == [(twice, twice)]
