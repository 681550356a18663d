"""What people are told about a store: what making it will take, what is in it, whether it is sound."""

import itertools
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from alphaflow_cli.data.manifest import read_manifest
from alphaflow_cli.data.store import verify_store
from alphaflow_cli.engine.encode import Job, encode_rows, pictures
from alphaflow_cli.engine.prepare import bytes_needed, free_bytes, missing_shards
from alphaflow_cli.engine.processes import device_of
from alphaflow_cli.engine.progress import duration, size
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.nn.autoencoder import load_autoencoder

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
    with closing(pictures(job, lines)) as stream:
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
