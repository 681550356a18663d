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
    """Mix several integers into one seed in [0, 2^63); their order matters.

    It is SplitMix64's finaliser, folded over the parts.
    """
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

    noise: Tensor  # (B, C, h, w), on the device
    normals: Tensor  # (3, B), on the host: one draw of an r = t row, two of an r < t row
    uniforms: Tensor  # (B,), on the host: below the dropout rate, the label is dropped
    guide: Tensor  # (3, B), on the host: uniforms of the guidance scale and of the interval's two ends


def step_draws(seed: int, step: int, *, batch: int, shape: tuple[int, int, int], device: torch.device) -> StepDraws:
    """Draw the random numbers of a step: the same on any number of processes, others on a CPU and on a GPU.

    What decides which rows are computed is drawn on the host, which then need not wait for the device to tell it.
    """
    drawn = mix_seed(seed, STEP, step)
    generator = torch.Generator(device).manual_seed(drawn)
    noise = torch.randn((batch, *shape), generator=generator, device=device)
    host = generator if device.type == "cpu" else torch.Generator().manual_seed(drawn)
    normals, uniforms = torch.randn((3, batch), generator=host), torch.rand((batch,), generator=host)
    return StepDraws(noise, normals, uniforms, torch.rand((3, batch), generator=host))  # new draws come last
