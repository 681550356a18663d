"""The same training step, computed the way the published system computes it. It is what bench_step.py compares with.

Written from the equations (docs/method.md) and from a description of that way; on OUR network, so that only the way of
computing differs:

    rows        found by boolean masks, written back by masks; the host waits for each of them
    guidance    one call for u(z, t, t | y) and one for u(z, t, t | ∅), each on every row inside (t_min, t_max)
    0 < α < 1   one call at (z_s, r, s)
    α = 0       du/dt by double backward: a graded forward, its gradient along a dummy, the gradient of that
    loss        one graded call on all rows

Gradients equal the fast step's to rounding (tests/test_step.py).
"""

import torch
from torch import Tensor, nn

from alphaflow_cli.train.step import Objective, Rows, precision


def reference_step(net: nn.Module, rows: Rows, *, alpha: float, objective: Objective) -> Tensor:
    """The weighted loss, summed over the rows."""
    t, r = rows.t, rows.r
    is_equal = torch.arange(len(t), device=t.device) < rows.n_equal
    z_t = (1 - cube(t)) * rows.x + cube(t) * rows.noise
    v = rows.noise - rows.x
    with precision(rows.x, objective):
        y = dropped_labels(rows, objective)
        v_guided = guided(net, z_t, v, t, y, objective)
        target = v_guided.clone()
        later = ~is_equal
        if later.any() and alpha < 1.0:
            part = (z_t[later], v_guided[later], t[later], r[later], y[later])
            target[later] = mean_flow(net, *part) if alpha == 0.0 else between(net, *part, alpha)
        if alpha > 0.0 and objective.loss.clamp > 0.0:
            target[later] = target[later].clamp(-objective.loss.clamp, objective.loss.clamp)
        u = net(z_t, t, r, y).to(v.dtype)
    error = (u - target.detach()).square().flatten(1)
    error = error.mean(1) if objective.loss.reduction == "mean" else error.sum(1)
    ratio = torch.ones_like(error)
    if alpha > 0.0:
        ratio[later] = alpha
    return (ratio / (error.detach() + objective.loss.c) * error).sum()


def cube(t: Tensor) -> Tensor:
    """(B,) → (B, 1, 1, 1)."""
    return t[:, None, None, None]


def dropped_labels(rows: Rows, objective: Objective) -> Tensor:
    """Labels with the null label where they are dropped, inside the interval only."""
    mix = objective.guidance
    y = rows.y.clone()
    inside = (rows.t > mix.t_min) & (rows.t < mix.t_max)
    drop = inside & (rows.uniforms < mix.label_dropout)
    if objective.has_labels and drop.any():
        y[drop] = objective.y_null
    return y


@torch.no_grad()
def guided(net: nn.Module, z_t: Tensor, v: Tensor, t: Tensor, y: Tensor, objective: Objective) -> Tensor:
    """ṽ, by separate calls on the rows inside the interval."""
    mix = objective.guidance
    inside = (t > mix.t_min) & (t < mix.t_max)
    if not objective.is_guided or not inside.any():
        return v
    z, now, label = z_t[inside], t[inside], y[inside]
    mixed = mix.omega * v[inside]
    if mix.kappa != 0.0:
        mixed = mixed + mix.kappa * net(z, now, now, label).to(v.dtype)
    rest = 1.0 - mix.omega - mix.kappa
    if abs(rest) > 1e-12:
        mixed = mixed + rest * net(z, now, now, torch.full_like(label, objective.y_null)).to(v.dtype)
    v_guided = v.clone()
    v_guided[inside] = mixed
    return v_guided


@torch.no_grad()
def between(net: nn.Module, z_t: Tensor, v: Tensor, t: Tensor, r: Tensor, y: Tensor, alpha: float) -> Tensor:
    """α ṽ + (1 − α) u(z_s, r, s)."""
    s = t - alpha * (t - r)
    z_s = z_t - cube(t - s) * v
    return alpha * v + (1.0 - alpha) * net(z_s, s, r, y).to(v.dtype)


def mean_flow(net: nn.Module, z_t: Tensor, v: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
    """ṽ − (t − r) du/dt; where r = t, ṽ."""
    du = double_backward(net, z_t, v, t, r, y)
    tie = torch.isclose(t, r, rtol=1e-5, atol=1e-8)
    return torch.where(cube(tie), v, v - cube(t - r) * du)


def double_backward(net: nn.Module, z_t: Tensor, v: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
    """du/dt along (ṽ, 1, 0): the gradient, in the dummy w, of the gradient of ⟨w, u⟩ along (ṽ, 1)."""
    with torch.enable_grad():
        z_t, t = z_t.detach().requires_grad_(), t.detach().requires_grad_()
        u = net(z_t, t, r, y, "math")  # fused attention has no second derivative
        w = torch.zeros_like(u, requires_grad=True)
        g_z, g_t = torch.autograd.grad(u, (z_t, t), w, create_graph=True)
        along = (g_z * v).sum() + g_t.sum()
        (du,) = torch.autograd.grad(along, w)
    return du.detach().to(v.dtype)
