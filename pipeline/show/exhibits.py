"""What a report is made of, tables, charts and listings, and how any figures become such."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

_UNKNOWN = "–"
SIDES = ("source", "target")
# Of a list as long as a table, so many rows are shown; the JSON document has all.
_LISTED = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A text of a table. ``kind`` is text, number, exact (as it is, to the blank), word (a remark) or bad
    (one that asks for attention)."""

    text: str
    kind: str = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table: every row begins with what it is about. Without ``heads`` it has two columns, name and value."""

    caption: str
    rows: Sequence[Sequence[Cell]]
    heads: Sequence[str] = ()
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A picture that stands in the page, and what it shows."""

    caption: str
    svg: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Lines that are shown as they are."""

    caption: str
    text: str


Exhibit = Grid | Chart | Listing


class Figures:
    """A check's figures; what was taken out by a view is not shown a second time."""

    def __init__(self, figures: Mapping[str, object]) -> None:
        self._left = dict(figures)

    def take(self, name: str) -> object:
        """Return a figure, None where it is not there."""
        return self._left.pop(name, None)

    def number(self, name: str) -> float | None:
        """Return a figure if it is a number."""
        return number(self.take(name))

    def mapping(self, name: str) -> dict[str, object]:
        """Return a figure that has figures of its own, else an empty one."""
        return mapping(self.take(name))

    def records(self, name: str) -> list[dict[str, object]]:
        """Return a list of such figures."""
        return records(self.take(name))

    def facts(self, caption: str, names: Mapping[str, str]) -> Iterator[Grid]:
        """Yield a table of the named figures that are there, by their labels."""
        rows = [(Cell(text=label), cell(self.take(name))) for name, label in names.items() if name in self._left]
        if rows:
            yield Grid(caption=caption, rows=rows)

    def rest(self) -> dict[str, object]:
        """Return what was not taken yet."""
        return self._left


def number(value: object) -> float | None:
    """Return a finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def mapping(value: object) -> dict[str, object]:
    """Return figures by their names, none for anything that has no names."""
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {}


def records(value: object) -> list[dict[str, object]]:
    """Return those items of a list that have figures by name."""
    return [mapping(item) for item in value if isinstance(item, Mapping)] if isinstance(value, (list, tuple)) else []


def numbers(value: object) -> list[float]:
    """Return the numbers of a list that holds nothing else; else an empty one."""
    if not isinstance(value, (list, tuple)):
        return []
    found = [one for item in value if (one := number(item)) is not None]
    return found if len(found) == len(value) else []


def label(name: str) -> str:
    """Return a figure's name for people."""
    return name.replace("_", " ").replace(".", ", ")


def words(value: object) -> str:
    """Return a figure in a few words; nested ones with their names."""
    match value:
        case None:
            return _UNKNOWN
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1000 else f"{value:.6g}"
        case Mapping():
            return ", ".join(f"{label(str(key))}: {words(item)}" for key, item in value.items()) or "none"
        case list() | tuple():
            return ", ".join(words(item) for item in value) or "none"
    return str(value)


def cell(value: object) -> Cell:
    """Return any figure as a cell."""
    return Cell(text=words(value), kind="text" if number(value) is None else "number")


def exact(value: object) -> Cell:
    """Return a text as a cell that shows it to the blank."""
    return Cell(text=words(value), kind="exact")


def others(figures: Mapping[str, object], caption: str) -> Iterator[Exhibit]:
    """Yield tables of any figures: single ones in one, both sides beside each other, every list of records its own."""
    single: list[tuple[Cell, Cell]] = []
    larger: list[Exhibit] = []
    sides = {side: mapping(figures.get(side)) for side in SIDES}
    for name, value in figures.items():
        if name in sides and any(sides.values()):
            if name == next(side for side in SIDES if side in figures):
                larger += beside("Both sides", sides)
        elif rows := records(value):
            larger.append(table(label(name).capitalize(), rows))
        elif isinstance(value, str) and "\n" in value:
            larger.append(Listing(caption=label(name).capitalize(), text=value))
        elif mapping(value):
            larger += others(mapping(value), label(name).capitalize())
        else:
            single.append((Cell(text=label(name)), cell(value)))
    if single:
        yield Grid(caption=caption, rows=single)
    yield from larger


def table(caption: str, rows: Sequence[Mapping[str, object]]) -> Grid:
    """Return records as a table with a column for each name."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    cells = [[exact(row.get(head)) if head == "key" else cell(row.get(head)) for head in heads] for row in rows]
    return shortened(Grid(caption=caption, heads=[label(head) for head in heads], rows=cells))


def shortened(grid: Grid) -> Grid:
    """Return a table without the rows that nobody would read, and how many those are."""
    if len(grid.rows) <= _LISTED:
        return grid
    note = f"{len(grid.rows) - _LISTED:,} more are in the JSON document."
    return Grid(caption=grid.caption, heads=grid.heads, rows=grid.rows[:_LISTED], note=note)


def beside(
    caption: str,
    sides: Mapping[str, Mapping[str, object]],
    *,
    differences: Sequence[str] | None = None,
    name_of: Callable[[str], str] = label,
) -> Iterator[Grid]:
    """Yield a table with a column for each side; with ``differences`` also one that tells which figures differ.

    Figures within figures are named ``outer.inner``, in ``differences`` and for ``name_of`` too.
    """
    flat = {side: dict(_flattened(figures)) for side, figures in sides.items()}
    rows = []
    for name in dict.fromkeys(name for figures in flat.values() for name in figures):
        values = [flat[side].get(name) for side in SIDES]
        row = [Cell(text=name_of(name)), *_apart(values)]
        if differences is not None:
            differs = name in differences or (name.split(".")[0] in differences and values[0] != values[1])
            row.append(Cell(text="differs" if differs else "", kind="bad"))
        rows.append(row)
    if not rows:
        return
    if any(number(value) is None for figures in flat.values() for value in figures.values() if value is not None):
        # Numbers among words stand where the words do.
        rows = [[Cell(text=one.text, kind="text" if one.kind == "number" else one.kind) for one in row] for row in rows]
    yield Grid(caption=caption, heads=("", *SIDES, *([""] if differences is not None else [])), rows=rows)


def _apart(values: Sequence[object]) -> list[Cell]:
    """Return both sides' cells, with more digits where two unlike numbers would read alike."""
    cells = [cell(value) for value in values]
    if (
        len({one.text for one in cells}) == 1
        and values[0] != values[1]
        and all(isinstance(one, float) for one in values)
    ):
        return [Cell(text=f"{value:.12g}", kind=one.kind) for value, one in zip(values, cells, strict=True)]
    return cells


def _flattened(figures: Mapping[str, object], before: str = "") -> Iterator[tuple[str, object]]:
    for name, value in figures.items():
        if mapping(value):
            yield from _flattened(mapping(value), f"{before}{name}.")
        else:
            yield f"{before}{name}", value
