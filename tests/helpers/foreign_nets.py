"""The neighbours' networks, written from their papers for the tests: functions of a table of weights, in any precision.

SiT (arXiv:2401.08740) and DiT (arXiv:2212.09748): one architecture; the published α-Flow network is the same with a
second time embedder. Nothing here imports the package.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]


def random_weights(
    *,
    dim: int,
    depth: int,
    patch: int,
    channels: int,
    size: int,
    rows: int,
    out: int,
    embedders: tuple[str, ...],
    seed: int,
) -> Weights:
    """A table in SiT's names (x_embedder, blocks, final_layer, …), all random, nothing zero."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"pos_embed": (1, (size // patch) ** 2, dim), "x_embedder.proj.weight": (dim, channels, patch, patch)}
    shapes |= {"x_embedder.proj.bias": (dim,), "y_embedder.embedding_table.weight": (rows, dim)}
    linear = {
        name + part: size for name in embedders for part, size in ((".mlp.0", (dim, 256)), (".mlp.2", (dim, dim)))
    }
    for i in range(depth):
        b = f"blocks.{i}."
        linear |= {
            b + "attn.qkv": (3 * dim, dim),
            b + "attn.proj": (dim, dim),
            b + "adaLN_modulation.1": (6 * dim, dim),
        }
        linear |= {b + "mlp.fc1": (4 * dim, dim), b + "mlp.fc2": (dim, 4 * dim)}
    linear |= {"final_layer.linear": (patch * patch * out, dim), "final_layer.adaLN_modulation.1": (2 * dim, dim)}
    for name, shape in linear.items():
        shapes |= {name + ".weight": shape, name + ".bias": shape[:1]}
    scale = {2: lambda shape: shape[-1] ** -0.5}
    return {
        name: torch.randn(shape, generator=g) * scale.get(len(shape), lambda _: 0.3)(shape)
        for name, shape in shapes.items()
    }


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def embed_time(w: Weights, name: str, t: Tensor) -> Tensor:
    f = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128).to(t.dtype)
    angles = t[:, None] * f
    return linear(w, name + ".mlp.2", F.silu(linear(w, name + ".mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))


def norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def block(w: Weights, name: str, x: Tensor, c: Tensor, heads: int) -> Tensor:
    m = linear(w, name + "adaLN_modulation.1", F.silu(c))[:, None].chunk(6, -1)
    rows, tokens, dim = x.shape
    h = linear(w, name + "attn.qkv", norm(x) * (1 + m[1]) + m[0]).reshape(rows, tokens, 3, heads, dim // heads)
    q, k, v = h.permute(2, 0, 3, 1, 4)
    a = ((q @ k.transpose(-1, -2)) / math.sqrt(dim // heads)).softmax(-1) @ v
    x = x + m[2] * linear(w, name + "attn.proj", a.transpose(1, 2).reshape(rows, tokens, dim))
    h = linear(w, name + "mlp.fc1", norm(x) * (1 + m[4]) + m[3])
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return x + m[5] * linear(w, name + "mlp.fc2", h)


def transformer(w: Weights, x: Tensor, times: dict[str, Tensor], y: Tensor, *, heads: int) -> Tensor:
    """All output channels. `times`: embedder → what it is fed."""
    patch = w["x_embedder.proj.weight"].shape[-1]
    grid = x.shape[-1] // patch
    tokens = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=patch)
    tokens = tokens.flatten(2).transpose(1, 2) + w["pos_embed"]
    c = w["y_embedder.embedding_table.weight"][y] + sum(embed_time(w, name, t) for name, t in times.items())
    depth = len({name.split(".")[1] for name in w if name.startswith("blocks.")})
    for i in range(depth):
        tokens = block(w, f"blocks.{i}.", tokens, c, heads)
    m = linear(w, "final_layer.adaLN_modulation.1", F.silu(c))[:, None].chunk(2, -1)
    pixels = linear(w, "final_layer.linear", norm(tokens) * (1 + m[1]) + m[0])
    out = pixels.shape[-1] // patch**2
    pixels = pixels.reshape(-1, grid, grid, patch, patch, out)
    return torch.einsum("nhwpqc->nchpwq", pixels).reshape(-1, out, grid * patch, grid * patch)


def sit_velocity(w: Weights, x: Tensor, t: Tensor, y: Tensor, *, heads: int) -> Tensor:
    """SiT: t = 0 noise, t = 1 data; d/dt of t x + (1 − t) noise. The variance half is dropped."""
    return transformer(w, x, {"t_embedder": t}, y, heads=heads)[:, : x.shape[1]]


def dit_noise(w: Weights, x: Tensor, index: Tensor, y: Tensor, *, heads: int) -> Tensor:
    """DiT: the noise in √ᾱ x + √(1 − ᾱ) noise at a discrete time 0 … 999."""
    return transformer(w, x, {"t_embedder": index.to(x.dtype)}, y, heads=heads)[:, : x.shape[1]]


def dit_alpha_bar() -> Tensor:
    kept, table = 1.0, []
    for i in range(1000):
        kept *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        table.append(kept)
    return torch.tensor(table, dtype=torch.float64)


def published_u(w: Weights, z: Tensor, r: Tensor, t: Tensor, y: Tensor, *, heads: int) -> Tensor:
    """The published network: embedders of t and of t − r."""
    return transformer(w, z, {"noise_labels_embedder": t, "noise_labels_next_embedder": t - r}, y, heads=heads)
