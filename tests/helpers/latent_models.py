"""A random latent model with its autoencoder beside it, for tests of the decoder."""

from dataclasses import replace

import torch
from small_models import checkpoint_m, recipe_m
from tiny_autoencoders import tiny_kl

from alphaflow_cli.model.build import build_network
from alphaflow_cli.model.checkpoint import save_checkpoint
from alphaflow_cli.nn.autoencoder import load_autoencoder
from alphaflow_cli.recipe.schema import Data, Model


def latent_models(root):
    """fp32.safetensors, fp64 and bf16: 4×2×2 latents, pictures of 16 px, decoded by tiny-kl; returns the folder."""
    tiny_kl(root / "tiny-kl")
    data = Data(autoencoder="tiny-kl", image_size=16, channels=4, latent_size=2, classes=10, normalise="scale")
    for precision in ("fp32", "fp64", "bf16"):
        recipe = replace(recipe_m(precision), model=Model(dim=32, depth=1, heads=2, patch=1), data=data)
        net, generator = build_network(recipe), torch.Generator().manual_seed(1)
        weights = {n: torch.randn(w.shape, generator=generator) * 0.05 for n, w in net.named_parameters()}
        checkpoint = checkpoint_m(recipe, weights)
        digest = load_autoencoder(str(root / "tiny-kl"), device=torch.device("cpu")).weights_sha256
        origin = {**checkpoint.origin, "autoencoder": {"id": "tiny-kl", "revision": "", "weights_sha256": digest}}
        save_checkpoint(root / f"{precision}.safetensors", replace(checkpoint, origin=origin))
    return root
