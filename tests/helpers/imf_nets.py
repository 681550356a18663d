"""Improved MeanFlow's networks as recipes: the golden one (A) with its weights, and the published sizes."""

import torch
from golden_data import arrays
from torch import Tensor

from alphaflow_cli.convert.imf import PREFIX, TOKENS, bare_names, from_imf, imf_names
from alphaflow_cli.model.build import build_network
from alphaflow_cli.nn.dit import DiT
from alphaflow_cli.recipe import Recipe
from alphaflow_cli.recipe.loader import recipe_from_text

LADDER = "inputs: [scale, interval], conditioning: tokens, block: modern, mlp_ratio: 2.6667"
DRAWN = "{label_dropout: 0.1, scale: drawn, interval: drawn}"
SIZES = {"B": (768, 12, 12), "M": (768, 24, 12), "L": (1024, 32, 16), "XL": (1024, 48, 16)}  # dim, depth, heads
TRAINED = {"B": 145_596_960, "M": 230_570_016, "L": 509_752_352, "XL": 711_113_760}
AT_INFERENCE = {"B": 88_948_256, "M": 173_921_312, "L": 409_071_648, "XL": 610_433_056}  # v's last layer included
NAMES_A = imf_names(2, 2, velocity=2)


def recipe_a(precision: str = "fp64") -> Recipe:
    """The recipe of the golden network A: 10 classes and the null label, latents 4×8×8."""
    return recipe_from_text(
        f"model: {{dim: 40, depth: 4, heads: 4, patch: 2, velocity_head: 2, {LADDER}}}\n"
        "data: {image_size: 64, latent_size: 8, channels: 4, classes: 10}\n"
        f"guidance: {DRAWN}\ntrain: {{precision: {precision}}}\n",
        "net A",
    )


def network_a(dtype: torch.dtype = torch.float64) -> DiT:
    """The golden network A with its weights."""
    net = build_network(recipe_a()).to(dtype)
    state = {name: torch.tensor(value) for name, value in arrays("imf_state_A.npz").items()}
    net.load_state_dict(from_imf(bare_names(state), NAMES_A))
    return net


def to_imf(weights: dict[str, Tensor], names: dict[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Take our tables apart into theirs, under their names without wrappers."""
    apart: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        value = weights[ours]
        sizes = TOKENS if theirs == PREFIX else [len(value) // len(theirs)] * len(theirs)
        apart |= dict(zip(theirs, torch.split(value, sizes), strict=True))
    return apart


def guide_of(file: str, prefix: str = "") -> Tensor:
    """The guide (w, t_min, t_max) of the rows of a golden file."""
    names = (f"{prefix}{name}" for name in ("omega", "t_min", "t_max"))
    return torch.stack([torch.tensor(arrays(file)[name]).double() for name in names], 1)


def recipe_of(size: str, *, velocity_head: int | None) -> Recipe:
    """The recipe of a published size, with or without the velocity's blocks."""
    dim, depth, heads = SIZES[size]
    head = "null" if velocity_head is None else velocity_head
    return recipe_from_text(
        f"model: {{dim: {dim}, depth: {depth}, heads: {heads}, velocity_head: {head}, {LADDER}}}\nguidance: {DRAWN}\n",
        size,
    )
