"""Commands that switch: cutover, its rehearsal, the way back, and what ends the possibility of one."""

import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from pipeline import options
from pipeline.cli.observing import observed
from pipeline.cli.parameters import Command, json_option
from pipeline.endpoints import Endpoint
from pipeline.errors import RefusedError
from pipeline.events import CutoverDone, Event
from pipeline.settings import Route, Settings

_env_files = click.option(
    "--env-file",
    "env_files",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="A file that the switch edits; may be given several times: the first one goes before the others.  "
    "[default: ./.env]",
)
_after = click.option(
    "--after-switch",
    "after_switch",
    multiple=True,
    metavar="COMMAND",
    help="Run this by the shell once the settings are changed, as to restart the application; may be given several"
    " times.",
)
_execute = click.option("--execute", is_flag=True, help="Do it. Without it, the plan is shown and nothing is done.")
_yes = click.option("--yes", is_flag=True, help="Do not ask before the point of no return.")
_fence_wait = click.option(
    "--fence-wait",
    "fence_seconds",
    type=click.FloatRange(1, 3600),
    default=options.DEFAULT_FENCE_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="Try to close a table for this long, half a second at a time.",
)
_owner_wait = click.option(
    "--owner-wait",
    "owner_seconds",
    type=click.FloatRange(0, 86_400),
    default=options.DEFAULT_OWNER_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="Where a table's owner has to close or open it, wait for this long.",
)


class _Search:
    """The application's search, on an engine of its own."""

    def by_vector(
        self, endpoint: Endpoint, settings: Settings, vector: Sequence[float], k: int
    ) -> list[tuple[str, float]]:
        """Search by a vector that is stored."""
        with self._repository(endpoint, settings) as repository:
            return [(str(hit.id), hit.distance) for hit in repository.search_by_vector(vector, k)]

    def by_text(self, endpoint: Endpoint, settings: Settings, text: str, k: int) -> list[tuple[str, float]]:
        """Search by a text, which Ollama embeds."""
        with self._repository(endpoint, settings) as repository:
            return [(str(hit.id), hit.distance) for hit in repository.search(text, k)]

    @contextmanager
    def _repository(self, endpoint: Endpoint, settings: Settings) -> Iterator[Any]:
        from pipeline.search.embedders import OllamaEmbedder
        from pipeline.search.repository import EmbeddingRepository, engine_for

        embedder = OllamaEmbedder(settings.ollama_url, settings.ollama_model, settings.dimensions)
        engine = engine_for(endpoint)
        try:
            yield EmbeddingRepository(engine, settings.table, embedder)
        finally:
            # No session stays behind a search: the server may have few, and the cutover has its own.
            engine.dispose()


def _files(env_files: tuple[Path, ...]) -> tuple[Path, ...]:
    """Return the files that the switch edits: those that were named, else the one that settings are read from."""
    return env_files or ((Path(".env"),) if Path(".env").is_file() else ())


def _load(env_files: tuple[Path, ...]) -> tuple[Settings, Route]:
    """Read the settings as they are, or were before a switch that is under way."""
    settings = Settings.load(env_files)
    if len(env_files) > 1:
        from pipeline.cutover.engine import files_before

        settings = Settings.load(files_before(settings.endpoint("main"), settings.table, env_files))
    return settings, settings.route("legacy", "main")


def _stamp() -> str:
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")


def _tools() -> Any:
    from pipeline.cutover.work import Tools
    from pipeline.install import has_revisions, install_ledger

    return Tools(search=_Search(), install_ledger=install_ledger, has_revisions=has_revisions)


def _confirm(route: Route, yes: bool, fact: str) -> None:
    """Have main's address typed, where somebody is there to do it. Raises RefusedError and UsageError."""
    if yes:
        return
    _need_somebody(fact)
    word = route.target.label
    sys.stderr.write(f"{fact}.\nType {word} to go on: ")
    sys.stderr.flush()
    if sys.stdin.readline().strip() != word:
        raise RefusedError("that is not what was to be typed; nothing more was done", "run the same command again")


def _need_somebody(fact: str) -> None:
    """Raise UsageError where nobody could answer."""
    if not sys.stdin.isatty():
        raise click.UsageError(f"{fact}; nobody is there to be asked: add --yes")


def _run(events: Generator[Event, None, None], as_json: bool) -> CutoverDone:
    from pipeline.show.plain import print_json, print_text
    from pipeline.show.switching import cutover_summary

    (done,) = observed(events, CutoverDone)
    if as_json:
        print_json({done.kind: asdict(done)})
    else:
        print_text(cutover_summary(done))
    return done


def _show(outline: object, as_json: bool) -> None:
    from pipeline.cutover.outline import Outline
    from pipeline.show.plain import print_json, print_text
    from pipeline.show.switching import outline_lines

    assert isinstance(outline, Outline)
    if as_json:
        print_json({"plan": asdict(outline)})
    else:
        print_text(outline_lines(outline))


def _backup_options(command: Command) -> Command:
    """Add what is said about the backup."""
    shared = (
        click.option(
            "--backup-dir",
            "backup_folder",
            type=click.Path(path_type=Path, file_okay=False),
            default=options.DEFAULT_BACKUP_FOLDER,
            show_default=True,
            help="Where the dumps of both tables go.",
        ),
        click.option(
            "--min-free",
            type=click.FloatRange(0),
            default=options.DEFAULT_FREE_BYTES / 2**30,
            show_default=True,
            metavar="GIB",
            help="So much has to stay free there.",
        ),
        click.option("--skip-backup", is_flag=True, help="Make no dumps; that is written down."),
        click.option(
            "--pg-dump",
            type=click.Path(path_type=Path, dir_okay=False),
            help="The pg_dump to take.  [default: the one that fits the server best]",
        ),
    )
    for option in reversed(shared):
        command = option(command)
    return command


@click.command()
@_env_files
@_execute
@click.option("--rehearse", is_flag=True, help="Everything but the switch: the fence stands for seconds.")
@click.option("--scratch", is_flag=True, help="With --rehearse: on copies of both tables and files, with the switch.")
@click.option("--until", type=click.Choice(options.STEPS), help="Stop after this step; the next command goes on.")
@_yes
@_after
@click.option(
    "--app-role", metavar="ROLE", help="The role that the application connects to main as.  [default: DB_USER]"
)
@click.option(
    "--max-lag",
    "max_lag_rows",
    type=click.IntRange(0),
    default=options.DEFAULT_MAX_LAG_ROWS,
    show_default=True,
    metavar="ROWS",
    help="Begin with no more rows than that still to be brought.",
)
@click.option("--deep", is_flag=True, help="Compare every row under the fence, also those that nobody touched.")
@_backup_options
@_fence_wait
@_owner_wait
@click.option(
    "--fence-limit",
    "fence_limit_seconds",
    type=click.FloatRange(1, 86_400),
    default=options.DEFAULT_FENCE_LIMIT_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="The fence of a rehearsal ends by itself after this long, also where nobody is left to lift it.",
)
@click.option(
    "--watch",
    "watch_seconds",
    type=click.FloatRange(0, 86_400),
    default=options.DEFAULT_WATCH_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="After the switch, look for this long who still writes to legacy, and how main answers.",
)
@click.option(
    "--max-latency",
    "max_latency_ms",
    type=click.FloatRange(1),
    default=options.DEFAULT_LATENCY_MILLISECONDS,
    show_default=True,
    metavar="MS",
    help="95 of 100 searches on main may take no longer meanwhile.",
)
@click.option(
    "--smoke-text",
    "smoke_texts",
    multiple=True,
    metavar="TEXT",
    help="A question that main has to answer after the switch, by Ollama; may be given several times.",
)
@json_option
def cutover(
    env_files: tuple[Path, ...],
    execute: bool,
    rehearse: bool,
    scratch: bool,
    until: str | None,
    yes: bool,
    min_free: float,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Switch the application from legacy to main, step by step; without --execute, show the plan.

    Preflight, backup, catch-up, fence, proof, switch, smoke, watch. Each step is written down before and after
    it, and can be taken back by pipeline rollback. Interrupted, killed or failed, the same command goes on. It
    asks before legacy is closed: what is written there from then on is refused.
    """
    from pipeline.cutover import engine
    from pipeline.cutover.outline import outline_cutover

    if execute and rehearse:
        raise click.UsageError("--execute and --rehearse: say which of the two")
    if until is not None and rehearse:
        raise click.UsageError("--until is for a cutover; a rehearsal takes all steps")
    if scratch and not rehearse:
        raise click.UsageError("--scratch is for --rehearse")
    files = _files(env_files)
    settings, route = _load(files)
    wanted = options.CutoverOptions(
        env_files=files,
        free_bytes=int(min_free * 2**30),
        until=until,
        **chosen,
    )
    if not (execute or rehearse):
        _show(outline_cutover(route, wanted), as_json)
        return
    tools = _tools()
    if rehearse:
        if scratch:
            from pipeline.cutover.scratch import rehearse_on_scratch

            _run(rehearse_on_scratch(route, settings, wanted, tools, _stamp()), as_json)
            return
        _confirm(route, yes, f"for seconds, {route.source.label} will refuse writes to {route.table.qualified}")
        _run(engine.rehearse(route, settings, wanted, tools, _stamp()), as_json)
        return
    asked = options.STEPS.index(until or options.STEPS[-1]) >= options.STEPS.index("fence")
    if asked and not yes and engine.next_step(route) in options.STEPS[: options.STEPS.index("fence") + 1]:
        fact = (
            f"from now on {route.source.label} will refuse writes to {route.table.qualified}, and then the application"
            " is switched to main"
        )
        _need_somebody(fact)
        # What can be done without anybody noticing is done first; nobody waits for an answer behind a fence.
        observed(engine.cutover(route, settings, replace(wanted, until="catchup"), tools, _stamp()), CutoverDone)
        _confirm(route, yes, fact)
    _run(engine.cutover(route, settings, wanted, tools, _stamp()), as_json)


@click.command()
@_env_files
@_execute
@_yes
@_after
@click.option("--deep", is_flag=True, help="Compare every row before legacy is opened.")
@click.option("--take-main", is_flag=True, help="Overwrite rows that legacy took although it was closed, with main's.")
@_fence_wait
@_owner_wait
@json_option
def rollback(env_files: tuple[Path, ...], execute: bool, yes: bool, as_json: bool, **chosen: Any) -> None:
    """Go back to legacy, from any step of a cutover; without --execute, show the plan.

    After the switch, main is closed first, and what was written there is brought to legacy and compared; then
    the .env files are as they were, and legacy is open again. Refused where legacy took writes meanwhile.
    """
    from pipeline.cutover.back import rollback as go_back
    from pipeline.cutover.outline import outline_rollback

    files = _files(env_files)
    settings, route = _load(files)
    wanted = options.CutoverOptions(env_files=files, **chosen)
    plan = outline_rollback(route, wanted)
    if not execute:
        _show(plan, as_json)
        return
    if plan.cutover is not None and len(plan.steps) > 1:
        _confirm(route, yes, f"{route.target.label} will refuse writes to {route.table.qualified}; legacy takes over")
    _run(go_back(route, settings, wanted, _tools()), as_json)


@click.command()
@_env_files
@_yes
@_owner_wait
@json_option
def finalize(env_files: tuple[Path, ...], yes: bool, as_json: bool, **chosen: Any) -> None:
    """End the possibility of a rollback, and remove the pipeline's own objects from legacy.

    Legacy's table keeps its rows, and takes writes again. After a rollback, main's table is opened.
    """
    from pipeline.cutover.finalize import finalize as end

    files = _files(env_files)
    settings, route = _load(files)
    wanted = options.CutoverOptions(env_files=files, **chosen)
    _confirm(route, yes, f"after this, no pipeline rollback takes {route.table.qualified} back to legacy")
    _run(end(route, settings, wanted, _tools()), as_json)
