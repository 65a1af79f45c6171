"""The edit of generated .env files: what changes, how both readers read it, and that the way back gives the bytes."""

import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.cutover.envfile import plan_switch
from pipeline.cutover.envlines import application_values, spellings
from pipeline.cutover.envrestore import plan_restore
from pipeline.endpoints import endpoint_from_variables
from pipeline.envfile import read_env_file
from pipeline.errors import RefusedError
from pipeline.settings import Settings

PARTS = ("HOST", "PORT", "USER", "PASSWORD", "SSL", "SSLROOTCERT")
NEEDED = ("HOST", "USER")
# A line of a variable that the switch may change, add, rename or take out.
OURS = re.compile(
    r"[^\S\r\n]*(?:export[^\S\r\n]+)?"
    r"(?:(?:PGVECTOR|LEGACY)_(?:HOST|PORT|USER|PASSWORD|DB|SSL|SSLROOTCERT)|USE_MOCK_EMBEDDINGS)[^\S\r\n]*="
)
OTHER_LINES = (
    "",
    "   ",
    "\t",
    "# a remark, don't read it",
    "  # PGVECTOR_HOST=commented.test",
    '#DB_HOST="x',
    "PGVECTOR_TABLE=embeddings",
    "EMBEDDING_DIMENSIONS = 768 # of the model",
    "export NODE_ENV=development",
    "EMPTY=",
    "LEGACY_API=http://x/#y",
    "TITLE='it is # quoted' # here",
    'KEY="-----BEGIN-----\nabc=\n-----END-----"',
    "JSON='{\"a\": [1, 2]}'",
    "PRICE=5$",
)
NAMES = st.text("abcxyz0189.-_", min_size=1, max_size=8)
SECRETS = st.text("ab1 #'\"\\n$%@:=é`{", min_size=1, max_size=10)
PORTS = st.integers(1, 65535).map(str)
MODES = st.sampled_from(["true", "off", "require", "verify-full"])
OF_PART = {
    "HOST": NAMES,
    "PORT": PORTS,
    "USER": NAMES,
    "DB": NAMES,
    "PASSWORD": SECRETS,
    "SSL": MODES,
    "SSLROOTCERT": NAMES,
}


@st.composite
def assignments(draw: st.DrawFn, name: str, text: str) -> str:
    """Write an assignment in one of the styles in which both readers see ``text``; a plain one may have none."""
    raw = draw(st.sampled_from([*spellings(text, ""), *([text] if text.isalnum() else [])]))
    remark = draw(st.sampled_from(["", "", " # note", "\t#note 'x", "  "]))
    if raw == text and name.endswith("_PASSWORD"):
        remark = ""
    before = draw(st.sampled_from(["", "", " ", "\t", "export ", " export  "]))
    return before + name + draw(st.sampled_from(["=", "=", " = ", "= "])) + raw + remark


@st.composite
def files(draw: st.DrawFn) -> bytes:
    lines: list[str] = []
    for group, database in (("DB", "DB_NAME"), ("PGVECTOR", "PGVECTOR_DB")):
        chosen = {part for part in PARTS if part in NEEDED or draw(st.booleans())}
        for part in sorted(chosen):
            text = draw(OF_PART[part].filter(lambda value: any(spellings(value, ""))))
            lines.append(draw(assignments(f"{group}_{part}", text)))
        lines.append(draw(assignments(database, draw(NAMES))))
    if draw(st.booleans()):
        lines.append(draw(assignments("USE_MOCK_EMBEDDINGS", draw(st.sampled_from(["true", "0", "false", "Yes"])))))
    others = draw(st.lists(st.sampled_from(OTHER_LINES), max_size=8))
    named = {line.partition("=")[0]: line for line in others if not line.strip().startswith("#") and line.strip()}
    lines += [*named.values(), *(line for line in others if line.strip().startswith("#") or not line.strip())]
    ends = draw(st.sampled_from([["\n"], ["\r\n"], ["\n", "\r\n"]]))
    text = "".join(line + draw(st.sampled_from(ends)) for line in draw(st.permutations(lines)))
    if draw(st.booleans()):
        text = text.rstrip("\r\n")
    return (draw(st.sampled_from(["", "\ufeff"])) + text).encode()


def other_lines(data: bytes) -> list[str]:
    """Return the lines that are none of the switch's business, with their ends, the very last end aside."""
    lines = data.decode().removeprefix("\ufeff").splitlines(keepends=True)
    return [line for line in lines if not OURS.match(line)]


def without_last_end(lines: list[str]) -> list[str]:
    return [*lines[:-1], lines[-1].rstrip("\r\n")] if lines else lines


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=files(), with_mock_line=st.booleans(), since=st.sampled_from([b"", b"# since\n", b"SINCE='1'\r\n"]))
def test_generated_file_is_switched_and_turned_back(
    data: bytes, with_mock_line: bool, since: bytes, tmp_path: Path
) -> None:
    path, copy = tmp_path / ".env", tmp_path / "copy"
    path.write_bytes(data)
    copy.write_bytes(data)
    before = Settings.load(path, {})
    if before.endpoint("main").label == before.endpoint("legacy").label:
        return
    js_before = application_values(data.decode())
    edit = plan_switch(path, before, with_mock_line=with_mock_line)
    path.write_bytes(edit.after)
    after = Settings.load(path, {})

    assert after.endpoint("main") == before.endpoint("main")
    assert after.endpoint("legacy") == before.endpoint("legacy")
    pgvector = endpoint_from_variables(after.values, "main", "PGVECTOR", "PGVECTOR_DB")
    assert pgvector == before.endpoint("main")
    assert not after.use_mock and (not with_mock_line or after.values["USE_MOCK_EMBEDDINGS"].text == "false")
    assert without_last_end(other_lines(edit.after)) == without_last_end(other_lines(data))
    assert edit.after.startswith(b"\xef\xbb\xbf") == data.startswith(b"\xef\xbb\xbf")
    assert edit.after.endswith(b"\n") == data.endswith(b"\n")
    js_after = application_values(edit.after.decode())
    for part in (*PARTS, "DB"):
        main = js_before.get("DB_NAME" if part == "DB" else f"DB_{part}")
        assert js_after.get(f"PGVECTOR_{part}", "5432" if part == "PORT" else None) == main or main is None
        assert js_after.get(f"LEGACY_{part}") == js_before.get(f"PGVECTOR_{part}")

    assert not plan_switch(path, after, with_mock_line=with_mock_line).changed
    path.write_bytes(since + edit.after if not edit.after.startswith(b"\xef") else edit.after)
    back = plan_restore(path, copy, after)
    assert back.after == (since + data if not data.startswith(b"\xef") else data)
    path.write_bytes(back.after)
    assert not plan_restore(path, copy, Settings.load(path, {})).changed


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    password=st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1) | SECRETS,
    old=st.sampled_from(["old", "'old'", '"old"', "'old' # note"]),
)
def test_any_value_of_the_environment_is_written_for_both_or_refused(password: str, old: str, tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text(f"PGVECTOR_HOST=l\nPGVECTOR_USER=u\nPGVECTOR_PASSWORD={old}\nPGVECTOR_DB=d\nLAST='x'\n")
    main = {"DB_HOST": "m", "DB_USER": "a", "DB_NAME": "n", "DB_PASSWORD": password}
    try:
        edit = plan_switch(path, Settings.load(path, main), with_mock_line=False)
    except RefusedError as error:
        assert re.search(r"""[\r\n\u2028\u2029\\'"]""", password)
        assert "PGVECTOR_PASSWORD" in error.fact
        return
    path.write_bytes(edit.after)
    assert read_env_file(path)["PGVECTOR_PASSWORD"].text == password
    assert application_values(edit.after.decode())["PGVECTOR_PASSWORD"] == password


# The grammar of the application's dotenv in its own language: the reader in the pipeline must not differ.
JAVASCRIPT = r"""
const LINE = /(?:^|^)\s*(?:export\s+)?([\w.-]+)(?:\s*=\s*?|:\s+?)(\s*'(?:\\'|[^'])*'|\s*"(?:\\"|[^"])*"|\s*`(?:\\`|[^`])*`|[^#\r\n]+)?\s*(?:#.*)?(?:$|$)/mg
const read = text => Object.fromEntries([...text.replace(/\r\n?/mg, '\n').matchAll(LINE)].map(([, name, value]) => {
  const written = (value || '').trim()
  const bare = written.replace(/^(['"`])([\s\S]*)\1$/mg, '$2')
  return [name, written[0] === '"' ? bare.replace(/\\n/g, '\n').replace(/\\r/g, '\r') : bare]
}))
const texts = JSON.parse(require('fs').readFileSync(0, 'utf8'))
process.stdout.write(JSON.stringify(texts.map(text => Object.entries(read(text)))))
"""  # noqa: E501


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_javascript_reads_what_the_pipeline_expects_it_to() -> None:
    chance = random.Random(7)
    pieces = ["A", "B_1", "=", " = ", ": ", "'", '"', "`", "\\", "\\n", "\\'", "#", " ", "x", "é", "\n", "\r\n", "\t"]
    pieces += ["export ", "\nA=", "\nB='", '\nC="', "' # y\n", "\ufeff", "\u00a0", "\u2028", "\x85"]
    texts = ["".join(chance.choices(pieces, k=chance.randrange(1, 30))) for _ in range(5000)]
    done = subprocess.run(
        ["node", "-e", JAVASCRIPT], input=json.dumps(texts), capture_output=True, text=True, check=True
    )
    for text, read in zip(texts, json.loads(done.stdout), strict=True):
        assert application_values(text) == dict(read), repr(text)
