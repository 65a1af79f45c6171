"""What the target's table holds before a copy: rows equal to the source's, others with their keys, and its own."""

from dataclasses import dataclass

from psycopg2 import sql

from pipeline.check.digests import hash_sql
from pipeline.check.pair import Pair
from pipeline.check.preflight import EXAMPLES, Finding
from pipeline.errors import RefusedError
from pipeline.postgres.database import Session
from pipeline.postgres.tables import Table
from pipeline.postgres.values import key_texts_sql, rows_of_keys_sql
from pipeline.wording import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Existing:
    """The rows of the target's table: equal to the source's, different from those, and of keys that it has not.

    ``first`` are the first keys of those that are different, as texts for people.
    """

    equal: int = 0
    different: int = 0
    only_there: int = 0
    first: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Return the number of all of them."""
        return self.equal + self.different + self.only_there


def compare_existing(source: Session, target: Session, pair: Pair) -> Existing:
    """Look every row of the target up on the source, by its key; what that costs, the target's rows decide.

    Memory is bounded. Raises PipelineError.
    """
    query = sql.SQL("SELECT {}, {} FROM {}").format(
        hash_sql(pair.target, pair.columns), key_texts_sql(pair.target), pair.target.scanned
    )
    equal = different = only_there = 0
    first: list[str] = []
    for batch in target.stream(query):
        there = {tuple(key): digest for digest, *key in batch}
        here = {
            tuple(key): digest
            for digest, *key in source.rows(
                sql.SQL("SELECT {}, {} FROM {}").format(
                    hash_sql(pair.source, pair.columns, "t"),
                    key_texts_sql(pair.source, "t"),
                    rows_of_keys_sql(pair.source, list(there)),
                )
            )
        }
        for key, digest in there.items():
            if key not in here:
                only_there += 1
            elif here[key] == digest:
                equal += 1
            else:
                different += 1
                first = sorted([*first, ", ".join(key)])[:EXAMPLES]
    return Existing(equal=equal, different=different, only_there=only_there, first=tuple(first))


def check_existing(existing: Existing, target: Table, name: str) -> tuple[Finding, ...]:
    """Judge what the target's table holds; no query. ``name`` is the endpoint's."""
    where = f"{name}'s {target.qualified}"
    found = [
        Finding(
            severity="note",
            fact=f"{where} holds {counted(existing.rows, 'row')} already: {existing.equal:,} equal to the source's,"
            f" {existing.only_there:,} that only it has; they stay, and its indexes stay during the copy",
            hint="",
        )
    ]
    if existing.different:
        error = conflict(where, existing.different, existing.first)
        found.insert(0, Finding(severity="refuse", fact=error.fact, hint=error.hint))
    return tuple(found)


def conflict(where: str, rows: int, first: tuple[str, ...]) -> RefusedError:
    """Return the error of rows that stand on the target under the source's keys, with other content."""
    return RefusedError(
        f"{where} has {counted(rows, 'row')} with a key of the source's and other content, which no run brought,"
        f" first: {', '.join(first)}",
        "choose what becomes of them: pipeline copy --on-conflict keep (they stay), or --on-conflict overwrite",
    )
