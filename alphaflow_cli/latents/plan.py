"""From the request of `prep-latents` to a plan: which pictures, which classes, which encoder, which shards."""

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from alphaflow_cli.data.classes import AS_NUMBERS, read_class_file, reordered
from alphaflow_cli.data.labels import label_pictures
from alphaflow_cli.data.manifest import (
    TRANSFORMS,
    AutoencoderRecord,
    Crop,
    RowKind,
    StorePlan,
    differences,
    plan_in,
    plan_to_dict,
    read_image_list,
)
from alphaflow_cli.data.sources import Folder, open_source
from alphaflow_cli.data.writing import is_done
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import is_there
from alphaflow_cli.latents.encode import Job, Listing, StoreRequest, choose_precision, sample_pixels
from alphaflow_cli.nn.autoencoder import Autoencoder, load_autoencoder, public_id
from alphaflow_cli.remote.faults import HubFault
from alphaflow_cli.runtime.processes import Processes, threads_here
from alphaflow_cli.text import brief, counted, shorten

SHARD_PICTURES, SHARD_BYTES = 8192, 512_000_000  # of one shard at most: it is held in memory until it is written
SHARDS_WANTED, SHARD_LEAST = 16, 256  # small sets are cut, too, so that several processes have something to share
SAMPLE = 16  # pictures that a lower precision is tried on
UNNAMED = ("kl", "tiny", "dc")  # kinds of autoencoder that older stores do not name
PATTERN = re.compile(r"[-_.]*[{*?\[].*")  # in the name of a source: from there on it differs from file to file
STORED_DTYPES = {"fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Encoder:
    """What the plan must know of the autoencoder that makes the latents."""

    record: AutoencoderRecord
    latent: tuple[int, int, int]  # C, h, w
    kind: RowKind
    model: Autoencoder | None = None  # where it was loaded


def plan_job(request: StoreRequest, out: Path, processes: Processes) -> Job:
    """List the source, look at the encoder, and refuse an `out` that holds another preparation; nothing is written."""
    device, threads = processes.device, threads_here(processes)
    before = plan_in(out)
    if before and not request.labelling.given and _has_one_class(out):
        request = replace(request, labelling=replace(request.labelling, unlabelled=True))
    listing = list_pictures(request)
    if before:
        listing = _as_begun(listing, out)
    if before and request.bad == "skip":
        listing = _with_the_removed(listing, out)
    encoder = _encoder(request, listing, before, finished=_is_whole(out, before), device=device)
    plan = _plan(request, listing, encoder)
    if before and not request.limit and _differ_in_the_list(plan, before):
        _check_list(listing, request, out)
    check_plan(plan, out)
    return Job(request, listing, out, plan, request.batch or default_batch(request, device), threads, encoder.model)


def check_plan(plan: StorePlan, out: Path) -> None:
    """Refuse a folder that holds another preparation."""
    there = plan_in(out) or plan
    if lines := differences(plan_to_dict(plan), plan_to_dict(there), "this command", "the store"):
        raise AlphaflowError(f"{out}: holds another preparation: {_in_brief(lines)}. Give another --out, or delete it")


def _differ_in_the_list(plan: StorePlan, before: StorePlan) -> bool:
    """Whether two plans are of one source, in one form, and only the list of pictures or classes is another one."""
    if replace(plan, source=before.source, classes=before.classes, shard_size=before.shard_size) != before:
        return False
    left_out = ("images", "list_sha256")
    mine, theirs = ({key: each[key] for key in each if key not in left_out} for each in (plan.source, before.source))
    return plan != before and mine == theirs


def _check_list(listing: Listing, request: StoreRequest, out: Path) -> None:
    """Refuse a list of pictures that is not the one of the store; the message names a picture that differs."""
    names = listing.source.names
    here = {names[line]: label for line, label in zip(listing.lines, listing.labels, strict=True)}
    there = dict(read_image_list(out / "images.json"))
    gone, new = ([name for name in one if name not in other] for one, other in ((there, here), (here, there)))
    others = [name for name in here if here[name] != there.get(name, here[name])]
    words = [
        f"{counted(len(some), 'picture')} {what}, the first {brief(some[0])!r}"
        for some, what in (
            (gone, "of the store not here"),
            (new, "here not in the store"),
            (others, "of another class"),
        )
        if some
    ]
    can_skip = not new and not others and request.bad == "stop" and isinstance(listing.source, Folder)
    advice = "Leave such pictures out: --bad skip; or give" if can_skip else "Give"
    if words:
        raise AlphaflowError(
            f"{out}: holds another preparation: {'; '.join(words)}. {advice} another --out, or delete it"
        )


def _in_brief(lines: list[str]) -> str:
    """The first differences between two plans; checksums, which nobody can read, only where nothing else differs."""
    telling = [line for line in lines if "sha256" not in line] or lines
    more = f"; and {len(telling) - 2} more" if len(telling) > 2 else ""
    return "; ".join(shorten(line, 120) for line in telling[:2]) + more


def list_pictures(request: StoreRequest) -> Listing:
    """List all pictures, or `limit` of them spread evenly over the list; labels never depend on the limit."""
    source = open_source(request.source, request.labelling.columns.image)
    if not source.names:
        raise AlphaflowError(
            f"{request.source}: no pictures here ({', '.join(source.notes) or 'it is empty'}). JPEG, PNG, WebP, AVIF, "
            "GIF, TIFF, BMP, PPM and TGA are read; convert others"
        )
    labelled = label_pictures(source, request.labelling)
    lines, labels = labelled.lines, labelled.labels
    if 0 < request.limit < len(lines):
        kept = [number * len(lines) // request.limit for number in range(request.limit)]
        lines, labels = [lines[at] for at in kept], [labels[at] for at in kept]
    others = len(source.names) - len(labelled.lines)
    left = [f"{counted(others, 'picture')} of other splits left aside"] if others else []
    return Listing(replace(source, notes=[*source.notes, *left, *labelled.notes]), lines, labels, labelled.classes)


def shard_size(count: int, sample_bytes: int) -> int:
    """How many pictures a shard holds: it follows from the plan alone, never from the machine."""
    wanted = min(max(-(-count // SHARDS_WANTED), SHARD_LEAST), SHARD_PICTURES)
    return max(1, min(wanted, SHARD_BYTES // sample_bytes))


def default_out(source: str, size: int, autoencoder: str, crop: Crop = "square") -> Path:
    """The folder `latents/<source>-<size>-<autoencoder>[-<crop>]`: other settings get another folder."""
    bare = source.split("://")[-1].split("@")[0].split(":")[0] if source.startswith("hf://") else source
    parts = [part for part in bare.replace(":", "-").split("/") if part not in ("", ".", "..", "train")]
    names = [part if is_there(Path(source)) else PATTERN.sub("", part) for part in parts]
    name = ([name for name in names if name] or [Path.cwd().name])[-1].split(".")[0] or "pictures"
    kind = "pixels" if autoencoder == "none" else public_id(autoencoder).rsplit("/", 1)[-1]
    return Path("latents") / f"{name}-{size}-{kind}{'' if crop == 'square' else f'-{crop}'}"


def default_batch(request: StoreRequest, device: torch.device) -> int:
    """How many pictures the encoder sees at once: 32 at 256 px on a GPU; fewer on a CPU, so that progress shows."""
    if request.autoencoder == "none":
        return 256
    return max(1, min(256 if device.type == "cuda" else 16, 32 * 256**2 // request.size**2))


def _is_whole(out: Path, before: StorePlan | None) -> bool:
    """Whether a store is finished and has all its shards; else one of them is made again, by the same encoder only."""
    shards = range(-(-before.images // before.shard_size)) if before else range(0)
    return is_there(out / "manifest.json") and all(is_done(out, shard) for shard in shards)


def _has_one_class(out: Path) -> bool:
    """Whether a store was begun with all pictures as one class; tables of labels were once not read."""
    return is_there(out / "classes.json") and read_class_file(out / "classes.json").folders == [""]


def _as_begun(listing: Listing, out: Path) -> Listing:
    """The list with the labels that a store was begun with: folders named by numbers were once sorted as words."""
    path = out / "classes.json"
    if listing.classes.order != AS_NUMBERS or not is_there(path):
        return listing
    classes = reordered(listing.classes, read_class_file(path))
    if classes is None:
        return listing
    number = {folder: index for index, folder in enumerate(classes.folders)}
    labels = [number[listing.classes.folders[label]] for label in listing.labels]
    return replace(listing, labels=labels, classes=classes)


def _with_the_removed(listing: Listing, out: Path) -> Listing:
    """The list as it was planned, where a folder only lost pictures since: `--bad skip` counts them as bad."""
    planned = read_image_list(out / "images.json")
    names = listing.source.names
    now = {(names[line], label) for line, label in zip(listing.lines, listing.labels, strict=True)}
    if not isinstance(listing.source, Folder) or not now < set(planned):
        return listing
    source = replace(listing.source, names=[name for name, _ in planned])
    return Listing(source, range(len(planned)), [label for _, label in planned], listing.classes)


def _encoder(
    request: StoreRequest, listing: Listing, before: StorePlan | None, *, finished: bool, device: torch.device
) -> Encoder:
    """What the plan must know of the encoder.

    A whole store is believed: its encoder is not loaded again to say that nothing is to be done.
    """
    if request.autoencoder == "none":
        record = AutoencoderRecord("none", "", "", 1, 1.0, 0.0, "exact", None)
        return Encoder(record, (3, request.size, request.size), "pixels")
    if before and finished and before.autoencoder.id == public_id(request.autoencoder):
        return Encoder(before.autoencoder, before.latent, before.kind)
    model = _autoencoder(request, device)
    if request.size % model.downscale:
        raise AlphaflowError(f"--size {request.size}: {model.id} needs a multiple of {model.downscale}")
    if model.side not in (None, request.size):
        raise AlphaflowError(
            f"--size {request.size}: {model.id} makes pictures of {model.side} px only. Give --size {model.side}"
        )
    side = request.size // model.downscale
    chosen, error = _precision(request, listing, model, before, device)
    record = record_of(model, chosen, error)
    return Encoder(record, (model.channels, side, side), "moments" if model.has_posterior else "mean", model)


def record_of(model: Autoencoder, precision: str, error: float | None) -> AutoencoderRecord:
    """What a manifest keeps of an autoencoder, and of the precision in which it encoded."""
    mean, std = model.statistics or (None, None)
    return AutoencoderRecord(
        id=model.id,
        revision=model.revision,
        weights_sha256=model.weights_sha256,
        downscale=model.downscale,
        scale=model.scale,
        shift=model.shift,
        precision=precision,
        precision_error=error,
        kind=None if model.kind in UNNAMED else model.kind,
        channel_mean=mean,
        channel_std=std,
    )


def _autoencoder(request: StoreRequest, device: torch.device) -> Autoencoder:
    """Load the autoencoder; where it cannot be fetched, the message names the way without one."""
    try:
        return load_autoencoder(request.autoencoder, device=device)
    except AlphaflowError as fault:
        if not isinstance(fault.__cause__, HubFault):
            raise
        way = "Small pictures can stay pixels, without an autoencoder: --autoencoder none --size 32"
        raise AlphaflowError(f"{fault}. {way}") from fault


def _precision(
    request: StoreRequest, listing: Listing, model: Autoencoder, before: StorePlan | None, device: torch.device
) -> tuple[str, float | None]:
    """The encoder's precision, and its error where it was measured.

    `auto` is fp32 on a CPU, is measured on a GPU, and stays what it was when a run goes on.
    """
    if before and request.precision == "auto":
        return before.autoencoder.precision, before.autoencoder.precision_error
    if request.precision == "auto" and device.type == "cpu":
        return "fp32", None
    count = min(SAMPLE, len(listing.lines))
    lines = [listing.lines[number * len(listing.lines) // count] for number in range(count)]
    sample = sample_pixels(listing.source, lines, request.size, request.max_pixels, request.crop)
    return choose_precision(model, sample, device, request.precision)


def _plan(request: StoreRequest, listing: Listing, encoder: Encoder) -> StorePlan:
    source = {
        "kind": listing.source.kind,
        "name": listing.source.name,
        "images": len(listing.lines),
        "list_sha256": hashlib.sha256(listing.to_bytes()).hexdigest(),
        **listing.source.facts(),
    }
    plan = StorePlan(
        source=source,
        image_size=request.size,
        latent=encoder.latent,
        kind=encoder.kind,
        dtype="uint8" if encoder.kind == "pixels" else STORED_DTYPES[request.dtype],
        flips=request.flips,
        autoencoder=encoder.record,
        transform=TRANSFORMS[request.crop],
        classes=len(listing.classes.folders),
        shard_size=0,
    )
    return replace(plan, shard_size=shard_size(len(listing.lines), plan.sample_bytes))
