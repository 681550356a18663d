"""A small AutoencoderKL, trained on the spot: for benchmarks whose decoder must have learnt something."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from alphaflow_cli.core.pixels import from_uint8

CHANNELS, LATENT = (32, 64, 64), 4  # two halvings: 32 px to 8 x 8
BATCH, RATE, KL_WEIGHT = 32, 2e-3, 1e-6  # the weight is that of latent diffusion's KL autoencoders


def build_small(seed: int) -> nn.Module:
    """Build the autoencoder, untrained."""
    torch.manual_seed(seed)
    model: nn.Module = AutoencoderKL(
        block_out_channels=CHANNELS,
        norm_num_groups=16,
        layers_per_block=1,
        latent_channels=LATENT,
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
    )
    return model


def train_small(pictures: Tensor, folder: str | Path, *, steps: int, seed: int, device: str) -> float:
    """Absolute error of the pixels plus a little KL, Adam, one cycle; saved in the folder. Returns the last loss."""
    model, loss = build_small(seed).to(device), torch.tensor(0.0)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps + 1)
    for _ in range(steps):
        rows = torch.randint(len(pictures), (BATCH,), generator=generator)
        x = from_uint8(pictures[rows].to(device))
        posterior = model.encode(x).latent_dist  # type: ignore[operator]
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        found = model.decode(posterior.mean + posterior.std * noise).sample  # type: ignore[operator]
        loss = (found - x).abs().mean() + KL_WEIGHT * posterior.kl().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval().save_pretrained(folder)  # type: ignore[operator]
    return float(loss.detach())
