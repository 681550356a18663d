"""One shard of latents: pictures in, one file and its sidecar out. The unit of resuming and of sharing work."""

import errno
import itertools
import json
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alphaflow_cli.data.batches import to_device
from alphaflow_cli.data.classes import Classes
from alphaflow_cli.data.manifest import Crop, StorePlan
from alphaflow_cli.data.pictures import MAX_PIXELS, Bad, BadPicture, Fetch, Source, decode, read_picture
from alphaflow_cli.data.tables import AS_FOUND, Labelling
from alphaflow_cli.data.writing import write_shard
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.model.compiling import can_compile, compile_by, compile_part
from alphaflow_cli.nn.autoencoder import Autoencoder, load_autoencoder
from alphaflow_cli.runtime.precision import encoder_precision, exact_device, has_bf16
from alphaflow_cli.runtime.processes import smaller_batch_if_full
from alphaflow_cli.runtime.transfer import Arriving
from alphaflow_cli.tensors import Array
from alphaflow_cli.text import brief

Tell = Callable[[int], None]
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
PRECISIONS = ("bf16", "tf32", "fp32")  # fastest first
MAX_ERROR, MAX_ERROR_PLAIN = 0.25, 0.01  # see choose_precision
COMPILED_FROM = 18_000  # pictures of 256 px: 21 s / (1/519 s − 1/1,307 s), eager and compiled pictures/s of an H100
TOGETHER = 16  # pictures decoded by one call in another thread: small ones cost less than the call


@dataclass(frozen=True)
class StoreRequest:
    """What the command line of prep-latents requests."""

    source: str
    size: int
    autoencoder: str
    dtype: str = "fp16"  # or fp32
    flips: bool = False
    batch: int = 0  # by the size
    limit: int = 0  # all
    bad: Bad = "stop"
    precision: str = "auto"  # fp32, tf32, bf16
    max_pixels: int = MAX_PIXELS
    crop: Crop = "square"
    labelling: Labelling = AS_FOUND


@dataclass(frozen=True)
class Listing:
    """The pictures of a store: lines of the source, their labels, the classes."""

    source: Source
    lines: Sequence[int]
    labels: Sequence[int]
    classes: Classes

    def to_bytes(self) -> bytes:
        """The content of images.json: one picture per line."""
        names = self.source.names
        pairs = zip(self.lines, self.labels, strict=True)
        return b"[\n" + b",\n".join(json.dumps([names[line], label]).encode() for line, label in pairs) + b"\n]\n"


@dataclass(frozen=True)
class Job:
    """What every process of one preparation needs to know."""

    request: StoreRequest
    listing: Listing  # one picture per line of images.json
    out: Path
    plan: StorePlan
    batch: int
    threads: int  # that decode pictures in each process
    encoder: Autoencoder | None  # where the plan had to look at it

    @property
    def images(self) -> int:
        """How many pictures there are to encode, bad ones included."""
        return len(self.listing.lines)

    def span(self, shard: int) -> range:
        """The lines of images.json that a shard covers."""
        size = self.plan.shard_size
        return range(shard * size, min((shard + 1) * size, self.images))

    def picture_name(self, line: int) -> str:
        """The source's name of the picture on a line of images.json."""
        return self.listing.source.names[self.listing.lines[line]]


@dataclass(frozen=True)
class EncoderInput:
    """One line of images.json, decoded: pixels (3, H, W) uint8, or why there are none."""

    line: int
    pixels: Array | None
    why: str


def encode_shards(job: Job, shards: Sequence[int], encoder: Autoencoder, device: torch.device, tell: Tell) -> None:
    """Make these shards; the source is walked through once, in order. A shard is written while the next is encoded."""
    lines = [line for shard in shards for line in job.span(shard)]
    with closing(decoded_pictures(job, lines)) as stream, ThreadPoolExecutor(1, "write") as beside:
        writing: Future[None] | None = None
        for shard in shards:
            pictures = itertools.islice(stream, len(job.span(shard)))
            rows = encode_shard(job, shard, encoder, pictures, device=device, tell=tell)
            if writing is not None:
                writing.result()
            writing = beside.submit(rows.save, shard)
        if writing is not None:
            writing.result()


def encode_shard(
    job: Job, shard: int, encoder: Autoencoder, stream: Iterator[EncoderInput], *, device: torch.device, tell: Tell
) -> "_Rows":
    """Encode the rows of one shard in batches of neighbours. A GPU has the next batch before the last one is read."""
    rows = _Rows(job, job.span(shard))
    good = (picture for picture in stream if rows.accept(picture))
    queued: tuple[list[EncoderInput], Arriving] | None = None
    while group := list(itertools.islice(good, job.batch)):
        pixels = [picture.pixels for picture in group if picture.pixels is not None]
        with smaller_batch_if_full(job.batch):
            encoded = encode_rows(encoder, job.plan, pixels, device)
        if queued is not None:
            rows.add(queued[0], fetch_rows(job.plan, queued[1]))
            tell(len(queued[0]))
        queued = group, encoded
    if queued is not None:
        rows.add(queued[0], fetch_rows(job.plan, queued[1]))
        tell(len(queued[0]))
    tell(len(rows.bad))
    return rows


def decoded_pictures(job: Job, lines: Sequence[int]) -> Generator[EncoderInput, None, None]:
    """Decode pictures ahead of the encoder, and yield them in order.

    The source is open from the first fetch to the end of the last thread: the list of fetches ends long before.
    """
    pool = ThreadPoolExecutor(job.threads, "decode")
    pending: deque[Future[list[EncoderInput]]] = deque()
    with job.listing.source.reading([job.listing.lines[line] for line in lines]) as fetches:
        pairs = ((line, fetch) for line, (_, fetch) in zip(lines, fetches, strict=True))
        try:
            while group := list(itertools.islice(pairs, TOGETHER)):
                pending.append(
                    pool.submit(_decode_all, group, job.plan.image_size, job.request.max_pixels, job.request.crop)
                )
                if len(pending) * TOGETHER > 2 * job.batch + TOGETHER * job.threads:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _decode_all(group: list[tuple[int, Fetch]], size: int, max_pixels: int, crop: Crop) -> list[EncoderInput]:
    return [_decode_one(line, fetch, size, max_pixels, crop) for line, fetch in group]


def _decode_one(line: int, fetch: Fetch, size: int, max_pixels: int, crop: Crop) -> EncoderInput:
    try:
        pixels = read_picture(fetch, partial(decode, size=size, max_pixels=max_pixels, crop=crop))
    except BadPicture as fault:
        return EncoderInput(line, None, str(fault))
    return EncoderInput(line, pixels, "")


def encode_rows(encoder: Autoencoder, plan: StorePlan, group: Sequence[Array], device: torch.device) -> Arriving:
    """Encode a batch to stored rows, by tensor name: the pictures', and their mirror images' if the plan says so.

    A GPU has only been told to: `fetch_rows` waits for it.
    """
    images = torch.from_numpy(np.stack(group))
    if plan.kind == "pixels":
        return Arriving({"pixels": images})
    images = to_device(images, device)
    rows: dict[str, torch.Tensor] = {plan.kind: _rows_of(encoder, plan, images, device)}
    if plan.stores_flips:
        rows[f"{plan.kind}_flip"] = _rows_of(encoder, plan, images.flip(-1), device)
    return Arriving(rows)


def _rows_of(encoder: Autoencoder, plan: StorePlan, images: torch.Tensor, device: torch.device) -> torch.Tensor:
    with encoder_precision(plan.autoencoder.precision, device):
        mean, std = encoder.encode(images.float() * 2 / 255 - 1)
    rows = torch.cat([mean, std], dim=1) if plan.kind == "moments" else mean
    return rows.to(getattr(torch, plan.dtype))


def fetch_rows(plan: StorePlan, encoded: Arriving) -> dict[str, Array]:
    """The encoded rows on the host; values that are not finite are refused."""
    rows: dict[str, Array] = {name: tensor.numpy() for name, tensor in encoded.fetch().items()}
    for values in rows.values():
        if values.dtype != np.uint8 and not np.isfinite(values).all():
            raise AlphaflowError(
                f"{plan.autoencoder.id}: gives latents that are not finite in {plan.dtype}; try --dtype fp32"
            )
    return rows


def sample_pixels(source: Source, lines: Sequence[int], size: int, max_pixels: int, crop: Crop) -> Array:
    """Some pictures as the encoder gets them, uint8 (n, 3, H, W); bad ones are passed over."""
    with source.reading(lines) as fetches:
        decoded = [_decode_one(line, fetch, size, max_pixels, crop).pixels for line, fetch in fetches]
    return np.stack([pixels for pixels in decoded if pixels is not None] or [np.zeros((3, size, size), np.uint8)])


def choose_precision(
    encoder: Autoencoder, sample: Array, device: torch.device, requested: str
) -> tuple[str, float | None]:
    """The fastest precision whose error is small, or the requested one; with its error.

    Error: rms difference of the mean from float32, relative to the rms posterior std: noise of that size is added to
    every latent anyway. Without a posterior the latents' own spread stands in, and the bound is smaller.
    """
    reference, std = _moments(encoder, sample, "fp32", device)
    yardstick, bound = (std, MAX_ERROR) if encoder.has_posterior else (reference - reference.mean(), MAX_ERROR_PLAIN)
    unit = float(yardstick.square().mean().sqrt()) or 1.0
    fast = device.type != "cuda" or has_bf16(device)  # a GPU without bf16 has no TF32 either
    for name in (PRECISIONS if fast else ["fp32"]) if requested == "auto" else [requested]:
        mean, _ = _moments(encoder, sample, name, device)
        error = float((mean - reference).square().mean().sqrt()) / unit
        if requested == name or error <= bound:
            return name, error
    return "fp32", 0.0


def _moments(encoder: Autoencoder, sample: Array, name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    with encoder_precision(name, device):
        mean, std = encoder.encode(torch.from_numpy(sample).to(device).float() * 2 / 255 - 1)
    return mean.to(exact_device(device)).double(), std.to(exact_device(device)).double()


def load_encoder(job: Job, device: torch.device) -> Autoencoder:
    """The encoder, which the plan has read already unless the store was finished; compiled where it pays.

    The number of pictures decides, so all processes and all starts do the same.
    """
    encoder, plan = job.encoder or load_autoencoder(job.request.autoencoder, device=device), job.plan
    part = getattr(encoder.module, "encoder", None)
    work = job.images * (2 if plan.stores_flips else 1) * plan.image_size**2 / 256**2
    if part is None or plan.autoencoder.precision != "bf16" or work < COMPILED_FROM or not can_compile(device):
        return encoder
    of_one_size = replace(encoder, rows=job.batch)

    def first() -> None:
        with encoder_precision("bf16", device):
            of_one_size.encode(torch.zeros((job.batch, 3, plan.image_size, plan.image_size), device=device))

    compile_part(part)
    undo = partial(setattr, part, "_compiled_call_impl", None)
    return of_one_size if compile_by(first, undo=undo, what="the encoder") else encoder


@contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """Turn a full disk, or a place that cannot be written, into a clear message. A fault of another file passes.

    What is finished stays, and is resumed from.
    """
    try:
        yield
    except OSError as fault:
        if fault.errno in NO_ROOM:
            raise AlphaflowError(
                f"{out}: no room left ({fault.strerror}). Finished shards are kept. Free some room, and run "
                "the same command again"
            ) from fault
        if fault.errno != errno.EIO and not Path(str(fault.filename)).is_relative_to(out):
            raise
        raise AlphaflowError(
            f"{brief(out)}: cannot be written ({fault.strerror}). Give another --out, or mend this one; what is "
            "finished is kept"
        ) from fault


class _Rows:
    """The rows of one shard, which grow batch by batch."""

    def __init__(self, job: Job, span: range) -> None:
        self.job, self.span, self.filled = job, span, 0
        self.bad: list[dict[str, Any]] = []
        plan = job.plan
        names = [plan.kind, *([f"{plan.kind}_flip"] if plan.stores_flips else [])]
        shape = (len(span), plan.rows, *plan.latent[1:])
        self.tensors: dict[str, Array] = {name: np.empty(shape, plan.dtype) for name in names}
        self.tensors["label"] = np.empty(len(span), np.int64)
        self.tensors["index"] = np.empty(len(span), np.int64)

    def accept(self, picture: EncoderInput) -> bool:
        """Whether a picture is good; a bad one is put down, or stops the run."""
        if picture.pixels is not None:
            return True
        name = self.job.picture_name(picture.line)
        if self.job.request.bad == "stop":
            raise AlphaflowError(f"{name!r}: {picture.why}. Mend or remove it, or leave such pictures out: --bad skip")
        self.bad.append({"line": picture.line, "name": name, "why": picture.why})
        return False

    def add(self, group: Sequence[EncoderInput], encoded: dict[str, Array]) -> None:
        """Append the rows of a batch, with their labels and places in the list."""
        place = slice(self.filled, self.filled + len(group))
        for name, rows in encoded.items():
            self.tensors[name][place] = rows
        self.tensors["index"][place] = [picture.line for picture in group]
        self.tensors["label"][place] = [self.job.listing.labels[picture.line] for picture in group]
        self.filled += len(group)

    def save(self, shard: int) -> None:
        """Write the shard's file with its statistics, then the sidecar."""
        with writing_to(self.job.out):
            content = {key: rows[: self.filled] for key, rows in self.tensors.items()}
            write_shard(self.job.out, self.job.plan, shard, content, self.bad)
