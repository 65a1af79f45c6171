"""The application after the move: whether its role finds the table by its name, and may do with it what it does."""

from dataclasses import asdict
from functools import partial

from psycopg2 import sql

from pipeline.check.expectations import AppFinding, Legacy, Seen, judge, no_role
from pipeline.check.ladder import Ladder
from pipeline.check.role import fold, is_plain, read_rights, read_role, resolve
from pipeline.errors import RefusedError
from pipeline.events import CheckDone, Verdict
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Session, clock
from pipeline.postgres.tables import Table
from pipeline.settings import TableMapping
from pipeline.wording import counted


def check_application(crew: Crew, ladder: Ladder) -> CheckDone:
    """Look at the target's table as the application's role, without becoming it.

    Where no role is named it is the one that asks: then its search_path is not known to be the
    application's, and what follows from it is noted only. Raises PipelineError.
    """
    started = clock()
    named = ladder.options.app_role
    figures: dict[str, object] = {"role": named, "resolves_to": None, "search_path": [], "findings": []}
    try:
        seen, legacy = crew.beside(partial(_look, crew, ladder), partial(_look_at_source, crew, ladder))
    except RefusedError as error:
        # The catalogs are open to everybody, unless somebody closed them.
        summary = f"what the role may do does not show from here: {error.fact}; {error.hint}"
        return _done("partial", summary, figures, started)
    if seen is None:
        findings = [no_role(ladder.route, named or "")]
        return _done("fail", _failing(findings), figures | {"findings": [asdict(one) for one in findings]}, started)
    findings = judge(ladder.pair, ladder.route, seen, legacy, named=named is not None)
    figures |= {
        "role": seen.role.name,
        "resolves_to": None if seen.found is None else seen.found.qualified,
        "search_path": list(seen.role.search_path),
        "findings": [asdict(one) for one in findings],
    }
    if any(one.severity == "fail" for one in findings):
        return _done("fail", _failing(findings), figures, started)
    return _done("pass", _passing(seen, ladder.pair.target, len(findings)), figures, started)


def _done(verdict: Verdict, summary: str, figures: dict[str, object], started: float) -> CheckDone:
    return CheckDone(name="application", verdict=verdict, summary=summary, figures=figures, seconds=clock() - started)


def _failing(findings: list[AppFinding]) -> str:
    failures = [one for one in findings if one.severity == "fail"]
    more = f" (and {counted(len(failures) - 1, 'more finding')})" if len(failures) > 1 else ""
    return f"{failures[0].fact}; {failures[0].hint}{more}"


def _passing(seen: Seen, table: Table, notes: int) -> str:
    does = "read and write" if not seen.rights.unwritten else "read, add to and delete from"
    more = f" ({counted(notes, 'note')})" if notes else ""
    if seen.found is not None and seen.found.oid == table.oid:
        return f"the role {seen.role.name} finds {table.qualified} as {seen.folded}, and may {does} it{more}"
    fact = f"the role {seen.role.name} may {does} {table.qualified}, and does not find it by its bare name"
    return f"{fact}: pass schemaName to the client{more}"


_UNDECLARED_SQL = """
SELECT c.relname::pg_catalog.text FROM pg_catalog.pg_index i
JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid JOIN pg_catalog.pg_am m ON m.oid = c.relam
WHERE i.indrelid = %s AND m.amname IN ('hnsw', 'ivfflat', 'gin') ORDER BY 1
"""


def _look(crew: Crew, ladder: Ladder) -> Seen | None:
    """Return what the target shows, or None where it has no such role."""
    mapping, table = ladder.route.table, ladder.pair.target
    with crew.session(ladder.route.target, "verify") as session:
        contents, metadata = _count_nulls(session, table, mapping)
        with session.transaction(read_only=True) as cursor:
            if (role := read_role(cursor, ladder.options.app_role)) is None:
                return None
            folded = fold(table.name) if is_plain(cursor, table.name) else None
            found = None if folded is None else resolve(cursor, role, folded)
            rights = read_rights(cursor, role, table, mapping.columns)
            cursor.execute(_UNDECLARED_SQL, (table.oid,))
            undeclared = tuple(index for (index,) in cursor.fetchall())
            cursor.execute("SELECT 1 FROM pg_catalog.pg_extension WHERE extname = 'uuid-ossp'")
            return Seen(
                role=role,
                rights=rights,
                folded=folded,
                found=found,
                null_contents=contents,
                null_metadata=metadata,
                has_uuid_ossp=bool(cursor.fetchall()),
                undeclared=undeclared,
            )


def _count_nulls(session: Session, table: Table, mapping: TableMapping) -> tuple[int | None, int | None]:
    """Count the rows without content, and without metadata, by one scan that leaves TOAST alone."""
    count = sql.SQL("pg_catalog.count(*) FILTER (WHERE {} IS NULL)")
    counts = [
        count.format(sql.Identifier(name))
        if (column := table.column(name)) is not None and column.may_select
        else sql.SQL("NULL::pg_catalog.int8")
        for name in (mapping.content, mapping.metadata)
    ]
    ((contents, metadata),) = session.rows(
        sql.SQL("SELECT {} FROM {}").format(sql.SQL(", ").join(counts), table.scanned)
    )
    return contents, metadata


_DEFAULT_SQL = """
SELECT pg_catalog.pg_get_expr(f.adbin, f.adrelid) FROM pg_catalog.pg_attrdef f
JOIN pg_catalog.pg_attribute a ON a.attrelid = f.adrelid AND a.attnum = f.adnum
WHERE f.adrelid = %s AND a.attname = %s
"""


def _look_at_source(crew: Crew, ladder: Ladder) -> Legacy:
    table = ladder.pair.source
    with (
        crew.session(ladder.route.source, "verify") as session,
        session.transaction(read_only=True) as cursor,
    ):
        role = read_role(cursor, None)
        cursor.execute(_DEFAULT_SQL, (table.oid, ladder.route.table.id))
        defaults = [text for (text,) in cursor.fetchall()]
    on_path = role is not None and any(
        table.extension is not None and place.schema == table.extension.schema for place in role.places
    )
    return Legacy(off_path=not on_path, default=defaults[0] if defaults else "")
