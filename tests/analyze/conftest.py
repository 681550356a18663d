"""What both tests of the command share."""

import pytest
from analyzed_runs import train

from alphaflow_cli.analyze import analyze as engine
from alphaflow_cli.train import conflict


@pytest.fixture
def short(monkeypatch):
    """The gradient's size over α is measured on one batch at three α: the rest would be waiting."""
    monkeypatch.setattr(engine, "SIZE_BATCHES", 1)
    monkeypatch.setattr(conflict, "ALPHAS", (1.0, 0.1, 0.0))


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "tiny")
