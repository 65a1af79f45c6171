"""The group of all commands, and the one place that turns errors and signals into exit codes."""

import io
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import click

from pipeline import __version__
from pipeline.cli.baselines import baseline
from pipeline.cli.checking import preflight, verify
from pipeline.cli.copying import copy, quarantine
from pipeline.cli.looking import mock, search, settings_command, status
from pipeline.cli.playing import demo
from pipeline.cli.switching import cutover, finalize, rollback
from pipeline.cli.syncing import diff, sync
from pipeline.errors import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_TERMINATED,
    PipelineError,
    StoppedError,
    TerminatedError,
)

EPILOG = """\b
A move, from the first command to the last:
  alembic upgrade head                     extension, table, index and ledger on main
  pipeline preflight                       every reason that the copy could fail
  pipeline baseline capture                what search finds on legacy today
  pipeline copy --from legacy --to main    move the rows; run it again to go on
  pipeline verify                          every byte, and that search finds the same
  pipeline sync                            bring what legacy has written since
  pipeline search "some text"              ask main as the application will
  pipeline cutover --rehearse              everything but the switch
  pipeline cutover --execute               the switch, step by step
  pipeline rollback --execute              back, with what was written on main since

\b
Exit codes: 0 done, 1 error, 2 usage or settings, 3 differences found,
4 refused by a check (nothing changed), 5 a server out of reach (run it again),
6 another copy, sync or cutover is running, 130 and 143 stopped by a signal (run it again).
"""


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", prog_name="pipeline")
def cli() -> None:
    """Move embeddings between PostgreSQL hosts, and prove that search answers the same."""


for _command in (
    settings_command,
    preflight,
    copy,
    quarantine,
    baseline,
    verify,
    diff,
    sync,
    status,
    search,
    demo,
    mock,
    cutover,
    rollback,
    finalize,
):
    cli.add_command(_command)


def _on_signal(number: int, _frame: FrameType | None) -> NoReturn:
    """Stop in an orderly way at the first signal, at once at the second."""
    code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_TERMINATED
    for further in (signal.SIGINT, signal.SIGTERM):
        signal.signal(further, lambda *_: os._exit(code))
    hint = "what was committed stays; run the same command again to go on"
    raise StoppedError("interrupted", hint) if number == signal.SIGINT else TerminatedError("terminated", hint)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the one place that turns errors into exit codes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _on_signal)
    # Asked for its state where it has none, a command goes on; the default would end it.
    signal.signal(signal.SIGUSR1, lambda *_: None)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A text with characters that a terminal's encoding lacks is shown without them, not an error.
        sys.stdout.reconfigure(errors="replace")
    code = EXIT_ERROR
    try:
        code = cli.main(args=None if arguments is None else list(arguments), standalone_mode=False) or EXIT_OK
    except PipelineError as error:
        from pipeline.show.words import error_lines

        sys.stderr.write(error_lines(error) + "\n")
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except click.Abort:
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe went away: nobody is left to tell, and the shell shows its own status.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
