"""From a recipe to objects: the network, its label rows, the bound functions of the core."""

import torch

from alphaflow_cli.nn.dit import DiT
from alphaflow_cli.nn.noise import NoiseDiT
from alphaflow_cli.recipe.schema import Recipe

NETWORKS: dict[str, type[DiT]] = {"velocity": DiT, "noise": NoiseDiT}


DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}  # of weights, targets and losses


def label_rows(recipe: Recipe) -> int:
    """Rows of the label table: the classes, plus the null row (last) when labels are dropped in training."""
    return recipe.data.classes + (recipe.guidance.label_dropout > 0) if recipe.data.classes else 0


def null_label(recipe: Recipe) -> int:
    """The null label: the last row of the table."""
    return max(label_rows(recipe) - 1, 0)


def build_network(recipe: Recipe, *, seed: int | None = None) -> DiT:
    """The recipe's network, initialised from `seed` (None: the recipe's own); global randomness stays as it was."""
    model, data = recipe.model, recipe.data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed if seed is None else seed)
        return NETWORKS[model.prediction](
            latent_size=data.latent_size,
            channels=data.channels,
            patch=model.patch,
            dim=model.dim,
            depth=model.depth,
            heads=model.heads,
            mlp_ratio=model.mlp_ratio,
            label_rows=label_rows(recipe),
            qk_norm=model.qk_norm,
            second_time=model.second_time,
            gradient_checkpointing=recipe.train.gradient_checkpointing,
        )
