"""The learning rate over the steps. Plain Python, no torch."""

import math


def learning_rate(step: int, *, lr: float, final_lr: float | None, warmup_steps: int, steps: int) -> float:
    """The rate of the 0-based `step`: linear from lr / warmup_steps to lr, then constant, or a cosine to final_lr."""
    if step < warmup_steps:
        first = lr / warmup_steps
        return first + (lr - first) * step / warmup_steps
    if final_lr is None or steps <= warmup_steps:
        return lr
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return final_lr + (lr - final_lr) * (1 + math.cos(math.pi * progress)) / 2
