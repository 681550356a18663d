"""A finished latent store: open it, check it, compare it with a recipe."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from alphaflow_cli.data.classes import parse_classes
from alphaflow_cli.data.files import Array, Stamp, changed, is_there, open_tensors, sha256_of_all, stamp_of
from alphaflow_cli.data.manifest import AGAIN, Manifest, Plan, plan_from_dict, read_bytes, read_json, read_manifest
from alphaflow_cli.data.shards import Shards, open_shards
from alphaflow_cli.data.stats import Statistics, read_statistics
from alphaflow_cli.errors import AlphaflowError

Verify = Literal["full", "sizes"]


@dataclass(frozen=True)
class Store:
    """One open store. Rows are numbered 0 … count-1 over its shards, in shard order."""

    path: Path
    manifest: Manifest
    shards: Shards
    labels: Array  # (count,) int64
    statistics: dict[str, Statistics]  # all, subset; all_flip, subset_flip of the mirrored copies where they are stored

    @property
    def plan(self) -> Plan:
        """What it was made from, and how."""
        return self.manifest.plan


def open_store(path: Path, verify: Verify) -> Store:
    """Open a finished store, or refuse it with every fault in one message.

    `full` reads every byte once against its checksum (which also warms the page cache); `sizes` trusts the disk.
    """
    manifest = _manifest_of(path)
    before = _stamps(path, manifest)
    faults = _faults(path, manifest, verify)
    if faults:
        raise AlphaflowError("\n".join(faults) + f"\n{path}: remove the named files and run prep-latents again")
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
    """The classes' display names by index."""
    return parse_classes(read_bytes(path / "classes.json"), str(path / "classes.json")).names


def verify_store(path: Path) -> list[str]:
    """Every fault of a store, checksums included; empty when it is sound."""
    try:
        return _faults(path, _manifest_of(path), "full")
    except AlphaflowError as fault:
        return [str(fault)]


def disagreements(
    manifest: Manifest,
    *,
    autoencoder: str,
    image_size: int,
    channels: int,
    latent_size: int,
    classes: int,
    flips: bool,
) -> list[str]:
    """What a recipe wants and the store is not, both sides in each line."""
    plan = manifest.plan
    wanted: list[tuple[str, object, object]] = [
        ("autoencoder", plan.autoencoder.id, autoencoder),
        ("image_size", plan.image_size, image_size),
        ("channels", plan.latent[0], channels),
        ("latent_size", plan.latent[1], latent_size),
    ]
    if classes:  # 0 trains without labels: any labels will do
        wanted.append(("classes", plan.classes, classes))
    if flips:  # a store with mirror images serves a recipe without
        wanted.append(("flips", plan.flips, flips))
    return [
        f"{name}: the store has {has}, the recipe wants {wants}" for name, has, wants in wanted if not _same(has, wants)
    ]


def autoencoder_key(name: str) -> str:
    """The last part of an id, folder or file: a local copy of stabilityai/sd-vae-ft-ema is the same autoencoder."""
    last = Path(name.split("@")[0].rstrip("/")).name
    return last.removesuffix(".pt").removesuffix(".safetensors").replace("_", "-").lower()


def _same(has: object, wants: object) -> bool:
    if isinstance(has, str) and isinstance(wants, str):
        return autoencoder_key(has) == autoencoder_key(wants)
    return has == wants


def _manifest_of(path: Path) -> Manifest:
    if is_there(path / "manifest.json"):
        return read_manifest(path)
    if is_there(path / "plan.json"):
        plan = plan_from_dict(read_json(path / "plan.json"), path / "plan.json")
        done = len(list(path.glob("train-*.json")))
        total = -(-plan.images // plan.shard_size)
        raise AlphaflowError(f"{path}: unfinished, {done} of {total} shards. Run the same prep-latents command again")
    raise AlphaflowError(
        f"{path}: no latent store here (no manifest.json). Run: alphaflow prep-latents SOURCE --out {path}"
    )


def _stamps(path: Path, manifest: Manifest) -> dict[Path, Stamp]:
    """Of the shards that are there, before their checksums are taken."""
    files = [path / shard.file for shard in manifest.shards]
    return {file: stamp_of(file) for file in files if is_there(file)}


def _faults(path: Path, manifest: Manifest, verify: Verify) -> list[str]:
    sizes = [(path / shard.file, shard.bytes) for shard in manifest.shards]
    faults = [fault for file, size in sizes if (fault := _size_fault(file, size))]
    sums = [(path / manifest.statistics["file"], manifest.statistics["sha256"])]
    sums.append((path / "images.json", manifest.plan.list_sha256))
    faults += [f"{file}: missing" for file, _ in sums if not is_there(file)]
    if faults:
        return faults
    if verify == "full":
        sums += [(path / shard.file, shard.sha256) for shard in manifest.shards]
    found = sha256_of_all([file for file, _ in sums])
    changed = [file for (file, wanted), is_now in zip(sums, found, strict=True) if is_now != wanted]
    return [f"{file}: its bytes changed since it was written (checksum)" for file in changed]


def _size_fault(file: Path, size: int) -> str:
    if not is_there(file):
        return f"{file}: missing"
    found = file.stat().st_size
    return "" if found == size else f"{file}: {found:,} bytes, should be {size:,} (truncated or overwritten)"


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
