"""Measure how fast latents are read: shuffled batches of a synthetic store, cold and warm, beside a plain read.

    python benchmarks/bench_data.py --gigabytes 2 --folder /fast/disk
    python benchmarks/bench_data.py --gigabytes 20 --folder /fast/disk --device cuda

Cold means that the shards were dropped from the page cache before the clock started (posix_fadvise after fsync); the
share of them that was in it is told beside each speed, for some file systems keep them. Each round measures every
variant, in rotated order; round 0 is dropped; told are median, smallest and largest of samples per second of wall time,
which needs a quiet machine (the load is told), and per second of CPU time of all threads, which hardly does. On a GPU
batches go through pinned memory without waiting, the resident store lies on the GPU, and it is waited for at the end.
"""

import argparse
import ctypes
import hashlib
import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from record import record

from alphaflow_cli.data.batches import LatentStream
from alphaflow_cli.data.manifest import TRANSFORM, AutoencoderRecord, StorePlan, plan_to_dict
from alphaflow_cli.data.writing import finish_store, write_shard
from alphaflow_cli.files import to_json, write_pieces

LATENT, SHARD = (4, 32, 32), 8192
ROW = 2 * 4 * 32 * 32 * 2 + 16  # bytes of one sample: mean and std in fp16, label, index
GATHERED, WARMED = 1000, 2000  # first steps of the gather and of the warm batches: rows not just read by the cold ones


@dataclass(frozen=True)
class Speed:
    """How fast one variant was in one round."""

    wall: float  # samples per second
    cpu: float  # samples per second of CPU time
    cached: float  # share of the shards that was in the page cache when the clock started


Round = dict[str, Speed]


def make_store(path: Path, count: int) -> Path:
    """Random fp16 moments, 8,192 per shard, as ImageNet at 256 px would have them."""
    if (path / "manifest.json").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    images = to_json([])
    source = {"kind": "synthetic", "name": "bench", "images": count, "list_sha256": hashlib.sha256(images).hexdigest()}
    autoencoder = AutoencoderRecord("synthetic", "", "", 8, 0.18215, 0.0, "fp32", None)
    plan = StorePlan(source, 256, LATENT, "moments", "float16", False, autoencoder, TRANSFORM, 1000, SHARD)
    write_pieces(path / "images.json", [images])
    write_pieces(path / "classes.json", [to_json({f"{i:04d}": i for i in range(1000)})])
    write_pieces(path / "plan.json", [to_json(plan_to_dict(plan))])
    rng = np.random.default_rng(0)
    for shard, first in enumerate(range(0, count, SHARD)):
        rows = rng.random((min(SHARD, count - first), 2 * LATENT[0], *LATENT[1:]), np.float32).astype(np.float16)
        labels = rng.integers(0, 1000, len(rows))
        write_shard(path, plan, shard, {"moments": rows, "label": labels, "index": first + np.arange(len(rows))}, [])
    finish_store(path, plan)
    return path


def shards(path: Path) -> list[Path]:
    """The files with the latents."""
    return sorted(path.glob("train-*.safetensors"))


def drop(path: Path) -> None:
    """Drop the files from the page cache, so that the next read comes from the disk."""
    for file in shards(path):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def cached_share(files: Iterable[Path]) -> float:
    """Give the share of the files' pages that are in the page cache."""
    held = total = 0
    libc = ctypes.CDLL(None, use_errno=True)
    for file in files:
        with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            content = np.frombuffer(mapped, np.uint8)
            pages = np.zeros(-(-len(content) // mmap.PAGESIZE), np.uint8)
            start, length, told = content.ctypes.data, len(content), pages.ctypes.data
            del content  # a mapping that something looks into cannot be closed
            if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_void_p(told)):
                raise OSError(ctypes.get_errno(), "mincore", str(file))
        held, total = held + int((pages & 1).sum()), total + len(pages)
    return held / total


def read_all(path: Path) -> None:
    """Read every byte of the files in order."""
    buffer = bytearray(1 << 24)
    for file in shards(path):
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


class Bench:
    """One store, measured group by group; a group opens what it measures and closes it."""

    def __init__(self, path: Path, count: int, options: argparse.Namespace) -> None:
        self.path, self.count, self.batch, self.steps = path, count, options.batch, options.steps
        self.device = torch.device(options.device)
        self.groups: list[Callable[[], Round]] = [
            self.reading,
            self.opening,
            self.batches,
            self.batches_ahead,
            self.resident,
        ]

    def rounds(self, kept: int) -> list[Round]:
        """Run all rounds; the order rotates, and round 0 is dropped."""
        table = []
        for turn in range(kept + 1):
            at = turn % len(self.groups)
            table.append({k: v for group in [*self.groups[at:], *self.groups[:at]] for k, v in group().items()})
        return table[1:]

    def reading(self) -> Round:
        """Read the shards from start to end, as the yardstick for the batches."""
        drop(self.path)
        found = {}
        for name in ("cold", "warm"):
            found[f"sequential read, {name}"] = self.speed(lambda: read_all(self.path), self.count)
        return found

    def opening(self) -> Round:
        """Open the store and verify every checksum."""
        read_all(self.path)
        return {"open with checksums, warm": self.speed(lambda: self.stream(verify="full").close(), self.count)}

    def batches(self) -> Round:
        """Ask for batches one after the other."""
        return self.cold_and_warm("batches", prefetch=False)

    def batches_ahead(self) -> Round:
        """Ask for batches while a thread reads one ahead."""
        return self.cold_and_warm("batches, one ahead", prefetch=True)

    def cold_and_warm(self, name: str, *, prefetch: bool) -> Round:
        """Time whole batches; without reading ahead, also the gather from the shards alone."""
        with closing(self.stream(prefetch=prefetch)) as stream:
            drop(self.path)
            found = {f"{name}, cold": self.over_steps(lambda step: stream.batch_at(step, slice(None)), 0)}
            read_all(self.path)
            if not prefetch:
                rows = torch.arange(self.batch)
                found["gather alone, warm"] = self.over_steps(lambda step: stream._read(step, rows), GATHERED)
            found[f"{name}, warm"] = self.over_steps(lambda step: stream.batch_at(step, slice(None)), WARMED)
        return found

    def resident(self) -> Round:
        """Take batches from a store that lies in the device's memory."""
        with closing(self.stream(resident=True)) as stream:
            return {"resident": self.over_steps(lambda step: stream.batch_at(step, slice(None)), 0)}

    def over_steps(self, batch: Callable[[int], object], first: int) -> Speed:
        """Time the batches of `self.steps` steps, from step `first` on."""

        def work() -> None:
            for step in range(first, first + self.steps):
                batch(step)

        return self.speed(work, self.batch * self.steps)

    def speed(self, work: Callable[[], object], samples: int) -> Speed:
        """Take the time between two moments at which the device has finished its work."""
        cached = cached_share(shards(self.path))
        self.synchronise()
        start, cpu = time.perf_counter(), time.process_time()
        work()
        self.synchronise()
        return Speed(samples / (time.perf_counter() - start), samples / (time.process_time() - cpu), cached)

    def synchronise(self) -> None:
        """Wait for the device, so that the clock counts its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def stream(self, **changes: object) -> LatentStream:
        """Open the batches as a training run does, but without the checksums."""
        options: dict[str, object] = {"batch": self.batch, "seed": 0, "posterior": "sample", "flips": False}
        options |= {"normalise": "position", "scale": 1.0, "shift": 0.0, "stats_images": 0, "verify": "sizes"}
        return LatentStream(self.path, **{**options, "device": self.device, **changes})  # type: ignore[arg-type]


def spread(values: Iterable[float]) -> dict[str, float]:
    """Give the median, the smallest and the largest value."""
    found = list(values)
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


def figures(table: list[Round]) -> dict[str, object]:
    """Summarise each variant over the rounds."""
    names = sorted(table[0])
    return {
        "samples_per_second": {name: spread(each[name].wall for each in table) for name in names},
        "samples_per_cpu_second": {name: spread(each[name].cpu for each in table) for name in names},
        "cached_before": {name: spread(each[name].cached for each in table) for name in names},
    }


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the store, which is kept for the next time")
    parser.add_argument("--folder", type=Path, default=Path("bench-data"))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100, help="batches per variant and round")
    parser.add_argument("--rounds", type=int, default=3, help="kept rounds")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(words)
    count = int(options.gigabytes * 1e9 / ROW)
    path = make_store(options.folder / f"store-{count}", count)
    setup: dict[str, object] = {"batch": options.batch, "steps": options.steps, "rounds": options.rounds}
    setup["store"] = {"samples": count, "bytes": sum(file.stat().st_size for file in shards(path))}
    before = os.getloadavg()[0]
    found = figures(Bench(path, count, options).rounds(options.rounds))
    record("data", options.device, **setup, load={"before": before, "after": os.getloadavg()[0]}, **found)


if __name__ == "__main__":
    main()
