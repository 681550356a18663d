"""What the tests of a run's page share."""

import pytest
from drawn_once import once

from alphaflow_cli.charts.draw import to_svg
from alphaflow_cli.report import page

DRAW = once(to_svg)


@pytest.fixture(autouse=True)
def charts_are_drawn_once(monkeypatch):
    monkeypatch.setattr(page, "to_svg", DRAW)
