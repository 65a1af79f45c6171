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
    rounding_option,
    workers_option,
)
from pipeline.errors import EXIT_DIFFERENCES, EXIT_OK, EXIT_REFUSED
from pipeline.events import CheckDone
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
    env_file: Path | None,
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
        inspect(Settings.load(env_file).route(source, target, ignore_columns, rounding=rounding), chosen), Inspected
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
    "--queries",
    type=click.IntRange(1, 10_000),
    default=options.DEFAULT_QUERIES,
    show_default=True,
    help="Ask for this many stored vectors on both sides.",
)
@click.option(
    "--k", type=click.IntRange(1, 1_000), default=options.DEFAULT_K, show_default=True, help="Neighbours of each."
)
@ignore_option
@rounding_option
@json_option
def verify(
    source: str,
    target: str,
    env_file: Path | None,
    queries: int,
    k: int,
    ignore_columns: tuple[str, ...],
    rounding: bool,
    as_json: bool,
) -> None:
    """Compare the two sides: counts, every byte of every row, and what search finds.

    Reads both sides at once and writes nothing but the verdicts, into the ledger on main. Ends with
    exit code 3 where anything differs.
    """
    from pipeline.check.verify import verify as engine_verify
    from pipeline.show.plain import print_json
    from pipeline.show.tables import print_checks

    route = Settings.load(env_file).route(source, target, ignore_columns, rounding=rounding)
    results = observed(engine_verify(route, options.VerifyOptions(queries=queries, k=k)), CheckDone)
    passed = all(result.verdict == "pass" for result in results)
    if as_json:
        print_json({"verdict": "pass" if passed else "fail", "checks": [asdict(result) for result in results]})
    else:
        print_checks(results)
    sys.exit(EXIT_OK if passed else EXIT_DIFFERENCES)
