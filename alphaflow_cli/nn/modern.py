"""The parts of the modern block, which improved MeanFlow is built of (arXiv:2512.02012): no biases, no table.

    RMSNorm         x / √(mean x² + 1e-6), times a learned vector where nothing else scales it
    attention       RMSNorm on every query and key over the d channels of its head; then each is turned by its place
    turning (RoPE)  channels 2j, 2j + 1 of the token at place p are a point in the plane, turned by the angle
                    p · 10000^(−2j/d); so a product of query and key depends on how far apart their tokens are
    SwiGLU          W₂ (silu(a) ∘ b) with a, b = W₁ x, one layer of twice the width

Places count all tokens: the prefix first where there is one, then the patches row by row. Turning is linear, so a
tangent is turned as its value is. The rules of the others are in nn/tangent.py.
"""

import torch
from torch import Tensor, nn

from alphaflow_cli.nn.layers import split_heads
from alphaflow_cli.nn.tangent import PlainOrDual, attention, cut, each, silu_gated, through

NORM_FLOOR = 1e-6
SPREAD = 0.32  # of the block's linear layers: N(0, (SPREAD / √inputs)²)


def turns(tokens: int, size: int, like: Tensor) -> Tensor:
    """The cosines and sines of every place's angles: (2, tokens, size / 2), in the precision of `like`."""
    place = torch.arange(tokens, dtype=torch.float64, device=like.device)
    speed = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64, device=like.device) / size)
    angles = place[:, None] * speed
    return torch.stack([angles.cos(), angles.sin()]).to(like.dtype)


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """(B, heads, N, d), each pair of neighbouring channels turned by the angle of its token's place."""
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    cos, sin = turn.unbind(0)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class ModernAttention(nn.Module):
    """Self-attention without biases; queries and keys are normalised, then turned by their places."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.q_norm = nn.RMSNorm(dim // heads, eps=NORM_FLOOR)
        self.k_norm = nn.RMSNorm(dim // heads, eps=NORM_FLOOR)

    def forward(self, x: PlainOrDual, attend: str, turn: Tensor) -> PlainOrDual:
        # Queries, keys and values come from one linear layer.   q, k, v = split(qkv(x))
        q, k, v = cut(lambda a: split_heads(a, self.heads), through(self.qkv, x))  # (B, heads, N, D / heads)
        q, k = self._placed(self.q_norm, q, turn), self._placed(self.k_norm, k, turn)
        # Every token takes the average of the values, weighted by how well its query fits their keys.
        #   out = proj(softmax(turned(q_norm(q)) turned(k_norm(k))ᵀ / √d) v)
        return through(self.proj, each(lambda a: a.transpose(1, 2).flatten(2), attention(q, k, v, attend)))

    def _placed(self, norm: nn.RMSNorm, x: PlainOrDual, turn: Tensor) -> PlainOrDual:
        """turned(norm(x)), computed in the precision of the weights and given back in that of x."""
        given = (x if isinstance(x, Tensor) else x.value).dtype
        wide = through(norm, each(lambda a: a.to(norm.weight.dtype), x))
        return each(lambda a: turned(a, turn).to(given), wide)


class SwiGlu(nn.Module):
    """Two linear layers without biases; the first makes values and the gates that they are multiplied with."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden, bias=False)  # the gates' rows, then the values'
        self.fc2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: PlainOrDual) -> PlainOrDual:
        # Each token on its own.   a, b = fc1(x).chunk(2); out = fc2(silu(a) * b)
        return through(self.fc2, silu_gated(through(self.fc1, x)))
