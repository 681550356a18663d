"""Improved MeanFlow (iMF): its released PyTorch checkpoints, and those of FD-Loss. Its network is ours, renamed.

iMF       a bare table: net.x_embedder, …, net.shared_blocks, net.u_heads, net.u_final_layer; the EMA's weights, without
    the velocity's blocks (net.v_heads), but with its last layer, which is of no use without them and is dropped.
FD-Loss   the same with .linear. for ._flax_linear. and .embedding. for ._flax_embedding.; a bare table, or model and
    model_ema; without the velocity's last layer.

Ours has queries, keys and values in one layer, and w1, w3 of the SwiGLU in one; u_heads follow shared_blocks.
"""

import re
from dataclasses import replace
from itertools import takewhile

import torch
from torch import Tensor

from alphaflow_cli.convert.imported import (
    MEANFLOW_MEAN,
    MEANFLOW_STD,
    ForeignFile,
    Imported,
    Latents,
    parse_latents,
    per_channel,
)
from alphaflow_cli.convert.shape import NetworkShape
from alphaflow_cli.convert.source import state_dict
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe import Recipe

TABLES = {"ema": ("model_ema",), "raw": ("model",)}  # FD-Loss
SIGN = "cfg_t_start_embedder."  # begins names that nobody else has
RECIPES = {(768, 12): "imf-b2", (768, 24): "imf-m2", (1024, 32): "imf-l2", (1024, 48): "imf-xl2"}  # (dim, depth)
LATENT_SIZE = 32  # of every released network; positions are turned, so the weights do not say it
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
TOKENS = [8, 4, 2, 2, 4]  # of each input
STACKS = ("shared_blocks", "u_heads", "v_heads")
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


def from_imf(weights: dict[str, Tensor], names: dict[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Put their tables together into ours; all must be there."""
    return {
        ours: weights[theirs[0]] if len(theirs) == 1 else torch.cat([weights[name] for name in theirs])
        for ours, theirs in names.items()
    }


def looks_imf(table: dict[str, Tensor]) -> bool:
    """Tell whether a table is improved MeanFlow's network: it embeds the ends of the guidance interval."""
    return any(name.removeprefix("net.").startswith(SIGN) for name in table)


def read_imf(file: ForeignFile) -> Imported:
    """Translate a released iMF, or one of FD-Loss."""
    table, which = file.pick(TABLES)
    theirs = bare_names(state_dict(table, file.name))
    shape, velocity = _shape(theirs, file.name)
    shared, own = (_blocks(theirs, stack) for stack in ("shared_blocks", "u_heads"))
    names = imf_names(shared, own, velocity=velocity)
    idle = {name for name in theirs if velocity is None and name.startswith("v_final_layer.")}
    strange = sorted(theirs.keys() - idle - {part for parts in names.values() for part in parts})
    missing = sorted({part for parts in names.values() for part in parts} - theirs.keys())
    if strange or missing:
        what = f"has {strange[0]!r}, which no iMF has" if strange else f"lacks {missing[0]!r}"
        raise AlphaflowError(f"{file.name}: not the weights of an improved MeanFlow: it {what}.")
    heads = shape.dim // len(theirs["shared_blocks.0.attn.q_norm.weight"])
    try:
        weights = from_imf(theirs, names)
    except RuntimeError as error:  # tables of different widths
        reason = str(error).splitlines()[0][:200]
        raise AlphaflowError(f"{file.name}: not the weights of an improved MeanFlow: {reason}.") from error
    foreign = Imported(file, "imf", weights, which, shape, heads, _latents(file), _base(file, shape))
    foreign.base = replace(foreign.base, model=replace(foreign.base.model, velocity_head=velocity))
    foreign.unread = tuple(sorted(idle))
    return foreign


def _blocks(theirs: dict[str, Tensor], stack: str) -> int:
    """How many blocks a stack has, as far as it has no gap."""
    there = {name.split(".")[1] for name in theirs if name.startswith(f"{stack}.")}
    return sum(1 for _ in takewhile(lambda i: str(i) in there, range(len(there))))


def _shape(theirs: dict[str, Tensor], where: str) -> tuple[NetworkShape, int | None]:
    """The network's sizes, and the number of blocks of the velocity's own; None where the file has none."""
    stacks = {stack: _blocks(theirs, stack) for stack in STACKS}
    try:
        dim, channels, patch, _ = theirs["x_embedder.proj.weight"].shape
        hidden, rows = (len(theirs[n]) for n in ("shared_blocks.0.mlp.w1.weight", "y_embedder.embedding_table.weight"))
        last, norm = len(theirs["u_final_layer.linear.weight"]), len(theirs["shared_blocks.0.attn.q_norm.weight"])
        tokens = [len(theirs[name]) for name in PREFIX]
    except (KeyError, ValueError, TypeError) as error:
        raise AlphaflowError(f"{where}: no whole improved MeanFlow ({error}).") from error
    if 0 in (dim, channels, patch, norm) or dim % norm or last != patch**2 * channels or tokens != TOKENS:
        raise AlphaflowError(
            f"{where}: no improved MeanFlow has {dim} channels in heads of {norm}, patches of {patch}x{patch} with "
            f"{channels} channels in and {last} numbers out, and {tokens} tokens before them."
        )
    shape = NetworkShape(
        dim=dim,
        depth=stacks["shared_blocks"] + stacks["u_heads"],
        patch=patch,
        channels=channels,
        latent_size=LATENT_SIZE,
        mlp_ratio=8 / 3 if int(dim * 8 / 3) == hidden else (hidden + 0.25) / dim,  # times dim, cut to whole channels
        qk_norm=False,
        label_rows=rows,
        out=channels,
    )
    return shape, stacks["v_heads"] or None


def _latents(file: ForeignFile) -> Latents:
    """The constants that all released networks were trained with, unless the command line gives others."""
    if file.options.latents:
        return parse_latents(file.options.latents)
    return per_channel(MEANFLOW_MEAN, MEANFLOW_STD, "per channel, (latent − mean) / std: iMF's constants")


def _base(file: ForeignFile, shape: NetworkShape) -> Recipe:
    """The recipe of the published network of this size, which says with which scale and interval it is sampled."""
    published = RECIPES.get((shape.dim, shape.depth))
    base = file.base_recipe("imf-b2", published)
    file.filled["recipe"] = file.filled["recipe"].replace("the file's name", "the network's size")
    options = file.options
    given = [name for name in ("scale", "interval") if options.values_of(f"sample.{name}")]
    if not (published or options.recipe or len(given) == 2):
        raise AlphaflowError(
            f"{file.name}: a network of none of the published sizes, and the file does not say with which guidance it "
            "is sampled. Say it: --set sample.scale=8 --set sample.interval=[0.4,0.65], or --recipe imf-b2"
        )
    for name in {"scale", "interval"} - set(given):
        file.filled[f"sampling {name}"] = f"{getattr(base.sample, name)}: that of {base.name}"
    if not options.values_of("data.latent_size"):
        file.filled["latents' side"] = f"{LATENT_SIZE}, as of every released network"
    return base
