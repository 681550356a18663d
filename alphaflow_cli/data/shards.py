"""Rows out of many shard files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alphaflow_cli.data.files import Array, TensorFile, open_tensors
from alphaflow_cli.data.manifest import AGAIN, Plan, Shard
from alphaflow_cli.data.stats import Statistics, statistics_of
from alphaflow_cli.errors import AlphaflowError

DENSE = 4  # a shard of which more than a quarter is wanted is read by the system's own read-ahead


@dataclass(frozen=True)
class Shards:
    """Rows are numbered 0 … count-1 over the files, in order."""

    files: list[TensorFile]
    starts: Array  # first row of each file, then count: (files + 1,)

    @property
    def count(self) -> int:
        """Rows of all files."""
        return int(self.starts[-1])

    def gather(self, name: str, rows: Array, out: Array, places: Array) -> None:
        """out[places[i]] = row rows[i] of tensor `name`; touches the files in order."""
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


def open_shards(folder: Path, plan: Plan, shards: Sequence[Shard]) -> Shards:
    """Open the files; each must hold the tensors that the plan and its sidecar speak of."""
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


def statistics_of_rows(shards: Shards, plan: Plan, name: str, rows: Array) -> Statistics:
    """Of some rows of tensor `name`."""
    stored = np.empty((len(rows), plan.rows, *plan.latent[1:]), plan.dtype)
    shards.gather(name, rows, stored, np.arange(len(rows)))
    return statistics_of(stored, plan.latent)
