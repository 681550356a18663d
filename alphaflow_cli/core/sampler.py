"""From noise to data on a grid of times τ_0 > τ_1 > … > τ_N = 0; τ_0 is 1, or a little below.

    trajectory   x ← x − (t − t') u(x, t', t)
    consistency  x̂ = x − t u(x, 0, t),  x ← (1 − t') x̂ + t' noise'     with fresh noise', one draw per step
    flow         x ← x − (t − t') u(x, t, t)                            plain Euler
    heun         the same with the average of both ends' velocities     two evaluations per step, one on the last

The state is float64; `net` casts to its own precision. Guidance here is for models trained without it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from alphaflow_cli.core.path import Net

FreshNoise = Callable[[], Tensor]  # one (B, C, h, w) float64 draw, each row from its own sample's generator


def time_grid(steps: int) -> list[float]:
    """The even grid of a number of steps, from 1 to 0: N/N, …, 1/N, 0."""
    return [(steps - i) / steps for i in range(steps + 1)]


def guided_net(net: Net, y_null: int, scale: float, *, channels: int | None) -> Net:
    """A network that guides at sampling: u_null + scale · (u_y − u_null), both halves in one call.

    Beyond the first `channels` (None: all are guided) it gives u_y itself.
    """

    def call(x: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
        both = torch.cat([y, torch.full_like(y, y_null)])
        u_both, rows = net(x.repeat(2, 1, 1, 1), t.repeat(2), r.repeat(2), both), x.shape[0]
        u_y, u_null = u_both[:rows], u_both[rows:]
        u = u_null + scale * (u_y - u_null)
        return u if channels is None else torch.cat([u[:, :channels], u_y[:, channels:]], dim=1)

    return call


@dataclass(frozen=True)
class SamplerStep:
    """One step of a sampler, from time `t` to time `to`, for a whole batch."""

    net: Net
    y: Tensor
    t: float
    to: float
    fresh_noise: FreshNoise

    def u(self, x: Tensor, t: float, r: float) -> Tensor:
        """The network's u(x, r, t), in the precision of the state x."""
        rows = (x.shape[0],)  # not len(x): of an exported graph the number of rows stays open
        t_rows, r_rows = x.new_full(rows, t), x.new_full(rows, r)
        return self.net(x, t_rows, r_rows, self.y).to(x.dtype)


def trajectory_step(x: Tensor, step: SamplerStep) -> Tensor:
    """Step along the average velocity: x − (t − t') u(x, t', t)."""
    return x - (step.t - step.to) * step.u(x, step.t, step.to)


def consistency_step(x: Tensor, step: SamplerStep) -> Tensor:
    """Jump to the data, then add fresh noise of the next level."""
    x_hat = x - step.t * step.u(x, step.t, 0.0)
    noise = step.fresh_noise()
    return (1.0 - step.to) * x_hat + step.to * noise


def flow_step(x: Tensor, step: SamplerStep) -> Tensor:
    """Euler's step along the velocity at t: x − (t − t') u(x, t, t)."""
    return x - (step.t - step.to) * step.u(x, step.t, step.t)


def heun_step(x: Tensor, step: SamplerStep) -> Tensor:
    """The trapezoid rule on u(x, t, t), the average of both ends' velocities; Euler's step where it ends at 0."""
    v = step.u(x, step.t, step.t)
    end = x - (step.t - step.to) * v
    if step.to == 0.0:
        return end
    return x - (step.t - step.to) * 0.5 * (v + step.u(end, step.to, step.to))


STEPS: dict[str, Callable[[Tensor, SamplerStep], Tensor]] = {
    "trajectory": trajectory_step,
    "consistency": consistency_step,
    "flow": flow_step,
    "heun": heun_step,
}


@torch.no_grad()
def sample(
    net: Net, noise: Tensor, y: Tensor, *, grid: Sequence[float], sampler: str, fresh_noise: FreshNoise
) -> Tensor:
    """Walk the grid from noise (B, C, h, w) to data, in float64."""
    x = noise.double()
    for t, to in pairwise(grid):
        x = STEPS[sampler](x, SamplerStep(net, y, t, to, fresh_noise))
    return x


def grid_evaluations(sampler: str, steps: int) -> int:
    """How often a walk of `steps` steps evaluates the network, per image."""
    return 2 * steps - 1 if sampler == "heun" else steps
