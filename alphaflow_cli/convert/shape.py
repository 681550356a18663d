"""What a table of weights says by its names and shapes: the network's size, and whether it is one of this family."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.nn.names import from_published
from alphaflow_cli.recipe.schema import Recipe

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of S, B, L, XL: the shapes do not tell


@dataclass(frozen=True)
class Shape:
    """Of a DiT, read off its weights."""

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
    """Names of SiT and its children (t_embedder, …) or of the published system, to ours."""
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


def read_shape(weights: dict[str, Tensor], where: str) -> Shape:
    """From our names; what is missing is named."""
    try:
        dim, channels, patch, _ = weights["patch_embed.proj.weight"].shape
        tokens = weights["pos_embed"].shape[1]
        depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        hidden = weights["blocks.0.mlp.fc1.weight"].shape[0]
        last = weights["final.linear.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise AlphaflowError(f"{where}: a checkpoint of another family, or not whole: {error} is missing.") from error
    table = weights.get("label_embed.weight")
    return Shape(
        dim=dim,
        depth=depth,
        patch=patch,
        channels=channels,
        latent_size=math.isqrt(tokens) * patch,
        mlp_ratio=hidden / dim,
        qk_norm="blocks.0.attn.q_norm.weight" in weights,
        label_rows=0 if table is None else table.shape[0],
        out=last // patch**2,
    )


def heads_of(dim: int, where: str, said: int | None) -> int:
    """From the file, else from the family's sizes."""
    if said or dim in HEADS:
        return said or HEADS[dim]
    raise AlphaflowError(
        f"{where}: does not say how many attention heads it has, and {dim} channels are none of the published sizes "
        f"({', '.join(map(str, HEADS))}). Say it: --set model.heads=N"
    )


def fit(weights: dict[str, Tensor], recipe: Recipe, where: str) -> dict[str, Tensor]:
    """The weights as float32, after a look that the recipe's network has exactly these names and shapes."""
    from alphaflow_cli.engine.build import build_network

    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in build_network(recipe).state_dict().items()}
    there = {name: tuple(value.shape) for name, value in weights.items()}
    missing, extra = sorted(wanted.keys() - there.keys()), sorted(there.keys() - wanted.keys())
    wrong = sorted(name for name in wanted.keys() & there.keys() if wanted[name] != there[name])
    if missing or extra or wrong:
        parts = {"missing": missing, "unknown": extra, "of another shape": wrong}
        told = "; ".join(f"{len(names)} {what}, such as {names[0]}" for what, names in parts.items() if names)
        raise AlphaflowError(f"{where}: not the weights of the network it describes ({told}).")
    broken = sorted(name for name, value in weights.items() if not torch.isfinite(value).all())
    if broken:
        raise AlphaflowError(f"{where}: {broken[0]} has values that are not finite ({len(broken)} tables do).")
    return {name: value.detach().float().contiguous() for name, value in weights.items()}
