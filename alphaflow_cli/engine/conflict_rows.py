"""Which rows the conflict is measured on: a batch of the store with times, noise and dropout drawn as in training.

All of them are r < t rows. Draws come from seeds of their own, so that no training step sees them.
"""

import torch
from torch import Tensor

from alphaflow_cli.core.draws import CONFLICT, mix_seed, step_draws
from alphaflow_cli.core.times import sample_times
from alphaflow_cli.engine.build import DTYPES
from alphaflow_cli.engine.step import Rows
from alphaflow_cli.recipe.schema import Recipe


def conflict_rows(recipe: Recipe, x: Tensor, y: Tensor, *, seed: int, index: int) -> Rows:
    """Latents and labels with the draws of measurement `index`."""
    dtype, law = DTYPES[recipe.train.precision], recipe.times
    shape = (int(x.shape[1]), int(x.shape[2]), int(x.shape[3]))
    draws = step_draws(mix_seed(seed, CONFLICT), index, batch=len(x), shape=shape, device=x.device)
    t, r = sample_times(draws.normals, 0, law=law.law, mean=law.mean, std=law.std, order=law.order)
    return Rows(
        x=x.to(dtype),
        noise=draws.noise.to(dtype),
        t=t.to(dtype),
        r=r.to(dtype),
        y=y,
        uniforms=draws.uniforms,
        n_equal=0,
    )


def renormalised(x: Tensor, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> Tensor:
    """The store's x in the checkpoint's normalisation, where they differ (another store, a converted checkpoint)."""
    if all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(old, new, strict=True)):
        return x
    mean, std, own_mean, own_std = (value.to(x.device) for value in (*old, *new))
    return ((x.double() * std + mean - own_mean) / own_std).to(x.dtype)
