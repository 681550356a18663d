"""The path from data to noise.

Time convention, stated once: t = 0 is data, t = 1 is noise; every time is a (B,) float tensor.

    z_t = (1 − t) x + t noise,     v = dz_t/dt = noise − x
    z_s = z_t − (t − s) v          (the paper's Algorithm 1; its Definition 1 prints a plus sign)
"""

from collections.abc import Callable

from torch import Tensor

Net = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # the bare network: (z, t, r, y) → u


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Reshape times (B,) to (B, 1, 1, 1), so that they multiply the rows of `like`."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


def per_row(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A number as it is; one number per row in the form that multiplies the rows of `like`."""
    return expand(value, like) if isinstance(value, Tensor) else value


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 − t) x + t noise, the point on the path at time t."""
    t = expand(t, x)
    return (1 - t) * x + t * noise


def velocity(x: Tensor, noise: Tensor) -> Tensor:
    """v = noise − x, the velocity of the path, the same at all times."""
    return noise - x


def step_back(z_t: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """z_s = z_t − (t − s) v, the point at the earlier time s ≤ t."""
    return z_t - expand(t - s, z_t) * v
