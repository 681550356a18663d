"""NEW"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def true_float32() -> Iterator[None]:
    """Switches TF32 off for convolutions and products, and puts the old setting back."""
    switches = _precision_switches()
    before = [getattr(place, name) for place, name, _ in switches]
    for place, name, value in switches:
        setattr(place, name, value)
    try:
        yield
    finally:
        for (place, name, _), value in zip(switches, before, strict=True):
            setattr(place, name, value)


def _precision_switches() -> list[tuple[Any, str, Any]]:
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # torch ≥ 2.9; mixing these with the old names raises
        return [(cuda, "fp32_precision", "ieee"), (cudnn.conv, "fp32_precision", "ieee")]
    return [(cuda, "allow_tf32", False), (cudnn, "allow_tf32", False)]


@contextmanager
def encoder_precision(name: str, device: torch.device) -> Iterator[None]:
    """How the encoder multiplies: fp32, tf32 (10 bits of mantissa on a GPU) or bf16 autocast (8 bits)."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    cast: AbstractContextManager[Any] = nullcontext()
    if name == "bf16":
        cast = torch.autocast(device.type, torch.bfloat16)
    matmul.allow_tf32 = cudnn.allow_tf32 = name == "tf32"
    try:
        with cast:
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
