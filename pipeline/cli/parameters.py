"""Options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pipeline import options

Command = Callable[..., Any]

env_file_option = click.option(
    "--env-file",
    "env_files",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Read settings from this file instead of ./.env; the environment goes first. May be given several times: the"
    " first file that has a variable counts.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
_from = click.option("--from", "source", default="legacy", show_default=True, help="The source: legacy, main or a URL.")
_to = click.option("--to", "target", default="main", show_default=True, help="The target: legacy, main or a URL.")
ignore_option = click.option(
    "--ignore-column",
    "ignore_columns",
    multiple=True,
    metavar="NAME",
    help="Leave this column of the source behind, and do not compare it; may be given several times.",
)
rounding_option = click.option(
    "--allow-rounding",
    "rounding",
    is_flag=True,
    help="Let a vector become a halfvec on main, which loses half of its digits.",
)
conflict_option = click.option(
    "--on-conflict",
    type=click.Choice(["refuse", "keep", "overwrite"]),
    default="refuse",
    show_default=True,
    help="What becomes of a row of main with a key of legacy's and other content, that no copy brought.",
)


def ends_options(command: Command) -> Command:
    """Add --from and --to."""
    return _from(_to(command))


def workers_option(text: str, default: int = options.DEFAULT_WORKERS) -> Callable[[Command], Command]:
    """Return --workers, with what the command does with them."""
    return click.option("--workers", type=click.IntRange(1, 64), default=default, show_default=True, help=text)


def queries_options(command: Command) -> Command:
    """Add --queries and --k."""
    count = click.option(
        "--queries",
        type=click.IntRange(1, 10_000),
        default=options.DEFAULT_QUERIES,
        show_default=True,
        help="Ask for this many stored vectors.",
    )
    neighbours = click.option(
        "--k", type=click.IntRange(1, 1_000), default=options.DEFAULT_K, show_default=True, help="Neighbours of each."
    )
    return count(neighbours(command))


def settle_option(command: Command) -> Command:
    """Add --settle."""
    return click.option(
        "--settle",
        type=click.FloatRange(0, 3600),
        default=options.DEFAULT_SETTLE_SECONDS,
        show_default=True,
        metavar="SECONDS",
        help="While somebody writes, a difference counts if it is still there after this long.",
    )(command)
