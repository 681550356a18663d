"""What a number means: the protocol printed beside every score.

Two numbers may be compared only where network, weights, preprocessing, reference, count and the way the pictures were
made are the same; so all of it is kept with the number, and "FID" is printed for one feature space only.
"""

import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch

import alphaflow_cli
from alphaflow_cli.documents import Table, Text, Whole
from alphaflow_cli.nn.features import Extractor
from alphaflow_cli.recipe.schema import Metric

UNBIASED_FROM = 50_000  # pictures; the published figures are of that many
NETWORK: dict[Metric, str] = {
    "fid": "inception",
    "kid": "inception",
    "is": "inception",
    "pr": "inception",
    "fdd": "dinov2",
    "fcd": "clip",
    "fd-tiny": "tiny",
}
TITLE: dict[Metric, str] = {"fid": "FID", "kid": "KID", "is": "IS", "fdd": "FDD", "fcd": "FCD", "fd-tiny": "FD-tiny"}
LOWER_IS_BETTER = {"FID": True, "KID": True, "IS": False, "FDD": True, "FCD": True, "FD-tiny": True}
NEEDS_FEATURES: tuple[Metric, ...] = (
    "kid",
    "pr",
)  # of the reference, one by one; the others need its moments, or nothing
NEEDS_MOMENTS: tuple[Metric, ...] = ("fid", "fdd", "fcd", "fd-tiny")


@dataclass(frozen=True)
class FeatureSpace:
    """What two sets of features must share to be compared; an empty string says: the file does not tell."""

    network: str  # id of the extractor
    weights_sha256: str
    preprocessing: str
    dim: int


SPACE = Table({"network": Text(200), "weights_sha256": Text(64), "preprocessing": Text(300), "dim": Whole(0)})


@dataclass(frozen=True)
class Row:
    """One number and its protocol."""

    name: str  # FID-10k
    value: float
    spread: float | None  # standard deviation over subsets or splits
    metric: Metric
    space: FeatureSpace
    count: int  # pictures measured
    pictures: dict[str, Any]  # their source, as it describes itself
    label: str  # the same in a few words
    reference: dict[str, Any] | None  # name, kind, hash, count, size, how it was prepared
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def told(self) -> str:
        """The protocol in one line."""
        weights = f" {self.space.weights_sha256[:8]}" if self.space.weights_sha256 else ""
        parts = [f"{self.space.network}{weights}"]
        if self.reference is not None:
            parts.append(f"reference {told_reference(self.reference)}")
        parts.append(f"{self.count:,} pictures: {self.label}")
        parts += [f"{key.replace('_', ' ')} {value}" for key, value in self.settings.items()]
        return "; ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self)


def told_reference(reference: dict[str, Any]) -> str:
    """`name (kind, 50,000 pictures, 1a2b3c4d)`."""
    count = reference.get("count")
    told = f"{count:,} pictures" if count else "count not stated"
    return f"{reference['name']} ({reference['kind']}, {told}, {reference['sha256'][:8]})"


def space_of(extractor: Extractor) -> FeatureSpace:
    """The space an extractor maps to."""
    return FeatureSpace(extractor.id, extractor.weights_sha256, extractor.preprocessing, extractor.dim)


def name_of(title: str, extractor: Extractor, count: int) -> str:
    """FID-10k; with weights that are not the published ones, FID is not its name: FD(inception 5a993ec0)-10k."""
    if not extractor.known:
        title = f"{'FD' if title == 'FID' else title}(weights {extractor.weights_sha256[:8]})"
    return f"{title}-{count_name(count)}"


def count_name(count: int) -> str:
    """50k, 2048."""
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)


def environment() -> dict[str, str]:
    """Versions that decide the last digits."""
    packages = {name: version(name) for name in ("torch-fidelity", "timm", "numpy")}
    return {
        "alphaflow": alphaflow_cli.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "precision": "features float32 (TF32 off), moments and distances float64",
        **packages,
    }
