"""`convert`: a neighbour's file to a checkpoint of ours."""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from alphaflow_cli.convert.imf import looks_imf, read_imf
from alphaflow_cli.convert.imported import (
    AUTOENCODER_FILE,
    ConvertOptions,
    Family,
    ForeignFile,
    Imported,
    autoencoder_folder,
    check_out,
    complete,
)
from alphaflow_cli.convert.meanflow import FASTGEN, SOFLOW, fastgen_tables, read_fastgen, read_meanflow, read_soflow
from alphaflow_cli.convert.published import looks_published, read_published
from alphaflow_cli.convert.shape import finite
from alphaflow_cli.convert.sit import SiTKind, add_second_embedder, looks_like_sit, read_sit, turn_time
from alphaflow_cli.convert.source import bare_name, read_source
from alphaflow_cli.convert.strangers import check_path, refuse_strangers, refuse_unknown
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import sha256_of, write_by, write_whole
from alphaflow_cli.model.build import build_network
from alphaflow_cli.model.checkpoint import Checkpoint, check_latents, misfits, save_checkpoint
from alphaflow_cli.nn.autoencoder import kl_config, load_autoencoder
from alphaflow_cli.recipe import Recipe

READERS = {
    "alphaflow": read_published,
    "meanflow": read_meanflow,
    "fastgen": read_fastgen,
    "soflow": read_soflow,
    "imf": read_imf,
}
FLOWS: tuple[Family, ...] = get_args(SiTKind)  # of one time embedder


@dataclass(frozen=True)
class Outcome:
    """The checkpoint that `convert` wrote, and where each fact in it came from."""

    path: Path
    family: str
    weights: str
    recipe: Recipe
    stated: dict[str, Any]
    filled: dict[str, str]
    unread: tuple[str, ...]
    autoencoder: Path | None


def convert(source: Path, out: Path, options: ConvertOptions) -> Outcome:
    """Read a foreign checkpoint, translate it, check it against the network, and write ours."""
    check_out(out)
    foreign = _read(source, options)
    recipe = complete(foreign, out)
    if foreign.family == "dit":
        recipe = replace(recipe, model=replace(recipe.model, prediction="noise"))
    filled = foreign.file.filled
    facts = foreign.stated if foreign.latents.inside else filled
    facts["latents"] = foreign.latents.source
    check_latents(foreign.latents.mean, foreign.latents.std, recipe, foreign.latents.source)
    weights = _network_weights(foreign, recipe, source.name)
    folder = _write_autoencoder(foreign.autoencoder, out) if foreign.autoencoder else None
    origin = _origin(foreign, source, _autoencoder_record(folder, recipe))
    save_checkpoint(out, Checkpoint(weights, recipe, foreign.latents.mean, foreign.latents.std, origin))
    return Outcome(out, foreign.family, foreign.which, recipe, foreign.stated, filled, foreign.unread, folder)


def _network_weights(foreign: Imported, recipe: Recipe, where: str) -> dict[str, Tensor]:
    """The weights for our network.

    Names and shapes are checked before anything is built. Then time is turned where it runs the other way, and a
    missing second embedder is added.
    """
    one_embedder = foreign.family in FLOWS
    if differences := misfits(foreign.weights, recipe, without=("second_embed.",) if one_embedder else ()):
        raise AlphaflowError(f"{where}: not the weights of the network it describes ({differences}).")
    weights = turn_time(foreign.weights) if foreign.family == "sit" else foreign.weights
    if one_embedder:
        weights = add_second_embedder(weights, build_network(recipe).state_dict())
    return finite(weights, where)


def _read(source: Path, options: ConvertOptions) -> Imported:
    """Read the file by the family of --from, else by the one that its contents show. The two must not contradict."""
    check_path(source)
    tree = read_source(source)
    file = ForeignFile(tree, source, options)
    refuse_strangers(tree, source, file.arguments)
    evident = _family_by_content(file)
    family = options.family if options.family != "auto" else evident or refuse_unknown(_names(tree), source)
    if evident and evident != family:
        raise AlphaflowError(
            f"{source.name}: --from {family}, but the names and arguments in it are those of {evident}. "
            f"Leave --from out, or say --from {evident}"
        )
    if family in FLOWS:
        return read_sit(file, cast(SiTKind, family))
    return READERS[family](file)


def _names(tree: dict[str, Any]) -> dict[str, Any]:
    tables = [tree.get(key) for key in ("ema", "net", "model_ema", "model", "ema_model")] + [tree]
    table = next((table for table in tables if isinstance(table, dict) and table), {})
    return {bare_name(name): value for name, value in table.items()}


def _family_by_content(file: ForeignFile) -> Family | None:
    """What the names, or the arguments kept beside them, can only be."""
    names = _names(file.tree)
    if looks_published(names):
        return "alphaflow"
    if looks_imf(names):
        return "imf"
    if fastgen_tables(file.tree) or FASTGEN in names:
        return "fastgen"
    if names.keys() & {SOFLOW, f"network.{SOFLOW}"}:
        return "soflow"
    if "r_embedder.mlp.0.weight" in names:
        return "meanflow"
    return looks_like_sit(names, file.arguments)


def _autoencoder_record(folder: Path | None, recipe: Recipe) -> dict[str, str]:
    """How the checkpoint names its autoencoder.

    One from inside the file is loaded once, which proves it whole, and is known by its hash from now on.
    """
    name = recipe.data.autoencoder
    if folder is None or name != folder.name:
        return {"id": name, "revision": "", "weights_sha256": ""}
    loaded = load_autoencoder(str(folder), device=torch.device("cpu"))
    return {"id": name, "revision": "", "weights_sha256": loaded.weights_sha256}


def _origin(foreign: Imported, source: Path, autoencoder: dict[str, str]) -> dict[str, Any]:
    """What the new checkpoint says about where it comes from: like a trained one, and by which conversion."""
    converted = {
        "from": foreign.family,
        "file": source.name,
        "sha256": sha256_of(source),
        "said": foreign.stated,
        "filled": foreign.file.filled,
        "unread": list(foreign.unread),
    }
    known = {"step": foreign.step} if foreign.step is not None else {}
    return known | {
        "weights": foreign.which,
        "autoencoder": autoencoder,
        "class_names": [],
        "versions": {"torch": str(torch.__version__)},
        "converted": converted,
    }


def _write_autoencoder(weights: dict[str, Tensor], out: Path) -> Path:
    """Write the autoencoder as a diffusers folder beside the checkpoint. Its architecture is read off the shapes."""
    folder = autoencoder_folder(out)
    try:
        config = kl_config(weights)
    except (KeyError, ValueError, IndexError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise AlphaflowError(f"{out.name}: the autoencoder in the snapshot is no whole one ({reason}).") from error
    tensors = {name: value.detach().float().contiguous() for name, value in weights.items()}
    if (folder / AUTOENCODER_FILE).exists() and not _holds(folder / AUTOENCODER_FILE, tensors):
        raise AlphaflowError(
            f"{folder}: holds another autoencoder, which is not overwritten: a checkpoint may need it. Convert to "
            "another name, or move the folder away."
        )
    folder.mkdir(exist_ok=True)
    write_by(folder / AUTOENCODER_FILE, partial(save_file, tensors))
    text = json.dumps({"_class_name": "AutoencoderKL", **config}, indent=2) + "\n"
    write_whole(folder / "config.json", text)
    return folder


def _holds(path: Path, tensors: dict[str, Tensor]) -> bool:
    """Whether a file holds these very tensors."""
    held = read_source(path)
    if {name: value.dtype for name, value in held.items()} != {name: value.dtype for name, value in tensors.items()}:
        return False
    return all(torch.equal(held[name], value) for name, value in tensors.items())
