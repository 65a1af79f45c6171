"""Commands that judge: what stands in the way of a copy, and whether both sides are equal after it."""

import sys
from dataclasses import asdict
from pathlib import Path

import click

from pipeline import options
from pipeline.cli.observing import observed
from pipeline.cli.parameters import (
    ends_options,
    env_file_option,
    ignore_option,
    json_option,
    queries_options,
    rounding_option,
    settle_option,
    workers_option,
)
from pipeline.errors import EXIT_DIFFERENCES, EXIT_OK, EXIT_REFUSED
from pipeline.events import VerifyDone
from pipeline.settings import Settings


@click.command()
@ends_options
@env_file_option
@workers_option("Ask for room for a copy with this many workers.")
@click.option("--no-census", is_flag=True, help="Read no rows but a sample, and judge none.")
@ignore_option
@rounding_option
@json_option
def preflight(
    source: str,
    target: str,
    env_files: tuple[Path, ...],
    workers: int,
    no_census: bool,
    ignore_columns: tuple[str, ...],
    rounding: bool,
    as_json: bool,
) -> None:
    """Find every reason that a copy could fail, before a row moves; read-only on both sides.

    Ends with exit code 4 where a copy would be refused.
    """
    from pipeline.check.inspection import Inspected, inspect
    from pipeline.show.findings import print_inspection
    from pipeline.show.plain import print_json

    chosen = options.PreflightOptions(workers=workers, census=not no_census)
    (found,) = observed(
        inspect(Settings.load(env_files).route(source, target, ignore_columns, rounding=rounding), chosen), Inspected
    )
    if as_json:
        print_json({"preflight": {"verdict": found.verdict, **asdict(found)}})
    else:
        print_inspection(found)
    sys.exit(EXIT_REFUSED if found.verdict == "refused" else EXIT_OK)


@click.command()
@ends_options
@env_file_option
@click.option(
    "--incremental",
    is_flag=True,
    help="Compare only the rows that were written, on either side, since both were found equal.",
)
@click.option(
    "--check",
    "checks",
    multiple=True,
    type=click.Choice(options.CHECKS),
    help="Run this check only; may be given several times. rows: their number, and every byte.",
)
@queries_options
@click.option(
    "--budget",
    type=click.FloatRange(0.001, 86_400),
    default=options.DEFAULT_BUDGET_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="End each check of search after this long; it tells how many queries it reached.",
)
@click.option(
    "--min-recall",
    type=click.FloatRange(0, 1),
    default=options.DEFAULT_MIN_RECALL,
    show_default=True,
    metavar="SHARE",
    help="What main's ANN index must find, as a mean, of what exact search finds.",
)
@click.option(
    "--app-role",
    metavar="ROLE",
    help="The role that the application connects to main as.  [default: the one that verify connects as]",
)
@workers_option("Sessions that read each side while rows are compared.", default=1)
@settle_option
@click.option("--restart", is_flag=True, help="Begin an interrupted comparison anew.")
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="Write all of it as one page, with plots, to keep with a change request.",
)
@ignore_option
@rounding_option
@json_option
def verify(
    source: str,
    target: str,
    env_files: tuple[Path, ...],
    incremental: bool,
    checks: tuple[str, ...],
    queries: int,
    k: int,
    budget: float,
    min_recall: float,
    app_role: str | None,
    workers: int,
    settle: float,
    restart: bool,
    report: Path | None,
    ignore_columns: tuple[str, ...],
    rounding: bool,
    as_json: bool,
) -> None:
    """Prove that both sides are equal, and that search on main finds the same.

    Counts and every byte of every row, what is in the vectors, exact search on both sides, the ANN index
    against exact search, the plan and the time of the application's query, and whether its role finds the
    table. Reads both sides at once and writes nothing but the verdicts, into the ledger on main. Ends with
    exit code 3 where a check fails, or could not look at all that it had to (partial). Interrupted, the
    comparison of rows goes on where it was.
    """
    from pipeline.check.verify import verify as engine_verify
    from pipeline.show.plain import print_json
    from pipeline.show.tables import print_checks

    settings = Settings.load(env_files)
    route = settings.route(source, target, ignore_columns, rounding=rounding)
    chosen = options.VerifyOptions(
        queries=queries,
        k=k,
        budget_seconds=budget,
        min_recall=min_recall,
        app_role=app_role,
        workers=workers,
        settle_seconds=settle,
        incremental=incremental,
        restart=restart,
        checks=checks,
    )
    if report is not None:
        from pipeline.show.report import check_report_path

        check_report_path(report)
    (done,) = observed(engine_verify(route, chosen), VerifyDone)
    if report is not None:
        from pipeline.show.report import write_report

        write_report(report, done, [(one.variable, one.shown) for one in settings.origins()])
    if as_json:
        print_json({**asdict(done), "began": done.began.isoformat(), "ended": done.ended.isoformat()})
    else:
        print_checks(done.checks)
    sys.exit(EXIT_OK if done.verdict == "pass" else EXIT_DIFFERENCES)
