"""The commands of the baseline: what search finds on the source, frozen before anything moves."""

from dataclasses import asdict
from pathlib import Path

import click

from pipeline.cli.observing import observed
from pipeline.cli.parameters import (
    ends_options,
    env_file_option,
    ignore_option,
    json_option,
    queries_options,
    rounding_option,
)
from pipeline.errors import SettingsError
from pipeline.settings import Settings


@click.group()
def baseline() -> None:
    """Freeze what search finds on legacy, for verify to compare with later."""


@baseline.command()
@ends_options
@env_file_option
@queries_options
@click.option(
    "--texts",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Ask for these texts too, one a line, embedded by Ollama.",
)
@ignore_option
@rounding_option
@json_option
def capture(
    source: str,
    target: str,
    env_files: tuple[Path, ...],
    queries: int,
    k: int,
    texts: Path | None,
    ignore_columns: tuple[str, ...],
    rounding: bool,
    as_json: bool,
) -> None:
    """Keep queries and the exact rows that legacy finds for them, in the ledger on main.

    Legacy is only read. pipeline verify asks both sides the newest capture's queries again, and says where the
    answers are no longer those.
    """
    from pipeline.check.baseline import BaselineDone, CaptureOptions
    from pipeline.check.baseline import capture as engine_capture
    from pipeline.show.baselines import captured_lines
    from pipeline.show.plain import print_json, print_text

    settings = Settings.load(env_files)
    route = settings.route(source, target, ignore_columns, rounding=rounding)
    embedded = () if texts is None else _embedded(settings, _lines(texts))
    (done,) = observed(engine_capture(route, CaptureOptions(queries=queries, k=k, texts=embedded)), BaselineDone)
    if as_json:
        print_json({"baseline": asdict(done)})
    else:
        print_text(captured_lines(done))


def _lines(path: Path) -> list[str]:
    """Return the texts of a file, one a line, each once; blank lines are none. Raises SettingsError."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        # The error holds the bytes themselves: not kept as the cause.
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SettingsError(f"{path} cannot be read: {why}", "give --texts a text file with one text a line") from None
    if "\0" in content:
        raise SettingsError(f"{path} holds a NUL character", "give --texts a text file with one text a line")
    texts = list(dict.fromkeys(line.strip() for line in content.split("\n") if line.strip()))
    if not texts:
        raise SettingsError(f"{path} holds no text", "write one text a line")
    return texts


def _embedded(settings: Settings, texts: list[str]) -> tuple[tuple[str, tuple[float, ...]], ...]:
    from pipeline.search.embedders import OllamaEmbedder

    embedder = OllamaEmbedder(settings.ollama_url, settings.ollama_model, settings.dimensions)
    return tuple((text, tuple(vector)) for text, vector in zip(texts, embedder.embed(texts), strict=True))
