"""Charts as PNG and SVG by matplotlib, which is imported in this room alone, and only when a chart is drawn.

Equal charts give equal bytes, whatever a matplotlibrc says. The words of an SVG stay words, and it goes dark with its
page. Words are measured in matplotlib's own font: those of a browser are narrower, so what fits here fits there.
"""

import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from alphaflow_cli.charts.chart import (
    DARK_STYLE,
    FAINT,
    GREY,
    GRID,
    INK,
    PAPER,
    Chart,
    Line,
    Panel,
    clean,
    show_number,
    with_letters,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEFT, RIGHT, GAP, BOTTOM, STRIP, ROW = 62, 22, 26, 56, 20, 18  # pixels; STRIP holds names of bands, ROW a line of words
HEADLINE, TITLE, SMALL = 18, 13, 12  # sizes of letters
HANDLE, BETWEEN = 30, 16  # of a legend's entry: the line before the word, the room after it
HUGE = 1e150  # larger values are drawn as this one: differences must stay finite, and quotients on a log axis
CurvePoints = list[tuple[float, float]]
SCALE = 2  # pixels of a PNG to a pixel of the page
FONT = "Helvetica Neue, Helvetica, Arial, sans-serif"  # of an SVG that stands alone; within a page, the page's own
LOOK: dict[Any, Any] = {  # matplotlib's settings while a chart is drawn; one of its points is one pixel of the page
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.color": GREY,
    "font.size": SMALL,
    "figure.dpi": 72,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 1.2,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 1,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.major.pad": 8,
    "ytick.labelcolor": GREY,
    "lines.linewidth": 2.2,
    "lines.markersize": 7,
    "lines.markeredgewidth": 0,
    "legend.frameon": False,
    "legend.handlelength": (HANDLE - 7) / SMALL,
    "legend.handletextpad": 7 / SMALL,
    "legend.columnspacing": BETWEEN / SMALL,
    "legend.labelspacing": (ROW - 14) / SMALL,
    "legend.borderpad": 0,
    "legend.borderaxespad": 0,
}


def to_png(chart: Chart) -> bytes:
    """Draw the chart in its light form as a PNG that is twice as wide as the chart, in pixels."""
    out, (_, letters) = io.BytesIO(), own_font()
    with _settings(chart):
        _figure(with_letters(chart, letters)).savefig(out, format="png", dpi=72 * SCALE, metadata={"Software": None})
    return out.getvalue()


def own_font() -> tuple[str, Callable[[str], str]]:
    """The file of matplotlib's own font, and what to write for a letter: "?" where the font would draw an empty box."""
    with _settings():
        from matplotlib.font_manager import FontProperties, findfont, get_font

        file = findfont(FontProperties())
        font = get_font(file)
    return file, lambda letter: letter if font.get_char_index(ord(letter)) else "?"


def to_svg(chart: Chart, *, in_page: bool = False) -> str:
    """Draw the chart as an SVG file that stands alone, or as an element of an HTML page.

    The file follows the reader's light or dark colours. The element takes over the letters and colours of the page,
    whose style sheet must contain DARK_STYLE. Words stay words in both. The frame is ours, around matplotlib's drawing
    without its header, names of groups, fonts and needless digits.
    """
    attributes, style = ("", "") if in_page else (f' font-family="{FONT}"', f"<style>{DARK_STYLE}</style>")
    with _settings(chart):
        out, figure = io.StringIO(), _figure(chart)
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        width, height = (round(72 * inches) for inches in figure.get_size_inches())
    drawing = re.search(r"<svg[^>]*>\s*<defs>\s*<style.*?</defs>(.*)</svg>", out.getvalue(), re.DOTALL)
    assert drawing is not None, "matplotlib writes SVG in another form"
    body = re.sub(r'<g id="[^"]*"(/>)?', lambda group: "" if group[1] else "<g", drawing[1])
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), body)
    body = re.sub(r"; font-family: [^;\"]*|; stroke-linecap: square", "", body)
    body = re.sub(r' transform="rotate\(-0 [^"]*"', "", body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}" stroke-linejoin="round"'
    return (
        f'<svg {names} {size} role="img"{attributes}><title>{escape(clean(chart.title))}</title>{style}{body}</svg>\n'
    )


@contextmanager
def _settings(chart: Chart | None = None) -> Iterator[None]:
    """Set our look on matplotlib's defaults while a chart is drawn, and keep its notes on fonts off stderr."""
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Glyph \d+")
            warnings.simplefilter("ignore", DeprecationWarning)  # an older matplotlib beside newer libraries
            import matplotlib

            defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if "backend" not in name}
            with matplotlib.rc_context({**defaults, **LOOK, "svg.hashsalt": repr(chart)}):
                yield
    finally:
        log.setLevel(level)


def _figure(chart: Chart) -> "Figure":
    """Lay the whole chart out, from top to bottom."""
    from matplotlib.figure import Figure

    room = chart.width - LEFT - RIGHT
    heads = [head_of(panel, room, strip=bool(chart.bands) and i == 0) for i, panel in enumerate(chart.panels)]
    title = wrapped(chart.title, HEADLINE, room, bold=True)
    together = width_of(chart.title, HEADLINE, bold=True) + BETWEEN + width_of(chart.subtitle, SMALL)
    below = wrapped(chart.subtitle, SMALL, room) if together > room else []
    top = 22 + 24 * len(title) + ROW * len(below)
    height = top + sum(head.height + panel.height for head, panel in zip(heads, chart.panels, strict=True))
    height += GAP * (len(heads) - 1) + BOTTOM
    figure = Figure((chart.width / 72, height / 72))
    for i, line in enumerate(title):
        _write(figure, LEFT, 28 + 24 * i, line, size=HEADLINE, color=INK, weight="bold")
    for i, line in enumerate(below):
        _write(figure, LEFT, 24 + 24 * len(title) + ROW * i, line)
    if not below:
        _write(figure, chart.width - RIGHT, 28, chart.subtitle, ha="right")
    x_axis = axis_of_x(chart)
    for panel, head in zip(chart.panels, heads, strict=True):
        for i, line in enumerate(head.title):
            _write(figure, LEFT, top + 12 + ROW * i, line, size=TITLE, color=INK, weight="bold")
        top += head.height
        place = LEFT / chart.width, 1 - (top + panel.height) / height, room / chart.width, panel.height / height
        _draw_panel(figure.add_axes(place), chart, panel, head, x_axis)
        top += panel.height + GAP
    _draw_x_labels(figure, chart, x_axis, top - GAP)
    return figure


def _write(figure: "Figure", x: float, y: float, text: str, **style: Any) -> None:
    """Write words on a line that is `y` pixels below the upper edge of the figure."""
    width, height = figure.bbox.size
    figure.text(x / width, 1 - y / height, clean(text), **style)


def _draw_x_labels(figure: "Figure", chart: Chart, axis: "Axis", bottom: float) -> None:
    """Write the x axis's numbers, as many as there is room for, and its label below the last panel."""
    transform, taken = figure.axes[-1].transData, 0.0
    for x in axis.ticks:
        half = width_of(show_number(x, 5), SMALL) / 2
        middle = min(transform.transform((x, 1))[0], chart.width - half)
        if middle - half > taken:
            _write(figure, middle, bottom + 19, show_number(x, 5), ha="center")
            taken = middle + half + 6
    _write(figure, (LEFT + chart.width - RIGHT) / 2, bottom + 42, chart.x_label, size=TITLE, color=INK, ha="center")


def _draw_panel(axes: "Axes", chart: Chart, panel: Panel, head: "Head", x_axis: "Axis") -> None:
    """Draw one panel: axes, bands, curves and bars in the order of the description, and the legend above the data."""
    y_axis = axis_of_y(panel)
    axes.set(xscale="log" if x_axis.log else "linear", yscale="log" if y_axis.log else "linear")
    axes.set(xlim=(x_axis.low, x_axis.high), ylim=(y_axis.low, y_axis.high))
    axes.set_xticks(x_axis.ticks, [""] * len(x_axis.ticks))
    axes.set_yticks(y_axis.ticks, [show_number(y, 5) for y in y_axis.ticks])
    axes.minorticks_off()
    if y_axis.low < 0 < y_axis.high:
        axes.axhline(0, color=FAINT, linewidth=1.2, zorder=1)
    _draw_bands(axes, chart, head)
    for line in panel.lines:
        points = [(x, y_axis.clamp(y)) for x, y in line.points if x_axis.low <= x <= x_axis.high]
        spread = [(x, y_axis.clamp(low), y_axis.clamp(high)) for x, low, high in line.spread]
        _draw_line(axes, line, points, spread)
        if panel.shows_values:
            _draw_values(axes, points)
    if head.labels:
        place = (1 if head.beside else 0, 1 + (head.strip + 7) / panel.height)
        axes.legend(loc="lower right" if head.beside else "lower left", bbox_to_anchor=place, ncols=head.columns)
    for artist in axes.findobj():
        artist.set_clip_on(False)  # everything lies inside; a dot on the edge is shown whole


def _draw_bands(axes: "Axes", chart: Chart, head: "Head") -> None:
    """Shade the bands through a panel. Above the first panel their names stand in a strip, as far as they find room."""
    (low, high), (width, height) = axes.get_xlim(), axes.bbox.size
    for band in chart.bands:
        first, last = (min(max(x, low), high) for x in (band.first, band.last))
        axes.axvspan(first, last, 0, 1 + head.strip / height, color=band.colour, linewidth=0, zorder=0)
        whole, room = clean(band.label), width * (last - first) / (high - low)
        short = whole.partition(":")[0]
        free = {whole: 8, short: 8, short.replace(" ", ""): -4}  # beside a name
        names = free if head.strip else {}
        fitting = [name for name in names if width_of(name, SMALL) + free[name] <= room]
        if fitting:
            middle = (first + last) / 2
            axes.text(middle, 1 + 6 / height, fitting[0], ha="center", transform=axes.get_xaxis_transform())


def _draw_line(axes: "Axes", line: Line, points: CurvePoints, spread: Sequence[tuple[float, float, float]]) -> None:
    """Draw a curve through the points, or a bar at each; its spread is a shade around the curve, or whiskers.

    A point of a curve gets a dot if the line has markers, or if the point has no neighbour.
    """
    around, lows, highs = zip(*spread, strict=True) if spread else ((), (), ())
    xs, ys = [x for x, _ in points], [y for _, y in points]
    label, spread_label = clean(line.label), clean(line.spread_label)
    if line.bars:
        axes.bar(xs, ys, 0.6, color=line.colour, linewidth=0, label=label)
        if spread:
            axes.vlines(around, lows, highs, color=INK, linewidth=2, zorder=3, label=spread_label)
        return
    if spread:
        axes.fill_between(around, lows, highs, color=line.colour, alpha=0.16, linewidth=0, label=spread_label)
    style = (0, (3, 2)) if line.dashed else "solid"
    axes.plot(xs, ys, color=line.colour, linestyle=style, zorder=3, label=label)
    gaps = [True, *map(math.isnan, ys), True]
    dots = [point for i, point in enumerate(points) if not gaps[i + 1] and (line.markers or (gaps[i] and gaps[i + 2]))]
    axes.plot([x for x, _ in dots], [y for _, y in dots], "o", color=line.colour, zorder=4)


def _draw_values(axes: "Axes", points: CurvePoints) -> None:
    """Write the values beside the points of a curve, as far as there is room.

    Each stands on the side from which the curve bends away.
    """
    box, taken = {"facecolor": PAPER, "linewidth": 0, "pad": 1}, axes.bbox.x0  # the box hides the grid
    for i, (x, y) in enumerate(points):
        if not math.isfinite(y):
            continue
        beside = [points[j][1] for j in (i - 1, i + 1) if 0 <= j < len(points)]
        (across, up), width = axes.transData.transform((x, y)), width_of(show_number(y), SMALL)
        below = y < sum(beside) / max(len(beside), 1) and up - axes.bbox.y0 > 26
        place, side = ((0, -8), "top") if below else ((0, 8), "bottom")
        start = max(min(across - width / 2, axes.bbox.x1 + RIGHT - width), axes.bbox.x0)
        if start >= taken:
            place = (start - across, place[1])
            axes.annotate(show_number(y), (x, y), place, textcoords="offset points", va=side, bbox=box, zorder=2)
            taken = start + width + 6


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


def axis_of_x(chart: Chart) -> Axis:
    """Choose the range and the numbers of the x axis.

    There is some room at both ends where there are dots or bars. The numbers are whole where every x is.
    """
    lines = [line for panel in chart.panels for line in panel.lines]
    xs = [x for line in lines for x, _ in line.points]
    dots = any(line.markers for line in lines)
    bars = 0.6 if any(line.bars for line in lines) else 0.0
    low, high = _fit(xs, log=chart.log_x, share=0.03 if dots else 0)
    low, high = chart.x_range or (low - bars, high + bars)
    whole = all(float(x).is_integer() for x in (*xs, *(chart.x_range or ())))
    count = max(5, (chart.width - LEFT - RIGHT) // 85)
    ticks = chart.x_ticks or _ticks(low, high, count, log=chart.log_x, whole=whole)
    return Axis(low, high, [x for x in ticks if low <= x <= high], chart.log_x)


def axis_of_y(panel: Panel) -> Axis:
    """Choose the range and the numbers of a panel's y axis, around its curves, spreads and bars.

    There is more room where values are written beside the points.
    """
    values = [y for line in panel.lines for _, y in line.points]
    values += [y for line in panel.lines for _, *ends in line.spread for y in ends]
    values += [0.0 for line in panel.lines if line.bars]
    low, high = panel.y_range or _fit(values, log=panel.log_y, share=0.16 if panel.shows_values else 0.06)
    return Axis(low, high, _ticks(low, high, max(3, panel.height // 30), log=panel.log_y), panel.log_y)


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
