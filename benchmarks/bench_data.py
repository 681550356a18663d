"""How fast the latent stream is: shuffled batches of a synthetic store, cold and warm, beside a plain read of it.

    python benchmarks/bench_data.py --gigabytes 2 --folder /fast/disk

Cold means that the shards were dropped from the page cache (posix_fadvise, after fsync) before the first batch. Samples
per second of wall time need a quiet machine (the first line says the load); per second of CPU time they hardly do.
"""

import argparse
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from alphaflow_cli.data.batches import LatentStream
from alphaflow_cli.data.files import to_json, write_atomic
from alphaflow_cli.data.manifest import TRANSFORM, AutoencoderRecord, Plan, plan_to_dict
from alphaflow_cli.data.writing import finish_store, write_shard

LATENT, BATCH = (4, 32, 32), 256


def make_store(path: Path, count: int) -> Path:
    """Random fp16 moments, 8,192 per shard, as ImageNet at 256 px would have them."""
    if (path / "manifest.json").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    images = to_json([])
    source = {"kind": "synthetic", "name": "bench", "images": count, "list_sha256": hashlib.sha256(images).hexdigest()}
    record = AutoencoderRecord("synthetic", "", "", 8, 0.18215, 0.0, "fp32", None)
    plan = Plan(source, 256, LATENT, "moments", "float16", False, record, TRANSFORM, 1000, 8192)
    write_atomic(path / "images.json", [images])
    write_atomic(path / "plan.json", [to_json(plan_to_dict(plan))])
    rng = np.random.default_rng(0)
    for shard, first in enumerate(range(0, count, 8192)):
        rows = rng.random((min(8192, count - first), 8, 32, 32), np.float32).astype(np.float16)
        labels = rng.integers(0, 1000, len(rows))
        write_shard(path, plan, shard, {"moments": rows, "label": labels, "index": first + np.arange(len(rows))}, [])
    finish_store(path, plan)
    return path


def drop(path: Path) -> None:
    """Out of the page cache."""
    for file in path.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def sequential_seconds(path: Path) -> float:
    """To read every byte in order."""
    start = time.perf_counter()
    buffer = bytearray(1 << 24)
    for file in sorted(path.glob("train-*.safetensors")):
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    return time.perf_counter() - start


def stream(path: Path, **changes: object) -> LatentStream:
    options: dict[str, object] = {
        "batch": BATCH,
        "seed": 0,
        "posterior": "sample",
        "flips": False,
        "normalise": "position",
        "scale": 1.0,
        "shift": 0.0,
        "stats_images": 0,
        "device": torch.device("cpu"),
        "verify": "sizes",
        **changes,
    }
    return LatentStream(path, **options)  # type: ignore[arg-type]


def report(name: str, batch: Callable[[int], object], *, first: int, steps: int) -> None:
    """One line: samples per second of wall time and of CPU time (all threads)."""
    start, cpu = time.perf_counter(), time.process_time()
    for step in range(first, first + steps):
        batch(step)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"{name:32s} {BATCH * steps / wall:10,.0f} samples/s {BATCH * steps / cpu:10,.0f} per CPU second", flush=True)


def bench_stream(path: Path, steps: int, ahead: bool) -> None:
    """Cold, then warm; the gather alone, then whole batches."""
    found, rows = stream(path, prefetch=ahead), torch.arange(BATCH)
    name = ", one ahead" if ahead else ""

    def whole(step: int) -> object:
        return found.batch_at(step, slice(None))

    drop(path)
    report(f"batches{name}, cold", whole, first=0, steps=steps)
    sequential_seconds(path)
    if not ahead:
        report("gather alone, warm", lambda step: found._read(step, rows), first=1000, steps=steps)
    report(f"batches{name}, warm", whole, first=2000, steps=steps)
    found.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, default=Path("bench-data"))
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    count = int(arguments.gigabytes * 1e9 / 16_400)
    path = make_store(arguments.folder / f"store-{count}", count)
    total = sum(file.stat().st_size for file in path.glob("train-*.safetensors"))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} torch threads")
    print(f"{count:,} samples, {total / 1e9:.2f} GB, batches of {BATCH}")
    drop(path)
    for name in ("cold", "warm"):
        seconds = sequential_seconds(path)
        print(f"{f'sequential read, {name}':32s} {count / seconds:10,.0f} samples/s ({total / seconds / 1e9:.2f} GB/s)")
    start, cpu = time.perf_counter(), time.process_time()
    stream(path, verify="full")
    print(f"open with all checksums, warm: {time.perf_counter() - start:.2f} s, CPU {time.process_time() - cpu:.2f} s")
    for ahead in (False, True):
        bench_stream(path, arguments.steps, ahead)
    resident = stream(path, resident=True)
    report("resident", lambda step: resident.batch_at(step, slice(None)), first=0, steps=arguments.steps)


if __name__ == "__main__":
    main()
