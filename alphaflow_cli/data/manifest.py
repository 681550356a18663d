"""What a latent store says about itself.

plan.json        written first: what is being made (StorePlan). Resuming refuses another plan
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
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import read_file, to_json

AGAIN = "Remove it, or the whole store, and run the same prep-latents command again"
FORMAT, VERSION = "alphaflow-latents", 1
RowKind = Literal["moments", "mean", "pixels"]
Crop = Literal["square", "adm"]  # how a picture becomes a square: the rule of data/pictures.py
Part = TypeVar("Part", "StorePlan", "AutoencoderRecord", "Shard")
DTYPES_ON_DISK = ("float16", "float32", "uint8")
SHARD_FILE = re.compile(r"train-\d{5,9}\.safetensors")
STATISTICS_FILE = "stats.safetensors"
STATISTICS = {"file": str, "sha256": str, "images": int, "subset_images": int}
MOST = 1 << 40  # of anything that is counted in a plan
TRANSFORM = {  # a picture becomes the encoder's input like this, in this order; part of every plan
    "frame": "first",
    "orientation": "exif applied",
    "transparency": "over white",
    "crop": "largest centred square",
    "resize": "lanczos",
    "range": "u8 * 2 / 255 - 1",
}
TRANSFORMS: dict[Crop, dict[str, str]] = {
    "square": TRANSFORM,
    "adm": TRANSFORM
    | {
        "crop": "halved by box, short side bicubic, centred square",
        "resize": "before the crop, as ADM's preprocessing",
    },
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
class StorePlan:
    """Everything that decides the bytes of a store, except the batch the encoder is fed."""

    source: Mapping[str, Any]  # kind, name, images, list_sha256; revision on the Hub
    image_size: int
    latent: tuple[int, int, int]  # C, h, w
    kind: RowKind
    dtype: str  # float16, float32, uint8
    flips: bool
    autoencoder: AutoencoderRecord
    transform: Mapping[str, str]
    classes: int
    shard_size: int  # pictures per shard, bad ones included

    @property
    def images(self) -> int:
        """How many pictures were planned, bad ones included."""
        return int(self.source["images"])

    @property
    def crop(self) -> Crop:
        """The name of the rule by which a picture became a square."""
        return next((name for name, rule in TRANSFORMS.items() if rule == self.transform), "square")

    @property
    def list_sha256(self) -> str:
        """The checksum of images.json."""
        return str(self.source["list_sha256"])

    @property
    def rows(self) -> int:
        """How many channels a stored row has: mean and std of each, or one of each."""
        return self.latent[0] * (2 if self.kind == "moments" else 1)

    @property
    def stores_flips(self) -> bool:
        """Whether mirrored copies are on disk; pixels are mirrored when they are read."""
        return self.flips and self.kind != "pixels"

    @property
    def sample_bytes(self) -> int:
        """The bytes that a picture takes on disk, with its label and index, and its mirrored copy."""
        width = {"float16": 2, "float32": 4, "uint8": 1}[self.dtype]
        return self.rows * self.latent[1] * self.latent[2] * width * (2 if self.stores_flips else 1) + 16


@dataclass(frozen=True)
class Shard:
    """What the sidecar of a shard file says about it."""

    file: str
    first: int  # first line of images.json
    lines: int  # lines covered
    count: int  # rows in it = lines - bad ones
    bytes: int
    sha256: str
    bad: list[dict[str, Any]]  # {line, name, why}


@dataclass(frozen=True)
class Manifest:
    """What a finished store says about itself."""

    plan: StorePlan
    count: int
    bad: list[dict[str, Any]]
    statistics: Mapping[str, Any]  # file, sha256, images, subset_images, channel_mean, channel_std
    shards: list[Shard]
    digest: str

    @property
    def flips(self) -> bool:
        """Whether mirror images can be drawn from this store."""
        return self.plan.flips


def plan_to_dict(plan: StorePlan) -> dict[str, Any]:
    """The content of plan.json."""
    return {"format": FORMAT, "version": VERSION, **asdict(plan), "latent": list(plan.latent)}


def plan_from_dict(document: Mapping[str, Any], where: Path) -> StorePlan:
    """Read a plan strictly: another format or version, or a missing field, is named."""
    if document.get("format") != FORMAT or document.get("version") != VERSION:
        other = f"{document.get('format')} version {document.get('version')}"
        raise AlphaflowError(f"{where}: format is {other}, this program reads {FORMAT} version {VERSION}")
    plan = _build(StorePlan, document, where)
    plan = replace(plan, autoencoder=_build(AutoencoderRecord, document["autoencoder"], where))
    channels, height, width = plan.latent
    plan = replace(plan, latent=(channels, height, width))
    _check_fields(plan.source, {"images": int, "list_sha256": str}, where, "source.")
    sizes = {"image_size": plan.image_size, "classes": plan.classes, "shard_size": plan.shard_size}
    sizes |= {"source.images": plan.images} | {f"latent[{axis}]": length for axis, length in enumerate(plan.latent)}
    for name, value in sizes.items():
        if not 0 < value < MOST:
            raise AlphaflowError(f"{where}: {name} is {value}, should be from 1 to {MOST - 1:,}. {AGAIN}")
    if plan.dtype not in DTYPES_ON_DISK:
        raise AlphaflowError(f"{where}: dtype is {plan.dtype!r}, should be {', '.join(DTYPES_ON_DISK)}. {AGAIN}")
    return plan


def manifest_to_bytes(plan: StorePlan, **parts: Any) -> bytes:
    """The content of manifest.json, with its digest."""
    body = {**plan_to_dict(plan), "complete": True, **parts}
    return to_json({**body, "digest": digest_of(body)})


def digest_of(document: Mapping[str, Any]) -> str:
    """The sha256 of a document without its digest."""
    return hashlib.sha256(to_json({k: v for k, v in document.items() if k != "digest"})).hexdigest()


def read_store_file(path: Path) -> bytes:
    """The bytes of a file of a store, or an error that names it and says what to do."""
    try:
        return read_file(path)
    except OSError as fault:
        raise AlphaflowError(f"{path}: cannot be read ({fault.strerror or fault}). {AGAIN}") from fault


def read_store_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a store, or an error that names the file."""
    try:
        document = json.loads(read_store_file(path))
    except (ValueError, RecursionError) as fault:
        raise AlphaflowError(f"{path}: cannot be read as JSON ({fault}). {AGAIN}") from fault
    if not isinstance(document, dict):
        raise AlphaflowError(f"{path}: is not a JSON object. {AGAIN}")
    return document


def read_image_list(path: Path) -> list[tuple[str, int]]:
    """Read images.json: the name and the label of every picture."""
    try:
        rows = json.loads(read_store_file(path))
        if not _fits(rows, list[list[Any]]) or not all(_fits(row, tuple[str, int]) for row in rows):
            raise ValueError("should be [[name, label], …]")
    except (ValueError, RecursionError) as fault:
        raise AlphaflowError(f"{path}: not a list of pictures ({fault}). {AGAIN}") from fault
    return [(name, label) for name, label in rows]


def read_manifest(folder: Path) -> Manifest:
    """Parse manifest.json and check that nobody edited it, field by field against plan.json."""
    path = folder / "manifest.json"
    document, plan_document = read_store_json(path), read_store_json(folder / "plan.json")
    plan = plan_from_dict(document, path)
    edited = differences(document, plan_document, "manifest.json", "plan.json")
    if edited:
        raise AlphaflowError(f"{path}: was changed after it was written: {'; '.join(edited)}. {AGAIN}")
    if document.get("digest") != digest_of(document):
        raise AlphaflowError(f"{path}: was changed after it was written (its digest differs). {AGAIN}")
    body = {name: _field(document, name, path) for name in (f.name for f in fields(Manifest)) if name != "plan"}
    _check_fields(body, {f.name: f.type for f in fields(Manifest) if f.name not in ("plan", "shards")}, path)
    _check_fields(body, {"shards": list[dict[str, Any]]}, path)
    _check_fields(body["statistics"], STATISTICS, path, "statistics.")
    shards = [shard_from_dict(entry, path) for entry in body["shards"]]
    if body["statistics"]["file"] != STATISTICS_FILE:
        raise AlphaflowError(f"{path}: the statistics should be in {STATISTICS_FILE}. {AGAIN}")
    if not body["count"] or body["count"] != sum(shard.count for shard in shards):
        raise AlphaflowError(f"{path}: its shards have not the {body['count']:,} pictures that it counts. {AGAIN}")
    return Manifest(**{**body, "plan": plan, "shards": shards})


def shard_from_dict(document: Mapping[str, Any], where: Path) -> Shard:
    """Read what a sidecar, or the manifest, says about a shard."""
    shard = _build(Shard, document, where)
    if not SHARD_FILE.fullmatch(shard.file):
        raise AlphaflowError(f"{where}: {shard.file!r} is not the name of a shard. {AGAIN}")
    for entry in shard.bad:
        _check_fields(entry, {"line": int, "name": str, "why": str}, where, "bad.")
    return shard


def differences(one: Mapping[str, Any], other: Mapping[str, Any], left: str, right: str, prefix: str = "") -> list[str]:
    """List every field of `other` for which `one` has another value; both sides are printed."""
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
        raise AlphaflowError(f"{where}: the field {name} is missing. {AGAIN}")
    return document[name]


def _build(kind: type[Part], document: Mapping[str, Any], where: Path) -> Part:
    """Make a dataclass of the fields of a JSON object, each of the kind that the dataclass says."""
    kinds = {f.name: f.type for f in fields(kind)}
    _check_fields(document, kinds, where)
    return kind(**{name: document[name] for name in kinds})


def _check_fields(document: Mapping[str, Any], kinds: Mapping[str, Any], where: Path, prefix: str = "") -> None:
    for name, kind in kinds.items():
        value = _field(document, name, where)
        if not _fits(value, kind):
            shown = json.dumps(value)[:60]
            raise AlphaflowError(f"{where}: the field {prefix}{name} is of the wrong kind: {shown}. {AGAIN}")


def _fits(value: object, kind: Any) -> bool:
    """Tell whether a value of JSON has a field's type: a bool is no number, and a number is no text."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in parts if isinstance(value, str) else False
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, list) or len(value) != len(parts):
            return False
        return all(_fits(one, part) for one, part in zip(value, parts, strict=True))
    if origin is list:
        return isinstance(value, list) and all(_fits(one, parts[0]) for one in value)
    if origin in (dict, Mapping) or is_dataclass(kind):
        return isinstance(value, dict)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return kind is Any or type(value) is kind
