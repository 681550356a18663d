"""A finished latent store: open it, check it, read rows out of its shards."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Literal

import numpy as np

from alphaflow_cli.data.classes import read_class_file
from alphaflow_cli.data.manifest import AGAIN, Manifest, Shard, StorePlan, read_manifest, read_plan
from alphaflow_cli.data.stats import Statistics, read_statistics, statistics_of
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import Stamp, changed, is_there, sha256_of_all, stamp_of
from alphaflow_cli.tensors import Array, TensorFile, open_tensors

Verify = Literal["full", "sizes"]
DENSE = 4  # a shard of which more than a quarter is wanted is read by the system's own read-ahead


@dataclass(frozen=True)
class Shards:
    """The open shard files of a store. Their rows are numbered through, 0 … count − 1, in the order of the files."""

    files: list[TensorFile]
    starts: Array  # first row of each file, then count: (files + 1,)

    @property
    def count(self) -> int:
        """How many rows all files hold together."""
        return int(self.starts[-1])

    def gather(self, name: str, rows: Array, out: Array, places: Array) -> None:
        """out[places[i]] = row rows[i] of tensor `name`; the files are touched in order."""
        order = np.argsort(rows, kind="stable")
        pieces = list(self._per_file(rows[order]))
        for file, _, local in pieces:
            if len(local) * DENSE < self.files[file].places[name].shape[0]:
                for row in local.tolist():
                    self.files[file].will_need(name, row)
        for file, piece, local in pieces:
            self.files[file].read_rows(name, local.tolist(), out, places[order[piece]].tolist())

    def _per_file(self, ordered: Array) -> Iterator[tuple[int, slice, Array]]:
        cuts = np.searchsorted(ordered, self.starts)
        for file in np.flatnonzero(np.diff(cuts)):
            piece = slice(int(cuts[file]), int(cuts[file + 1]))
            yield int(file), piece, ordered[piece] - self.starts[file]


def open_shards(folder: Path, plan: StorePlan, shards: Sequence[Shard]) -> Shards:
    """Open the shard files; each must hold the tensors that the plan and its sidecar speak of."""
    files = [open_tensors(folder / shard.file) for shard in shards]
    kinds = [plan.kind, *([f"{plan.kind}_flip"] if plan.stores_flips else [])]
    wanted: dict[str, tuple[object, tuple[int, ...]]]
    for file, shard in zip(files, shards, strict=True):
        wanted = {name: (np.dtype(plan.dtype), (shard.count, plan.rows, *plan.latent[1:])) for name in kinds}
        wanted["label"] = (np.dtype(np.int64), (shard.count,))
        for name, fact in wanted.items():
            place = file.places.get(name)
            if place is None or (place.dtype, place.shape) != fact:
                raise AlphaflowError(f"{file.path}: its {name} are not what the plan and the sidecar say. {AGAIN}")
    return Shards(files, np.cumsum([0, *(shard.count for shard in shards)]))


def statistics_of_rows(shards: Shards, plan: StorePlan, name: str, rows: Array) -> Statistics:
    """Compute the statistics of some rows of tensor `name`."""
    stored = np.empty((len(rows), plan.rows, *plan.latent[1:]), plan.dtype)
    shards.gather(name, rows, stored, np.arange(len(rows)))
    return statistics_of(stored, plan.latent)


@dataclass(frozen=True)
class Store:
    """One open store. Rows are numbered 0 … count − 1 over its shards, in shard order."""

    path: Path
    manifest: Manifest
    shards: Shards
    labels: Array  # (count,) int64
    statistics: dict[str, Statistics]  # all, subset; all_flip, subset_flip of the mirrored copies where they are stored

    @property
    def plan(self) -> StorePlan:
        """What the store was made from, and how."""
        return self.manifest.plan


def open_store(path: Path, verify: Verify) -> Store:
    """Open a finished store, or refuse it with every fault in one message.

    `full` reads every byte once against its checksum (which also warms the page cache); `sizes` trusts the disk.
    """
    manifest = _manifest_of(path)
    before = _stamps(path, manifest)
    faults = _faults(path, manifest, verify)
    if faults:
        advice = f"remove the named files and run the same {manifest.plan.command} command again"
        raise AlphaflowError("\n".join(faults) + f"\n{path}: {advice}")
    shards = open_shards(path, manifest.plan, manifest.shards)
    for file in shards.files:
        if file.stamp != before[file.path]:  # while the checksums were taken, which may last minutes
            raise changed(file.path)
    labels = np.concatenate([file.read("label") for file in shards.files])
    statistics = read_statistics(open_tensors(path / manifest.statistics["file"]))
    if not {"all", "subset"} <= statistics.keys():
        raise AlphaflowError(f"{path / manifest.statistics['file']}: holds no statistics of the latents. {AGAIN}")
    store = Store(path, manifest, shards, labels, statistics)
    _check_content(store)
    return store


def class_names(path: Path) -> list[str]:
    """The classes' display names by index, from a store's classes.json."""
    return read_class_file(path / "classes.json").names


def verify_store(path: Path) -> list[str]:
    """List every fault of a store, checksums included; the list is empty when it is sound."""
    try:
        return _faults(path, _manifest_of(path), "full")
    except AlphaflowError as fault:
        return [str(fault)]


def _manifest_of(path: Path) -> Manifest:
    if is_there(path / "manifest.json"):
        return read_manifest(path)
    if is_there(path / "plan.json"):
        plan = read_plan(path / "plan.json")
        done = len(list(path.glob("train-*.json")))
        total = -(-plan.images // plan.shard_size)
        raise AlphaflowError(f"{path}: unfinished, {done} of {total} shards. Run the same {plan.command} command again")
    raise AlphaflowError(
        f"{path}: no latent store here (no manifest.json). Run: alphaflow prep-latents SOURCE --out {quote(str(path))}"
    )


def _stamps(path: Path, manifest: Manifest) -> dict[Path, Stamp]:
    """The stamps of the shards that are there, from before their checksums are taken."""
    files = [path / shard.file for shard in manifest.shards]
    return {file: stamp_of(file) for file in files if is_there(file)}


def _faults(path: Path, manifest: Manifest, verify: Verify) -> list[str]:
    sizes = [(path / shard.file, shard.bytes) for shard in manifest.shards]
    faults = [fault for file, size in sizes if (fault := _size_fault(file, size))]
    sums = [(path / manifest.statistics["file"], manifest.statistics["sha256"])]
    sums.append((path / "images.json", manifest.plan.list_sha256))
    faults += [f"{file}: missing" for file, _ in sums if not is_there(file)]
    faults += _fault_of_classes(path)
    if faults:
        return faults
    if verify == "full":
        sums += [(path / shard.file, shard.sha256) for shard in manifest.shards]
    digests = sha256_of_all([file for file, _ in sums])
    return [
        f"{file}: its bytes changed since it was written (checksum)"
        for (file, wanted), is_now in zip(sums, digests, strict=True)
        if is_now != wanted
    ]


def _fault_of_classes(path: Path) -> list[str]:
    if not is_there(path / "classes.json"):
        return [f"{path / 'classes.json'}: missing"]
    try:
        class_names(path)
    except AlphaflowError as fault:
        return [str(fault)]
    return []


def _size_fault(file: Path, size: int) -> str:
    if not is_there(file):
        return f"{file}: missing"
    size_now = file.stat().st_size
    return "" if size_now == size else f"{file}: {size_now:,} bytes, should be {size:,} (truncated or overwritten)"


def _check_content(store: Store) -> None:
    plan, where, stats = store.plan, store.path, store.statistics["all"]
    checks: list[tuple[Callable[[], bool], str]] = [
        (lambda: len(store.labels) == store.manifest.count, "the shards' rows do not add up to the manifest's count"),
        (lambda: store.manifest.count > 0, "holds no picture"),
        (lambda: bool(store.labels.min() >= 0 and store.labels.max() < plan.classes), "a label is out of range"),
        (lambda: stats.mean.shape == plan.latent, "the statistics have another shape than the latents"),
        (lambda: bool(np.isfinite(stats.squares).all()), "the statistics are not finite"),
    ]
    for holds, fault in checks:
        if not holds():
            raise AlphaflowError(f"{where}: {fault}. Make the store again")
