"""The conflict: gradients of the objective's two halves, and of their border case, on the same rows.

    tfm   L_TFM = E ‖u − ṽ‖² on r < t rows                      tc   L_TC = E [2 (t − r) uᵀ du⁻/dt] on the same rows
    fm    L_FM' = E ‖u(z_t, t, t) − ṽ‖²: the same rows with r := t

ṽ, the times and the label dropout are those of training. A gradient is as large as the network, so two are held at a
time: that of L_TFM is computed twice. Inner products are kept per group of tensors, because cosines cannot be added
up but products can.

`conflict_rows` draws the rows. All of them are r < t rows: where a draw gives r = t (half the time with times.order
min), that row's times are drawn again; after TRIES draws a tie stays one. `measure_batch` is what `analyze` calls;
`measure` is the measurement now and then while training (train.conflict_every), of the raw weights on one micro-batch
of the next step's data. It changes nothing of the run: the draws have seeds of their own, gradients are computed apart
from `.grad`, and neither the optimiser nor the journal's sums hear of it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from alphaflow_cli.core.conflict import consistency_loss, cosine, products, trajectory_loss
from alphaflow_cli.core.draws import CONFLICT, mix_seed, step_draws
from alphaflow_cli.core.objective import is_tie
from alphaflow_cli.core.times import sample_times
from alphaflow_cli.data.batches import to_device
from alphaflow_cli.model.build import DTYPES
from alphaflow_cli.recipe.schema import Loss, Recipe
from alphaflow_cli.train.run import Run
from alphaflow_cli.train.step import (
    Objective,
    Rows,
    guide_of,
    moving_rows,
    precision,
    row_draws,
    time_laws,
    training_step,
)

TERMS = ("tfm", "tc", "fm")
PAIRS = (("tfm", "tc"), ("tfm", "fm"), ("tc", "fm"))
LOSS_WEIGHTS: tuple[Literal["adaptive", "converging"], ...] = ("adaptive", "converging")
ALPHAS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.0)
CONFLICT_BINS = 4  # equal bins of t − r in (0, 1]; each costs the gradients of its rows once more
TRIES = 64  # a row of times.order min stays a tie with the probability 2^-64

Gradient = dict[str, Tensor]


def conflict_rows(recipe: Recipe, x: Tensor, y: Tensor, *, seed: int, index: int) -> Rows:
    """Make r < t rows of latents and labels, with the noise and times of measurement number `index`."""
    dtype = DTYPES[recipe.train.precision]
    shape = (int(x.shape[1]), int(x.shape[2]), int(x.shape[3]))
    draws = step_draws(mix_seed(seed, CONFLICT), index, batch=len(x), shape=shape, device=x.device)
    t, r = later_times(recipe, draws.normals, mix_seed(seed, CONFLICT, index))
    drawn = to_device(row_draws(t, r, draws, 0, recipe.guidance).to(dtype), x.device)
    t, r, uniforms = drawn[:3]
    noise, guide = draws.noise.to(dtype), guide_of(drawn)
    return Rows(x=x.to(dtype), noise=noise, t=t, r=r, y=y, uniforms=uniforms, n_equal=0, guide=guide)


def later_times(recipe: Recipe, normals: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Draw (t, r) from normals (3, B) on the host; rows with r = t are drawn again, the others keep their times."""
    laws = time_laws(recipe.times)
    t, r = sample_times(normals, 0, laws)
    for again in range(1, TRIES):
        tie = is_tie(t, r)
        if not tie.any():
            break
        normals = torch.randn(normals.shape, generator=torch.Generator().manual_seed(mix_seed(seed, again)))
        new_t, new_r = sample_times(normals, 0, laws)
        t, r = torch.where(tie, new_t, t), torch.where(tie, new_r, r)
    return t, r


def renormalised(x: Tensor, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> Tensor:
    """The store's x in the checkpoint's normalisation, where they differ (another store, a converted checkpoint)."""
    mean, std, own_mean, own_std = (value.to(x.device) for value in (*old, *new))  # each may be on the host
    if all(a.shape == b.shape and torch.equal(a, b) for a, b in ((mean, own_mean), (std, own_std))):
        return x
    return ((x.double() * std + mean - own_mean) / own_std).to(x.dtype)


@dataclass(frozen=True)
class Later:
    """r < t rows, with everything that the three losses need besides the network."""

    z_t: Tensor
    v_guided: Tensor
    t: Tensor
    r: Tensor
    y: Tensor
    du: Tensor  # du⁻/dt along (ṽ, 0, 1), or along the network's own velocity where the recipe says so
    guide: Tensor | None

    def take(self, index: Tensor) -> "Later":
        """Choose some of the rows by their indices."""
        chosen: dict[str, Any] = {name: value if value is None else value[index] for name, value in vars(self).items()}
        return Later(**chosen)


class Measurement(TypedDict):
    """The three losses, and per pair of terms ("tfm.tc") and group of tensors the gradients' inner product."""

    losses: dict[str, float]
    products: dict[str, dict[str, float]]


def measure_batch(net: nn.Module, rows: Rows, objective: Objective, *, bins: int) -> dict[str, Any]:
    """Measure all rows of a batch, then those of each bin of t − r: losses, and products of gradients."""
    later = prepare_rows(net, rows, objective)
    result: dict[str, Any] = {"rows": len(later.t), **measure_conflict(net, later, objective), "bins": []}
    index = ((later.t - later.r) * bins).ceil().long().clamp(1, bins) - 1
    for number in range(bins):
        chosen = (index == number).nonzero().flatten()
        entry: dict[str, Any] = {"rows": len(chosen)}
        if len(chosen):  # products of the whole network; groups within bins would be too much to look at
            measured = measure_conflict(net, later.take(chosen), objective)
            entry["losses"] = measured["losses"]
            entry["products"] = {name: sum(groups.values()) for name, groups in measured["products"].items()}
        result["bins"].append(entry)
    return result


def prepare_rows(net: nn.Module, rows: Rows, objective: Objective) -> Later:
    """Compute ṽ and du⁻/dt of the rows, without gradient; ties count as r = t in training and are left out."""
    assert rows.n_equal == 0, rows.n_equal
    z_t, v_guided, along, y = moving_rows(net, rows, objective)
    with torch.no_grad(), precision(rows.x, objective):
        _, du = net(z_t, rows.t, rows.r, y, tangent=along, first=0, guide=rows.guide)
    later = Later(z_t, v_guided, rows.t, rows.r, y, du.to(z_t.dtype), rows.guide)
    return later.take((~is_tie(rows.t, rows.r)).nonzero().flatten())


def measure_conflict(net: nn.Module, later: Later, objective: Objective) -> Measurement:
    """Compute the losses and their gradients on the same rows, at most two gradients held at a time."""
    l_tfm, tfm = gradient_of(net, later, objective, "tfm")
    l_tc, tc = gradient_of(net, later, objective, "tc")
    dots = {"tfm.tfm": products(tfm, tfm), "tc.tc": products(tc, tc), "tfm.tc": products(tfm, tc)}
    del tfm
    l_fm, fm = gradient_of(net, later, objective, "fm")
    dots |= {"fm.fm": products(fm, fm), "tc.fm": products(tc, fm)}
    del tc
    dots["tfm.fm"] = products(gradient_of(net, later, objective, "tfm")[1], fm)
    losses = {"tfm": l_tfm, "tc": l_tc, "fm": l_fm}
    return {"losses": losses, "products": {name: grouped(values) for name, values in dots.items()}}


def gradient_of(net: nn.Module, later: Later, objective: Objective, term: str) -> tuple[float, Gradient]:
    """Compute one of the three losses, by its short name, and its gradient."""
    return _gradient(net, lambda: _loss(net, later, objective, term=term))


def _loss(net: nn.Module, later: Later, objective: Objective, *, term: str) -> Tensor:
    r = later.t if term == "fm" else later.r
    with precision(later.z_t, objective):
        u = net(later.z_t, later.t, r, later.y, guide=later.guide)
    u = u.to(later.z_t.dtype)
    if term == "tc":
        return consistency_loss(u, later.du, later.t, later.r)
    return trajectory_loss(u, later.v_guided)


def _gradient(net: nn.Module, loss: Callable[[], Tensor]) -> tuple[float, Gradient]:
    """A loss and its gradient by parameter's name; the parameters' `.grad` is left alone."""
    named = {name: weight for name, weight in net.named_parameters() if weight.requires_grad}
    value = loss()
    grads = torch.autograd.grad(value, list(named.values()), materialize_grads=True)
    return float(value.detach()), dict(zip(named, grads, strict=True))


def group_of(name: str) -> str:
    """The group of a tensor: `blocks.3.attn.qkv.weight` → `blocks.3`; `final.linear.weight` → `final`."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] in ("blocks", "velocity_blocks") else parts[0]


def grouped(values: dict[str, float]) -> dict[str, float]:
    """Sum values over the tensors of each group; groups keep the network's order."""
    parts = groupby(values.items(), key=lambda item: group_of(item[0]))
    return {group: sum(value for _, value in items) for group, items in parts}


def sizes_over_alpha(
    net: nn.Module, rows: Rows, objective: Objective, alphas: Sequence[float]
) -> dict[str, list[dict[str, float | None]]]:
    """Per kind of loss weight and per α: the gradient's size against that at α = 0, and the cosine between the two."""
    return {kind: list(_sizes(net, rows, _weighted(objective, kind), alphas)) for kind in LOSS_WEIGHTS}


def _sizes(
    net: nn.Module, rows: Rows, objective: Objective, alphas: Sequence[float]
) -> Iterator[dict[str, float | None]]:
    def loss(alpha: float) -> Tensor:
        result = training_step(net, net, rows, alpha=alpha, objective=objective)
        return (result.loss - result.head_loss) / len(rows.t)  # the head's is the same at every α

    def gradient(alpha: float) -> Gradient:
        return _gradient(net, lambda: loss(alpha))[1]

    mean_flow = gradient(0.0)
    length = _dot(mean_flow, mean_flow) ** 0.5
    for alpha in alphas:
        here = gradient(alpha) if alpha else mean_flow
        size = _dot(here, here) ** 0.5
        both = size * length
        yield {
            "alpha": alpha,
            "size": size / length if length > 0 else None,
            "cosine": _dot(here, mean_flow) / both if both > 0 else None,
        }


def _weighted(objective: Objective, kind: Literal["adaptive", "converging"]) -> Objective:
    """The recipe's objective with this loss weight, its target taken as α-Flow takes it."""
    loss: Loss = replace(objective.loss, weight=kind, velocity="data")
    return replace(objective, loss=loss)


def _dot(a: Gradient, b: Gradient) -> float:
    return sum(products(a, b).values())


def is_due(run: Run) -> bool:
    """Whether this row of the journal is the first at or after a multiple of `train.conflict_every`."""
    every, log_every = run.recipe.train.conflict_every, max(1, run.recipe.train.log_every)
    return every > 0 and run.step % every < log_every


def measure(run: Run) -> dict[str, Any]:
    """`cos_tfm_tc`, …, `norm_tfm`, … of one micro-batch, as the journal has them; empty but on the main process.

    `rows` counts the rows measured: times that never differ leave none, and then there is no cosine and no norm.
    """
    if not run.world.is_main:
        return {}
    began = time.monotonic()
    batch = run.stream.batch_at(run.step, run.split.rows(0, 0))
    rows = conflict_rows(run.recipe, batch.latents, batch.y, seed=run.seed, index=run.step)
    later = prepare_rows(run.net, rows, run.objective)
    if not len(later.t):
        return {"rows": 0, "seconds": round(time.monotonic() - began, 3)}
    measured = measure_conflict(run.net, later, run.objective)
    products = {name: list(groups.values()) for name, groups in measured["products"].items()}
    values: dict[str, Any] = {"rows": len(later.t)}
    for a, b in PAIRS:
        values[f"cos_{a}_{b}"] = cosine(products[f"{a}.{b}"], products[f"{a}.{a}"], products[f"{b}.{b}"])
    values |= {f"norm_{name}": sum(products[f"{name}.{name}"]) ** 0.5 for name in TERMS}
    return values | {"seconds": round(time.monotonic() - began, 3)}
