"""Gradients that are not finite, made finite as in the published system: NaN → 0, ±∞ → ±1e5.

Large finite values stay what they are; clipping comes after. The published system does this silently: here it is
counted.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

INFINITY = 1e5


@torch.no_grad()
def replace_nonfinite(grads: Sequence[Tensor]) -> Tensor:
    """Replace values that are not finite, in place; gives their number.

    The number is left on the device, so that nothing waits for it.
    """
    counts = [(~torch.isfinite(grad)).sum() for grad in grads]
    for grad in grads:
        torch.nan_to_num_(grad, nan=0.0, posinf=INFINITY, neginf=-INFINITY)
    return torch.stack(counts).sum()
