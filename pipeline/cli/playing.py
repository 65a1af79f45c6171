"""The command that plays a whole move on servers of its own."""

import sys

import click

from pipeline.errors import PipelineError


@click.command()
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
