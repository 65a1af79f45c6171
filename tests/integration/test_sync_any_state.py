"""Two tables in any states: a sync makes them equal, and so does the one after a sync that was interrupted anywhere."""

from collections.abc import Callable
from contextlib import closing

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from pipeline import failpoints
from pipeline.errors import PipelineError
from pipeline.events import SyncDone
from pipeline.move.sync import sync
from pipeline.options import SyncOptions
from pipeline.settings import Route, Settings
from tests.moves import Move
from tests.support import Database

TABLE = "CREATE TABLE public.embeddings (id bigint PRIMARY KEY, content text, metadata jsonb, embedding vector(3))"
KEYS = st.integers(min_value=1, max_value=12)
CONTENT = st.sampled_from([None, "", "a", "b", "é", "é"])
VECTOR = st.sampled_from([None, "[0,0,0]", "[-0,0,0]", "[1,2,3]"])
# A row is written, or it goes; on either side.
CHANGE = st.tuples(st.sampled_from(["legacy", "main"]), KEYS, st.one_of(st.none(), st.tuples(CONTENT, VECTOR)))
# Where a sync is interrupted: the connection is lost inside its n-th transaction, or after the last one.
INTERRUPTION = st.one_of(st.none(), st.tuples(st.sampled_from(["in_reconcile", "before_pass"]), st.integers(1, 2)))
Row = tuple[str | None, str | None] | None
Step = tuple[list[tuple[str, int, Row]], bool, tuple[str, int] | None]
STEP = st.tuples(st.lists(CHANGE, max_size=8), st.booleans(), INTERRUPTION)


@pytest.fixture
def move(new_move: Callable[..., Move]) -> Move:
    return new_move(TABLE, TABLE)


def rows(database: Database) -> list[tuple[object, ...]]:
    return database.rows(
        "SELECT id, textsend(content)::text, metadata::text, vector_send(embedding)::text FROM public.embeddings"
        " ORDER BY id"
    )


def versions(database: Database) -> list[tuple[object, ...]]:
    return database.rows("SELECT id, xmin::text, ctid::text FROM public.embeddings ORDER BY id")


def write(database: Database, key: int, row: Row) -> None:
    if row is None:
        database.execute("DELETE FROM public.embeddings WHERE id = %s", key)
    else:
        database.execute(
            "INSERT INTO public.embeddings (id, content, embedding) VALUES (%s, %s, %s) ON CONFLICT (id) DO UPDATE"
            " SET content = EXCLUDED.content, embedding = EXCLUDED.embedding",
            key,
            *row,
        )


def synced(route: Route, *, deep: bool, deadline: float = 60) -> SyncDone:
    options = SyncOptions(deep=deep, delete=True, on_conflict="overwrite", deadline_seconds=deadline)
    with closing(sync(route, options)) as events:
        return [one for one in events if isinstance(one, SyncDone)][-1]


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEP, min_size=1, max_size=4))
@example(steps=[([("legacy", 1, ("a", "[0,0,0]")), ("main", 1, ("a", "[-0,0,0]"))], True, ("in_reconcile", 1))])
def test_sync_makes_equal_from_any_state_and_after_any_interruption(
    move: Move, monkeypatch: pytest.MonkeyPatch, steps: list[Step]
) -> None:
    route = Settings.load(None, move.env).route("legacy", "main")
    monkeypatch.setenv("PIPELINE_TESTING", "1")
    for changes, deep, interruption in steps:
        for side, key, row in changes:
            write(move.legacy if side == "legacy" else move.main, key, row)
        if interruption is not None:
            name, passage = interruption
            monkeypatch.setenv("PIPELINE_FAILPOINT", f"{name}:raise@{passage}")
            monkeypatch.setattr(failpoints, "_passages", 0)
            try:
                synced(route, deep=deep, deadline=0)
            except PipelineError:
                event(f"interrupted {name}")
            monkeypatch.delenv("PIPELINE_FAILPOINT")
        before = rows(move.legacy)
        done = synced(route, deep=deep)
        assert done.equal
        assert rows(move.main) == before == rows(move.legacy)
        standing = versions(move.main)
        assert synced(route, deep=deep).equal
        assert versions(move.main) == standing, "a sync that finds nothing writes nothing"
