"""What networks do to a copy: cut, swallow, delay, refuse, encrypt; it goes on, or stops and can be resumed."""

import random
import re
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest

from pipeline.events import CopyDone
from pipeline.move.copy import copy
from pipeline.options import CopyOptions
from pipeline.settings import Settings
from tests.acceptance.test_copy import INDEXES, STANDING, finish
from tests.data import content, fill_generated
from tests.faults import DIMENSIONS, MARK_AND_COMMIT, SIDES, Bench
from tests.proxy import Direction, How
from tests.tls import Authority, TlsFront, make_authority

# The way that the rows go.
BULK: dict[str, Direction] = {"legacy": "down", "main": "up"}
PREFIXES = {"legacy": "PGVECTOR", "main": "DB"}


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("side", SIDES)
def test_connection_cut_in_the_middle_of_a_slice_is_made_anew(side: str, how: How, full: Bench) -> None:
    cut = full.proxies[side].cut_after(700_000, BULK[side], how=how, only=b"application_name\0pipeline run")
    done = full.copy().expect(0)
    assert cut.done
    assert done.json["copy"]["retries"] == 1
    assert "SystemError" not in done.err
    assert "Exception ignored" not in done.err
    full.check_done()


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize(("moment", "attempts"), [("before", 2), ("after", 1)])
def test_lost_answer_to_a_commit_is_settled_by_the_mark(moment: str, attempts: int, how: How, full: Bench) -> None:
    cut = full.proxies["main"].cut_at(MARK_AND_COMMIT, "before" if moment == "before" else "after", how=how)
    done = full.copy("--workers", "1").expect(0).json["copy"]
    assert cut.done
    assert done["retries"] == 1
    # Where the lost COMMIT was done the mark is the first try's.
    assert full.main.value("SELECT max(attempts) FROM pipeline.slice") == attempts
    full.check_done()


SMALL_ROWS, SMALL_BYTES, OFFSETS = 20, 640, 8


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("side", SIDES)
def test_cut_after_exactly_n_bytes_loses_nothing_for_any_n(side: str, direction: Direction, bench: Bench) -> None:
    """Cut the connection of a worker: in its start, in BEGIN, in the rows, in COMMIT, after it."""
    fill_generated(bench.legacy, SMALL_ROWS, DIMENSIONS, SMALL_BYTES)
    expected = content(bench.legacy)
    seed = random.randrange(2**32)
    dice = random.Random(seed)
    route = Settings.load(environ=bench.env()).route("legacy", "main")
    # The rows, and what else goes by: a few thousand bytes of statements or answers.
    most = 3_000 + (SMALL_ROWS * (SMALL_BYTES + 4 * DIMENSIONS) if direction == BULK[side] else 0)
    cuts = 0
    for count in [1, *(dice.randrange(most) for _ in range(OFFSETS - 1))]:
        where = f"seed {seed}: cut {side} {direction} after {count} bytes"
        planned = bench.proxies[side].cut_after(count, direction, only=b"application_name\0pipeline run")
        with closing(copy(route, CopyOptions(workers=1, deadline_seconds=20))) as events:
            done = [event for event in events if isinstance(event, CopyDone)]
        assert done and done[0].rows == SMALL_ROWS, where
        assert content(bench.main) == expected, where
        assert bench.main.rows(INDEXES) == STANDING, where
        cuts += planned.done
        planned.done = True
        bench.main.execute("TRUNCATE public.embeddings")
    assert cuts > OFFSETS / 2, f"seed {seed}"


def test_slow_and_distant_servers_change_nothing(full: Bench) -> None:
    for proxy in full.proxies.values():
        proxy.latency = 0.005
        proxy.rate = 5_000_000
    full.copy().expect(0)
    full.check_done()


@pytest.mark.parametrize("side", SIDES)
def test_server_that_is_away_for_a_while_is_waited_for(side: str, full: Bench) -> None:
    process = full.begin_slowly("--deadline", "30")
    full.proxies[side].refuse()
    assert full.proxies[side].cut()
    time.sleep(1.5)
    full.hurry()
    full.proxies[side].allow()
    done = finish(process).expect(0)
    assert "try 2" in done.err
    full.check_done()


@pytest.mark.parametrize("side", SIDES)
def test_server_that_stays_away_ends_the_copy_resumable(side: str, full: Bench) -> None:
    process = full.begin_slowly("--deadline", "1")
    full.proxies[side].refuse()
    full.proxies[side].cut()
    ended = finish(process, timeout=20).expect(5)
    assert f"error: {side}" in ended.err
    full.wait_for_quiet()
    full.check_books()
    full.proxies[side].allow()
    full.hurry()
    full.copy().expect(0)
    full.check_done()


@pytest.mark.parametrize("side", SIDES)
def test_network_that_swallows_everything_is_noticed(side: str, large: Bench) -> None:
    process = large.begin_slowly("--stall", "2")
    large.proxies[side].swallow()
    time.sleep(1)
    large.proxies[side].hear()
    large.hurry()
    done = finish(process).expect(0)
    assert f"{side} (" in done.err
    assert "no byte moved for" in done.err
    large.check_done()


def test_network_that_goes_on_swallowing_ends_the_copy(full: Bench) -> None:
    process = full.begin_slowly("--stall", "1", "--deadline", "1")
    full.proxies["main"].swallow()
    finish(process, timeout=30).expect(5)
    full.proxies["main"].hear()
    full.proxies["main"].cut()
    full.hurry()
    full.copy().expect(0)
    full.check_done()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_a_copy_behind_a_dead_network(number: signal.Signals, code: int, side: str, full: Bench) -> None:
    process = full.begin_slowly()
    full.proxies[side].swallow()
    process.send_signal(number)
    # A request to cancel is swallowed too, and would be waited for without end.
    finish(process, timeout=10).expect(code)
    full.proxies[side].hear()
    full.proxies[side].cut()
    full.hurry()
    full.copy().expect(0)
    full.check_done()


def test_network_that_swallows_from_the_start_is_told_with_what_to_check(bench: Bench) -> None:
    bench.proxies["main"].swallow()
    ended = bench.copy("--deadline", "1").expect(5)
    assert "did not answer within 10 seconds" in ended.err
    assert "check DB_HOST, DB_PORT and the firewall between" in ended.err


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Authority]:
    return {name: make_authority(tmp_path_factory.mktemp(name)) for name in ("ours", "another")}


@pytest.mark.parametrize("side", SIDES)
def test_verified_tls_carries_a_copy_and_survives_a_cut(
    side: str, full: Bench, authorities: dict[str, Authority]
) -> None:
    prefix = PREFIXES[side]
    with TlsFront(full.proxies[side], authorities["ours"]) as front:
        encrypted = {
            f"{prefix}_HOST": "localhost",
            f"{prefix}_PORT": str(front.port),
            f"{prefix}_SSL": "verify-full",
            f"{prefix}_SSLROOTCERT": str(authorities["ours"].file),
        }
        # Behind the front nothing is encrypted, so a name in the first bytes is seen.
        cut = full.proxies[side].cut_after(700_000, BULK[side], only=b"application_name\0pipeline run")
        done = full.copy(**encrypted).expect(0)
        assert cut.done and done.json["copy"]["retries"] == 1
        assert front.encrypted >= 3
    full.check_done()


TLS_FAULTS = {
    "another authority": ("localhost", "verify-full", "another", r"certificate was not accepted \(mode verify-full\)"),
    "another host": ("127.0.0.1", "verify-full", "ours", r"certificate was not accepted \(mode verify-full\)"),
    "another host, not looked at": ("127.0.0.1", "verify-ca", "ours", None),
    "no file": ("localhost", "verify-full", "nowhere", "authorities is missing or unreadable"),
    "the system's authorities": ("localhost", "verify-full", "system", r"certificate was not accepted"),
    "the system's authorities, loosely": ("localhost", "verify-ca", "system", "only verify-full proves anything"),
    "a server without TLS": ("127.0.0.1", "require", None, "the server offers no TLS, and require asks for it"),
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", TLS_FAULTS)
def test_tls_that_cannot_be_trusted_is_refused(
    case: str, side: str, bench: Bench, authorities: dict[str, Authority], tmp_path: Path
) -> None:
    host, mode, authority, fact = TLS_FAULTS[case]
    fill_generated(bench.legacy, 10, DIMENSIONS)
    prefix = PREFIXES[side]
    with TlsFront(bench.proxies[side], authorities["ours"]) as front:
        port = bench.proxies[side].port if authority is None else front.port
        variables = {f"{prefix}_HOST": host, f"{prefix}_PORT": str(port), f"{prefix}_SSL": mode}
        if authority is not None:
            file = authorities[authority].file if authority in authorities else tmp_path / authority
            variables[f"{prefix}_SSLROOTCERT"] = authority if authority == "system" else str(file)
        ended = bench.copy(**variables)
        if fact is None:
            ended.expect(0)
        else:
            assert re.search(fact, ended.expect(1).err), ended.err
            assert re.search(rf"hint:.*(check|set) {prefix}_SSL", ended.err), ended.err


@pytest.mark.parametrize("encrypted", [False, True])
def test_channel_that_cannot_be_bound_is_refused_with_the_way_out(
    encrypted: bool, bench: Bench, authorities: dict[str, Authority]
) -> None:
    with TlsFront(bench.proxies["main"], authorities["ours"]) as front:
        port = front.port if encrypted else bench.proxies["main"].port
        ended = bench.copy(DB_PORT=str(port), DB_SSL="prefer", PGCHANNELBINDING="require").expect(1)
    assert "PGCHANNELBINDING asks for a proof that nobody stands between" in ended.err, ended.err
    assert "unset PGCHANNELBINDING" in ended.err
