"""The running average of the weights.

    half_life = min(h, ramp · step),   β = 0.5^(n / max(half_life, 1e-8)),   ema ← β ema + (1 − β) weights

on the 0-based steps that n divides, after the optimiser's step; n is 1 as published. So at step 0 (β = 0) the average
is the weights themselves. With ramp 0 there is no ramp: the half-life is h from the first step on, and the average
begins at the initial weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def ema_beta(step: int, *, half_life: float, ramp: float, every: int) -> float:
    """β of the 0-based step `step`; 1, which moves nothing, on a step that `every` does not divide."""
    if step % every:
        return 1.0
    half_life = min(half_life, ramp * step) if ramp > 0.0 else half_life
    return float(0.5 ** (every / max(half_life, 1e-8)))


@torch.no_grad()
def update_ema(ema: Sequence[Tensor], weights: Sequence[Tensor], beta: float) -> None:
    """Move the average towards the weights, in place and in one fused sweep: ema ← β ema + (1 − β) weights."""
    torch._foreach_lerp_(list(ema), list(weights), 1.0 - beta)
