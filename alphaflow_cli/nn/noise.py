"""A DiT trained to predict the noise at DDPM's 1000 discrete times, read as a velocity on the straight path.

DDPM mixes √ᾱ_i x + √(1−ᾱ_i) noise with ᾱ_i = Π (1 − β_j), β from 1e-4 to 0.02; ours is z = (1−t) x + t noise. The two
are the same picture up to a factor where the ratio of noise to data agrees:

    t_i = √(1−ᾱ_i) / (√ᾱ_i + √(1−ᾱ_i)),    z_ddpm = z / n(t),    n(t) = √((1−t)² + t²)
    x̂ = (z − t ε̂) / (1−t)    ⇒    v = ε̂ − x̂ = (ε̂ − z) / (1−t)

The embedding of t is fed the index i(t), linear between two times t_i. Beyond t_999 = 0.9937 there is no index: i and
the factor 1/(1−t) keep their last value. Rows, channels and the riding tangent are those of nn/dit.py.

Near t_999 one float32 step of t is 1/1000 of an index, and an angle near 999 is off by 6e-5 in float32. So where
t is within rounding of a discrete time, the index is that whole number, and angles are taken in float64.
"""

import torch
from torch import Tensor

from alphaflow_cli.core.path import expand
from alphaflow_cli.nn.dit import DiT
from alphaflow_cli.nn.layers import TimeEmbedding, time_features, time_features_speed
from alphaflow_cli.nn.tangent import Dual, PlainOrDual, last, last_rows, through

DISCRETE_TIMES = 1000
BETAS = (1e-4, 0.02)  # the linear schedule of DDPM and DiT


def discrete_times(device: torch.device) -> Tensor:
    """The times t_i on our path that stand for DDPM's 1000 steps: (1000,) float64, rising."""
    beta = torch.linspace(*BETAS, DISCRETE_TIMES, dtype=torch.float64, device=device)
    kept = (1 - beta).cumprod(0)
    data, noise = kept.sqrt(), (1 - kept).sqrt()
    return noise / (data + noise)


def discrete_index(t: Tensor) -> tuple[Tensor, Tensor]:
    """The index i(t) that the embedding is fed, and di/dt: (B,) float64 each.

    i is a whole number where t is within rounding of a discrete time, and constant beyond the first and the last time.
    """
    times, at = discrete_times(t.device), t.double()
    below = (torch.searchsorted(times, at.detach().contiguous(), right=True) - 1).clamp(0, DISCRETE_TIMES - 2)
    width = times[below + 1] - times[below]
    index = below + (at - times[below]) / width
    off = (index.round() - index).detach()
    index = index + off * (off.abs() * width <= torch.finfo(t.dtype).eps * at.detach())
    inside = (index >= 0) & (index <= DISCRETE_TIMES - 1)
    return index.clamp(0, DISCRETE_TIMES - 1), inside / width


class DiscreteTimeEmbedding(TimeEmbedding):
    """The time embedding of a network that was trained on DDPM's indices: it is fed i(t) instead of t."""

    def forward(self, s: PlainOrDual) -> PlainOrDual:
        # The features of the index go through the MLP.   out = mlp(time_features(i(s)))
        if isinstance(s, Tensor):
            return through(self.mlp, time_features(discrete_index(s)[0]).to(s.dtype))
        index, rows = discrete_index(s.value)[0], len(s.tangent)
        speed = time_features_speed(last_rows(index, rows)) * (s.tangent * discrete_index(last(s))[1])[:, None]
        return through(self.mlp, Dual(time_features(index).to(s.value.dtype), speed.to(s.tangent.dtype)))


class NoiseDiT(DiT):
    """A DiT whose own output is the noise ε̂, read as u(z, r, t | y): at r = t that is the velocity v above."""

    def initialise(self) -> None:
        self.time_embed = DiscreteTimeEmbedding(self.patch_embed.proj.out_channels)
        super().initialise()

    def enter(self, z: Tensor, t: Tensor, tangent: Tensor | None) -> Tensor | Dual:
        """The input is scaled to DDPM's: z / n(t)."""
        scaled = z * _shrink(t, z)
        if tangent is None:
            return scaled
        rows = len(tangent)
        z_last, t_last = last_rows(z, rows), last_rows(t, rows)
        n = _shrink(t_last, z)
        inner = tangent * n + z_last * (1 - 2 * expand(t_last, z)) * n**3  # d(z n⁻¹), dn⁻¹/dt = (1 − 2t) n⁻³
        return Dual(scaled, inner)

    def read(self, out: Tensor | Dual, z: Tensor, t: Tensor, tangent: Tensor | None) -> Tensor | Dual:
        """The noise is made a velocity."""
        if isinstance(out, Tensor):
            return _velocity(out, z, t)
        assert tangent is not None
        rows = len(tangent)
        t_last = last_rows(t, rows)
        u, f = _velocity(out.value, z, t), _factor(t_last, z)
        grows = torch.where(expand(t_last, z) < _end(t), last_rows(u, rows) * f, 0.0)  # u d(log factor)/dt
        return Dual(u, (out.tangent - tangent) * f + grows.detach())


def _end(t: Tensor) -> Tensor:
    """The last discrete time, t_999: beyond it the network knows no index."""
    return discrete_times(t.device)[-1].to(t.dtype)


def _factor(t: Tensor, like: Tensor) -> Tensor:
    """1 / (1 − t), constant beyond the last discrete time, in the form that multiplies rows of `like`."""
    return expand(1 / (1 - torch.minimum(t, _end(t))), like)


def _shrink(t: Tensor, like: Tensor) -> Tensor:
    """1 / n(t), which makes our z DDPM's, in the form that multiplies rows of `like`."""
    return expand(((1 - t) ** 2 + t**2).rsqrt(), like)


def _velocity(noise: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """The velocity v = (ε̂ − z) / (1 − t) that belongs to a predicted noise."""
    return (noise - z) * _factor(t, z)
