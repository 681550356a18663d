"""Who shares the work of a measurement: the processes started together, or this one alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from alphaflow_cli.engine.launch import is_worker
from alphaflow_cli.engine.slurm import whole_number
from alphaflow_cli.errors import AlphaflowError


class Processes(Protocol):
    """This process among those that share the work: a World, or Alone."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def sum(self, values: Tensor) -> Tensor:
        """Over the processes, in place."""
        ...

    def wait(self) -> None:
        """Until all are here."""
        ...


@dataclass(frozen=True)
class Alone:
    """One process."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def sum(self, values: Tensor) -> Tensor:
        """Of one."""
        return values

    def wait(self) -> None:
        """Nobody to wait for."""


@contextmanager
def smaller_batch_if_full(batch: int) -> Iterator[None]:
    """Inside, a GPU that runs out of memory is one line that names --batch."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        smaller = f"Give a smaller --batch than {batch}" if batch > 1 else "Free some of it"
        raise AlphaflowError(
            f"out of memory ({str(error).splitlines()[0]}). {smaller}, or use a larger GPU."
        ) from error


def join_processes() -> Processes:
    """All that were started together (torchrun, --processes), or this one alone."""
    if is_worker() and whole_number(os.environ, "WORLD_SIZE") > 1:
        from alphaflow_cli.engine.world import join_world  # a single process starts without accelerate

        return join_world()
    return Alone(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def device_of(rank: int) -> torch.device:
    """The GPU of one of the processes that share work on this machine; the CPU where there is none."""
    count = torch.cuda.device_count()
    return torch.device("cuda", rank % count) if count else torch.device("cpu")


def processes_here(requested: int | None) -> int:
    """The number of --processes, else one per GPU; more than there are GPUs is refused, before anything starts."""
    gpus = torch.cuda.device_count()
    if requested and gpus and requested > gpus:
        raise AlphaflowError(
            f"--processes {requested}: this machine has {gpus} GPU{'s' * (gpus > 1)}, and every process needs one of "
            f"its own. Give --processes {gpus}, or leave it out."
        )
    return requested or max(1, gpus)
