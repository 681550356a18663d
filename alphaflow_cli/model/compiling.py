"""torch.compile: whether this machine can, block by block for the DiT, where the code is kept, and what it raises.

All blocks share one piece of code, so each form below is compiled once, not once per block:

    graded, value alone       α > 0 without guidance   (B rows)
    graded, others beside     α > 0 with guidance      (B rows, and those that guidance asks about)
    graded, with tangents     α = 0                    (B rows, B' of them with a tangent)
    no gradient               u⁻(z_s, r, s); guidance at α = 0  (their own numbers of rows)
    math attention            the forward-mode reference only

α never enters a block, so its schedule compiles nothing. Shapes are static, so another number of rows is compiled anew,
up to FORMS times for one piece of code; beyond that torch runs eagerly, and says so. The rest of the step stays eager:
it is under 2% of the arithmetic, and double backward or torch.func.jvp cannot be traced anyway.

What was compiled is kept on the disk, by torch itself, and the next start reads it instead of compiling again.
"""

import os
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch
from torch import nn

from alphaflow_cli.files import user_path
from alphaflow_cli.nn.dit import DiT
from alphaflow_cli.runtime.progress import say

FORMS = 32  # torch's own limit of 8 is less than the phases of a guided run in micro-batches of two sizes
OLDEST_GPU = (7, 0)  # compute capability that Triton writes for
EAGERLY = (  # on an H100 a step of B/2 takes .290 s eagerly and .159 compiled (measured)
    "torch.compile lacks Triton, a C compiler such as gcc, or a newer GPU here, so nothing is compiled. A compiled "
    "step takes about half as long."
)
FOLDER = "TORCHINDUCTOR_CACHE_DIR"  # torch's name for the folder of compiled code


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works for this GPU: it writes Triton kernels, whose launchers a C compiler builds."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < OLDEST_GPU:
        return False
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
    return find_spec("triton") is not None and any(which(name) for name in compilers)


def keep_compiled_code() -> str:
    """Keep compiled code among the user's caches: torch's own place is emptied when the machine starts anew.

    $TORCHINDUCTOR_CACHE_DIR comes first. Returns the folder, as far as it is known here.
    """
    if FOLDER not in os.environ:
        home = user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "alphaflow" / "compiled"
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError:  # a home that cannot be written to: then in torch's own place
            return "torch's temporary folder"
        os.environ[FOLDER] = str(home)
    return os.environ[FOLDER]


def compile_blocks(net: DiT, backend: Any = "inductor") -> DiT:
    """Compile in place: names in the state dict stay what they are, and nothing is compiled before the first call."""
    keep_compiled_code()
    config: Any = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # older torch
    setattr(config, limit, max(FORMS, getattr(config, limit)))
    for part in compiled_parts(net):
        part.compile(dynamic=False, backend=backend)
    net.compiled = True
    return net


def plain_blocks(net: DiT) -> DiT:
    """Undo `compile_blocks`: the blocks run eagerly again."""
    for part in compiled_parts(net):
        part._compiled_call_impl = None
    net.compiled = False
    return net


def compiled_parts(net: DiT) -> list[nn.Module]:
    """The modules that are compiled: every block, and the final layers."""
    finals = [net.final] if net.velocity_final is None else [net.final, net.velocity_final]
    return [*net.blocks, *net.velocity_blocks, *finals]


def forget_compiled() -> None:
    """Begin with no compiled forms: torch counts those of a network that is gone among the FORMS that it allows."""
    torch.compiler.reset()


def compile_part(part: nn.Module, backend: Any = "inductor") -> None:
    """Compile a part of an autoencoder in place, for one number of rows; nothing is compiled before the first call."""
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # in diffusers
    keep_compiled_code()
    part.compile(dynamic=False, backend=backend)


def compile_by(call: Callable[[], object], *, undo: Callable[[], object], what: str) -> bool:
    """Compile by a first call what was marked for it. Where that fails, a line says so, and `undo` makes it eager."""
    kept, began = keep_compiled_code(), time.monotonic()
    try:
        call()
    except compile_faults() as error:
        undo()
        say(f"torch.compile failed, so {what} runs eagerly: {why_not(error)}")
        return False
    say(f"compiled {what} in {time.monotonic() - began:.0f} s; the code is kept in {kept}")
    return True


def compile_faults() -> tuple[type[Exception], ...]:
    """What torch.compile raises where it cannot make code; a fault in our own lines shows again when they run eagerly.

    For `except compile_faults()`: to import this takes seconds.
    """
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)


def why_not(error: Exception) -> str:
    """The first line of what a compiler had to say."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
