"""Latents that other systems wrote, read as rows of a store: one function for each form whose layout is known exactly.

    dit-npy              imagenet256_features/N.npy (1, C, h, w) float32 and imagenet256_labels/N.npy (1,): one drawn
                         latent, times 0.18215 (fast-DiT)
    lightningdit         *.safetensors with latents, latents_flip (n, C, h, w) and labels (n,): drawn latents, not
                         scaled; latents_stats.pt with mean and std (1, C, 1, 1) beside them
    repa                 dataset.json {"labels": [[name, label], …]} and NNNNN/img-mean-std-NNNNNNNN.npy (2C, h, w)
                         float32: the posterior's mean and std, not scaled
    lmdb                 keys num_samples, 0, 1, …: a pickled {moments, moments_flip (2C, h, w), label}: the
                         posterior's mean and LOG-VARIANCE, not scaled (PyTorch MeanFlow)
    moments-safetensors  *.safetensors with moments (n, 2C, h, w), perhaps moments_flip, and labels or label (n,):
                         mean, then whatever --second says

Nothing is executed: no pickle but the arrays of `lmdb`, no torch.load but with weights_only.
"""

import importlib
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from alphaflow_cli.data.manifest import RowKind
from alphaflow_cli.documents import Anything, ListOf, Maybe, Table, read_json
from alphaflow_cli.errors import DAMAGE, AlphaflowError
from alphaflow_cli.nn.autoencoder_classes import LOGVAR
from alphaflow_cli.tensors import Array, NumpyUnpickler
from alphaflow_cli.text import brief, counted

Form = Literal["dit-npy", "lightningdit", "repa", "lmdb", "moments-safetensors"]
Second = Literal["std", "logvar"]
RawRows = dict[str, Array]  # kind, and kind_flip where there are mirror images
DIT_SCALE = 0.18215  # that fast-DiT multiplies its latents by
REFUSED = {  # forms by whose name people ask, and why they are not read
    "alphaflow": "the published trainer keeps one file per picture in a form that is not documented",
    "edm2": "an archive of EDM2's own tools",
    "jax": "TensorFlow records or JAX arrays of MeanFlow and iMF in JAX",
    "npz": "an .npz does not say what its arrays are",
    "tfds": "TensorFlow records",
    "webdataset": "tars of latents are written in several ways, and none says its own",
}
DAMAGED = (*DAMAGE, SafetensorError, pickle.UnpicklingError, EOFError, MemoryError, RuntimeError, ArithmeticError)


@dataclass(frozen=True)
class ForeignLatents:
    """The latents of a source: how many, what they are called, and a way to read some of them."""

    kind: RowKind  # moments or mean
    latent: tuple[int, int, int]  # C, h, w
    flips: bool
    names: Sequence[str]
    labels: Array  # (n,) int64
    read: Callable[[int, int], RawRows]  # rows start … stop − 1, float32, as stored: raw, the std and not its logarithm
    statistics: tuple[list[float], list[float]] | None = None  # mean and std per channel, where the source states them


def check_form(form: str) -> None:
    """Refuse a form that is not read, by its name."""
    if form in REFUSED:
        raise AlphaflowError(f"--from {form}: not read ({REFUSED[form]}). Encode the pictures: alphaflow prep-latents")
    if form not in get_args(Form):
        raise AlphaflowError(f"--from {brief(form)}: not known. Known are {', '.join(get_args(Form))}")


def open_foreign(source: Path, form: str, *, scale: float | None, second: Second | None) -> ForeignLatents:
    """Open latents of a known form; another one is refused by its name."""
    check_form(form)
    if second is not None and form != "moments-safetensors":
        raise AlphaflowError(f"--second: {form} says itself what its second half is. Leave --second out")
    if scale is not None and form != "dit-npy":
        raise AlphaflowError(f"--scale: the latents of {form} are not scaled. Leave --scale out")
    if not source.is_dir():
        raise AlphaflowError(f"{brief(source)}: no folder. Latents of the form {form} lie in one: unpack an archive")
    openers: dict[str, Callable[[], ForeignLatents]] = {
        "dit-npy": lambda: open_dit(source, scale or DIT_SCALE),
        "lightningdit": lambda: open_shards_of(source, "latents", None),
        "repa": lambda: open_repa(source),
        "lmdb": lambda: open_lmdb(source),
        "moments-safetensors": lambda: open_shards_of(source, "moments", second),
    }
    return openers[form]()


def open_dit(source: Path, scale: float) -> ForeignLatents:
    """Open fast-DiT's pair of folders; the files belong together by their numbers."""
    folders = {end: sorted(source.glob(f"*_{end}")) for end in ("features", "labels")}
    if any(len(paths) != 1 for paths in folders.values()):
        raise AlphaflowError(f"{brief(source)}: dit-npy wants one folder *_features and one *_labels in it")
    features, labels = folders["features"][0], folders["labels"][0]
    names = sorted((path.name for path in features.glob("*.npy")), key=_numbered)
    _some(names, features, "N.npy")
    if lost := sorted({path.name for path in labels.glob("*.npy")} - set(names), key=_numbered):
        raise AlphaflowError(
            f"{brief(source)}: {lost[0]} is in {labels.name} and not in {features.name} "
            f"({counted(len(lost), 'such file')}). Copy the latents again"
        )
    shape = _array(features / names[0]).shape
    if len(shape) != 4 or shape[0] != 1 or shape[2] != shape[3]:
        raise AlphaflowError(f"{features / names[0]}: has the shape {shape}; dit-npy writes (1, C, side, side)")
    numbers = [_array(labels / name, (1,)) for name in names]

    def read(start: int, stop: int) -> RawRows:
        return {"mean": np.concatenate([_array(features / name, shape) for name in names[start:stop]]) / scale}

    return ForeignLatents("mean", shape[1:], False, names, _labels(np.concatenate(numbers), labels), read)


def open_repa(source: Path) -> ForeignLatents:
    """Open REPA's folder `vae-sd`, or the folder that holds it."""
    folder = source / "vae-sd" if (source / "vae-sd").is_dir() else source
    path = folder / "dataset.json"
    if not path.is_file():
        raise AlphaflowError(f"{brief(folder)}: repa wants a dataset.json with the labels in it")
    shape = Table({"labels": Maybe(ListOf(ListOf(Anything(), 2, 2), most=1 << 30))}, others=Anything())
    pairs = read_json(path, shape, limit=1 << 30, advice="Encode the pictures with prep-latents.")["labels"]
    if not pairs:
        raise AlphaflowError(f"{path}: holds no labels. Encode the pictures with prep-latents, which finds classes")
    if not all(isinstance(name, str) and type(label) is int for name, label in pairs):
        raise AlphaflowError(f"{path}: labels should be [[name, number], …]")
    names = [name for name, _ in pairs]
    if outside := next((name for name in names if Path(name).is_absolute() or ".." in Path(name).parts), ""):
        raise AlphaflowError(f"{path}: {brief(outside)} leads out of the folder")
    there = _array(folder / names[0]).shape
    if len(there) != 3 or there[0] % 2 or there[1] != there[2]:
        raise AlphaflowError(f"{folder / names[0]}: has the shape {there}; repa writes (2C, side, side), mean and std")

    def read(start: int, stop: int) -> RawRows:
        return {"moments": np.stack([_array(folder / name, there) for name in names[start:stop]])}

    latent = (there[0] // 2, there[1], there[2])
    return ForeignLatents("moments", latent, False, names, _labels(np.array([label for _, label in pairs]), path), read)


def open_shards_of(source: Path, tensor: str, second: Second | None) -> ForeignLatents:
    """Open safetensors files that hold `tensor`, perhaps `tensor`_flip, and labels; in the order of their names."""
    files = sorted(source.glob("*.safetensors"))
    _some(files, source, "*.safetensors")
    heads = [_head(path, tensor) for path in files]
    shape, flips = heads[0].shape, heads[0].flips
    for path, head in zip(files, heads, strict=True):
        if (head.shape, head.flips) != (shape, flips):
            raise AlphaflowError(
                f"{path}: its {tensor} differ in shape, or in mirror images, from those of {files[0].name}"
            )
    if tensor == "moments" and second is None:
        raise AlphaflowError(
            f"{brief(source)}: does not say what follows the mean: give --second std, or --second logvar (as "
            "latent_dist.parameters of diffusers is)"
        )
    if tensor == "moments" and shape[0] % 2:
        raise AlphaflowError(f"{files[0]}: moments of {shape[0]} channels are no mean with its second half")
    starts = np.cumsum([0, *(len(head.labels) for head in heads)])

    def read(start: int, stop: int) -> RawRows:
        return _rows_of(files, starts, (start, stop), tensor, flips=flips, second=second)

    names = [f"{path.name}/{row}" for path, head in zip(files, heads, strict=True) for row in range(len(head.labels))]
    _some(names, source, tensor)
    kind: RowKind = "moments" if tensor == "moments" else "mean"
    latent = (shape[0] // 2 if tensor == "moments" else shape[0], shape[1], shape[2])
    labels = np.concatenate([head.labels for head in heads])
    return ForeignLatents(kind, latent, flips, names, labels, read, _stated(source / "latents_stats.pt", latent[0]))


@dataclass(frozen=True)
class ShardHead:
    """What a file of latents holds."""

    shape: tuple[int, ...]  # of a row
    flips: bool
    labels: Array


def _head(path: Path, tensor: str) -> ShardHead:
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            label = next((name for name in ("labels", "label") if name in keys), "")
            if tensor not in keys or not label:
                raise AlphaflowError(
                    f"{path}: holds {', '.join(sorted(keys)) or 'nothing'}; {tensor} and labels are wanted"
                )
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in {tensor, f"{tensor}_flip"} & keys}
            labels = file.get_tensor(label).numpy()
    except DAMAGED as fault:
        raise AlphaflowError(f"{path}: cannot be read as safetensors ({brief(fault)})") from fault
    shape = shapes[tensor]
    if len(shape) != 4 or shape[2] != shape[3] or shape[:1] != labels.shape or set(shapes.values()) != {shape}:
        raise AlphaflowError(f"{path}: {tensor} of the shape {shape} and {labels.shape} labels do not go together")
    return ShardHead(shape[1:], f"{tensor}_flip" in shapes, _labels(labels, path))


def _rows_of(
    files: Sequence[Path], starts: Array, span: tuple[int, int], tensor: str, *, flips: bool, second: Second | None
) -> RawRows:
    """The rows of a span, which may lie in several files."""
    pieces: dict[str, list[Array]] = {tensor: [], **({f"{tensor}_flip": []} if flips else {})}
    first = int(np.searchsorted(starts, span[0], "right")) - 1
    for number in range(first, len(files)):
        low, high = max(span[0], int(starts[number])), min(span[1], int(starts[number + 1]))
        if low >= high:
            break
        try:
            with safe_open(files[number], framework="pt") as file:
                for name, rows in pieces.items():
                    part = file.get_slice(name)[low - starts[number] : high - starts[number]]
                    rows.append(part.float().numpy())
        except DAMAGED as fault:
            raise AlphaflowError(f"{files[number]}: cannot be read as safetensors ({brief(fault)})") from fault
    joined = {name.replace("latents", "mean"): np.concatenate(rows) for name, rows in pieces.items()}
    return {name: _with_std(rows) for name, rows in joined.items()} if second == "logvar" else joined


def _with_std(rows: Array) -> Array:
    """Mean and log-variance as mean and standard deviation, as every AutoencoderKL takes it."""
    mean, logvar = np.split(rows.astype(np.float32), 2, axis=1)
    return np.concatenate([mean, np.exp(0.5 * np.clip(logvar, *LOGVAR))], axis=1)


def _stated(path: Path, channels: int) -> tuple[list[float], list[float]] | None:
    """The mean and std of latents_stats.pt, read with weights_only; None where there is no such file."""
    if not path.is_file():
        return None
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
        mean, std = (held[name].double().flatten().tolist() for name in ("mean", "std"))
    except (*DAMAGED, KeyError, TypeError, AttributeError) as fault:
        raise AlphaflowError(f"{path}: is no table of the tensors mean and std ({brief(fault)})") from fault
    if len(mean) != channels or len(std) != channels or not all(value > 0 for value in std):
        raise AlphaflowError(f"{path}: mean and std should be {channels} numbers each, and each std above 0")
    return mean, std


def open_lmdb(source: Path) -> ForeignLatents:
    """Open PyTorch MeanFlow's cache of moments."""
    if not find_spec("lmdb"):
        raise AlphaflowError("--from lmdb needs the package lmdb, which is not here: pip install lmdb")
    lmdb: Any = importlib.import_module("lmdb")
    try:
        store = lmdb.open(str(source), readonly=True, lock=False, readahead=False, meminit=False, create=False)
        with store.begin() as reading:
            count = int(bytes(reading.get(b"num_samples") or b"none").decode())
    except (lmdb.Error, ValueError) as fault:
        raise AlphaflowError(f"{brief(source)}: no LMDB with num_samples in it ({brief(fault)})") from fault

    def entry(row: int) -> Mapping[str, Any]:
        with store.begin() as reading:
            return _unpickled(reading.get(str(row).encode()), f"{source}: entry {row}")

    first = entry(0)
    shape = first["moments"].shape
    flips = "moments_flip" in first
    if len(shape) != 3 or shape[0] % 2 or shape[1] != shape[2]:
        raise AlphaflowError(f"{source}: moments have the shape {shape}; (2C, side, side) is wanted")
    names = ("moments", "moments_flip") if flips else ("moments",)

    def read(start: int, stop: int) -> RawRows:
        entries = [entry(row) for row in range(start, stop)]
        for row, each in enumerate(entries, start):
            if any(name not in each or each[name].shape != shape for name in names):
                raise AlphaflowError(f"{source}: entry {row}: has not the {' and '.join(names)} that entry 0 has")
        return {name: _with_std(np.stack([each[name] for each in entries])) for name in names}

    labels = _labels(np.array([entry(row).get("label") for row in range(count)]), source)
    latent = (shape[0] // 2, shape[1], shape[2])
    return ForeignLatents("moments", latent, flips, [str(row) for row in range(count)], labels, read)


def _unpickled(data: bytes | None, where: str) -> Mapping[str, Any]:
    """One entry of an LMDB; its pickle may name numpy's own constructors and nothing else."""
    try:
        held = NumpyUnpickler(io.BytesIO(data or b"")).load()
    except (*DAMAGED, KeyError, IndexError, TypeError, AttributeError) as fault:
        raise AlphaflowError(f"{where}: cannot be read ({brief(fault) if data else 'it is missing'})") from fault
    if not isinstance(held, dict) or not isinstance(held.get("moments"), np.ndarray):
        raise AlphaflowError(f"{where}: holds no moments")
    return held


def _array(path: Path, shape: tuple[int, ...] | None = None) -> Array:
    """One .npy file, never unpickled; of this shape, if one is given."""
    try:
        array: Array = np.load(path, allow_pickle=False)
    except DAMAGED as fault:
        raise AlphaflowError(f"{path}: cannot be read as .npy ({brief(fault)})") from fault
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise AlphaflowError(f"{path}: holds no numbers")
    if shape is not None and array.shape != shape:
        raise AlphaflowError(f"{path}: has the shape {array.shape}, the others have {shape}")
    return array


def _labels(labels: Array, where: Path) -> Array:
    """Labels as int64; anything but one whole number per picture is refused."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or (labels.astype(np.int64) < 0).any():  # or beyond int64
        raise AlphaflowError(f"{where}: labels should be one whole number, 0 or more, for each picture")
    return labels.astype(np.int64)


def _some(names: Sequence[object], folder: Path, what: str) -> None:
    if not names:
        raise AlphaflowError(f"{brief(folder)}: holds no {what}. Is it of another form? See --from")


def _numbered(name: str) -> tuple[int, str]:
    """Files by their numbers, 2 before 10."""
    stem = Path(name).stem
    return (int(stem), name) if stem.isdecimal() and len(stem) < 20 else (1 << 62, name)


def described_count(foreign: ForeignLatents) -> str:
    """What was found, in a few words."""
    shape = "×".join(str(length) for length in foreign.latent)
    return f"{counted(len(foreign.names), 'latent')} of {shape}{', with mirror images' if foreign.flips else ''}"
