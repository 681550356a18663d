"""Improved MeanFlow (iMF): its released PyTorch checkpoints, and those of FD-Loss. Its network is ours, renamed.

iMF       a bare table: net.x_embedder, …, net.shared_blocks, net.u_heads, net.u_final_layer; the EMA's weights, without
    the velocity's blocks (net.v_heads), but with its last layer, which is of no use without them and is dropped.
FD-Loss   the same with .linear. for ._flax_linear. and .embedding. for ._flax_embedding.; a bare table, or model and
    model_ema; without the velocity's last layer.

Ours has queries, keys and values in one layer, and w1, w3 of the SwiGLU in one; u_heads follow shared_blocks.
"""

import re

import torch
from torch import Tensor

PLAIN = {  # ours → theirs, of what lies outside the blocks
    "patch_embed.proj": "x_embedder.proj",
    "label_embed": "y_embedder.embedding_table",
    "scale_embed.mlp.0": "omega_embedder.mlp.0",
    "scale_embed.mlp.2": "omega_embedder.mlp.2",
    "low_embed.mlp.0": "cfg_t_start_embedder.mlp.0",
    "low_embed.mlp.2": "cfg_t_start_embedder.mlp.2",
    "high_embed.mlp.0": "cfg_t_end_embedder.mlp.0",
    "high_embed.mlp.2": "cfg_t_end_embedder.mlp.2",
    "second_embed.mlp.0": "h_embedder.mlp.0",
    "second_embed.mlp.2": "h_embedder.mlp.2",
}
WITHOUT_BIAS = ("label_embed",)
PREFIX = ("class_tokens", "omega_tokens", "t_min_tokens", "t_max_tokens", "time_tokens")
BLOCK = {  # inside a block; a table of ours that is several of theirs, one below the other, has their names in order
    "norm1.weight": ("norm1.weight",),
    "norm2.weight": ("norm2.weight",),
    "modulation.gate": ("attn_scale",),
    "modulation.gate2": ("mlp_scale",),
    "attn.qkv.weight": ("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"),
    "attn.proj.weight": ("attn.out_proj.weight",),
    "attn.q_norm.weight": ("attn.q_norm.weight",),
    "attn.k_norm.weight": ("attn.k_norm.weight",),
    "mlp.fc1.weight": ("mlp.w1.weight", "mlp.w3.weight"),
    "mlp.fc2.weight": ("mlp.w2.weight",),
}
FINAL = ("norm.weight", "linear.weight", "linear.bias")
WRAPPED = (r"\._flax_(?:linear|embedding)(?=\.)", r"\.(?:linear|embedding)(?=\.(?:weight|bias)$)")  # iMF, FD-Loss


def imf_names(shared: int, own: int, *, velocity: int | None) -> dict[str, tuple[str, ...]]:
    """Every table of our network by name, with the names of theirs that it holds, one below the other.

    `shared` and `own` blocks lead to u; `velocity` blocks are the velocity's own, None where it has no end.
    """
    names: dict[str, tuple[str, ...]] = {}
    for ours, theirs in PLAIN.items():
        for part in ("weight",) if ours in WITHOUT_BIAS else ("weight", "bias"):
            names[f"{ours}.{part}"] = (f"{theirs}.{part}",)
    names["prefix.table"] = PREFIX
    stacks = [("blocks", 0, "shared_blocks", shared), ("blocks", shared, "u_heads", own)]
    stacks.append(("velocity_blocks", 0, "v_heads", velocity or 0))
    for ours, first, theirs, count in stacks:
        for i in range(count):
            for name, parts in BLOCK.items():
                names[f"{ours}.{first + i}.{name}"] = tuple(f"{theirs}.{i}.{part}" for part in parts)
    for part in FINAL:
        names[f"final.{part}"] = (f"u_final_layer.{part}",)
        if velocity is not None:
            names[f"velocity_final.{part}"] = (f"v_final_layer.{part}",)
    return names


def bare_names(table: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their names without `net.`, and without the layers that only wrap another."""
    wrapped = WRAPPED[0] if any("._flax_linear." in name for name in table) else WRAPPED[1]
    return {re.sub(wrapped, "", name.removeprefix("net.")): value for name, value in table.items()}


def to_imf(weights: dict[str, Tensor], names: dict[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Take our tables apart into theirs, under their names without wrappers. The prefix has 8, 4, 2, 2, 4 tokens."""
    apart: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        value = weights[ours]
        sizes = [8, 4, 2, 2, 4] if theirs == PREFIX else [len(value) // len(theirs)] * len(theirs)
        apart |= dict(zip(theirs, torch.split(value, sizes), strict=True))
    return apart


def from_imf(weights: dict[str, Tensor], names: dict[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Put their tables together into ours; KeyError names one that is missing."""
    return {
        ours: weights[theirs[0]] if len(theirs) == 1 else torch.cat([weights[name] for name in theirs])
        for ours, theirs in names.items()
    }
