"""The one pass over the pictures: every network's features, in chunks that can be resumed and shared out.

    chunk c of the pictures  →  features-<first>-<last>.safetensors   (rank r of w does the chunks with c % w == r)

A finished chunk is loaded, never computed again; the folder's name is a hash of everything that decides its content.
The host never waits in the middle of a chunk: network, decoder, feature networks and the copies to the host are queued
on the device. A thread beside fetches what has arrived, hashes it and writes it, while the next chunk is in the queue.
There is no communication inside the loop: ranks may be uneven. Afterwards the moments, sums in float64, are added up
over the ranks in a fixed order of networks. All ranks must see the same folder.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from alphaflow_cli.core.frechet import Moments
from alphaflow_cli.data.batches import to_device
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.evaluate.features import Extractor
from alphaflow_cli.evaluate.pictures import ImageSource, LeftOut
from alphaflow_cli.evaluate.results import space_of
from alphaflow_cli.files import make_folder, write_whole
from alphaflow_cli.runtime.precision import exact_device
from alphaflow_cli.runtime.processes import Processes, smaller_batch_if_full
from alphaflow_cli.runtime.progress import Progress, say
from alphaflow_cli.runtime.transfer import Arriving, Laps
from alphaflow_cli.text import for_terminal

CHUNK = 256  # pictures: whole groups of the sampler and the decoder (16), so that none is filled up but the last
CHUNK_FORMAT = 1  # of the chunk files
BATCH, LARGE = 64, 16e9  # pictures at once through a feature network; a GPU's bytes that hold a chunk of them
DIGEST = 32  # bytes of a picture's sha256
LEFT_OUT = "left out"  # among the notes of a chunk: its bad pictures
PICTURES = "pictures"  # among the features on their way to the host; no network is called so


@dataclass
class Clock:
    """Adds up the seconds that each part of the work took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time spent inside the `with` block to a part."""
        start = time.perf_counter()
        yield
        self.add({name: time.perf_counter() - start})

    def add(self, spent: Mapping[str, float]) -> None:
        """Add the seconds that each part took to those of before."""
        for name, seconds in spent.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds


@dataclass(frozen=True)
class Pass:
    """What one pass is over: the pictures, the networks, and the folder of its chunks."""

    source: ImageSource
    extractors: Mapping[str, Extractor]
    folder: Path
    chunk: int = CHUNK

    def chunks(self) -> list[tuple[int, int]]:
        """The spans of the chunks: first picture, last picture + 1."""
        count = self.source.count
        return [(first, min(first + self.chunk, count)) for first in range(0, count, self.chunk)]

    def path(self, first: int, stop: int) -> Path:
        """The file of a chunk's features."""
        return self.folder / f"features-{first:07d}-{stop:07d}.safetensors"


def evaluation_id(source: ImageSource, extractors: Mapping[str, Extractor], chunk: int, device: torch.device) -> str:
    """Name everything that decides the features: a pass resumes only in a folder of the same name.

    The kind of device is part of it, because each kind rounds otherwise. (A CPU is not named: earlier passes go on.)
    """
    spaces = {name: vars(space_of(extractors[name])) for name in sorted(extractors)}
    facts = {
        "format": CHUNK_FORMAT,
        "pictures": source.fingerprint(),
        "size": source.size,
        "spaces": spaces,
        "chunk": chunk,
        **({} if device.type == "cpu" else {"device": device.type}),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def usual_batch(network: str, device: torch.device) -> int:
    """How many pictures a network sees at once: Inception a chunk, on a GPU that holds it (1.1 times as fast)."""
    if network != "inception" or device.type != "cuda":
        return BATCH
    return CHUNK if torch.cuda.get_device_properties(device).total_memory >= LARGE else BATCH


def run_pass(work: Pass, processes: Processes, *, batch: int | None, clock: Clock, task: str = "features") -> None:
    """Compute the chunks of this process that are not there yet; Ctrl-C keeps every finished chunk."""
    make_folder(work.folder)
    mine = work.chunks()[processes.rank :: processes.size]
    waiting = [each for each in mine if not _finished(work, *each)]
    total = sum(stop - first for first, stop in mine)
    done = total - sum(stop - first for first, stop in waiting)
    if done and processes.rank == 0:
        say(f"{done:,} of {total:,} pictures were measured before{': going on' if waiting else ''}")
    try:
        with (
            contextlib.closing(work.source),
            Progress(task, total, unit="img", done=done, shown=processes.rank == 0) as bar,
            ThreadPoolExecutor(1) as beside,
        ):
            _measure_chunks(work, waiting, processes.device, bar, beside, batch=batch, clock=clock)
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM
        if processes.rank == 0:
            say(f"interrupted; finished chunks are kept in {work.folder}: run the same command again to go on")
        raise


@dataclass(frozen=True)
class Queued:
    """A chunk on its way from the device."""

    content: Arriving
    laps: Laps
    left_out: Sequence[LeftOut]


def _measure_chunks(
    work: Pass,
    waiting: Sequence[tuple[int, int]],
    device: torch.device,
    bar: Progress,
    beside: ThreadPoolExecutor,
    *,
    batch: int | None,
    clock: Clock,
) -> None:
    """Chunk after chunk; while one is drawn and measured, the one before is fetched, hashed and written beside it."""
    writing: tuple[Future[int], Laps] | None = None
    for part in [*waiting, None]:
        queued = _queue(work, part, device, batch=batch) if part is not None else None
        if writing is not None:
            bar.advance(writing[0].result())
            clock.add(writing[1].seconds())
        if part is not None and queued is not None:
            writing = beside.submit(_finish, work, part, queued), queued.laps


def _queue(work: Pass, part: tuple[int, int], device: torch.device, *, batch: int | None) -> Queued:
    """Queue the pictures of a chunk, their features and the way of both to the host; a CPU computes them here."""
    first, stop = part
    laps = Laps(device)
    with smaller_batch_if_full(1):  # a chunk is drawn at once, whatever --batch is
        images = work.source.images(first, stop)
    left_out = work.source.left_out()
    laps.end("pictures")
    assert len(images) + len(left_out) == stop - first, images.shape
    content = {PICTURES: images.permute(0, 2, 3, 1)}
    for name in sorted(work.extractors):
        size = batch or usual_batch(name, device)
        with smaller_batch_if_full(size):
            rows = [work.extractors[name](to_device(few, device)) for few in torch.split(images, size) if len(few)]
            content[name] = torch.cat(rows) if rows else torch.zeros(0, work.extractors[name].dim)
        laps.end(f"features {name}")
    return Queued(Arriving(content), laps, left_out)


def _finish(work: Pass, part: tuple[int, int], queued: Queued) -> int:
    """Fetch a measured chunk, check, hash and write it; the number of its pictures."""
    features = queued.content.fetch()
    images = features.pop(PICTURES)
    far = work.source.arrived()
    for name, values in features.items():
        if not bool(torch.isfinite(values).all()):
            raise AlphaflowError(
                f"{name}: features of pictures {part[0]}–{part[1] - 1} are not finite; the weights are broken"
            )
    plain = int((images == images[:, :1, :1]).flatten(1).all(1).sum())
    tensors = {"digests": _digests(images), **features}
    notes = {"far, plain": f"{far}, {plain}"}  # one note: of two the order would change
    if queued.left_out:
        notes[LEFT_OUT] = json.dumps([vars(each) for each in queued.left_out])
    _write(work.path(*part), tensors, notes)
    return part[1] - part[0]


def _write(path: Path, tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
    try:
        write_whole(path, save(tensors, notes))
    except AlphaflowError as fault:
        raise AlphaflowError(f"{fault} Make room and run the same command again; finished chunks are kept.") from fault


def _digests(images: Tensor) -> Tensor:
    """The sha256 of each picture's pixels, of (N, H, W, 3): it names the content and shows copies."""
    flat = images.contiguous().numpy()
    joined = b"".join(hashlib.sha256(picture.tobytes()).digest() for picture in flat)
    return torch.from_numpy(np.frombuffer(bytearray(joined), np.uint8)).view(-1, DIGEST)


def _finished(work: Pass, first: int, stop: int) -> bool:
    path = work.path(first, stop)
    if not path.is_file():
        return False
    try:
        with safe_open(str(path), "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        left_out = len(left_out_of(work, first, stop)) if work.source.leaves_out else 0
    except (SafetensorError, OSError):
        shapes, left_out = {}, 0
    wanted = {name: [stop - first - left_out, work.extractors[name].dim] for name in work.extractors}
    wanted["digests"] = [stop - first - left_out, DIGEST]
    if shapes != wanted:
        say(f"{path.name} is not complete, so it is measured again")
        return False
    return True


def load_part(work: Pass, name: str, first: int, stop: int) -> Tensor:
    """Read one network's features, or the digests, of one chunk."""
    path = work.path(first, stop)
    try:
        with safe_open(str(path), "pt") as file:
            part: Tensor = file.get_tensor(name)
            return part
    except (SafetensorError, OSError) as fault:
        raise AlphaflowError(
            f"{path}: cannot be read ({for_terminal(fault)}). All processes must share this folder; run the same "
            "command again."
        ) from fault


def load_all(work: Pass, name: str) -> Tensor:
    """Read one network's features, or the digests, of all pictures, in order."""
    return torch.cat([load_part(work, name, *each) for each in work.chunks()])


def own_moments(work: Pass, processes: Processes) -> dict[str, Moments]:
    """Every network's moments of the chunks that are this process's own; of none, if it has none."""
    own = {}
    for name in sorted(work.extractors):  # the same order everywhere, whatever was loaded or computed
        own[name] = Moments(work.extractors[name].dim)
        for first, stop in work.chunks()[processes.rank :: processes.size]:
            own[name].update(load_part(work, name, first, stop))
    return own


def add_up(own: dict[str, Moments], processes: Processes, count: int) -> None:
    """Make every process's own moments those of all `count` pictures, in place. Every process must call it."""
    for moments in own.values():
        moments.sums = processes.sum(moments.sums.to(exact_device(processes.device))).cpu()
        if moments.count != count:
            raise AlphaflowError(f"{moments.count:,} of {count:,} pictures were counted; run the same command again")


def gather_moments(work: Pass, processes: Processes) -> dict[str, Moments]:
    """Every network's moments over all processes; each reads its own chunks."""
    moments, count = own_moments(work, processes), work.source.count
    if work.source.leaves_out:
        own = sum(len(left_out_of(work, *each)) for each in work.chunks()[processes.rank :: processes.size])
        count -= int(processes.sum(torch.tensor([own], device=processes.device)).item())
    add_up(moments, processes, count)
    return moments


def left_out_of(work: Pass, first: int, stop: int) -> list[LeftOut]:
    """The bad pictures of a finished chunk."""
    with safe_open(str(work.path(first, stop)), "pt") as file:
        return [LeftOut(**each) for each in json.loads((file.metadata() or {}).get(LEFT_OUT, "[]"))]


def content_of(work: Pass) -> tuple[str, int]:
    """The common sha256 of the pictures of a finished pass, whatever held them, and how many equal an earlier one."""
    digests = load_all(work, "digests")
    distinct = len(torch.unique(digests, dim=0))
    return hashlib.sha256(digests.numpy().tobytes()).hexdigest(), len(digests) - distinct


def oddities_of(work: Pass) -> tuple[int, int]:
    """Of a finished pass: how many values lay beyond ±1.2, and how many pictures are of one colour throughout."""
    far = plain = 0
    for first, stop in work.chunks():
        with safe_open(str(work.path(first, stop)), "pt") as file:
            note = (file.metadata() or {}).get("far, plain", "0, 0")  # chunks of earlier versions have none
        here = [int(number) for number in note.split(", ")]
        far, plain = far + here[0], plain + here[1]
    return far, plain
