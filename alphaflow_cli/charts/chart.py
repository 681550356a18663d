"""What a chart shows, in plain data: panels below each other over one x axis, with curves or bars and shaded ranges.

Callers describe a chart with these classes; `draw.py` turns it into PNG or SVG. Nothing here imports matplotlib, so a
caller may build charts at no cost. All sizes are in pixels of the page.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#2b6cb0", "#c05621", "#2f855a", "#b83280", "#6b46c1", "#4a5568"
INK, FAINT, GRID, PAPER = "#1a202c", "#718096", "#e2e8f0", "#ffffff"
FEW = 9  # points of a lone curve that get their values written beside them
SHADES = ("#ebf4ff", "#fffaf0", "#fff0f0")  # of bands: cool, warm, hot
DARK = {  # each colour → the one that takes its place on a dark page; a chart uses no other colours
    BLUE: "#63a9ef",
    ORANGE: "#ed8936",
    GREEN: "#48bb78",
    RED: "#ed64a6",
    PURPLE: "#b794f4",
    GREY: "#b6c2d2",
    INK: "#e8edf4",
    FAINT: "#8b99ab",
    GRID: "#2e3a4a",
    PAPER: "#161c26",
    SHADES[0]: "#1a2a40",
    SHADES[1]: "#2c2617",
    SHADES[2]: "#331d22",
}
DARK_STYLE = (  # for a style sheet: matplotlib writes every colour as a style, in which it can be found
    "@media (prefers-color-scheme: dark) {"
    + "".join(
        f'\n  svg [style*="{kind}: {light}"] {{ {kind}: {dark} !important; }}'
        for light, dark in DARK.items()
        for kind in ("fill", "stroke")
    )
    + "\n}"
)


@dataclass(frozen=True)
class Line:
    """One curve, or one bar at each x, from zero. A value that is not finite, or not positive on a log axis, leaves a
    gap.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: str = BLUE
    bars: bool = False
    dashed: bool = False
    markers: bool = False  # a dot on each point
    spread: Sequence[tuple[float, float, float]] = ()  # (x, low, high), shaded around a curve, a whisker over a bar
    spread_label: str = ""  # of the spread, in the legend


@dataclass(frozen=True)
class Band:
    """A shaded range of x, through all panels.

    Where the label is too wide, its part before the colon is shown, at last without its spaces.
    """

    first: float
    last: float
    label: str
    colour: str


@dataclass(frozen=True)
class Panel:
    """Curves or bars over one y axis; `y_range` None fits the data, else values outside are drawn at the edge."""

    title: str
    lines: Sequence[Line]
    y_range: tuple[float, float] | None = None
    log_y: bool = False
    height: int = 170

    @property
    def shows_values(self) -> bool:
        """Whether its points get their values written beside them: a lone curve with few dots, none of them cut off."""
        if len(self.lines) != 1 or self.y_range is not None:
            return False
        return self.lines[0].markers and not self.lines[0].spread and len(self.lines[0].points) <= FEW


@dataclass(frozen=True)
class Chart:
    """A whole picture: its title, its panels from top to bottom, and the x axis that they share."""

    title: str
    panels: Sequence[Panel]
    x_label: str
    subtitle: str = ""
    bands: Sequence[Band] = ()
    log_x: bool = False
    x_ticks: Sequence[float] | None = None  # None chooses them; given where every x should have its tick (NFE)
    x_range: tuple[float, float] | None = None
    width: int = 960


def show_number(value: float, digits: int = 4) -> str:
    """Write a number beside an axis as briefly as possible: 150k, 1.2M, 0.25, 5e-5."""
    size = abs(value)
    if size == 0:
        return "0"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if unit <= size < 1e12:
            return f"{value / unit:.{digits}g}{name}"
    if size < 1e-3 or size >= 1e12:
        mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
        return f"{float(mantissa):.{digits}g}e{int(exponent)}"
    return f"{value:.{digits}g}"


def clean(text: str) -> str:
    """Replace characters that no picture can show and no XML may hold by spaces."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def with_letters(part: Any, change: Callable[[str], str]) -> Any:
    """A copy of a chart, or of a part of it, with every letter of its words changed; points are left as they are."""
    if isinstance(part, str):
        return "".join(change(letter) for letter in clean(part))
    if isinstance(part, (list, tuple)) and part and isinstance(part[0], (str, Panel, Line, Band)):
        return type(part)(with_letters(each, change) for each in part)
    if isinstance(part, (Chart, Panel, Line, Band)):
        return replace(part, **{each.name: with_letters(getattr(part, each.name), change) for each in fields(part)})
    return part
