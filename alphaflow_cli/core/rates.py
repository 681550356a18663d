"""The learning rate over the steps. Plain Python, no torch."""

import math


def learning_rate(
    step: int, *, lr: float, final_lr: float | None, warmup_steps: int, warmup_from: str, steps: int
) -> float:
    """The rate of the 0-based `step`: linear up to lr, then constant, or a cosine to final_lr.

    The first step has lr / warmup_steps, or with `warmup_from` zero the rate 0.
    """
    if step < warmup_steps:
        first = 0.0 if warmup_from == "zero" else lr / warmup_steps
        return first + (lr - first) * step / warmup_steps
    if final_lr is None or steps <= warmup_steps:
        return lr
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return final_lr + (lr - final_lr) * (1 + math.cos(math.pi * progress)) / 2
