"""The objective: from times and velocities to a target, from a target to a loss (docs/method.md).

    s = t − α (t − r),   z_s = z_t − (t − s) ṽ
    flow        r = t      target = ṽ
    trajectory  α = 1      target = ṽ                                        (trajectory flow matching)
    between     0 < α < 1  target = α ṽ + (1 − α) u⁻(z_s, r, s)              (arXiv:2510.20771, Algorithm 1)
    shortcut    0 < α < 1  the same with ṽ = u⁻(z_t, s, t)                   (α = ½: the Shortcut Model, twice its loss)
    mean        α = 0      target = ṽ − (t − r) du⁻/dt along (dz, dr, dt) = (ṽ, 0, 1)   (MeanFlow)

Where times keep a gap g, s stays as far from t: each row has its own α, the larger of the schedule's and g / (t − r).

z moves along ṽ: in du/dt, and from z_t to z_s. With improved MeanFlow's boundary tangent it moves along the network's
own velocity u⁻(z_t, t, t) instead, and all else stays.

u⁻ is the online network without gradient. A `net` here is any callable (z, t, r, y) → u: pass the BARE network.
Rows never mix: target i depends on row i alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaflow_cli.core.path import Net, expand, per_row, step_back

Ratio = float | Tensor  # α: one for all rows, or one per row, (B,)


def row_alpha(alpha: float, t: Tensor, r: Tensor, gap: float) -> Ratio:
    """α of each row, max(α, gap / (t − r)) and at most 1, so that s ≤ t − gap; without a gap α itself."""
    return alpha if gap == 0.0 or alpha == 0.0 else (gap / (t - r)).clamp(min=alpha, max=1.0)


def intermediate_time(t: Tensor, r: Tensor, alpha: Ratio) -> Tensor:
    """s = t − α (t − r), the time between r and t that α chooses."""
    return t - alpha * (t - r)


def is_tie(t: Tensor, r: Tensor) -> Tensor:
    """Which rows have r = t up to rounding, |t − r| ≤ 1e-8 + 1e-5 t: (B,) bool. Their MeanFlow target is ṽ itself."""
    return (t - r).abs() <= 1e-8 + 1e-5 * t.abs()


def mean_target(v_guided: Tensor, du: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The MeanFlow target ṽ − (t − r) du/dt; on ties it is ṽ."""
    target = v_guided - expand(t - r, v_guided) * du
    return torch.where(expand(is_tie(t, r), target), v_guided, target)


def mix_target(v_guided: Tensor, u_s: Tensor, alpha: Ratio) -> Tensor:
    """The target α ṽ + (1 − α) u⁻(z_s, r, s): stable where (dt·ṽ + (s − r)·u)/(t − r) is not."""
    alpha = per_row(alpha, v_guided)
    return alpha * v_guided + (1.0 - alpha) * u_s


@torch.no_grad()
def between_target(
    net: Net, z_t: Tensor, v_guided: Tensor, along: Tensor, *, t: Tensor, r: Tensor, y: Tensor, alpha: Ratio
) -> Tensor:
    """The target for 0 < α < 1: one network call, at (z_s, r, s) with z_s = z_t − (t − s) along; usually along ṽ."""
    s = intermediate_time(t, r, alpha)
    u_s = net(step_back(z_t, along, t, s), s, r, y)
    return mix_target(v_guided, u_s.to(v_guided.dtype), alpha)


@torch.no_grad()
def shortcut_target(
    net: Net, z_t: Tensor, v_guided: Tensor, *, t: Tensor, r: Tensor, y: Tensor, alpha: Ratio
) -> Tensor:
    """The target for 0 < α < 1 with ṽ = u⁻(z_t, s, t): the first part of the step is the network's own."""
    s = intermediate_time(t, r, alpha)
    own = net(z_t, t, s, y).to(v_guided.dtype)
    return between_target(net, z_t, own, own, t=t, r=r, y=y, alpha=alpha)


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


def adaptive_weight(error: Tensor, ratio: Tensor, c: float, power: float) -> Tensor:
    """a / (l + c)^p, as published (p = 1). On r < t rows its gradient fades as α → 0, and jumps back at α = 0."""
    return ratio / (error + c) ** power


def converging_weight(error: Tensor, ratio: Tensor, c: float, power: float) -> Tensor:
    """α^(2p−1) / (l + α² c)^p: since l ≈ α² l_MeanFlow, the gradient tends to MeanFlow's with weight adaptive."""
    return ratio ** (2.0 * power - 1.0) / (error + ratio.square() * c) ** power


def no_weight(error: Tensor, ratio: Tensor, c: float, power: float) -> Tensor:
    """1 / α, which gives the bare objective of the paper's equation 1."""
    return 1.0 / ratio


WEIGHTS: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "adaptive": adaptive_weight,
    "converging": converging_weight,
    "none": no_weight,
}


def loss_weight(
    error: Tensor, n_equal: int, *, alpha: Ratio, kind: str, c: float, power: float, later: float
) -> Tensor:
    """The rows' weights, (B,) without gradient; the ratio a is α on r < t rows while α > 0, else 1.

    `later` is a factor on the weights of r < t rows.
    """
    ratio = torch.ones_like(error)
    if isinstance(alpha, Tensor) or alpha > 0.0:
        ratio[n_equal:] = alpha
    weight = WEIGHTS[kind](error.detach(), ratio, c, power)
    if later != 1.0:
        weight[n_equal:] *= later
    return weight


def short_first(t: Tensor, r: Tensor, n_equal: int, *, progress: float, mean_interval: float) -> Tensor:
    """β = 1 − p + λ p (1 − (t − r)) with p = 1 − progress, λ = 1 / E[1 − (t − r)] on r < t rows, else 1: (B,).

    It lets short intervals count more at the start of a run, and all alike at its end; its mean over r < t rows is 1.
    """
    p = 1.0 - progress
    beta = 1.0 - p + p / (1.0 - mean_interval) * (1.0 - (t - r))
    return torch.where(torch.arange(len(t), device=t.device) < n_equal, 1.0, beta)


@dataclass(frozen=True)
class Terms:
    """What is logged of each row, (B,) and without gradient: none of it is weighted."""

    error: Tensor  # l, mean over C·H·W
    trajectory: Tensor  # L_TFM: mean (u − ṽ)²; on r = t rows the velocity loss
    consistency: Tensor  # L_TC: mean 2 (ṽ − target) · u
    head: Tensor | None  # mean (v̂ − ṽ)², of a network with a velocity head


@torch.no_grad()
def loss_terms(u: Tensor, target: Tensor, v_guided: Tensor, v_hat: Tensor | None = None) -> Terms:
    """The two halves of the loss, row by row: L_MF = L_TFM + L_TC + C; and the velocity head's, if there is one."""
    return Terms(
        error=squared_error(u, target, "mean"),
        trajectory=squared_error(u, v_guided, "mean"),
        consistency=(2.0 * (v_guided - target) * u).flatten(1).mean(1),
        head=None if v_hat is None else squared_error(v_hat, v_guided, "mean"),
    )


def interval_bins(t: Tensor, r: Tensor, values: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """(sums, counts) of `values` per equal bin of t − r in (0, 1]; r = t rows are left out.

    A sum over all rows for each bin: `index_add` adds in another order at every call on a GPU.
    """
    interval = t - r
    index = (interval * bins).ceil().long().clamp(1, bins) - 1
    inside = (index[:, None] == torch.arange(bins, device=t.device)) & (interval > 0)[:, None]  # (B, bins)
    return torch.where(inside, values[:, None], 0.0).sum(0), inside.sum(0).to(values.dtype)
