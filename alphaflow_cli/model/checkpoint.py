"""One file is enough: weights, recipe, the latents' normalisation and where they came from, in one safetensors file.

Tensors: `net.<name>` (float32), `latents.mean` and `latents.std` (float64, broadcastable to (C, h, w); the network's
x is (latent − mean) / std). Metadata, all strings: format, recipe (YAML), origin (JSON: step, images_seen, weights,
half_life, autoencoder, class_names, versions, …).
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alphaflow_cli.documents import Anything, ListOf, Maybe, Number, Table, Text, Whole, parse_json
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import check_regular
from alphaflow_cli.model.build import network_shapes
from alphaflow_cli.nn.autoencoder import Autoencoder
from alphaflow_cli.nn.weights import check_real, unlike
from alphaflow_cli.recipe import dump_recipe, recipe_from_text
from alphaflow_cli.recipe.migrations import refuse_newer
from alphaflow_cli.recipe.schema import Recipe
from alphaflow_cli.tensors import save_tensors
from alphaflow_cli.text import for_terminal, shorten

Contents = tuple[dict[str, Tensor], dict[str, str]]  # tensors and metadata, as they stand in the file
PICKLED = (".pt", ".pth", ".ckpt", ".bin", ".pkl")  # endings of the checkpoints of other systems
OLDER: dict[int, Callable[[Contents], Contents]] = {}  # format → what makes the next format's contents out of it
CHECKPOINT_FORMAT = f"alphaflow/{len(OLDER) + 1}"  # the one written; those of OLDER are read for ever
FILE_NAME = Text(4096, form=r"[^\x00-\x1f\x7f]*")  # a file's or repository's
ORIGIN = Table(  # what is read of it; the rest is told in the card and the report as it stands
    optional={
        "step": Maybe(Whole(0)),
        "images_seen": Maybe(Whole(0)),
        "weights": Maybe(Text(100)),
        "half_life": Maybe(Number(0)),
        "init_from": Maybe(FILE_NAME),
        "autoencoder": Maybe(
            Table(
                optional={"id": Maybe(FILE_NAME), "revision": Maybe(FILE_NAME), "weights_sha256": Maybe(Text(64))},
                others=Anything(),
            )
        ),
        "crop": Maybe(Text(100)),
        "class_names": Maybe(ListOf(Text(1000))),
        "versions": Maybe(Table(others=Text(100))),
        "converted": Maybe(
            Table(
                optional={
                    "from": Maybe(Text(1000)),
                    "file": Maybe(FILE_NAME),
                    "sha256": Maybe(Text(64)),
                    "filled": Maybe(Table(others=Anything())),
                },
                others=Anything(),
            )
        ),
    },
    others=Anything(),
)


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint file: all that is needed to sample from it, without any other file."""

    weights: dict[str, Tensor]  # the network's names → float32
    recipe: Recipe
    mean: Tensor  # of the latents, float64, broadcastable to (C, h, w)
    std: Tensor
    origin: dict[str, Any]  # step, images_seen, weights ("ema" or "raw"), autoencoder, class_names, …


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write the file whole or not at all: a reader never sees half a checkpoint."""
    tensors = {f"net.{name}": tensor for name, tensor in checkpoint.weights.items()}
    tensors |= {"latents.mean": checkpoint.mean, "latents.std": checkpoint.std}
    metadata = {
        "format": CHECKPOINT_FORMAT,
        "recipe": dump_recipe(checkpoint.recipe),
        "origin": json.dumps(checkpoint.origin, sort_keys=True),
    }
    save_tensors(path, tensors, metadata)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and check a checkpoint; a file that is not ours, or not whole, is refused with its name."""
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            number = _format_of(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except FileNotFoundError as error:  # safetensors says so of a file without permission, too
        why = "no permission to read it. Change the permissions." if path.exists() else "no such checkpoint."
        raise AlphaflowError(f"{path}: {why}") from error
    except (OSError, SafetensorError) as error:
        advice = ". A checkpoint of another system: alphaflow convert" if path.suffix in PICKLED else ""
        raise AlphaflowError(
            f"{path}: cannot be read as safetensors, truncated or another format: {for_terminal(error)}{advice}"
        ) from error
    contents = tensors, metadata
    for each in range(number, len(OLDER) + 1):
        contents = OLDER[each](contents)
    return _checkpoint(path, *contents)


def _format_of(path: Path, metadata: dict[str, str]) -> int:
    """The number in `alphaflow/N`; a file of another system, or of a newer version, is refused."""
    stated = metadata.get("format")
    match = re.fullmatch(r"alphaflow/([1-9][0-9]{0,8})", stated or "")
    if match is None:
        raise AlphaflowError(
            f"{path}: not an alphaflow checkpoint (format {shorten(repr(stated), 100)}, wanted {CHECKPOINT_FORMAT!r}). "
            "A checkpoint of another system: alphaflow convert."
        )
    refuse_newer(int(match[1]), len(OLDER) + 1, str(path))
    return int(match[1])


def _checkpoint(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Checkpoint:
    weights = {name[4:]: tensor for name, tensor in tensors.items() if name.startswith("net.")}
    try:
        mean, std = tensors["latents.mean"], tensors["latents.std"]
        recipe = recipe_from_text(metadata["recipe"], f"{path} (its recipe)")
        origin = read_origin(metadata["origin"], path)
    except KeyError as error:
        raise AlphaflowError(f"{path}: the checkpoint lacks {error}; it was not written by alphaflow.") from error
    check_real(weights, path)
    check_real({"latents.mean": mean, "latents.std": std}, path)
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
        raise AlphaflowError(f"{path}: the latents' normalisation in it is not finite and positive.")
    check_latents(mean, std, recipe, str(path))
    if differences := misfits(weights, recipe):  # seen before a byte of the network is allocated
        raise AlphaflowError(f"{path}: its weights are not those of its recipe's network ({differences}).")
    return Checkpoint(weights=weights, recipe=recipe, mean=mean, std=std, origin=origin)


def read_origin(text: str, path: Path) -> dict[str, Any]:
    """Where a checkpoint's weights come from, as far as its words can be relied on."""
    origin: dict[str, Any] = parse_json(text, f"{path} (its origin)", ORIGIN, advice="It was not written by alphaflow.")
    return origin


def check_latents(mean: Tensor, std: Tensor, recipe: Recipe, where: str) -> None:
    """Refuse mean and std that are not one number, one per channel, or one per channel and position."""
    channels, side = recipe.data.channels, recipe.data.latent_size
    shapes = ((1, 1, 1), (channels, 1, 1), (channels, side, side))
    if tuple(mean.shape) not in shapes or mean.shape != std.shape:
        raise AlphaflowError(
            f"{where}: the latents' mean and std have the shapes {tuple(mean.shape)} and {tuple(std.shape)}; "
            f"wanted {shapes[1]} or {shapes[2]}, both the same."
        )


def misfits(weights: dict[str, Tensor], recipe: Recipe, *, without: tuple[str, ...] = ()) -> str:
    """How the weights differ from the recipe's network, which is built without memory; empty: not at all."""
    blocks = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    if blocks != recipe.model.depth:  # first: a list of a billion blocks takes memory even when they are empty
        return f"{blocks} blocks there, model.depth {recipe.model.depth}"
    try:
        shapes = network_shapes(recipe)
    except (RuntimeError, OverflowError) as error:
        return f"no network has such sizes: {str(error).splitlines()[0][:200]}"
    wanted = {name: shape for name, shape in shapes.items() if not name.startswith(without)}
    return unlike(wanted, weights)


def check_autoencoder(autoencoder: Autoencoder, record: dict[str, Any]) -> None:
    """Latents must be decoded by the network that encoded them."""
    wanted = record.get("weights_sha256")
    if wanted and autoencoder.weights_sha256 != wanted:
        raise AlphaflowError(
            f"the autoencoder {autoencoder.id} has weights {autoencoder.weights_sha256[:12]}…, the latents were made "
            f"with {wanted[:12]}…. Give the right one: --autoencoder DIR."
        )
