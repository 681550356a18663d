"""From the device to the host without waiting in between: copies that are fetched later, and clocks on the device.

Work on a GPU is queued, and the host runs ahead of it. Whoever reads a value there waits for everything that is queued
before it. So a part of the work ends with copies that are queued as well (`Arriving`) and with marks in the queue
(`Laps`); the next part is queued behind them, and only then the host fetches what has arrived.
"""

import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


class Arriving:
    """Tensors on their way to the host, by name. On a CPU they are there already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._here = {name: _begin_copy(tensor) for name, tensor in tensors.items()}
        gpus = [tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"]
        self._event = _recorded(gpus[0], blocking=True) if gpus else None  # the thread that waits for it sleeps

    def fetch(self) -> dict[str, Tensor]:
        """Wait until the device has made and copied them; another thread may do this."""
        if self._event is not None:
            self._event.synchronize()
        return {name: tensor.cpu() for name, tensor in self._here.items()}


def _begin_copy(tensor: Tensor) -> Tensor:
    """Queue the copy of a GPU's tensor to pinned memory, which is the only one that a GPU fills by itself."""
    if tensor.device.type != "cuda":
        return tensor
    here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return here.copy_(tensor.contiguous(), non_blocking=True)


def wait_for_gpu() -> None:
    """Wait until the GPU has done all that is queued; nothing where this process uses none, though there may be one."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


class Laps:
    """The seconds that each part of the queued work takes, from one mark in the queue to the next."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        self._parts: list[str] = []
        self._marks = [self._mark()]

    def end(self, part: str) -> None:
        """Here a part of this name ends."""
        self._parts.append(part)
        self._marks.append(self._mark())

    def seconds(self) -> dict[str, float]:
        """The seconds by part; on a GPU only once the work has been fetched."""
        spent = dict.fromkeys(self._parts, 0.0)
        for part, (before, after) in zip(self._parts, pairwise(self._marks), strict=True):
            spent[part] += before.elapsed_time(after) / 1000 if self._on_gpu else after - before
        return spent

    def _mark(self) -> Any:
        return _recorded(self._device, enable_timing=True) if self._on_gpu else time.perf_counter()


def _recorded(device: torch.device, **options: bool) -> Any:
    """An event behind all that is queued on this GPU now, which need not be the one that torch takes by default."""
    make: Any = torch.cuda.Event  # it has no types
    event = make(**options)
    event.record(torch.cuda.current_stream(device))
    return event
