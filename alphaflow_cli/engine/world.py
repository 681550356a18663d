"""The processes of a run: who am I, how many are we, what do we compute on. Accelerate does the joining."""

import os
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch import distributed as dist

from alphaflow_cli.errors import AlphaflowError


@dataclass(frozen=True)
class World:
    """This process among its equals."""

    accelerator: Accelerator

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def size(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        return torch.device(self.accelerator.device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, net: nn.Module) -> nn.Module:
        """The network whose gradients synchronise."""
        wrapped: nn.Module = self.accelerator.prepare_model(net)
        return wrapped

    def sum(self, values: Tensor) -> Tensor:
        """Over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """(processes, …): everybody's values."""
        found = [torch.empty_like(values) for _ in range(self.size)]
        if self.size > 1:
            dist.all_gather(found, values)
        return torch.stack(found if self.size > 1 else [values])

    def largest(self, value: float) -> float:
        """Over the processes."""
        found = torch.tensor([value], dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return float(found.item())

    def agree(self, flag: bool) -> bool:
        """Whether any process says so."""
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item()) if self.size > 1 else flag

    def wait(self) -> None:
        """Until all are here."""
        self.accelerator.wait_for_everyone()


def join_world(*, allow_tf32: bool = False) -> World:
    """Join the processes that started us (torchrun, accelerate launch, Slurm or --processes), or be alone."""
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # else N processes become N lonely first ones
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    # Precision and accumulation are ours; the environment must not switch them on behind our back.
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    os.environ.pop("ACCELERATE_DYNAMO_BACKEND", None)
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", gradient_accumulation_steps=1)
    if accelerator.num_processes != expected:
        raise AlphaflowError(
            f"{expected} processes were started but only {accelerator.num_processes} joined. "
            "Start them with --processes, torchrun, or accelerate launch --multi_gpu."
        )
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    torch.backends.cudnn.allow_tf32 = allow_tf32
    return World(accelerator)
