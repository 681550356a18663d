"""Which rows the conflict is measured on: a batch of the store with times, noise and dropout drawn as in training.

All of them are r < t rows: where a draw gives r = t (half the time with times.order min), that row's times are drawn
again; after TRIES draws a tie stays one. Draws come from seeds of their own, so that no training step sees them.
"""

import torch
from torch import Tensor

from alphaflow_cli.core.draws import CONFLICT, mix_seed, step_draws
from alphaflow_cli.core.objective import is_tie
from alphaflow_cli.core.times import sample_times
from alphaflow_cli.data.transfer import to_device
from alphaflow_cli.engine.build import DTYPES
from alphaflow_cli.engine.step import Rows
from alphaflow_cli.recipe.schema import Recipe

TRIES = 64  # a row of times.order min stays a tie with the probability 2^-64


def conflict_rows(recipe: Recipe, x: Tensor, y: Tensor, *, seed: int, index: int) -> Rows:
    """Latents and labels with the draws of measurement `index`."""
    dtype = DTYPES[recipe.train.precision]
    shape = (int(x.shape[1]), int(x.shape[2]), int(x.shape[3]))
    draws = step_draws(mix_seed(seed, CONFLICT), index, batch=len(x), shape=shape, device=x.device)
    t, r = later_times(recipe, draws.normals, mix_seed(seed, CONFLICT, index))
    t, r, uniforms = to_device(torch.stack([t, r, draws.uniforms]).to(dtype), x.device)
    return Rows(x=x.to(dtype), noise=draws.noise.to(dtype), t=t, r=r, y=y, uniforms=uniforms, n_equal=0)


def later_times(recipe: Recipe, normals: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """(t, r) from normals (3, B), on the host; ties are drawn again, the other rows keep theirs."""
    law = recipe.times
    t, r = sample_times(normals, 0, law=law.law, mean=law.mean, std=law.std, order=law.order)
    for again in range(1, TRIES):
        tie = is_tie(t, r)
        if not tie.any():
            break
        normals = torch.randn(normals.shape, generator=torch.Generator().manual_seed(mix_seed(seed, again)))
        new_t, new_r = sample_times(normals, 0, law=law.law, mean=law.mean, std=law.std, order=law.order)
        t, r = torch.where(tie, new_t, t), torch.where(tie, new_r, r)
    return t, r


def renormalised(x: Tensor, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> Tensor:
    """The store's x in the checkpoint's normalisation, where they differ (another store, a converted checkpoint)."""
    mean, std, own_mean, own_std = (value.to(x.device) for value in (*old, *new))  # each may be on the host
    if all(a.shape == b.shape and torch.equal(a, b) for a, b in ((mean, own_mean), (std, own_std))):
        return x
    return ((x.double() * std + mean - own_mean) / own_std).to(x.dtype)
