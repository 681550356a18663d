"""How the global batch is cut: over processes, and over micro-batches that fit the memory.

Part a·P + p of A·P parts is micro-batch a of process p, and takes every (A·P)-th row of the global batch: the
r = t rows come first in the batch, so a strided cut gives every part its share of them, still first.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from alphaflow_cli.core.times import rows_of
from alphaflow_cli.errors import AlphaflowError


@dataclass(frozen=True)
class Split:
    """processes × micro-batches of a global batch."""

    batch: int
    processes: int
    accumulation: int

    @property
    def micro_batch(self) -> int:
        """Rows of the largest micro-batch."""
        return -(-self.batch // (self.processes * self.accumulation))

    def rows(self, rank: int, turn: int) -> slice:
        """The rows of the global batch that a process sees in a micro-batch."""
        return self._part(rank, turn, 0)[0]

    def equal_rows(self, rank: int, turn: int, n_equal: int) -> int:
        """How many of them are r = t rows; over all parts they add up to n_equal."""
        return self._part(rank, turn, n_equal)[1]

    def _part(self, rank: int, turn: int, n_equal: int) -> tuple[slice, int]:
        parts = self.processes * self.accumulation
        return rows_of(self.batch, n_equal=n_equal, parts=parts, part=turn * self.processes + rank)

    def __str__(self) -> str:
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        turns = "1 micro-batch" if self.accumulation == 1 else f"{self.accumulation} micro-batches"
        return f"{processes} × {turns} of {self.micro_batch} rows = batch {self.batch}"


def split_batch(batch: int, *, processes: int, micro_batch: int | None) -> Split:
    """The split with micro-batches of at most so many rows."""
    if processes > batch:
        raise AlphaflowError(
            f"{processes} processes for a batch of {batch} rows: some would have none. Use at most {batch} processes."
        )
    per_process = -(-batch // processes)
    accumulation = -(-per_process // (micro_batch or per_process))
    return Split(batch, processes, min(accumulation, batch // processes))


def largest_that_fits(rows: int, attempt: Callable[[int], None]) -> int:
    """The first of rows, rows/2, rows/4, … that `attempt` survives without running out of memory."""
    while True:
        try:
            attempt(rows)
            return rows
        except torch.OutOfMemoryError as error:
            if rows == 1:
                raise AlphaflowError(
                    "not even one row fits the device's memory. Choose a smaller model, a larger patch, or "
                    "--set train.gradient_checkpointing=true."
                ) from error
        rows = -(-rows // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
