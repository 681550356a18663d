"""Who shares the work of a measurement: the processes started together, or this one alone."""

import os
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from alphaflow_cli.engine.launch import is_worker
from alphaflow_cli.engine.slurm import whole_number


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


def join_processes() -> Processes:
    """All that were started together (torchrun, --processes), or this one alone."""
    if is_worker() and whole_number(os.environ, "WORLD_SIZE") > 1:
        from alphaflow_cli.engine.world import join_world  # a single process starts without accelerate

        return join_world()
    return Alone(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def processes_here(asked: int | None) -> int:
    """What was asked for, else one per GPU."""
    return asked or max(1, torch.cuda.device_count())
