"""The DiT that predicts the average velocity u(z, r, t).

Shapes: B rows, C channels, H = W side of a latent, P side of a patch, N = (H/P)² tokens, D channels of a token.

    c = e(t) + e'(t − r) + label          conditioning, used by the adaLN modulations only
    tokens = patches(z) + table           → blocks → final → unpatchify; no output scaling

The second time embedder is fed the interval t − r (published) or r. The positional table is initialised to sines and
cosines and trained. Attention is "fused", or "math" where a derivative passes through (fused kernels have no
forward-mode derivative).

Given a `tangent` of z on the last rows, du/dt rides along through the same lines: there x and c are `Dual`s, a value
with its derivative, and every operation below is one that has a rule for them (nn/tangent.py). Given other rows
`beside`, each block computes them too, without gradient (nn/tangent.py).
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from alphaflow_cli.nn.layers import Attention, Modulation, PatchEmbed, TimeEmbedding, position_table
from alphaflow_cli.nn.tangent import (
    Beside,
    Dual,
    Inputs,
    Loaded,
    Ride,
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
    """adaLN-zero: shift, scale, gate of the attention, then of the MLP."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, *, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, heads, qk_norm=qk_norm)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.modulation = Modulation(dim, 6)

    def forward(self, x: Any, c: Any, attend: Attend) -> Any:
        return both(self.ride, x, c, attend)

    def ride(self, x: Ride, c: Ride, attend: Attend) -> Ride:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(c)
        x = gated(x, gate, self.attn(modulate(through(self.norm1, x), shift, scale), attend))
        hidden = through(self.mlp.act, through(self.mlp.fc1, modulate(through(self.norm2, x), shift2, scale2)))
        out: Ride = gated(x, gate2, through(self.mlp.fc2, hidden))
        return out


class Final(nn.Module):
    """adaLN, then linear to P·P·C per token."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, out)
        self.modulation = Modulation(dim, 2)

    def forward(self, x: Any, c: Any) -> Any:
        return both(self.ride, x, c)

    def ride(self, x: Ride, c: Ride) -> Ride:
        shift, scale = self.modulation(c)
        out: Ride = through(self.linear, modulate(through(self.norm, x), shift, scale))
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
        self.pos_embed = nn.Parameter(position_table(dim, self.grid))
        self.time_embed = TimeEmbedding(dim)
        self.second_embed = TimeEmbedding(dim)
        self.label_embed = nn.Embedding(label_rows, dim) if label_rows else None
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, qk_norm=qk_norm) for _ in range(depth))
        self.final = Final(dim, patch * patch * channels)
        self.initialise()

    def initialise(self) -> None:
        """As published: linears xavier, biases 0, embeddings N(0, .02), every modulation and the last linear 0."""
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
        """(B, D) c = e(t) + e'(t − r) + label; only t moves, on the last `moving_rows` rows."""
        second = moving(t - r, moving_rows) if self.second_time == "t-r" else r
        c = add(self.time_embed(moving(t, moving_rows)), self.second_embed(second))
        return c if self.label_embed is None else add(c, self.label_embed(y))

    def patches(self, z: Tensor, tangent: Tensor | None) -> Tensor | Dual:
        """(B, C, H, W) → (B, N, D), with the positional table, which stands still."""
        return add(self.patch_embed(z if tangent is None else Dual(z, tangent)), self.pos_embed)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, N, P·P·C) → (B, C, H, W)."""
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
    ) -> Loaded:
        """u; with the `tangent` dz of the rows `first:`, (u, du) with du along (dz, dt, dr) = (tangent, 1, 0) there;
        with other rows `beside`, (u, their u without gradient)."""
        rows = 0 if tangent is None else len(tangent)
        assert tangent is None or (0 < rows == len(z) - first and beside is None), (rows, len(z), first)
        x, c = self.embed(z, t, r, y, tangent)
        if beside is not None:
            with torch.no_grad():
                others = self.embed(*beside)
            x, c = Beside(x, others[0]), Beside(c, others[1])
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = recomputed(block, x, c, attend, once=not self.compiled)
            else:
                x = block(x, c, attend)
        u: Loaded = each(self.unpatchify, self.final(x, c))
        return u

    def embed(self, z: Tensor, t: Tensor, r: Tensor, y: Tensor, tangent: Tensor | None = None) -> tuple[Any, Any]:
        """(x, c): the tokens, and the activated conditioning."""
        rows = 0 if tangent is None else len(tangent)
        return self.patches(z, tangent), through(self.activation, self.condition(t, r, y, rows))


def linears(module: nn.Module) -> list[nn.Linear]:
    """Every linear layer inside."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
