"""What goes where in a chart: words measured and broken into lines, the range and the numbers of each axis.

Words are measured in matplotlib's own font. The fonts of a browser are narrower, so what fits here fits there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from alphaflow_cli.charts.chart import Bars, Chart, Line, Panel

LEFT, RIGHT, GAP, BOTTOM, STRIP, ROW = 62, 22, 26, 56, 20, 18  # pixels; STRIP holds names of bands, ROW a line of words
HEADLINE, TITLE, SMALL = 18, 13, 12  # sizes of letters
HANDLE, BETWEEN = 30, 16  # of a legend's entry: the line before the word, the room after it
FEW = 9  # points of a lone curve that get their values written beside them
HUGE = 1e150  # larger values are drawn as this one: differences must stay finite, and quotients on a log axis


def clean(text: str) -> str:
    """Replace characters that no picture can show and no XML may hold by spaces."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def width_of(text: str, size: float, *, bold: bool = False) -> float:
    """Measure a line of words in pixels."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight="bold" if bold else "normal")
    return float(text_to_path.get_text_width_height_descent(clean(text), font, False)[0])


def wrapped(text: str, size: float, room: float, *, bold: bool = False) -> list[str]:
    """Break a text into as many lines as it needs to fit into `room` pixels."""
    lines: list[str] = []
    for word in clean(text).split():
        if lines and width_of(f"{lines[-1]} {word}", size, bold=bold) <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


@dataclass(frozen=True)
class Head:
    """What stands above a panel: its title, the legend beside or below it, and a strip with the bands' names."""

    title: list[str]
    labels: list[str]
    columns: int
    beside: bool
    strip: int

    @property
    def height(self) -> int:
        legend = math.ceil(len(self.labels) / self.columns)
        return ROW * (max(len(self.title), legend) if self.beside else len(self.title) + legend) + self.strip + 4


def head_of(panel: Panel, room: float, *, strip: bool) -> Head:
    """Plan what stands above a panel.

    There is a legend where there is something to tell apart; a lone curve is named by the panel's title.
    """
    labels = [word for line in panel.lines for word in (line.label, line.spread_label if line.spread else "") if word]
    labels = labels if len(panel.lines) > 1 or any(line.spread for line in panel.lines) else []
    widths = [HANDLE + width_of(word, SMALL) + BETWEEN for word in labels]
    title = wrapped(panel.title, TITLE, room, bold=True)
    beside = len(title) < 2 and width_of(panel.title, TITLE, bold=True) + BETWEEN + sum(widths) <= room
    columns = len(labels) if sum(widths) <= room else max(1, int(room // max(widths)))
    return Head(title, labels, max(1, columns), beside, STRIP if strip else 0)


@dataclass(frozen=True)
class Axis:
    """The range of values that an axis shows, and the values that get a number."""

    low: float
    high: float
    ticks: Sequence[float]
    log: bool

    def clamp(self, value: float) -> float:
        """The value to draw: the edge for one beyond it; nan, which leaves a gap, for one that cannot be drawn."""
        drawable = math.isfinite(value) and (value > 0 or not self.log)
        return min(max(value, self.low), self.high) if drawable else math.nan


def x_axis(chart: Chart) -> Axis:
    """Choose the range and the numbers of the x axis.

    There is some room at both ends where there are dots or bars. The numbers are whole where every x is.
    """
    lines = [line for panel in chart.panels for line in panel.lines]
    xs = [x for line in lines for x, _ in line.points]
    dots = any(isinstance(line, Line) and line.markers for line in lines)
    bars = 0.6 if any(isinstance(line, Bars) for line in lines) else 0.0
    low, high = _fit(xs, log=chart.log_x, share=0.03 if dots else 0)
    low, high = chart.x_range or (low - bars, high + bars)
    whole = all(float(x).is_integer() for x in (*xs, *(chart.x_range or ())))
    count = max(5, (chart.width - LEFT - RIGHT) // 85)
    ticks = chart.x_ticks or _ticks(low, high, count, log=chart.log_x, whole=whole)
    return Axis(low, high, [x for x in ticks if low <= x <= high], chart.log_x)


def y_axis(panel: Panel) -> Axis:
    """Choose the range and the numbers of a panel's y axis, around its curves, spreads and bars.

    There is more room where values are written beside the points.
    """
    values = [y for line in panel.lines for _, y in line.points]
    values += [y for line in panel.lines for _, *ends in line.spread for y in ends]
    values += [0.0 for line in panel.lines if isinstance(line, Bars)]
    low, high = panel.y_range or _fit(values, log=panel.log_y, share=0.16 if shows_values(panel) else 0.06)
    return Axis(low, high, _ticks(low, high, max(3, panel.height // 30), log=panel.log_y), panel.log_y)


def shows_values(panel: Panel) -> bool:
    """Whether the points get their values written beside them: a lone curve with few dots, none of them cut off."""
    (line, *others) = panel.lines or (None,)
    if not isinstance(line, Line) or others or panel.y_range is not None:
        return False
    return line.markers and not line.spread and len(line.points) <= FEW


def _fit(values: Sequence[float], *, log: bool, share: float) -> tuple[float, float]:
    """Choose a range around all that can be drawn, with this share of it as room at both ends.

    A single value gets a range, too.
    """
    smallest = 1 / HUGE if log else -HUGE
    inside = [min(max(v, smallest), HUGE) for v in values if math.isfinite(v) and (v > 0 or not log)] or [0.1, 1.0]
    low, high = min(inside), max(inside)
    if log:
        room = max((high / low) ** share, 1.1)
        return low / room, high * room
    if high - low <= 1e-3 * max(abs(low), abs(high)):
        return low - (abs(low) / 10 or 0.5), high + (abs(high) / 10 or 0.5)
    room = share * (high - low)
    return (max(low - room, 0.0) if low >= 0 else low - room), high + room


def _ticks(low: float, high: float, count: int, *, log: bool = False, whole: bool = False) -> list[float]:
    """Choose round values within the range, about `count` at most."""
    from matplotlib.ticker import MaxNLocator

    if log:
        powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
        for factors in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            values = [float(f"{factor}e{power}") for power in powers for factor in factors]
            inside = [value for value in values if low <= value <= high]
            if len(inside) <= count:
                break
        if len(inside) > 2:
            return inside[:: math.ceil(len(inside) / count)]
    slack = 1e-9 * (high - low)
    around = MaxNLocator(count, steps=[1, 2, 2.5, 5, 10], integer=whole).tick_values(low, high)
    return [0.0 if abs(v) < slack else float(v) for v in around if low - slack <= v <= high + slack]
