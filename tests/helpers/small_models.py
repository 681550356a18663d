"""Small checkpoints without training: the golden network M, and a random model of pixels."""

from dataclasses import replace
from pathlib import Path

import torch
from golden_data import network

from alphaflow_cli.model.build import build_network
from alphaflow_cli.model.checkpoint import Checkpoint, save_checkpoint
from alphaflow_cli.recipe.schema import Data, Guidance, Model, Recipe, Schedule, Train

PIXELS = {"id": "none", "revision": "", "weights_sha256": ""}


def recipe_m(precision: str = "fp64", **guidance: float) -> Recipe:
    """The recipe of the golden model M."""
    return Recipe(
        name="golden",
        model=Model(dim=64, depth=2, heads=4, patch=2),
        data=Data(autoencoder="tiny", image_size=64, channels=4, latent_size=8, classes=10, normalise="scale"),
        alpha=Schedule(initial=0.0),
        guidance=Guidance(label_dropout=0.1, **guidance),
        train=Train(precision=precision),  # type: ignore[arg-type]
    )


def checkpoint_m(recipe: Recipe, weights: dict[str, torch.Tensor] | None = None) -> Checkpoint:
    one = torch.ones((1, 1, 1), dtype=torch.float64)
    origin = {"step": 7, "weights": "ema", "class_names": [f"class {i}" for i in range(10)], "autoencoder": PIXELS}
    state = weights or {name: w.detach() for name, w in network("M").named_parameters()}
    return Checkpoint(weights=state, recipe=recipe, mean=0 * one, std=one, origin=origin)


def pixel_checkpoint(path: Path, side: int = 8, classes: int = 10) -> Path:
    """A random pixel-space model; every weight random, so that nothing is zero."""
    recipe = replace(
        recipe_m("fp32"),
        model=Model(dim=32, depth=2, heads=2, patch=2),
        data=Data("", "", "none", side, 3, side, classes, normalise="scale"),
        guidance=Guidance(label_dropout=0.1 * (classes > 0)),
    )
    net = build_network(recipe)
    generator = torch.Generator().manual_seed(1)
    weights = {n: torch.randn(w.shape, generator=generator) * 0.05 for n, w in net.named_parameters()}
    save_checkpoint(path, checkpoint_m(recipe, weights))
    return path
