"""How much of the device the run uses, estimated: the arithmetic a step needs, over the device's dense bf16 peak.

Counted are the products of the blocks and the final layer, 2 operations per multiply-add, in units of one row's
forward: 3 of a graded row (forward and backward), 1 of a row of an extra call, 1.05 of a riding tangent (the cost
measured beside a plain step). What gradient checkpointing recomputes is not needed, so it is not counted. Guidance's
rows differ from step to step: their mean is counted.
"""

import torch

from alphaflow_cli.core.times import sample_times
from alphaflow_cli.engine.guide import ask, ask_all
from alphaflow_cli.engine.plan import phase_kind, tokens
from alphaflow_cli.recipe.schema import Recipe

TANGENT = 1.05
SAMPLE = 1 << 14
# NVIDIA's data sheets, dense bf16 with float32 accumulation, in FLOP/s; the first name found in the device's counts
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_of(device_name: str, precision: str) -> float | None:
    """The device's peak; None where it is not known, or another precision is used."""
    if precision != "bf16":
        return None
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)


def forward_flops(recipe: Recipe) -> float:
    """Of one row."""
    model, n, d = recipe.model, tokens(recipe), recipe.model.dim
    per_token = 2 * (4 + 2 * model.mlp_ratio) * d * d + 4 * n * d  # qkv, proj, MLP; q kᵀ and p v
    modulations = 2 * (6 * model.depth + 2) * d * d
    edges = 2 * 2 * n * d * model.patch**2 * recipe.data.channels
    return model.depth * n * per_token + modulations + edges


def mean_asked_rows(recipe: Recipe, n_equal: int) -> float:
    """Guidance's rows of a step, in the mean over SAMPLE draws; compiled blocks always see all of them."""
    batch, law, host = recipe.train.batch, recipe.times, torch.device("cpu")
    if recipe.train.compile:
        return float(len(ask_all(batch, n_equal, recipe.guidance, host).places))
    generator, equal = torch.Generator().manual_seed(0), round(SAMPLE * n_equal / batch)
    normals, uniforms = torch.randn((3, SAMPLE), generator=generator), torch.rand(SAMPLE, generator=generator)
    t, _ = sample_times(normals, equal, law=law.law, mean=law.mean, std=law.std, order=law.order)
    return len(ask(t, uniforms, equal, recipe.guidance, host).places) * batch / SAMPLE


def step_flops(recipe: Recipe, alpha: float, n_equal: int) -> float:
    """Of one step on the global batch."""
    batch, mix = recipe.train.batch, recipe.guidance
    later = batch - n_equal
    units = 3.0 * batch
    if recipe.data.classes and (mix.omega, mix.kappa) != (1.0, 0.0):
        units += mean_asked_rows(recipe, n_equal)
    if phase_kind(alpha) == "between":
        units += later * (2 if recipe.loss.velocity == "network" else 1)
    elif phase_kind(alpha) == "derivative":
        units += TANGENT * later
    return units * forward_flops(recipe)
