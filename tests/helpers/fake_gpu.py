"""A simulated GPU, to see where the host waits: its tensors have shapes but no values, those of the host are real.

A real GPU's host waits for values (.item(), a boolean index: here there are none, so these raise), for any copy from
the device, and for a copy to it that is not asynchronous, whole and from pinned memory: also for the hidden one of a
host's tensor among an operator's arguments. Autograd cannot run backward on it.
"""

import re
from contextlib import contextmanager

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
        if name == "is_pinned":
            return any(args[0] is one for one in self.pinned)
        if name == "_pin_memory":
            self.pinned.append(torch.empty_strided(args[0].shape, args[0].stride(), dtype=args[0].dtype).copy_(args[0]))
            return self.pinned[-1]
        if name == "_to_copy":
            self.copied(args[0], kwargs.get("device"), kwargs.get("non_blocking"))
        elif name == "copy_":
            self.copied(args[1], args[0].device, kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        else:
            self.hidden(name, [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)])
        device = kwargs.get("device")
        if not any(isinstance(x, FakeTensor) for x in tree_leaves(args)) and (device is None or device.type == "cpu"):
            return func(*args, **kwargs)
        self.on_device += 1
        with self.mode:
            return func(*args, **kwargs)

    def copied(self, source, device, non_blocking):
        target = source.device if device is None else torch.device(device)
        pinned = any(source is one for one in self.pinned) and source.is_contiguous()
        waits = target.type == "cpu" or not (non_blocking and pinned)
        if target.type != source.device.type and waits:
            self.found.append(f"{source.device} to {target}, {tuple(source.shape)}")

    def hidden(self, name, tensors):
        on_host = [x for x in tensors if x.device.type == "cpu" and x.ndim > 0]
        if on_host and any(x.device.type != "cpu" for x in tensors):
            self.found.append(f"a tensor of the host in {name}, {tuple(on_host[0].shape)}")


class HostGenerator(torch.Generator):
    """Draw on the host, whatever device is requested: the simulated GPU has no values."""

    def __new__(cls, device=None):
        return super().__new__(cls)


@contextmanager
def fake_gpu(monkeypatch):
    """Make GPU a device inside the block; yields what was counted."""
    torch.ones(1, requires_grad=True).sum().backward()  # autograd counts the devices once: before there is this one
    monkeypatch.setattr(torch, "Generator", HostGenerator)
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    with FakeGpu() as gpu:
        yield gpu
