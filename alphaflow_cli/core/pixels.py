"""Pictures as floats in [−1, 1] and as bytes.

truncate   byte = ⌊(x + 1) · 127.5⌋        as published; half a level darker on average
round      byte = nearest of the same
back       x = byte / 127.5 − 1
"""

from collections.abc import Callable

import torch
from torch import Tensor

from alphaflow_cli.errors import AlphaflowError

FAR = 1.2  # a few such values are strokes and light; many show that the guidance is too strong or the network astray
RULES: dict[str, Callable[[Tensor], Tensor]] = {"truncate": torch.floor, "round": torch.round}


def to_uint8(pixels: Tensor, rule: str) -> Tensor:
    """Turn pictures (B, C, H, W) into bytes by a rule, clamped to 0 … 255.

    Values that are not finite are refused: they would turn black unseen.
    """
    refuse_bad(bad_pictures(pixels))
    return quantise(pixels, rule)


def bad_pictures(pixels: Tensor) -> Tensor:
    """Which of the pictures have values that are not finite: (B,) bool."""
    return (~torch.isfinite(pixels)).flatten(1).any(1)


def far_values(pixels: Tensor) -> Tensor:
    """How many values of each picture lie beyond ±1.2, well outside of what bytes can hold: (B,)."""
    return (pixels.abs() > FAR).flatten(1).sum(1)


def refuse_bad(bad: Tensor) -> None:
    """Refuse pictures if one of them has values that are not finite; of a device's flags the host waits for them."""
    if bool(bad.any()):
        raise AlphaflowError(
            f"{int(bad.sum())} of {len(bad)} pictures have values that are not finite (the first: number "
            f"{int(bad.nonzero()[0])} of its batch); the checkpoint is broken, or was sampled outside its precision."
        )


def quantise(pixels: Tensor, rule: str) -> Tensor:
    """The bytes of finite pictures by a rule: plain arithmetic, which a graph can hold."""
    return RULES[rule]((pixels.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8)


def from_uint8(pixels: Tensor) -> Tensor:
    """Turn bytes into float32 in [−1, 1]."""
    return pixels.float() / 127.5 - 1
