"""The command line: parse, call one engine function, render, exit code.

The engine is imported inside the commands, so that --help answers at once.
"""

import os
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from pipeline import __version__, options
from pipeline.errors import (
    EXIT_DIFFERENCES,
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_TERMINATED,
    PipelineError,
    SettingsError,
    StoppedError,
    TerminatedError,
)
from pipeline.events import CheckDone, CopyDone, Event
from pipeline.settings import Settings

MEGABYTE = 1_000_000
Command = Callable[..., Any]

EPILOG = """\b
A move, from the first command to the last:
  alembic upgrade head                     extension, table, index and ledger on main
  pipeline copy --from legacy --to main    move the rows; run it again to go on
  pipeline verify                          counts, every byte, and what search finds
  pipeline search "some text"              ask main as the application will

\b
Exit codes: 0 done, 1 error, 2 usage or settings, 3 differences found,
4 refused by a check (nothing changed), 5 a server out of reach (run it again),
6 another copy is running, 130 and 143 stopped by a signal (run it again).
"""


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", prog_name="pipeline")
def cli() -> None:
    """Move embeddings between PostgreSQL hosts, and prove that search answers the same."""


def _env_file(command: Command) -> Command:
    return click.option(
        "--env-file",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Read settings from this file instead of ./.env; the environment goes first.",
    )(command)


def _as_json(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(command)


def _ends(command: Command) -> Command:
    command = click.option(
        "--to", "target", default="main", show_default=True, help="The target: legacy, main, or a URL."
    )(command)
    return click.option(
        "--from", "source", default="legacy", show_default=True, help="The source: legacy, main, or a URL."
    )(command)


@cli.command(name="settings")
@_env_file
@_as_json
def settings_command(env_file: Path | None, as_json: bool) -> None:
    """Show every setting, where it came from, and what the endpoints resolve to."""
    from pipeline.show.tables import print_json, print_settings

    settings = Settings.load(env_file)
    endpoints: dict[str, str] = {}
    for name in ("legacy", "main"):
        try:
            endpoints[name] = settings.endpoint(name).label
        except SettingsError as error:
            endpoints[name] = f"incomplete: {error.fact}"
    origins = list(settings.origins())
    if as_json:
        print_json({"settings": [asdict(origin) for origin in origins], "endpoints": endpoints})
    else:
        print_settings(origins, endpoints)


@cli.command()
@_ends
@_env_file
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    default=options.DEFAULT_WORKERS,
    show_default=True,
    help="Slices moved at the same time, each on two connections.",
)
@click.option(
    "--slice-size",
    type=click.IntRange(1, 1024),
    default=options.DEFAULT_SLICE_BYTES // 2**20,
    show_default=True,
    metavar="MIB",
    help="Aim at this many mebibytes a slice. A run keeps the slices that it was planned with.",
)
@click.option(
    "--deadline",
    type=click.FloatRange(0, 86_400),
    default=options.DEFAULT_DEADLINE_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="Try again for this long after a lost connection.",
)
@click.option(
    "--restart", is_flag=True, help="Give the unfinished run up and begin a new one; the table must be empty."
)
@_as_json
def copy(
    source: str,
    target: str,
    env_file: Path | None,
    workers: int,
    slice_size: int,
    deadline: float,
    restart: bool,
    as_json: bool,
) -> None:
    """Move all rows from one server to the other, each exactly once.

    Stopped at any point, by whatever means, the same command goes on where it was. Legacy is only
    read. Main gets the rows; its secondary indexes are dropped first and built again afterwards.
    """
    from pipeline.move.copy import copy as engine_copy
    from pipeline.show.tables import print_json, print_text
    from pipeline.show.words import copy_summary

    settings = Settings.load(env_file)
    chosen = options.CopyOptions(
        workers=workers, slice_bytes=slice_size * 2**20, deadline_seconds=deadline, restart=restart
    )
    events = _observed(engine_copy(settings.route(source, target), chosen))
    done = next(event for event in events if isinstance(event, CopyDone))
    if as_json:
        print_json({"copy": asdict(done)})
    else:
        print_text(copy_summary(done))


@cli.command()
@_ends
@_env_file
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
@_as_json
def verify(source: str, target: str, env_file: Path | None, queries: int, k: int, as_json: bool) -> None:
    """Compare the two sides: counts, every byte of every row, and what search finds.

    Reads both sides at once and writes nothing but the verdicts, into the ledger on main. Ends with
    exit code 3 where anything differs.
    """
    from pipeline.check.verify import verify as engine_verify
    from pipeline.show.tables import print_checks, print_json

    settings = Settings.load(env_file)
    chosen = options.VerifyOptions(queries=queries, k=k)
    events = _observed(engine_verify(settings.route(source, target), chosen))
    results = [event for event in events if isinstance(event, CheckDone)]
    passed = all(result.verdict == "pass" for result in results)
    if as_json:
        print_json({"verdict": "pass" if passed else "fail", "checks": [asdict(result) for result in results]})
    else:
        print_checks(results)
    sys.exit(EXIT_OK if passed else EXIT_DIFFERENCES)


@cli.command()
@_env_file
@click.option("--to", "target", default="main", show_default=True, help="The target: main, or a URL.")
@_as_json
def status(env_file: Path | None, target: str, as_json: bool) -> None:
    """Show runs, their progress, and the last verdicts, from the ledger on main."""
    from pipeline.show.tables import print_json, print_state
    from pipeline.status import read_state

    state = read_state(Settings.load(env_file).endpoint(target))
    if as_json:
        print_json(asdict(state))
    else:
        print_state(state)


@cli.command()
@click.argument("text")
@_env_file
@click.option("--k", type=click.IntRange(1, 1_000), default=4, show_default=True, help="Return this many passages.")
@_as_json
def search(text: str, env_file: Path | None, k: int, as_json: bool) -> None:
    """Search main for TEXT, as the application will: embedded by Ollama, nearest first."""
    from pipeline.search.embedders import OllamaEmbedder
    from pipeline.search.repository import EmbeddingRepository, engine_for
    from pipeline.show.tables import print_hits, print_json

    settings = Settings.load(env_file)
    engine = engine_for(settings.endpoint("main"))
    embedder = OllamaEmbedder(settings.ollama_url, settings.ollama_model, settings.dimensions)
    hits = EmbeddingRepository(engine, settings.table, embedder).search(text, k)
    if as_json:
        print_json({"query": text, "hits": [{**asdict(hit), "id": str(hit.id)} for hit in hits]})
    else:
        print_hits(hits)


@cli.command()
@click.option(
    "--rows",
    type=click.IntRange(1, 1_000_000),
    metavar="N",
    help="Fill legacy with N rows: fewer passages, or repeated ones with perturbed vectors.  [default: the corpus]",
)
@click.option("--keep", is_flag=True, help="Leave the servers running, with a ready .env file.")
@click.option("--stop", is_flag=True, help="End a kept demo and remove everything.")
def demo(rows: int | None, keep: bool, stop: bool) -> None:
    """Play the whole move on two embedded servers with a real corpus; needs no database of yours."""
    if stop and (keep or rows is not None):
        raise click.UsageError("--stop goes alone")
    try:
        from pipeline.demo import story
    except ModuleNotFoundError as error:
        raise PipelineError(f"the demo needs {error.name}", 'pip install "embeddings-pipeline[demo]"') from error
    if stop:
        click.echo("the demo is gone" if story.stop() else "there was no demo")
        return
    step = 0
    for line in story.tell(rows, keep):
        if line.heading:
            step += 1
            click.echo(click.style(f"\n{step}  {line.text}", bold=True))
        else:
            click.echo(f"   {line.text}")
        sys.stdout.flush()


def _observed(events: Generator[Event, None, None]) -> Generator[Event, None, None]:
    """Show events as they come, on a terminal as bars and elsewhere as log lines, and hand them on."""
    from pipeline.show.log import LogObserver, configure

    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        from pipeline.show.console import TerminalObserver

        observer: TerminalObserver | LogObserver = TerminalObserver()
    else:
        configure()
        observer = LogObserver()
    with observer, closing(events) as running:
        for event in running:
            observer.on(event)
            yield event


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
