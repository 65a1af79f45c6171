"""The benchmark as a real process: it measures, compares what it measured, and leaves nothing behind."""

import importlib
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipeline.demo.corpus import Passage
from pipeline.demo.fill import fill_legacy
from pipeline.demo.servers import free_port, running_pid
from pipeline.errors import PipelineError
from pipeline.settings import TableMapping
from tests.support import ROOT, Database, clean_environment, servers_folder

ROWS = 500
# One contender of each kind, near and far, warm and cold; a test that takes them all takes minutes.
ONLY = "raw-1,raw-2,copy-2,dump,insert,*+index,verify,raw-2@5ms,copy-2@5ms,copy-2@cold"
NEAR = ["raw-1", "raw-2", "copy-2", "dump", "insert", "raw-2+index", "copy-2+index", "verify"]
LIMITS = {
    "copy-2 to the best raw pipe",
    "pg_dump | pg_restore to copy-2",
    "copy and index build to load, then CREATE INDEX",
    "copy-2@5ms to raw-2@5ms",
    "peak memory of any copy",
    "peak memory, most to least of all tables",
    "slices, commits and marks in a copy's time",
    "slices repeated after a kill, 2 workers",
    "checks and plan in a copy's time",
    "pass over 250 changed rows to the copy",
    "verify of all rows to the copy",
    "sync of 5 changed rows to comparing all",
    "verify --incremental after it to comparing all",
    "sync --deep of 5 changed rows to comparing all",
    "fence held, 5 late changes",
    "fence held, 5 late changes, to comparing all",
    "changed rows that a sync brings, of 50",
    "peak memory of verify, every row different",
}
PASSAGES = [
    Passage(
        text=f"module.name{number}: What number {number} does.", source="module.py", name=f"n{number}", kind="class"
    )
    for number in range(20)
]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a temporary directory of the bench's own that the servers' account can pass through."""
    with tempfile.TemporaryDirectory(prefix="pipeline-test-bench-", dir=servers_folder()) as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Return a function that imports a module of the benchmark, found as the script finds it."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def start_bench(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks" / "bench.py"), *arguments],
        env=clean_environment() | {"TMPDIR": str(folder)},
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def run() -> Iterator[tuple[Any, str]]:
    """Run the benchmark once, with everything that it can do; yield its JSON and what it printed."""
    studies = ("--memory", "--ledger", "--resume", "--changes", "--proofs")
    scenes = ("--only", ONLY, "--latency", "5", "--cold")
    with tempfile.TemporaryDirectory(prefix="pipeline-test-bench-", dir=servers_folder()) as name:
        folder = Path(name)
        folder.chmod(0o711)
        with (
            tempfile.NamedTemporaryFile("r", suffix=".json") as file,
            start_bench(
                folder, "--rows", str(ROWS), "--rounds", "1", "--json", file.name, *scenes, *studies
            ) as process,
        ):
            out, err = process.communicate(timeout=180)
            assert process.returncode == 0, err
            assert list(folder.iterdir()) == []
            yield json.load(file), out


def contenders_of(report: Any) -> dict[str, Any]:
    return {one["name"]: one for scene in report["scenes"] for one in scene["contenders"]}


def test_bench_reports_every_contender_with_equal_content(run: tuple[Any, str]) -> None:
    report, out = run
    near, far, cold = report["scenes"]
    assert [one["name"] for one in near["contenders"]] == NEAR
    assert [one["name"] for one in far["contenders"]] == ["raw-2@5ms", "copy-2@5ms"]
    assert [one["name"] for one in cold["contenders"]] == ["copy-2@cold"]
    assert report["missing_tools"] == [name for name in ("pgcopydb", "pgloader") if not shutil.which(name)]
    assert report["data"]["rows"] == ROWS
    for name, one in contenders_of(report).items():
        assert re.search(rf"^{re.escape(name)} ", out, re.MULTILINE)
        assert one["median_seconds"] == one["rounds"][0]["seconds"] > 0
        assert len(one["rounds"]) == 1
        assert one["median_cpu_seconds"] > 0
        assert one["peak_bytes"] > 1_000_000
        assert one["equal"]
        assert one["left"] == {"rows": ROWS, "digest": report["data"]["digest"]}
    assert report["machine"]["servers"]["main"]["postgresql"].startswith("18")
    assert report["machine"]["cores"] == os.cpu_count()


def test_bench_holds_each_contender_against_the_best_of_its_scene(run: tuple[Any, str]) -> None:
    contenders = contenders_of(run[0])
    best = min(("raw-1", "raw-2"), key=lambda name: float(contenders[name]["median_seconds"]))
    for name in ("raw-1", "raw-2", "copy-2", "dump", "insert"):
        assert contenders[name]["ratio_to"] == best
        seconds = contenders[best]["median_seconds"]
        assert contenders[name]["ratio"] == pytest.approx(contenders[name]["median_seconds"] / seconds)
    assert contenders["copy-2+index"]["ratio_to"] == "raw-2+index"
    assert contenders["verify"]["ratio_to"] == "copy-2"
    assert contenders["copy-2@5ms"]["ratio_to"] == "raw-2@5ms"
    # No raw pipe was chosen there.
    assert contenders["copy-2@cold"]["ratio"] is None


def test_bench_prints_every_limit_beside_what_it_found(run: tuple[Any, str]) -> None:
    report, out = run
    limits = {one["what"].split(", raw-")[0]: one for one in report["limits"]}
    assert limits.keys() == LIMITS
    contenders = contenders_of(report)
    assert limits["copy-2 to the best raw pipe"]["found"] == contenders["copy-2"]["ratio"]
    assert limits["copy-2@5ms to raw-2@5ms"]["found"] == contenders["copy-2@5ms"]["ratio"]
    for one in report["limits"]:
        assert one["what"] in out
    assert "at most 1.10 x" in out
    assert "at least 3.50 x" in out


def test_bench_puts_servers_at_a_distance_and_legacy_in_the_cold(run: tuple[Any, str]) -> None:
    report, out = run
    near, far, cold = report["scenes"]
    assert [scene["legacy"] for scene in report["scenes"]] == ["warm", "warm", "cold"]
    assert near["latency_ms"] is cold["latency_ms"] is near["distance"] is None
    assert far["latency_ms"] == 5
    assert far["distance"]["select_ms"] >= 5
    # One round trip for TCP, one to begin, two for SCRAM, one for COPY: no contender can do with less.
    assert all(one["median_seconds"] > 5 * 0.005 for one in far["contenders"])
    assert "Both servers by a proxy, 5 ms away" in out
    assert "Legacy cold" in out


def test_bench_measures_memory_slices_a_resume_and_a_pass(run: tuple[Any, str]) -> None:
    report, out = run
    own, wide = report["memory"]
    assert (own["rows"], wide["rows"]) == (ROWS, ROWS // 50)
    assert own["peak_bytes"] == contenders_of(report)["copy-2"]["peak_bytes"]
    assert wide["stream_bytes"] > wide["rows"] * 2**20
    assert all(10_000_000 < case["peak_bytes"] < 400_000_000 for case in report["memory"])
    copies = {one["name"]: one for one in report["ledger"]["copies"]}
    assert copies.keys() == {"largest", "default", "finest", "one row"}
    assert copies["largest"]["slices"] == copies["one row"]["slices"] == 1 < copies["finest"]["slices"]
    gained = copies["finest"]["median_seconds"] - copies["largest"]["median_seconds"]
    assert report["ledger"]["second_per_slice"] == pytest.approx(gained / (copies["finest"]["slices"] - 1))
    resume = report["resume"]
    # One worker had its slice ready to commit; neither can have had more.
    assert 0 < resume["repeated_rows"] <= resume["workers"] * resume["slice_rows"] < ROWS
    changes = report["changes"]
    assert (changes["rows"], changes["changed_rows"]) == (ROWS, ROWS // 2)
    assert 0 < changes["before_seconds"] + changes["load_seconds"] < changes["copy_seconds"]
    assert changes["quiet_pass_seconds"] > 0
    assert changes["pass_seconds"] > 0
    proofs = report["proofs"]
    assert (proofs["rows"], proofs["few"], proofs["many"]) == (ROWS, 5, 50)
    assert all(value > 0 for value in proofs.values())
    assert "changed rows of 500" in out


def test_bench_stopped_by_ctrl_c_leaves_no_server_no_proxy_and_no_file(folder: Path) -> None:
    with start_bench(folder, "--rows", "50", "--latency", "5", "--only", "raw-1@5ms") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("warming up"):
                break
        (private,) = folder.iterdir()
        servers = [running_pid(private / release) for release in ("16", "18")]
        proxies = proxies_of(process.pid)
        assert len(proxies) == 1
        assert (private / "passwords").stat().st_mode & 0o777 == 0o600
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert list(folder.iterdir()) == []
    for one in (*servers, *proxies):
        assert one is not None
        assert has_ended(one)


def proxies_of(process: int) -> list[int]:
    """Return the delay proxies that a process started."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in children if "delay.py" in Path(f"/proc/{child}/cmdline").read_text()]


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


def test_readme_of_the_benchmark_names_exactly_the_options_that_exist() -> None:
    help_text = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "bench.py"), "--help"], capture_output=True, text=True, check=True
    ).stdout
    options = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
    known = set(options.findall(help_text)) - {"--help"}
    text = (ROOT / "benchmarks" / "README.md").read_text()
    # What belongs to the contenders themselves.
    foreign = {"--workers", "--slice-size"}
    assert set(options.findall(text)) - foreign == known


@contextmanager
def through_proxy(link: ModuleType, milliseconds: float) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield both ends of a connection by a proxy."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with (
            link.delayed(milliseconds, [port]) as ports,
            socket.create_connection(("127.0.0.1", ports[port])) as near,
            listener.accept()[0] as far,
        ):
            near.settimeout(20)
            far.settimeout(20)
            yield near, far


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def test_proxy_delays_a_round_trip_and_alters_nothing(module: Callable[[str], ModuleType]) -> None:
    sent = os.urandom(20_000_000)
    with through_proxy(module("link"), 60) as (near, far):
        near.sendall(b"first")
        assert far.recv(5) == b"first"
        started = time.monotonic()
        near.sendall(b"ping")
        assert far.recv(4) == b"ping"
        assert time.monotonic() - started >= 0.03
        far.sendall(b"pong")
        assert near.recv(4) == b"pong"
        assert time.monotonic() - started >= 0.06
        # More than the proxy holds, to a reader that begins late.

        def send() -> None:
            near.sendall(sent)
            near.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        time.sleep(0.1)
        assert read_all(far) == sent
        sender.join()
        # One side has ended, the other still speaks.
        far.sendall(b"last words")
        far.shutdown(socket.SHUT_WR)
        assert read_all(near) == b"last words"


def test_proxy_closes_what_the_server_refuses_or_resets(module: Callable[[str], ModuleType]) -> None:
    link = module("link")
    with through_proxy(link, 0) as (near, far):
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        far.close()
        assert near.recv(1) == b""
    with link.delayed(0, [free_port()]) as ports, socket.create_connection(("127.0.0.1", *ports.values())) as near:
        near.settimeout(20)
        assert near.recv(1) == b""


def test_proxy_ends_with_whoever_started_it(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    text = (
        "import link, os, pathlib, signal, sys\n"
        "with link.delayed(0, [5432]):\n"
        "    children = pathlib.Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read_text()\n"
        "    pathlib.Path(sys.argv[1]).write_text(children)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    variables = clean_environment() | {"PYTHONPATH": str(ROOT / "benchmarks")}
    done = subprocess.run([sys.executable, "-c", text, str(file)], env=variables, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert has_ended(int(file.read_text()))


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="only Linux tells what its page cache holds")
def test_dropped_files_are_read_from_the_disk_again(tmp_path: Path, module: Callable[[str], ModuleType]) -> None:
    (tmp_path / "base").mkdir()
    file = tmp_path / "base" / "1"
    file.write_bytes(bytes(1_000_000))
    buffer = bytearray(4096)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        assert os.preadv(descriptor, [buffer], 0, os.RWF_NOWAIT) == len(buffer)
        module("cold").drop_cached(tmp_path)
        with pytest.raises(BlockingIOError):
            os.preadv(descriptor, [buffer], 0, os.RWF_NOWAIT)
    finally:
        os.close(descriptor)


def test_content_differs_by_one_float_or_one_row(
    legacy: Database, main: Database, module: Callable[[str], ModuleType]
) -> None:
    content = module("content")
    mapping = TableMapping()
    for database in (legacy, main):
        with closing(database.connect()) as connection:
            assert list(fill_legacy(connection, mapping, passages=PASSAGES)) == [20]

    def read(database: Database) -> object:
        with closing(database.connect()) as connection:
            return content.read_content(connection, mapping)

    expected = read(legacy)
    content.check_equal("copy-2", expected, read(main))
    one = "id = (SELECT min(id::text)::uuid FROM public.embeddings)"
    main.execute(
        "UPDATE public.embeddings SET embedding ="
        f" (ARRAY[-0.5]::real[] || (embedding::real[])[2:])::public.vector WHERE {one}"
    )
    with pytest.raises(PipelineError, match="copy-2 brought 20 rows, but not legacy's"):
        content.check_equal("copy-2", expected, read(main))
    main.execute(f"DELETE FROM public.embeddings WHERE {one}")
    with pytest.raises(PipelineError, match="copy-2 brought 19 of 20 rows"):
        content.check_equal("copy-2", expected, read(main))


def test_stream_bytes_are_those_of_a_binary_copy(legacy: Database, module: Callable[[str], ModuleType]) -> None:
    with closing(legacy.connect()) as connection:
        assert list(fill_legacy(connection, TableMapping(), passages=PASSAGES)) == [20]
        sent = BytesIO()
        with connection.cursor() as cursor:
            cursor.copy_expert("COPY public.embeddings TO STDOUT (FORMAT binary)", sent)
        assert module("content").read_stream_bytes(connection, TableMapping()) == len(sent.getvalue())
