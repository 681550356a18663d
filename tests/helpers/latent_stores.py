"""Latent stores for tests: invented latents written by the package's own writer, no autoencoder."""

import hashlib

import numpy as np

from alphaflow_cli.data.manifest import TRANSFORM, AutoencoderRecord, StorePlan, plan_to_dict
from alphaflow_cli.data.writing import finish_store, write_shard
from alphaflow_cli.files import to_json, write_pieces
from alphaflow_cli.latents.encode import StoreRequest
from alphaflow_cli.latents.prepare import prepare_store
from alphaflow_cli.runtime.processes import Processes, choose_device

SD_VAE = AutoencoderRecord("stabilityai/sd-vae-ft-ema", "0" * 40, "1" * 64, 8, 0.18215, 0.0, "fp32", None)
PIXELS = AutoencoderRecord("none", "", "", 1, 1.0, 0.0, "exact", None)


def write_store(path, tensors, labels, *, kind="moments", classes=10, shard_size=16, flips=False, record=SD_VAE):
    """`tensors`: rows by name (kind, and kind_flip where stored); returns the folder."""
    path.mkdir(parents=True)
    count, rows = len(labels), tensors[kind]
    images = to_json([[f"{label}/{index}.png", int(label)] for index, label in enumerate(labels)])
    write_pieces(path / "images.json", [images])
    channels = rows.shape[1] // (2 if kind == "moments" else 1)
    plan = StorePlan(
        source={"kind": "test", "name": "test", "images": count, "list_sha256": hashlib.sha256(images).hexdigest()},
        image_size=rows.shape[2] * record.downscale,
        latent=(channels, *rows.shape[2:]),
        kind=kind,
        dtype=str(rows.dtype),
        flips=flips,
        autoencoder=record,
        transform=TRANSFORM,
        classes=classes,
        shard_size=shard_size,
    )
    write_pieces(path / "plan.json", [to_json(plan_to_dict(plan))])
    write_pieces(path / "classes.json", [to_json({f"c{i}": {"index": i, "name": f"c{i}"} for i in range(classes)})])
    everything = {**tensors, "label": np.asarray(labels, np.int64), "index": np.arange(count)}
    for shard in range(-(-count // shard_size)):
        span = slice(shard * shard_size, (shard + 1) * shard_size)
        write_shard(path, plan, shard, {name: value[span] for name, value in everything.items()}, [])
    finish_store(path, plan)
    return path


def random_moments(count, *, channels=4, side=4, seed=0, dtype=np.float16):
    """Mean and std rows (n, 2C, h, w) whose mean and spread differ from place to place."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(count, channels, side, side)) * rng.uniform(1, 5, (channels, side, side))
    mean += rng.normal(size=(channels, side, side)) * 3
    std = rng.uniform(0.01, 0.5, (count, channels, side, side))
    return np.concatenate([mean, std], axis=1).astype(dtype)


def moments_store(path, count=100, **options):
    """A store of random moments; labels 0 … 9 in turn."""
    return write_store(path, {"moments": random_moments(count)}, np.arange(count) % 10, **options)


def prepare_latents(source, out, *, shown=True, **options):
    """A store of a source, made or gone on with by this process; returns its folder."""
    return prepare_store(StoreRequest(source, **options), out, Processes(choose_device(None)), shown=shown)
