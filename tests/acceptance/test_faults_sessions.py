"""What administrators and other sessions do to a copy: locks, cancels, limits, timeouts, modes."""

from contextlib import ExitStack

import pytest

from pipeline.errors import UnreachableError
from pipeline.postgres.database import Session
from tests.acceptance.test_copy import finish
from tests.faults import SIDES, Bench, role
from tests.preflights import endpoint
from tests.support import Database

TIMEOUTS = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "transaction_timeout")


def test_one_that_holds_a_lock_for_too_long_is_named(full: Bench) -> None:
    with full.main.cursor() as blocker:
        blocker.execute("SELECT pg_backend_pid()")
        (holder,) = blocker.fetchone() or (0,)
        process = full.begin_slowly("--deadline", "0")
        full.hurry()
        blocker.execute("LOCK TABLE public.embeddings IN SHARE MODE")
        ended = finish(process).expect(5)
    assert f"a lock was waited for in vain; it is held by pid {holder} (postgres, idle in transaction)" in ended.err
    full.copy().expect(0)
    full.check_done()


@pytest.mark.parametrize("side", SIDES)
def test_cancelled_statement_stops_the_copy_resumable(side: str, large: Bench) -> None:
    process, backend = large.begin_one_slice(side)
    large.databases[side].execute("SELECT pg_cancel_backend(%s)", backend)
    large.hurry()
    ended = finish(process).expect(1)
    assert f"{side} (" in ended.err
    assert "canceling statement due to user request" in ended.err
    large.wait_for_quiet()
    large.check_books()
    large.copy().expect(0)
    large.check_done()


@pytest.mark.parametrize("side", SIDES)
def test_terminated_backend_in_the_middle_of_a_slice_is_made_anew(side: str, large: Bench) -> None:
    process, backend = large.begin_one_slice(side)
    large.databases[side].execute("SELECT pg_terminate_backend(%s)", backend)
    large.hurry()
    done = finish(process).expect(0)
    assert done.json["copy"]["retries"] == 1
    assert "SystemError" not in done.err
    large.check_done()


def test_tiny_timeouts_of_the_role_do_not_reach_the_copy(full: Bench) -> None:
    settings = [f"{name} = '30ms'" for name in TIMEOUTS] + ["idle_session_timeout = '300ms'"]
    # Release 16 has no transaction_timeout.
    older = [setting for setting in settings if "transaction_timeout" not in setting or "idle" in setting]
    with (
        role(full.legacy, "hurried", "SUPERUSER", *older) as legacy,
        role(full.main, "hurried", "SUPERUSER", *settings) as main,
        ExitStack() as stack,
    ):
        hurried = Bench(legacy, main, stack)
        for proxy in hurried.proxies.values():
            proxy.rate = 5_000_000
        hurried.copy().expect(0)
        full.check_done()


def test_role_with_few_connections_copies_with_fewer_workers(full: Bench) -> None:
    with (
        role(full.legacy, "narrow", "CONNECTION LIMIT 2") as legacy,
        role(full.main, "narrow", "CONNECTION LIMIT 4") as main,
        ExitStack() as stack,
    ):
        full.legacy.execute("GRANT SELECT ON public.embeddings TO narrow")
        for statement in (
            "GRANT CREATE ON SCHEMA public TO narrow",
            "ALTER TABLE public.embeddings OWNER TO narrow",
            "GRANT USAGE ON SCHEMA pipeline TO narrow",
            "GRANT ALL ON ALL TABLES IN SCHEMA pipeline TO narrow",
            "GRANT ALL ON ALL SEQUENCES IN SCHEMA pipeline TO narrow",
        ):
            full.main.execute(statement)
        done = Bench(legacy, main, stack).copy("--workers", "4", "--deadline", "20").expect(0)
        assert "a worker less" in done.err
        full.check_done()


def test_target_that_becomes_read_only_stops_the_copy_with_the_reason(full: Bench) -> None:
    process = full.begin_slowly()
    full.main.execute(f"ALTER DATABASE {full.main.name} SET default_transaction_read_only = on")
    for pid in full.backends("main"):
        full.main.execute("SELECT pg_terminate_backend(%s)", pid)
    full.hurry()
    ended = finish(process, timeout=20)
    assert ended.code == 4, ended.err
    assert "takes no writes" in ended.err
    assert "read-only mode" in ended.err
    full.main.execute(
        f"SET TRANSACTION READ WRITE; ALTER DATABASE {full.main.name} RESET default_transaction_read_only"
    )
    full.check_books()
    full.copy().expect(0)
    full.check_done()


def test_lost_connection_is_told_of_the_side_that_was_lost(legacy: Database, empty_main: Database) -> None:
    with (
        Session(endpoint(legacy, "legacy"), "test") as source,
        Session(endpoint(empty_main, "main"), "test") as target,
    ):
        with (
            pytest.raises(UnreachableError, match=r"legacy .*the connection was lost"),
            source.transaction() as mine,
            target.transaction(),
        ):
            legacy.execute("SELECT pg_terminate_backend(%s)", source.backend)
            mine.execute("SELECT 1")
        assert target.rows("SELECT 1") == [(1,)]
