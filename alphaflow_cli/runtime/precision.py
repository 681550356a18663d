"""How a GPU multiplies float32: exactly, or in TF32 with 10 bits of mantissa. The one owner of that switch.

torch 2.9 and later have two sets of names for it, `allow_tf32` and `fp32_precision`, and raise where a reader of one
finds that they disagree (torch.compile is such a reader). So both are set here, always to the same thing, and nowhere
else in the package.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

TF32, IEEE = ("tf32", "tf32"), ("ieee", "ieee")  # the modes of products and convolutions


def set_tf32(allowed: bool) -> None:
    """Allow or forbid TF32 for the matrix products and convolutions of this process."""
    _set_modes(*(TF32 if allowed else IEEE))


def tf32(allowed: bool) -> AbstractContextManager[None]:
    """Allow or forbid TF32 inside, and put the old setting back."""
    return _inside(*(TF32 if allowed else IEEE))


def true_float32() -> AbstractContextManager[None]:
    """Measure without TF32: features of pictures differ visibly with it."""
    return tf32(False)


def as_torch_begins() -> AbstractContextManager[None]:
    """Compute inside as a command does that leaves torch's settings alone, and put the present ones back."""
    return _inside(*AT_START)


@contextmanager
def encoder_precision(name: str, device: torch.device) -> Iterator[None]:
    """How the encoder multiplies: fp32, tf32 (10 bits of mantissa on a GPU) or bf16 autocast (8 bits)."""
    cast: AbstractContextManager[Any] = torch.autocast(device.type, torch.bfloat16) if name == "bf16" else nullcontext()
    with tf32(name == "tf32"), cast:
        yield


def has_bf16(device: torch.device) -> bool:
    """Whether a GPU multiplies in bf16: NVIDIA's before the A100 (V100, T4) imitate it, slower than in float32."""
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def exact_device(device: torch.device) -> torch.device:
    """Where float64 is computed for a device: there, but for Apple's GPUs, which have none, on the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def exact_dtype(device: torch.device) -> torch.dtype:
    """The widest type of a device's numbers, for sums that stay there: float64, on Apple's GPUs float32."""
    return torch.float32 if device.type == "mps" else torch.float64


@contextmanager
def _inside(products: str, convolutions: str) -> Iterator[None]:
    before = _modes()
    _set_modes(products, convolutions)
    try:
        yield
    finally:
        _set_modes(*before)


def _modes() -> tuple[str, str]:
    """The present modes of products and convolutions, read by the newest names that this torch has."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cudnn, "conv"):
        return matmul.fp32_precision, cudnn.conv.fp32_precision
    return "tf32" if matmul.allow_tf32 else "ieee", "tf32" if cudnn.allow_tf32 else "ieee"


def _set_modes(products: str, convolutions: str) -> None:
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9 says that the first names will go; until then they must agree
        matmul.allow_tf32, cudnn.allow_tf32 = products == "tf32", convolutions == "tf32"
    if hasattr(cudnn, "conv"):
        matmul.fp32_precision, cudnn.conv.fp32_precision = products, convolutions


AT_START = _modes()  # torch's own, before this process chose any
