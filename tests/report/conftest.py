"""What the tests of a run's page share: a chart that several pages show is drawn once, as drawing is most of a page."""

import pytest

from alphaflow_cli.charts.draw import to_svg_element
from alphaflow_cli.report import page

DRAWN: dict[str, str] = {}  # what a chart says of itself decides every byte of its picture (tests/charts)


def draw_once(chart):
    key = repr(chart)
    if key not in DRAWN:
        DRAWN[key] = to_svg_element(chart)
    return DRAWN[key]


@pytest.fixture(autouse=True)
def charts_are_drawn_once(monkeypatch):
    monkeypatch.setattr(page, "to_svg_element", draw_once)
