"""The decoder: in which precision latents become pictures, and when it is compiled.

    fp32    true float32: TF32, a GPU's default for convolutions, is switched off
    bf16    bfloat16 in channels_last; on a GPU compiled from COMPILED_FROM pictures on, where torch.compile can

Raw latents go through it in groups of GROUP rows, the last one filled up with zeros: kernels of odd sizes round
otherwise, which would show in the pictures, and a compiled decoder would need one form for each size.
"""

import os
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from shutil import which
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.nn.autoencoder import Autoencoder, load_autoencoder
from alphaflow_cli.nn.features import true_float32

Precision = Literal["fp32", "bf16"]
DecoderChoice = Literal["auto", "fp32", "bf16"]
DECODER_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
GROUP = 16
COMPILED_FROM = 10_000  # pictures; an estimate, not measured: compiling takes about a minute, which must be won back


@dataclass(frozen=True)
class Decoder:
    """How an autoencoder is made ready to decode."""

    precision: Precision
    compiled: bool = False
    backend: Any = "inductor"  # of torch.compile

    def load(self, name: str, device: torch.device) -> Autoencoder:
        """The autoencoder of that name. Nothing is compiled before the first group."""
        bf16 = self.precision == "bf16"
        found = load_autoencoder(name, device=device, dtype=DECODER_DTYPES[self.precision], channels_last=bf16)
        if self.compiled and found.module is not None:
            warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # in diffusers
            part: Any = found.module.decoder
            part.compile(dynamic=False, backend=self.backend)  # in place: the weights keep their names
        return found


def plan_decoder(asked: DecoderChoice, device: torch.device, *, pictures: int) -> Decoder:
    """As asked; auto is bf16 on a GPU, fp32 on a CPU. `pictures` of all processes: sharing them out changes none."""
    if asked not in get_args(DecoderChoice):
        raise AlphaflowError(f"decoder {asked!r}: there are {', '.join(get_args(DecoderChoice))}")
    on_gpu = device.type == "cuda"
    if asked == "fp32" or (asked == "auto" and not on_gpu):
        return Decoder("fp32")
    return Decoder("bf16", compiled=on_gpu and pictures >= COMPILED_FROM and can_compile())


def can_compile() -> bool:
    """On a GPU, torch.compile writes Triton kernels and builds their launchers with a C compiler."""
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
    return find_spec("triton") is not None and any(which(name) for name in compilers)


def decode_in_groups(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Raw latents (n, C, h, w) to float32 pixels (n, 3, H, W); whole groups."""
    count = len(latents)
    spare = -count % GROUP if autoencoder.module is not None else 0
    rows = torch.cat([latents, latents.new_zeros((spare, *latents.shape[1:]))]) if spare else latents
    exact = autoencoder.dtype == torch.float32
    with true_float32() if exact else nullcontext():  # inside, TF32's old switches raise, and compilers may read them
        return torch.cat([autoencoder.decode(part.float()) for part in torch.split(rows, GROUP)])[:count]


def told_precision(network: str, decoder: Precision | None) -> str:
    """For the protocol; None: pixels come from the network itself."""
    if network == "fp32" and decoder in (None, "fp32"):
        return "fp32"
    return f"{network} network" + (f", {decoder} decoder" if decoder else "")
