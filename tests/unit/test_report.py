"""The report of a verify: one page that says all of it, and loads nothing."""

import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import PipelineError, SettingsError
from pipeline.events import CheckDone, VerifyDone
from pipeline.show.report import check_report_path, write_report
from tests.support import CANARY, clean_environment

BEGAN = datetime(2026, 11, 23, 2, 58, 11, tzinfo=UTC)
SETTINGS = [("DB_HOST", "main.internal"), ("DB_PASSWORD", "set, not shown")]
# What a key may hold, and how the page has to say it.
KEYS = {
    "plain-1": "plain-1",
    "<script>alert('x')</script>&amp;": "<script>alert('x')</script>&amp;",
    "</code></table><img src=x onerror=y>": "</code></table><img src=x onerror=y>",
    "שלום עולם": "שלום עולם",
    "file\u202egpj.exe": "fileU+202Egpj.exe",
    "a\x00b\x1b[31m": "aU+0000bU+001B[31m",
    "two\nlines": "twoU+000Alines",
    "trailing  ": "trailing  ",
    "no\u00a0break": "noU+00A0break",
    "lone\ud800half": "loneU+D800half",
    "{{ 7 * 7 }}": "{{ 7 * 7 }}",
    "x" * 3000: "x" * 3000,
}
NAMES = ("id", "content", "metadata", "embedding")
VOID = frozenset({"meta", "br"})


class Page(HTMLParser):
    """A page taken apart: its elements, its text, and that of every check, code and drawing; all is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.texts: dict[str, list[str]] = {"article": [], "code": [], "desc": []}
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
        if tag in self.texts:
            self.texts[tag].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        for tag, texts in self.texts.items():
            if tag in self._open:
                texts[-1] += data

    @property
    def charts(self) -> list[str]:
        return [attributes["aria-labelledby"].split("-title")[0] for tag, attributes in self.elements if tag == "svg"]

    def article(self, name: str) -> str:
        """Return the text of a check's own part of the page."""
        (found,) = (text for text in self.texts["article"] if text.split(maxsplit=1)[0] == name)
        return found


def check(name: str, verdict: Any = "pass", summary: str = "all is well", **figures: object) -> CheckDone:
    return CheckDone(name=name, verdict=verdict, summary=summary, figures=figures, seconds=1.25)


def done(*checks: CheckDone, **more: Any) -> VerifyDone:
    verdicts = {one.verdict for one in checks}
    facts: dict[str, Any] = {
        "verdict": "fail" if "fail" in verdicts else "partial" if "partial" in verdicts else "pass",
        "kind": "full",
        "source": "reader@legacy.internal:5433/rag",
        "target": "owner@main.internal:5432/app",
        "source_server": "PostgreSQL 16.14, pgvector 0.8.5",
        "target_server": "PostgreSQL 18.4, pgvector 0.8.2",
        "table": "public.embeddings",
        "columns": NAMES,
        "ignored": (),
        "began": BEGAN,
        "ended": BEGAN + timedelta(seconds=74.3),
        "tool_version": "0.1.0",
        "checks": checks,
    }
    return VerifyDone(**(facts | more))


def side(**more: object) -> dict[str, object]:
    steps = [
        {"value": value, "mean": mean, "minimum": 0.1, "p05": mean - 0.2, "under_returned": 0, "queries": 50}
        for value, mean in ((40, 0.616), (100, 0.843), (200, 0.927), (400, 0.991))
    ]
    return {"index": "by_vector", "method": "hnsw", "options": {"m": 2}, "in_force": 40, "steps": steps, **more}


def times(factor: float) -> dict[str, object]:
    heats = {
        heat: {"p50": 1.7 * much, "p95": 4.2 * much, "p99": 8.8 * much, "queries": 50}
        for heat, much in (("cold", 2.6 * factor), ("warm", factor))
    }
    return {"1": heats, "4": heats}


def census(**more: object) -> dict[str, object]:
    norms = {"minimum": 1.0, "p05": 1.1, "median": 1.5, "p95": 1.9, "maximum": 2.0, "normalised": 0.0}
    quantiles = [1 + place / 20 for place in range(21)]
    return {"rows": 4_321, "dimensions": [[768, 4_321]], "norms": norms, "norm_quantiles": quantiles, **more}


RECALL = check(
    "recall",
    k=10,
    min_recall=0.95,
    metric="cosine",
    knob="hnsw.ef_search",
    target=side(),
    source=side(index="theirs", in_force=77),
    recommended=400,
    queries=50,
)
LATENCY = check("latency", clients=[1, 4], source=times(1.8), target=times(1.0))
CENSUS = check(
    "census",
    "fail",
    "lengths differ",
    source=census(),
    target=census(zero_norms=3, norm_quantiles=[1 + place / 16 for place in range(21)]),
    differences=["zero_norms", "norm_quantiles"],
)
DIGESTS = check(
    "digests",
    "fail",
    "12 differing rows: run pipeline sync --deep",
    rows=4_321,
    differing_rows=12_345,
    missing_rows=12_000,
    extra_rows=0,
    different_rows=345,
    ignored_columns=["tsv"],
    columns={"embedding": 340, "metadata": 7},
    keys=[{"kind": "different", "key": key, "columns": ["embedding"]} for key in KEYS],
    places={"missing": [0] * 25 + [480] * 25, "extra": [0] * 50, "different": [6] * 49 + [51]},
)
PLAIN = (
    check("counts", source_rows=4_321, target_rows=4_321, source_embeddings=4_300, target_embeddings=4_299),
    check("quarantine", quarantined_rows=17, unknown_rows=0, keys=[]),
    check(
        "parity",
        "fail",
        "1 query is answered differently",
        k=10,
        tolerance=1e-6,
        metrics={"cosine": {"queries": 37, "asked": 50, "disagreements": []}},
        queries=37,
        baseline_at=None,
        excluded={"source": {"nulls": 12}, "target": {"nulls": 13}},
        disagreements=[{"query": "<b>q</b>", "reason": "rank 3 differs", "metric": "cosine"}],
    ),
    check(
        "plan",
        index="by_vector",
        used=True,
        plan="Limit\n  ->  Index Scan using by_vector",
        settings={"source": {"hnsw.ef_search": "40"}, "target": {"hnsw.ef_search": "99"}},
        filter={"key": "lang", "matching_rows": 14, "k": 10, "exact": 10, "found": 6, "remedy": "SET it"},
        advice=["one thing", "another thing"],
    ),
    check(
        "application",
        "fail",
        "the role may not read",
        role="app",
        resolves_to=None,
        search_path=["app", "public"],
        findings=[{"severity": "fail", "fact": "no SELECT", "hint": "GRANT SELECT ON x TO app"}],
    ),
)
WHOLE = done(*PLAIN[:2], DIGESTS, CENSUS, *PLAIN[2:3], RECALL, *PLAIN[3:4], LATENCY, PLAIN[4], ignored=("tsv",))


def page_of(report: VerifyDone, folder: Path) -> Page:
    write_report(folder / "report.html", report, SETTINGS)
    return Page(folder / "report.html")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(WHOLE, tmp_path_factory.mktemp("report"))


def test_page_runs_nothing_and_loads_nothing(whole: Page) -> None:
    """Only the names of namespaces look like addresses; links lead to places of the page itself."""
    ids = [attributes["id"] for _, attributes in whole.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in whole.elements:
        assert tag not in {
            "script",
            "link",
            "iframe",
            "object",
            "embed",
            "img",
            "image",
            "base",
            "form",
            "foreignobject",
        }
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name != "xmlns":
                assert "//" not in value, (tag, name, value)
            if name in {"href", "xlink:href"}:
                assert value.removeprefix("#") in ids
            for reference in re.findall(r"url\(([^)]*)\)", value):
                assert reference.removeprefix("#") in ids
            if name in {"aria-labelledby"}:
                assert set(value.split()) <= set(ids)
    style = whole.source[whole.source.index("<style>") : whole.source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_every_check_is_there_with_verdict_summary_and_time(whole: Page) -> None:
    for one in WHOLE.checks:
        assert one.summary in whole.article(one.name)
        assert f"{one.name} {'✓ pass' if one.verdict == 'pass' else '✗ fail'} " in whole.article(one.name)


def test_failures_stand_first(whole: Page) -> None:
    top = whole.text[whole.text.index("FAIL\n") : whole.text.index("What was compared")]
    for one in WHOLE.checks:
        assert (one.summary in top) == (one.verdict == "fail")
    assert "4 of 9 checks did not pass" in top


def test_page_says_what_was_compared_and_when(whole: Page) -> None:
    facts = [WHOLE.source, WHOLE.target, WHOLE.source_server, WHOLE.target_server, "id, content, metadata, embedding"]
    for text in [*facts, "tsv", "2026-11-23 02:58:11 UTC", "2026-11-23 02:59:25 UTC", "1 min 14 s", "pipeline 0.1.0"]:
        assert text in whole.text
    assert "4,321 on both sides" in whole.text
    assert "full: every row of both sides" in whole.text


def test_every_key_is_shown_to_the_blank(whole: Page) -> None:
    assert [code for code in whole.texts["code"] if code in KEYS.values()] == list(KEYS.values())
    # Nothing that turns the direction of writing, and no control character, is in the page itself.
    assert {unicodedata.category(character) for character in whole.source if character != "\n"} & {
        "Cc",
        "Cf",
        "Cs",
    } == set()


@pytest.mark.parametrize(
    ("name", "texts"),
    {
        "counts": ["4,321", "4,300", "4,299", "-1 on the target"],
        "digests": ["12,000", "345", "metadata", "340", "the first 12 of 12,345", "other content"],
        "quarantine": ["17"],
        "census": ["length, median", "1.5", "zero norms", "differs", "768", "95 %", "2.1875"],
        "parity": ["37", "50", "1e-06", "13", "<b>q</b>", "rank 3 differs"],
        "recall": ["0.616", "5th percentile", "in force", "recommended", "by_vector", "theirs", "77"],
        "plan": ["Index Scan using by_vector", "hnsw.ef_search", "99", "14", "SET it", "another thing"],
        "latency": ["4 clients, warm", "15.84", "8.80", "3.06"],
        "application": ["app, public", "no SELECT", "GRANT SELECT ON x TO app"],
    }.items(),
)
def test_figures_of_a_check_are_readable(whole: Page, name: str, texts: list[str]) -> None:
    article = whole.article(name)
    assert [text for text in texts if text not in article] == []
    # Words, not the notation of a program.
    assert not re.search(r"\{'|\[\[|\"\w+\":|\bNone\b|\bTrue\b", article)


def test_tables_say_what_they_are(whole: Page) -> None:
    tags = [tag for tag, _ in whole.elements]
    assert tags.count("table") == tags.count("caption") > 12
    assert all(attributes.get("scope") in {"row", "col"} for tag, attributes in whole.elements if tag == "th")
    assert tags.count("h1") == 1


def test_charts_tell_their_numbers(whole: Page) -> None:
    names = {one.name: f"check-{place}" for place, one in enumerate(WHOLE.checks, start=1)}
    charts = {"digests": "places", "census": "norms", "recall": "hnsw", "latency": "latency"}
    assert whole.charts == [f"{names[name]}-{chart}" for name, chart in charts.items()]
    places, norms, recall, latency = whole.texts["desc"]
    assert "missing on the target, by quarters of the table: 0, 0, 5,760, 6,240" in places
    assert "only on the target" not in places
    assert "source: shortest 1, median 1.5, longest 2" in norms
    assert "target: 40: 0.616, 100: 0.843, 200: 0.927, 400: 0.991" in recall
    assert "in force on the source: 77" in recall
    assert "wanted: 0.95" in recall
    assert "4 clients, warm, target: p50 1.7 ms, p95 4.2 ms, p99 8.8 ms" in latency
    assert all(attributes["role"] == "img" for tag, attributes in whole.elements if tag == "svg")


def test_charts_take_their_colours_from_the_page(whole: Page) -> None:
    """A colour of its own would vanish on a dark page, or on paper."""
    drawings = re.findall(r"<svg.*?</svg>", whole.source, re.DOTALL)
    assert len(drawings) == 4
    for drawing in drawings:
        assert not re.search(r"#[0-9a-fA-F]{6}\b", drawing)
        assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", drawing)) <= {
            "none",
            *(f"var(--{name})" for name in ("ink", "muted", "line", "source", "target", "bad")),
        }


@pytest.mark.parametrize(
    "figures",
    [
        {"recall": {"knob": None, "target": None, "source": None, "min_recall": 0.9}},
        {"recall": {"target": side(steps=[]), "source": None}},
        {"latency": {"clients": [1], "source": {"1": {"cold": {"p50": None, "p95": None, "p99": None}}}, "target": {}}},
        {"census": {"source": census(norm_quantiles=None, norms=None), "target": None, "differences": []}},
        {"census": {"source": census(norm_quantiles=[float("nan")] * 21), "target": {}}},
        {"digests": {"places": {"missing": [0] * 50, "extra": []}, "differing_rows": 0, "keys": []}},
        {"digests": {}},
    ],
    ids=str,
)
def test_without_figures_there_is_no_chart(figures: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    ((name, found),) = figures.items()
    page = page_of(done(check(name, **found)), tmp_path)
    assert page.charts == []
    assert "all is well" in page.article(name)


@pytest.mark.parametrize(
    "name", ["counts", "digests", "quarantine", "census", "parity", "recall", "plan", "latency", "application"]
)
@pytest.mark.parametrize("value", [None, 1, "word", [], ["word"], {}, {"a": {"b": [1]}}, [{"a": None}]], ids=str)
def test_figures_of_another_shape_do_not_stop_the_page(name: str, value: Any, tmp_path: Path) -> None:
    known = {key for one in WHOLE.checks if one.name == name for key in one.figures}
    page = page_of(done(check(name, **dict.fromkeys(known, value), unheard_of="what is new")), tmp_path)
    assert "what is new" in page.article(name)


def test_two_lengths_that_differ_never_read_alike(tmp_path: Path) -> None:
    ends = ({"minimum": 1.00000012, "maximum": 2.5}, {"minimum": 1.00000015, "maximum": 2.5})
    source, target = (census(norms=norms) for norms in ends)
    article = page_of(done(check("census", source=source, target=target, differences=["norms"])), tmp_path).article(
        "census"
    )
    assert "length, minimum1.000000121.00000015differs" in article
    assert "length, maximum2.52.5\n" in article


def test_each_method_has_its_own_chart(tmp_path: Path) -> None:
    lists = side(method="ivfflat", in_force=3)
    page = page_of(done(replace(RECALL, figures=RECALL.figures | {"source": lists})), tmp_path)
    assert page.charts == ["check-1-hnsw", "check-1-ivfflat"]
    assert "ivfflat.probes" in page.text


def test_one_value_and_a_recall_of_nothing_can_be_drawn(tmp_path: Path) -> None:
    step = {"value": 0, "mean": 0.0, "p05": None}
    page = page_of(done(check("recall", target=side(steps=[step], in_force=0), source=None)), tmp_path)
    assert page.charts == ["check-1-hnsw"]


def test_check_that_nobody_knows_is_shown_with_its_figures(tmp_path: Path) -> None:
    strange = check(
        "sharding<i>",
        "odd",
        "a new thing",
        shards=3,
        inner={"depth": {"of": [1, 2]}},
        both=[{"key": " k ", "x": 2.5}, {"key": None, "y": True}],
        source={"q": 1},
        target={"q": 2},
        text="one\ntwo",
    )
    article = page_of(done(strange), tmp_path).text
    for text in ("sharding<i>", "odd", "a new thing", "shards", "3", "1, 2", " k ", "2.5", "yes", "one\ntwo"):
        assert text in article


def test_partial_is_no_pass_and_what_was_not_run_is_named(tmp_path: Path) -> None:
    page = page_of(done(check("counts"), check("digests", "partial", "rows changed")), tmp_path)
    top = page.text[: page.text.index("What was compared")]
    assert "PARTIAL" in top
    assert "✓ PASS" not in page.text
    assert "rows changed" in top
    assert "Not looked at in this verify: census, parity, recall, plan, latency, application." in top


def test_pass_says_how_much_was_run(tmp_path: Path) -> None:
    page = page_of(done(check("counts"), check("digests"), kind="incremental"), tmp_path)
    assert "All 2 checks that were run passed." in page.text
    assert "incremental: the rows touched since the last full verdict" in page.text
    assert "FAIL" not in page.text


def test_settings_are_shown_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", CANARY)
    monkeypatch.setenv("PGPASSWORD", CANARY)
    page = page_of(WHOLE, tmp_path)
    assert CANARY not in page.text + page.source
    assert "canary" not in page.source
    for name, value in SETTINGS:
        assert f"{name}{value}" in page.text


def test_same_input_makes_the_same_bytes_in_any_process(whole: Page, tmp_path: Path) -> None:
    """Neither the seed of hashes nor the user's own style of charts has a say."""
    (tmp_path / "matplotlibrc").write_text("axes.titleweight: bold\naxes.spines.left: False\nlines.markersize: 20\n")
    code = (
        "import sys, warnings; warnings.simplefilter('error'); from pathlib import Path;"
        " from tests.unit.test_report import *; write_report(Path(sys.argv[1]), WHOLE, SETTINGS)"
    )
    for seed in ("1", "2"):
        environment = clean_environment() | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        path = tmp_path / f"{seed}.html"
        subprocess.run([sys.executable, "-c", code, str(path)], env=environment, cwd=tmp_path, check=True)
        assert path.read_text(encoding="utf-8") == whole.source


def test_page_stays_small(whole: Page) -> None:
    assert len(whole.source.encode()) < 400_000


def test_write_replaces_the_old_page_in_one_step(tmp_path: Path) -> None:
    old = tmp_path / "old.html"
    old.write_text("before")
    link = tmp_path / "link.html"
    link.symlink_to(old)
    mask = os.umask(0o022)
    try:
        with old.open(encoding="utf-8") as reader:
            write_report(link, done(check("counts")), [])
            # Who read the old page reads it to its end.
            assert reader.read() == "before"
    finally:
        os.umask(mask)
    assert link.is_symlink()
    assert old.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert old.stat().st_mode & 0o777 == 0o644
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.html", "old.html"]


def unusable(folder: Path) -> Iterator[Path]:
    (folder / "file").write_text("a file")
    os.mkfifo(folder / "pipe")
    yield folder / "not there" / "report.html"
    yield folder / "file" / "report.html"
    yield folder
    yield folder / "pipe"
    yield folder / ("x" * 300)
    yield Path("/dev/null")
    # Not even root may make a file there.
    yield Path("/proc/report.html")


def test_path_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    for path in unusable(tmp_path):
        before = sorted(tmp_path.rglob("*"))
        for refuse in (check_report_path, lambda path: write_report(path, WHOLE, [])):
            with pytest.raises(SettingsError) as caught:
                refuse(path)
            assert str(path) in caught.value.fact
            assert "--report" in caught.value.hint
        assert sorted(tmp_path.rglob("*")) == before
    assert Path("/dev/null").is_char_device()


def test_check_of_a_path_leaves_nothing_behind(tmp_path: Path) -> None:
    check_report_path(tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_disk_that_is_full_is_told(tmp_path: Path) -> None:
    """A limit on the size of files stands for it; the old page stays."""
    (tmp_path / "report.html").write_text("before")
    code = (
        "import resource, signal, sys; from pathlib import Path; from pipeline.errors import PipelineError;"
        " from tests.unit.test_report import WHOLE, write_report\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "try: write_report(Path(sys.argv[1]), WHOLE, [])\n"
        "except PipelineError as error: print(type(error).__name__, error.fact, error.hint)"
    )
    environment = clean_environment() | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "report.html")]
    out = subprocess.run(command, env=environment, cwd="/", check=True, capture_output=True, text=True).stdout
    assert out.startswith(f"{PipelineError.__name__} the report could not be written to {tmp_path}/report.html: ")
    assert "make room" in out
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.html", "before")]


@pytest.mark.parametrize(
    ("missing", "named"),
    [(["jinja2"], "jinja2, which is"), (["matplotlib", "jinja2"], "jinja2 and matplotlib, which are")],
)
def test_without_the_extra_the_error_says_what_to_type(missing: list[str], named: str, tmp_path: Path) -> None:
    code = f"""
import sys
from importlib.machinery import PathFinder
from pathlib import Path

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {missing!r} else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
from tests.unit.test_report import SettingsError, WHOLE, check_report_path, write_report
for attempt in (check_report_path, lambda path: write_report(path, WHOLE, [])):
    try:
        attempt(Path(sys.argv[1]))
    except SettingsError as error:
        print(error.fact, "|", error.hint)
"""
    environment = clean_environment() | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path / "report.html")]
    out = subprocess.run(command, env=environment, cwd="/", check=True, capture_output=True, text=True).stdout
    line = f"a report needs {named} not installed | pip install 'embeddings-pipeline[report]'\n"
    assert out == line * 2
    assert list(tmp_path.iterdir()) == []
