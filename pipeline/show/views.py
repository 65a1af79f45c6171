"""What each check of verify found, as a report shows it; a check that is not known here is shown by its figures alone.

Figures are taken as they are: what is not there is left out, what nobody expected is shown too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from pipeline.events import CheckDone
from pipeline.show import charts
from pipeline.show.exhibits import (
    SIDES,
    Cell,
    Chart,
    Exhibit,
    Figures,
    Grid,
    Listing,
    beside,
    cell,
    exact,
    label,
    mapping,
    number,
    numbers,
    others,
    records,
    shortened,
    words,
)
from pipeline.wording import counted

_KINDS = {
    "missing": "missing on the target",
    "extra": "only on the target",
    "different": "other content",
    "doubled": "key doubled",
}
# The checks of a full verify, in their order.
LADDER = ("counts", "digests", "census", "parity", "recall", "plan", "latency", "application")


def exhibits(check: CheckDone, name: str) -> list[Exhibit]:
    """Return what is shown of a check. ``name`` is the check's in the page, for the names of charts."""
    figures = Figures(check.figures)
    view = _VIEWS.get(check.name)
    shown = list(view(figures, name)) if view is not None else []
    return [*shown, *others(figures.rest(), "Further figures" if shown else "Figures")]


def _counts(figures: Figures, _: str) -> Iterator[Exhibit]:
    rows = []
    for name, what in (("rows", "rows"), ("embeddings", "with an embedding")):
        source, target = (figures.take(f"{side}_{name}") for side in SIDES)
        if source is None and target is None:
            continue
        here, there = number(source), number(target)
        apart = None if here is None or there is None else there - here
        word = "" if apart is None else f"{apart:+,.0f} on the target" if apart else "equal"
        rows.append((Cell(text=what), cell(source), cell(target), Cell(text=word, kind="bad" if apart else "word")))
    if rows:
        yield Grid(caption="Rows on both sides", heads=("", *SIDES, ""), rows=rows)


def _digests(figures: Figures, name: str) -> Iterator[Exhibit]:
    kinds = {kind: numbers(counts) for kind, counts in figures.mapping("places").items()}
    places = {_KINDS.get(kind, label(kind)): [int(count) for count in counts] for kind, counts in kinds.items()}
    places = {kind: counts for kind, counts in places.items() if sum(counts) > 0}
    if places:
        caption = "Where in the table the differing rows lie, by pages"
        yield Chart(caption=caption, svg=charts.places_chart(f"{name}-places", places))
    total = figures.number("differing_rows")
    names = {f"{kind}_rows": what for kind, what in _KINDS.items()}
    figures_shown = {"rows": "rows compared", **names, "ignored_columns": "columns not compared"}
    yield from figures.facts("Rows, to the byte", figures_shown)
    if columns := figures.mapping("columns"):
        rows = [(exact(column), cell(count)) for column, count in columns.items()]
        yield Grid(caption="Columns with other content", heads=("column", "rows"), rows=rows)
    yield from _keys(figures.records("keys"), total)


def _keys(keys: Sequence[Mapping[str, object]], total: float | None) -> Iterator[Exhibit]:
    if not keys:
        return
    every = total is None or total <= len(keys)
    caption = "Differing keys" if every else f"Differing keys, the first {len(keys):,} of {total:,.0f}"
    with_columns = any("columns" in key for key in keys)
    heads = ("what", "key", "columns")[: 3 if with_columns else 2]
    rows = [
        (
            Cell(text=_KINDS.get(str(key.get("kind")), words(key.get("kind")))),
            exact(key.get("key")),
            *([cell(key["columns"] if key.get("columns") else None)] if with_columns else []),
        )
        for key in keys
    ]
    yield Grid(caption=caption, heads=heads, rows=rows)


def _quarantine(figures: Figures, _: str) -> Iterator[Exhibit]:
    yield from figures.facts(
        "Rows that cannot be carried",
        {"quarantined_rows": "in quarantine", "unknown_rows": "neither carried nor in quarantine"},
    )
    yield from _keys(figures.records("keys"), None)


def _census(figures: Figures, name: str) -> Iterator[Exhibit]:
    sides = {side: figures.mapping(side) for side in SIDES}
    curves = {side: numbers(census.pop("norm_quantiles", None)) for side, census in sides.items()}
    if curves := {side: lengths for side, lengths in curves.items() if len(lengths) > 1}:
        yield Chart(caption="Lengths of the vectors", svg=charts.norms_chart(f"{name}-norms", curves))
    differences = figures.take("differences")
    for census in sides.values():
        sizes = census.get("dimensions")
        if isinstance(sizes, (list, tuple)) and all(len(numbers(pair)) == 2 for pair in sizes):
            many = ", ".join(f"{size:,} ({counted(rows, 'row')})" for size, rows in sizes)
            census["dimensions"] = sizes[0][0] if len(sizes) == 1 else many or None
    named = [str(one) for one in differences] if isinstance(differences, (list, tuple)) else []
    if "norm_quantiles" in named:
        named.append("norms")
    yield from beside("What is in the vectors", sides, differences=named, name_of=_census_name)
    if "norm_quantiles" in named and curves:
        shares = {
            side: {f"{100 * place // (len(lengths) - 1)} %": length for place, length in enumerate(lengths)}
            for side, lengths in curves.items()
        }
        yield from beside("Lengths: this share of the rows has at most", {side: shares.get(side, {}) for side in SIDES})


def _census_name(name: str) -> str:
    if name == "norms.normalised":
        return "share of length 1"
    return label(name.replace("norms.", "length."))


def _parity(figures: Figures, _: str) -> Iterator[Exhibit]:
    metrics = figures.mapping("metrics")
    wrong = figures.records("disagreements") or [
        {**one, "metric": metric}
        for metric, found in metrics.items()
        for one in records(mapping(found).get("disagreements"))
    ]
    if metrics:
        rows = [
            (
                Cell(text=metric.replace("_", " ")),
                cell(mapping(found).get("asked")),
                cell(mapping(found).get("queries")),
                cell(len(records(mapping(found).get("disagreements")))),
            )
            for metric, found in metrics.items()
        ]
        yield Grid(
            caption="Exact answers of both sides",
            heads=("distance", "queries wanted", "queries asked", "answered differently"),
            rows=rows,
        )
        for name in ("queries", "asked"):
            figures.take(name)
    names = {
        "queries": "queries asked",
        "k": "neighbours of each",
        "metric": "distance",
        "tolerance": "distances are equal within",
        "budget_seconds": "time allowed, seconds",
        "stored_queries": "queries from stored vectors",
        "baseline_queries": "queries from the baseline",
        "text_queries": "queries from texts",
        "baseline_at": "baseline captured at",
        "baseline_changed": "answered differently by the source itself since then",
    }
    yield from figures.facts("How it was asked", names)
    excluded = figures.mapping("excluded")
    yield from beside("Rows that no search can find", {side: mapping(excluded.get(side)) for side in SIDES})
    if wrong:
        differing = [
            (exact(one.get("query")), cell(one.get("reason")), cell(label(words(one.get("metric"))))) for one in wrong
        ]
        heads = ("query, by its key", "why", "distance")
        yield shortened(Grid(caption="Queries that are answered differently", heads=heads, rows=differing))


def _recall(figures: Figures, name: str) -> Iterator[Exhibit]:
    least, k, recommended = figures.number("min_recall"), figures.take("k"), figures.take("recommended")
    knob = figures.take("knob")
    sides = {side: figures.mapping(side) for side in reversed(SIDES)}
    # A setting of one method says nothing of the other's: each has a chart of its own.
    curves: dict[str, list[charts.RecallCurve]] = {}
    for side, found in sides.items():
        steps = [
            (value, mean, number(step.get("p05")))
            for step in records(found.get("steps"))
            if (value := number(step.get("value"))) is not None and (mean := number(step.get("mean"))) is not None
        ]
        if steps:
            curve = charts.RecallCurve(
                side=side, steps=sorted(steps, key=lambda step: step[0]), in_force=number(found.get("in_force"))
            )
            curves.setdefault(words(found.get("method")), []).append(curve)
    for method, drawn in curves.items():
        setting = {"hnsw": "hnsw.ef_search", "ivfflat": "ivfflat.probes"}.get(method, "setting")
        svg = charts.recall_chart(
            f"{name}-{method if method in {'hnsw', 'ivfflat'} else 'index'}", drawn, setting, least
        )
        yield Chart(caption=f"Share of the exact answers that the index finds, by {setting}", svg=svg)
    facts = {
        "wanted at least": least,
        "setting": knob,
        "smallest value that reaches it": recommended,
        "neighbours of each query": k,
        "distance": figures.take("metric"),
        "queries": figures.take("queries"),
    }
    yield Grid(caption="What was wanted", rows=[(Cell(text=what), cell(value)) for what, value in facts.items()])
    for side, found in sides.items():
        if taken := records(found.pop("steps", None)):
            yield _steps(side, taken, found.get("in_force"), recommended if side == "target" else None)
    of_index = {"in_force": "value in force"}
    by_side = {side: sides[side] for side in SIDES}
    yield from beside("The indexes", by_side, name_of=lambda name: of_index.get(name, name.removeprefix("options.")))


def _steps(side: str, steps: Sequence[Mapping[str, object]], in_force: object, recommended: object) -> Grid:
    names = {
        "mean": "mean",
        "minimum": "minimum",
        "p05": "5th percentile",
        "under_returned": "too few rows",
        "queries": "queries",
    }
    rows = []
    for step in steps:
        value = step.get("value")
        marks = [
            mark
            for mark, at in (("in force", in_force), ("recommended", recommended))
            if value is not None and at == value
        ]
        rows.append(
            (cell(value), *(_share(name, step.get(name)) for name in names), Cell(text=", ".join(marks), kind="word"))
        )
    return Grid(caption=f"Recall on the {side}", heads=("value", *names.values(), ""), rows=rows)


def _share(name: str, value: object) -> Cell:
    share = number(value) if name in {"mean", "minimum", "p05"} else None
    return cell(value) if share is None else Cell(text=f"{share:.3f}", kind="number")


def _plan(figures: Figures, _: str) -> Iterator[Exhibit]:
    names = {
        "index": "index",
        "method": "method",
        "opclass": "operator class",
        "metric": "distance",
        "used": "used by the application's query",
    }
    plan, advice = figures.take("plan"), figures.take("advice")
    yield from figures.facts("The index that serves the application's query", names)
    settings = figures.mapping("settings")
    sides = {side: mapping(settings.get(side)) for side in SIDES}
    yield from beside("Search settings in force", sides, name_of=str)
    if filtered := figures.mapping("filter"):
        labels = {
            "key": "key of the metadata",
            "matching_rows": "rows that match",
            "k": "rows asked for",
            "exact": "found by exact search",
            "found": "found through the index",
            "found_now": "found by the plan of today",
            "found_on_source": "found on the source",
            "used": "that plan uses the index",
            "remedy": "what helps",
        }
        yield Grid(
            caption="A search filtered by metadata",
            rows=[(Cell(text=labels.get(name, label(name))), cell(value)) for name, value in filtered.items()],
        )
    if isinstance(advice, (list, tuple)) and advice:
        rows = [(cell(place), Cell(text=words(one))) for place, one in enumerate(advice, start=1)]
        yield Grid(caption="Advice", heads=("", "what to know"), rows=rows)
    if plan:
        yield Listing(caption="Plan of the application's query on the target", text=words(plan))


def _latency(figures: Figures, name: str) -> Iterator[Exhibit]:
    clients, sides = figures.take("clients"), {side: figures.mapping(side) for side in SIDES}
    counts = [words(one) for one in clients] if isinstance(clients, (list, tuple)) else []
    counts = list(dict.fromkeys([*counts, *(count for found in sides.values() for count in found)]))
    drawn: list[charts.LatencyRow] = []
    rows: list[tuple[Cell, ...]] = []
    for count, heat in [(count, heat) for count in counts for heat in ("cold", "warm")]:
        way = f"{count} client{'' if count == '1' else 's'}, {heat}"
        points: dict[str, tuple[float, float, float]] = {}
        for side in SIDES:
            if not (times := mapping(mapping(sides[side].get(count)).get(heat))):
                continue
            known = numbers([times.get(p) for p in ("p50", "p95", "p99")])
            if len(known) == 3:
                points[side] = (known[0], known[1], known[2])
            rows.append(
                (
                    Cell(text=way),
                    Cell(text=side),
                    *map(_time, (times.get(p) for p in ("p50", "p95", "p99"))),
                    cell(times.get("queries")),
                )
            )
        if points:
            drawn.append(charts.LatencyRow(label=way, sides=points))
    if drawn:
        yield Chart(caption="Time of a query: p50, p95 and p99", svg=charts.latency_chart(f"{name}-latency", drawn))
    if rows:
        heads = ("how", "side", "p50, ms", "p95, ms", "p99, ms", "queries")
        yield Grid(caption="Time of a query, milliseconds", heads=heads, rows=rows)


def _time(value: object) -> Cell:
    time = number(value)
    return cell(value) if time is None else Cell(text=f"{time:,.2f}" if time < 100 else f"{time:,.0f}", kind="number")


def _application(figures: Figures, _: str) -> Iterator[Exhibit]:
    findings = figures.records("findings")
    yield from figures.facts(
        "How the application finds the table",
        {"role": "role", "resolves_to": "the name leads to", "search_path": "search path"},
    )
    if findings:
        rows = [
            (_severity(one.get("severity")), cell(one.get("fact")), exact(one.get("hint") or "")) for one in findings
        ]
        yield Grid(caption="Findings", heads=("", "what was found", "what to do"), rows=rows)


def _severity(severity: object) -> Cell:
    return Cell(text=words(severity), kind="bad" if severity == "fail" else "word")


_VIEWS: Mapping[str, Callable[[Figures, str], Iterator[Exhibit]]] = {
    "counts": _counts,
    "digests": _digests,
    "quarantine": _quarantine,
    "census": _census,
    "parity": _parity,
    "recall": _recall,
    "plan": _plan,
    "latency": _latency,
    "application": _application,
}
