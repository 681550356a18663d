"""Velocity fields whose average velocity u(z, r, t) is known in closed form, as networks (z, t, r, y) → u.

Each maps z_t to z_r = flow(z_t, t, r) exactly, so that u = (z_t − z_r) / (t − r), written without the division.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from alphaflow_cli.core.path import expand


@dataclass(frozen=True)
class Decay:
    """dz/dt = −z: z_r = z_t e^(t − r), u = −z_t (e^(t − r) − 1) / (t − r)."""

    def __call__(self, z: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
        gap = t - r
        safe = torch.where(gap == 0, 1.0, gap)
        return -z * expand(torch.where(gap == 0, 1.0, torch.expm1(safe) / safe), z)

    def flow(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return z * expand(torch.exp(t - r), z)


@dataclass(frozen=True)
class Gaussian:
    """Data N(m, σ²) per pixel, noise N(0, 1), linear path: z_t ~ N((1 − t) m, S_t²), S_t² = (1 − t)² σ² + t².

    z_r − (1 − r) m = S_r / S_t (z_t − (1 − t) m), and (S_t − S_r) / (t − r) = (t + r − σ² (2 − t − r)) / (S_t + S_r).
    """

    mean: Tensor  # (C, H, W)
    std: Tensor  # (C, H, W)

    def spread(self, t: Tensor) -> Tensor:
        return (((1 - t) * self.std).square() + t.square()).sqrt()

    def __call__(self, z: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
        t, r = expand(t, z), expand(r, z)
        slope = (t + r - self.std.square() * (2 - t - r)) / (self.spread(t) + self.spread(r))
        return -self.mean + slope * (z - (1 - t) * self.mean) / self.spread(t)

    def flow(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        t, r = expand(t, z), expand(r, z)
        return (1 - r) * self.mean + self.spread(r) / self.spread(t) * (z - (1 - t) * self.mean)


@dataclass(frozen=True)
class Straight:
    """All data at one point m: v = (z − m) / t along straight lines, so u is v for every r. Not for t = 0."""

    point: Tensor  # (C, H, W)

    def __call__(self, z: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
        return (z - self.point) / expand(t, z)

    def flow(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return self.point + expand(r / t, z) * (z - self.point)


def gaussian(seed: int = 1) -> Gaussian:
    """A Gaussian with another mean and spread at every pixel."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    std = 0.3 + torch.rand(2, 3, 3, generator=generator, dtype=torch.float64)
    return Gaussian(mean, std)


def batch(rows: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, t > r, y of some rows, in float64."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, 2, 3, 3, generator=generator, dtype=torch.float64)
    times = 0.05 + 0.9 * torch.rand(2, rows, generator=generator, dtype=torch.float64)
    return z, times.max(0).values, times.min(0).values, torch.zeros(rows, dtype=torch.int64)
