"""What noise cannot touch: the FLOPs, operators, host synchronisations and peak bytes of a piece of work."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"  # some versions of torch have no formula for it
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item", "unique"}


@dataclass(frozen=True)
class Cost:
    """What one call costs."""

    flops: int  # of matrix products, attention and convolutions, forward and backward
    operators: int  # that reach the dispatcher
    host_waits: int  # of them, those for which a GPU's host waits: values or shapes that depend on the data
    peak_bytes: int  # highest sum of live allocations, above what was live before

    def over(self, other: "Cost") -> dict[str, float]:
        """Divide each cost by that of another piece of work."""
        return {
            "flops": self.flops / other.flops,
            "operators": self.operators / other.operators,
            "peak_bytes": self.peak_bytes / other.peak_bytes,
        }


class _Trace(TorchDispatchMode):
    """Counts operators, their FLOPs, and those that make the host wait (a boolean index is a hidden nonzero).

    FlopCounterMode itself cannot watch torch.autograd.grad, which the reference step needs; its table of formulas can.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.host_waits = self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.operators += 1
        name = func.overloadpacket.__name__
        self.host_waits += name in WAITING or (name.startswith("index") and _has_mask(args))
        out = func(*args, **(kwargs or {}))
        if name in (ATTENTION, f"{ATTENTION}_backward"):
            self.flops += _attention_flops(name, args)
        elif func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def _attention_flops(name: str, args: Sequence[Any]) -> int:
    """As torch counts other fused kernels: q kᵀ and p v; backward q kᵀ once more, and four gradients."""
    backward = name.endswith("_backward")
    rows, heads, tokens, size = args[1 if backward else 0].shape
    return int((5 if backward else 2) * 2 * rows * heads * tokens * args[2].shape[2] * size)


def _has_mask(args: Sequence[Any]) -> bool:
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)


def count(work: Callable[[], object], device: str = "cpu") -> Cost:
    """Runs the work twice, after once to warm up. Gradients should exist already, so that they do not count."""
    work()
    with _Trace() as trace:
        work()
    waits = trace.host_waits if device == "cpu" else gpu_waits(work)
    return Cost(trace.flops, trace.operators, waits, peak_bytes(work, device))


def gpu_waits(work: Callable[[], object]) -> int:
    """How often the driver's own watch saw the host wait for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        work()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in seen)


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """From the allocator: on a GPU its own peak, on the CPU the running sum of every allocation the profiler saw."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    seen = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=seen, profile_memory=True, acc_events=True) as profile:
        work()
    kineto = profile.profiler.kineto_results
    moves = [(e.start_ns(), e.nbytes()) for e in kineto.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(moves, key=lambda move: move[0]):
        live += change
        peak = max(peak, live)
    return peak
