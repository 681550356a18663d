"""A Hub on loopback, an empty cache, a user; and a tiny trained-looking run to publish."""

import hashlib
import json

import huggingface_hub.constants
import pytest
import torch
from hub_server import HubServer

from alphaflow_cli.cli import run
from alphaflow_cli.model.build import build_network
from alphaflow_cli.model.checkpoint import Checkpoint, save_checkpoint
from alphaflow_cli.recipe import recipe_from_text

RECIPE = """
name: tiny
model: {dim: 32, depth: 1, heads: 2, patch: 4}
data: {autoencoder: none, image_size: 16, channels: 3, latent_size: 16, classes: 10, normalise: channel}
alpha: {kind: sigmoid, initial: 1, final: 0}
train: {steps: 100, batch: 8, precision: fp32}
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server; the client's environment points to it. Logged in as `me`."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "token-me")
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def write_checkpoint(path, *, seed=0, sets=(), **origin):
    """A network with random weights everywhere, in our form."""
    recipe = recipe_from_text(RECIPE, "test", sets)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: 0.2 * torch.randn(value.shape, generator=generator)
        for name, value in build_network(recipe).state_dict().items()
    }
    facts = {"step": 100, "images_seen": 800, "weights": "ema", "half_life": 50.0, "class_names": []}
    facts |= {"versions": {"alphaflow": "0.1.0", "torch": "2.6"}, "autoencoder": {"id": recipe.data.autoencoder}}
    mean = torch.tensor([0.1, 0.0, -0.1, 0.05], dtype=torch.float64)[: recipe.data.channels, None, None]
    save_checkpoint(path, Checkpoint(weights, recipe, mean, 0.5 + 0 * mean, facts | origin))
    return path


def results_of(checkpoint_sha256):
    """results.json as `alphaflow eval` writes it."""
    row = {
        "name": "FD-tiny-2k",
        "value": 3.14159,
        "spread": None,
        "metric": "fd-tiny",
        "space": {"network": "tiny", "weights_sha256": "ab" * 32, "preprocessing": "none", "dim": 192},
        "count": 2000,
        "pictures": {"kind": "checkpoint", "checkpoint_sha256": checkpoint_sha256, "nfe": 1},
        "label": "trajectory on 1, 0, balanced",
        "reference": {"name": "glyphs", "kind": "moments", "sha256": "cd" * 32, "count": 2000},
        "settings": {},
        "notes": [],
    }
    return {"schema": "alphaflow-results/1", "environment": {}, "evaluations": [{"id": "x", "rows": [row]}]}


def write_results(path, checkpoint_sha256):
    path.write_text(json.dumps(results_of(checkpoint_sha256)))


@pytest.fixture
def project_run(tmp_path, monkeypatch):
    """runs/tiny in a project folder, where we are: weights, and results that belong to them."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    scored(folder, seed=0)
    return folder


def scored(folder, seed):
    model = write_checkpoint(folder / "model.safetensors", seed=seed)
    write_results(folder / "results.json", sha256(model.read_bytes()))


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def alphaflow(*args, capsys):
    """The exit code and stderr of a command; a fault is one line."""
    code = run([*map(str, args)])
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    assert out.err.lower().count("error:") == (code != 0)
    return code, out.err
