"""A GPU for the walk over every verb: its tensors have values, held by the host, and mixing them with its own raises.

A tensor there is an `Elsewhere`: a wrapper around a tensor of the host. Every operator, the backward pass's too, is
checked as a GPU checks it: a tensor of the host among its arguments is an error, but for copies, indices and numbers
(tensors without dimensions). The numbers themselves are the CPU's, so a test may compare them with a run on the CPU.
A CUDA graph of a step is the step itself, launched. What it does not show: kernels' own rounding, autocast, pinned
memory, streams, and torch.compile.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from accelerate.state import AcceleratorState, GradientState
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from alphaflow_cli.train import graphs

with torch.device("cpu"):
    torch.empty(0)  # torch lists once what makes tensors: before anything of it is replaced here

GPU = torch.device("cuda", 0)
BYTES = 8 * 2**30  # of its memory
COPIES = ("_to_copy", "copy_", "_foreach_copy_", "set_")
MAY_BE_INDEXED = ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")
JOINS = (
    "cat",
    "stack",
    "mm",
    "addmm",
    "bmm",
    "matmul",
    "index_copy",
    "index_add",
    "index_select",
    "equal",
    "searchsorted",
)


class Elsewhere(torch.Tensor):
    """A tensor of the GPU. For torch's own core it is one of `meta`, on which autograd needs no device."""

    @staticmethod
    def __new__(cls, value):
        made = torch.Tensor._make_wrapper_subclass(
            cls, value.size(), strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype,
            device="meta", requires_grad=value.requires_grad,
        )  # fmt: skip
        made.value = value
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def __repr__(self):
        return f"Elsewhere({self.value})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """While it is on, `cuda` is a device; counts the operators that ran there."""

    def __init__(self):
        super().__init__()
        self.ran = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran += any(isinstance(x, Elsewhere) for x in tree_leaves((args, kwargs)))
        return run(func, args, kwargs or {})


class Numbered(TorchFunctionMode):
    """`cuda` is `cuda:0`: torch asks the driver which one is meant. A generator must be of the device it draws on."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.tolist and isinstance(args[0], Elsewhere):
            return args[0].value.tolist()
        args, kwargs = tree_map(numbered, tuple(args)), tree_map(numbered, kwargs or {})
        generator, device = kwargs.get("generator"), kwargs.get("device") or getattr((*args, None)[0], "device", "cpu")
        if generator is not None and generator.device.type != torch.device(device).type:
            raise RuntimeError(f"Expected a generator of {device}, but got one of {generator.device}")
        return func(*args, **kwargs)


def numbered(x):
    return GPU if (isinstance(x, str) and x == "cuda") or (isinstance(x, torch.device) and x.type == "cuda") else x


def run(func, args, kwargs):
    """The operator on the host's values, after the checks of a GPU."""
    name = func.overloadpacket.__name__
    leaves = tree_leaves((args, kwargs))
    there = [x for x in leaves if isinstance(x, Elsewhere)]
    check(name, args, leaves, there)
    device = kwargs.get("device")
    device = torch.device(device) if device is not None else None
    if there and device is not None and device.type == "meta":  # so the core calls the device of an Elsewhere
        device = GPU
    goes = device.type == "cuda" if device is not None else bool(there)
    if name in ("copy_", "_foreach_copy_"):
        goes = isinstance(args[0] if name == "copy_" else args[0][0], Elsewhere)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if name == "cudnn_convolution_relu":
        return outside(torch.conv2d(*map(inside, args)).relu())
    found = func(*tree_map(inside, args), **tree_map(inside, kwargs))
    known = {id(x.value): x for x in there}  # what an operator wrote to is the tensor that it was
    view = func.is_view and not args[0].is_inference()
    with torch.inference_mode(torch.is_inference_mode_enabled() and not view):
        return tree_map(lambda x: known[id(x)] if id(x) in known else outside(x), found) if goes else found


def inside(x):
    return x.value if isinstance(x, Elsewhere) else x


def outside(x):
    return Elsewhere(x) if isinstance(x, torch.Tensor) and not isinstance(x, Elsewhere) else x


def check(name, args, leaves, there):
    """As CUDA: everything on one device, but for copies, indices, and numbers in an operator on elements."""
    if not there or name in COPIES:
        return
    if name in MAY_BE_INDEXED and isinstance(args[0], Elsewhere):
        leaves = [args[0], *args[2:]]
    here = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Elsewhere)]
    if any(x.ndim or name in JOINS for x in here):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got cuda:0 and cpu")


class Event:
    """An event of a device that has done everything at once."""

    def __init__(self, **options):
        """Any event is as good as any other."""

    def record(self, stream):
        """It stands in the queue of this device."""
        assert stream.type == "cuda"

    def synchronize(self):
        """Nobody waits long."""

    def elapsed_time(self, other):
        """In milliseconds."""
        return 1.0


class Stream:
    """A stream of a device; whatever is queued there is done at once."""

    def __init__(self, device=GPU):
        self.type = device.type

    def wait_stream(self, other):
        """The other one has done everything."""


class AnyGenerator(torch.Generator):
    """A generator that says which device it is for; its numbers are the host's."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.place = torch.device(device)
        return made

    def __init__(self, device="cpu"):
        super().__init__()

    device = property(lambda self: self.place)


@contextmanager
def other_device(monkeypatch):
    """Inside, the machine has one GPU, and every verb takes it."""
    monkeypatch.setattr(torch, "Generator", AnyGenerator)
    make, empty = torch.tensor, torch.empty

    def tensor(data, *, device=None, **more):
        return make(data, **more) if device is None else make(data, **more).to(device)

    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **more: empty(*args, **more))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda values: values.clone())  # in threads too
    card = SimpleNamespace(name="test device", total_memory=BYTES, major=9, minor=0, multi_processor_count=1)
    answers = {
        "_lazy_init": None, "is_available": True, "device_count": 1, "current_device": 0, "set_device": None,
        "synchronize": None, "empty_cache": None, "mem_get_info": (BYTES, BYTES), "max_memory_allocated": 0,
        "reset_peak_memory_stats": None, "get_device_name": card.name, "get_device_properties": card,
        "get_device_capability": (9, 0), "is_bf16_supported": True, "is_current_stream_capturing": False,
        "stream": nullcontext(),
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer, **more: answer)
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # asks the driver
        monkeypatch.setattr(torch.optim.Optimizer, name, lambda self: None, raising=False)
    group = clip_grad._group_tensors_by_device_and_dtype  # torch's core would call the device by its name, meta

    def groups(lists):
        return {(lists[0][0].device, key[1]): found for key, found in group(lists).items()}

    monkeypatch.setattr(clip_grad, "_group_tensors_by_device_and_dtype", groups)
    monkeypatch.setattr(graphs, "Capturing", lambda: lambda work: work)
    monkeypatch.setattr(graphs, "TIMED_STEPS", 1)
    for state in (AcceleratorState, GradientState):  # what earlier tests joined in this process
        state._reset_state(*[True] * (state is AcceleratorState))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with Numbered(), Device() as device:
        yield device
