"""What a preparation will take, before anything is written: disk and time."""

import itertools
import time
from dataclasses import dataclass
from pathlib import Path

from alphaflow_cli.engine.encode import Job, encode, pictures
from alphaflow_cli.engine.prepare import bytes_needed, device_of, free_bytes, missing_shards
from alphaflow_cli.nn.autoencoder import load_autoencoder

TRIAL_SECONDS, TRIAL_PICTURES = 5.0, 512  # the trial ends at the first of the two


@dataclass(frozen=True)
class Estimate:
    """Of the shards that are still missing."""

    images: int
    todo: int
    shards: int
    latent: tuple[int, int, int]
    bytes_needed: int
    bytes_free: int
    tried: int  # pictures decoded and encoded for the estimate
    images_per_second: float
    seconds: float


def estimate(job: Job, out: Path, processes: int) -> Estimate:
    """Encode a few pictures spread over the source, throw them away, and multiply."""
    missing = missing_shards(job)
    todo = sum(len(job.span(shard)) for shard in missing)
    tried, seconds = _trial(job)
    gpus = processes if device_of(0).type == "cuda" else 1  # on a CPU all processes share the same cores
    rate = gpus * tried / seconds
    return Estimate(
        images=len(job.lines),
        todo=todo,
        shards=len(missing),
        latent=job.plan.latent,
        bytes_needed=bytes_needed(job, missing),
        bytes_free=free_bytes(out),
        tried=tried,
        images_per_second=rate,
        seconds=todo / rate,
    )


def _trial(job: Job) -> tuple[int, float]:
    """Pictures and seconds; the first batch only warms up."""
    encoder = load_autoencoder(job.autoencoder, device=device_of(0))
    count = min(len(job.lines), TRIAL_PICTURES + job.batch)
    lines = [number * len(job.lines) // count for number in range(count)]
    good = (picture.pixels for picture in pictures(job, lines) if picture.pixels is not None)
    encode(encoder, job.plan, list(itertools.islice(good, min(job.batch, count // 2))), device_of(0))
    tried, start = 0, time.monotonic()
    while group := list(itertools.islice(good, job.batch)):
        encode(encoder, job.plan, group, device_of(0))
        tried += len(group)
        if time.monotonic() - start > TRIAL_SECONDS:
            break
    return max(tried, 1), max(time.monotonic() - start, 1e-3)
