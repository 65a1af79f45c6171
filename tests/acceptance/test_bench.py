"""The benchmark as a real process: it measures, compares what it measured, and leaves nothing behind."""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from io import BytesIO
from pathlib import Path
from statistics import median
from types import ModuleType

import pytest

from pipeline.demo.corpus import Passage
from pipeline.demo.fill import fill_legacy
from pipeline.demo.servers import running_pid
from pipeline.errors import PipelineError
from pipeline.settings import TableMapping
from tests.support import ROOT, Database, clean_environment

LOADS = {"raw-1", "raw-2", "copy-1", "copy-2", "copy-4", "dump", "insert"}
ROWS = 500
PASSAGES = [
    Passage(
        text=f"module.name{number}: What number {number} does.", source="module.py", name=f"n{number}", kind="class"
    )
    for number in range(20)
]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a temporary directory of the bench's own that the servers' account can pass through."""
    with tempfile.TemporaryDirectory(prefix="pipeline-test-bench-") as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture
def testbed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the module that reads and compares content, found as the script finds it."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("testbed")


def start_bench(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks" / "bench.py"), *arguments],
        env=clean_environment() | {"TMPDIR": str(folder)},
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_bench_reports_every_contender_with_its_ratio_and_equal_content(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    with start_bench(folder, "--rows", str(ROWS), "--rounds", "1", "--json", str(file)) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    report = json.loads(file.read_text())
    contenders = {one["name"]: one for one in report["contenders"]}
    assert contenders.keys() == LOADS | {"verify"}
    assert report["data"]["rows"] == ROWS
    for name, one in contenders.items():
        assert name in out
        assert one["median_seconds"] == median(turn["seconds"] for turn in one["rounds"]) > 0
        assert len(one["rounds"]) == 1
        assert one["median_cpu_seconds"] > 0
        assert one["peak_bytes"] > 1_000_000
        assert one["equal"]
        assert one["left"] == {"rows": ROWS, "digest": report["data"]["digest"]}
    raw = min(contenders[name]["median_seconds"] for name in ("raw-1", "raw-2"))
    for name in LOADS:
        assert contenders[name]["ratio"] == pytest.approx(contenders[name]["median_seconds"] / raw)
    assert contenders["verify"]["ratio_to"] in {"copy-1", "copy-2", "copy-4"}
    assert report["machine"]["servers"]["main"]["postgresql"].startswith("18")
    assert report["machine"]["cores"] == os.cpu_count()
    assert list(folder.iterdir()) == []


def test_bench_stopped_by_ctrl_c_leaves_neither_servers_nor_files(folder: Path) -> None:
    with start_bench(folder, "--rows", "50") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("warming up"):
                break
        (private,) = folder.iterdir()
        servers = [running_pid(private / release) for release in ("16", "18")]
        assert (private / "passwords").stat().st_mode & 0o777 == 0o600
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert list(folder.iterdir()) == []
    for server in servers:
        assert server is not None
        assert has_ended(server)


def has_ended(process: int) -> bool:
    """Return whether a process is gone within five seconds, or waits to be reaped by whoever adopted it."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.kill(process, 0)
            if Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def test_bench_refuses_a_number_of_rows_it_cannot_make(folder: Path) -> None:
    with start_bench(folder, "--rows", "0") as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "'0' is not a whole number from 1 to 1000000" in err


def test_content_differs_by_one_float_or_one_row(legacy: Database, main: Database, testbed: ModuleType) -> None:
    mapping = TableMapping()
    for database in (legacy, main):
        with closing(database.connect()) as connection:
            assert list(fill_legacy(connection, mapping, passages=PASSAGES)) == [20]

    def content(database: Database) -> object:
        with closing(database.connect()) as connection:
            return testbed.read_content(connection, mapping)

    expected = content(legacy)
    testbed.check_equal("copy-2", expected, content(main))
    one = "id = (SELECT min(id::text)::uuid FROM public.embeddings)"
    main.execute(
        "UPDATE public.embeddings SET embedding ="
        f" (ARRAY[-0.5]::real[] || (embedding::real[])[2:])::public.vector WHERE {one}"
    )
    with pytest.raises(PipelineError, match="copy-2 brought 20 rows, but not legacy's"):
        testbed.check_equal("copy-2", expected, content(main))
    main.execute(f"DELETE FROM public.embeddings WHERE {one}")
    with pytest.raises(PipelineError, match="copy-2 brought 19 of 20 rows"):
        testbed.check_equal("copy-2", expected, content(main))


def test_stream_bytes_are_those_of_a_binary_copy(legacy: Database, testbed: ModuleType) -> None:
    with closing(legacy.connect()) as connection:
        assert list(fill_legacy(connection, TableMapping(), passages=PASSAGES)) == [20]
        sent = BytesIO()
        with connection.cursor() as cursor:
            cursor.copy_expert("COPY public.embeddings TO STDOUT (FORMAT binary)", sent)
        assert testbed.read_stream_bytes(connection, TableMapping()) == len(sent.getvalue())
