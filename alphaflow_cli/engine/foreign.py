"""Reference statistics of other systems: their files read into mean and covariance, without running what is in them.

    .npz  mu, sigma              ADM (also with mu_s, sigma_s, arr_0), EDM, MAR
    .npz  ref_mu, ref_sigma      MeanFlow and iMF in JAX: their Inception resizes with half-pixel centres
    .pkl  {fid: {mu, sigma}, fd_dinov2: {…}, num_images}           EDM2
    .pkl  {raw_mean, raw_cov, num_items, …}                        α-Flow and the StyleGAN family: sums, over N
    .pt   {mu, sigma}                                              torch-fidelity's cache

A pickle may name numpy's own constructors and nothing else.
"""

import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor

from alphaflow_cli.errors import DAMAGE, AlphaflowError
from alphaflow_cli.text import brief

TF1 = "TensorFlow 1 bilinear to 299 px (no half-pixel shift, no antialias); (x − 128)/128"
HALF_PIXEL = "bilinear to 299 px with half-pixel centres (the JAX port of MeanFlow and iMF)"
TF1_DINO = "TensorFlow 1 bilinear to 224 px; ImageNet mean and deviation (torch-fidelity's, not FDD's)"
BROKEN = (EOFError, RuntimeError, OverflowError, MemoryError, struct.error, zipfile.BadZipFile, zlib.error)  # of zips
BY_DIM = {2048: "inception", 1024: "dinov2", 768: "clip", 192: "tiny"}


@dataclass(frozen=True)
class ForeignStats:
    """Moments of one feature space; empty strings where the file does not tell."""

    name: str  # of the extractor
    mean: Tensor
    cov: Tensor
    preprocessing: str
    count: int | None
    kind: str


def read_foreign(path: Path) -> list[ForeignStats]:
    """By suffix and content."""
    readers = {".npz": _read_npz, ".pkl": _read_pickle, ".pickle": _read_pickle, ".pt": _read_cache}
    if path.suffix not in readers:
        raise AlphaflowError(f"{path}: not a reference file (.safetensors, .npz, .pkl, .pt) and not pictures")
    try:
        return readers[path.suffix](path)
    except (*DAMAGE, *BROKEN, pickle.UnpicklingError) as fault:
        raise AlphaflowError(f"{path}: cannot be read as reference statistics ({fault})") from fault


def holds_statistics(path: Path) -> bool:
    """An .npz of moments, as opposed to one of pictures only."""
    try:
        return bool({"mu", "ref_mu"} & set(read_npz(path, ())[0]))
    except ValueError as fault:
        raise AlphaflowError(f"{path}: not a readable .npz ({fault}). Make it, or fetch it, again") from fault


def read_npz(path: Path, wanted: Iterable[str]) -> tuple[list[str], dict[str, Any]]:
    """The names of all arrays in an .npz, and those arrays of the wanted ones that it has.

    Any damage is a ValueError. (Of an empty file numpy makes an EOFError, which click takes for Ctrl-D.)
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if not isinstance(archive, NpzFile):
                raise ValueError("it is one array, as .npy files are")
            return archive.files, {name: archive[name] for name in wanted if name in archive.files}
    except (*DAMAGE, *BROKEN) as fault:
        raise ValueError(brief(fault)) from fault


def _read_npz(path: Path) -> list[ForeignStats]:
    names, held = read_npz(path, ("ref_mu", "ref_sigma", "mu", "sigma"))
    if "ref_mu" in names:
        return [_stats(held["ref_mu"], held["ref_sigma"], HALF_PIXEL, None, kind="MeanFlow npz")]
    if "mu" not in names or "sigma" not in names:
        raise ValueError(f"it holds {', '.join(sorted(names))}; mu and sigma, or ref_mu and ref_sigma, are due")
    kind = "ADM npz" if set(names) & {"mu_s", "sigma_s", "arr_0"} else "npz of mu, sigma (ADM, EDM)"
    return [_stats(held["mu"], held["sigma"], TF1, None, kind=kind)]


def _read_pickle(path: Path) -> list[ForeignStats]:
    with path.open("rb") as file:
        held = _NumpyOnly(file).load()
    if not isinstance(held, dict):
        raise ValueError("it holds no dictionary")
    if "raw_mean" in held:
        return [_from_sums(held)]
    count = int(held["num_images"]) if "num_images" in held else None
    known = {"fid": TF1, "fd_dinov2": ""}
    found = [
        _stats(held[key]["mu"], held[key]["sigma"], known[key], count, kind="EDM2 pkl") for key in known if key in held
    ]
    if not found:
        raise ValueError(f"it holds {', '.join(map(str, held))}; fid, fd_dinov2 or raw_mean is due")
    return found


def _from_sums(held: dict[str, Any]) -> ForeignStats:
    """Σf and Σf·fᵀ with N: their covariance is over N, ours over N − 1."""
    count = int(held["num_items"])
    mean = np.asarray(held["raw_mean"], np.float64) / count
    cov = (np.asarray(held["raw_cov"], np.float64) - count * np.outer(mean, mean)) / (count - 1)
    preprocessing = TF1 if mean.size == 2048 else ""
    return _stats(mean, cov, preprocessing, count, kind="α-Flow pkl")


def _read_cache(path: Path) -> list[ForeignStats]:
    rebuild: Any = np.zeros(0).__reduce__()[0]  # its module has moved between versions of numpy; files name either
    places = [(rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    dtypes = [type(np.dtype(code)) for code in (np.float32, np.float64)]
    with torch.serialization.safe_globals([np.ndarray, np.dtype, *dtypes, *places]):
        held = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(held, dict) or "mu" not in held:
        raise ValueError("it is no cache of mu and sigma")
    dino = "dinov2" in path.name
    return [_stats(held["mu"], held["sigma"], TF1_DINO if dino else TF1, None, kind="torch-fidelity cache")]


def _stats(mean: Any, cov: Any, preprocessing: str, count: int | None, *, kind: str) -> ForeignStats:
    mean, cov = torch.as_tensor(mean).double().flatten(), torch.as_tensor(cov).double()
    dim = mean.numel()
    if tuple(cov.shape) != (dim, dim):
        raise ValueError(f"mean of {dim} and covariance of {tuple(cov.shape)} do not fit")
    if dim not in BY_DIM:
        raise ValueError(f"features of dimension {dim}; known are {', '.join(map(str, BY_DIM))}")
    return ForeignStats(BY_DIM[dim], mean, cov, preprocessing, count, kind)


class _NumpyOnly(pickle.Unpickler):
    """Builds numpy arrays and plain containers; any other name in the file is refused."""

    ALLOWED = frozenset(
        [(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")]
        + [(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")]
        + [("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"), ("collections", "OrderedDict")]
    )

    def find_class(self, module: str, name: str) -> Any:
        """Only what is allowed; the StyleGAN family's attribute dictionaries become plain ones."""
        if module.startswith("dnnlib") and name == "EasyDict":
            return dict
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a file of statistics has no need of")
        return super().find_class(module.replace("numpy.core", "numpy._core") if _NEW_NUMPY else module, name)


_NEW_NUMPY = int(np.__version__.split(".")[0]) >= 2
