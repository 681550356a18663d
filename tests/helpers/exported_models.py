"""Small checkpoints for the tests of export, and how far two lots of pictures are apart."""

from dataclasses import replace

import numpy as np
import torch
from small_models import checkpoint_m, recipe_m
from tiny_autoencoders import tiny_kl

from alphaflow_cli.cli import run
from alphaflow_cli.model.build import build_network
from alphaflow_cli.model.checkpoint import save_checkpoint
from alphaflow_cli.nn.autoencoder import load_autoencoder
from alphaflow_cli.recipe.schema import Data, Model


def latent_checkpoint(path, *, sample=None, **model):
    """A random latent model, 4×4×4, whose pictures of 32 px a random AutoencoderKL beside it decodes."""
    tiny_kl(path.parent / "tiny-kl")
    digest = load_autoencoder(str(path.parent / "tiny-kl"), device=torch.device("cpu")).weights_sha256
    data = Data(autoencoder="tiny-kl", image_size=32, channels=4, latent_size=4, classes=10, normalise="scale")
    recipe = replace(recipe_m("fp32"), model=replace(Model(dim=32, depth=1, heads=2, patch=1), **model), data=data)
    recipe = replace(recipe, sample=replace(recipe.sample, **(sample or {})))
    net, generator = build_network(recipe), torch.Generator().manual_seed(1)
    weights = {n: torch.randn(w.shape, generator=generator) * 0.05 for n, w in net.named_parameters()}
    checkpoint, one = checkpoint_m(recipe, weights), torch.ones((1, 1, 1), dtype=torch.float64)
    origin = {**checkpoint.origin, "autoencoder": {"id": "tiny-kl", "revision": "", "weights_sha256": digest}}
    save_checkpoint(path, replace(checkpoint, origin=origin, mean=0.1 * one, std=1.5 * one))
    return path


def sampled(path, folder, *, seeds="0-15", classes="3", nfe=1):
    """The pictures that `alphaflow sample` draws, uint8 (n, H, W, 3)."""
    out = folder / f"sampled-{seeds}-{classes}-{nfe}.npz"
    args = ["sample", path, "--seeds", seeds, "--classes", classes, "--nfe", nfe, "--out", out, "--device", "cpu"]
    assert run([*map(str, args)]) == 0
    with np.load(out) as file:
        return file["arr_0"]


def same_pictures(what, ours, theirs):
    """At most 1 of 255, in fewer than 0.1% of the values; prints the figure."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    apart = np.abs(ours.astype(int) - theirs.astype(int))
    print(f"{what}: largest difference {apart.max()} of 255, in {(apart > 0).mean():.4%} of {apart.size:,} values")
    assert apart.max() <= 1
    assert (apart > 0).mean() < 0.001
    assert len(np.unique(theirs)) > 10  # they are pictures, not one colour


def noises(shape, seeds):
    """The noise of each seed, as every page about export says it is drawn."""
    return np.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy() for seed in seeds])
