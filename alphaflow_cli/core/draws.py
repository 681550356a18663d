"""Seeds as a pure function of what they are for: the same draw wherever, whenever and by however many it is made.

    seed of a draw = mix_seed(seed of the run, purpose, step or epoch, ...)

Nothing is replayed when a run resumes, and nothing depends on the number of processes: everybody draws the whole
global batch from the same generator and takes the rows that are theirs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# purposes: data order, posterior noise, mirror images, statistics' subset, noise and times of a step, conflict
ORDER, POSTERIOR, FLIP, SUBSET, STEP, CONFLICT = 1, 2, 3, 4, 5, 6

_MASK = (1 << 64) - 1


def mix_seed(*parts: int) -> int:
    """One seed in [0, 2^63) from several integers; order matters (SplitMix64's finaliser folded over the parts)."""
    state = 0
    for part in parts:
        state = (state + 0x9E3779B97F4A7C15 ^ part & _MASK) & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


@dataclass(frozen=True)
class StepDraws:
    """The random numbers of one global batch, apart from the data's own."""

    noise: Tensor  # (B, C, h, w)
    normals: Tensor  # (3, B): one draw of an r = t row, two of an r < t row
    uniforms: Tensor  # (B,): below the dropout rate, the label is dropped


def step_draws(seed: int, step: int, *, batch: int, shape: tuple[int, int, int], device: torch.device) -> StepDraws:
    """The draws of a step, made on the device: the same on any number of processes; other devices, other streams."""
    generator = torch.Generator(device).manual_seed(mix_seed(seed, STEP, step))
    return StepDraws(
        noise=torch.randn((batch, *shape), generator=generator, device=device),
        normals=torch.randn((3, batch), generator=generator, device=device),
        uniforms=torch.rand((batch,), generator=generator, device=device),
    )
