"""The stream: batch k of a run, from the seed and k alone.

    position of row i of step k:  p = k·B + i            an endless sequence, cut into epochs of `count`
    sample at position p:         permutation of epoch p // count (seeded by it), at p % count
    latent:                       mean + std · noise      noise, like the flips, drawn for the GLOBAL batch of step k
    x:                            (latent - mean) / std   per position or per channel, or (latent - shift) · scale

So a run resumes at any step without replaying one. Every sample appears once per epoch: batches run across the border
of two epochs, and nothing is dropped. Two processes see what one would: they take other rows of the same batch.

Shapes: B global batch, n requested rows, (C, h, w) a latent; a stored row has 2C channels (mean, std) or C.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from alphaflow_cli.core.draws import FLIP, ORDER, POSTERIOR, mix_seed
from alphaflow_cli.core.pixels import from_uint8
from alphaflow_cli.data.stats import Statistics, merge, mirrored, subset_rows
from alphaflow_cli.data.store import Shards, Store, Verify, open_store, statistics_of_rows
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.tensors import Array

RowsTaken = slice | Tensor  # which rows of the global batch a process wants
CONSTANT = 1e-6  # a latent that varies less than this (std) is constant: dividing by it would blow up rounding noise


@dataclass(frozen=True)
class Batch:
    """The rows of a training step that one process sees."""

    latents: Tensor  # (n, C, h, w) float32, normalised: the network's x
    y: Tensor  # (n,) int64


@dataclass(frozen=True)
class _StoredRows:
    """Rows as they are stored, on their way to the device; pinned where a GPU waits for them."""

    stored: Tensor  # (n, 2C | C, h, w) as on disk
    y: Tensor


class LatentStream:
    """The batches of one store, whose checksums are verified first. Any step's batch can be asked for, in any order."""

    def __init__(
        self,
        store: Path,
        *,
        batch: int,
        seed: int,
        posterior: Literal["sample", "mean"],
        flips: bool,
        normalise: Literal["position", "channel", "scale"],
        scale: float,
        shift: float,
        stats_images: int,
        device: torch.device,
        constants: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
        resident: bool = False,
        prefetch: bool | None = None,
        verify: Verify = "full",
    ) -> None:
        """Open the store.

        `resident` keeps the whole store on the device; `prefetch` reads one batch ahead (default: on a GPU).
        `constants` are a mean and a std per channel, instead of the store's own.
        """
        self.store = open_store(store, verify)
        plan = self.store.plan
        if flips and not plan.flips:
            raise AlphaflowError(f"{store}: holds no mirror images. Make it with --flips, or set data.flips: false")
        self.shape, self.count, self.classes = plan.latent, self.store.manifest.count, plan.classes
        self.batch, self.seed, self.posterior, self.flips, self.device = batch, seed, posterior, flips, device
        if constants:
            self.mean, self.std = (torch.tensor(each, dtype=torch.float64)[:, None, None] for each in constants)
        else:
            self.mean, self.std = normalisation(
                self.store, normalise, scale=scale, shift=shift, images=stats_images, flips=flips
            )
        self._mean, self._std = (value.to(device, torch.float32) for value in (self.mean, self.std))
        self._resident = _load(self.store, device, flips) if resident else None
        ahead = device.type != "cpu" if prefetch is None else prefetch
        self._pool = ThreadPoolExecutor(1, "latents") if ahead and not resident else None
        self._ahead: dict[tuple[int, bytes], Future[_StoredRows]] = {}

    def batch_at(self, step: int, rows: RowsTaken) -> Batch:
        """Some rows of the global batch of a step, normalised."""
        wanted = torch.arange(self.batch)[rows]
        stored = self._fetch(step, wanted)
        latents = self._latents(stored.stored, step, rows)
        return Batch((latents - self._mean) / self._std, stored.y)

    def samples_at(self, step: int) -> Array:
        """Which rows of the store make up the global batch of a step: (B,)."""
        positions = np.arange(step * self.batch, (step + 1) * self.batch)
        epochs, places = np.divmod(positions, self.count)
        samples = np.empty(self.batch, np.int64)
        for epoch in np.unique(epochs):
            samples[epochs == epoch] = permutation(self.seed, int(epoch), self.count)[places[epochs == epoch]]
        return samples

    def flips_at(self, step: int) -> Array:
        """Which rows of the global batch show the mirror image: (B,) bool."""
        if not self.flips:
            return np.zeros(self.batch, bool)
        generator = torch.Generator().manual_seed(mix_seed(self.seed, FLIP, step))
        return (torch.rand(self.batch, generator=generator) < 0.5).numpy()

    def noise_at(self, step: int) -> Tensor:
        """The posterior noise of the global batch, drawn on the device: (B, C, h, w)."""
        generator = torch.Generator(self.device).manual_seed(mix_seed(self.seed, POSTERIOR, step))
        return torch.randn((self.batch, *self.shape), generator=generator, device=self.device)

    def close(self) -> None:
        """Stop reading ahead, and end the thread that does it."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def _latents(self, stored: Tensor, step: int, rows: RowsTaken) -> Tensor:
        kind = self.store.plan.kind
        if kind == "pixels":
            return from_uint8(stored)
        if kind == "mean":
            return stored.float()
        mean, std = stored.float().chunk(2, dim=1)
        if self.posterior == "mean":
            return mean
        noise = self.noise_at(step)
        return torch.addcmul(mean, std, noise[rows if isinstance(rows, slice) else to_device(rows, self.device)])

    def _fetch(self, step: int, wanted: Tensor) -> _StoredRows:
        if self._resident:
            return self._from_device(step, wanted)
        if not self._pool:
            return self._to_device(self._read(step, wanted))
        key = wanted.numpy().tobytes()
        ready = self._ahead.pop((step, key), None)
        self._ahead = {at: read for at, read in self._ahead.items() if step <= at[0] <= step + 1}
        rows = ready.result() if ready else self._read(step, wanted)
        self._ahead[step + 1, key] = self._pool.submit(self._read, step + 1, wanted)
        return self._to_device(rows)

    def _read(self, step: int, wanted: Tensor) -> _StoredRows:
        """Read rows from the shards into the host's memory."""
        plan, chosen = self.store.plan, wanted.numpy()
        samples, flipped = self.samples_at(step)[chosen], self.flips_at(step)[chosen]
        dtype = getattr(torch, plan.dtype)
        stored = torch.empty(
            (len(chosen), plan.rows, *plan.latent[1:]), dtype=dtype, pin_memory=self.device.type == "cuda"
        )
        for name, which in _tensors(self.store, flipped):
            self.store.shards.gather(name, samples[which], stored.numpy(), which)
        if plan.kind == "pixels" and flipped.any():
            stored[flipped] = stored[flipped].flip(-1)
        y = torch.from_numpy(self.store.labels[samples])
        return _StoredRows(stored, y.pin_memory() if self.device.type == "cuda" else y)

    def _to_device(self, rows: _StoredRows) -> _StoredRows:
        return _StoredRows(rows.stored.to(self.device, non_blocking=True), rows.y.to(self.device, non_blocking=True))

    def _from_device(self, step: int, wanted: Tensor) -> _StoredRows:
        assert self._resident is not None
        chosen = wanted.numpy()
        samples, flipped = self.samples_at(step)[chosen], self.flips_at(step)[chosen]
        index = to_device(torch.from_numpy(samples), self.device)
        stored = self._resident[self.store.plan.kind][index]
        if flipped.any():
            which = to_device(torch.from_numpy(flipped.nonzero()[0]), self.device)  # places: a mask would have to wait
            name = f"{self.store.plan.kind}_flip"
            stored[which] = self._resident[name][index[which]] if name in self._resident else stored[which].flip(-1)
        return _StoredRows(stored, self._resident["label"][index])


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, count: int) -> Array:
    """The order in which an epoch goes through the rows of the store."""
    generator = torch.Generator().manual_seed(mix_seed(seed, ORDER, epoch))
    return torch.randperm(count, generator=generator).numpy()


def normalisation(
    store: Store,
    normalise: Literal["position", "channel", "scale"],
    *,
    scale: float,
    shift: float,
    images: int,
    flips: bool,
) -> tuple[Tensor, Tensor]:
    """The mean and std of x = (latent − mean) / std, float64, of a shape that broadcasts to (C, h, w)."""
    if normalise == "scale":
        return torch.full((1, 1, 1), shift, dtype=torch.float64), torch.full((1, 1, 1), 1 / scale, dtype=torch.float64)
    stats = statistics_on(store, images, flips)
    if normalise == "channel":
        mean, std = stats.channel_mean[:, None, None], stats.channel_std[:, None, None]
    else:
        mean, std = stats.mean, stats.std
    constant = int((std < CONSTANT).sum())
    if constant:
        way = "normalise: channel" if normalise == "position" else "normalise: scale"
        raise AlphaflowError(f"{store.path}: {constant} of {std.size} latent values never vary; set data.{way}")
    return torch.from_numpy(mean.copy()), torch.from_numpy(std.copy())


def statistics_on(store: Store, images: int, flips: bool) -> Statistics:
    """The statistics of all latents (images = 0), or of that many.

    Those of the number that prep-latents used are in the store; others are computed.
    """
    plan, every = store.plan, images == 0 or images >= store.manifest.count
    known = "all" if every else "subset" if images == store.statistics["subset"].count else ""
    rows = subset_rows(store.manifest.count, images)

    def one(suffix: str) -> Statistics:
        if known:
            return store.statistics[known + suffix]
        return statistics_of_rows(store.shards, plan, plan.kind + suffix, rows)

    if not flips:
        return one("")
    return merge(one(""), one("_flip") if plan.stores_flips else mirrored(one("")))


def _tensors(store: Store, flipped: Array) -> list[tuple[str, Array]]:
    """Which tensor of a shard each row comes from: the pictures', or the mirror images' where these are stored."""
    kind = store.plan.kind
    if not store.plan.stores_flips:
        return [(kind, np.arange(len(flipped)))]
    return [(kind, np.flatnonzero(~flipped)), (f"{kind}_flip", np.flatnonzero(flipped))]


def _load(store: Store, device: torch.device, flips: bool) -> dict[str, Tensor]:
    """Copy the whole store to the device, tensor by tensor."""
    plan = store.plan
    names = [plan.kind, "label", *([f"{plan.kind}_flip"] if flips and plan.stores_flips else [])]
    return {name: _whole(store.shards, name, device) for name in names}


def _whole(shards: Shards, name: str, device: torch.device) -> Tensor:
    """Copy one tensor of all shards to the device, each shard to its place: joining copies would need the memory
    twice.

    What lies on the device is what the checksums saw. A later change of the files does not reach it, and the next start
    refuses them.
    """
    first = shards.files[0].places[name]
    whole = torch.empty((shards.count, *first.shape[1:]), dtype=getattr(torch, first.dtype.name), device=device)
    for (start, stop), file in zip(pairwise(shards.starts), shards.files, strict=True):
        whole[start:stop].copy_(torch.from_numpy(file.read(name)))  # without a name: gone before the next is read
    return whole


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy values from the host to a device, without the host waiting for it.

    On a GPU that takes pinned memory without gaps: a plain copy would wait for all work that is queued there.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        return values.contiguous().pin_memory().to(device, non_blocking=True)
    return values.to(device)
