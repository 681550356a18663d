"""Images to latents: plan, check the room, share the shards out, finish. What `prep-latents` does.

Order on disk: plan.json, images.json, classes.json → shard and sidecar, shard and sidecar, … → stats.safetensors →
manifest.json. Whatever moment a kill comes at, the same command goes on with the first missing shard, and the finished
store has the same bytes for any number of processes and interruptions (with the same --batch). The first process plans
and finishes; process r of w makes the shards with number % w == r.

And what there is to say about a store: what making it will take, what is in it, whether it is sound.
"""

import itertools
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from alphaflow_cli.data.manifest import Crop, plan_to_dict, read_manifest
from alphaflow_cli.data.pictures import MAX_PIXELS
from alphaflow_cli.data.store import verify_store
from alphaflow_cli.data.writing import finish_store, is_done
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import is_there, to_json, write_pieces
from alphaflow_cli.latents.encode import Bad, Job, decoded_pictures, encode_rows, work, writing_to
from alphaflow_cli.latents.plan import Listing, StoreRequest, make_job
from alphaflow_cli.nn.autoencoder import load_autoencoder
from alphaflow_cli.runtime.lock import hold
from alphaflow_cli.runtime.processes import Alone, Processes, device_of, processes_here
from alphaflow_cli.runtime.progress import Progress, duration, say, size

FINISHED = ("images.json", "stats.safetensors", "manifest.json")  # beside the shards
BEFORE_THE_PLAN = ("images.json", "classes.json")  # in the order of writing
SPARE = 64_000_000  # bytes that the disk should keep free beyond the store


def prepare_latents(
    source: str,
    out: Path,
    *,
    size: int,
    autoencoder: str,
    dtype: str = "fp16",
    flips: bool = False,
    batch: int = 0,
    limit: int = 0,
    bad: Bad = "stop",
    precision: str = "auto",
    max_pixels: int = MAX_PIXELS,
    crop: Crop = "square",
    shown: bool = True,
) -> Path:
    """Make the store in this process, or go on with it; returns its folder. 0 means: batch by size, no limit."""
    request = StoreRequest(source, size, autoencoder, dtype, flips, batch, limit, bad, precision, max_pixels, crop)
    return prepare_store(request, out, Alone(device_of(0)), shown=shown)


def prepare_store(request: StoreRequest, out: Path, processes: Processes, *, shown: bool = True) -> Path:
    """Do this process's part of a store: the first one holds the folder, plans and finishes for all."""
    first = processes.rank == 0
    with ExitStack() as held:
        if first:
            job, listing = plan_job(request, out, processes)
            if begin := not _is_finished(job):
                check_room(out, bytes_needed(job, missing_shards(job)))
                held.enter_context(writing_to(out))
                held.enter_context(hold(out, "prep-latents"))
                _begin(job, listing, shown)
        processes.wait()
        if not first:
            job, begin = plan_job(request, out, processes)[0], False  # now the plan lies in the folder
        _work_shown(job, processes, shown and begin)
        processes.wait()
        if begin:
            finish_store(out, job.plan)
    return out


def plan_job(request: StoreRequest, out: Path, processes: Processes) -> tuple[Job, Listing]:
    """List the pictures and settle what is to be done; nothing is written."""
    threads = max(1, min(16, (os.cpu_count() or 1) // processes.size))
    return make_job(request, out, threads=threads, device=processes.device)


def _is_finished(job: Job) -> bool:
    return not missing_shards(job) and all(is_there(job.out / name) for name in FINISHED)


def count_encoders(autoencoder: str, requested: int | None) -> int:
    """One per GPU, else one. Pictures that stay pixels need no GPU, so any number may share that work."""
    return requested if requested and autoencoder == "none" else processes_here(requested)


def missing_shards(job: Job) -> list[int]:
    """The shards without a sidecar, or whose file is not as long as the sidecar says."""
    total = -(-len(job.lines) // job.plan.shard_size)
    return [shard for shard in range(total) if not is_done(job.out, shard)]


def bytes_needed(job: Job, shards: Sequence[int]) -> int:
    """On disk for these shards; the list of pictures and the statistics are small change."""
    return sum(len(job.span(shard)) for shard in shards) * job.plan.sample_bytes


def free_bytes(out: Path) -> int:
    """On the disk that holds, or will hold, a folder."""
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if is_there(folder))
    return shutil.disk_usage(existing).free


def check_room(out: Path, needed: int) -> None:
    """Refuse before anything is written."""
    free = free_bytes(out)
    if needed + SPARE > free:
        raise AlphaflowError(
            f"{out}: needs {size(needed + SPARE)}, {size(free)} are free. Give another --out, or free some"
        )


def _begin(job: Job, listing: Listing, shown: bool) -> None:
    """The plan, before the first picture is read; left-overs of a kill go."""
    out = job.out
    there = {entry.name for entry in out.iterdir() if entry.name[0] != "."}
    begun = there <= set(BEFORE_THE_PLAN) and "images.json" in there  # a kill came between these and the plan
    if there and "plan.json" not in there and not begun:
        raise AlphaflowError(f"{out}: holds files that are no latent store; give an empty or new --out")
    for left in out.glob(".*.tmp"):
        left.unlink(missing_ok=True)  # a worker that outlives its killed parent renames its own
    write_pieces(out / "images.json", [listing.to_bytes()])
    write_pieces(out / "classes.json", [to_json(listing.classes.as_dict())])
    write_pieces(out / "plan.json", [to_json(plan_to_dict(job.plan))])
    if shown:
        say(", ".join([f"{listing.source.name}: {len(job.lines)} pictures", *listing.source.notes]))
        say(listing.classes.summary())


def _work_shown(job: Job, processes: Processes, shown: bool) -> None:
    """Make this process's shards; the first process shows the progress of all."""
    total = len(job.lines)
    missing = missing_shards(job) if processes.rank == 0 else []
    done = total - sum(len(job.span(shard)) for shard in missing)
    with Progress("encode", total, unit="img", done=done, shown=shown) as bar:

        def advance(count: int) -> None:
            count = min(count * processes.size, total - bar.done)
            bar.advance(count, note=size((bar.done + count) * job.plan.sample_bytes))

        mine = [shard for shard in share_of(job, processes) if not is_done(job.out, shard)]
        try:
            if mine:
                work(job, mine, processes.device, advance)
            processes.wait()
        except (KeyboardInterrupt, SystemExit):
            if shown:
                say(f"{job.out}: interrupted; what is finished is kept, the same command goes on from there")
            raise
        advance(total)


def share_of(job: Job, processes: Processes) -> range:
    """Every N-th shard, beginning with the process's own number."""
    return range(processes.rank, -(-len(job.lines) // job.plan.shard_size), processes.size)


TRIAL_SECONDS = 3.0  # no batch of the trial begins later


@dataclass(frozen=True)
class Estimate:
    """Of the shards that are still missing."""

    out: Path
    images: int
    todo: int
    shards: int
    latent: tuple[int, int, int]
    bytes_needed: int
    bytes_free: int
    tried: int  # pictures decoded and encoded for the estimate
    images_per_second: float
    seconds: float

    def lines(self) -> list[str]:
        """For people; the last is the store's path."""
        shape = "x".join(str(length) for length in self.latent)
        rate = f"{self.images_per_second:.1f} pictures/s, tried on {self.tried}"
        return [
            f"pictures: {self.images:,}, {self.todo:,} to do in {self.shards:,} shards, latents {shape}",
            f"disk: {size(self.bytes_needed)} needed, {size(self.bytes_free)} free",
            f"time: {duration(self.seconds)} ({rate})",
            str(self.out),
        ]


def estimate_store(job: Job, processes: int) -> Estimate:
    """Encode a few pictures spread over the source, throw them away, and multiply."""
    missing = missing_shards(job)
    todo = sum(len(job.span(shard)) for shard in missing)
    tried, seconds = _trial(job)
    gpus = processes if device_of(0).type == "cuda" else 1  # on a CPU all processes share the same cores
    rate = gpus * tried / seconds
    return Estimate(
        out=job.out,
        images=len(job.lines),
        todo=todo,
        shards=len(missing),
        latent=job.plan.latent,
        bytes_needed=bytes_needed(job, missing),
        bytes_free=free_bytes(job.out),
        tried=tried,
        images_per_second=rate,
        seconds=todo / rate,
    )


def _trial(job: Job) -> tuple[int, float]:
    """Pictures and seconds, after one to warm up; batches double until the time is over or they are full ones."""
    encoder = load_autoencoder(job.autoencoder, device=device_of(0))
    count = min(len(job.lines), 4 * job.batch)
    lines = [number * len(job.lines) // count for number in range(count)]
    with closing(decoded_pictures(job, lines)) as stream:
        good = (picture.pixels for picture in stream if picture.pixels is not None)
        if first := list(itertools.islice(good, 1)):
            encode_rows(encoder, job.plan, first, device_of(0))
        tried, batch, start = 0, 1, time.monotonic()
        while (group := list(itertools.islice(good, batch))) and time.monotonic() - start < TRIAL_SECONDS:
            encode_rows(encoder, job.plan, group, device_of(0))
            tried, batch = tried + len(group), min(2 * batch, job.batch)
    return max(tried, 1), max(time.monotonic() - start, 1e-3)


def describe_store(store: Path) -> list[str]:
    """What is in a store; the last line is its path."""
    manifest = read_manifest(store)
    plan, total = manifest.plan, sum(shard.bytes for shard in manifest.shards)
    shape = "x".join(str(length) for length in plan.latent)
    lines = [f"{manifest.count:,} pictures, {plan.classes:,} classes, {plan.kind} {shape} {plan.dtype}, {size(total)}"]
    if plan.autoencoder.precision_error is not None:
        error = f"error {plan.autoencoder.precision_error:.3g} of the posterior std"
        lines.append(f"encoded in {plan.autoencoder.precision}: {error}")
    if manifest.bad:
        first = manifest.bad[0]
        lines.append(
            f"left out: {len(manifest.bad):,}, the first {first['name']!r}: {first['why']} (see manifest.json)"
        )
    return [*lines, str(store)]


def verify(store: Path) -> list[str]:
    """Every byte against its checksum; what is in the store, or all its faults at once."""
    faults = verify_store(store)
    if faults:
        raise AlphaflowError("\n".join(faults))
    return describe_store(store)
