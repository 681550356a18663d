"""The α-Flow transformer for diffusers: the average velocity u(z, r, t) of a latent or of pixels.

    z_r = z_t − (t − r) u(z_t, r, t)      t = 0 is data, t = 1 is noise; the default r = 0 jumps to the data

    config.prediction   what the last layer gives
    velocity            u itself
    noise               the noise ε̂ of a DiT trained on DDPM's 1000 times: u = (ε̂ − z) / (1 − t)
    data                the data x̂: u = (z − x̂) / max(t, t_floor)

This file lies beside published weights and stands alone: it needs torch and diffusers only. Licence: Apache-2.0.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.nn import functional as F

FREQUENCIES = 128  # cosines and sines of a time
DISCRETE_TIMES, BETAS = 1000, (1e-4, 0.02)  # of DDPM
EPSILON = 1e-6  # of every norm


@dataclass
class AlphaFlowOutput(BaseOutput):  # type: ignore[misc]
    """The average velocity, as diffusers' transformers give their output."""

    sample: Tensor  # (B, C, H, W)


class TimeMlp(nn.Module):
    """Cosines and sines of a time, through a small MLP; `discrete` times are turned into DDPM's indices first."""

    def __init__(self, dim: int, *, discrete: bool) -> None:
        super().__init__()
        self.discrete = discrete
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, s: Tensor) -> Tensor:
        wide = ddpm_index(s) if self.discrete else s
        k = torch.arange(FREQUENCIES, dtype=wide.dtype, device=wide.device)
        angles = wide[:, None] * torch.exp(k * (-math.log(10000.0) / FREQUENCIES))
        features = torch.cat([angles.cos(), angles.sin()], dim=1).to(next(self.parameters()).dtype)
        return self.mlp(features)  # type: ignore[no-any-return]


def ddpm_times(device: torch.device) -> Tensor:
    """The times on the straight path that stand for DDPM's 1000 steps, (1000,) float64."""
    kept = (1 - torch.linspace(*BETAS, DISCRETE_TIMES, dtype=torch.float64, device=device)).cumprod(0)
    return (1 - kept).sqrt() / (kept.sqrt() + (1 - kept).sqrt())


def ddpm_index(t: Tensor) -> Tensor:
    """DDPM's index of each time, linear between two of its times; whole where t is one up to rounding."""
    times, at = ddpm_times(t.device), t.double()
    below = (torch.searchsorted(times, at.contiguous(), right=True) - 1).clamp(0, DISCRETE_TIMES - 2)
    width = times[below + 1] - times[below]
    index = below + (at - times[below]) / width
    off = index.round() - index
    index = index + off * (off.abs() * width <= torch.finfo(t.dtype).eps * at)
    return index.clamp(0, DISCRETE_TIMES - 1)


class Patches(nn.Module):
    """Each patch of P × P through one linear layer, whose weight has the shape of a convolution's."""

    def __init__(self, patch: int, channels: int, dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, z: Tensor) -> Tensor:
        rows, channels, side, _ = z.shape
        grid, patch = side // self.patch, self.patch
        cut = z.reshape(rows, channels, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
        return F.linear(cut.reshape(rows, grid * grid, -1), self.proj.weight.flatten(1), self.proj.bias)


class Modulate(nn.Module):
    """The shifts, scales and gates of a block, from the conditioning: `parts` of (B, 1, D)."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(dim, parts * dim)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.linear(c).unsqueeze(1).chunk(self.parts, dim=2)  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Attention of the tokens to each other, with or without norms of queries and keys."""

    def __init__(self, dim: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(dim // heads, eps=EPSILON) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads, eps=EPSILON) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2))
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Feedforward(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Attention, then the MLP; the conditioning shifts, scales and gates both (adaLN-zero)."""

    def __init__(self, dim: int, heads: int, hidden: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPSILON, elementwise_affine=False)
        self.attn = SelfAttention(dim, heads, qk_norm=qk_norm)
        self.norm2 = nn.LayerNorm(dim, eps=EPSILON, elementwise_affine=False)
        self.mlp = Feedforward(dim, hidden)
        self.modulation = Modulate(dim, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(c)
        x = x + gate * self.attn(self.norm1(x) * (1 + scale) + shift)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)  # type: ignore[no-any-return]


class LastLayer(nn.Module):
    """Tokens become the P · P · C numbers of their patch."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPSILON, elementwise_affine=False)
        self.linear = nn.Linear(dim, out)
        self.modulation = Modulate(dim, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)
        return self.linear(self.norm(x) * (1 + scale) + shift)  # type: ignore[no-any-return]


class AlphaFlowTransformer2DModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """u(z, r, t | label): the average velocity from time t to time r."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 4,
        patch_size: int = 2,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        mlp_ratio: float = 4.0,
        label_rows: int = 1001,
        qk_norm: bool = False,
        second_time: str = "t-r",
        prediction: str = "velocity",
        t_floor: float = 0.05,
    ) -> None:
        super().__init__()
        dim, grid = hidden_size, sample_size // patch_size
        self.patch_embed = Patches(patch_size, in_channels, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid**2, dim))
        self.time_embed = TimeMlp(dim, discrete=prediction == "noise")
        self.second_embed = TimeMlp(dim, discrete=False)
        self.label_embed = nn.Embedding(label_rows, dim) if label_rows else None
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, num_attention_heads, int(dim * mlp_ratio), qk_norm=qk_norm) for _ in range(num_layers)
        )
        self.final = LastLayer(dim, patch_size**2 * in_channels)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        r_timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Times go from 0 (data) to 1 (noise), one per row; without `r_timestep` the step leads to the data."""
        z, t, kind = hidden_states, timestep, self.config.prediction
        r = torch.zeros_like(t) if r_timestep is None else r_timestep
        c = self.time_embed(t) + self.second_embed(t - r if self.config.second_time == "t-r" else r)
        if self.label_embed is not None:
            c = c + self.label_embed(class_labels)
        c, column = F.silu(c), t.reshape(-1, 1, 1, 1)
        seen = (z * ((1 - column) ** 2 + column**2).rsqrt()).to(z.dtype) if kind == "noise" else z
        x = self.patch_embed(seen) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        out = self._unpatchify(self.final(x, c))
        if kind == "noise":
            out = (out - z) * (1 / (1 - torch.minimum(column, ddpm_times(t.device)[-1].to(t.dtype))))
        elif kind == "data":
            out = (z - out) * (1 / column.clamp(min=self.config.t_floor))
        return AlphaFlowOutput(sample=out) if return_dict else (out,)

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        side, patch, channels = self.config.sample_size, self.config.patch_size, self.config.in_channels
        grid = side // patch
        pixels = tokens.reshape(-1, grid, grid, patch, patch, channels)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, side, side)
