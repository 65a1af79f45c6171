"""Commands that look: at the settings, at the state of the runs, and at main as the application will."""

from dataclasses import asdict
from pathlib import Path

import click

from pipeline.cli.parameters import ends_options, env_file_option, json_option
from pipeline.errors import RefusedError, SettingsError
from pipeline.settings import Settings


@click.command(name="settings")
@env_file_option
@json_option
def settings_command(env_files: tuple[Path, ...], as_json: bool) -> None:
    """Show every setting, where it came from, and what the endpoints resolve to."""
    from pipeline.show.plain import print_json
    from pipeline.show.tables import print_settings

    settings = Settings.load(env_files)
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


@click.command()
@env_file_option
@ends_options
@json_option
def status(env_files: tuple[Path, ...], source: str, target: str, as_json: bool) -> None:
    """Show runs, their progress, and the last verdicts, from the ledger on main.

    A verdict is stale once one of the tables was written: both sides are asked, legacy only if it answers.
    """
    from pipeline.show.plain import print_json
    from pipeline.show.tables import print_state
    from pipeline.status import read_state

    settings = Settings.load(env_files)
    try:
        legacy = settings.endpoint(source)
    except SettingsError:
        # The ledger can be read without it.
        legacy = None
    state = read_state(settings.route(target, target), legacy)
    if as_json:
        print_json(asdict(state))
    else:
        print_state(state)


@click.command()
@click.argument("text")
@env_file_option
@click.option("--k", type=click.IntRange(1, 1_000), default=4, show_default=True, help="Return this many passages.")
@json_option
def search(text: str, env_files: tuple[Path, ...], k: int, as_json: bool) -> None:
    """Search main for TEXT, as the application will: embedded by Ollama, nearest first.

    Refused where the settings give the application a mock.
    """
    from pipeline.search.choice import read_choice, repository_for
    from pipeline.search.repository import engine_for
    from pipeline.show.plain import print_json
    from pipeline.show.tables import print_hits

    settings = Settings.load(env_files)
    engine = engine_for(settings.endpoint("main"))
    if (choice := read_choice(settings)).mock:
        raise RefusedError(
            f"USE_MOCK_EMBEDDINGS ({choice.where}) gives the application a mock, which would answer nothing",
            "set USE_MOCK_EMBEDDINGS=false there; pipeline mock shows what the settings give",
        )
    hits = repository_for(settings, engine).search(text, k)
    if as_json:
        print_json({"query": text, "hits": [{**asdict(hit), "id": str(hit.id)} for hit in hits]})
    else:
        print_hits(hits)


@click.command()
@env_file_option
@json_option
def mock(env_files: tuple[Path, ...], as_json: bool) -> None:
    """Show whether the settings give the application a mock, and where PGVECTOR_* points. Connects to nothing."""
    from pipeline.search.choice import read_choice
    from pipeline.show.plain import print_json, print_text

    choice = read_choice(Settings.load(env_files))
    if as_json:
        found = asdict(choice)
        print_json({"repository": "mock" if found.pop("mock") else "real", **found})
        return
    what = "a mock: every search answers nothing" if choice.mock else "the repository: searches are answered"
    print_text(f"the settings give {what}")
    print_text(f"USE_MOCK_EMBEDDINGS={choice.value} ({choice.where})")
    place = (
        "is not known to point to main or legacy" if choice.points_to == "unknown" else f"points to {choice.points_to}"
    )
    print_text(f"PGVECTOR_* {place}: {choice.problem or choice.label}")
    if choice.mock:
        print_text("next: set USE_MOCK_EMBEDDINGS=false, and start the application again")
