"""The parts of the DiT: embeddings of time and of patches, attention, modulation.

Each takes a plain value, or a `Dual`: a value with its derivative (nn/tangent.py). Where a line carries both, the plain
operation stands above it.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alphaflow_cli.nn.tangent import Dual, PlainOrDual, attention, cut, each, last, through

FREQUENCIES = 128


def frequencies(like: Tensor) -> Tensor:
    """The angular frequencies f_k = 10000^(−k/128) of the time features, k < 128, in the precision of `like`."""
    k = torch.arange(FREQUENCIES, dtype=like.dtype, device=like.device)
    return torch.exp(k * (-math.log(10000.0) / FREQUENCIES))


def time_features(s: Tensor) -> Tensor:
    """(B,) → (B, 256): [cos(s f_k), sin(s f_k)], in the precision of s. Raw times in [0, 1], no ×1000."""
    angles = s[:, None] * frequencies(s)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def time_features_speed(s: Tensor) -> Tensor:
    """d/ds of the features: [−f_k sin(s f_k), f_k cos(s f_k)]."""
    f = frequencies(s)
    angles = s[:, None] * f
    return torch.cat([-f * angles.sin(), f * angles.cos()], dim=1)


class TimeEmbedding(nn.Module):
    """Linear(256, D) → SiLU → Linear(D, D) of the time's features."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, s: PlainOrDual) -> PlainOrDual:
        # The features of a time go through a small MLP.   out = mlp(time_features(s))
        if isinstance(s, Tensor):
            return through(self.mlp, time_features(s))
        speed = s.tangent[:, None] * time_features_speed(last(s))
        return through(self.mlp, Dual(time_features(s.value), speed))


class PatchEmbed(nn.Module):
    """(B, C, H, W) → (B, N, D): each patch of P × P through one linear layer.

    `proj` holds the parameters, and starts them, as the convolution that this computes; it is never called, because on
    a GPU a convolution's gradient differs from call to call, and with it two equal runs.
    """

    def __init__(self, size: int, patch: int, channels: int, dim: int) -> None:
        super().__init__()
        self.size, self.patch = size, patch
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, z: PlainOrDual) -> PlainOrDual:
        # Each patch, read out in one row, goes through one linear layer.   out = linear(cut(z))
        value, weight = z if isinstance(z, Tensor) else z.value, self.proj.weight.flatten(1)
        out = F.linear(self.cut(value), weight, self.proj.bias)
        if isinstance(z, Tensor):
            return out
        with torch.no_grad():
            return Dual(out, F.linear(self.cut(z.tangent), weight).to(weight.dtype))

    def cut(self, z: Tensor) -> Tensor:
        """Cut z (B, C, H, W) into rows (B, N, C·P·P), each in the order of the convolution's weight."""
        rows, channels, height, width = z.shape
        assert height == width == self.size, (tuple(z.shape), self.size)
        grid, patch = self.size // self.patch, self.patch
        places = z.reshape(rows, channels, grid, patch, grid, patch)
        return places.permute(0, 2, 4, 1, 3, 5).reshape(rows, grid * grid, channels * patch * patch)


class Attention(nn.Module):
    """Self-attention with biased q, k, v. Every call says which kernel it wants: "fused" or "math"."""

    def __init__(self, dim: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x: PlainOrDual, attend: str) -> PlainOrDual:
        # Queries, keys and values come from one linear layer.   q, k, v = split(qkv(x))
        q, k, v = cut(lambda a: split_heads(a, self.heads), through(self.qkv, x))  # (B, heads, N, D / heads)
        # Every token takes the average of the values, weighted by how well its query fits their keys.
        #   out = proj(softmax(q_norm(q) k_norm(k)ᵀ / √d) v)
        out = attention(through(self.q_norm, q), through(self.k_norm, k), v, attend)
        return through(self.proj, each(lambda a: a.transpose(1, 2).flatten(2), out))


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Split (B, N, 3 D) into queries, keys and values, each (B, heads, N, D / heads)."""
    rows, tokens, width = qkv.shape
    parts = qkv.view(rows, tokens, 3, heads, width // 3 // heads).unbind(2)
    # cut, then turned: the other way round the backward pass would copy all of their gradients once more
    return tuple(part.transpose(1, 2) for part in parts)


class Mlp(nn.Module):
    """Two linear layers with a GELU between. (To import timm's takes 2 s per start.)"""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: PlainOrDual) -> PlainOrDual:
        # Each token on its own.   out = fc2(gelu(fc1(x)))
        return through(self.fc2, through(self.act, through(self.fc1, x)))


class Modulation(nn.Module):
    """One linear layer makes the shifts, scales and gates of a block from the conditioning: `parts` of (B, 1, D)."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(dim, parts * dim)

    def forward(self, c: PlainOrDual) -> tuple[PlainOrDual, ...]:
        # All parts come from one linear layer.   shift, scale, … = linear(c).chunk(parts)
        return cut(lambda a: a.unsqueeze(1).chunk(self.parts, dim=2), through(self.linear, c))


def position_table(dim: int, grid: int) -> Tensor:
    """The positional table's start, (1, grid², dim) float32 sines and cosines.

    The first half of the channels tells the column, the second half the row.
    """
    place = torch.arange(grid, dtype=torch.float64)
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = place[:, None] * omega  # (grid, dim / 4)
    one = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, dim / 2)
    column, row = one[None, :, :].expand(grid, grid, -1), one[:, None, :].expand(grid, grid, -1)
    return torch.cat([column, row], dim=2).reshape(1, grid * grid, dim).float()
