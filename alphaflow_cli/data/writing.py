"""Writing a store: one shard after the other in any order, then the statistics and the manifest that finish it."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alphaflow_cli.data.manifest import AGAIN, STATISTICS_FILE, Shard, StorePlan, manifest_to_bytes, read_sidecar
from alphaflow_cli.data.stats import (
    Statistics,
    merge_all,
    read_statistics,
    statistics_of,
    statistics_tensors,
    subset_rows,
)
from alphaflow_cli.data.store import open_shards, statistics_of_rows
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import is_there, to_json, write_pieces
from alphaflow_cli.tensors import Array, write_tensors

STATS_IMAGES = 2048  # the published estimate's number of latents; its statistics lie beside those of all
METADATA = {"format": "alphaflow-latents-1"}


def shard_name(shard: int) -> str:
    """The name of a shard's file; its sidecar has .json instead of .safetensors."""
    return f"train-{shard:05d}.safetensors"


def is_done(out: Path, shard: int) -> bool:
    """Whether a shard is written: it has a sidecar, and the length that the sidecar says."""
    file = out / shard_name(shard)
    sidecar = file.with_suffix(".json")
    return is_there(sidecar) and is_there(file) and file.stat().st_size == read_sidecar(sidecar).bytes


def write_shard(
    out: Path, plan: StorePlan, shard: int, content: Mapping[str, Array], bad: list[dict[str, Any]]
) -> None:
    """Write a shard's rows with their statistics, then the sidecar that marks it as done.

    `content` holds moments, mean or pixels, perhaps <the same>_flip, label and index.
    """
    tensors = dict(content)
    for key in [key for key in content if key.startswith(plan.kind)]:
        tensors |= statistics_tensors(statistics_of(content[key], plan.latent), f"all{key.removeprefix(plan.kind)}")
    name, count = shard_name(shard), len(content["label"])
    size, digest = write_tensors(out / name, tensors, METADATA)
    sidecar = Shard(name, shard * plan.shard_size, count + len(bad), count, size, digest, bad)
    write_pieces(out / Path(name).with_suffix(".json"), [to_json(asdict(sidecar))])


def finish_store(out: Path, plan: StorePlan) -> None:
    """Write the statistics of everything, then the manifest, which makes it a store.

    The plan is on disk, and so are all shards.
    """
    total = -(-plan.images // plan.shard_size)
    paths = [out / shard_name(shard) for shard in range(total)]
    sidecars = [_read_sidecar(plan, number, path) for number, path in enumerate(paths)]
    count, bad = sum(shard.count for shard in sidecars), [entry for shard in sidecars for entry in shard.bad]
    if not count:
        raise AlphaflowError(f"{out}: no picture can be read; the first, {bad[0]['name']!r}: {bad[0]['why']}")
    stats = _statistics(out, plan, sidecars)
    content = {key: value for name, part in stats.items() for key, value in statistics_tensors(part, name).items()}
    _, digest = write_tensors(out / STATISTICS_FILE, content, METADATA)
    summary = {
        "file": STATISTICS_FILE,
        "sha256": digest,
        "images": stats["all"].count,
        "subset_images": stats["subset"].count,
        "channel_mean": stats["all"].channel_mean.tolist(),
        "channel_std": stats["all"].channel_std.tolist(),
    }
    shards = [asdict(shard) for shard in sidecars]
    document = manifest_to_bytes(plan, count=count, bad=bad, statistics=summary, shards=shards)
    write_pieces(out / "manifest.json", [document])


def _read_sidecar(plan: StorePlan, number: int, path: Path) -> Shard:
    where = path.with_suffix(".json")
    shard, first = read_sidecar(where), number * plan.shard_size
    lines = min(plan.shard_size, plan.images - first)
    if (shard.file, shard.first, shard.lines) != (path.name, first, lines) or shard.count + len(shard.bad) != lines:
        raise AlphaflowError(f"{where}: not the sidecar of pictures {first} to {first + lines - 1}. {AGAIN}")
    return shard


def _statistics(out: Path, plan: StorePlan, sidecars: list[Shard]) -> dict[str, Statistics]:
    """The statistics of all latents, merged in shard order, and of the published subset; likewise of mirrored
    copies.
    """
    shards = open_shards(out, plan, sidecars)
    parts = [read_statistics(file) for file in shards.files]
    rows = subset_rows(shards.count, STATS_IMAGES)
    statistics = {}
    for end in ["", *(["_flip"] if plan.stores_flips else [])]:
        statistics[f"all{end}"] = merge_all((part[f"all{end}"] for part in parts), plan.latent)
        statistics[f"subset{end}"] = statistics_of_rows(shards, plan, plan.kind + end, rows)
    return statistics
