"""The processes that share a verb's work: who am I, how many are we, what do we compute on.

Every long verb is many in one way: `run_shared` does its work here or starts N processes that do, and inside the work
`join_processes` says which one this is. A share is every N-th part, beginning with the process's own number. Accelerate
does the joining.
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.runtime.launch import JOINED, as_worker, check_processes, is_worker, launch, whole_number
from alphaflow_cli.runtime.precision import exact_dtype, set_tf32
from alphaflow_cli.runtime.threads import cores_here
from alphaflow_cli.text import counted

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.tensor import DTensor

KINDS = {"cpu": "", "cuda": "no NVIDIA or AMD GPU", "mps": "no Apple GPU"}  # kind of device → what one misses
PATIENCE = timedelta(hours=2)  # one process may work so long while the others wait; a dead one is noticed at once
SAME = 1e-6  # relative difference of the processes' gradient checksums that rounding may cause
Done = TypeVar("Done")


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work. As it stands here it is alone; a World is one of several."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values` over all processes, in place; every process gets the total."""
        return values

    def wait(self) -> None:
        """Wait until all processes are here."""


@contextmanager
def smaller_batch_if_full(batch: int) -> Iterator[None]:
    """Turn a GPU that runs out of memory into one line that names --batch."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        smaller = f"Give a smaller --batch than {batch}" if batch > 1 else "Free some of it"
        raise AlphaflowError(
            f"out of memory ({str(error).splitlines()[0]}). {smaller}, or use a larger GPU."
        ) from error


def join_processes(*, needs_gpu: bool = True, device: str | None = None) -> Processes:
    """This process among all that were started together (torchrun, --processes), or alone.

    Work that needs no GPU may have more processes than there are; they meet on the CPU.
    """
    chosen = choose_device(device)
    if is_worker() and whole_number(os.environ, "WORLD_SIZE") > 1:  # a single process starts without accelerate
        return join_world(allow_tf32=None, device=device if needs_gpu else "cpu")
    return Processes(chosen)


def run_shared(
    work: Callable[[], int],
    arguments: Sequence[str],
    *,
    requested: int | None,
    count: Callable[[int | None], int] | None = None,
    prepared: AbstractContextManager[None] | None = None,
) -> int:
    """Do a verb's work in this process, or start N that each do their share of it; returns the exit code.

    `arguments` start the verb again, `count` makes their number of `requested` (default: one per GPU), and `prepared`
    surrounds the work where this process starts it. Inside torchrun, accelerate launch or Slurm this process is one
    of theirs, and ends with its share. The work itself calls `join_processes`.
    """
    if is_worker():
        check_processes(requested)
        as_worker(work)
    number = (count or processes_here)(requested)
    with prepared or nullcontext():
        return work() if number == 1 else launch(arguments, number)


def all_or_none(processes: Processes, work: Callable[[], Done], *, others: BaseException | None = None) -> Done:
    """Do a part of the work that may be refused. If any process is refused, all leave: one message is enough.

    Otherwise the others would wait for it: for hours, where no agent ends them. They raise `others`; None: they end.
    """
    fault: AlphaflowError | None = None
    try:
        result = work()
    except AlphaflowError as error:
        fault = error
    refused = processes.sum(torch.tensor([float(fault is not None)], device=processes.device))
    if refused.item():
        raise fault or others or SystemExit(1)
    return result


def check_seen(path: Path, processes: Processes, needed: str) -> None:
    """Refuse a process that does not see what the first one has written: it runs on another machine."""
    if processes.rank and not path.exists():
        raise AlphaflowError(
            f"{path.parent}: process {processes.rank} on {socket.gethostname()} does not see what process 0 wrote "
            f"there. All machines need {needed} on a shared file system."
        )


def threads_here(processes: Processes) -> int:
    """The cores of this machine that each of its processes may use, 16 at most."""
    together = int(os.environ.get("LOCAL_WORLD_SIZE") or processes.size) if processes.size > 1 else 1
    return max(1, min(16, cores_here().count // together))


def check_same(processes: Processes, digest: str, what: str) -> None:
    """Check that all processes read the same bytes: a run that still trains may replace its checkpoint in between."""
    number = int(digest[:12], 16)  # 48 bits: the sum over a thousand processes fits int64
    total = processes.sum(torch.tensor([number], device=processes.device)).item()
    if total != number * processes.size:
        raise AlphaflowError(f"{what}: was replaced while the processes read it. Run the same command again.")


def choose_device(name: str | torch.device | None, *, apple: bool = True) -> torch.device:
    """The device of this name; without one a GPU where there is one. A device that is not here is refused.

    Without `apple`, an Apple GPU is taken only when it is named.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if apple and _has_mps() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise AlphaflowError(f"device {name!r}: there are cpu, cuda and mps.") from None
    if device.type not in KINDS:
        raise AlphaflowError(f"device {str(name)!r}: there are cpu, cuda and mps.")
    if (device.type == "cuda" and not torch.cuda.is_available()) or (device.type == "mps" and not _has_mps()):
        raise AlphaflowError(
            f"device {name}: torch sees {KINDS[device.type]} on this machine. Leave it out to compute on what is here; "
            "alphaflow doctor says what that is."
        )
    if device.index and device.index >= torch.cuda.device_count():
        raise AlphaflowError(f"device {name}: this machine has {counted(torch.cuda.device_count(), 'GPU')}.")
    return device


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def processes_here(requested: int | None, device: str | None = None) -> int:
    """The number of --processes, else one per GPU; more than there are GPUs is refused, before anything starts."""
    gpus = {"cpu": 0, "mps": 1}.get(device or "", torch.cuda.device_count())
    if requested and gpus and requested > gpus:
        raise AlphaflowError(
            f"--processes {requested}: this machine has {counted(gpus, 'GPU')}, and every process needs one of "
            f"its own. Give --processes {gpus}, or leave it out."
        )
    return requested or max(1, gpus)


def is_cut(value: Tensor) -> "TypeGuard[DTensor]":
    """Whether FSDP2 cut the tensor over the processes: a DTensor, whose class takes a second to import."""
    return hasattr(value, "placements")


@dataclass(frozen=True, kw_only=True)
class World(Processes):
    """This process among several that were started together and share the work by accelerate."""

    accelerator: "Accelerator"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Every process's values, stacked: (processes, …)."""
        parts = [torch.empty_like(values) for _ in range(self.size)]
        if self.size > 1:
            dist.all_gather(parts, values)
        return torch.stack(parts if self.size > 1 else [values])

    def largest(self, value: float) -> float:
        """The largest value that any process has."""
        highest = torch.tensor([value], dtype=exact_dtype(self.device), device=self.device)
        if self.size > 1:
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        return float(highest.item())

    def agree(self, flag: bool) -> bool:
        """Whether the flag is set on any process: all must decide alike."""
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item()) if self.size > 1 else flag

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def check_synchronised(self, net: nn.Module) -> None:
        """Check after a backward pass that every process holds the same gradient, or its own part of it."""
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        if self.size == 1 or any(is_cut(grad) for grad in grads):
            return
        mine = torch.stack([grad.double().abs().sum() for grad in grads])
        sums = self.gather(mine)
        apart = (sums - sums[0]).abs() > SAME * sums[0]  # a NaN compares as false: another policy's affair
        assert not apart.any(), (
            "the processes' gradients differ after the first backward pass: they were not synchronised. "
            f"Sums of |gradient| by process: {sums.sum(1).tolist()}"
        )


def join_world(
    *,
    allow_tf32: bool | None = False,
    device: str | None = None,
    trackers: Sequence[str] = (),
    folder: Path | None = None,
) -> World:
    """Join the processes that started us (torchrun, accelerate launch, Slurm or --processes), or be alone.

    `device` None is a GPU where CUDA has one, else the CPU: Apple's GPUs train when asked only. One that is not here is
    refused: Accelerate would take the CPU.
    `allow_tf32` None leaves TF32 as torch has it, so that N processes draw and measure what one does.
    """
    choose_device(device)
    on_cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
    if on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # else N processes become N lonely first ones
    expected = whole_number(os.environ, "WORLD_SIZE", "1")
    # Precision, accumulation and sharding are ours; the environment must not switch them on behind our back.
    for name in ("GRADIENT_ACCUMULATION_STEPS", "DYNAMO_BACKEND", "USE_FSDP", "USE_DEEPSPEED", "USE_MEGATRON_LM"):
        os.environ.pop(f"ACCELERATE_{name}", None)
    accelerator = _accelerator(on_cpu, trackers, folder)
    if accelerator.num_processes != expected:
        raise AlphaflowError(
            f"{expected} processes were started but only {accelerator.num_processes} joined. "
            "Start them with --processes, torchrun, or accelerate launch --multi_gpu."
        )
    if allow_tf32 is not None:
        set_tf32(allow_tf32)
    world = World(
        device=torch.device(accelerator.device),
        rank=int(accelerator.process_index),
        size=int(accelerator.num_processes),
        accelerator=accelerator,
    )
    _meet(world)
    JOINED.set()
    return world


def _accelerator(on_cpu: bool, trackers: Sequence[str], folder: Path | None) -> "Accelerator":
    """Make Accelerate's object with its own precision and accumulation switched off."""
    from accelerate import Accelerator, utils  # here: it takes a second, which a process on its own need not wait

    # else gradients exist twice
    handlers: list[Any] = [utils.DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if on_cpu and not hasattr(dist, "set_timeout"):  # gloo of torch 2.6 keeps the patience that it begins with
        handlers.append(utils.InitProcessGroupKwargs(timeout=PATIENCE))
    return Accelerator(
        cpu=on_cpu,
        mixed_precision="no",
        gradient_accumulation_steps=1,
        log_with=list(trackers) or None,
        project_config=utils.ProjectConfiguration(str(folder), str(folder / "trackers")) if folder else None,
        kwargs_handlers=handlers,
    )


def _meet(world: World) -> None:
    """Exchange a number before any work: what keeps processes from exchanging must not show when all is measured.

    Then they wait for each other with patience: torch's 10 minutes on GPUs end a run whose first process verifies a
    large store, and an evaluation of which one process had most left to measure.
    """
    if world.size == 1:
        return
    try:
        world.sum(torch.zeros(1, device=world.device))
    except dist.DistBackendError as error:
        if "Duplicate GPU" not in str(error):
            raise
        raise AlphaflowError(
            f"{world.size} processes were started, but two of them have the same GPU, and every process needs one of "
            "its own. Start as many on each machine as it has GPUs."
        ) from error
    older: Callable[[timedelta], Any] | None = getattr(dist.distributed_c10d, "_set_pg_timeout", None)
    set_timeout = getattr(dist, "set_timeout", older)
    assert set_timeout is not None, torch.__version__
    set_timeout(PATIENCE)
