"""Networks of the published shapes with random weights, written where the program reads weights: nothing is downloaded.

They take the time that the published weights take; what they make and measure means nothing.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from workload import CLASSES, Size, build

from alphaflow_cli.model.checkpoint import Checkpoint, save_checkpoint
from alphaflow_cli.recipe import load_recipe

sys.path.append(str(Path(__file__).parent.parent / "tests" / "helpers"))  # they have random networks of their own
from ruler import random_inception as random_inception
from tiny_autoencoders import tiny_kl

DOWNSCALE = 8  # of both autoencoders


def build_sd_vae() -> nn.Module:
    """The AutoencoderKL of Stable Diffusion 1 (stabilityai/sd-vae-ft-ema/config.json)."""
    from diffusers import AutoencoderKL  # seconds, which only this autoencoder needs

    model: nn.Module = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.18215,
    )
    return model


def save_sd_vae(folder: Path) -> None:
    """Write the autoencoder as a folder."""
    torch.manual_seed(0)
    build_sd_vae().save_pretrained(folder)  # type: ignore[operator]


AUTOENCODERS = {"sd-vae": save_sd_vae, "tiny": tiny_kl}


def save_dit(path: Path, size: Size, *, image_size: int, autoencoder: str, seed: int) -> None:
    """A checkpoint of a DiT; the autoencoder is the name of a folder beside it."""
    size = replace(size, latent=image_size // DOWNSCALE)
    sets = {
        **{f"model.{name}": getattr(size, name) for name in ("dim", "depth", "heads", "patch")},
        "model.qk_norm": str(size.qk_norm).lower(),
        "data.image_size": image_size,
        "data.latent_size": size.latent,
        "data.classes": CLASSES,
        "guidance.label_dropout": 0.1,  # the network has a null label
    }
    recipe = load_recipe("b2", [f"{name}={value}" for name, value in sets.items()])
    net = build(size, seed=seed, device="cpu", dtype=torch.float32)
    origin = {"step": 0, "weights": "ema", "autoencoder": {"id": autoencoder}}
    plain = torch.zeros(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)
    save_checkpoint(path, Checkpoint(net.state_dict(), recipe, *plain, origin))
