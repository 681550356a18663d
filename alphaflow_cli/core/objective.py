"""The objective: from times and velocities to a target, from a target to a loss (method section 1).

    s = t − α (t − r),   z_s = z_t − (t − s) ṽ
    flow        r = t      target = ṽ
    trajectory  α = 1      target = ṽ                                        (trajectory flow matching)
    between     0 < α < 1  target = α ṽ + (1 − α) u⁻(z_s, r, s)              (arXiv:2510.20771, Algorithm 1)
    shortcut    0 < α < 1  the same with ṽ = u⁻(z_t, s, t)                   (α = ½: the Shortcut Model, twice its loss)
    mean        α = 0      target = ṽ − (t − r) du⁻/dt along (dz, dr, dt) = (ṽ, 0, 1)   (MeanFlow)

u⁻ is the online network without gradient. A `net` here is any callable (z, t, r, y) → u: pass the BARE network.
Rows never mix: target i depends on row i alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaflow_cli.core.path import Net, expand, step_back


def intermediate_time(t: Tensor, r: Tensor, alpha: float) -> Tensor:
    """s = t − α (t − r), the time between r and t that α chooses."""
    return t - alpha * (t - r)


def is_tie(t: Tensor, r: Tensor) -> Tensor:
    """Which rows have r = t up to rounding, |t − r| ≤ 1e-8 + 1e-5 t: (B,) bool. Their MeanFlow target is ṽ itself."""
    return (t - r).abs() <= 1e-8 + 1e-5 * t.abs()


def mean_target(v_guided: Tensor, du: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The MeanFlow target ṽ − (t − r) du/dt; on ties it is ṽ."""
    target = v_guided - expand(t - r, v_guided) * du
    return torch.where(expand(is_tie(t, r), target), v_guided, target)


def mix_target(v_guided: Tensor, u_s: Tensor, alpha: float) -> Tensor:
    """The target α ṽ + (1 − α) u⁻(z_s, r, s): stable where (dt·ṽ + (s − r)·u)/(t − r) is not."""
    return alpha * v_guided + (1.0 - alpha) * u_s


@torch.no_grad()
def between_target(net: Net, z_t: Tensor, v_guided: Tensor, *, t: Tensor, r: Tensor, y: Tensor, alpha: float) -> Tensor:
    """The target for 0 < α < 1 with ṽ from the data: one network call, at (z_s, r, s)."""
    s = intermediate_time(t, r, alpha)
    u_s = net(step_back(z_t, v_guided, t, s), s, r, y)
    return mix_target(v_guided, u_s.to(v_guided.dtype), alpha)


@torch.no_grad()
def shortcut_target(
    net: Net, z_t: Tensor, v_guided: Tensor, *, t: Tensor, r: Tensor, y: Tensor, alpha: float
) -> Tensor:
    """The target for 0 < α < 1 with ṽ = u⁻(z_t, s, t): the first part of the step is the network's own."""
    s = intermediate_time(t, r, alpha)
    return between_target(net, z_t, net(z_t, t, s, y).to(v_guided.dtype), t=t, r=r, y=y, alpha=alpha)


def jvp_derivative(net: Net, z_t: Tensor, v_guided: Tensor, *, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
    """du/dt along (dz, dr, dt) = (ṽ, 0, 1) by forward-mode differentiation, which needs math attention.

    It is the reference for the tangents of nn/tangent.py.
    """
    with torch.no_grad():
        moving = (z_t.clone(), t.clone())
        along = (v_guided.clone(), torch.ones_like(t))
        du: Tensor = torch.func.jvp(lambda z, now: net(z, now, r, y), moving, along)[1]
    return du.detach()


def clamp_target(target: Tensor, n_equal: int, *, bound: float, alpha: float) -> Tensor:
    """Clip the targets of r < t rows to ±bound while 0 < α ≤ 1; never r = t rows, never at α = 0. 0: no bound."""
    if bound == 0.0 or alpha == 0.0:
        return target
    return torch.cat([target[:n_equal], target[n_equal:].clamp(-bound, bound)])


def squared_error(u: Tensor, target: Tensor, reduction: str) -> Tensor:
    """The mean or sum of (u − target)² over C·H·W: l, (B,)."""
    return REDUCTIONS[reduction]((u - target).square().flatten(1))


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"mean": lambda e: e.mean(1), "sum": lambda e: e.sum(1)}


def adaptive_weight(error: Tensor, ratio: Tensor, c: float) -> Tensor:
    """a / (l + c), as published. On r < t rows its gradient fades as α → 0, and jumps back at α = 0."""
    return ratio / (error + c)


def converging_weight(error: Tensor, ratio: Tensor, c: float) -> Tensor:
    """α / (l + α² c): since l ≈ α² l_MeanFlow, the gradient tends to MeanFlow's, 2 Δ / (l_MeanFlow + c), as α → 0."""
    return ratio / (error + ratio.square() * c)


def no_weight(error: Tensor, ratio: Tensor, c: float) -> Tensor:
    """1 / α, which gives the bare objective of the paper's equation 1."""
    return 1.0 / ratio


WEIGHTS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "adaptive": adaptive_weight,
    "converging": converging_weight,
    "none": no_weight,
}


def loss_weight(error: Tensor, n_equal: int, *, alpha: float, kind: str, c: float) -> Tensor:
    """The rows' weights, (B,) without gradient; the ratio a is α on r < t rows while α > 0, else 1."""
    ratio = torch.ones_like(error)
    if alpha > 0.0:
        ratio[n_equal:] = alpha
    return WEIGHTS[kind](error.detach(), ratio, c)


@dataclass(frozen=True)
class Terms:
    """What is logged of each row, (B,) and without gradient: none of it is weighted."""

    error: Tensor  # l, mean over C·H·W
    trajectory: Tensor  # L_TFM: mean (u − ṽ)²; on r = t rows the velocity loss
    consistency: Tensor  # L_TC: mean 2 (ṽ − target) · u


@torch.no_grad()
def loss_terms(u: Tensor, target: Tensor, v_guided: Tensor) -> Terms:
    """The two halves of the loss, row by row: L_MF = L_TFM + L_TC + C."""
    return Terms(
        error=squared_error(u, target, "mean"),
        trajectory=squared_error(u, v_guided, "mean"),
        consistency=(2.0 * (v_guided - target) * u).flatten(1).mean(1),
    )


def interval_bins(t: Tensor, r: Tensor, values: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """(sums, counts) of `values` per equal bin of t − r in (0, 1]; r = t rows are left out.

    A sum over all rows for each bin: `index_add` adds in another order at every call on a GPU.
    """
    interval = t - r
    index = (interval * bins).ceil().long().clamp(1, bins) - 1
    inside = (index[:, None] == torch.arange(bins, device=t.device)) & (interval > 0)[:, None]  # (B, bins)
    return torch.where(inside, values[:, None], 0.0).sum(0), inside.sum(0).to(values.dtype)
