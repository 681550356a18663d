"""The DiT that predicts the average velocity u(z, r, t).

Shapes: B rows, C channels, H = W side of a latent, P side of a patch, N = (H/P)² tokens, D channels of a token.

    c = e(t) + e'(t − r) + label          conditioning, used by the adaLN modulations only
    tokens = patches(z) + table           → blocks → final → unpatchify; no output scaling

The second time embedder is fed the interval t − r (published) or r. The positional table is initialised to sines and
cosines and trained. Attention is "fused", or "math" where a derivative passes through (fused kernels have no
forward-mode derivative).

Given a `tangent` of z on the last rows, du/dt rides along through the same lines: there x and c are `Dual`s, a value
with its derivative. `through`, `add`, `modulate`, `gated`, … are the plain operations with a rule for such pairs. Given
other rows `beside`, each block computes them too, without gradient (both: nn/tangent.py). Above every such line stands
what it computes, as a DiT without tangents would write it.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from alphaflow_cli.nn.layers import Attention, Modulation, PatchEmbed, TimeEmbedding, position_table
from alphaflow_cli.nn.tangent import (
    Beside,
    Dual,
    Inputs,
    PlainOrDual,
    Stream,
    add,
    both,
    each,
    gated,
    modulate,
    moving,
    recomputed,
    through,
)

Attend = Literal["fused", "math"]


class Mlp(nn.Module):
    """Two linear layers with a GELU between; a block calls them one by one. (To import timm's takes 2 s per start.)"""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, dim)


class Block(nn.Module):
    """One transformer block; the conditioning shifts, scales and gates its attention and its MLP (adaLN-zero)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, *, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, heads, qk_norm=qk_norm)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.modulation = Modulation(dim, 6)

    def forward(self, x: Stream, c: Stream, attend: Attend) -> Stream:
        return both(self.compute, x, c, attend)

    def compute(self, x: PlainOrDual, c: PlainOrDual, attend: Attend) -> PlainOrDual:
        """The block's output for tokens (B, N, D) and conditioning (B, D)."""
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(c)
        # The tokens, normalised and modulated, attend to each other; the gate says how much of it is added.
        #   x = x + gate * attn(norm1(x) * (1 + scale) + shift)
        x = gated(x, gate, self.attn(modulate(through(self.norm1, x), shift, scale), attend))
        # Each token, normalised and modulated, goes through the MLP; the gate says how much of it is added.
        #   x = x + gate2 * fc2(gelu(fc1(norm2(x) * (1 + scale2) + shift2)))
        hidden = through(self.mlp.act, through(self.mlp.fc1, modulate(through(self.norm2, x), shift2, scale2)))
        out: PlainOrDual = gated(x, gate2, through(self.mlp.fc2, hidden))
        return out


class Final(nn.Module):
    """The last layer: tokens, normalised and modulated, become the P·P·C numbers of their patch."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, out)
        self.modulation = Modulation(dim, 2)

    def forward(self, x: Stream, c: Stream) -> Stream:
        return both(self.compute, x, c)

    def compute(self, x: PlainOrDual, c: PlainOrDual) -> PlainOrDual:
        """The patches (B, N, P·P·C) of tokens (B, N, D)."""
        shift, scale = self.modulation(c)
        # The tokens are normalised and modulated once more, then made into patches.
        #   out = linear(norm(x) * (1 + scale) + shift)
        out: PlainOrDual = through(self.linear, modulate(through(self.norm, x), shift, scale))
        return out


class DiT(nn.Module):
    """u(z, r, t | y). `label_rows` counts the null row, which is the last; 0 builds a network without labels."""

    def __init__(
        self,
        *,
        latent_size: int,
        channels: int,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        label_rows: int,
        qk_norm: bool,
        second_time: Literal["t-r", "r"],
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.patch, self.channels, self.second_time = patch, channels, second_time
        self.gradient_checkpointing = gradient_checkpointing
        self.compiled = False  # whether the blocks were compiled (model/build.py)
        self.activation = nn.SiLU()
        self.patch_embed = PatchEmbed(latent_size, patch, channels, dim)
        self.grid = latent_size // patch
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid**2, dim))
        self.time_embed = TimeEmbedding(dim)
        self.second_embed = TimeEmbedding(dim)
        self.label_embed = nn.Embedding(label_rows, dim) if label_rows else None
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, qk_norm=qk_norm) for _ in range(depth))
        self.final = Final(dim, patch * patch * channels)
        if not self.pos_embed.is_meta:  # else it has shapes, but no weights
            self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Set the weights as published: linear layers by Xavier, biases 0, embeddings from N(0, 0.02).

        Every modulation and the last linear layer start at 0: at first each block is the identity, and u is 0.
        """
        self.pos_embed.copy_(position_table(self.pos_embed.shape[2], self.grid))
        for linear in linears(self):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.proj.get_parameter("bias"))
        for linear in (*linears(self.time_embed), *linears(self.second_embed)):
            nn.init.normal_(linear.weight, std=0.02)
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
        nn.init.zeros_(self.final.linear.weight)

    def condition(self, t: Tensor, r: Tensor, y: Tensor, moving_rows: int = 0) -> Tensor | Dual:
        """The conditioning c = e(t) + e'(t − r) + label, (B, D). Of its inputs only t moves, on `moving_rows` rows."""
        second = moving(t - r, moving_rows) if self.second_time == "t-r" else r
        # Both times are embedded and added.   c = time_embed(t) + second_embed(second)
        c = add(self.time_embed(moving(t, moving_rows)), self.second_embed(second))
        # The label's row of the table is added; it does not depend on t.   c = c + label_embed(y)
        return c if self.label_embed is None else add(c, self.label_embed(y))

    def patches(self, z: Tensor, tangent: Tensor | None) -> Tensor | Dual:
        """Cut z (B, C, H, W) into tokens (B, N, D), and add the positional table."""
        # Each patch becomes a token, and its place is added.   x = patch_embed(z) + pos_embed
        return add(self.patch_embed(z if tangent is None else Dual(z, tangent)), self.pos_embed)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Put the patches (B, N, P·P·C) together to (B, C, H, W)."""
        grid, patch = self.grid, self.patch
        pixels = tokens.reshape(-1, grid, grid, patch, patch, self.channels)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.channels, grid * patch, grid * patch)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        r: Tensor,
        y: Tensor,
        attend: Attend = "fused",
        tangent: Tensor | None = None,
        first: int = 0,
        beside: Inputs | None = None,
    ) -> Stream:
        """The average velocity u of every row.

        With the `tangent` dz of the rows `first:` it is (u, du): du is the derivative along (dz, dt, dr) =
        (tangent, 1, 0) on those rows. With other rows `beside` it is (u, their u without gradient).
        """
        rows = 0 if tangent is None else len(tangent)
        assert tangent is None or (0 < rows == len(z) - first and beside is None), (rows, len(z), first)
        x: Stream
        c: Stream
        x, c = self.embed(z, t, r, y, tangent)
        if beside is not None:
            with torch.no_grad():
                other_x, other_c = self.embed(*beside)
            x, c = _put_beside(x, other_x), _put_beside(c, other_c)
        # The blocks work on the tokens one after the other; checkpointed ones are computed again for their gradient.
        #   for block in blocks: x = block(x, c)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = recomputed(block, x, c, attend, once=not self.compiled)
            else:
                x = block(x, c, attend)
        # The last layer's patches are put together.   u = unpatchify(final(x, c))
        u: Stream = each(self.unpatchify, self.final(x, c))
        return u

    def embed(
        self, z: Tensor, t: Tensor, r: Tensor, y: Tensor, tangent: Tensor | None = None
    ) -> tuple[Tensor | Dual, Tensor | Dual]:
        """What the blocks start from: the tokens x (B, N, D), and the activated conditioning c (B, D)."""
        # x = patches(z), c = silu(condition(t, r, y))
        rows = 0 if tangent is None else len(tangent)
        return self.patches(z, tangent), through(self.activation, self.condition(t, r, y, rows))


def _put_beside(value: Tensor | Dual, others: Tensor | Dual) -> Beside:
    assert isinstance(value, Tensor), "a tangent or rows beside"
    assert isinstance(others, Tensor), "rows beside have no tangent"
    return Beside(value, others)


def linears(module: nn.Module) -> list[nn.Linear]:
    """List every linear layer inside a module, at any depth."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
