"""How noise becomes data, and which label a seed gets: what the recipe publishes, unless asked otherwise."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from alphaflow_cli.core import sampler
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe.schema import Recipe


@dataclass(frozen=True)
class Walk:
    """How noise becomes data: the grid, the step, the guidance at sampling."""

    sampler: str
    grid: tuple[float, ...]
    guidance: float

    @property
    def nfe(self) -> int:
        """Network evaluations per image; guidance at sampling doubles them."""
        return sampler.grid_evaluations(self.sampler, len(self.grid) - 1) * (2 if self.guidance != 1.0 else 1)

    def __str__(self) -> str:
        grid = ", ".join(f"{t:g}" for t in self.grid)
        return f"{self.sampler} on {grid}" + (f", guidance {self.guidance:g}" if self.guidance != 1.0 else "")


def plan_walk(
    recipe: Recipe, *, nfe: int, kind: str = "auto", times: Sequence[float] | None = None, guidance: float | None = None
) -> Walk:
    """What the recipe publishes for this NFE, unless asked otherwise."""
    said = recipe.sample
    scale = said.guidance if guidance is None else guidance
    _check_guidance(recipe, scale)
    if times is not None:
        _check_grid(times)
        return Walk(said.sampler if kind == "auto" else kind, tuple(times), scale)
    if nfe < 1:
        raise AlphaflowError(f"--nfe {nfe}: at least one network evaluation per image is needed.")
    if kind == "auto" and nfe == said.nfe and said.times is not None:
        return Walk(said.sampler, said.times, scale)
    if kind == "auto" and nfe == 2 and said.sampler not in ("flow", "heun"):
        return Walk(said.two_step_sampler, said.two_step_times, scale)
    chosen = said.sampler if kind == "auto" else kind
    if chosen == "heun" and nfe % 2 == 0:
        raise AlphaflowError(f"--nfe {nfe}: heun takes two evaluations per step and one on the last: 1, 3, 5, …")
    steps = (nfe + 1) // 2 if chosen == "heun" else nfe
    return Walk(chosen, tuple(sampler.time_grid(steps)), scale)


def _check_grid(times: Sequence[float]) -> None:
    falls = all(a > b for a, b in pairwise(times))
    if len(times) < 2 or times[0] != 1.0 or times[-1] != 0.0 or not falls:
        raise AlphaflowError(
            f"--times {','.join(f'{t:g}' for t in times)}: a grid falls from 1 to 0, such as 1,0.55,0."
        )


def _check_guidance(recipe: Recipe, scale: float) -> None:
    mix = recipe.guidance
    if scale == 1.0:
        return
    if (mix.omega, mix.kappa) != (1.0, 0.0):
        raise AlphaflowError(
            f"guidance {scale:g} at sampling: guidance {mix.omega / (1 - mix.kappa):g} is built into these weights by "
            f"training (omega {mix.omega:g}, kappa {mix.kappa:g}); sample them with guidance 1."
        )
    if mix.label_dropout == 0.0 or recipe.data.classes == 0:
        raise AlphaflowError(
            f"guidance {scale:g} at sampling: this model has no null label (trained with guidance.label_dropout 0)."
        )


def draw_labels(seeds: Sequence[int], classes: int, draw: str) -> list[int]:
    """`random`: RandomState(seed).choice(classes), the published rule; `balanced`: seed modulo classes."""
    if classes == 0 or draw == "balanced":
        return [seed % classes if classes else 0 for seed in seeds]
    return [int(np.random.RandomState(seed % 2**32).choice(classes)) for seed in seeds]
