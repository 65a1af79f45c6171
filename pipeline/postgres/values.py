"""What of a row travels and is compared: one expression for COPY, for reconcile and for digests alike."""

from collections.abc import Sequence

from psycopg2 import sql

from pipeline.postgres.tables import Table

# A row's key: its values as texts, in the order of the table's key.
Key = tuple[str, ...]


def value_sql(table: Table, name: str, alias: str | None = None) -> sql.Composable:
    """Return a column's value as it is carried: the column, or its cast to the type on the target.

    ``alias`` is what the table is called in the statement, where the bare name would be ambiguous.
    """
    column = table.column(name)
    assert column is not None
    place = sql.Identifier(name) if alias is None else sql.Identifier(alias, name)
    return place if column.cast is None else sql.SQL("{}::{}").format(place, column.carried_type)


def form_sql(table: Table, name: str, alias: str | None = None) -> sql.Composable:
    """Return the bytes of a carried value that are equal on every server for equal values.

    The binary form, which text goes into as UTF-8 whatever a server stores; the text form (its settings
    are those of our transactions) where the binary one holds numbers of types: arrays and composites.
    """
    column = table.column(name)
    assert column is not None
    value = value_sql(table, name, alias)
    if column.holds_oids or column.send is None:
        return sql.SQL("pg_catalog.textsend({}::pg_catalog.text)").format(value)
    return sql.SQL("{}({})").format(sql.Identifier(*column.send), value)


def key_texts_sql(table: Table, alias: str | None = None) -> sql.Composable:
    """Return the key's values as texts, in the key's order."""
    return sql.SQL(", ").join(_text_sql(table, name, alias) for name in table.key)


def key_text_sql(table: Table, alias: str | None = None) -> sql.Composable:
    """Return the key as one text, for people."""
    return sql.SQL(" || ', ' || ").join(_text_sql(table, name, alias) for name in table.key)


def _text_sql(table: Table, name: str, alias: str | None) -> sql.Composable:
    return sql.SQL("{}::pg_catalog.text").format(value_sql(table, name, alias))


def keys_sql(table: Table, keys: Sequence[Key]) -> sql.Composable:
    """Return a row source ``k`` of the keys, typed as they are carried (COPY takes no parameters)."""
    arrays = [
        sql.SQL("pg_catalog.unnest({}::{}[])").format(sql.Literal([key[place] for key in keys]), column.carried_type)
        for place, name in enumerate(table.key)
        if (column := table.column(name)) is not None
    ]
    names = sql.SQL(", ").join(map(sql.Identifier, table.key))
    return sql.SQL("ROWS FROM ({}) AS k ({})").format(sql.SQL(", ").join(arrays), names)


def rows_of_keys_sql(table: Table, keys: Sequence[Key]) -> sql.Composable:
    """Return what FROM names for the rows ``t`` of some keys, looked up by the key."""
    return sql.SQL("{} JOIN {} ON {}").format(table.rows_sql("t"), keys_sql(table, keys), same_key_sql(table, "t", "k"))


def same_key_sql(table: Table, left: str, right: str) -> sql.Composable:
    """Return that the rows of two sources have the same key; ``left`` is the table, or typed like it."""
    return sql.SQL(" AND ").join(
        sql.SQL("{} = {}").format(value_sql(table, name, left), sql.Identifier(right, name)) for name in table.key
    )
