"""Mean and variance of all latents of a store, per channel and position, exact and mergeable.

A latent is drawn from its posterior N(m, s²), so over the whole set (law of total variance)

    E[latent] = E[m]          Var[latent] = Var[m] + E[s²]

Every shard carries count, mean and the centred sum of squares (s² included); `merge` joins two of them (Chan et al.).
Merged in shard order, the result does not depend on who wrote which shard.

Shapes: n samples, C channels, h × w positions; a stored row is (2C, h, w) = m then s, (C, h, w) = m, or uint8 pixels.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from alphaflow_cli.core.draws import SUBSET, mix_seed
from alphaflow_cli.tensors import Array, TensorFile

CHUNK = 256  # rows turned to float64 at once


@dataclass(frozen=True)
class Statistics:
    """Statistics of some latents: number, mean (C, h, w) and centred sum of squares (C, h, w), float64."""

    count: int
    mean: Array
    squares: Array

    @property
    def std(self) -> Array:
        """The standard deviation per channel and position: (C, h, w)."""
        return np.asarray(np.sqrt(self.squares / self.count))

    @property
    def channel_mean(self) -> Array:
        """The mean per channel: (C,)."""
        return np.asarray(self.mean.mean(axis=(1, 2)))

    @property
    def channel_std(self) -> Array:
        """The standard deviation per channel, over samples and positions: (C,).

        Positions that differ in mean add to the spread.
        """
        within = (self.squares / self.count).mean(axis=(1, 2))
        return np.asarray(np.sqrt(within + self.mean.var(axis=(1, 2))))


def merge(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of the latents of both together."""
    count = a.count + b.count
    if not b.count or not a.count:
        return a if a.count else b
    step = b.mean - a.mean
    squares = a.squares + b.squares + step * step * (a.count * b.count / count)
    return Statistics(count, a.mean + step * (b.count / count), squares)


def merge_all(parts: Iterable[Statistics], channels: tuple[int, int, int]) -> Statistics:
    """The statistics of all latents together, merged in the order given."""
    total = Statistics(0, np.zeros(channels), np.zeros(channels))
    for part in parts:
        total = merge(total, part)
    return total


def split_moments(rows: Array, channels: int) -> tuple[Array, Array]:
    """Stored rows as float64 mean and std, each (n, C, h, w); uint8 pixels become [−1, 1] with std 0."""
    if rows.dtype == np.uint8:
        mean = rows.astype(np.float64) / 127.5 - 1.0
        return mean, np.zeros_like(mean)
    mean = rows[:, :channels].astype(np.float64)
    std = rows[:, channels:].astype(np.float64) if rows.shape[1] == 2 * channels else np.zeros_like(mean)
    return mean, std


def statistics_of(rows: Array, latent: tuple[int, int, int]) -> Statistics:
    """Compute the statistics of stored rows, chunk by chunk."""
    return merge_all((_of_chunk(rows[at : at + CHUNK], latent[0]) for at in range(0, len(rows), CHUNK)), latent)


def _of_chunk(rows: Array, channels: int) -> Statistics:
    mean, std = split_moments(rows, channels)
    centre = mean.mean(axis=0)
    return Statistics(len(rows), centre, ((mean - centre) ** 2 + std**2).sum(axis=0))


def mirrored(stats: Statistics) -> Statistics:
    """The statistics of the mirror images, where these are mirrored when they are read (pixels)."""
    return Statistics(stats.count, stats.mean[..., ::-1], stats.squares[..., ::-1])


def subset_rows(count: int, images: int) -> Array:
    """The rows whose statistics may stand for all: the first of one fixed permutation, in file order."""
    seed = mix_seed(SUBSET) % (1 << 32)
    return np.sort(np.random.RandomState(seed).permutation(count)[:images])  # the legacy stream never changes


def statistics_tensors(stats: Statistics, name: str) -> dict[str, Array]:
    """Statistics as the tensors that lie in a file."""
    count = np.array([stats.count], np.int64)
    return {f"{name}_count": count, f"{name}_mean": stats.mean, f"{name}_squares": stats.squares}


def read_statistics(file: TensorFile) -> dict[str, Statistics]:
    """Read all statistics in a file, by name."""
    end = "_squares"
    return {
        name: Statistics(int(file.read(f"{name}_count")[0]), file.read(f"{name}_mean"), file.read(f"{name}{end}"))
        for name in (key.removesuffix(end) for key in file.places if key.endswith(end))
    }
