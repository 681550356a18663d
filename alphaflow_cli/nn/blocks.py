"""What a DiT's tokens go through: its blocks, and the last layer; and the `Design`, which says of what they are made.

A block is wired in one way only: tokens, normalised, attend to each other; then each goes through an MLP. A design
chooses the parts, and what shifts, scales and gates them: modulations that the conditioning c makes (adaLN), or, where
the inputs stand before the patches as tokens, learned scales and gates. Shapes and `Dual`s: nn/dit.py.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from alphaflow_cli.nn.layers import Attention, Mlp, Modulation
from alphaflow_cli.nn.modern import NORM_FLOOR, ModernAttention, SwiGlu
from alphaflow_cli.nn.tangent import PlainOrDual, Stream, both, gated, modulate, through
from alphaflow_cli.nn.tokens import Gates


@dataclass(frozen=True)
class Design:
    """What a network has instead of parts of the published DiT, or beyond it; the defaults are that DiT."""

    block: Literal["dit", "modern"] = "dit"
    inputs: tuple[str, ...] = ()  # of guidance: "scale", "interval"
    prefix: tuple[int, ...] = ()  # tokens of each input: label, scale, low, high, time, as far as there; (): adaLN
    velocity_head: int | None = None  # blocks of v̂'s own; None: no such head


PUBLISHED = Design()


class Block(nn.Module):
    """One transformer block; the conditioning shifts, scales and gates its attention and its MLP (adaLN-zero)."""

    def __init__(self, dim: int, heads: int, hidden: int, *, qk_norm: bool, design: Design) -> None:
        super().__init__()
        modern = design.block == "modern"
        self.norm1 = token_norm(dim, design)
        self.attn = ModernAttention(dim, heads) if modern else Attention(dim, heads, qk_norm=qk_norm)
        self.norm2 = token_norm(dim, design)
        self.mlp = SwiGlu(dim, hidden) if modern else Mlp(dim, hidden)
        self.modulation = Gates(dim) if design.prefix else Modulation(dim, 6)

    def forward(self, x: Stream, c: Stream | None, *where: Any) -> Stream:
        return both(self.compute, x, c, *where)

    def compute(self, x: PlainOrDual, c: PlainOrDual | None, *where: Any) -> PlainOrDual:
        """The block's output for tokens (B, N, D) and conditioning (B, D); `where`: attend, and the places' turns."""
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(c)
        # The tokens, normalised and modulated, attend to each other; the gate says how much of it is added.
        #   x = x + gate * attn(norm1(x) * (1 + scale) + shift)
        x = gated(x, gate, self.attn(modulate(through(self.norm1, x), shift, scale), *where))
        # Each token, normalised and modulated, goes through the MLP; the gate says how much of it is added.
        #   x = x + gate2 * mlp(norm2(x) * (1 + scale2) + shift2)
        out: PlainOrDual = gated(x, gate2, self.mlp(modulate(through(self.norm2, x), shift2, scale2)))
        return out


class Final(nn.Module):
    """The last layer: tokens, normalised and modulated, become the P·P·C numbers of their patch."""

    def __init__(self, dim: int, out: int, *, design: Design) -> None:
        super().__init__()
        self.norm = token_norm(dim, design)
        self.linear = nn.Linear(dim, out)
        self.modulation = None if design.prefix else Modulation(dim, 2)

    def forward(self, x: Stream, c: Stream | None) -> Stream:
        return both(self.compute, x, c)

    def compute(self, x: PlainOrDual, c: PlainOrDual | None) -> PlainOrDual:
        """The patches (B, N, P·P·C) of tokens (B, N, D)."""
        shift, scale = self.modulation(c) if self.modulation else (None, None)
        # The tokens are normalised and modulated once more, then made into patches.
        #   out = linear(norm(x) * (1 + scale) + shift)
        out: PlainOrDual = through(self.linear, modulate(through(self.norm, x), shift, scale))
        return out


def token_norm(dim: int, design: Design) -> nn.Module:
    """The layer that normalises tokens; it has learned scales where no modulation scales them."""
    learned = bool(design.prefix)
    if design.block == "modern":
        return nn.RMSNorm(dim, eps=NORM_FLOOR, elementwise_affine=learned)
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=learned, bias=False)
