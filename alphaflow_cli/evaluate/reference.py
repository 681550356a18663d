"""Reference statistics with their protocol inside: built from pictures, saved, loaded, refused where they do not fit.

One safetensors file holds, per network, `<network>.mean`, `<network>.cov` (float64) and `<network>.features` (float32,
of a random part of the pictures: KID and precision/recall need single features). Its header says what was measured.

Other systems' files are read into mean and covariance, without running what is in them. A pickle may name numpy's own
constructors and nothing else.

    .npz  mu, sigma              ADM (also with mu_s, sigma_s, arr_0), EDM, MAR
    .npz  ref_mu, ref_sigma      MeanFlow and iMF in JAX: their Inception resizes with half-pixel centres
    .pkl  {fid: {mu, sigma}, fd_dinov2: {…}, num_images}           EDM2
    .pkl  {raw_mean, raw_cov, num_items, …}                        α-Flow and the StyleGAN family: sums, over N
    .pt   {mu, sigma}                                              torch-fidelity's cache
"""

import hashlib
import json
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alphaflow_cli.core.frechet import Moments, frechet_distance
from alphaflow_cli.data.manifest import Crop
from alphaflow_cli.documents import Anything, ListOf, Maybe, Table, Text, Whole, parse_json
from alphaflow_cli.errors import DAMAGE, AlphaflowError
from alphaflow_cli.evaluate.features import Extractor
from alphaflow_cli.evaluate.measure import Pass, content_of, left_out_of, load_all
from alphaflow_cli.evaluate.networks import Inception
from alphaflow_cli.evaluate.pictures import BROKEN, crop_of, read_npz
from alphaflow_cli.evaluate.results import SPACE, FeatureSpace, environment, space_of
from alphaflow_cli.files import make_folder
from alphaflow_cli.runtime.progress import say
from alphaflow_cli.tensors import NumpyUnpickler, save_tensors
from alphaflow_cli.text import for_terminal

REFERENCE_FORMAT = "alphaflow-reference/1"
MOST_NAMED = 10  # of the pictures that were left out
KEPT_FEATURES = 10_000  # features kept one by one
DRAW_SEED = 2020  # of the part kept, and of the splits of the floor
REBUILD = "Build it again: alphaflow reference SOURCE -o FILE."
SPACES = Table(others=SPACE)
FACTS = Table(
    {"name": Text(300), "kind": Text(100), "count": Maybe(Whole(1)), "size": Maybe(ListOf(Whole(1, 1 << 20), 2, 2))},
    others=Anything(),
)
FLOOR_SPLITS = 4  # of the kept features into halves, for the floor
TF1 = Inception.preprocessing
HALF_PIXEL = "bilinear to 299 px with half-pixel centres (the JAX port of MeanFlow and iMF)"
TF1_DINO = "TensorFlow 1 bilinear to 224 px; ImageNet mean and deviation (torch-fidelity's, not FDD's)"
BY_DIM = {2048: "inception", 1024: "dinov2", 768: "clip", 192: "tiny"}  # other systems' features


@dataclass(frozen=True)
class Stats:
    """One network's features of the reference: their moments, and some of them one by one."""

    space: FeatureSpace
    mean: Tensor
    cov: Tensor
    features: Tensor | None  # of some pictures


@dataclass(frozen=True)
class Reference:
    """Statistics by network's name, and the facts that say where they come from."""

    stats: dict[str, Stats]
    facts: dict[str, Any]  # name, kind, count, size, prepared, sha256, …: printed with every number; None: not stated


def build_reference(work: Pass, moments: dict[str, Moments], *, name: str, kept: int) -> Reference:
    """Make a reference of a finished pass, with the features of `kept` pictures drawn at random."""
    count = next(iter(moments.values())).count
    order = np.random.RandomState(DRAW_SEED).permutation(count)[:kept]
    chosen = torch.from_numpy(np.sort(order))
    stats = {}
    for key in sorted(work.extractors):
        mean, cov = moments[key].finalise()
        features = load_all(work, key)[chosen] if kept else None
        stats[key] = Stats(space_of(work.extractors[key]), mean, cov, features)
    described, (digest, copies) = {**work.source.describe(), "count": count}, content_of(work)
    facts = {
        "name": name or described["name"],
        "kind": described["kind"],
        "count": count,
        "size": list(work.source.size),
        "prepared": described["prepared"],
        "source": described,
        "pictures_sha256": digest,
        "copies": copies,
        "environment": environment(),
    }
    left_out = [each for part in work.chunks() for each in left_out_of(work, *part)] if work.source.leaves_out else []
    if left_out:
        facts["left_out"] = {"count": len(left_out), "first": [vars(each) for each in left_out[:MOST_NAMED]]}
    return Reference(stats, facts)


def save_reference(reference: Reference, path: Path) -> None:
    """Write a reference as one file, whole or not at all."""
    tensors = {}
    for key, each in reference.stats.items():
        tensors[f"{key}.mean"], tensors[f"{key}.cov"] = each.mean, each.cov
        if each.features is not None:
            tensors[f"{key}.features"] = each.features
    spaces = {key: asdict(each.space) for key, each in reference.stats.items()}
    header = {"format": REFERENCE_FORMAT, "facts": json.dumps(reference.facts), "spaces": json.dumps(spaces)}
    make_folder(path.parent)
    save_tensors(path, tensors, header)


def load_reference(path: Path) -> Reference:
    """Read a reference file: one of ours, or one of another system."""
    if not path.is_file():
        raise AlphaflowError(
            f"{path}: no such reference; build one with: alphaflow reference SOURCE -o {quote(str(path))}"
        )
    if path.suffix == ".safetensors":
        return _load_own(path)
    return read_foreign(path)


def kept_reference(path: Path, *, shown: bool) -> Reference | None:
    """What an earlier command kept; None where there is nothing, or something damaged, which is then measured again.

    All processes look before the first one writes: it does so only after a measurement that all take part in.
    """
    if not path.is_file():
        return None
    try:
        return load_reference(path)
    except AlphaflowError:
        if shown:
            say(f"{path.name} is damaged, so it is measured again")
        return None


def _load_own(path: Path) -> Reference:
    try:
        with safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as fault:
        raise AlphaflowError(f"{path}: not a whole safetensors file ({for_terminal(fault)}). {REBUILD}") from fault
    if header.get("format") != REFERENCE_FORMAT:
        stated = for_terminal(header.get("format", "no format"), limit=100)
        raise AlphaflowError(
            f"{path}: not a reference ({stated}; {REFERENCE_FORMAT} is needed). Build one: alphaflow reference SOURCE "
            "-o FILE"
        )
    spaces = parse_json(header.get("spaces", ""), f"{path} (its spaces)", SPACES, advice=REBUILD)
    facts = parse_json(header.get("facts", ""), f"{path} (its facts)", FACTS, advice=REBUILD)
    stats = {key: _own_stats(FeatureSpace(**space), tensors, key, path) for key, space in spaces.items()}
    return Reference(stats, {**facts, "sha256": _content_sha256(header, tensors)})


def _own_stats(space: FeatureSpace, tensors: dict[str, Tensor], key: str, path: Path) -> Stats:
    """One network's statistics; tensors of other sizes than its space has are refused."""
    kept = tensors.get(f"{key}.features")
    wanted: dict[str, tuple[int, ...]] = {"mean": (space.dim,), "cov": (space.dim, space.dim)}
    if kept is not None:
        wanted["features"] = (len(kept) if kept.ndim else 0, space.dim)
    for name, shape in wanted.items():
        tensor = tensors.get(f"{key}.{name}")
        if tensor is None or tuple(tensor.shape) != shape or not tensor.is_floating_point():
            there = "is missing" if tensor is None else f"is {tensor.dtype} of shape {tuple(tensor.shape)}"
            raise AlphaflowError(f"{path}: {key}.{name} {there}, shape {shape} is wanted. {REBUILD}")
    return Stats(space, tensors[f"{key}.mean"], tensors[f"{key}.cov"], kept)


def _content_sha256(header: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """Hash what the file says, not its bytes: safetensors writes a header's entries in any order."""
    digest = hashlib.sha256("".join(f"{key}={header[key]};" for key in sorted(header)).encode())
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].contiguous().numpy().data)
    return digest.hexdigest()


def check_fit(reference: Reference, key: str, extractor: Extractor, size: tuple[int, int]) -> list[str]:
    """Refuse a reference of another space or resolution, naming both; returns what the reference does not state."""
    where = reference.facts["name"]
    if key not in reference.stats:
        there = ", ".join(sorted(reference.stats))
        raise AlphaflowError(f"{where}: has no statistics of the {key} features (it has {there})")
    theirs, ours = asdict(reference.stats[key].space), asdict(space_of(extractor))
    unstated = []
    for what, value in theirs.items():
        if value == ours[what]:
            continue
        if value == "":
            unstated += [] if what == "network" else [what.replace("_", " ")]
        else:
            raise AlphaflowError(
                f"{where}: {what.replace('_', ' ')} differ, so the distance would mean nothing.\n"
                f"  reference: {value}\n  here:      {ours[what] or 'none'}"
            )
    if reference.facts["size"] is None:
        unstated.append("resolution")
    elif tuple(reference.facts["size"]) != tuple(size):
        there, here = (f"{height}×{width} px" for height, width in (reference.facts["size"], size))
        raise AlphaflowError(
            f"{where}: resolutions differ.\n  reference: {there}\n  here:      {here}\n"
            f"Build one: alphaflow reference SOURCE --size {size[0]} -o FILE"
        )
    return unstated


def check_crop(reference: Reference | None, crop: Crop | None, size: tuple[int, int]) -> None:
    """Refuse real pictures that were cropped by another rule than those that the model has learnt from."""
    there = crop_of(str(reference.facts.get("prepared"))) if reference else None
    if reference and there and crop and there != crop:
        raise AlphaflowError(
            f"{reference.facts['name']}: its pictures became square by --crop {there}, those that the model has learnt "
            f"from by --crop {crop}. Build one: alphaflow reference SOURCE --size {size[0]} --crop {crop} -o FILE"
        )


def floor_of(reference: Reference, key: str, count: int) -> float | None:
    """The distance that `count` perfect samples would have: from halves of the kept features, scaled as 1/n + 1/m."""
    features = reference.stats[key].features
    measured = reference.facts.get("count")
    if features is None or measured is None or len(features) < 4:
        return None
    half = len(features) // 2
    rng = np.random.RandomState(DRAW_SEED)
    distances = []
    for _ in range(FLOOR_SPLITS):
        order = torch.from_numpy(rng.permutation(len(features)))
        sides = []
        for part in (order[:half], order[half : 2 * half]):
            moments = Moments(features.shape[1])
            moments.update(features[part])
            sides += list(moments.finalise())
        distances.append(frechet_distance(*sides))
    per_picture = sum(distances) / FLOOR_SPLITS / (2 / half)
    return float(per_picture * (1 / count + 1 / measured))


Foreign = tuple[dict[str, Stats], str, int | None]  # statistics, kind of file, pictures measured where it is stated


def read_foreign(path: Path) -> Reference:
    """Read another system's file by its suffix and content: one or more feature spaces. Empty texts: not stated."""
    readers = {".npz": _read_npz, ".pkl": _read_pickle, ".pickle": _read_pickle, ".pt": _read_cache}
    if path.suffix not in readers:
        raise AlphaflowError(f"{path}: not a reference file (.safetensors, .npz, .pkl, .pt) and not pictures")
    try:
        stats, kind, count = readers[path.suffix](path)
    except (*DAMAGE, *BROKEN, pickle.UnpicklingError) as fault:
        raise AlphaflowError(f"{path}: cannot be read as reference statistics ({fault})") from fault
    facts = {"name": path.name, "kind": kind, "count": count, "size": None}
    facts |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "prepared": "not stated"}
    return Reference(stats, facts)


def holds_statistics(path: Path) -> bool:
    """Whether an .npz file holds moments, and not pictures only."""
    try:
        return bool({"mu", "ref_mu"} & set(read_npz(path, ())[0]))
    except ValueError as fault:
        raise AlphaflowError(f"{path}: not a readable .npz ({fault}). Make it, or fetch it, again") from fault


def _read_npz(path: Path) -> Foreign:
    names, held = read_npz(path, ("ref_mu", "ref_sigma", "mu", "sigma"))
    if "ref_mu" in names:
        return _stats(held["ref_mu"], held["ref_sigma"], HALF_PIXEL), "MeanFlow npz", None
    if "mu" not in names or "sigma" not in names:
        raise ValueError(f"it holds {', '.join(sorted(names))}; mu and sigma, or ref_mu and ref_sigma, are needed")
    kind = "ADM npz" if set(names) & {"mu_s", "sigma_s", "arr_0"} else "npz of mu, sigma (ADM, EDM)"
    return _stats(held["mu"], held["sigma"], TF1), kind, None


def _read_pickle(path: Path) -> Foreign:
    with path.open("rb") as file:
        held = NumpyUnpickler(file).load()
    if not isinstance(held, dict):
        raise ValueError("it holds no dictionary")
    if "raw_mean" in held:  # Σf, Σf·fᵀ and N. Their covariance would be over N; ours is over N − 1
        count = int(held["num_items"])
        mean = np.asarray(held["raw_mean"], np.float64) / count
        cov = (np.asarray(held["raw_cov"], np.float64) - count * np.outer(mean, mean)) / (count - 1)
        return _stats(mean, cov, TF1 if mean.size == 2048 else ""), "α-Flow pkl", count
    stats: dict[str, Stats] = {}
    for key, preprocessing in (("fid", TF1), ("fd_dinov2", "")):
        if key in held:
            stats |= _stats(held[key]["mu"], held[key]["sigma"], preprocessing)
    if not stats:
        raise ValueError(f"it holds {', '.join(map(str, held))}; fid, fd_dinov2 or raw_mean is needed")
    return stats, "EDM2 pkl", int(held["num_images"]) if "num_images" in held else None


def _read_cache(path: Path) -> Foreign:
    rebuild: Any = np.zeros(0).__reduce__()[0]  # its module has moved between versions of numpy; files name either
    places = [(rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    dtypes = [type(np.dtype(code)) for code in (np.float32, np.float64)]
    with torch.serialization.safe_globals([np.ndarray, np.dtype, *dtypes, *places]):
        held = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(held, dict) or "mu" not in held:
        raise ValueError("it is no cache of mu and sigma")
    preprocessing = TF1_DINO if "dinov2" in path.name else TF1
    return _stats(held["mu"], held["sigma"], preprocessing), "torch-fidelity cache", None


def _stats(mean: Any, cov: Any, preprocessing: str) -> dict[str, Stats]:
    """Moments under the name of the features that have this dimension."""
    mean, cov = torch.as_tensor(mean).double().flatten(), torch.as_tensor(cov).double()
    dim = mean.numel()
    if tuple(cov.shape) != (dim, dim):
        raise ValueError(f"a mean of {dim} numbers does not fit a covariance of {tuple(cov.shape)}")
    if dim not in BY_DIM:
        raise ValueError(f"features of dimension {dim}; known are {', '.join(map(str, BY_DIM))}")
    return {BY_DIM[dim]: Stats(FeatureSpace("", "", preprocessing, dim), mean, cov, None)}
