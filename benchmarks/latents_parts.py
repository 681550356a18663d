"""prep-latents by part: what reading, encoding and writing take alone, and all of them together after the start."""

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from alphaflow_cli.data.writing import write_shard
from alphaflow_cli.latents.encode import (
    Job,
    StoreRequest,
    decoded_pictures,
    encode_rows,
    encode_shards,
    fetch_rows,
    load_encoder,
)
from alphaflow_cli.latents.plan import plan_job
from alphaflow_cli.nn.autoencoder import Autoencoder
from alphaflow_cli.runtime.processes import Processes
from alphaflow_cli.tensors import Array

DIFFERENT = 512  # pictures; the others are links to them


def save_pictures(folder: Path, count: int, side: int) -> None:
    """JPEG files of ImageNet's usual form, one and a half times as large as they are needed."""
    folder.mkdir(parents=True, exist_ok=True)
    height = side * 3 // 2

    def save(index: int) -> None:
        draws = np.random.default_rng(index)
        small = draws.integers(0, 256, (height // 8, height // 6, 3), dtype=np.uint8)
        whole = Image.fromarray(small).resize((height * 4 // 3, height), Image.Resampling.BICUBIC)
        whole.save(folder / f"{index:06d}.jpg", quality=90)

    with ThreadPoolExecutor() as pool:
        list(pool.map(save, range(min(count, DIFFERENT))))
    for index in range(DIFFERENT, count):
        path = folder / f"{index:06d}.jpg"
        if not path.exists():  # of an attempt that broke off
            os.link(folder / f"{index % DIFFERENT:06d}.jpg", path)


def time_latents(pictures: Path, autoencoder: Path, out: Path, side: int, device: torch.device) -> dict[str, object]:
    """Seconds by part for all the pictures; `out` is a folder that is not there yet."""
    seconds: dict[str, float] = {}
    with part(seconds, "load and compile"):
        job = plan_job(StoreRequest(str(pictures), side, str(autoencoder)), out, Processes(device))
        encoder = load_encoder(job, device)
    out.mkdir(parents=True)
    with part(seconds, "reading alone"):
        batch = read_all(job)
    with part(seconds, "encoding alone"):
        rows = encode_again(job, encoder, batch, device)
    with part(seconds, "writing alone"):
        write_once(job, rows)
    seconds["writing alone"] *= job.images / job.plan.shard_size
    with part(seconds, "all together"):
        encode_shards(job, range(-(-job.images // job.plan.shard_size)), encoder, device, lambda count: None)
    return {
        "pictures": job.images,
        "size": side,
        "batch": job.batch,
        "threads": job.threads,
        "precision": job.plan.autoencoder.precision,
        "encoder_compiled": encoder.rows > 0,
        "seconds": seconds,
        "pictures_per_second": job.images / seconds["all together"],
    }


@contextmanager
def part(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Clock a part."""
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began


def read_all(job: Job) -> Sequence[Array]:
    """Read and crop every picture; keep a batch."""
    with closing(decoded_pictures(job, range(job.images))) as stream:
        kept = [each.pixels for each in itertools.islice(stream, job.batch) if each.pixels is not None]
        for _ in stream:
            continue
    return kept


def encode_again(job: Job, encoder: Autoencoder, batch: Sequence[Array], device: torch.device) -> Array:
    """Encode the same batch as often as there are batches."""
    encoded = encode_rows(encoder, job.plan, batch, device)
    for _ in range(len(batch), job.images, len(batch)):
        encoded = encode_rows(encoder, job.plan, batch, device)
    return fetch_rows(job.plan, encoded)[job.plan.kind]


def write_once(job: Job, rows: Array) -> None:
    """Write one whole shard."""
    labels = np.zeros(job.plan.shard_size, np.int64)
    content = {job.plan.kind: np.resize(rows, (len(labels), *rows.shape[1:])), "label": labels, "index": labels}
    write_shard(job.out, job.plan, 0, content, [])
