"""The line charts: where values land, what both backends draw, and what they survive."""

import io
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from alphaflow_cli.engine.curves import recipe_chart
from alphaflow_cli.recipe import load_recipe, shipped
from alphaflow_cli.report.chart import BLUE, RED, Band, Chart, Line, Panel, layout
from alphaflow_cli.report.png import to_png
from alphaflow_cli.report.svg import to_svg
from alphaflow_cli.report.ticks import show_number, ticks

SVG = "{http://www.w3.org/2000/svg}"


def nfe_chart(**changes):
    lines = [
        Line("trajectory", [(1, 40.2), (2, 37.1), (4, 35.0)], BLUE, markers=True),
        Line("consistency <&>", [(1, 40.2), (2, 36.0), (4, 36.5)], RED, dashed=True, markers=True),
    ]
    given = {"log_x": True, "x_ticks": (1, 2, 4), **changes}
    return Chart("FID against NFE", [Panel("FID", lines)], "NFE", **given)


def pixels(chart):
    return np.asarray(Image.open(io.BytesIO(to_png(chart))))


def test_svg_is_well_formed_and_escapes_what_it_is_given():
    root = ET.fromstring(to_svg(nfe_chart()))
    texts = [node.text for node in root.iter(f"{SVG}text")]
    assert {"FID against NFE", "consistency <&>", "1", "2", "4", "NFE"} <= set(texts)
    assert len(list(root.iter(f"{SVG}circle"))) == 6


def test_svg_loads_nothing_and_runs_nothing():
    text = to_svg(recipe_chart(load_recipe("b2")))
    assert "<script" not in text
    assert "href" not in text
    assert text.count("http") == 1


def test_a_value_lands_where_the_axis_says():
    chart = Chart("", [Panel("", [Line("", [(0, 0), (5, 5), (10, 10)])], (0, 10))], "", x_range=(0, 10))
    curve = next(m for m in layout(chart).marks if m.kind == "path" and m.width == 2.4)
    (x0, y0), (x1, y1), (x2, y2) = curve.points
    assert x1 == pytest.approx((x0 + x2) / 2)
    assert y1 == pytest.approx((y0 + y2) / 2)
    assert x0 < x2
    assert y0 > y2


def test_a_log_axis_puts_equal_ratios_at_equal_distances():
    dots = next(m for m in layout(nfe_chart()).marks if m.kind == "dots")
    (a, _), (b, _), (c, _) = dots.points
    assert b - a == pytest.approx(c - b)


def test_png_draws_the_curve_in_its_colour_and_the_band_in_its():
    chart = Chart(
        "t", [Panel("p", [Line("", [(0, 1), (1, 1)], "#ff0000")], (0, 2))], "x", bands=[Band(0, 0.5, "", "#00ff00")]
    )
    image = pixels(chart)
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

    assert reds(True) / reds(False) == pytest.approx(7 / 12, abs=0.1)


def test_both_backends_give_the_same_bytes_again():
    chart = recipe_chart(load_recipe("b2"))
    assert to_png(chart) == to_png(chart)
    assert to_svg(chart) == to_svg(chart)


@pytest.mark.parametrize(
    "points",
    [[], [(1, 1)], [(1, 2), (2, 2)], [(1, math.nan), (2, 3), (3, math.inf)], [(1, 0), (2, 1e-9)], [(0, -5), (1, 5)]],
)
@pytest.mark.parametrize("log_y", [False, True])
def test_thin_and_broken_data_are_drawn_as_far_as_they_go(points, log_y):
    chart = Chart("t", [Panel("p", [Line("l", points)], log_y=log_y)], "x")
    assert "nan" not in to_svg(chart)
    assert "inf" not in to_svg(chart)
    assert to_png(chart).startswith(b"\x89PNG")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 400_000), (-3, 7), (1e-5, 3e-5), (0.1, 0.1000001)])
def test_ticks_are_few_and_inside(low, high):
    found = ticks(low, high, 6, log=False)
    assert 2 <= len(found) <= 8
    assert all(low - 1e-9 * abs(high) <= t <= high * (1 + 1e-9) for t in found)


def test_ticks_are_at_round_values():
    assert ticks(0, 1, 5, log=False) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(0, 400_000, 8, log=False) == pytest.approx(list(range(0, 400_001, 50_000)))
    assert ticks(1, 100, 6, log=True) == pytest.approx([1, 3, 10, 30, 100])


@pytest.mark.parametrize(("low", "high"), [(1, 128), (1e-6, 1e3), (2, 3), (20, 500)])
def test_log_ticks_are_few_and_inside(low, high):
    found = ticks(low, high, 6, log=True)
    assert 1 <= len(found) <= 7
    assert all(low <= t <= high for t in found)


def test_numbers_beside_an_axis_are_short():
    shown = [show_number(v) for v in (0, 0.25, 1, 37.1, 1000, 115_000, 1.2e6, 1e-4, 2.5e-5, -0.5, 3e-17)]
    assert shown == ["0", "0.25", "1", "37.1", "1k", "115k", "1.2M", "1e-4", "2.5e-5", "-0.5", "0"]


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_has_its_chart(name):
    chart = recipe_chart(load_recipe(name))
    ET.fromstring(to_svg(chart))
    assert [panel.title.split(":")[0] for panel in chart.panels] == ["alpha", "equal_share", "learning rate"]
    assert sum(band.last - band.first for band in chart.bands) == load_recipe(name).train.steps
