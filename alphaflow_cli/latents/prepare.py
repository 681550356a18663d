"""Images to latents: plan, check the room, share the shards out, finish. What `prep-latents` does.

Order on disk: plan.json, images.json, classes.json → shard and sidecar, shard and sidecar, … → stats.safetensors →
manifest.json. Whatever moment a kill comes at, the same command goes on with the first missing shard, and the finished
store has the same bytes for any number of processes and interruptions (with the same --batch). The first process plans
and finishes; process r of w makes the shards with number % w == r.

And what there is to say about a store: what making it will take, what is in it, whether it is sound.
"""

import itertools
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from alphaflow_cli.data.manifest import BEWARE, Manifest, StorePlan, plan_to_dict, read_image_list, read_manifest
from alphaflow_cli.data.store import class_names, verify_store
from alphaflow_cli.data.writing import finish_store, is_done
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import free_bytes, is_there, to_json, write_pieces
from alphaflow_cli.latents.encode import (
    TOGETHER,
    Job,
    StoreRequest,
    decoded_pictures,
    encode_rows,
    encode_shards,
    fetch_rows,
    load_encoder,
    writing_to,
)
from alphaflow_cli.latents.plan import check_plan, plan_job
from alphaflow_cli.runtime.lock import hold
from alphaflow_cli.runtime.processes import Processes, all_or_none, check_seen, processes_here
from alphaflow_cli.runtime.progress import Progress, duration, say, size
from alphaflow_cli.text import brief, counted

DOCUMENTS = ("plan.json", "images.json", "classes.json", "stats.safetensors", "manifest.json")  # beside the shards
BEFORE_THE_PLAN = ("images.json", "classes.json")  # in the order of writing
SPARE = 64_000_000  # bytes that the disk should keep free beyond the store
TRIAL_SECONDS = 3.0  # no batch of the trial begins later


def prepare_store(request: StoreRequest, out: Path, processes: Processes, *, shown: bool = True) -> Path | None:
    """Do this process's part of a store. The first one holds the folder, plans and finishes for all, and returns it."""
    first = processes.rank == 0
    with ExitStack() as held:

        def plan() -> tuple[Job, bool]:
            job = plan_job(request, out, processes)
            if begin := bool(missing_shards(job)) or not has_documents(out):
                check_room(out, bytes_needed(job, missing_shards(job)))
                held.enter_context(writing_to(out))
                held.enter_context(hold(out, "prep-latents"))
                _begin(job, shown)
            return job, begin

        def join() -> tuple[Job, bool]:
            check_seen(out / "plan.json", processes, "the store")
            return plan_job(request, out, processes), False

        planned = all_or_none(processes, lambda: plan() if first else None)
        job, begin = all_or_none(processes, lambda: planned or join())  # now the plan lies in the folder
        _work_shown(job, processes, shown and begin)
        processes.wait()
        if begin:
            finish_store(out, job.plan)
    return out if first else None


def has_documents(out: Path) -> bool:
    """Whether a store has everything that stands beside its shards."""
    return all(is_there(out / name) for name in DOCUMENTS)


def count_encoders(autoencoder: str, requested: int | None, device: str | None = None) -> int:
    """One per GPU, else one. Pictures that stay pixels need no GPU, so any number may share that work."""
    return requested if requested and autoencoder == "none" else processes_here(requested, device)


def missing_shards(job: Job) -> list[int]:
    """The shards without a sidecar, or whose file is not as long as the sidecar says."""
    total = -(-job.images // job.plan.shard_size)
    return [shard for shard in range(total) if not is_done(job.out, shard)]


def bytes_needed(job: Job, shards: Sequence[int]) -> int:
    """The bytes that these shards take on disk; the list of pictures and the statistics are too small to count."""
    return sum(len(job.span(shard)) for shard in shards) * job.plan.sample_bytes


def check_room(out: Path, needed: int) -> None:
    """Refuse a disk that is too small, before anything is written."""
    free = free_bytes(out)
    if needed + SPARE > free:
        raise AlphaflowError(
            f"{out}: needs {size(needed + SPARE)}, {size(free)} are free. Give another --out, or free some room"
        )


def _begin(job: Job, shown: bool) -> None:
    """Write the plan before the first picture is read."""
    listing, source = job.listing, job.listing.source
    words = [", ".join([f"{source.name}: {counted(job.images, 'picture')}", *source.notes]), listing.classes.summary()]
    begin_store(job.out, job.plan, [listing.to_bytes()], listing.classes.as_dict(), words if shown else [])


def begin_store(
    out: Path, plan: StorePlan, images: Iterable[bytes], classes: dict[str, Any], words: Sequence[str]
) -> None:
    """Write what is known before the first row, the plan last, and remove what a kill left behind.

    `images` is the content of images.json. `words` are said of the store; without any, nothing is.
    """
    check_plan(plan, out)  # once more: another command may have made a store here while we made our plan
    there = {entry.name for entry in out.iterdir() if entry.name[0] != "."}
    begun = there <= set(BEFORE_THE_PLAN) and "images.json" in there  # a kill came between these and the plan
    if there and not {"plan.json", "manifest.json"} & there and not begun:
        raise AlphaflowError(f"{out}: holds files that belong to no latent store; give a new or an empty --out")
    for left in out.glob(".*.tmp"):
        left.unlink(missing_ok=True)  # a worker that outlives its killed parent renames its own
    write_pieces(out / "images.json", images)
    write_pieces(out / "classes.json", [to_json(classes)])
    write_pieces(out / "plan.json", [to_json(plan_to_dict(plan))])
    beware = BEWARE.get(plan.autoencoder.kind or "")
    for line in [*words, *([f"beware: {beware}"] if beware and words else [])]:
        say(line)


def _work_shown(job: Job, processes: Processes, shown: bool) -> None:
    """Make this process's shards; the first process shows the progress of all."""
    total = job.images
    missing = missing_shards(job) if processes.rank == 0 else []
    done = total - sum(len(job.span(shard)) for shard in missing)
    part = "prepare" if job.plan.kind == "pixels" else "encode"
    with Progress(part, total, unit="img", done=done, shown=shown) as bar:

        def advance(count: int) -> None:
            count = min(count * processes.size, total - bar.done)
            bar.advance(count, note=size((bar.done + count) * job.plan.sample_bytes))

        shards = range(-(-total // job.plan.shard_size))[processes.rank :: processes.size]
        mine = [shard for shard in shards if not is_done(job.out, shard)]
        try:
            if mine:
                encode_shards(job, mine, load_encoder(job, processes.device), processes.device, advance)
            processes.wait()
        except (KeyboardInterrupt, SystemExit):
            if shown:
                say(f"{job.out}: interrupted; what is finished is kept, the same command goes on from there")
            raise
        advance(total)


def estimate_store(job: Job, processes: Processes) -> list[str]:
    """Encode a few pictures spread over the source, and estimate from their time; the last line is the path."""
    missing = missing_shards(job)
    todo = sum(len(job.span(shard)) for shard in missing)
    tried, seconds = _trial(job, processes.device)
    gpus = processes.size if processes.device.type == "cuda" else 1  # on a CPU all processes share the same cores
    rate = gpus * tried / seconds
    shape, what = "x".join(map(str, job.plan.latent)), "pixels" if job.plan.kind == "pixels" else "latents"
    return [
        f"pictures: {job.images:,}, {todo:,} to do in {counted(len(missing), 'shard')}, {what} {shape}",
        f"disk: {size(bytes_needed(job, missing))} needed, {size(free_bytes(job.out))} free",
        f"time: {duration(todo / rate)} ({rate:.1f} pictures/s, tried on {tried})",
        str(job.out),
    ]


def _trial(job: Job, device: torch.device) -> tuple[int, float]:
    """Pictures and seconds, after one to warm up; batches double until the time is over or they are full ones."""
    encoder = load_encoder(job, device)
    count = min(job.images, 4 * job.batch)
    runs = -(-count // TOGETHER)  # of neighbours, which many sources fetch together
    lines = [run * job.images // runs + at for run in range(runs) for at in range(min(TOGETHER, job.images // runs))]
    with closing(decoded_pictures(job, lines)) as stream:
        good = (picture.pixels for picture in stream if picture.pixels is not None)
        if first := list(itertools.islice(good, 1)):
            fetch_rows(job.plan, encode_rows(encoder, job.plan, first, device))
        tried, batch, start = 0, encoder.rows or 1, time.monotonic()  # a compiled one is given whole batches
        while (group := list(itertools.islice(good, batch))) and time.monotonic() - start < TRIAL_SECONDS:
            fetch_rows(job.plan, encode_rows(encoder, job.plan, group, device))
            tried, batch = tried + len(group), min(2 * batch, job.batch)
    return max(tried, 1), max(time.monotonic() - start, 1e-3)


def describe_store(store: Path) -> list[str]:
    """What is in a store; the last line is its path."""
    manifest = read_manifest(store)
    plan, total = manifest.plan, sum(shard.bytes for shard in manifest.shards)
    shape = "x".join(str(length) for length in plan.latent)
    pictures, classes = counted(manifest.count, "picture"), counted(plan.classes, "class", "classes")
    lines = [f"{pictures}, {classes}, {plan.kind} {shape} {plan.dtype}, {size(total)}"]
    if plan.autoencoder.precision_error is not None:
        error = f"error {plan.autoencoder.precision_error:.3g} of the posterior std"
        lines.append(f"encoded in {plan.autoencoder.precision}: {error}")
    if manifest.bad:
        first = manifest.bad[0]
        lines.append(
            f"left out: {len(manifest.bad):,}, the first {first['name']!r}: {first['why']} (see manifest.json)"
        )
        lines += _emptied_classes(store, manifest)
    return [*lines, str(store)]


def _emptied_classes(store: Path, manifest: Manifest) -> list[str]:
    """A line about the classes whose pictures were all left out: the numbers of the others must not change for them."""
    labels = [label for _, label in read_image_list(store / "images.json")]
    left_out = {entry["line"] for entry in manifest.bad}
    kept = {label for line, label in enumerate(labels) if line not in left_out}
    gone, names = sorted({labels[line] for line in left_out} - kept), class_names(store)
    if not gone:
        return []
    shown = brief(", ".join(f"{label} = {names[label]}" for label in gone))
    stay, them = ("it stays a class", "it") if len(gone) == 1 else ("they stay classes", "them")
    return [
        f"no picture is left of {counted(len(gone), 'class', 'classes')} ({shown}): {stay}, so that the others keep "
        f"their numbers, and nothing is learnt of {them}"
    ]


def verify(store: Path) -> list[str]:
    """Check every byte against its checksum; give what is in the store, or raise all its faults at once."""
    faults = verify_store(store)
    if faults:
        raise AlphaflowError("\n".join(faults))
    return describe_store(store)
