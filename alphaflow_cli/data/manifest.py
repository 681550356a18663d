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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from alphaflow_cli.documents import (
    Anything,
    Flag,
    ListOf,
    Maybe,
    Number,
    Shape,
    Table,
    Text,
    Whole,
    check_shape,
    read_json,
)
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import MAX_BYTES, is_there, to_json
from alphaflow_cli.text import brief

AGAIN = "Remove it, or the whole store, and run the same prep-latents or import-latents command again"
FORMAT, VERSION = "alphaflow-latents", 1
RowKind = Literal["moments", "mean", "pixels"]
Crop = Literal["square", "adm"]  # how a picture becomes a square: the rule of data/pictures.py
Part = TypeVar("Part", "StorePlan", "AutoencoderRecord", "Shard", "Manifest")
STATISTICS_FILE = "stats.safetensors"
MORE = Anything()  # keys that nobody reads
COUNT = Whole(1, (1 << 40) - 1)
SOURCE = Table({"images": COUNT, "list_sha256": Text()}, others=MORE)
AUTOENCODER = Table(
    {name: Text() for name in ("id", "revision", "weights_sha256", "precision")}
    | {"downscale": Whole(), "scale": Number(), "shift": Number(), "precision_error": Maybe(Number())},
    {"kind": Text(), "channel_mean": ListOf(Number(), most=1 << 12), "channel_std": ListOf(Number(), most=1 << 12)},
    others=MORE,
)
STATED = ("kind", "channel_mean", "channel_std")  # of an autoencoder: left out where there is nothing to say
BEWARE = {  # kind of autoencoder → what is published about its latents, and a run should know
    "rae": "these are latents of a representation autoencoder (RAE): gradients explode there when MeanFlow is trained "
    "from scratch as it is (published: arXiv:2511.13019)",
}
PLAN = Table(
    {
        "source": SOURCE,
        "latent": ListOf(COUNT, 3, 3),
        "kind": Text(one_of=get_args(RowKind)),
        "dtype": Text(one_of=("float16", "float32", "uint8")),
        "flips": Flag(),
        "autoencoder": AUTOENCODER,
        "transform": Table(others=MORE),
        **dict.fromkeys(("image_size", "classes", "shard_size"), COUNT),
    },
    others=MORE,
)
LONG = Text(1 << 20)  # of an archive, a member's name may have 65,535 letters
BAD = ListOf(Table({"line": Whole(), "name": LONG, "why": LONG}, others=MORE), most=MAX_BYTES)
SHARD = Table(
    {name: Whole() for name in ("first", "lines", "count", "bytes")}
    | {"file": Text(form=r"train-\d{5,9}\.safetensors"), "sha256": Text(), "bad": BAD},
    others=MORE,
)
STATISTICS = Table(
    {"file": Text(one_of=(STATISTICS_FILE,)), "sha256": Text(), "images": Whole(), "subset_images": Whole()},
    others=MORE,
)
MANIFEST = Table(
    {**PLAN.required, "count": COUNT, "bad": BAD, "statistics": STATISTICS, "shards": ListOf(SHARD), "digest": Text()},
    others=MORE,
)
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
    kind: str | None = None  # of nn/autoencoder_classes.py; those three that were there first do not say it
    channel_mean: list[float] | None = None  # of the latents, where the autoencoder's own config states them
    channel_std: list[float] | None = None


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
    def command(self) -> str:
        """The command that makes such a store, for messages."""
        return "import-latents" if self.source.get("kind") == "latents" else "prep-latents"

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


def plan_to_dict(plan: StorePlan) -> dict[str, Any]:
    """The content of plan.json: everything that decides the bytes of a store."""
    record = record_to_dict(plan.autoencoder)
    return {"format": FORMAT, "version": VERSION, **asdict(plan), "latent": list(plan.latent), "autoencoder": record}


def record_to_dict(record: AutoencoderRecord) -> dict[str, Any]:
    """What is recorded of an autoencoder; what it does not state is left out, as in older stores."""
    return {key: value for key, value in asdict(record).items() if value is not None or key not in STATED}


def read_plan(path: Path) -> StorePlan:
    """Read plan.json: what is being made, or was."""
    return _plan_of(_read_document(path, PLAN))


def plan_in(folder: Path) -> StorePlan | None:
    """What a folder holds, finished or not; where its plan was removed, by the manifest. None: no store was begun."""
    paths = (folder / name for name in ("plan.json", "manifest.json"))
    return next((read_plan(path) for path in paths if is_there(path)), None)


def _read_document(path: Path, shape: Shape) -> dict[str, Any]:
    """Read plan.json or manifest.json: one of another format or version is named as that, before its shape."""
    document: dict[str, Any] = read_store_json(path, Table(others=MORE))
    if document.get("format") != FORMAT or document.get("version") != VERSION:
        other = f"{document.get('format')} version {document.get('version')}"
        raise AlphaflowError(f"{path}: format is {brief(other)}, this program reads {FORMAT} version {VERSION}")
    check_shape(document, str(path), shape, advice=f"{AGAIN}.")
    return document


def _plan_of(document: Mapping[str, Any]) -> StorePlan:
    channels, height, width = document["latent"]
    plan = _build(StorePlan, document)
    return replace(
        plan, autoencoder=_build(AutoencoderRecord, document["autoencoder"]), latent=(channels, height, width)
    )


def manifest_to_bytes(plan: StorePlan, **parts: Any) -> bytes:
    """The content of manifest.json, with its digest."""
    body = {**plan_to_dict(plan), "complete": True, **parts}
    return to_json({**body, "digest": digest_of(body)})


def digest_of(document: Mapping[str, Any]) -> str:
    """The sha256 of a document without its digest."""
    return hashlib.sha256(to_json({k: v for k, v in document.items() if k != "digest"})).hexdigest()


def read_store_json(path: Path, shape: Shape) -> Any:
    """Read a JSON file of a store; what is wrong with it is an error that names it and says what to do."""
    return read_json(path, shape, limit=MAX_BYTES, advice=f"{AGAIN}.")


def read_image_list(path: Path) -> list[tuple[str, int]]:
    """Read images.json: the name and the label of every picture."""
    rows = read_store_json(path, ListOf(ListOf(Anything(), 2, 2), most=MAX_BYTES))
    if not all(isinstance(name, str) and type(label) is int for name, label in rows):
        raise AlphaflowError(f"{path}: should be [[name, label], …]. {AGAIN}")
    return [(name, label) for name, label in rows]


def read_manifest(folder: Path) -> Manifest:
    """Parse manifest.json and check that nobody edited it, field by field against plan.json."""
    path = folder / "manifest.json"
    document = _read_document(path, MANIFEST)
    edited = differences(document, read_store_json(folder / "plan.json", Table(others=MORE)), path.name, "plan.json")
    if edited:
        raise AlphaflowError(f"{path}: was changed after it was written: {'; '.join(edited)}. {AGAIN}")
    if document["digest"] != digest_of(document):
        raise AlphaflowError(f"{path}: was changed after it was written (its digest differs). {AGAIN}")
    shards = [_build(Shard, entry) for entry in document["shards"]]
    if document["count"] != sum(shard.count for shard in shards):
        raise AlphaflowError(
            f"{path}: its shards do not hold the {document['count']:,} pictures that it counts. {AGAIN}"
        )
    return _build(Manifest, {**document, "plan": _plan_of(document), "shards": shards})


def read_sidecar(path: Path) -> Shard:
    """Read what the sidecar of a shard says about it."""
    return _build(Shard, read_store_json(path, SHARD))


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


def _build(kind: type[Part], document: Mapping[str, Any]) -> Part:
    """Make a dataclass of the keys of a document that it has fields for; their shapes have been checked."""
    return kind(**{f.name: document[f.name] for f in fields(kind) if f.name in document or f.name not in STATED})
