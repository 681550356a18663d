"""Label dropout and guided velocity, two visible steps (docs/method.md, "Guidance").

Both act strictly inside t_min < t < t_max. With probability `dropout` the label becomes y_null, for the target and
the prediction both. Then

    ṽ = ω v + κ u⁻(z_t, t, t | y) + (1 − ω − κ) u⁻(z_t, t, t | ∅)     inside,     ṽ = v outside.

The effective guidance scale is ω / (1 − κ). It is baked into the weights.

Instead of ending at t_max, guidance may fade above a time T. It then acts at every t, and the null velocity's weight is
multiplied by d(t), while κ stays and ω takes up the rest:

    d(t) = 1 for t ≤ T,   above it 1 − exp(−k τ / (1 − τ)) with τ = (1 − t) / (1 − T), at most 1 − 1e-6

A row whose label is dropped learns the same mix of the two velocities without label, or plainly v.

Improved MeanFlow (arXiv:2512.02012) draws a scale w for each row, and tells it to the network as one more input:

    ṽ = v + (1 − 1/w) (u⁻(z_t, t, t | y, w) − u⁻(z_t, t, t | ∅, 1))     ω = 1, κ = 1 − 1/w, null weight −κ

w has the density w^−β on [1, most]. The interval may be drawn too, [U/2, ½ + U/2], and is told as well; then its ends
are inside, and r = t rows have [0, 1]. A row whose label is dropped learns v.
"""

import math

import torch
from torch import Tensor

from alphaflow_cli.core.path import expand, per_row


def inside(t: Tensor, t_min: float, t_max: float) -> Tensor:
    """Which rows have t_min < t < t_max, both strict: (B,) bool."""
    return (t > t_min) & (t < t_max)


def in_own_interval(t: Tensor, t_lo: Tensor, t_hi: Tensor) -> Tensor:
    """Which rows have t_lo ≤ t ≤ t_hi, the row's own interval with both ends: (B,) bool."""
    return (t >= t_lo) & (t <= t_hi)


def scales(uniforms: Tensor, *, most: float, beta: float) -> Tensor:
    """Guidance scales w in [1, most] with the density w^−β, one for each uniform."""
    whole = math.log(most)
    if beta == 1.0:
        return torch.exp(uniforms * whole)
    return torch.exp(torch.log1p(uniforms * math.expm1((1.0 - beta) * whole)) / (1.0 - beta))


def intervals(low: Tensor, high: Tensor, n_equal: int) -> tuple[Tensor, Tensor]:
    """(t_lo, t_hi) = (U/2, ½ + U'/2) of two uniforms each; the first `n_equal` rows have (0, 1)."""
    equal = torch.arange(len(low), device=low.device) < n_equal
    return torch.where(equal, 0.0, 0.5 * low), torch.where(equal, 1.0, 0.5 + 0.5 * high)


def only_equal_rows(uniforms: Tensor, n_equal: int) -> Tensor:
    """Turn the uniforms of label dropout into such as drop labels of r = t rows only, but as many in the mean.

    An r = t row is dropped where U · n_equal / B lies below the rate, so at rate · B / n_equal; the others never.
    """
    equal = torch.arange(len(uniforms), device=uniforms.device) < n_equal
    return torch.where(equal, uniforms * (n_equal / len(uniforms)), 1.0)


def dropped(t: Tensor, uniforms: Tensor, *, dropout: float, t_min: float, t_max: float) -> Tensor:
    """Which rows lose their label, (B,) bool: their uniform is below `dropout` and t is inside the interval."""
    return (uniforms < dropout) & inside(t, t_min, t_max)


def rows_to_ask(
    acts: Tensor, unlabelled: Tensor, n_equal: int, *, own: bool, null: bool, tangent: bool
) -> tuple[Tensor, Tensor]:
    """Which rows need a call of the network of their own, (B,) bool each: for u⁻(z_t, t, t | y), for u⁻(z_t, t, t |
    ∅).

    `own` and `null` say whether the two have a weight where guidance `acts`. An r = t row (the first `n_equal`)
    predicts the one that belongs to its label itself. An `unlabelled` r < t row, whose label was dropped, needs only
    one of the two, since they are the same. Where the `tangent` is the network's, every r < t row needs the first.
    """
    later = torch.arange(len(acts), device=acts.device) >= n_equal
    asks_null = acts & (later | ~unlabelled) & null
    asks_own = (later if tangent else acts & later & own) & ~(unlabelled & asks_null)
    return asks_own, asks_null


def null_weight(omega: float, kappa: float) -> float:
    """1 − ω − κ, the weight of the null velocity in ṽ; rounding noise counts as zero."""
    rest = 1.0 - omega - kappa
    return 0.0 if abs(rest) < 1e-12 else rest


def fade(t: Tensor, *, start: float, rate: float) -> Tensor:
    """d(t), what is left of guidance at time t where it fades above `start`: (B,), 1 … 0."""
    if start >= 1.0:
        return torch.ones_like(t)
    left = ((1.0 - t) / (1.0 - start)).clamp(max=1.0 - 1e-6)
    return torch.where(t <= start, 1.0, 1.0 - torch.exp(-rate * left / (1.0 - left)))


def faded_weights(fading: Tensor, *, omega: float, kappa: float) -> tuple[Tensor, Tensor]:
    """(ω, null weight) of each row: the null weight fades, κ stays, and ω is what is left of 1."""
    null = null_weight(omega, kappa) * fading
    return 1.0 - kappa - null, null


def guided_velocity(
    v: Tensor,
    u_y: Tensor | None,
    u_null: Tensor | None,
    acts: Tensor,
    *,
    omega: float | Tensor,
    kappa: float | Tensor,
    null: float | Tensor,
) -> Tensor:
    """ṽ, the velocity after guidance, on the rows where it `acts`; on the others v.

    Each weight is a number, or one per row. `u_y` may be None where κ = 0, `u_null` where the null weight is 0.
    """
    v_guided = per_row(omega, v) * v
    for u, weight in ((u_y, kappa), (u_null, null)):
        counts = isinstance(weight, Tensor) or weight != 0.0
        assert len(v) == 0 or u is not None or not counts, "a velocity that has a weight is missing"
        if u is not None and counts:
            v_guided = v_guided + per_row(weight, v) * u
    return torch.where(expand(acts, v), v_guided, v)
