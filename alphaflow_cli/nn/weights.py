"""Files of weights: where those of the feature networks lie, what to do without one, and how any is read and checked.

Nothing is downloaded here: an evaluation that starts a 1.2 GB download by surprise, or hangs behind a firewall, is
worse than one clear line. Pickles are read with `weights_only=True`, so a file from anywhere may be tried.
"""

import os
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import is_there, user_path
from alphaflow_cli.remote.cache import cached_file


class MissingWeights(AlphaflowError):
    """A network's weights are in none of the usual places: what does not need them can still be measured."""


@dataclass(frozen=True)
class WeightFile:
    """One published set of weights and the names its file goes by."""

    extractor: str  # name on the command line
    title: str
    url: str
    names: tuple[str, ...]  # in a folder of weights or in torch's hub cache; the first is the one we ask for
    hub_repos: tuple[str, ...]  # repositories whose snapshots may lie in the Hugging Face cache
    sha256: str  # known prefix of the hash; empty where none is published
    megabytes: int
    licence: str
    metrics: str


INCEPTION = WeightFile(
    extractor="inception",
    title="Inception-v3 of 2015-12-05, as converted by torch-fidelity",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    names=("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
    hub_repos=(),
    sha256="6726825d",
    megabytes=96,
    licence="Apache-2.0",
    metrics="fid, kid, is, pr",
)
DINOV2 = WeightFile(
    extractor="dinov2",
    title="DINOv2 ViT-L/14",
    url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    names=("dinov2_vitl14_pretrain.pth", "dinov2_vitl14.safetensors"),
    hub_repos=("timm/vit_large_patch14_dinov2.lvd142m", "facebook/dinov2-large"),
    sha256="",
    megabytes=1217,
    licence="Apache-2.0",
    metrics="fdd",
)
CLIP = WeightFile(
    extractor="clip",
    title="CLIP ViT-L/14",
    url="https://openaipublic.azureedge.net/clip/models/"
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    names=(
        "clip-vit-l-14-b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836.pt",
        "ViT-L-14.pt",
        "clip_vitl14.safetensors",
    ),
    hub_repos=("timm/vit_large_patch14_clip_224.openai",),
    sha256="b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    megabytes=933,
    licence="MIT",
    metrics="fcd",
)
FILES = {each.extractor: each for each in (INCEPTION, DINOV2, CLIP)}


def find_weights(wanted: WeightFile, given: Path | None) -> Path:
    """Find the file: given by hand, in $ALPHAFLOW_WEIGHTS, in torch's hub cache, or in the Hugging Face cache."""
    if given is not None and not given.is_dir():
        if not given.is_file():
            raise AlphaflowError(f"{given}: no such weight file for the {wanted.extractor} features")
        return given
    for path in _candidates(wanted, given):
        if path.is_file():
            return path
    raise MissingWeights(_how_to_get(wanted))


def missing_weights(wanted: WeightFile) -> str | None:
    """The line to show when the file is in none of its usual places; None when it is there."""
    return None if any(map(is_there, _candidates(wanted, None))) else _how_to_get(wanted)


def _candidates(wanted: WeightFile, given: Path | None) -> list[Path]:
    folders = [given] if given is not None else []
    if os.environ.get("ALPHAFLOW_WEIGHTS"):
        folders.append(user_path(os.environ["ALPHAFLOW_WEIGHTS"]))
    folders.append(Path(torch.hub.get_dir()) / "checkpoints")
    paths = [folder / name for folder in folders for name in wanted.names]
    for repo in wanted.hub_repos:
        downloaded = cached_file(repo, "model.safetensors")
        paths += [downloaded] if downloaded else []
    return paths


def _how_to_get(wanted: WeightFile) -> str:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    check = f", sha256 {wanted.sha256[:8]}…" if wanted.sha256 else ""
    need = "need" if "," in wanted.metrics else "needs"
    return (
        f"{wanted.title} is not on this machine: {wanted.metrics} {need} {wanted.names[0]} "
        f"({wanted.megabytes} MB, {wanted.licence}{check}). Get it with\n"
        f"  curl -L --create-dirs -o {folder / wanted.names[0]} {wanted.url}\n"
        f"or name a copy with --weights {wanted.extractor}=FILE or a folder in $ALPHAFLOW_WEIGHTS. "
        "Meanwhile --metrics fd-tiny needs no weights."
    )


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a safetensors file, a plain checkpoint or a TorchScript archive."""
    state = read_tree(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise AlphaflowError(f"{path}: holds no plain table of weights")
    return state


def read_tree(path: Path) -> object:
    """Read whatever a file of weights holds: a table, or a tree with tables in it. No pickled code is run."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return _load_torchscript(path) if _is_torchscript(path) else torch.load(path, "cpu", weights_only=True)
    except MemoryError:  # the machine's, not the file's
        raise
    except Exception as error:  # unpickling a broken or hostile file raises anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if reason.startswith("Weights only load failed"):  # torch's advice is to run what the file says
            reason = "it is no file of weights, or holds more than tensors"
        raise AlphaflowError(f"{path}: not a readable weight file ({reason})") from error


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _load_torchscript(path: Path) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # deprecated, but OpenAI's file is of this kind
        warnings.simplefilter("ignore", FutureWarning)
        module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    state: dict[str, Tensor] = dict(module.state_dict())
    return state


def check_real(weights: Mapping[str, Tensor], where: object) -> None:
    """Refuse weights that are no floating-point numbers: loading would turn truths or complex numbers into such."""
    for name, value in weights.items():
        if not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise AlphaflowError(f"{where}: {name} holds {kind} values, a weight is a floating-point number.")


def unlike(wanted: Mapping[str, tuple[int, ...]], there: Mapping[str, Tensor]) -> str:
    """How a table of weights differs from the names and shapes that are wanted; empty where it does not."""
    wrong = [name for name in wanted.keys() & there.keys() if wanted[name] != tuple(there[name].shape)]
    parts = {
        "missing": sorted(wanted.keys() - there.keys()),
        "unknown": sorted(there.keys() - wanted.keys()),
        "of another shape": sorted(wrong),
    }
    return "; ".join(f"{len(names)} {what}, such as {names[0]}" for what, names in parts.items() if names)


def fit_weights(net: torch.nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load weights into a network strictly; a misfit names the file and the first keys on either side."""
    wanted = net.state_dict()
    if misfit := unlike({name: tuple(value.shape) for name, value in wanted.items()}, state):
        raise AlphaflowError(f"{path}: these are weights of another network ({misfit})")
    check_real({key: state[key] for key, value in wanted.items() if value.is_floating_point()}, path)
    net.load_state_dict(state)
