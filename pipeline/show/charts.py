"""Charts of a report as SVG, in the colours and the type of the page that they are pasted into.

They need the optional extra ``report``. Nothing of the rows' own text is drawn: only numbers and fixed words.
"""

import io
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that stand for variables of the page's style sheet: one set for light, one for dark, one for paper.
INK, MUTED, GRID, SOURCE, TARGET, BAD, PAPER = (f"#{n:02x}{n:02x}{n:02x}" for n in range(1, 8))
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    SOURCE: "var(--source)",
    TARGET: "var(--target)",
    BAD: "var(--bad)",
    PAPER: "var(--paper)",
}
_SIDE_COLOURS = {"source": SOURCE, "target": TARGET}
# Inches; on a phone the text is still about 9 px high.
WIDTH = 4.6
# Of any type: the library's own type of a style names every key there is.
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    # Numbers are never mathematics: a $ stays a $.
    "text.parse_math": False,
    "font.size": 10.0,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.formatter.useoffset": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
}
# On a wider range than this the small values would lie on top of each other.
_LOGARITHMIC_FROM = 12.0
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallCurve:
    """One side's recall by the setting: ``steps`` are (value, mean, 5th percentile or None), shares from 0 to 1."""

    side: str
    steps: Sequence[tuple[float, float, float | None]]
    in_force: float | None


def recall_chart(name: str, curves: Sequence[RecallCurve], knob: str, least: float | None) -> str:
    """Draw recall against the setting of each side; the least that is wanted as a line, what is in force ringed."""
    with _Canvas(name, height=3.1) as canvas:
        axes = canvas.axes()
        values = sorted({value for curve in curves for value, _, _ in curve.steps})
        for curve in curves:
            _draw_recall(axes, curve)
            canvas.say(f"{curve.side}: " + ", ".join(f"{value:g}: {mean:.3f}" for value, mean, _ in curve.steps))
            if curve.in_force is not None:
                canvas.say(f"in force on the {curve.side}: {curve.in_force:g}")
        drawn = [share for curve in curves for _, *shares in curve.steps for share in shares if share is not None]
        if least is not None:
            axes.axhline(least, color=BAD, linewidth=1.2, linestyle=(0, (6, 2, 1, 2)), label=f"wanted: {least:g}")
            canvas.say(f"wanted: {least:g}")
            drawn.append(least)
        span = max(1.0 - min(drawn), 0.02)
        axes.set_ylim(max(0.0, min(drawn) - span * 0.12) if min(drawn) else -0.03, 1.0 + span * 0.05)
        if values[0] > 0 and values[-1] > values[0]:
            axes.set_xscale("log")
        _ticks_at(axes, values)
        axes.set_xlabel(knob)
        axes.set_ylabel("recall")
        canvas.legend(columns=2)
        return canvas.svg(f"Recall against {knob}")


def _draw_recall(axes: "Axes", curve: RecallCurve) -> None:
    colour, is_target = _SIDE_COLOURS[curve.side], curve.side == "target"
    line, marker = ("-", "o") if is_target else ("--", "s")
    values, means = [value for value, _, _ in curve.steps], [mean for _, mean, _ in curve.steps]
    axes.plot(values, means, color=colour, linestyle=line, marker=marker, markersize=4.5, label=f"{curve.side}, mean")
    lows = [(value, low) for value, _, low in curve.steps if low is not None]
    if lows:
        axes.plot(
            [value for value, _ in lows],
            [low for _, low in lows],
            color=colour,
            linewidth=1.0,
            linestyle=":",
            marker=marker,
            markersize=2.5,
            label=f"{curve.side}, 5th percentile",
        )
    if curve.in_force is None:
        return
    # The shape of the marker tells the side: one entry of the legend serves both.
    label = "" if any(line.get_label() == "in force" for line in axes.lines) else "in force"
    at = [mean for value, mean in zip(values, means, strict=True) if value == curve.in_force]
    if at:
        (ring,) = axes.plot([curve.in_force], at, color=colour, linestyle="", marker=marker, label=label)
        ring.set(markersize=11 if is_target else 12, markeredgewidth=1.4, fillstyle="none")
    else:
        axes.axvline(curve.in_force, color=colour, linewidth=1.0, linestyle=":", label=label)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRow:
    """One way of asking, with p50, p95 and p99 of each side in milliseconds."""

    label: str
    sides: Mapping[str, tuple[float, float, float]]


def latency_chart(name: str, rows: Sequence[LatencyRow]) -> str:
    """Draw a line from p50 over p95 to p99 for each way of asking and each side."""
    with _Canvas(name, height=1.25 + 0.42 * len(rows)) as canvas:
        axes = canvas.axes()
        sides = [side for side in _SIDE_COLOURS if any(side in row.sides for row in rows)]
        for place, row in enumerate(rows):
            for side, points in row.sides.items():
                level = place + (-0.16 if side == "source" else 0.16)
                style = "--" if side == "source" else "-"
                colour = _SIDE_COLOURS[side]
                axes.plot([points[0], points[2]], [level, level], color=colour, linestyle=style, linewidth=1.4)
                for point, marker in zip(points, "oD|", strict=True):
                    axes.plot([point], [level], color=colour, marker=marker, markersize=8 if marker == "|" else 5)
                numbers = ", ".join(f"p{p} {ms:.3g} ms" for p, ms in zip((50, 95, 99), points, strict=True))
                canvas.say(f"{row.label}, {side}: {numbers}")
        for side in sides:
            style = "--" if side == "source" else "-"
            axes.plot([], [], color=_SIDE_COLOURS[side], linestyle=style, linewidth=2, label=side)
        for marker, label in zip("oD|", ("p50", "p95", "p99"), strict=True):
            axes.plot([], [], color=MUTED, linestyle="", marker=marker, markersize=6, label=label)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        _milliseconds(axes, [ms for row in rows for points in row.sides.values() for ms in points])
        canvas.legend(columns=5)
        return canvas.svg("Time of a query, both sides")


def _milliseconds(axes: "Axes", points: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    least, most = min(points), max(points)
    if least > 0 and most / least > _LOGARITHMIC_FROM:
        axes.set_xscale("log")
        axes.set_xlim(least / 1.3, most * 1.3)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if most / least < 300 else (1.0,)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("milliseconds, logarithmic")
    else:
        axes.set_xlim(0, most * 1.08 or 1.0)
        axes.set_xlabel("milliseconds")


def norms_chart(name: str, quantiles: Mapping[str, Sequence[float]]) -> str:
    """Draw the lengths of both sides' vectors, from the shortest to the longest; evenly spaced quantiles."""
    with _Canvas(name, height=2.6) as canvas:
        axes = canvas.axes()
        for side, lengths in quantiles.items():
            shares = [100.0 * place / (len(lengths) - 1) for place in range(len(lengths))]
            # The source's line is broad and lies below, so that two equal sides still show as two.
            width, style = (5.0, "-") if side == "source" else (1.6, "-")
            marker = "" if side == "source" else "o"
            alpha = 0.45 if side == "source" else 1.0
            axes.plot(
                shares,
                lengths,
                color=_SIDE_COLOURS[side],
                linewidth=width,
                linestyle=style,
                marker=marker,
                markersize=3,
                alpha=alpha,
                label=side,
            )
            marks = (0, len(lengths) // 2, len(lengths) - 1)
            words = zip(("shortest", "median", "longest"), marks, strict=True)
            canvas.say(f"{side}: " + ", ".join(f"{word} {lengths[place]:.6g}" for word, place in words))
        every = [length for lengths in quantiles.values() for length in lengths]
        low, high = min(every), max(every)
        # Normalised vectors differ in the last digit: that is a flat line, not mountains.
        room = max((high - low) * 0.08, high * 0.01, 1e-9)
        axes.set_ylim(max(0.0, low - room), high + room)
        axes.set_xlim(-2, 102)
        axes.set_xticks([0, 25, 50, 75, 100], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        axes.set_xlabel("share of the rows, the shortest first")
        axes.set_ylabel("length")
        canvas.legend(columns=2)
        return canvas.svg("Lengths of the vectors, both sides")


def places_chart(name: str, places: Mapping[str, Sequence[int]]) -> str:
    """Draw how many differing rows lie where in the table, a strip for each kind; bins of equal width."""
    from matplotlib.ticker import MaxNLocator

    with _Canvas(name, height=0.55 + 1.0 * len(places)) as canvas:
        for axes, (kind, counts) in zip(canvas.strips(len(places)), places.items(), strict=True):
            edges = [100.0 * place / len(counts) for place in range(len(counts) + 1)]
            axes.stairs(list(counts), edges, fill=True, color=BAD)
            axes.set_title(f"{kind}: {sum(counts):,}", loc="left", fontsize=10)
            axes.set_xlim(0, 100)
            axes.set_ylim(0, max(counts) * 1.1)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
            axes.grid(visible=False, axis="x")
            parts = [sum(counts[place * len(counts) // 4 : (place + 1) * len(counts) // 4]) for place in range(4)]
            canvas.say(f"{kind}, by quarters of the table: " + ", ".join(f"{part:,}" for part in parts))
        axes.set_xticks([0, 25, 50, 75, 100], ["start", "25 %", "50 %", "75 %", "end"])
        axes.set_xlabel("place in the table")
        return canvas.svg("Where in the table the differing rows lie")


def _ticks_at(axes: "Axes", values: Sequence[float]) -> None:
    """Put a tick at every value that has room for its label."""
    from matplotlib.ticker import NullLocator

    kept: list[float] = []
    for value in values:
        here, last = (axes.transData.transform((one, 0.5))[0] for one in (value, kept[-1] if kept else value))
        if not kept or here - last > axes.bbox.width * 0.07:
            kept.append(value)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(kept, [f"{value:g}" for value in kept])


class _Canvas:
    """A figure in the report's style, whatever the user's own settings of the library are."""

    def __init__(self, name: str, *, height: float) -> None:
        self._name, self._height = name, height
        self._said: list[str] = []

    def __enter__(self) -> "_Canvas":
        # Where it may keep no cache, the library says so on stderr at length, and draws all the same.
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        import matplotlib as mpl
        from matplotlib.figure import Figure

        self._context = mpl.rc_context()
        self._context.__enter__()
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        self._figure: Figure = Figure(figsize=(WIDTH, self._height), layout="constrained", facecolor="none")
        return self

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(None, None, None)

    def axes(self) -> "Axes":
        (axes,) = self.strips(1)
        return axes

    def strips(self, count: int) -> list["Axes"]:
        """Return so many axes, one below the other, with one scale from left to right."""
        every = list(self._figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])
        for axes in every:
            axes.patch.set_visible(False)
            axes.tick_params(length=0)
        return every

    def legend(self, *, columns: int) -> None:
        self._figure.legend(loc="outside upper left", ncols=columns, columnspacing=1.2, handletextpad=0.5)

    def say(self, words: str) -> None:
        """Add to what is read to somebody who does not see the chart."""
        self._said.append(words)

    def svg(self, title: str) -> str:
        drawn = io.StringIO()
        self._figure.savefig(drawn, format="svg", metadata={"Date": None})
        return _for_page(drawn.getvalue(), self._name, title, "; ".join(self._said) + ".")


def _for_page(drawn: str, name: str, title: str, words: str) -> str:
    """Return the drawing as an element of the page: its names apart from other charts', its colours the page's."""
    root = ElementTree.fromstring(drawn)
    for parent in list(root.iter()):
        for child in list(parent):
            # The library's style element would speak for the whole page, its metadata names addresses.
            if child.tag in {f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"}:
                parent.remove(child)
    used = {reference for element in root.iter() for reference in _references(element)}
    for element in root.iter():
        if (own := element.attrib.pop("id", None)) in used:
            element.set("id", f"{name}-{own}")
        if (link := element.attrib.pop(_XLINK, None)) is not None:
            element.set("href", f"#{name}-{link.removeprefix('#')}")
        for key in ("clip-path", "style"):
            if (value := element.get(key)) is not None:
                element.set(key, _restyled(value, name))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-words"}
    for place, (tag, text) in enumerate((("title", title), ("desc", words))):
        element = ElementTree.Element(f"{{{_SVG}}}{tag}", {"id": f"{name}-{'title' if tag == 'title' else 'words'}"})
        element.text = text
        root.insert(place, element)
    ElementTree.register_namespace("", _SVG)
    return re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode"))


def _references(element: ElementTree.Element) -> list[str]:
    link = element.get(_XLINK, "")
    return [link[1:]] * bool(link) + re.findall(r"url\(#([^)]+)\)", " ".join(element.attrib.values()))


def _restyled(value: str, name: str) -> str:
    value = value.replace("url(#", f"url(#{name}-")
    for colour, variable in _VARIABLES.items():
        value = value.replace(colour, variable)
    # The family of letters is the page's.
    return re.sub(r"font-family: [^;]*;? ?", "", re.sub(r"font: ([0-9.]+px) [^;]*", r"font-size: \1", value))
