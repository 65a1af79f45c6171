"""The documents are true: commands and options exist, variables are read, the runbook's blocks run as it shows."""

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
from tests.printed import find_difference
from tests.support import CANARY, ROOT, Database, clean_environment, environment

RUNBOOKS = ("runbook.md", "runbook.es.md")
DOCUMENTS = ("README.md", *RUNBOOKS)
SWITCHES = ("cutover", "rollback", "finalize")
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
    for folder in ("ledger", "check", "move", "cutover", "show"):
        (entry,) = re.findall(rf"^{folder}/.*\n(?: .*\n)*", picture, re.MULTILINE)
        # Lists of modules have commas; a line of one thing is what the lines below it are about.
        named = set(re.findall(r"\w+(?=,)|(?<=, )\w+$", entry, re.MULTILINE))
        assert len(named) > 4
        assert named <= {path.stem for path in (ROOT / "pipeline" / folder).glob("*.py")}, folder


def test_both_runbooks_have_the_same_commands_in_the_same_order() -> None:
    ours, theirs = ([line for block in blocks(name, "sh") for line in block.splitlines()] for name in RUNBOOKS)
    assert len(ours) > 15
    assert ours == theirs


@pytest.mark.parametrize("document", RUNBOOKS)
def test_every_step_of_a_cutover_is_in_the_runbook(document: str) -> None:
    text = (ROOT / document).read_text()
    assert re.findall(r"^\*\*(\w+)\.\*\*", text, re.MULTILINE) == list(options.STEPS)


def test_every_option_of_the_switch_is_in_the_runbook() -> None:
    text = (ROOT / "runbook.md").read_text()
    taken = {option for _, command in every_command(cli) if command.name in SWITCHES for option in options_of(command)}
    assert [option for option in sorted(taken - {"--json", "--help"}) if option not in text] == []


def options_of(command: click.Command) -> list[str]:
    return [option for parameter in command.params for option in parameter.opts if option.startswith("--")]


def test_commands_of_the_runbook_run_in_order_and_print_what_it_shows(
    legacy: Database, empty_main: Database, tmp_path: Path
) -> None:
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
        before = "".join(f"{name}='{value}'\n" for name, value in quoted.items()).encode()
        (tmp_path / ".env").write_bytes(before)
        for commands_, shown in story():
            if "rollback --execute" in commands_:
                assert (tmp_path / ".env").read_bytes() != before
                write_as_the_application(empty_main)
            printed = run_block(commands_, tmp_path)
            if shown is not None:
                assert find_difference(shown, printed) is None, f"{commands_}\n{find_difference(shown, printed)}"
            if "rollback --execute" in commands_:
                assert (tmp_path / ".env").read_bytes() == before
                assert content(legacy) == content(empty_main)
                assert len(content(legacy)) == len(data.rows) + 2
    assert content(legacy) == content(empty_main)
    assert (tmp_path / "restarted").exists()
    verified = json.loads((tmp_path / "verify.json").read_text())
    assert {check["name"] for check in verified["checks"]} >= {"digests", "parity", "recall", "application"}
    (parity,) = (check for check in verified["checks"] if check["name"] == "parity")
    assert parity["figures"]["baseline_queries"] > 0
    assert "<svg" in (tmp_path / "verify.html").read_text()
    assert f"PGVECTOR_DB='{empty_main.name}'\n" in (tmp_path / ".env").read_text()
    # Finalized: nothing of ours is left on legacy, which takes writes again.
    legacy.execute("DELETE FROM public.embeddings")
    assert legacy.value("SELECT count(*) FROM pg_trigger WHERE tgname LIKE %s", "%pipeline%") == 0


@pytest.mark.parametrize(
    ("shown", "printed", "alike"),
    [
        ("copied 95 rows in 0.4 s", "copied 1 row in 12 s", True),
        ("copied 95 rows", "copied 95 slices", False),
        ("fence held for 0.1 s", 'timestamp=2026 level=info event="fence held for 0.2 s"', True),
        ("one", "one\ntimestamp=2026 level=info event=watch seconds=3", True),
        ("one", "one\ntwo", False),
        ("one\ntwo", "one", False),
        ("one\n…\nfour", "one\ntwo\nthree\nfour", True),
        ("one\n…\nfour", "one\ntwo\nthree\nfour\nfive", False),
        ("one\nthree", "one\ntwo\nthree", False),
        ("of a@b.example:1/c: … held", "of d@127.0.0.1:65/e: was held", True),
        ("writes  one\n  two", "writes one two", True),
    ],
)
def test_a_document_that_shows_something_else_is_found(shown: str, printed: str, *, alike: bool) -> None:
    assert (find_difference(shown, printed) is None) is alike


def story() -> Iterator[tuple[str, str | None]]:
    """Yield every block of commands of the runbook, with the output that it shows, None where it shows none."""
    found = [(language, body) for language, body in BLOCK.findall((ROOT / "runbook.md").read_text())]
    assert {language for language, _ in found} == {"sh", "text"}
    for number, (language, body) in enumerate(found):
        if language == "sh":
            following = found[number + 1] if number + 1 < len(found) else ("sh", "")
            yield body, following[1] if following[0] == "text" else None
        else:
            assert found[number - 1][0] == "sh", body


def write_as_the_application(database: Database) -> None:
    """Delete a row, change one, and add three."""
    first, second = (key for (key,) in database.rows("SELECT id FROM public.embeddings ORDER BY id LIMIT 2"))
    database.execute("DELETE FROM public.embeddings WHERE id = %s", first)
    database.execute("UPDATE public.embeddings SET content = 'changed' WHERE id = %s", second)
    database.execute(
        "INSERT INTO public.embeddings (content, metadata, embedding)"
        " SELECT 'new ' || content, metadata, embedding FROM public.embeddings ORDER BY id LIMIT 3"
    )


def content(database: Database) -> list[tuple[str, str, str, str]]:
    """Return all rows as texts."""
    return database.rows("SELECT id::text, content, metadata::text, embedding::text FROM public.embeddings ORDER BY 1")


def run_block(block: str, folder: Path) -> str:
    """Run a block as a person would type it, in a shell whose PATH begins with the virtual environment.

    Return all that it has printed.
    """
    bash = shutil.which("bash")
    assert bash is not None
    path = f"{Path(sys.executable).parent}:{clean_environment()['PATH']}"
    done = subprocess.run(
        [bash, "-euo", "pipefail", "-c", block],
        cwd=folder,
        # So wide that no cell of a table is folded.
        env=clean_environment() | {"PATH": path, "COLUMNS": "400"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}"
    assert CANARY not in done.stdout
    return done.stdout


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
