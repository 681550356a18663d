"""Charts as PNG and SVG by matplotlib, which is imported here alone, and only when a chart is drawn.

Margins are fixed and words are measured before anything is drawn: titles break into lines and legends move below them
where there is no room, so that one description serves a wide page and a telephone. Equal charts give equal bytes.
"""

import io
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from alphaflow_cli.charts.chart import DARK, FAINT, GREY, GRID, INK, PAPER, Bars, Chart, Line, Panel, show_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCALE = 2  # pixels of a PNG to a pixel of the page
LEFT, RIGHT, GAP, BOTTOM, STRIP, ROW = (
    62,
    22,
    26,
    56,
    20,
    18,
)  # pixels; STRIP holds the bands' names, ROW a line of words
HEADLINE, TITLE, SMALL = 18, 13, 12  # sizes of letters
HANDLE, BETWEEN = 30, 16  # of a legend's entry: the line before the word, the room after it
FEW = 9  # points of a lone curve that get their values written beside them
HUGE = 1e150  # larger values are drawn as this one: differences must stay finite, and quotients on a log axis
FONT = "Helvetica Neue, Helvetica, Arial, sans-serif"  # of an SVG that stands alone; within a page, the page's own

DARK_STYLE = (  # for a style sheet: matplotlib writes every colour as a style, in which it can be found
    "@media (prefers-color-scheme: dark) {"
    + "".join(
        f'\n  svg [style*="{kind}: {light}"] {{ {kind}: {dark} !important; }}'
        for light, dark in DARK.items()
        for kind in ("fill", "stroke")
    )
    + "\n}"
)


def to_png(chart: Chart) -> bytes:
    """The chart in its light form, at twice its width in pixels."""
    with _own_settings(chart):
        out = io.BytesIO()
        _figure(chart).savefig(out, format="png", dpi=72 * SCALE, metadata={"Software": None})
    return out.getvalue()


def to_svg(chart: Chart) -> str:
    """A file of its own, which follows the reader's light or dark colours. Its words stay words."""
    return _svg(chart, f' font-family="{FONT}"', f"<style>{DARK_STYLE}</style>")


def to_svg_element(chart: Chart) -> str:
    """For a page whose style sheet contains DARK_STYLE: letters and colours follow the page."""
    return _svg(chart, "", "")


def _svg(chart: Chart, attributes: str, style: str) -> str:
    """matplotlib's drawing in a frame of ours: without its header, names of groups, fonts and needless digits."""
    with _own_settings(chart):
        out, figure = io.StringIO(), _figure(chart)
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        width, height = (round(72 * inches) for inches in figure.get_size_inches())
    found = re.search(r"<svg[^>]*>\s*<defs>\s*<style.*?</defs>(.*)</svg>", out.getvalue(), re.DOTALL)
    assert found is not None, "matplotlib writes SVG in another form"
    body = re.sub(r'<g id="[^"]*"(/>)?', lambda group: "" if group[1] else "<g", found[1])
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), body)
    body = re.sub(r"; font-family: [^;\"]*|; stroke-linecap: square", "", body)
    body = re.sub(r' transform="rotate\(-0 [^"]*"', "", body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}" stroke-linejoin="round"'
    return (
        f'<svg {names} {size} role="img"{attributes}><title>{escape(_clean(chart.title))}</title>{style}{body}</svg>\n'
    )


@contextmanager
def _own_settings(chart: Chart) -> Iterator[None]:
    """matplotlib's defaults whatever a matplotlibrc says, and nothing on stderr about its caches and fonts."""
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        import matplotlib

        settings: dict[Any, Any] = {k: v for k, v in matplotlib.rcParamsDefault.items() if "backend" not in k}
        settings |= {"svg.fonttype": "none", "svg.hashsalt": repr(chart), "text.parse_math": False}
        with warnings.catch_warnings(), matplotlib.rc_context(settings):
            warnings.filterwarnings("ignore", r"Glyph \d+")  # a letter that the font lacks is drawn as a box
            yield
    finally:
        log.setLevel(level)


def _clean(text: str) -> str:
    """Without characters that no picture can show and no XML may hold."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _width(text: str, size: float, *, bold: bool = False) -> float:
    """Pixels of a line of words in matplotlib's own font; the fonts of a browser are narrower."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight="bold" if bold else "normal")
    return float(text_to_path.get_text_width_height_descent(_clean(text), font, False)[0])


def _wrapped(text: str, size: float, room: float, *, bold: bool = False) -> list[str]:
    """The words in as many lines as they need."""
    lines: list[str] = []
    for word in _clean(text).split():
        if lines and _width(f"{lines[-1]} {word}", size, bold=bold) <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


@dataclass(frozen=True)
class _Head:
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


def _head(panel: Panel, room: float, *, strip: bool) -> _Head:
    """There is a legend where there is something to tell apart; a lone curve is named by the panel's title."""
    labels = [word for line in panel.lines for word in (line.label, line.spread_label if line.spread else "") if word]
    labels = labels if len(panel.lines) > 1 or any(line.spread for line in panel.lines) else []
    widths = [HANDLE + _width(word, SMALL) + BETWEEN for word in labels]
    title = _wrapped(panel.title, TITLE, room, bold=True)
    beside = len(title) < 2 and _width(panel.title, TITLE, bold=True) + BETWEEN + sum(widths) <= room
    columns = len(labels) if sum(widths) <= room else max(1, int(room // max(widths)))
    return _Head(title, labels, max(1, columns), beside, STRIP if strip else 0)


@dataclass(frozen=True)
class _Page:
    """A figure measured in pixels from its upper left corner."""

    figure: "Figure"
    width: int
    height: int

    def text(self, x: float, y: float, text: str, size: float, colour: str, **style: Any) -> None:
        self.figure.text(x / self.width, 1 - y / self.height, _clean(text), size=size, color=colour, **style)

    def axes(self, top: float, height: float) -> "Axes":
        bottom, width = 1 - (top + height) / self.height, self.width - LEFT - RIGHT
        return self.figure.add_axes((LEFT / self.width, bottom, width / self.width, height / self.height))


def _figure(chart: Chart) -> "Figure":
    """The whole chart, from top to bottom; one of matplotlib's points is one pixel of the page."""
    from matplotlib.figure import Figure

    room = chart.width - LEFT - RIGHT
    heads = [_head(panel, room, strip=bool(chart.bands) and i == 0) for i, panel in enumerate(chart.panels)]
    title = _wrapped(chart.title, HEADLINE, room, bold=True)
    together = _width(chart.title, HEADLINE, bold=True) + BETWEEN + _width(chart.subtitle, SMALL)
    below = _wrapped(chart.subtitle, SMALL, room) if together > room else []
    top = 22 + 24 * len(title) + ROW * len(below)
    height = top + sum(head.height + panel.height for head, panel in zip(heads, chart.panels, strict=True))
    height += GAP * (len(heads) - 1) + BOTTOM
    page = _Page(Figure((chart.width / 72, height / 72), dpi=72, facecolor=PAPER), chart.width, height)
    for i, line in enumerate(title):
        page.text(LEFT, 28 + 24 * i, line, HEADLINE, INK, weight="bold")
    for i, line in enumerate(below):
        page.text(LEFT, 24 + 24 * len(title) + ROW * i, line, SMALL, GREY)
    if not below:
        page.text(chart.width - RIGHT, 28, chart.subtitle, SMALL, GREY, ha="right")
    x_range, x_ticks = _x_axis(chart)
    for panel, head in zip(chart.panels, heads, strict=True):
        for i, line in enumerate(head.title):
            page.text(LEFT, top + 12 + ROW * i, line, TITLE, INK, weight="bold")
        axes = page.axes(top + head.height, panel.height)
        _draw_axes(axes, chart, panel, x_range, x_ticks)
        _draw_lines(axes, panel)
        _draw_bands(axes, chart, head)
        _draw_legend(axes, head)
        top += head.height + panel.height + GAP
    _draw_x_labels(page, axes, chart, top - GAP)
    return page.figure


def _x_axis(chart: Chart) -> tuple[tuple[float, float], list[float]]:
    """The range and its ticks: some room at both ends where there are dots or bars, whole numbers where all x are."""
    lines = [line for panel in chart.panels for line in panel.lines]
    xs = [x for line in lines for x, _ in line.points]
    bars = any(isinstance(line, Bars) for line in lines)
    dots = any(isinstance(line, Line) and line.markers for line in lines)
    low, high = chart.x_range or _fit(xs, log=chart.log_x, share=0.03 if dots else 0)
    if bars and not chart.x_range:
        low, high = low - 0.6, high + 0.6
    whole = all(float(x).is_integer() for x in (*xs, *(chart.x_range or ())))
    count = max(5, (chart.width - LEFT - RIGHT) // 85)
    ticks = chart.x_ticks or _ticks(low, high, count, log=chart.log_x, whole=whole)
    return (low, high), [x for x in ticks if low <= x <= high]


def _fit(values: Sequence[float], *, log: bool, share: float) -> tuple[float, float]:
    """A range around all that can be drawn, with this share of it as room at both ends; one value gets a range too."""
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
    """Round values within the range, about `count` at most."""
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
    values = MaxNLocator(count, steps=[1, 2, 2.5, 5, 10], integer=whole).tick_values(low, high)
    return [0.0 if abs(v) < slack else float(v) for v in values if low - slack <= v <= high + slack]


def _y_axis(panel: Panel) -> tuple[float, float]:
    values = [y for line in panel.lines for _, y in line.points]
    values += [y for line in panel.lines for _, *ends in line.spread for y in ends]
    values += [0.0 for line in panel.lines if isinstance(line, Bars)]
    return panel.y_range or _fit(values, log=panel.log_y, share=0.16 if _has_values(panel) else 0.06)


def _draw_axes(
    axes: "Axes", chart: Chart, panel: Panel, x_range: tuple[float, float], x_ticks: Sequence[float]
) -> None:
    """The grid, the line below, the numbers at the left."""
    low, high = _y_axis(panel)
    y_ticks = _ticks(low, high, max(3, panel.height // 30), log=panel.log_y)
    axes.set(xscale="log" if chart.log_x else "linear", yscale="log" if panel.log_y else "linear")
    axes.set(facecolor=PAPER, xlim=x_range, ylim=(low, high))
    axes.set_xticks(x_ticks, [""] * len(x_ticks))
    axes.set_yticks(y_ticks, [show_number(y, 5) for y in y_ticks])
    axes.minorticks_off()
    axes.tick_params(length=0, labelsize=SMALL, labelcolor=GREY, pad=8)
    axes.grid(color=GRID, linewidth=1, clip_on=False)
    axes.set_axisbelow(True)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set(color=FAINT, linewidth=1.2)
    if low < 0 < high:
        axes.axhline(0, color=FAINT, linewidth=1.2, clip_on=False, zorder=1)


def _draw_lines(axes: "Axes", panel: Panel) -> None:
    """Every curve and bar, in the order of the description, labelled for the legend."""
    (low, high), (first, last) = axes.get_ylim(), axes.get_xlim()
    for line in panel.lines:
        points = [(x, _inside(y, low, high, log=panel.log_y)) for x, y in line.points if first <= x <= last]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        around = [x for x, _, _ in line.spread]
        lows, highs = ([_inside(ends[i], low, high, log=panel.log_y) for ends in line.spread] for i in (1, 2))
        if isinstance(line, Bars):
            axes.bar(xs, ys, 0.6, color=line.colour, linewidth=0, clip_on=False, label=_clean(line.label))
            if around:
                axes.vlines(
                    around,
                    lows,
                    highs,
                    color=INK,
                    linewidth=2,
                    clip_on=False,
                    label=_clean(line.spread_label),
                    zorder=3,
                )
            continue
        if around:
            style: dict[str, Any] = {"color": line.colour, "alpha": 0.16, "linewidth": 0, "clip_on": False}
            axes.fill_between(around, lows, highs, label=_clean(line.spread_label), **style)
        _draw_curve(axes, line, xs, ys)
        if _has_values(panel):
            _draw_values(axes, xs, ys)


def _inside(value: float, low: float, high: float, *, log: bool) -> float:
    """A value that can be drawn, at the edge where it lies beyond; nan, which leaves a gap, where there is none."""
    return min(max(value, low), high) if math.isfinite(value) and (value > 0 or not log) else math.nan


def _draw_curve(axes: "Axes", line: Line, xs: Sequence[float], ys: Sequence[float]) -> None:
    """A line through the points, and dots where it has markers or a point has no neighbour."""
    dashes = (0, (3, 2)) if line.dashed else "solid"
    axes.plot(
        xs, ys, color=line.colour, linewidth=2.2, linestyle=dashes, clip_on=False, label=_clean(line.label), zorder=3
    )
    gaps = [True, *map(math.isnan, ys), True]
    dots = [i for i, y in enumerate(ys) if not math.isnan(y) and (line.markers or (gaps[i] and gaps[i + 2]))]
    places = [xs[i] for i in dots], [ys[i] for i in dots]
    axes.plot(*places, "o", color=line.colour, markersize=7, markeredgewidth=0, clip_on=False, zorder=4)


def _has_values(panel: Panel) -> bool:
    """Whether the points get their values written beside them: a lone curve with few dots."""
    (line, *others) = panel.lines or (None,)
    return isinstance(line, Line) and not others and line.markers and not line.spread and len(line.points) <= FEW


def _draw_values(axes: "Axes", xs: Sequence[float], ys: Sequence[float]) -> None:
    """On the side of each point from which the curve bends away, if there is room above the axis."""
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        beside = [ys[j] for j in (i - 1, i + 1) if 0 <= j < len(ys)]
        below = y < sum(beside) / max(len(beside), 1) and axes.transData.transform((x, y))[1] - axes.bbox.y0 > 26
        place: dict[str, Any] = {"xytext": (0, -8 if below else 8), "va": "top" if below else "bottom", "ha": "center"}
        box = {"facecolor": PAPER, "linewidth": 0, "pad": 1}
        place |= {"textcoords": "offset points", "color": GREY, "size": SMALL, "bbox": box, "zorder": 2}
        if math.isfinite(y):
            axes.annotate(show_number(y), (x, y), **place)


def _draw_bands(axes: "Axes", chart: Chart, head: _Head) -> None:
    """Shaded through the panel; above the first one in a strip with their names, as far as these find room."""
    (low, high), (width, height) = axes.get_xlim(), axes.bbox.size
    for band in chart.bands:
        first, last = (min(max(x, low), high) for x in (band.first, band.last))
        axes.axvspan(first, last, 0, 1 + head.strip / height, color=band.colour, linewidth=0, clip_on=False, zorder=0)
        names = (_clean(band.label), _clean(band.label).partition(":")[0]) if head.strip else ()
        fitting = [name for name in names if _width(name, SMALL) + 8 <= width * (last - first) / (high - low)]
        if fitting:
            place: dict[str, Any] = {
                "transform": axes.get_xaxis_transform(),
                "ha": "center",
                "color": GREY,
                "size": SMALL,
            }
            axes.text((first + last) / 2, 1 + 6 / height, fitting[0], **place)


def _draw_legend(axes: "Axes", head: _Head) -> None:
    """Above the data: at the right of the title, or below the title."""
    if head.labels:
        axes.legend(
            loc="lower right" if head.beside else "lower left",
            bbox_to_anchor=(1 if head.beside else 0, 1 + (head.strip + 7) / axes.bbox.height),
            ncols=head.columns,
            frameon=False,
            fontsize=SMALL,
            labelcolor=GREY,
            handlelength=(HANDLE - 7) / SMALL,
            handletextpad=7 / SMALL,
            columnspacing=BETWEEN / SMALL,
            labelspacing=(ROW - 14) / SMALL,
            borderpad=0,
            borderaxespad=0,
        )


def _draw_x_labels(page: _Page, axes: "Axes", chart: Chart, bottom: float) -> None:
    """Below the last panel: the numbers for which there is room, and what they count."""
    taken = 0.0
    for x in axes.get_xticks():
        place = LEFT + axes.transData.transform((x, axes.get_ylim()[0]))[0] - axes.bbox.x0
        half = _width(show_number(x, 5), SMALL) / 2
        if place - half > taken:
            page.text(place, bottom + 19, show_number(x, 5), SMALL, GREY, ha="center")
            taken = place + half + 6
    page.text((LEFT + page.width - RIGHT) / 2, bottom + 42, chart.x_label, TITLE, INK, ha="center")
