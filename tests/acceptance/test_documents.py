"""The documents are true: commands and options exist, variables are read, the runbook's blocks run."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from pipeline import errors, options, settings
from pipeline.cli import cli
from pipeline.demo.hashing import HashingEmbedder
from pipeline.demo.ollama import model_name, serve
from tests.data import fill, load
from tests.support import ROOT, Database, clean_environment, environment

DOCUMENTS = ("README.md", "runbook.md")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: str, *languages: str) -> list[str]:
    text = (ROOT / document).read_text()
    return [body for language, body in BLOCK.findall(text) if language in languages]


def commands(document: str) -> Iterator[list[str]]:
    """Yield every pipeline command of a document's blocks and of its inline code, cut into words."""
    text = (ROOT / document).read_text()
    inline = re.findall(r"`(pipeline [^`]+)`", BLOCK.sub("", text))
    lines = [line.removeprefix("$ ") for body in blocks(document, "sh", "console") for line in body.splitlines()]
    for line in [*inline, *(line for line in lines if line.startswith("pipeline "))]:
        yield [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line.split(" > ")[0].split(" #")[0])]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_and_option_in_the_documents_exists(document: str) -> None:
    found = list(commands(document))
    assert len(found) > 4
    for words in found:
        command: click.Command | None = cli
        rest = words[1:]
        while isinstance(command, click.Group) and rest:
            command = command.commands.get(rest.pop(0))
        assert command is not None, words
        # Parsed as click would: an unknown option or a missing argument is an error.
        try:
            command.make_context(" ".join(words), rest)
        except click.UsageError as error:
            pytest.fail(f"{document}: {' '.join(words)}: {error.message}")


def every_command(group: click.Group) -> Iterator[tuple[str, click.Command]]:
    """Yield all commands below a group, each with its words."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from ((f"{name} {words}", one) for words, one in every_command(command))
        else:
            yield name, command


def test_every_option_that_is_named_alone_exists() -> None:
    known = {option for _, command in every_command(cli) for p in command.params for option in p.opts}
    known |= {"--sql", "--help", "--version"}
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known, document


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert [name for name, _ in every_command(cli) if f"`pipeline {name}" not in text] == []


def test_every_check_of_verify_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| check | compares |") : text.index("Both sides are read at once")]
    named = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    # The check of the rows is three: their number, their bytes, and those that were set aside.
    assert named == {*options.CHECKS, "counts", "digests", "quarantine"} - {"rows"}


def test_readme_names_exactly_the_variables_that_are_read() -> None:
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| variable |") : text.index("A password that is not set")]
    assert set(re.findall(r"`([A-Z][A-Z_]+)`", table)) == set(settings.DEFAULTS)


def test_readme_names_exactly_the_exit_codes_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| code |") : text.index("## Migrations")]
    named = {int(code) for line in re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE) for code in line.split(",")}
    assert named == {value for name, value in vars(errors).items() if name.startswith("EXIT_")}


def test_module_map_of_the_readme_names_what_is_there() -> None:
    text = (ROOT / "README.md").read_text()
    folders = {path.name + "/" for path in (ROOT / "pipeline").iterdir() if (path / "__init__.py").is_file()}
    picture = text[text.rindex("```\nwording") :]
    assert set(re.findall(r"\w+/", picture)) == folders
    for folder in ("ledger", "check", "move", "show"):
        (entry,) = re.findall(rf"^{folder}/.*\n(?: .*\n)*", picture, re.MULTILINE)
        # Lists of modules have commas; a line of one thing is what the lines below it are about.
        named = set(re.findall(r"\w+(?=,)|(?<=, )\w+$", entry, re.MULTILINE))
        assert len(named) > 4
        assert named <= {path.stem for path in (ROOT / "pipeline" / folder).glob("*.py")}, folder


def test_blocks_of_the_runbook_run_in_order(legacy: Database, empty_main: Database, tmp_path: Path) -> None:
    data = load("nomic768")
    fill(legacy, data)
    for name in ("alembic.ini", "alembic"):
        (tmp_path / name).symlink_to(ROOT / name)
    embedder = HashingEmbedder(data.dimensions).fit(row["content"] for row in data.rows)
    with serve(embedder) as url:
        variables = environment(legacy=legacy, main=empty_main, OLLAMA_BASE_URL=url)
        variables["OLLAMA_EMBEDDINGS_MODEL"] = model_name(data.dimensions)
        ours = {name: value for name, value in variables.items() if name in settings.DEFAULTS}
        quoted = {name: value.replace("\\", "\\\\").replace("'", "\\'") for name, value in ours.items()}
        (tmp_path / ".env").write_text("".join(f"{name}='{value}'\n" for name, value in quoted.items()))
        found = blocks("runbook.md", "sh")
        assert len(found) >= 7
        for block in found:
            run_block(block, tmp_path)
    assert empty_main.value("SELECT count(*) FROM public.embeddings") == len(data.rows)
    verified = json.loads((tmp_path / "verify.json").read_text())
    assert {check["name"] for check in verified["checks"]} >= {"digests", "parity", "recall", "application"}
    (parity,) = (check for check in verified["checks"] if check["name"] == "parity")
    assert parity["figures"]["baseline_queries"] > 0
    assert "<svg" in (tmp_path / "verify.html").read_text()
    assert (tmp_path / ".env.before-switch").read_bytes() == (tmp_path / ".env").read_bytes()


def run_block(block: str, folder: Path) -> None:
    """Run a block as a person would type it, in a shell whose PATH begins with the virtual environment."""
    bash = shutil.which("bash")
    assert bash is not None
    path = f"{Path(sys.executable).parent}:{clean_environment()['PATH']}"
    done = subprocess.run(
        [bash, "-euo", "pipefail", "-c", block],
        cwd=folder,
        env=clean_environment() | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


def test_repository_example_of_the_readme_runs(main: Database) -> None:
    (example,) = blocks("README.md", "python")
    embedder = HashingEmbedder(768).fit(["Tea is made with boiling water.", "how do I make tea"])
    with serve(embedder) as url:
        variables = environment(main=main, OLLAMA_BASE_URL=url, OLLAMA_EMBEDDINGS_MODEL=model_name(768))
        done = subprocess.run(
            [sys.executable, "-c", example], env=variables, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 0, done.stderr
    assert "Tea is made with boiling water." in done.stdout
    assert main.value("SELECT count(*) FROM public.embeddings") == 0


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`make ([a-z]+)|^make ([a-z]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    targets = {one or other for one, other in named}
    assert {"demo", "test", "check", "bench"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
