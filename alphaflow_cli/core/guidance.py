"""Label dropout and guided velocity, two visible steps (method section 3).

Both act strictly inside t_min < t < t_max. With probability `dropout` the label becomes y_null, for the target and
the prediction both. Then

    ṽ = ω v + κ u⁻(z_t, t, t | y) + (1 − ω − κ) u⁻(z_t, t, t | ∅)     inside,     ṽ = v outside.

The effective guidance scale is ω / (1 − κ). It is baked into the weights.

Instead of ending at t_max, guidance may fade above a time T. It then acts at every t, and the null velocity's weight is
multiplied by d(t), while κ stays and ω takes up the rest:

    d(t) = 1 for t ≤ T,   above it 1 − exp(−k τ / (1 − τ)) with τ = (1 − t) / (1 − T), at most 1 − 1e-6

A row whose label is dropped learns the same mix of the two velocities without label, or plainly v.
"""

import torch
from torch import Tensor

from alphaflow_cli.core.path import expand, per_row


def inside(t: Tensor, t_min: float, t_max: float) -> Tensor:
    """Which rows have t_min < t < t_max, both strict: (B,) bool."""
    return (t > t_min) & (t < t_max)


def drop_labels(
    y: Tensor, t: Tensor, uniforms: Tensor, *, dropout: float, y_null: int, t_min: float, t_max: float
) -> Tensor:
    """Replace y by y_null where the row's uniform is below `dropout` and t is inside the interval."""
    dropped = (uniforms < dropout) & inside(t, t_min, t_max)
    return torch.where(dropped, y_null, y)


def rows_to_ask(
    t: Tensor,
    uniforms: Tensor,
    n_equal: int,
    *,
    omega: float,
    kappa: float,
    dropout: float,
    t_min: float,
    t_max: float,
    plain: bool,
    tangent: bool,
) -> tuple[Tensor, Tensor]:
    """Which rows need a call of the network of their own, (B,) bool each: for u⁻(z_t, t, t | y), for u⁻(z_t, t, t |
    ∅).

    An r = t row (the first `n_equal`) predicts the one that belongs to its label itself. An r < t row without label
    needs only one of the two, since they are the same. Outside the interval nothing is needed, nor for a row without
    label where such rows learn v (`plain`). Where the `tangent` is the network's, every r < t row needs the first.
    """
    guided = inside(t, t_min, t_max)
    dropped, later = guided & (uniforms < dropout), torch.arange(len(t), device=t.device) >= n_equal
    guided = guided & ~dropped if plain else guided
    null = guided & (later | ~dropped) if null_weight(omega, kappa) != 0.0 else torch.zeros_like(guided)
    own = (later if tangent else guided & later & (kappa != 0.0)) & ~(dropped & null)
    return own, null


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
    kappa: float,
    null: float | Tensor,
) -> Tensor:
    """ṽ, the velocity after guidance, on the rows where it `acts`; on the others v.

    ω and the null weight are numbers, or one per row. `u_y` may be None where κ = 0, `u_null` where the null weight is.
    """
    fades = isinstance(null, Tensor)
    assert len(v) == 0 or ((u_y is not None or kappa == 0.0) and (u_null is not None or (not fades and null == 0.0)))
    v_guided = per_row(omega, v) * v
    if u_y is not None and kappa != 0.0:
        v_guided = v_guided + kappa * u_y
    if u_null is not None and (fades or null != 0.0):
        v_guided = v_guided + per_row(null, v) * u_null
    return torch.where(expand(acts, v), v_guided, v)
