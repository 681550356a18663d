"""What the tests of push and pull share."""

import pytest
from drawn_once import once

from alphaflow_cli.charts.draw import to_png
from alphaflow_cli.hub import stage

DRAW = once(to_png)


@pytest.fixture(autouse=True)
def the_recipes_chart_is_drawn_once(monkeypatch):
    monkeypatch.setattr(stage, "to_png", DRAW)
