"""A table of weights, judged by its names and shapes: the network's size, and whether it is one of this family.

Our names, the published system's and those of SiT and its children differ by pure renaming; both ways are here.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaflow_cli.errors import AlphaflowError

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of S, B, L, XL: the shapes do not tell
PUBLISHED = {  # a name of ours begins so → the published system's
    "pos_embed": "pos_embed",
    "patch_embed.proj.": "x_embedder.proj.",
    "time_embed.mlp.": "noise_labels_embedder.mlp.",
    "second_embed.mlp.": "noise_labels_next_embedder.mlp.",
    "label_embed.weight": "y_embedder.embedding_table.weight",
    "blocks.": "blocks.",
    "final.linear.": "final_layer.linear.",
    "final.modulation.linear.": "final_layer.adaLN_modulation.1.",
}
MODULATION = (".modulation.linear.", ".adaLN_modulation.1.")  # inside a block


@dataclass(frozen=True)
class NetworkShape:
    """The sizes of a DiT, read off its weights."""

    dim: int
    depth: int
    patch: int
    channels: int
    latent_size: int
    mlp_ratio: float
    qk_norm: bool
    label_rows: int  # 0: no labels
    out: int  # channels of the last linear, per pixel of a patch


def to_our_names(weights: dict[str, Tensor], where: str, *, second: str | None) -> dict[str, Tensor]:
    """Rename the weights of SiT and its children (t_embedder, …), or of the published system, to our names."""
    spelled = {"t_embedder.": "noise_labels_embedder."}
    if second:
        spelled[second] = "noise_labels_next_embedder."
    ours: dict[str, Tensor] = {}
    for name, value in weights.items():
        common = next((new + name[len(old) :] for old, new in spelled.items() if name.startswith(old)), name)
        try:
            ours[from_published(common)] = value
        except KeyError as error:
            raise AlphaflowError(
                f"{where}: a checkpoint of another family: it has {name!r}, which no SiT, DiT, MeanFlow or α-Flow has."
            ) from error
    return ours


def to_published(name: str) -> str:
    """Rename a weight of ours: `blocks.0.modulation.linear.bias` becomes `blocks.0.adaLN_modulation.1.bias`."""
    return _rename(name, PUBLISHED, *MODULATION)


def from_published(name: str) -> str:
    """Rename a published weight to ours: the inverse of `to_published`."""
    return _rename(name, {theirs: ours for ours, theirs in PUBLISHED.items()}, *reversed(MODULATION))


def _rename(name: str, prefixes: dict[str, str], old: str, new: str) -> str:
    for ours, theirs in prefixes.items():
        if name.startswith(ours):
            rest = name[len(ours) :]
            return theirs + (rest.replace(old[1:], new[1:]) if ours == "blocks." else rest)
    raise KeyError(name)


def read_shape(weights: dict[str, Tensor], where: str) -> NetworkShape:
    """Read the network's sizes off weights under our names; what is missing is named."""
    try:
        dim, channels, patch, _ = weights["patch_embed.proj.weight"].shape
        tokens = weights["pos_embed"].shape[1]
        blocks = {int(name.split(".")[1]) for name in weights if name.startswith("blocks.")}
        hidden = weights["blocks.0.mlp.fc1.weight"].shape[0]
        last = weights["final.linear.weight"].shape[0]
        table = weights.get("label_embed.weight")
        rows = 0 if table is None else table.shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise AlphaflowError(f"{where}: a checkpoint of another family, or not whole ({error}).") from error
    if blocks != set(range(len(blocks))):  # a few bytes may name block 3,000,000
        raise AlphaflowError(f"{where}: has {len(blocks)} blocks, but numbers them up to {max(blocks)}.")
    if 0 in (dim, channels, patch, tokens) or last % patch**2:
        raise AlphaflowError(
            f"{where}: no network has {dim} channels, {tokens} tokens, and patches of {patch}x{patch} with {channels} "
            f"channels in and {last} numbers out."
        )
    return NetworkShape(
        dim=dim,
        depth=len(blocks),
        patch=patch,
        channels=channels,
        latent_size=math.isqrt(tokens) * patch,
        mlp_ratio=hidden / dim,
        qk_norm="blocks.0.attn.q_norm.weight" in weights,
        label_rows=rows,
        out=last // patch**2,
    )


def finite(weights: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The weights as float32, after a check that all their values are finite."""
    broken = sorted(name for name, value in weights.items() if not torch.isfinite(value).all())
    if broken:
        raise AlphaflowError(f"{where}: {broken[0]} has values that are not finite ({len(broken)} tables do).")
    return {name: value.detach().float().contiguous() for name, value in weights.items()}


def without_variance(weights: dict[str, Tensor], shape: NetworkShape, where: str) -> dict[str, Tensor]:
    """Drop a learned variance from the last linear layer: it keeps the first C of every pixel's 2C numbers."""
    if shape.out == shape.channels:
        return weights
    if shape.out != 2 * shape.channels:
        raise AlphaflowError(
            f"{where}: {shape.channels} channels in and {shape.out} out; they must be as many, or twice."
        )
    kept = {}
    for name in ("final.linear.weight", "final.linear.bias"):
        value = weights.get(name, torch.zeros(0))
        if value.shape[:1] != (shape.patch**2 * shape.out,):
            raise AlphaflowError(f"{where}: not the weights of the network it describes ({name} is missing or short).")
        pixels = value.reshape(shape.patch**2, shape.out, *value.shape[1:])
        kept[name] = pixels[:, : shape.channels].reshape(-1, *value.shape[1:])
    return weights | kept
