"""A target that is not empty: equal rows are fine, others stop the copy unless a policy was chosen."""

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.acceptance.test_copy import finish, wait_until
from tests.data import become_generated, content
from tests.support import Database, Outcome, environment, pipeline, start

ROWS, DIMENSIONS, TEXT_BYTES = 1200, 16, 2000
KEY = "SELECT id::text FROM public.embeddings ORDER BY id LIMIT 1 OFFSET {}"
INDEXES = (
    "SELECT indexrelid::regclass::text, indisvalid FROM pg_index WHERE indrelid = 'embeddings'::regclass ORDER BY 1"
)


class Sides:
    """Legacy with 1,200 rows in a few slices of 1 MiB, and main with some of them."""

    def __init__(self, legacy: Database, main: Database) -> None:
        self.legacy, self.main = legacy, main
        become_generated(legacy, ROWS, DIMENSIONS, TEXT_BYTES)
        self.env = environment(legacy=legacy, main=main, EMBEDDING_DIMENSIONS=str(DIMENSIONS))

    def bring(self, condition: str) -> int:
        """Write legacy's rows that meet a condition into main, as another program would; return how many."""
        rows = self.legacy.rows(
            f"SELECT id::text, content, metadata::text, embedding::text FROM embeddings WHERE {condition}"
        )
        with self.main.cursor() as cursor:
            for row in rows:
                cursor.execute("INSERT INTO embeddings (id, content, metadata, embedding) VALUES (%s,%s,%s,%s)", row)
        return len(rows)

    def key(self, place: int) -> str:
        return str(self.legacy.value(KEY.format(place)))

    def copy(self, *more: str, **env: str) -> Outcome:
        return pipeline("copy", "--slice-size", "1", *more, env=self.env | env)

    def verify(self) -> Outcome:
        return pipeline("verify", "--check", "rows", "--check", "parity", "--json", env=self.env)


@pytest.fixture
def sides(legacy: Database, new_database: Callable[..., Database], main_template: Callable[[int], str]) -> Sides:
    return Sides(legacy, new_database("18", main_template(DIMENSIONS)))


def test_equal_rows_are_fine_and_are_not_written(sides: Sides) -> None:
    brought = sides.bring("get_byte(uuid_send(id), 0) < 10")
    assert brought > 20
    versions = dict(sides.main.rows("SELECT id, xmin::text FROM embeddings"))
    before = sides.main.rows(INDEXES)
    done = sides.copy("--json").expect(0)
    assert f"{brought} rows already: {brought} equal to the source's" in done.err
    figures = done.json["copy"]
    assert (figures["rows"], figures["rows_before"], figures["indexes"]) == (ROWS - brought, brought, [])
    assert content(sides.main) == content(sides.legacy)
    after = dict(sides.main.rows("SELECT id, xmin::text FROM embeddings"))
    assert {key: after[key] for key in versions} == versions
    assert sides.main.rows(INDEXES) == before
    sides.verify().expect(0)
    again = sides.copy().expect(0)
    assert "nothing to do" in again.out


def test_other_content_stops_the_copy_with_the_list(sides: Sides) -> None:
    sides.bring("get_byte(uuid_send(id), 0) < 10")
    keys = [sides.key(place) for place in range(7)]
    sides.main.execute("UPDATE embeddings SET content = 'main''s own' WHERE id::text = ANY (%s)", keys)
    refused = sides.copy().expect(4)
    assert "7 rows with a key of the source's and other content" in refused.err
    assert ", ".join(sorted(keys)[:5]) in refused.err and sorted(keys)[5] not in refused.err
    assert "--on-conflict keep" in refused.err and "--on-conflict overwrite" in refused.err
    assert "main's own" not in refused.err
    assert sides.main.value("SELECT count(*) FROM pipeline.run") == 0
    assert pipeline("copy", "--dry-run", env=sides.env).code == 4
    found = pipeline("preflight", env=sides.env).expect(4)
    assert "7 rows with a key of the source's and other content" in found.out


def test_keep_leaves_rows_of_main_as_they_are(sides: Sides) -> None:
    sides.bring("get_byte(uuid_send(id), 0) < 10")
    sides.main.execute("UPDATE embeddings SET content = 'own' WHERE id::text = %s", sides.key(3))
    done = sides.copy("--on-conflict", "keep").expect(0)
    assert "1 with other content, which stay as they are" in done.err
    assert sides.main.value("SELECT content FROM embeddings WHERE id::text = %s", sides.key(3)) == "own"
    figures = {check["name"]: check["figures"] for check in sides.verify().expect(3).json["checks"]}
    assert figures["digests"]["keys"] == [{"kind": "different", "key": sides.key(3), "columns": ["content"]}]


def test_overwrite_brings_legacys_rows(sides: Sides) -> None:
    sides.bring("get_byte(uuid_send(id), 0) < 10")
    sides.main.execute("UPDATE embeddings SET embedding = NULL, content = NULL WHERE id::text = %s", sides.key(3))
    done = sides.copy("--on-conflict", "overwrite").expect(0)
    assert "1 with other content, which are written over" in done.err
    assert content(sides.main) == content(sides.legacy)
    sides.verify().expect(0)


def test_rows_that_only_main_has_are_reported_and_stay(sides: Sides) -> None:
    sides.main.execute("INSERT INTO embeddings (content) SELECT 'own ' || i FROM generate_series(1, 30) i")
    done = sides.copy("--on-conflict", "overwrite").expect(0)
    assert "30 that only it has, which stay" in done.err
    assert sides.main.value("SELECT count(*) FROM embeddings") == ROWS + 30
    figures = {check["name"]: check["figures"] for check in sides.verify().expect(3).json["checks"]}
    assert (figures["digests"]["extra_rows"], figures["digests"]["different_rows"]) == (30, 0)


@pytest.mark.parametrize("policy", ["refuse", "keep", "overwrite"])
def test_row_that_appears_on_main_during_the_copy_meets_the_policy(sides: Sides, policy: str) -> None:
    sides.main.execute("INSERT INTO embeddings (content) VALUES ('own')")
    process = start("copy", "--slice-size", "1", "--max-rate", "1", "--on-conflict", policy, env=sides.env)
    wait_until(lambda: sides.main.value("SELECT count(*) FROM pipeline.slice WHERE rows IS NULL") > 0)
    late = sides.legacy.value("SELECT id::text FROM embeddings ORDER BY ctid DESC LIMIT 1")
    sides.main.execute("INSERT INTO embeddings (id, content) VALUES (%s, 'late')", late)
    outcome = finish(process)
    mine = "SELECT content FROM embeddings WHERE id::text = %s"
    if policy == "refuse":
        outcome.expect(4)
        assert "1 row with a key of the source's and other content" in outcome.err and late in outcome.err
        assert sides.main.value(mine, late) == "late"
        sides.copy("--on-conflict", "overwrite").expect(0)
    else:
        outcome.expect(0)
        assert (sides.main.value(mine, late) == "late") is (policy == "keep")


def test_row_deleted_on_legacy_meanwhile_goes_and_one_that_main_had_stays(sides: Sides) -> None:
    had = sides.legacy.rows("SELECT id::text FROM embeddings ORDER BY ctid LIMIT 2")
    sides.bring(f"id::text IN ('{had[0][0]}', '{had[1][0]}')")
    env = sides.env | {"PIPELINE_TESTING": "1", "PIPELINE_FAILPOINT": "before_loaded:kill"}
    pipeline("copy", "--slice-size", "1", env=env).expect(-9)
    brought = sides.legacy.value("SELECT id::text FROM embeddings ORDER BY ctid DESC LIMIT 1")
    sides.legacy.execute("DELETE FROM embeddings WHERE id::text IN (%s, %s)", brought, had[0][0])
    sides.legacy.execute("UPDATE embeddings SET content = 'changed' WHERE id::text = %s", had[1][0])
    stopped = sides.copy().expect(4)
    assert had[1][0] in stopped.err
    done = sides.copy("--on-conflict", "overwrite").expect(0)
    assert "Left alone: 1 row that only the target has" in done.out
    there = {key for (key,) in sides.main.rows("SELECT id::text FROM embeddings")}
    assert brought not in there and had[0][0] in there
    assert sides.main.value("SELECT content FROM embeddings WHERE id::text = %s", had[1][0]) == "changed"


def test_copy_into_a_table_in_use_survives_kills(sides: Sides) -> None:
    """Main is written to by its application all the while: nothing of its own is touched, no row is lost or doubled."""
    sides.bring("get_byte(uuid_send(id), 0) < 40")
    stop = threading.Event()
    own: list[Any] = []

    def write() -> None:
        with sides.main.cursor() as cursor:
            while not stop.is_set():
                cursor.execute("INSERT INTO embeddings (content) VALUES ('own') RETURNING id::text")
                own.append(cursor.fetchone())
                time.sleep(0.02)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for wait in (0.5, 0.7, 0.9, 0.6):
            process = start("copy", "--slice-size", "1", "--max-rate", "1.5", env=sides.env)
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
            finish(process)
        sides.copy().expect(0)
    finally:
        stop.set()
        writer.join()
    assert own
    assert sides.main.value("SELECT count(*) FROM embeddings WHERE content = 'own'") == len(own)
    sides.main.execute("DELETE FROM embeddings WHERE content = 'own'")
    assert content(sides.main) == content(sides.legacy)


def test_restart_takes_what_was_brought_for_rows_that_are_there(sides: Sides) -> None:
    env = sides.env | {"PIPELINE_TESTING": "1", "PIPELINE_FAILPOINT": "after_commit:kill@2"}
    pipeline("copy", "--slice-size", "1", "--workers", "1", env=env).expect(-9)
    there = sides.main.value("SELECT count(*) FROM embeddings")
    assert 0 < there < ROWS
    done = sides.copy("--restart").expect(0)
    assert f"holds {there} rows already: {there} equal" in done.err
    assert content(sides.main) == content(sides.legacy)
    assert sides.main.value("SELECT count(*) FROM pg_index WHERE indrelid = 'embeddings'::regclass") == 2


@pytest.mark.parametrize("rows", [0, 5])
def test_settle_threshold_ends_the_passes_early(sides: Sides, rows: int) -> None:
    # Where an index is built again, a pass follows that.
    sides.main.execute("DROP INDEX embeddings_embedding_hnsw")
    env = {"PIPELINE_TESTING": "1", "PIPELINE_FAILPOINT": "before_loaded:kill"}
    sides.copy(**env).expect(-9)
    sides.legacy.execute(
        "UPDATE embeddings SET content = 'new' WHERE id::text = ANY (%s)", [sides.key(1), sides.key(2)]
    )
    done = sides.copy("--json", "--settle", str(rows)).expect(0).json["copy"]
    assert (done["changed_rows"], done["settled"]) == (2, rows == 0)
    assert content(sides.main) == content(sides.legacy)
