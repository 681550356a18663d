"""One run on several processes: how the global batch is cut over them, and how the network is wrapped or cut.

The batch is cut over processes, and over micro-batches that fit the memory. Part a·P + p of A·P parts is micro-batch a
of process p, and takes every (A·P)-th row of the global batch: the r = t rows come first in the batch, so a strided
cut gives every part its share of them, still first.

With FSDP2 every process keeps a part of each parameter; a block is whole only while it computes, or is saved.
Accelerate silently falls back to plain DDP where it knows no FSDP (on a CPU), so the network is cut here: block by
block, then what is left. The rest of this room works on plain tensors: `local` is this process's part of a
parameter, `whole` puts the parts together (all processes must call it), `part` cuts again. Without FSDP all three
give back what they were given.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alphaflow_cli.core.alpha import equal_rows
from alphaflow_cli.core.times import rows_of
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe.plan import equal_share_at
from alphaflow_cli.recipe.schema import Recipe, Strategy
from alphaflow_cli.runtime.processes import World, is_cut
from alphaflow_cli.text import counted

FSDP_TORCH = (2, 13)  # older: backward through a sharded module fails on CPUs or beside forward-mode derivatives


@dataclass(frozen=True)
class Split:
    """A global batch, cut over processes and, on each of them, into `accumulation` micro-batches."""

    batch: int
    processes: int
    accumulation: int

    @property
    def micro_batch(self) -> int:
        """The number of rows of the largest micro-batch."""
        return -(-self.batch // (self.processes * self.accumulation))

    def rows(self, rank: int, turn: int) -> slice:
        """The rows of the global batch that process `rank` takes in its micro-batch number `turn`."""
        return self._part(rank, turn, 0)[0]

    def equal_rows(self, rank: int, turn: int, n_equal: int) -> int:
        """How many of these rows are r = t rows, of `n_equal` in the global batch."""
        return self._part(rank, turn, n_equal)[1]

    def _part(self, rank: int, turn: int, n_equal: int) -> tuple[slice, int]:
        parts = self.processes * self.accumulation
        return rows_of(self.batch, n_equal=n_equal, parts=parts, part=turn * self.processes + rank)

    def __str__(self) -> str:
        processes = counted(self.processes, "process", "processes")
        turns = counted(self.accumulation, "micro-batch", "micro-batches")
        uneven = self.micro_batch * self.processes * self.accumulation != self.batch
        rows = f"{'at most ' if uneven else ''}{counted(self.micro_batch, 'row')}"
        return f"{processes} × {turns} of {rows} = batch {self.batch}"


def split_batch(batch: int, *, processes: int, micro_batch: int | None) -> Split:
    """Cut a batch into micro-batches of at most `micro_batch` rows; None: one micro-batch per process."""
    if processes > batch:
        raise AlphaflowError(
            f"{processes} processes for a batch of {batch} rows: some would have none. Use at most {batch} processes."
        )
    per_process = -(-batch // processes)
    accumulation = -(-per_process // (micro_batch or per_process))
    return Split(batch, processes, min(accumulation, batch // processes))


def rows_above(split: Split, micro_batch: int | None) -> list[str]:
    """A line where micro-batches are larger than was wanted, as one of 1 row is where the processes' parts differ."""
    if micro_batch is None or split.micro_batch <= micro_batch:
        return []
    return [
        f"--micro-batch {micro_batch}: the largest micro-batches have {counted(split.micro_batch, 'row')}, because all "
        f"processes take equally many and {split.processes} do not divide the batch of {split.batch}"
    ]


def largest_that_fits(rows: int, attempt: Callable[[int], None]) -> int:
    """The first of rows, rows/2, rows/4, … for which `attempt` does not run out of memory."""
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


def check_sharding(recipe: Recipe, split: Split, version: str = torch.__version__) -> None:
    """Refuse what FSDP2 cannot do: an old torch, a gradient of one process, micro-batches that call unequally often."""
    if recipe.train.strategy != "fsdp2" or split.processes == 1:
        return
    if tuple(int(part) for part in version.split(".")[:2]) < FSDP_TORCH:
        raise AlphaflowError(
            f"train.strategy fsdp2 needs torch {'.'.join(map(str, FSDP_TORCH))} or newer, this is {version}: older "
            "ones fail in the backward pass of a sharded network. Use train.strategy: ddp, or a newer torch."
        )
    if recipe.train.conflict_every:
        raise AlphaflowError(
            "train.conflict_every: the conflict needs the whole network on one device, not strategy fsdp2. "
            "Set it to 0, and measure the checkpoints: alphaflow analyze RUN --all-checkpoints"
        )
    share, batch = equal_share_at(recipe), recipe.train.batch
    ends = {batch - equal_rows(batch, share(step)) for step in (0, recipe.train.steps - 1)}  # shares are monotone
    parts = split.processes * split.accumulation
    if ends != {0} and min(ends) < parts:
        raise AlphaflowError(
            f"train.strategy fsdp2: {min(ends)} r < t rows for {parts} micro-batches ({split}): one without such a row "
            "would leave the other processes waiting. Use fewer micro-batches, a smaller times.equal_share, or ddp."
        )


def shard_network(net: nn.Module, device: torch.device, processes: int) -> None:
    """Cut the parameters over the processes, in place; their names stay what they are."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes,))
    for name in ("blocks", "velocity_blocks"):
        for block in net.get_submodule(name).children():
            fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


@torch.no_grad()
def local(value: Tensor) -> Tensor:
    """This process's part of a tensor that may be cut; it shares the tensor's memory."""
    if not is_cut(value):
        return value
    mine: Tensor = value.detach().to_local()  # type: ignore[attr-defined]
    return mine


@torch.no_grad()
def whole(parameter: Tensor, value: Tensor, *, keep: bool = True) -> Tensor:
    """Put a tensor that is cut like the parameter together, on the host; without `keep` the result is empty."""
    if not is_cut(parameter):
        return value.detach()
    from torch.distributed.tensor import DTensor

    shape, stride = parameter.shape, parameter.stride()
    mesh, placements = parameter.device_mesh, parameter.placements
    cut = DTensor.from_local(value.detach(), mesh, placements, run_check=False, shape=shape, stride=stride)
    full = cut.full_tensor()
    return full.cpu() if keep else full.new_empty(0)


def part(parameter: Tensor, value: Tensor) -> Tensor:
    """Cut this process's part out of a whole tensor: FSDP2 cuts the first dimension as torch.chunk does."""
    if not is_cut(parameter):
        return value
    mesh = parameter.device_mesh
    chunks, rank = value.chunk(mesh.size(), dim=0), mesh.get_local_rank()
    return chunks[rank] if rank < len(chunks) else value[:0]


def has_buckets(strategy: Strategy, processes: int) -> bool:
    """Whether the gradients are views of DDP's buckets, whose memory is taken from before the first step on."""
    return strategy == "ddp" and processes > 1


def wrap_network(net: nn.Module, world: World, strategy: Strategy) -> nn.Module:
    """The network whose gradients synchronise over the processes; FSDP2 cuts the given one in place."""
    if strategy == "fsdp2" and world.size > 1:
        shard_network(net, world.device, world.size)
        return net
    wrapped: nn.Module = world.accelerator.prepare_model(net)
    return wrapped
