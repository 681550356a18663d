"""What a latent store says about itself.

plan.json        written first: what is being made (Plan). Resuming refuses another plan
images.json      the pictures, [[name, label], ...] in the order of `index`
classes.json     {folder: {"index": i, "name": ...}}
train-00000.safetensors   moments (n, 2C, h, w) = posterior mean and std | mean (n, C, h, w) | pixels uint8,
                          <the same>_flip of the mirrored pictures, label, index, and the shard's statistics
train-00000.json sidecar, written after the shard: it marks the shard as done
stats.safetensors         mean and std of everything
manifest.json    written last: plan + count, bad pictures, statistics, shards, digest
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from alphaflow_cli.data.files import to_json
from alphaflow_cli.errors import AlphaflowError

AGAIN = "Remove it and run the same prep-latents command again"
FORMAT, VERSION = "alphaflow-latents", 1
Kind = Literal["moments", "mean", "pixels"]
TRANSFORM = {  # a picture becomes the encoder's input like this, in this order; part of every plan
    "frame": "first",
    "orientation": "exif applied",
    "transparency": "over white",
    "crop": "largest centred square",
    "resize": "lanczos",
    "range": "u8 * 2 / 255 - 1",
}


@dataclass(frozen=True)
class AutoencoderRecord:
    """Which autoencoder made the latents, and how exactly."""

    id: str
    revision: str  # commit on the Hub, empty for local weights
    weights_sha256: str  # of names and values of all parameters, whatever file they came from
    downscale: int
    scale: float  # the autoencoder's own convention; never applied on disk
    shift: float
    precision: str  # of the encoder: fp32, tf32, bf16
    precision_error: float | None  # rms error of the mean against fp32 / rms posterior std, where it was measured


@dataclass(frozen=True)
class Plan:
    """Everything that decides the bytes of a store, except the batch the encoder is fed."""

    source: Mapping[str, Any]  # kind, name, images, list_sha256; revision on the Hub
    image_size: int
    latent: tuple[int, int, int]  # C, h, w
    kind: Kind
    dtype: str  # float16, float32, uint8
    flips: bool
    autoencoder: AutoencoderRecord
    transform: Mapping[str, str]
    classes: int
    shard_size: int  # pictures per shard, bad ones included

    @property
    def rows(self) -> int:
        """Channels of a stored row."""
        return self.latent[0] * (2 if self.kind == "moments" else 1)

    @property
    def stores_flips(self) -> bool:
        """Mirrored copies are on disk; pixels are mirrored when read."""
        return self.flips and self.kind != "pixels"

    @property
    def sample_bytes(self) -> int:
        """On disk, with label and index."""
        width = {"float16": 2, "float32": 4, "uint8": 1}[self.dtype]
        return self.rows * self.latent[1] * self.latent[2] * width * (2 if self.stores_flips else 1) + 16


@dataclass(frozen=True)
class Shard:
    """The sidecar of one shard file."""

    file: str
    first: int  # first line of images.json
    lines: int  # lines covered
    count: int  # rows in it = lines - bad ones
    bytes: int
    sha256: str
    bad: list[dict[str, Any]]  # {line, name, why}


@dataclass(frozen=True)
class Manifest:
    """A finished store."""

    plan: Plan
    count: int
    bad: list[dict[str, Any]]
    statistics: Mapping[str, Any]  # file, sha256, images, subset_images, channel_mean, channel_std
    shards: list[Shard]
    digest: str

    @property
    def flips(self) -> bool:
        """Mirror images can be drawn."""
        return self.plan.flips


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """As plan.json says it."""
    return {"format": FORMAT, "version": VERSION, **asdict(plan), "latent": list(plan.latent)}


def plan_from_dict(document: Mapping[str, Any], where: Path) -> Plan:
    """Strict: an unknown format, version or a missing field is named."""
    if document.get("format") != FORMAT or document.get("version") != VERSION:
        found = f"{document.get('format')} version {document.get('version')}"
        raise AlphaflowError(f"{where}: format is {found}, this program reads {FORMAT} version {VERSION}")
    values = {name: _field(document, name, where) for name in (f.name for f in fields(Plan))}
    record = values["autoencoder"]
    values["autoencoder"] = AutoencoderRecord(
        **{f.name: _field(record, f.name, where) for f in fields(AutoencoderRecord)}
    )
    values["latent"] = tuple(values["latent"])
    return Plan(**values)


def manifest_to_bytes(plan: Plan, **parts: Any) -> bytes:
    """The whole document with its digest."""
    body = {**plan_to_dict(plan), "complete": True, **parts}
    return to_json({**body, "digest": digest_of(body)})


def digest_of(document: Mapping[str, Any]) -> str:
    """sha256 of the document without its digest."""
    return hashlib.sha256(to_json({k: v for k, v in document.items() if k != "digest"})).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an error that names the file."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as fault:
        raise AlphaflowError(f"{path}: cannot be read as JSON ({fault})") from fault
    if not isinstance(document, dict):
        raise AlphaflowError(f"{path}: is not a JSON object")
    return document


def read_manifest(folder: Path) -> Manifest:
    """Parse manifest.json and check that nobody edited it, field by field against plan.json."""
    path = folder / "manifest.json"
    document, plan_document = read_json(path), read_json(folder / "plan.json")
    plan = plan_from_dict(document, path)
    edited = differences(document, plan_document, "manifest.json", "plan.json")
    if edited:
        raise AlphaflowError(f"{path}: was changed after it was written: {'; '.join(edited)}. {AGAIN}")
    if document.get("digest") != digest_of(document):
        raise AlphaflowError(f"{path}: was changed after it was written (its digest differs). {AGAIN}")
    shards = [shard_from_dict(entry, path) for entry in _field(document, "shards", path)]
    names = ("count", "bad", "statistics", "digest")
    return Manifest(plan, shards=shards, **{name: _field(document, name, path) for name in names})


def shard_from_dict(document: Mapping[str, Any], where: Path) -> Shard:
    """A sidecar."""
    return Shard(**{f.name: _field(document, f.name, where) for f in fields(Shard)})


def differences(one: Mapping[str, Any], other: Mapping[str, Any], left: str, right: str, prefix: str = "") -> list[str]:
    """Every field of `other` that `one` says otherwise, both sides printed."""
    lines = []
    for key, value in other.items():
        mine = one.get(key)
        if isinstance(value, Mapping) and isinstance(mine, Mapping):
            lines += differences(mine, value, left, right, f"{prefix}{key}.")
        elif mine != value:
            lines.append(f"{prefix}{key} is {mine!r} in {left}, {value!r} in {right}")
    return lines


def _field(document: Mapping[str, Any], name: str, where: Path) -> Any:
    if name not in document:
        raise AlphaflowError(f"{where}: the field {name} is missing")
    return document[name]
