"""The latents' statistics where a file does not hold them: a scale, a known set, or a file."""

import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alphaflow_cli.convert.imported import Latents
from alphaflow_cli.errors import AlphaflowError

SD_SCALE = 0.18215  # of the Stable Diffusion autoencoders: 1 / std of a latent
ZHUYU_SCALE = 0.18125  # in zhuyu-cs/MeanFlow's trainer: written so, and its networks are trained to it
MEANFLOW_MEAN = (0.86488, -0.27787343, 0.21616915, 0.3738409)  # per channel, there for two days before that
MEANFLOW_STD = (4.85503674, 5.31922414, 3.93725398, 3.9870003)  # the same; x = (latent − mean) · 0.5 / std
FORM = "--latents takes scale:0.18215 (or another number), meanflow, or a .safetensors file with mean and std"


def scaled(scale: float, source: str) -> Latents:
    """x = latent · scale."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    return Latents(mean=0 * one, std=one / scale, normalise="scale", source=source)


def meanflow(source: str) -> Latents:
    """zhuyu-cs/MeanFlow's per-channel numbers; its x has a standard deviation of 0.5."""
    mean = torch.tensor(MEANFLOW_MEAN, dtype=torch.float64)[:, None, None]
    std = torch.tensor(MEANFLOW_STD, dtype=torch.float64)[:, None, None] / 0.5
    return Latents(mean=mean, std=std, normalise="channel", source=source)


def parse_latents(text: str) -> Latents:
    """The value of --latents."""
    shown = text if len(text) <= 60 else f"{text[:57]}…"
    if text == "meanflow":
        return meanflow("--latents meanflow")
    if text.startswith("scale:"):
        try:
            scale = float(text[6:])
        except ValueError as error:
            raise AlphaflowError(f"{shown!r}: {FORM}.") from error
        if not (0 < scale < math.inf and 1 / scale < math.inf):
            raise AlphaflowError(f"{shown!r}: a scale is a number above 0. {FORM}.")
        return scaled(scale, f"--latents {text}")
    if not text.endswith(".safetensors"):
        raise AlphaflowError(f"{shown!r}: {FORM}.")
    return _from_file(Path(text))


def _from_file(path: Path) -> Latents:
    """`mean` and `std`, or `latents.mean` and `latents.std` as in a checkpoint of ours."""
    found: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                if name.removeprefix("latents.") in ("mean", "std"):
                    found[name.removeprefix("latents.")] = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise AlphaflowError(f"{path}: cannot be read as safetensors: {error}. {FORM}.") from error
    if found.keys() != {"mean", "std"}:
        raise AlphaflowError(f"{path}: holds no mean and std. {FORM}.")
    if not all(value.is_floating_point() for value in found.values()):
        raise AlphaflowError(f"{path}: its mean and std are no floating-point numbers. {FORM}.")
    return statistics(found["mean"], found["std"], str(path.name))


def statistics(mean: Tensor, std: Tensor, source: str) -> Latents:
    """Per position where they have positions, else per channel; the batch axis goes."""
    if mean.ndim not in (3, 4) or mean.shape != std.shape or mean.shape[:-3] not in ((), (1,)):
        raise AlphaflowError(
            f"{source}: mean and std have the shapes {tuple(mean.shape)} and {tuple(std.shape)}; "
            "wanted (C, 1, 1) or (C, h, w), both the same."
        )
    mean, std = (value.double().reshape(value.shape[-3:]) for value in (mean, std))
    good = torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()
    if not good:
        raise AlphaflowError(f"{source}: the latents' mean and std are not finite and positive.")
    return Latents(mean=mean, std=std, normalise="position" if mean.shape[-1] > 1 else "channel", source=source)
