"""From the host to a device, without the host waiting for it."""

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Through pinned memory where it is a GPU; a plain copy would wait for all work that is queued there, and one with
    gaps goes through memory that is not pinned."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.contiguous().pin_memory().to(device, non_blocking=True)
    return values.to(device)
