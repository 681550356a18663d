"""A line chart, described once and laid out once; svg.py and png.py only draw the marks.

Panels stand above each other over one x axis. Bands shade ranges of x through all panels and are named in the first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from alphaflow_cli.report.ticks import show_number, ticks

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#2b6cb0", "#c05621", "#2f855a", "#b83280", "#6b46c1", "#4a5568"
INK, FAINT, GRID, PAPER = "#1a202c", "#718096", "#e2e8f0", "#ffffff"
LEFT, RIGHT, TOP, BOTTOM, GAP = 74, 28, 70, 56, 46  # margins, and the room above each further panel


@dataclass(frozen=True)
class Line:
    """One curve; `markers` puts a dot on each point."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str = BLUE
    dashed: bool = False
    markers: bool = False


@dataclass(frozen=True)
class Band:
    """A shaded range of x, with its name."""

    first: float
    last: float
    label: str
    colour: str


@dataclass(frozen=True)
class Panel:
    """Curves over one y axis; y_range None fits the data."""

    title: str
    lines: Sequence[Line]
    y_range: tuple[float, float] | None = None
    log_y: bool = False
    height: int = 170


@dataclass(frozen=True)
class Chart:
    title: str
    panels: Sequence[Panel]
    x_label: str
    subtitle: str = ""
    bands: Sequence[Band] = ()
    log_x: bool = False
    x_ticks: Sequence[float] | None = None  # None chooses them; given where every x should have its tick (NFE)
    x_range: tuple[float, float] | None = None
    width: int = 960


@dataclass(frozen=True)
class Mark:
    """One thing to draw, in pixels: a rect (x, y, w, h), a path or dots (points), or a text at (x, y)."""

    kind: str  # rect, path, dots, text
    points: tuple[tuple[float, float], ...]
    colour: str
    width: float = 1.0  # of a path; radius of dots; size of a text
    dashed: bool = False
    text: str = ""
    anchor: str = "start"
    bold: bool = False


@dataclass(frozen=True)
class Axis:
    """From a value to a pixel."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, here = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.first + (self.last - self.first) * (here - low) / (high - low)


@dataclass
class Picture:
    width: int
    height: int
    marks: list[Mark] = field(default_factory=list)

    def path(self, *points: tuple[float, float], colour: str, width: float = 1.0, dashed: bool = False) -> None:
        self.marks.append(Mark("path", points, colour, width, dashed))

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        colour: str = INK,
        size: float = 13,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        self.marks.append(Mark("text", ((x, y),), colour, size, text=text, anchor=anchor, bold=bold))


def text_width(text: str, size: float) -> float:
    """An estimate that both backends share: the average letter of a sans-serif face."""
    return 0.56 * size * len(text)


def layout(chart: Chart) -> Picture:
    """The chart as marks, in drawing order."""
    panels = chart.panels
    height = TOP + sum(panel.height for panel in panels) + GAP * (len(panels) - 1) + BOTTOM
    picture = Picture(chart.width, height)
    picture.marks.append(Mark("rect", ((0, 0), (chart.width, height)), PAPER))
    picture.text(LEFT, 28, chart.title, size=18, bold=True)
    if chart.subtitle:
        picture.text(chart.width - RIGHT, 28, chart.subtitle, size=12, colour=FAINT, anchor="end")
    x_axis, x_marks = _x_axis(chart)
    top = float(TOP)
    for index, panel in enumerate(panels):
        _panel(picture, chart, panel, x_axis, x_marks, top, first=index == 0)
        top += panel.height + GAP
    bottom = top - GAP
    for value in x_marks:
        picture.text(x_axis.at(value), bottom + 19, show_number(value), size=12, colour=GREY, anchor="middle")
    picture.text((LEFT + chart.width - RIGHT) / 2, bottom + 42, chart.x_label, anchor="middle")
    return picture


def _x_axis(chart: Chart) -> tuple[Axis, list[float]]:
    xs = [x for panel in chart.panels for line in panel.lines for x, _ in line.points if x > 0 or not chart.log_x]
    low, high = chart.x_range or (min(xs, default=1.0 if chart.log_x else 0.0), max(xs, default=1.0))
    low, high = _spread(low, high, chart.log_x)
    inside = [x for x in (chart.x_ticks or ticks(low, high, 8, log=chart.log_x)) if low <= x <= high]
    return Axis(low, high, LEFT, chart.width - RIGHT, chart.log_x), inside


def _y_axis(panel: Panel, top: float) -> tuple[Axis, list[float]]:
    ys = [y for line in panel.lines for _, y in line.points if math.isfinite(y) and (y > 0 or not panel.log_y)]
    low, high = panel.y_range or (min(ys, default=1.0 if panel.log_y else 0.1), max(ys, default=1.0))
    low, high = _spread(low, high, panel.log_y)
    if panel.y_range is None and not panel.log_y:
        room = 0.06 * (high - low)
        low, high = (low if low == 0 else low - room), high + room
    return Axis(low, high, top + panel.height, top, panel.log_y), ticks(low, high, 5, log=panel.log_y)


def _spread(low: float, high: float, log: bool) -> tuple[float, float]:
    """A range that can be divided by."""
    if high > low:
        return low, high
    room = max(0.5, 1e-9 * abs(low))
    return (low / 2, high * 2) if log else (low - room, high + room)


def _panel(
    picture: Picture, chart: Chart, panel: Panel, x_axis: Axis, x_marks: list[float], top: float, *, first: bool
) -> None:
    bottom, left, right = top + panel.height, x_axis.first, x_axis.last
    y_axis, y_marks = _y_axis(panel, top)
    for band in chart.bands:
        a, b = (x_axis.at(min(max(x, x_axis.low), x_axis.high)) for x in (band.first, band.last))
        picture.marks.append(Mark("rect", ((a, top), (b, bottom)), band.colour))
    for x in x_marks:
        picture.path((x_axis.at(x), top), (x_axis.at(x), bottom), colour=GRID)
    for y in y_marks:
        picture.path((left, y_axis.at(y)), (right, y_axis.at(y)), colour=GRID)
        picture.text(left - 9, y_axis.at(y) + 4, show_number(y), size=12, colour=GREY, anchor="end")
    picture.path((left, bottom), (right, bottom), colour=FAINT, width=1.2)
    for band in chart.bands if first else ():
        _band_name(picture, band, x_axis, top)
    picture.text(left, top - 11, panel.title, size=13, bold=True)
    _legend(picture, panel, right, top - 11)
    for line in panel.lines:
        _curve(picture, line, x_axis, y_axis)


def _band_name(picture: Picture, band: Band, x_axis: Axis, top: float) -> None:
    """Inside the band, over the grid; left out where the band is too narrow."""
    a, b = (x_axis.at(min(max(x, x_axis.low), x_axis.high)) for x in (band.first, band.last))
    half = text_width(band.label, 12) / 2
    if b - a > 2 * half:
        middle = (a + b) / 2
        picture.marks.append(Mark("rect", ((middle - half, top + 4), (middle + half, top + 24)), band.colour))
        picture.text(middle, top + 18, band.label, size=12, colour=GREY, anchor="middle")


def _legend(picture: Picture, panel: Panel, right: float, y: float) -> None:
    """From the right end of the title's line; a panel with one curve is named by its title."""
    for line in reversed(panel.lines if len(panel.lines) > 1 else ()):
        picture.text(right, y, line.label, size=12, colour=GREY, anchor="end")
        right -= text_width(line.label, 12) + 8
        picture.path((right - 22, y - 4), (right, y - 4), colour=line.colour, width=2.4, dashed=line.dashed)
        right -= 44


def _curve(picture: Picture, line: Line, x_axis: Axis, y_axis: Axis) -> None:
    """Values that are not finite, or not positive on a log axis, leave a gap."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in line.points:
        if not math.isfinite(y) or (y_axis.log and y <= 0) or (x_axis.log and x <= 0):
            runs.append([])
        else:
            runs[-1].append((x_axis.at(x), y_axis.at(min(max(y, y_axis.low), y_axis.high))))
    for run in runs:
        if len(run) > 1:
            picture.path(*run, colour=line.colour, width=2.4, dashed=line.dashed)
        if run and (line.markers or len(run) == 1):
            picture.marks.append(Mark("dots", tuple(run), line.colour, 4.0))
