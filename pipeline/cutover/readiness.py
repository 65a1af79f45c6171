"""Before a cutover: everything that could stop it on its way, found while nothing has been written."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pipeline.check.before import pass_before
from pipeline.check.conditions import check_transactions, read_conditions
from pipeline.check.finding import still_holds
from pipeline.check.footing import CUTOVER_NEED, check_footings
from pipeline.check.pair import read_pair
from pipeline.check.preflight import Finding, refuse_if_needed
from pipeline.check.verify import verify
from pipeline.cutover.backup import check_room, plan_backup
from pipeline.cutover.envfile import parse_lines, plan_switch
from pipeline.cutover.envwrite import EnvEdit, check_editable
from pipeline.cutover.work import PURPOSE, Deed, keep
from pipeline.endpoints import endpoint_from_variables
from pipeline.envfile import Value
from pipeline.errors import PipelineError, RefusedError, StoppedError
from pipeline.events import CheckDone, Event, SyncDone, VerifyDone, Warned
from pipeline.ledger import cutovers
from pipeline.ledger.verdicts import latest_verdicts
from pipeline.move.listing import list_differences
from pipeline.options import CutoverOptions, SyncOptions, VerifyOptions
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Cursor, Session
from pipeline.postgres.fence import rights_missing
from pipeline.postgres.tables import KINDS, Table
from pipeline.settings import Route, Settings, TableMapping
from pipeline.wording import counted

# What a full verify has looked at; without one of these nothing is known of it.
CHECKED = ("counts", "digests", "census", "parity", "recall", "plan")
# Of these, what a catch-up compares while legacy may be written, and the proof again behind the fence.
RENEWED = ("counts", "digests")
OLD_TRANSACTION_SECONDS = 60.0
# A table, and one that is divided; what is written through a view is written elsewhere.
FENCEABLE = ("r", "p")


@dataclass(slots=True, kw_only=True)
class _Seen:
    """What was found so far."""

    findings: list[Finding] = field(default_factory=list)
    verified: datetime | None = None

    def refuse(self, fact: str, hint: str) -> None:
        self.findings.append(Finding(severity="refuse", fact=fact, hint=hint))

    def warn(self, fact: str, hint: str = "") -> None:
        self.findings.append(Finding(severity="warn", fact=fact, hint=hint))

    def error(self, error: PipelineError) -> None:
        if isinstance(error, StoppedError):
            raise error
        self.refuse(error.fact, error.hint)


def check_readiness(
    crew: Crew, route: Route, settings: Settings, options: CutoverOptions, *, has_revisions: bool
) -> Deed:
    """Look at everything; return the evidence. Raises RefusedError with all of what stands in the way.

    ``has_revisions`` says that a ledger can be made on legacy, as the way back needs one there. Nothing is written
    but the verdict on the application's rights, into the ledger.
    """
    seen = _Seen()
    crew.call(_look_at_servers, crew, route, seen)
    if not has_revisions:
        seen.warn(
            "the revisions that make a ledger are not beside this program, and a rollback needs one on legacy",
            "install it from a wheel or run it from its checkout, so that they are there",
        )
    _look_at_files(settings, options, seen)
    _look_where_it_points(settings, route, seen)
    if not options.skip_backup:
        crew.call(_look_at_backup, crew, route, options, seen)
    refuse_if_needed(tuple(seen.findings))
    application = yield from _check_application(crew, route, options, seen)
    lag = _measure_lag(route, options, seen)
    refuse_if_needed(tuple(seen.findings))
    for one in seen.findings:
        yield Warned(fact=one.fact, hint=one.hint)
    assert seen.verified is not None
    evidence: Mapping[str, Any] = {
        "verified_at": seen.verified.isoformat(),
        "lag_rows": lag,
        "application": application,
        "warnings": [one.fact for one in seen.findings],
    }
    summary = f"verified {seen.verified:%Y-%m-%d %H:%M:%S}Z; {counted(lag, 'row')} written since differ"
    return evidence, summary


def _look_at_servers(crew: Crew, route: Route, seen: _Seen) -> None:
    """Look at both servers and tables, the last verdicts, and who could stand in the fence's way."""
    with crew.together((route.source, PURPOSE), (route.target, PURPOSE)) as (source, target):
        conditions = [read_conditions(session, OLD_TRANSACTION_SECONDS) for session in (source, target)]
        for one in conditions:
            seen.findings += [finding for finding in check_transactions(one) if finding.severity == "warn"]
        footings = check_footings(conditions[0].footing, conditions[1].footing, need=CUTOVER_NEED)
        seen.findings += [finding for finding in footings if finding.severity == "refuse"]
        pair = read_pair(crew, source, target, route, to_write=True)
        _check_kind(route.source.name, pair.source, seen)
        with target.transaction(read_only=True) as cursor:
            last = latest_verdicts(cursor, route.table, route.labels)
            _check_verdicts(last, seen, RENEWED if _has_begun(cursor, route.table) else ())
        before = pass_before(source, target, route.table, pair, verified=True)
        if before is None:
            seen.refuse(f"no verify has found {pair.target.qualified} equal on both sides", "run: pipeline verify")
        elif not still_holds(pair, before.source_horizon, before.target_horizon):
            seen.refuse("a server was set back, or replaced, since the last verify", "run: pipeline verify")
        else:
            seen.verified = before.at
        for name, session, table in (
            (route.source.name, source, pair.source),
            (route.target.name, target, pair.target),
        ):
            if table.kind not in FENCEABLE:
                # Refused above, with what to do instead.
                continue
            try:
                missing = rights_missing(session, table)
            except RefusedError as error:
                seen.error(error)
                continue
            if missing:
                fact = f"{name}: the role may not close {table.qualified}: {'; '.join(missing)}"
                seen.warn(fact, "the SQL for it will be printed for the table's owner, and waited for")
        _check_way_back(source, pair.source, seen)


def _check_kind(name: str, table: Table, seen: _Seen) -> None:
    if table.kind not in FENCEABLE:
        seen.refuse(
            f"{name}'s {table.qualified} is {KINDS[table.kind]}: what is written to the tables below it cannot be"
            " refused there",
            "follow the runbook by hand: stop its writers, pipeline sync, pipeline verify, then edit .env",
        )


def _has_begun(cursor: Cursor, mapping: TableMapping) -> bool:
    """Return whether a cutover under way has begun its catch-up."""
    found = cutovers.latest_cutover(cursor, mapping)
    return found is not None and found.ended is None and "catchup" in cutovers.read_steps(cursor, found.id)


def _check_verdicts(last: Mapping[str, tuple[str, str]], seen: _Seen, renewed: Sequence[str]) -> None:
    """Judge the last verdict of every check that a cutover relies on, but for those that it is to renew."""
    if missing := [name for name in CHECKED if name not in last]:
        seen.refuse(f"nothing is known yet of: {', '.join(missing)}", "run: pipeline verify")
    for name, (verdict, summary) in last.items():
        # Whether the application may use the table is looked at anew, below.
        if verdict != "pass" and name not in ("application", *renewed):
            seen.refuse(f"the last verdict of {name} is {verdict}: {summary}", "run: pipeline verify, until it passes")


def _check_way_back(session: Session, table: Table, seen: _Seen) -> None:
    """Look whether new writes could be brought back to legacy: its rows written, and a ledger kept there."""
    name = session.endpoint.name
    ((may_keep,),) = session.rows(
        "SELECT coalesce((SELECT pg_catalog.has_schema_privilege(n.oid, 'CREATE')"
        " AND pg_catalog.has_schema_privilege(n.oid, 'USAGE')"
        " FROM pg_catalog.pg_namespace n WHERE n.nspname = 'pipeline'),"
        " pg_catalog.has_database_privilege(pg_catalog.current_database(), 'CREATE'))"
    )
    if not may_keep:
        seen.warn(
            f"{name}: the role {table.role} may not make the schema pipeline, where a rollback keeps its ledger",
            f"on {name}: GRANT CREATE ON DATABASE {table.quoted_database} TO {table.quoted_role}",
        )
    if table.kind != "r":
        seen.warn(
            f"{name}'s {table.qualified} is {KINDS[table.kind]}: once main is open, a rollback could not bring its new"
            " writes back",
            "after the switch the way back is by hand",
        )
    if not table.may_delete or any(not column.may_insert for column in table.columns):
        seen.warn(
            f"{name}: the role {table.role} may not write {table.qualified}, and a rollback could not bring new writes"
            " back",
            f"on {name}: GRANT INSERT, UPDATE, DELETE ON {table.quoted} TO {table.quoted_role}",
        )


def _look_at_files(settings: Settings, options: CutoverOptions, seen: _Seen) -> None:
    """Look whether the switch can be made in every file."""
    if not options.env_files:
        seen.refuse(
            "there is no .env file that the switch could be made in",
            "name the application's with --env-file; it may be given several times",
        )
    edits = []
    for number, path in enumerate(options.env_files):
        try:
            check_editable(path)
            edits.append(plan_switch(path, settings, with_mock_line=not number))
        except PipelineError as error:
            seen.error(error)
    if edits and len(edits) == len(options.env_files):
        _look_at_the_outcome(edits, seen)
    overruled = [
        name
        for name, value in settings.values.items()
        if name.startswith(("PGVECTOR_", "USE_MOCK")) and value.where == "environment"
    ]
    if options.env_files and overruled:
        seen.warn(
            f"{', '.join(overruled)}: set in this environment, which goes before any .env file",
            "where the application has them from its environment too, change them there by --after-switch",
        )


def _look_at_the_outcome(edits: list[EnvEdit], seen: _Seen) -> None:
    """Refuse where the switched files alone would not say where the application searches: half is set elsewhere."""
    values: dict[str, Value] = {}
    for edit in reversed(edits):
        text = parse_lines(edit.shown, edit.after.decode().lstrip("\ufeff"), "")
        values |= {name: Value(text=value, where=str(edit.shown)) for name, value in text.texts.items()}
    try:
        endpoint_from_variables(values, "the application", "PGVECTOR", "PGVECTOR_DB")
    except PipelineError as error:
        seen.refuse(
            f"after the switch the files alone would not say where the application searches: {error.fact}",
            "write the whole address (PGVECTOR_*) into the files; name all of them with --env-file",
        )


def _look_where_it_points(settings: Settings, route: Route, seen: _Seen) -> None:
    """Refuse where the application is at main already: what it deleted there would come back from legacy."""
    try:
        there = settings.application()
    except PipelineError as error:
        seen.error(error)
        return
    main = route.target
    if there.place == main.place:
        seen.refuse(
            f"PGVECTOR_* is {main.label} already: there is nothing to switch",
            "pipeline status shows the last cutover; to begin anew, let PGVECTOR_* be legacy again",
        )


def _look_at_backup(crew: Crew, route: Route, options: CutoverOptions, seen: _Seen) -> None:
    """Look whether both tables can be dumped, and whether there is room for it."""
    needed = 0
    try:
        for endpoint in (route.source, route.target):
            needed += plan_backup(crew, endpoint, route.table, options.pg_dump).needed_bytes
        check_room(options.backup_folder, needed, options.free_bytes)
    except PipelineError as error:
        seen.error(error)


def _check_application(
    crew: Crew, route: Route, options: CutoverOptions, seen: _Seen
) -> Generator[Event, None, Mapping[str, Any]]:
    """Look whether the application will find main's table, and may use it."""
    found: list[VerifyDone] = []
    wanted = VerifyOptions(checks=("application",), app_role=options.app_role)
    yield from _without_checks(keep(verify(route, wanted, crew), VerifyDone, found))
    (check,) = found[0].checks
    if check.verdict != "pass":
        seen.refuse(f"the application on main: {check.summary}", "run: pipeline verify --check application")
    return {"verdict": check.verdict, "summary": check.summary}


def _measure_lag(route: Route, options: CutoverOptions, seen: _Seen) -> int:
    """Count the rows that differ by now, of those that were written since both sides were equal."""
    wanted = SyncOptions(settle_seconds=0.0, delete_equal=True)
    with closing(list_differences(route, wanted, for_sync=True)) as events:
        (done,) = (event for event in events if isinstance(event, SyncDone))
    if done.touched > options.max_lag_rows:
        seen.refuse(
            f"{counted(done.touched, 'row')} differ, written since the last sync; {options.max_lag_rows:,} may",
            "run: pipeline sync, and this again; or raise --max-lag",
        )
    if done.kept:
        seen.refuse(
            f"{counted(done.kept, 'row')} of main were written by somebody else, and a sync would leave them alone",
            "pipeline sync --dry-run lists them; then choose --on-conflict or --delete, and run this again",
        )
    return done.touched


def _without_checks(events: Generator[Event, None, None]) -> Iterator[Event]:
    return (event for event in events if not isinstance(event, CheckDone | VerifyDone))
