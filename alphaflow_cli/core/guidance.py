"""Label dropout and guided velocity, two visible steps (method section 3).

Both act strictly inside t_min < t < t_max. With probability `dropout` the label becomes y_null, for the target and
the prediction both. Then

    ṽ = ω v + κ u⁻(z_t, t, t | y) + (1 − ω − κ) u⁻(z_t, t, t | ∅)     inside,     ṽ = v outside.

The effective guidance scale is ω / (1 − κ). It is baked into the weights.
"""

import torch
from torch import Tensor

from alphaflow_cli.core.path import expand


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
) -> tuple[Tensor, Tensor]:
    """Which rows need a call of the network of their own, (B,) bool each: for u⁻(z_t, t, t | y), for u⁻(z_t, t, t |
    ∅).

    An r = t row (the first `n_equal`) predicts the one that belongs to its label itself. An r < t row without label
    needs only one of the two, since they are the same. Outside the interval nothing is needed.
    """
    guided = inside(t, t_min, t_max)
    dropped, later = guided & (uniforms < dropout), torch.arange(len(t), device=t.device) >= n_equal
    null = guided & (later | ~dropped) if null_weight(omega, kappa) != 0.0 else torch.zeros_like(guided)
    own = guided & later & ~(dropped & null) if kappa != 0.0 else torch.zeros_like(guided)
    return own, null


def null_weight(omega: float, kappa: float) -> float:
    """1 − ω − κ, the weight of the null velocity in ṽ; rounding noise counts as zero."""
    rest = 1.0 - omega - kappa
    return 0.0 if abs(rest) < 1e-12 else rest


def guided_velocity(
    v: Tensor,
    u_y: Tensor | None,
    u_null: Tensor | None,
    t: Tensor,
    *,
    omega: float,
    kappa: float,
    t_min: float,
    t_max: float,
) -> Tensor:
    """ṽ, the velocity after guidance. `u_y` may be None where κ = 0, `u_null` where 1 − ω − κ = 0."""
    null = null_weight(omega, kappa)
    assert len(v) == 0 or ((u_y is not None or kappa == 0.0) and (u_null is not None or null == 0.0)), (kappa, null)
    v_guided = omega * v
    if u_y is not None and kappa != 0.0:
        v_guided = v_guided + kappa * u_y
    if u_null is not None and null != 0.0:
        v_guided = v_guided + null * u_null
    return torch.where(expand(inside(t, t_min, t_max), v), v_guided, v)
