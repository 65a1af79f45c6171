"""A silent server that is at work is waited for, whatever its work looks like from outside."""

import pytest

from pipeline.postgres.crew import Crew
from tests.preflights import endpoint
from tests.support import Database

# The first wait for nothing at all, as the build of an index does for minutes; the second is asleep.
COMPUTE = """DO $$DECLARE until timestamptz := clock_timestamp() + interval '1.5 s';
    BEGIN WHILE clock_timestamp() < until LOOP END LOOP; END$$"""
WORK = {"computes": COMPUTE, "sleeps": "SELECT pg_catalog.pg_sleep(1.5)"}


@pytest.mark.parametrize("tracked", ["on", "off"])
@pytest.mark.parametrize("work", WORK)
def test_statement_at_work_is_not_cut(legacy: Database, work: str, tracked: str) -> None:
    legacy.execute(f"ALTER DATABASE {legacy.name} SET track_activities = {tracked}")
    try:
        with Crew(stall_seconds=0.3) as crew, crew.session(endpoint(legacy, "legacy"), "test") as session:
            assert crew.call(session.rows, f"SELECT 1; {WORK[work]}; SELECT 2") == [(2,)]
    finally:
        legacy.execute(f"ALTER DATABASE {legacy.name} RESET track_activities")
