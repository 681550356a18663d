"""What both tests of the command share."""

import pytest
from analyzed_runs import train

from alphaflow_cli.analyze import analyze as engine
from alphaflow_cli.cli import run as cli
from alphaflow_cli.train import conflict


def shorten(patch):
    """The gradient's size over α is measured on one batch at three α: the rest would be waiting."""
    patch.setattr(engine, "SIZE_BATCHES", 1)
    patch.setattr(conflict, "ALPHAS", (1.0, 0.1, 0.0))


@pytest.fixture
def short(monkeypatch):
    shorten(monkeypatch)


@pytest.fixture
def no_pictures(monkeypatch):
    """Numbers alone: to draw them takes twice as long as to measure them."""
    monkeypatch.setattr(engine, "write_charts", lambda out, summaries: [])


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def measured(tiny_run, tmp_path_factory):
    """The folder of an analysis of three batches, to be copied."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        assert cli(["analyze", str(tiny_run), "--out", str(folder), "--batch", "8", "--batches", "3"]) == 0
    return folder
