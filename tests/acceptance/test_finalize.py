"""The end of a cutover: what goes from legacy, what stays, and the way back until then with what refuses it."""

from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.errors import EXIT_DIFFERENCES, EXIT_OK, EXIT_REFUSED
from tests.cutovers import BACK, DIMENSIONS, Cutover, points_to
from tests.data import content
from tests.fences import objects
from tests.support import Database
from tests.switches import FAST, Make, copies, evidence, refuses, standing, taken_back, write

KEYS = "(SELECT id FROM public.embeddings WHERE content NOT LIKE 'on main%' ORDER BY id LIMIT {})"
KEY = KEYS.format(1)


@pytest.fixture
def bench(used: Cutover) -> Iterator[Cutover]:
    with taken_back(used):
        yield used


def catalog(database: Database) -> list[Any]:
    """Return a catalog without the schemas of temporary tables, which each session's first one makes for good."""
    return [one for one in objects(database) if not str(one[1]).startswith(("pg_temp", "pg_toast_temp"))]


def use_main(bench: Cutover, times: int = 1) -> None:
    """Add, change and delete rows on main, as the application does after the switch: five writes each time."""
    bench.main.execute(
        f"DELETE FROM public.embeddings WHERE id IN {KEYS.format(times)};"
        f"UPDATE public.embeddings SET content = 'on main, new' WHERE id IN {KEYS.format(times)};"
        "INSERT INTO public.embeddings (content, embedding) SELECT 'on main', (SELECT array_agg(sin(i * 0.7 + d))"
        f" FROM generate_series(1, {DIMENSIONS}) AS d)::vector FROM generate_series(1, {3 * times}) AS i"
    )


def test_legacy_is_as_it_was_before_the_project_but_for_its_rows(make: Make) -> None:
    bench = make()
    before, rows = catalog(bench.legacy), content(bench.legacy)
    bench.pipeline(*FAST, "--until", "switch").expect(EXIT_OK)
    said = bench.pipeline("finalize", "--yes").expect(EXIT_REFUSED)
    assert "is not complete: smoke, watch not done\nhint:  end it first: pipeline cutover --execute" in said.err
    bench.pipeline(*FAST).expect(EXIT_OK)
    use_main(bench)
    on_main = content(bench.main)
    done = bench.pipeline("finalize", "--yes", "--json").expect(EXIT_OK).json["cutover"]
    assert (done["outcome"], done["steps"][0][1]) == ("finalized", "removed: legacy's fence")
    assert (catalog(bench.legacy), content(bench.legacy)) == (before, rows)
    remains = "\n".join(done["remains"])
    for part in ("drop it when you are sure", "the ledger on main", "LEGACY_*", str(copies(bench.folder)[0])):
        assert part in remains
    assert points_to(bench) == "main"
    assert "finalized" in bench.pipeline("status").expect(EXIT_OK).out
    # There is no way back any more, and no second time.
    for command in (BACK, ("finalize", "--yes")):
        assert bench.pipeline(*command).expect(EXIT_REFUSED).err.startswith("error: ")
    # What the application has deleted on main since would come back from legacy.
    for attempt in (FAST, ("cutover", "--rehearse", "--yes", "--skip-backup")):
        said = bench.pipeline(*attempt).expect(EXIT_REFUSED)
        assert "already: there is nothing to switch" in said.err
    said = bench.pipeline("sync").expect(EXIT_REFUSED)
    assert "was left for good by cutover" in said.err and "would bring back what was deleted" in said.err
    bench.pipeline("sync", "--dry-run").expect(EXIT_DIFFERENCES)
    assert content(bench.main) == on_main
    write(bench.main)


def test_way_back_takes_new_rows_to_legacy_and_finalize_then_opens_main(make: Make) -> None:
    bench = make(rows=500)
    before, text = catalog(bench.legacy), bench.env_file.read_bytes()
    guarded = catalog(bench.main)
    bench.pipeline(*FAST).expect(EXIT_OK)
    # A thousand writes.
    use_main(bench, 200)
    on_main = content(bench.main)
    done = bench.pipeline(*BACK, "--after-switch", "echo back", "--json").expect(EXIT_OK)
    assert "\nback\n" in done.err
    told = done.json["cutover"]
    assert [name for name, *_ in told["steps"]] == [
        *("back-close", "back-sync", "back-verify", "back-switch", "back-open", "back-commands")
    ]
    assert sum(seconds for *_, seconds in told["steps"]) > 0
    found = evidence(bench, "back-sync")
    assert (found["inserted"], found["updated"], found["deleted"]) == (600, 200, 200)
    assert content(bench.legacy) == on_main == content(bench.main)
    bench.verify()
    assert bench.env_file.read_bytes() == text
    assert "filled by the pipeline" in refuses(bench.main)
    bench.pipeline(*BACK).expect(EXIT_REFUSED)
    # A rehearsal between leaves to finalize what the cutover has left.
    bench.pipeline("cutover", "--rehearse", "--yes", "--skip-backup").expect(EXIT_OK)
    removed = bench.pipeline("finalize", "--yes").expect(EXIT_OK)
    assert "removed: main's guard, legacy's ledger (schema pipeline)" in removed.err
    assert (catalog(bench.legacy), catalog(bench.main)) == (before, guarded)
    write(bench.main, "DELETE FROM public.embeddings WHERE content = 'nothing'")
    # What came from main and is deleted on legacy since goes from main too.
    write(bench.legacy, "DELETE FROM public.embeddings WHERE content = 'on main'")
    bench.pipeline(*FAST).expect(EXIT_OK)
    assert points_to(bench) == "main"
    assert bench.main.value("SELECT count(*) FROM public.embeddings WHERE content = 'on main'") == 0


def test_next_cutover_goes_on_from_a_way_back(bench: Cutover) -> None:
    for _ in range(2):
        bench.pipeline(*FAST).expect(EXIT_OK)
        use_main(bench)
        bench.pipeline(*BACK).expect(EXIT_OK)
        assert content(bench.legacy) == content(bench.main)
    assert len(copies(bench.folder)) == 2
    # Only what stands under way is shown as done.
    plan = bench.pipeline("cutover", "--json").expect(EXIT_OK).json["plan"]
    assert (plan["cutover"], plan["done"]) == (None, [])


def test_legacy_that_somebody_opened_and_wrote_is_not_overwritten(bench: Cutover) -> None:
    bench.pipeline(*FAST).expect(EXIT_OK)
    use_main(bench)
    key = bench.main.value(f"SELECT {KEY}::text")
    write(bench.legacy, "ALTER TABLE public.embeddings DISABLE TRIGGER ALL")
    write(bench.legacy, f"UPDATE public.embeddings SET content = 'theirs' WHERE id = '{key}'")
    before = standing(bench), content(bench.legacy), content(bench.main)
    said = bench.pipeline(*BACK).expect(EXIT_REFUSED)
    assert (
        f"legacy's public.embeddings was written since it was closed: 1 row that main has otherwise: {key}" in said.err
    )
    assert "make main's rows the same, and run this again; or overwrite legacy's with main's: --take-main" in said.err
    assert (standing(bench), content(bench.legacy), content(bench.main)) == before
    # As it says.
    write(bench.main, f"UPDATE public.embeddings SET content = 'theirs' WHERE id = '{key}'")
    bench.pipeline(*BACK).expect(EXIT_OK)
    assert content(bench.legacy) == content(bench.main)
    write(bench.legacy)


def test_row_that_somebody_deleted_on_legacy_is_told_and_comes_back_where_that_is_asked_for(bench: Cutover) -> None:
    bench.pipeline(*FAST).expect(EXIT_OK)
    key = bench.legacy.value(f"SELECT {KEY}::text")
    write(bench.legacy, "ALTER TABLE public.embeddings DISABLE TRIGGER ALL")
    write(bench.legacy, f"DELETE FROM public.embeddings WHERE id = '{key}'")
    assert key in bench.pipeline(*BACK).expect(EXIT_REFUSED).err
    bench.pipeline(*BACK, "--take-main").expect(EXIT_OK)
    assert content(bench.legacy) == content(bench.main)
    assert bench.legacy.value("SELECT count(*) FROM public.embeddings WHERE id = %s", key) == 1
