"""The consistency ratio alpha over the steps, and any other share that follows a schedule. Plain Python, no torch.

With p = (step - start) / (end - start), between start and end:

    linear       i + (e - i) p
    exponential  i (e / i)^(p^gamma)
    log          i + (e - i) log10(1 + 9 p)
    sigmoid      i + (e - i) σ(gamma (p - 1/2))

i up to start, e from end on; start = end jumps (the published formula divides by zero there). Then the clamp:
below it 0, above 1 - it 1, both strict. So with the published gamma = 25 and clamp = 0.005 a sigmoid from 1 to 0
is exactly 1 for the first 28.8% of [start, end]. It is exactly 0 for the last 28.8%.
"""

import math
from collections.abc import Callable

PROGRESS: dict[str, Callable[[float, float, float, float], float]] = {  # of every kind but constant and step
    "linear": lambda p, initial, final, gamma: initial + (final - initial) * p,
    "exponential": lambda p, initial, final, gamma: initial * (final / initial) ** (p**gamma),
    "log": lambda p, initial, final, gamma: initial + (final - initial) * math.log10(1 + 9 * p),
    "sigmoid": lambda p, initial, final, gamma: initial + (final - initial) * _sigmoid(gamma * (p - 0.5)),
}


def _sigmoid(x: float) -> float:
    """σ(x), computed so that it does not overflow for a steep gamma."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def clamped(value: float, clamp: float) -> float:
    """Snap a value that is nearly 0 or 1: 0 below the clamp, 1 above 1 − clamp."""
    if value < clamp:
        return 0.0
    return 1.0 if value > 1 - clamp else value


def schedule_value(
    step: int, *, kind: str, initial: float, final: float, start: int, end: int, gamma: float, clamp: float
) -> float:
    """The value of a schedule at the 0-based optimiser step `step`."""
    return clamped(_unclamped(step, kind, initial, final, start, end, gamma), clamp)


def _unclamped(step: int, kind: str, initial: float, final: float, start: int, end: int, gamma: float) -> float:
    if kind == "constant":
        return initial
    if kind == "step" or start == end or not start <= step <= end:
        return initial if step < start else final
    return PROGRESS[kind]((step - start) / (end - start), initial, final, gamma)


def equal_rows(batch: int, share: float) -> int:
    """How many rows of a global batch have r = t: batch · share, rounded down, as published."""
    return int(batch * share)
