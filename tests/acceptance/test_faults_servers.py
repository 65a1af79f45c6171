"""What happens to servers during a copy: stopped, crashed, hung, replaying."""

import os
import re
import signal
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.acceptance.test_copy import finish, wait_until
from tests.clones import clone_of
from tests.data import content
from tests.faults import SIDES, Bench, role
from tests.support import Database


@pytest.mark.parametrize("side", SIDES)
def test_fast_stop_in_the_middle_of_a_slice_is_survived(side: str, large: Bench) -> None:
    process, _ = large.begin_one_slice(side)
    large.databases[side].server.restart("fast")
    large.hurry()
    assert finish(process).expect(0).json["copy"]["retries"] >= 1
    large.check_done()


@pytest.mark.parametrize("side", SIDES)
def test_crash_of_one_backend_takes_all_sessions_and_no_row(side: str, large: Bench) -> None:
    process, backend = large.begin_one_slice(side)
    os.kill(backend, signal.SIGKILL)
    large.hurry()
    assert finish(process).expect(0).json["copy"]["retries"] >= 1
    large.check_done()


@pytest.mark.parametrize("side", SIDES)
def test_backend_that_hangs_is_given_up(side: str, large: Bench) -> None:
    process = large.begin_slowly("--stall", "2", "--workers", "1")
    hung = large.backends(side)
    assert hung
    for pid in hung:
        os.kill(pid, signal.SIGSTOP)
    try:
        # A new connection: the old one was given up.
        wait_until(lambda: bool(set(large.backends(side)) - set(hung)))
    finally:
        for pid in hung:
            os.kill(pid, signal.SIGCONT)
    large.hurry()
    done = finish(process).expect(0)
    assert re.search(rf"{side} .*: no byte moved for \d+ seconds", done.err), done.err
    large.check_done()


def test_standby_that_cancels_the_copy_to_replay_is_asked_again(large: Bench) -> None:
    with (
        tempfile.TemporaryDirectory() as root,
        clone_of(large.legacy, Path(root) / "standby", follow=True) as standby,
        ExitStack() as stack,
    ):
        replicated = Bench(standby, large.main, stack)
        process, backend = replicated.begin_one_slice("legacy")
        under_way = "SELECT query_start FROM pg_stat_activity WHERE pid = %s AND state = 'active'"
        # In the table's own database a look may be cancelled like the copy, and before it.
        beside = Database(server=standby.server, name="postgres", user=standby.user, password=standby.password)
        copying = beside.rows(under_way, backend)
        assert copying
        large.legacy.execute("DELETE FROM public.embeddings WHERE id < '80000000-0000-0000-0000-000000000000'")
        with closing(large.legacy.connect()) as connection:
            connection.autocommit = True
            connection.cursor().execute("VACUUM public.embeddings")
        conflicts = "SELECT confl_snapshot FROM pg_stat_database_conflicts WHERE datname = %s"
        # Without the brake the slice may end before its turn to be cancelled comes.
        wait_until(lambda: beside.rows(under_way, backend) != copying)
        wait_until(lambda: beside.value(conflicts, standby.name) > 0)
        replicated.hurry()
        done = finish(process).expect(0)
        assert "the standby cancelled the statement" in done.err, done.err
        assert content(large.main) == content(large.legacy)
        replicated.wait_for_quiet()


def test_marked_slices_survive_a_crash_where_the_role_commits_asynchronously(full: Bench) -> None:
    with (
        role(full.main, "hasty", "SUPERUSER", "synchronous_commit = off") as main,
        ExitStack() as stack,
    ):
        hasty = Bench(full.legacy, main, stack)
        for proxy in hasty.proxies.values():
            proxy.rate = 4_000_000
        process = hasty.begin("--workers", "1")
        wait_until(lambda: len(full.marks()) >= 2)
        marks = full.marks()
        full.main.server.restart("immediate")
        assert marks <= full.marks()
        assert finish(process).code in (0, 5)
        hasty.copy().expect(0)
        assert marks <= full.marks()
        full.check_done()
