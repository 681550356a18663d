"""Reference statistics with their protocol inside: built from pictures, saved, loaded, refused where they do not fit.

One safetensors file holds, per network, `<network>.mean`, `<network>.cov` (float64) and `<network>.features` (float32,
of a random part of the pictures: KID and precision/recall need single features). Its header says what was measured.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alphaflow_cli.core.frechet import Moments, frechet_distance
from alphaflow_cli.documents import Anything, ListOf, Maybe, Table, Text, Whole, parse_json
from alphaflow_cli.engine.files import save_tensors
from alphaflow_cli.engine.foreign import read_foreign
from alphaflow_cli.engine.measure import Content, Pass, load_all, make_folder
from alphaflow_cli.engine.protocol import SPACE, FeatureSpace, environment, space_of
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.nn.features import Extractor

FORMAT = "alphaflow-reference/1"
KEPT = 10_000  # features kept one by one
SEED = 2020  # of the part kept, and of the splits of the floor
ADVICE = "Build it again: alphaflow reference SOURCE -o FILE."
SPACES = Table(others=SPACE)
FACTS = Table(
    {"name": Text(300), "kind": Text(100), "count": Maybe(Whole(1)), "size": Maybe(ListOf(Whole(1, 1 << 20), 2, 2))},
    others=Anything(),
)
SPLITS = 4  # of the kept features into halves, for the floor


@dataclass(frozen=True)
class Stats:
    """One network's view of the reference."""

    space: FeatureSpace
    mean: Tensor
    cov: Tensor
    features: Tensor | None  # of some pictures


@dataclass(frozen=True)
class Reference:
    """Statistics by network's name, and where they come from."""

    stats: dict[str, Stats]
    facts: dict[str, Any]  # name, kind, count, size, prepared, sha256, …: printed with every number

    @property
    def count(self) -> int | None:
        """Pictures behind it, where the file tells."""
        count: int | None = self.facts.get("count")
        return count


def build_reference(work: Pass, moments: dict[str, Moments], content: Content, *, name: str, kept: int) -> Reference:
    """From a finished pass."""
    order = np.random.RandomState(SEED).permutation(work.source.count)[:kept]
    chosen = torch.from_numpy(np.sort(order))
    stats = {}
    for key in sorted(work.extractors):
        mean, cov = moments[key].finalise()
        features = load_all(work, key)[chosen] if kept else None
        stats[key] = Stats(space_of(work.extractors[key]), mean, cov, features)
    described = work.source.describe()
    facts = {
        "name": name or described["name"],
        "kind": described["kind"],
        "count": work.source.count,
        "size": list(work.source.size),
        "prepared": described["prepared"],
        "source": described,
        "pictures_sha256": content.sha256,
        "copies": content.copies,
        "environment": environment(),
    }
    return Reference(stats, facts)


def save_reference(reference: Reference, path: Path) -> None:
    """One file, whole or not at all."""
    tensors = {}
    for key, each in reference.stats.items():
        tensors[f"{key}.mean"], tensors[f"{key}.cov"] = each.mean, each.cov
        if each.features is not None:
            tensors[f"{key}.features"] = each.features
    spaces = {key: asdict(each.space) for key, each in reference.stats.items()}
    header = {"format": FORMAT, "facts": json.dumps(reference.facts), "spaces": json.dumps(spaces)}
    make_folder(path.parent)
    save_tensors(path, tensors, header)


def load_reference(path: Path) -> Reference:
    """Ours, or a file of another system."""
    if not path.is_file():
        raise AlphaflowError(f"{path}: no such reference; build one with: alphaflow reference SOURCE -o {path}")
    if path.suffix == ".safetensors":
        return _load_own(path)
    found = read_foreign(path)
    stats = {
        each.name: Stats(FeatureSpace("", "", each.preprocessing, each.mean.numel()), each.mean, each.cov, None)
        for each in found
    }
    facts = {"name": path.name, "kind": found[0].kind, "count": found[0].count, "size": None}
    facts["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return Reference(stats, {**facts, "prepared": "not stated"})


def _load_own(path: Path) -> Reference:
    try:
        with safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as fault:
        raise AlphaflowError(f"{path}: not a whole safetensors file ({fault})") from fault
    if header.get("format") != FORMAT:
        raise AlphaflowError(f"{path}: not a reference ({header.get('format', 'no format')}; {FORMAT} is due)")
    spaces = parse_json(header.get("spaces", ""), f"{path} (its spaces)", SPACES, advice=ADVICE)
    facts = parse_json(header.get("facts", ""), f"{path} (its facts)", FACTS, advice=ADVICE)
    stats = {key: _own_stats(FeatureSpace(**space), tensors, key, path) for key, space in spaces.items()}
    return Reference(stats, {**facts, "sha256": _content_sha256(header, tensors)})


def _own_stats(space: FeatureSpace, tensors: dict[str, Tensor], key: str, path: Path) -> Stats:
    """One network's tensors, of the sizes that its space has."""
    mean, cov, features = (tensors.get(f"{key}.{name}") for name in ("mean", "cov", "features"))
    wanted = {"mean": (mean, (space.dim,)), "cov": (cov, (space.dim, space.dim))}
    if features is not None:
        wanted["features"] = (features, (len(features) if features.ndim else 0, space.dim))
    for name, (tensor, shape) in wanted.items():
        if tensor is None or tuple(tensor.shape) != shape or not tensor.is_floating_point():
            there = "is missing" if tensor is None else f"is {tensor.dtype} of shape {tuple(tensor.shape)}"
            raise AlphaflowError(f"{path}: {key}.{name} {there}, shape {shape} is wanted. {ADVICE}")
    assert mean is not None
    assert cov is not None
    return Stats(space, mean, cov, features)


def _content_sha256(header: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """Of what the file says: safetensors writes a header's entries in any order, so equal files differ in bytes."""
    digest = hashlib.sha256("".join(f"{key}={header[key]};" for key in sorted(header)).encode())
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].contiguous().numpy().data)
    return digest.hexdigest()


def check_fit(reference: Reference, key: str, extractor: Extractor, size: tuple[int, int]) -> list[str]:
    """Refuses a reference of another space or resolution, with both sides; returns what the reference leaves unsaid."""
    where = reference.facts["name"]
    if key not in reference.stats:
        there = ", ".join(sorted(reference.stats))
        raise AlphaflowError(f"{where}: has no statistics of the {key} features (it has {there})")
    theirs, ours = asdict(reference.stats[key].space), asdict(space_of(extractor))
    unsaid = []
    for what, value in theirs.items():
        if value == ours[what]:
            continue
        if value == "":
            unsaid += [] if what == "network" else [what.replace("_", " ")]
        else:
            raise AlphaflowError(
                f"{where}: {what.replace('_', ' ')} differ, so the distance would mean nothing.\n"
                f"  reference: {value}\n  here:      {ours[what] or 'none'}"
            )
    if reference.facts["size"] is None:
        unsaid.append("resolution")
    elif tuple(reference.facts["size"]) != tuple(size):
        raise AlphaflowError(
            f"{where}: resolutions differ.\n  reference: {_told_size(reference.facts['size'])}\n"
            f"  here:      {_told_size(size)}\nBuild one: alphaflow reference SOURCE --size {size[0]} -o FILE"
        )
    return unsaid


def _told_size(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]} px"


def floor_of(reference: Reference, key: str, count: int) -> float | None:
    """The distance that so many perfect samples would have: from halves of the kept features, scaled as 1/n + 1/m."""
    features = reference.stats[key].features
    if features is None or reference.count is None or len(features) < 4:
        return None
    half = len(features) // 2
    rng = np.random.RandomState(SEED)
    distances = []
    for _ in range(SPLITS):
        order = torch.from_numpy(rng.permutation(len(features)))
        sides = []
        for part in (order[:half], order[half : 2 * half]):
            moments = Moments(features.shape[1])
            moments.update(features[part])
            sides += list(moments.finalise())
        distances.append(frechet_distance(*sides))
    per_picture = sum(distances) / SPLITS / (2 / half)
    return per_picture * (1 / count + 1 / reference.count)
