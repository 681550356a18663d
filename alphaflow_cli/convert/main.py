"""`convert`: a neighbour's file to a checkpoint of ours, and ours to the published form."""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file
from torch import Tensor

from alphaflow_cli.convert.imported import FAMILIES, Family, Imported, Options, autoencoder_folder, complete
from alphaflow_cli.convert.published import looks_published, published_tree, read_published
from alphaflow_cli.convert.shape import check_fit, finite
from alphaflow_cli.convert.sit import add_second_embedder, fields, looks_like, read_sit, turn_time
from alphaflow_cli.convert.source import read_source
from alphaflow_cli.engine.build import build_network
from alphaflow_cli.engine.checkpoint import Checkpoint, check_latents, load_checkpoint, save_checkpoint
from alphaflow_cli.engine.files import write_atomically
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.nn.autoencoder import load_autoencoder
from alphaflow_cli.nn.autoencoder_files import kl_config
from alphaflow_cli.recipe import Recipe

__all__ = ["FAMILIES", "Options", "Outcome", "convert", "export"]
AUTOENCODER_FILE = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Outcome:
    """What was made, and where each fact came from."""

    path: Path
    family: str
    weights: str
    recipe: Recipe
    said: dict[str, Any]
    filled: dict[str, str]
    autoencoder: Path | None


def convert(source: Path, out: Path, options: Options) -> Outcome:
    """Read, translate, check against the network, write."""
    _check_out(source, out)
    foreign = _read(source, options)
    recipe = complete(foreign, options, out)
    if foreign.family == "dit":
        recipe = replace(recipe, model=replace(recipe.model, prediction="noise"))
    facts = foreign.said if foreign.latents.inside else foreign.filled
    facts["latents"] = foreign.latents.source
    check_latents(foreign.latents.mean, foreign.latents.std, recipe, foreign.latents.source)
    weights = _network_weights(foreign, recipe, source.name)
    folder = _write_autoencoder(foreign.autoencoder, out) if foreign.autoencoder else None
    origin = _origin(foreign, source, _autoencoder_record(folder, recipe))
    save_checkpoint(out, Checkpoint(weights, recipe, foreign.latents.mean, foreign.latents.std, origin))
    return Outcome(out, foreign.family, foreign.which, recipe, foreign.said, foreign.filled, folder)


def _network_weights(foreign: Imported, recipe: Recipe, where: str) -> dict[str, Tensor]:
    """Checked by names and shapes before anything is built, then with our time and the embedder that is missing."""
    one_embedder = foreign.family in ("sit", "dit")
    check_fit(foreign.weights, recipe, where, without=("second_embed.",) if one_embedder else ())
    weights = turn_time(foreign.weights) if foreign.family == "sit" else foreign.weights
    if one_embedder:
        weights = add_second_embedder(weights, build_network(recipe).state_dict())
    return finite(weights, where)


def _check_out(source: Path, out: Path) -> None:
    if not out.parent.is_dir():
        raise AlphaflowError(f"{out.parent}: no such folder; make it first.")
    if out.exists():
        raise AlphaflowError(f"{out}: exists already, and is not overwritten. Choose another name or remove it.")


def _read(source: Path, options: Options) -> Imported:
    """By --from, else by what only one family has; a file that says another family is not forced."""
    tree = read_source(source)
    said = _said_family(tree)
    family = options.family if options.family != "auto" else said or _unknown(tree, source)
    if said and said != family:
        raise AlphaflowError(
            f"{source.name}: --from {family}, but the names and arguments in it are those of {said}. "
            f"Leave --from out, or say --from {said}"
        )
    if family == "alphaflow":
        return read_published(tree, source, options)
    assert family in ("sit", "dit", "meanflow"), family
    return read_sit(tree, source, options, family)


def _names(tree: dict[str, Any]) -> dict[str, Any]:
    tables = [tree.get(key) for key in ("ema", "net", "model")] + [tree]
    table = next((table for table in tables if isinstance(table, dict) and table), {})
    return {str(name).replace("_orig_mod.", "").removeprefix("module."): value for name, value in table.items()}


def _said_family(tree: dict[str, Any]) -> Family | None:
    """What the names, or the arguments kept beside them, can only be."""
    names = _names(tree)
    return "alphaflow" if looks_published(names) else looks_like(names, fields(tree))


def _unknown(tree: dict[str, Any], source: Path) -> NoReturn:
    names = _names(tree)
    if "t_embedder.mlp.0.weight" in names:
        raise AlphaflowError(
            f"{source.name}: SiT and DiT have the same tables of weights, and the file does not say which it is: "
            "they mean opposite things by t. Say it: --from sit, or --from dit"
        )
    some = next(iter(names), "nothing")
    raise AlphaflowError(
        f"{source.name}: a checkpoint of another family (it holds {some!r}, …). Known: the published α-Flow and "
        "MeanFlow snapshots, SiT, DiT, and the PyTorch MeanFlow of zhuyu-cs"
    )


def _autoencoder_record(folder: Path | None, recipe: Recipe) -> dict[str, str]:
    """The one inside is loaded once, which proves it whole, and known by its hash from now on."""
    name = recipe.data.autoencoder
    if folder is None or name != folder.name:
        return {"id": name, "revision": "", "weights_sha256": ""}
    loaded = load_autoencoder(str(folder), device=torch.device("cpu"))
    return {"id": name, "revision": "", "weights_sha256": loaded.weights_sha256}


def _origin(foreign: Imported, source: Path, autoencoder: dict[str, str]) -> dict[str, Any]:
    """Like a trained checkpoint's, and how it came here."""
    converted = {
        "from": foreign.family,
        "file": source.name,
        "sha256": _sha256(source),
        "said": foreign.said,
        "filled": foreign.filled,
    }
    known = {"step": foreign.step} if foreign.step is not None else {}
    return known | {
        "weights": foreign.which,
        "autoencoder": autoencoder,
        "class_names": [],
        "versions": {"torch": str(torch.__version__)},
        "converted": converted,
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _write_autoencoder(weights: dict[str, Tensor], out: Path) -> Path:
    """A diffusers folder beside the checkpoint; the architecture is read off the shapes."""
    folder = autoencoder_folder(out)
    try:
        config = kl_config(weights)
    except (KeyError, ValueError) as error:
        raise AlphaflowError(f"{out.name}: the autoencoder in the snapshot lacks {error}.") from error
    folder.mkdir(exist_ok=True)
    tensors = {name: value.detach().float().contiguous() for name, value in weights.items()}
    write_atomically(folder / AUTOENCODER_FILE, partial(save_file, tensors))
    text = json.dumps({"_class_name": "AutoencoderKL", **config}, indent=2) + "\n"
    write_atomically(folder / "config.json", partial(_write_text, text))
    return folder


def _write_text(text: str, path: Path) -> None:
    path.write_text(text)


def export(source: Path, out: Path) -> Path:
    """`--to alphaflow`: the published names, with the statistics, and the autoencoder where it lies beside."""
    _check_out(source, out)
    checkpoint = load_checkpoint(source)
    if checkpoint.recipe.model.prediction != "velocity" or checkpoint.recipe.model.second_time != "t-r":
        raise AlphaflowError(
            f"{source}: the published system knows networks that give u from t and t − r only; this one has "
            f"prediction {checkpoint.recipe.model.prediction}, second_time {checkpoint.recipe.model.second_time}."
        )
    beside = source.parent / checkpoint.recipe.data.autoencoder / AUTOENCODER_FILE
    autoencoder = read_source(beside) if beside.is_file() else {}
    with torch.device("meta"):
        order = build_network(checkpoint.recipe).state_dict()  # safetensors sorts the names
    weights = {name: checkpoint.weights[name] for name in order}
    tree = published_tree(weights, checkpoint.recipe, checkpoint.mean, checkpoint.std, autoencoder)
    write_atomically(out, partial(torch.save, tree))
    return out
