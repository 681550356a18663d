"""The running average of the weights.

    half_life = min(h, ramp · step),   β = 0.5^(1 / max(half_life, 1e-8)),   ema ← β ema + (1 − β) weights

on the 0-based step, after the optimiser's step; so at step 0 (β = 0) the average is the weights themselves.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def ema_beta(step: int, *, half_life: float, ramp: float) -> float:
    """β of the 0-based step `step`."""
    return float(0.5 ** (1.0 / max(min(half_life, ramp * step), 1e-8)))


@torch.no_grad()
def update_ema(ema: Sequence[Tensor], weights: Sequence[Tensor], beta: float) -> None:
    """Move the average towards the weights, in place and in one fused sweep: ema ← β ema + (1 − β) weights."""
    torch._foreach_lerp_(list(ema), list(weights), 1.0 - beta)
