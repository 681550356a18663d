"""Charts as their reader sees them: where values land, which words stand where, light and dark, what they survive."""

import hashlib
import io
import itertools
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from alphaflow_cli.charts.chart import (
    BLUE,
    DARK,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PAPER,
    PURPLE,
    RED,
    SHADES,
    Band,
    Chart,
    Line,
    Panel,
    show_number,
)
from alphaflow_cli.charts.draw import DARK_STYLE, to_png, to_svg
from alphaflow_cli.recipe import load_recipe, shipped
from alphaflow_cli.train.curves import recipe_chart

SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"
WIDTHS = (960, 380)  # of a wide page, of a telephone


def nfe_chart(**changes):
    lines = [
        Line("trajectory", [(1, 40.2), (2, 37.1), (4, 35.0)], BLUE, markers=True),
        Line("consistency <&>", [(1, 40.2), (2, 36.0), (4, 36.5)], RED, dashed=True, markers=True),
    ]
    given = {"log_x": True, "x_ticks": (1, 2, 4), **changes}
    return Chart("FID against NFE", [Panel("FID", lines)], "NFE", **given)


def score_chart(values=(43.2, 17.34, 8.2, 3.8)):
    points = [(2.0**i, value) for i, value in enumerate(values)]
    return Chart("Scores", [Panel("FID-50k", [Line("FID-50k", points, markers=True)])], "NFE", log_x=True)


def conflict_chart(*, bars):
    medians, spread = [(i, 0.9 - i / 4) for i in range(8)], [(i, 0.8 - i / 4, 1 - i / 4) for i in range(8)]
    line = Line("median", medians, RED, bars, spread=spread, spread_label="5% to 95%")
    title = "Cosines between gradients by block"
    return Chart(title, [Panel(f"cos(TFM, {x})", [line], (-1, 1)) for x in ("TC", "FM'")], "block", "a run, step 90")


def alpha_chart():
    xs = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    lines = [Line(name, [(x, x) for x in xs], colour, markers=True) for name, colour in (("a", RED), ("b", GREEN))]
    return Chart("Gradient over α / at α = 0", [Panel("size", lines)], "α", "a run", log_x=True, x_ticks=xs)


def loss_chart():
    xs = range(0, 1_200_000, 50_000)
    names = ("l", "TFM", "TC", "r = t", "a curve with a long name", "another one with a long name")
    colours = (GREY, BLUE, RED, GREEN, PURPLE, ORANGE)
    lines = [Line(name, [(x, i + math.exp(-x / 1e5)) for x in xs], colours[i]) for i, name in enumerate(names)]
    bands = [Band(0, 4e5, "α = 1: flow matching", SHADES[0]), Band(4e5, 5e5, "0 < α < 1", SHADES[1])]
    log = Panel("norms of the gradient, one by one", lines[1:4], log_y=True)
    return Chart("Curves", [Panel("losses", lines), log], "step", bands=bands, x_range=(0, 1_200_000))


CHARTS = {
    "recipe": lambda: recipe_chart(load_recipe("b2")),
    "nfe": nfe_chart,
    "scores": score_chart,
    "bars": lambda: conflict_chart(bars=True),
    "spread": lambda: conflict_chart(bars=False),
    "alpha": alpha_chart,
    "losses": loss_chart,
}


def pixels(chart):
    return np.asarray(Image.open(io.BytesIO(to_png(chart))).convert("RGB"))


def texts(chart):
    """(words, x, y, size, bold, anchor) of every text in the SVG."""
    for node in ET.fromstring(to_svg(chart, in_page=True)).iter(f"{SVG}text"):
        style = dict(part.split(": ") for part in node.get("style").split("; "))
        size = float(style["font-size"].removesuffix("px"))
        bold = style.get("font-weight") == "700"
        yield node.text, float(node.get("x")), float(node.get("y")), size, bold, style.get("text-anchor", "start")


def words(chart):
    return [text[0] for text in texts(chart)]


def box(text):
    """(left, top, right, bottom) of a text in the font with which matplotlib draws, wider than a browser's."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    shown, x, y, size, bold, anchor = text
    font = FontProperties(size=size, weight="bold" if bold else "normal")
    width, height, descent = text_to_path.get_text_width_height_descent(shown, font, False)
    left = x - width * {"start": 0, "middle": 0.5, "end": 1}[anchor]
    return left, y - (height - descent), left + width, y + descent


def dots(chart):
    """Where the dots of a curve stand, in the order of its points."""
    uses = ET.fromstring(to_svg(chart, in_page=True)).iter(f"{SVG}use")
    return [(float(use.get("x")), float(use.get("y"))) for use in uses]


def y_numbers(chart):
    return [text for text, *_, anchor in texts(chart) if anchor == "end" and re.fullmatch(r"[-\de.kMG]+", text)]


def contrast(first, second):
    """As WCAG 2.1 defines it."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_svg_is_well_formed_keeps_its_words_and_escapes_what_it_is_given():
    assert {"FID against NFE", "consistency <&>", "1", "2", "4", "NFE"} <= set(words(nfe_chart()))
    assert len(dots(nfe_chart())) == 6


def test_svg_loads_nothing_and_runs_nothing():
    text = to_svg(recipe_chart(load_recipe("b2")))
    assert "<script" not in text
    assert not re.search(r"url\(|@import|DOCTYPE", text)
    assert set(re.findall(r"https?:[^\"]*", text)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    root = ET.fromstring(to_svg(nfe_chart()))
    names = {node.get("id") for node in root.iter()} - {None}
    assert {use.get(LINK).removeprefix("#") for use in root.iter(f"{SVG}use")} <= names


def test_two_charts_in_one_page_have_no_name_in_common():
    both = [to_svg(nfe_chart(width=width), in_page=True) for width in WIDTHS]
    first, second = (set(re.findall(r' id="([^"]*)"', text)) for text in both)
    assert first
    assert second
    assert not first & second


def test_a_value_lands_where_the_axis_says():
    line = Line("", [(0, 0), (5, 5), (10, 10)], markers=True)
    (x0, y0), (x1, y1), (x2, y2) = dots(Chart("", [Panel("", [line, line], (0, 10))], "", x_range=(0, 10)))[:3]
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.02)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.02)
    assert x0 < x2
    assert y0 > y2


def test_a_log_axis_puts_equal_ratios_at_equal_distances():
    (a, _), (b, _), (c, _) = dots(nfe_chart())[:3]
    assert b - a == pytest.approx(c - b, abs=0.03)


def test_png_draws_the_curve_in_its_colour_and_the_band_in_its():
    chart = Chart(
        "t", [Panel("p", [Line("", [(0, 1), (1, 1)], "#ff0000")], (0, 2))], "x", bands=[Band(0, 0.5, "", "#00ff00")]
    )
    image = pixels(chart)
    assert image.shape[1] == 2 * chart.width
    red = np.argwhere((image == [255, 0, 0]).all(-1))
    green = np.argwhere((image == [0, 255, 0]).all(-1))
    assert np.ptp(red[:, 1]) > 1500
    assert np.ptp(red[:, 0]) < 10
    assert abs(green[:, 1].max() - np.median(red[:, 1])) < 20


def test_png_dashes_leave_gaps():
    def reds(dashed):
        line = Line("", [(0, 1), (0.4, 1), (1, 1)], "#ff0000", dashed=dashed)
        image = pixels(Chart("t", [Panel("p", [line], (0, 2))], "x"))
        return (image == [255, 0, 0]).all(-1).sum()

    assert reds(True) / reds(False) == pytest.approx(3 / 5, abs=0.1)


def test_bars_stand_on_zero_and_reach_their_values():
    bars = Line("", [(0, 0.5), (1, -0.5)], "#ff0000", bars=True, spread=[(0, 0.25, 0.75), (1, -0.6, -0.4)])
    image = pixels(Chart("t", [Panel("p", [bars], (-1, 1), height=200)], "x"))
    red = np.argwhere((image == [255, 0, 0]).all(-1))
    up, down = (red[(red[:, 1] < 960) == side] for side in (True, False))
    assert np.ptp(up[:, 0]) == pytest.approx(100, abs=4)
    assert np.ptp(down[:, 0]) == pytest.approx(100, abs=4)
    assert abs(up[:, 0].max() - down[:, 0].min()) < 6


def test_a_spread_is_shaded_around_its_curve():
    line = Line("", [(0, 0), (1, 0)], "#ff0000", spread=[(0, -0.5, 0.5), (1, -0.5, 0.5)], spread_label="5% to 95%")
    chart = Chart("t", [Panel("p", [line], (-1, 1), height=200)], "x")
    column = pixels(chart)[:, 1000].astype(int)
    shaded = np.flatnonzero((column[:, 0] > 250) & (abs(column[:, 1] - 214) < 6))
    assert np.ptp(shaded) == pytest.approx(200, abs=6)
    assert "5% to 95%" in words(chart)


@pytest.mark.parametrize("name", CHARTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_words_lie_in_the_picture_and_none_over_another(name, width):
    chart = replace(CHARTS[name](), width=width)
    height = float(ET.fromstring(to_svg(chart, in_page=True)).get("height"))
    boxes = [(text[0], *box(text)) for text in texts(chart) if text[0].strip()]
    for word, left, top, right, bottom in boxes:
        assert left >= 0, word
        assert top >= 0, word
        assert right <= width, word
        assert bottom <= height, word
    for (word, l1, t1, r1, b1), (other, l2, t2, r2, b2) in itertools.combinations(boxes, 2):
        assert r1 <= l2 or r2 <= l1 or b1 <= t2 or b2 <= t1, (word, other)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_legend_stands_above_the_data(width):
    chart = replace(loss_chart(), width=width)
    heights = {text: y for text, _, y, *_ in reversed(list(texts(chart)))}
    names = heights.get("α = 1: flow matching") or heights["α = 1"]
    assert all(heights[line.label] < names for line in chart.panels[0].lines)


@pytest.mark.parametrize("width", WIDTHS)
def test_phases_are_named_as_far_as_there_is_room(width):
    shown = words(replace(recipe_chart(load_recipe("b2")), width=width))
    assert "0 < α < 1" in shown
    assert ("α = 1: flow matching" in shown) == (width > 400)
    assert "α = 1: flow matching" in shown or "α = 1" in shown


def test_few_points_of_a_lone_curve_have_their_values_beside_them():
    assert {"43.2", "17.34", "8.2", "3.8"} <= set(words(score_chart()))
    assert "1.01" not in words(score_chart([1.01 + i for i in range(20)]))


def test_equal_charts_give_equal_bytes_in_any_process_and_home_and_nothing_is_said(tmp_path):
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 9\nfont.size: 30\nsvg.fonttype: path\nnonsense: 1\n")
    script = (
        "import hashlib, sys\nsys.path[:0] = sys.argv[1:]\nfrom test_chart import nfe_chart, to_png, to_svg\n"
        "print(hashlib.sha256(to_png(nfe_chart()) + to_svg(nfe_chart()).encode()).hexdigest())"
    )
    barred = tmp_path / "a-file"
    barred.write_text("")
    env = {"HOME": str(barred / "home"), "PYTHONHASHSEED": "7", "XDG_CACHE_HOME": str(barred), "PATH": ""}
    line = [sys.executable, "-W", "error", "-c", script, *(path for path in sys.path if path)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=env, check=False)
    expected = hashlib.sha256(to_png(nfe_chart()) + to_svg(nfe_chart()).encode()).hexdigest()
    assert (done.stdout.strip(), done.stderr) == (expected, "")


def test_drawing_leaves_the_settings_of_matplotlib_alone():
    import matplotlib

    def settings():
        return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}

    before = settings()
    to_svg(nfe_chart())
    assert settings() == before
    assert "matplotlib.pyplot" not in sys.modules


def test_greek_letters_and_signs_have_their_shapes_in_a_png():
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    assert [letter for letter in "αωκε∇−≤→·–…×′Δ" if not font.get_char_index(ord(letter))] == []
    drawn = {pixels(Chart(letter, [Panel("", [Line("", [(0, 1)])])], "x")).tobytes() for letter in "αω"}
    assert len(drawn) == 2


@pytest.mark.parametrize("name", ["a $b$ c", "$", r"\frac{1}{", "日本語", "a\x00b\nc\ud800", "<&\"'>", "x" * 200, ""])
def test_any_name_is_drawn_as_it_stands(name):
    chart = Chart(name, [Panel(name, [Line(name, [(0, 1), (1, 2)]), Line("b", [(0, 1)])])], name, subtitle=name)
    root = ET.fromstring(to_svg(chart))
    if name.isprintable() and name:
        assert name in [node.text for node in root.iter(f"{SVG}text")]
    assert to_png(chart).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(1, 1)],
        [(1, 2), (2, 2)],
        [(1, math.nan), (2, 3), (3, math.inf)],
        [(1, math.nan)],
        [(1, 0), (2, 1e-9)],
        [(0, -5), (1, 5)],
        [(1, -1.7e308), (2, 1.7e308)],
        [(1, 1e-310), (2, 1e308)],
        [(1, 0.1), (2, 0.1000001)],
        [(math.nan, 1), (math.inf, 2), (3, 3)],
    ],
)
@pytest.mark.parametrize("log_y", [False, True])
def test_thin_and_broken_data_are_drawn_as_far_as_they_go(points, log_y):
    kinds = Line("l", points), Line("l", points, markers=True), Line("l", points, bars=True)
    charts = [Chart("t", [Panel("p", [line], log_y=log_y)], "x") for line in kinds]
    for chart in charts:
        assert not re.search(r"\b(nan|inf)\b", to_svg(chart, in_page=True))
        numbers = y_numbers(chart)
        assert len(set(numbers)) == len(numbers)
    assert to_png(replace(charts[0], panels=[chart.panels[0] for chart in charts])).startswith(b"\x89PNG")


def test_a_point_between_gaps_is_a_dot():
    assert len(dots(Chart("", [Panel("", [Line("", [(0, 1), (1, math.nan), (2, 2), (3, math.nan)])])], ""))) == 2


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 400_000), (-3, 7), (1e-5, 3e-5), (0.1, 0.11), (99_000, 101_000)])
def test_numbers_beside_an_axis_are_few_and_different(low, high):
    shown = y_numbers(Chart("", [Panel("", [Line("", [(0, low), (1, high)])])], ""))
    assert 3 <= len(shown) <= 8
    assert len(set(shown)) == len(shown)


@pytest.mark.parametrize(("low", "high"), [(1, 128), (1e-6, 1e3), (2, 3), (20, 500), (1e-30, 1e30)])
def test_numbers_beside_a_log_axis_are_few_and_different(low, high):
    shown = y_numbers(Chart("", [Panel("", [Line("", [(0, low), (1, high)])], log_y=True)], ""))
    assert 2 <= len(shown) <= 7
    assert len(set(shown)) == len(shown)


def test_numbers_are_short():
    shown = [show_number(v) for v in (0, 0.25, 1, 37.1, 1000, 115_000, 1.2e6, 1e-4, 2.5e-5, -0.5, 3e-17, 0.005)]
    assert shown == ["0", "0.25", "1", "37.1", "1k", "115k", "1.2M", "1e-4", "2.5e-5", "-0.5", "3e-17", "0.005"]


@pytest.mark.parametrize("dark", [False, True])
def test_colours_stand_out_from_what_lies_behind_them(dark):
    def seen(colour):
        return DARK[colour] if dark else colour

    for behind in (PAPER, *SHADES):
        assert min(contrast(seen(colour), seen(behind)) for colour in (INK, GREY)) >= 4.5  # words
        assert min(contrast(seen(c), seen(behind)) for c in (BLUE, ORANGE, GREEN, RED, PURPLE, GREY)) >= 3  # curves
    assert contrast(seen(PAPER), seen(INK)) > 12


@pytest.mark.parametrize("name", CHARTS)
def test_every_colour_of_a_chart_has_its_dark_form(name):
    used = re.findall(r"(fill|stroke): (#\w+)", to_svg(CHARTS[name](), in_page=True))
    assert {colour for _, colour in used} <= set(DARK)
    assert all(
        f'[style*="{kind}: {colour}"] {{ {kind}: {DARK[colour]} !important; }}' in DARK_STYLE for kind, colour in used
    )
    assert DARK_STYLE in to_svg(CHARTS[name]())


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_has_its_chart(name):
    chart = recipe_chart(load_recipe(name))
    ET.fromstring(to_svg(chart))
    assert [panel.title.split(":")[0] for panel in chart.panels] == ["α", "equal_share", "learning rate"]
    assert sum(band.last - band.first for band in chart.bands) == load_recipe(name).train.steps


def test_a_value_that_is_cut_off_at_the_edge_has_no_number_that_would_be_wrong():
    chart = score_chart([5.5, 0.25])
    panel = replace(chart.panels[0], y_range=(0, 1))
    assert "5.5" in words(chart)
    assert not {"5.5", "0.25"} & set(words(replace(chart, panels=[panel])))


def test_values_for_which_there_is_no_room_are_left_out():
    near = Line("", [(1, 1.111), (1.01, 2.222), (50, 3.333)], markers=True)
    assert {"1.111", "3.333"} <= set(words(Chart("", [Panel("", [near])], "")))
    assert "2.222" not in words(Chart("", [Panel("", [near])], ""))


def test_a_png_shows_no_empty_box_for_a_letter_that_its_font_lacks():
    def named(name):
        return to_png(Chart(name, [Panel(name, [Line(name, [(0, 1), (1, 2)]), Line("b", [(0, 2), (1, 1)])])], name))

    assert named("猫 cat") == named("? cat")
    assert named("α ≤ ∇") != named("? ? ?")
    assert "猫 cat" in to_svg(Chart("猫 cat", [Panel("p", [Line("a", [(0, 1), (1, 2)])])], "x"))
