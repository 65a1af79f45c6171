"""Verify's first rungs: the number of rows, every byte of them, and what a copy has set aside."""

from collections import Counter
from dataclasses import dataclass, field

from psycopg2 import sql

from pipeline.check.before import pass_before
from pipeline.check.changes import Look
from pipeline.check.differences import KINDS, Difference
from pipeline.check.digests import BucketMap
from pipeline.check.finding import Base, Found, can_be_touched, find_all, find_touched, still_holds
from pipeline.check.ladder import Ladder
from pipeline.errors import RefusedError
from pipeline.events import CheckDone, Verdict
from pipeline.ledger import runs
from pipeline.ledger.passes import Pass
from pipeline.ledger.quarantine import read_quarantine
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import clock
from pipeline.postgres.values import Key, key_texts_sql
from pipeline.wording import counted

# Keys that are named; all are counted.
LISTED_KEYS = 20
# Where in its table a difference lies is told by the share of the pages before it.
PLACES = 50


@dataclass(slots=True, kw_only=True)
class Differences:
    """What differs: the first keys, and how many of each kind, in each column, and in each part of the table."""

    first: list[Difference] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    columns: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[int]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Return how many keys differ."""
        return self.kinds.total()

    def take(self, found: list[Difference]) -> None:
        """Count a batch."""
        self.first += found[: LISTED_KEYS - len(self.first)]
        for one in found:
            self.kinds[one.kind] += 1
            self.columns.update(one.columns)
            if one.place is not None:
                bins = self.places.setdefault(one.kind, [0] * PLACES)
                bins[min(PLACES - 1, int(one.place * PLACES))] += 1

    def figures(self) -> dict[str, object]:
        """Return it as plain JSON."""
        return {
            "differing_rows": self.total,
            **{f"{kind}_rows": self.kinds[kind] for kind in KINDS},
            "columns": dict(self.columns),
            "keys": [
                {"kind": one.kind, "key": one.text, **({"columns": list(one.columns)} if one.columns else {})}
                for one in self.first
            ],
            "places": self.places,
        }

    def words(self) -> str:
        """Return the counts for people."""
        text = (
            f"{counted(self.total, 'differing row')}: {self.kinds['missing']:,} missing on the target,"
            f" {self.kinds['extra']:,} only there, {self.kinds['different']:,} with other content"
        )
        if self.kinds["doubled"]:
            text += f", {self.kinds['doubled']:,} with a key that is there more than once"
        if self.columns:
            text += f" (in {', '.join(f'{name}: {rows:,}' for name, rows in self.columns.most_common())})"
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The result of comparing all rows, or those touched since: the checks, and how both tables stood."""

    checks: tuple[CheckDone, ...]
    horizons: tuple[Look, Look]
    differences: Differences

    @property
    def equal(self) -> bool:
        """Return whether both sides have the same rows."""
        return not self.differences.total

    @property
    def covered(self) -> bool:
        """Return whether every row of the source stands on the target, equal."""
        return self.differences.total == self.differences.kinds["extra"]


def compare_rows(crew: Crew, ladder: Ladder) -> Rows:
    """Compare every row of both sides, byte for byte. Blocks, in a thread of the crew."""
    options, started = ladder.options, clock()
    differences = Differences()
    found = find_all(
        crew,
        ladder.route,
        ladder.pair,
        differences.take,
        workers=options.workers,
        settle=options.settle_seconds,
        restart=options.restart,
        kept=True,
    )
    seconds = clock() - started
    assert found.source is not None and found.target is not None
    checks = (
        _counts(found.source, found.target, differences, seconds),
        _digests(ladder, found, differences, seconds),
    )
    return Rows(checks=checks, horizons=found.horizons, differences=differences)


def renew_rows(crew: Crew, ladder: Ladder) -> Rows:
    """Compare the rows that were touched on either side since both were found equal.

    Raises RefusedError where there is no such pass, or a side cannot tell what was touched.
    """
    started = clock()
    before = _last_pass(crew, ladder)
    base = Base(source=Look.from_json(before.source_horizon), target=Look.from_json(before.target_horizon))
    differences = Differences()
    found = find_touched(crew, ladder.route, ladder.pair, base, differences.take, settle=ladder.options.settle_seconds)
    seconds = clock() - started
    checks = (
        _renewed_counts(found, differences, seconds),
        _renewed(ladder, before, differences, found.touched, seconds),
    )
    return Rows(checks=checks, horizons=found.horizons, differences=differences)


def _last_pass(crew: Crew, ladder: Ladder) -> Pass:
    pair = ladder.pair
    hint = "run: pipeline verify, which compares everything"
    if not can_be_touched(pair):
        view = pair.target if pair.source.heaps else pair.source
        raise RefusedError(f"{view.qualified} does not tell which of its rows were written since", hint)
    route = ladder.route
    with crew.together((route.source, "verify"), (route.target, "verify")) as (source, target):
        found = pass_before(source, target, route.table, pair, verified=True)
    if found is not None and not still_holds(pair, found.source_horizon, found.target_horizon):
        raise RefusedError(f"a server was set back, or replaced by its standby, since the {found.kind} before", hint)
    if found is None:
        raise RefusedError(f"no verify has found {pair.target.qualified} equal on both sides yet", hint)
    return found


def _counts(here: BucketMap, there: BucketMap, found: Differences, seconds: float) -> CheckDone:
    figures: dict[str, object] = {
        "source_rows": here.rows,
        "target_rows": there.rows,
        "source_embeddings": here.embeddings,
        "target_embeddings": there.embeddings,
    }
    same = (here.rows, here.embeddings) == (there.rows, there.embeddings)
    # Counted at different moments, while somebody wrote: what is still different then, the next check names.
    passing = same or not found.total
    if same:
        summary = f"{counted(here.rows, 'row')}, {here.embeddings:,} with an embedding, on both sides"
    else:
        summary = (
            f"{counted(here.rows, 'row')} and {counted(here.embeddings, 'embedding')} on the source,"
            f" {there.rows:,} and {there.embeddings:,} on the target"
        )
        if passing:
            summary += ", counted while they were written; looked at again, every key was on both sides"
    return CheckDone(
        name="counts", verdict="pass" if passing else "fail", summary=summary, figures=figures, seconds=seconds
    )


def _digests(ladder: Ladder, found: Found, differences: Differences, seconds: float) -> CheckDone:
    assert found.source is not None
    rows = found.source.rows
    verdict: Verdict = "fail" if differences.total else "pass"
    summary = differences.words() if differences.total else f"every byte of {counted(rows, 'row')} is equal"
    return CheckDone(
        name="digests",
        verdict=verdict,
        summary=summary + _ignored(ladder),
        figures={"rows": rows, **differences.figures(), "ignored_columns": list(ladder.pair.ignored)},
        seconds=seconds,
    )


def _ignored(ladder: Ladder) -> str:
    return f"; not compared: {', '.join(ladder.pair.ignored)}" if ladder.pair.ignored else ""


def _renewed_counts(found: Found, differences: Differences, seconds: float) -> CheckDone:
    here, there = (one.rows or 0 for one in found.horizons)
    summary = (
        f"{counted(here, 'row')} on both sides"
        if here == there
        else f"{counted(here, 'row')} on the source, {there:,} on the target"
    )
    return CheckDone(
        name="counts",
        verdict="fail" if here != there and differences.total else "pass",
        summary=summary,
        figures={"source_rows": here, "target_rows": there, "source_embeddings": None, "target_embeddings": None},
        seconds=seconds,
    )


def _renewed(ladder: Ladder, before: Pass, differences: Differences, looked: int, seconds: float) -> CheckDone:
    since = f"the {before.kind} of {before.at:%Y-%m-%d %H:%M:%S}Z"
    summary = (
        f"{differences.words()}; since {since}"
        if differences.total
        else f"both sides were equal at {since}; of {counted(looked, 'row')} touched since, every byte is equal"
    )
    return CheckDone(
        name="digests",
        verdict="fail" if differences.total else "pass",
        summary=summary + _ignored(ladder),
        figures={
            "rows": looked,
            **differences.figures(),
            "ignored_columns": list(ladder.pair.ignored),
            "renews": {"kind": before.kind, "at": before.at.isoformat()},
        },
        seconds=seconds,
    )


def check_quarantine(crew: Crew, ladder: Ladder) -> CheckDone:
    """Check that every row which was left out of the comparison lies in quarantine, and say how many those are."""
    started = clock()
    route, pair = ladder.route, ladder.pair
    with crew.together((route.source, "verify"), (route.target, "verify")) as (source, target):
        with target.transaction(read_only=True) as cursor:
            run = runs.latest_run(cursor, route.table)
            aside = {row.key for row in read_quarantine(cursor, run.id)} if run is not None else set()
        table = pair.source.only_left_out()
        query = sql.SQL("SELECT {} FROM {}").format(key_texts_sql(table), table.scanned)
        left_out = 0
        lost: list[Key] = []
        for key in (tuple(key) for batch in source.stream(query) for key in batch):
            left_out += 1
            if key not in aside:
                lost.append(key)
    return CheckDone(
        name="quarantine",
        verdict="fail" if lost else "pass",
        summary=_quarantine_words(left_out, len(lost)),
        figures={
            "quarantined_rows": left_out - len(lost),
            "unknown_rows": len(lost),
            "keys": [{"kind": "not set aside", "key": ", ".join(key)} for key in lost[:LISTED_KEYS]],
        },
        seconds=clock() - started,
    )


def _quarantine_words(left_out: int, lost: int) -> str:
    if lost:
        return (
            f"{counted(lost, 'row')} of the source cannot be carried, and {'is' if lost == 1 else 'are'} not in"
            " quarantine: run pipeline quarantine --retry"
        )
    return (
        f"{counted(left_out, 'row')} of the source cannot be carried, and {'lies' if left_out == 1 else 'lie'} in"
        " quarantine: pipeline quarantine"
    )
