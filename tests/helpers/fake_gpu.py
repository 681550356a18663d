"""A simulated GPU, to see where the host waits: its tensors have shapes but no values, those of the host are real.

A real GPU's host waits for values (.item(), a boolean index: here there are none, so these raise), and for a copy from
the device or to it that is not asynchronous, whole and in pinned memory: also for the hidden one of a host's tensor
among an operator's arguments. It waits, too, where it is meant to: for an event (`waits` counts them). Autograd cannot
run backward on it. What is copied from it are zeros.
"""

import re
import threading
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
TORCH = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])


class FakeGpu(TorchDispatchMode):
    """Notes every copy between host and device that waits, and how many operators ran on the device."""

    def __init__(self):
        super().__init__()
        self.mode, self.found, self.on_device, self.pinned = FakeTensorMode(allow_non_fake_inputs=True), [], 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name in ("to", "pin_memory"):
            with self:  # inference mode leaves it whole
                return func.decompose(*args, **kwargs)
        if name == "is_pinned":
            return self.is_pinned(args[0])
        if name == "_pin_memory":
            self.pinned.append(torch.empty_strided(args[0].shape, args[0].stride(), dtype=args[0].dtype).copy_(args[0]))
            return self.pinned[-1]
        if name == "empty" and kwargs.get("pin_memory"):
            self.pinned.append(torch.zeros(args[0], dtype=kwargs.get("dtype")))
            return self.pinned[-1]
        if name == "_to_copy":
            self.copied(args[0], kwargs.get("device"), kwargs.get("non_blocking"))
        elif name == "copy_":
            self.copied(args[1], args[0].device, kwargs.get("non_blocking") or (len(args) > 2 and args[2]), args[0])
            if args[0].device.type == "cpu" and args[1].device.type != "cpu":
                return args[0]
        else:
            self.hidden(name, [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)])
        device = kwargs.get("device")
        if not any(isinstance(x, FakeTensor) for x in tree_leaves(args)) and (device is None or device.type == "cpu"):
            return func(*args, **kwargs)
        self.on_device += 1
        with self.mode:
            return func(*args, **kwargs)

    def copied(self, source, device, non_blocking, into=None):
        target = source.device if device is None else torch.device(device)
        here = into if target.type == "cpu" else source
        pinned = self.is_pinned(here) and source.is_contiguous()
        if target.type != source.device.type and not (non_blocking and pinned):
            self.found.append(f"{source.device} to {target}, {tuple(source.shape)}")

    def is_pinned(self, tensor):
        """By the memory: what makes a tensor hands out another one of the same."""
        if tensor is None or isinstance(tensor, FakeTensor):
            return False
        return any(tensor.data_ptr() == one.data_ptr() for one in self.pinned)

    def hidden(self, name, tensors):
        on_host = [x for x in tensors if x.device.type == "cpu" and x.ndim > 0]
        if on_host and any(x.device.type != "cpu" for x in tensors):
            self.found.append(f"a tensor of the host in {name}, {tuple(on_host[0].shape)}")


class Event:
    """An event of the simulated GPU; notes on `waits` who waits for one."""

    waits: ClassVar = []

    def __init__(self, **options):
        """Any event is as good as any other."""

    def record(self, stream):
        """It stands in the queue of this device."""
        assert stream.type == "cuda"

    def synchronize(self):
        """The host waits."""
        self.waits.append(threading.current_thread().name)

    def elapsed_time(self, other):
        """In milliseconds."""
        return 1.0


class HostGenerator(torch.Generator):
    """Draw on the host, whatever device is requested: the simulated GPU has no values."""

    def __new__(cls, device=None):
        return super().__new__(cls)


@contextmanager
def fake_gpu(monkeypatch):
    """Make GPU a device inside the block; yields what was counted."""
    monkeypatch.setattr(torch, "Generator", HostGenerator)
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: device)
    monkeypatch.setattr(Event, "waits", [])
    with FakeGpu() as gpu:
        yield gpu
