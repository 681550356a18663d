"""How noise becomes data, and which label a seed gets: what the recipe publishes, unless asked otherwise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from alphaflow_cli.core import sampler
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.model.find import find_classes
from alphaflow_cli.recipe.plan import draws_scale, effective_scale, has_null_label, is_guided, needs_many_steps
from alphaflow_cli.recipe.schema import MOST_NFE, Recipe

EARLIEST_START = 0.9  # of an own grid: noise for z at that time is wrong by (1 − t) x
MOST_SHOWN = 20  # times of a grid in words; of a longer one its two ends


@dataclass(frozen=True)
class Walk:
    """How noise becomes data: the grid, the step, the guidance at sampling."""

    sampler: str
    grid: tuple[float, ...]
    guidance: float
    guidance_channels: int | None = None  # the first so many are guided; None: all
    scale: float | None = None  # what a network is told that takes the guidance scale as an input
    interval: tuple[float, float] | None = None  # the same of the interval of times in which guidance acts

    @property
    def guide(self) -> tuple[float, float, float] | None:
        """The network's inputs of guidance (scale, t_lo, t_hi), the same at every step; None: it has none."""
        return None if self.scale is None else (self.scale, *(self.interval or (0.0, 1.0)))

    @property
    def nfe(self) -> int:
        """Network evaluations per image; guidance at sampling doubles them."""
        return sampler.grid_evaluations(self.sampler, len(self.grid) - 1) * (2 if self.guidance != 1.0 else 1)

    def __str__(self) -> str:
        walked, channels = f"{self.sampler} on {grid_text(self.grid)}", self.guidance_channels
        if self.scale is not None:
            where = f" in [{self.interval[0]:g}, {self.interval[1]:g}]" if self.interval else ""
            return f"{walked}, guidance {self.scale:g}{where}"
        where = f" on {channels} channels" if channels else ""
        return walked + (f", guidance {self.guidance:g}{where}" if self.guidance != 1.0 else "")


def grid_text(grid: Sequence[float]) -> str:
    """A grid of times in words: all of them, or how many steps and the two ends."""
    times = [f"{t:g}" for t in grid]
    if len(times) > MOST_SHOWN:
        times = [f"{len(times) - 1:,} steps: {times[0]}", *times[1:3], "…", *times[-2:]]
    return ", ".join(times)


def plan_walk(
    recipe: Recipe,
    *,
    nfe: int,
    kind: str = "auto",
    times: Sequence[float] | None = None,
    guidance: float | None = None,
    guidance_channels: int | None = None,
    interval: tuple[float, float] | None = None,
) -> Walk:
    """What the recipe publishes for this NFE, unless asked otherwise."""
    chosen, grid = _plan_steps(recipe, nfe, kind, times)
    if draws_scale(recipe):
        scale = (recipe.sample.scale or 1.0) if guidance is None else guidance
        _check_scale(recipe, scale, guidance_channels)
        return Walk(chosen, grid, 1.0, scale=scale, interval=_interval(recipe, interval))
    if interval is not None:
        raise AlphaflowError(f"{_shown(interval)}: this model does not take the interval of its guidance as an input.")
    scale = recipe.sample.guidance if guidance is None else guidance
    _check_guidance(recipe, scale)
    _check_channels(recipe, scale, guidance_channels)
    return Walk(chosen, grid, scale, guidance_channels)


def _plan_steps(recipe: Recipe, nfe: int, kind: str, times: Sequence[float] | None) -> tuple[str, tuple[float, ...]]:
    """The sampler and its grid of times."""
    published = recipe.sample
    if times is not None:
        _check_grid(times)
        return published.sampler if kind == "auto" else kind, tuple(times)
    if not 1 <= nfe <= MOST_NFE:
        raise AlphaflowError(
            f"--nfe {nfe if abs(nfe) < 10**12 else '…'}: at least one network evaluation per picture is needed, and "
            f"at most {MOST_NFE:,} are made."
        )
    if kind == "auto" and nfe == published.nfe and published.times is not None:
        return published.sampler, published.times
    if kind == "auto" and nfe == 2 and not needs_many_steps(recipe):
        return published.two_step_sampler, published.two_step_times
    chosen = published.sampler if kind == "auto" else kind
    if chosen == "heun" and nfe % 2 == 0:
        raise AlphaflowError(f"--nfe {nfe}: heun takes two evaluations per step and one on the last: 1, 3, 5, …")
    steps = (nfe + 1) // 2 if chosen == "heun" else nfe
    return chosen, tuple(sampler.time_grid(steps))


def _check_grid(times: Sequence[float]) -> None:
    """Check that a grid falls from 1, or a little below as in other systems, to 0; a start of 0.5 is a forgotten 1."""
    falls = all(a > b for a, b in pairwise(times))
    if len(times) < 2 or not EARLIEST_START <= times[0] <= 1.0 or times[-1] != 0.0 or not falls:
        shown = ",".join(f"{t:g}" for t in times[:8]) + (",…" if len(times) > 8 else "")
        raise AlphaflowError(
            f"--times {shown}: a grid falls from 1 to 0, such as 1,0.55,0; "
            f"it may begin between {EARLIEST_START:g} and 1."
        )


def _check_guidance(recipe: Recipe, scale: float) -> None:
    mix = recipe.guidance
    if scale == 1.0:
        return
    if is_guided(mix.omega, mix.kappa):
        built_in = effective_scale(mix.omega, mix.kappa)
        raise AlphaflowError(
            f"guidance {scale:g} at sampling: guidance {built_in:g} is built into these weights by "
            f"training (omega {mix.omega:g}, kappa {mix.kappa:g}); sample them with guidance 1."
        )
    if not has_null_label(recipe):
        raise AlphaflowError(
            f"guidance {scale:g} at sampling: this model has no null label (trained with guidance.label_dropout 0). "
            "Leave guidance out, or say 1."
        )


def _check_scale(recipe: Recipe, scale: float, channels: int | None) -> None:
    """Check a scale that the network takes as an input; some are published beyond what was drawn in training."""
    if not scale >= 1.0:
        raise AlphaflowError(
            f"guidance {scale:g} at sampling: this model takes the scale as an input and was trained with 1 (no "
            f"guidance) to {recipe.guidance.scale_max:g}; a smaller one than 1 means nothing to it."
        )
    if channels is not None:
        raise AlphaflowError(f"--guidance-channels {channels}: this model guides itself, on all channels.")


def _interval(recipe: Recipe, interval: tuple[float, float] | None) -> tuple[float, float] | None:
    """The interval that the network is told, its ends included; None where it takes none."""
    if recipe.guidance.interval != "drawn":
        if interval is None:
            return None
        built_in = f"{recipe.guidance.t_min:g} < t < {recipe.guidance.t_max:g}"
        raise AlphaflowError(f"{_shown(interval)}: the interval of this model's guidance is built in ({built_in}).")
    low, high = interval or recipe.sample.interval or (0.0, 1.0)
    if not 0.0 <= low < high <= 1.0:
        raise AlphaflowError(f"{_shown((low, high))}: it runs from LO to HI, 0 ≤ LO < HI ≤ 1, such as 0.4,0.65.")
    return low, high


def _shown(interval: tuple[float, float]) -> str:
    return f"--interval {interval[0]:g},{interval[1]:g}"


def _check_channels(recipe: Recipe, scale: float, channels: int | None) -> None:
    if channels is None:
        return
    if scale == 1.0:
        raise AlphaflowError(f"--guidance-channels {channels}: there is no guidance to restrict; give --guidance W.")
    if not 1 <= channels <= recipe.data.channels:
        raise AlphaflowError(
            f"--guidance-channels {channels}: this model's latents have {recipe.data.channels} channels."
        )


def draw_labels(seeds: Sequence[int], classes: int, draw: str) -> list[int]:
    """`random`: RandomState(seed).choice(classes), the published rule; `balanced`: seed modulo classes."""
    if classes == 0 or draw == "balanced":
        return [seed % classes if classes else 0 for seed in seeds]
    state = np.random.RandomState(0)  # seeded anew for each label: to make one takes twenty times as long
    return [_draw_label(state, seed, classes) for seed in seeds]


def _draw_label(state: np.random.RandomState, seed: int, classes: int) -> int:
    state.seed(seed % 2**32)
    return int(state.choice(classes))


class LazyLabels:
    """The labels of a slice of the seeds, worked out when it is read: a list of all would grow with the pictures."""

    def __init__(self, seeds: Sequence[int], choose: Callable[[range, Sequence[int]], list[int]]) -> None:
        """`choose` makes the labels of some seeds, whose places among all seeds it is given too."""
        self._seeds, self._choose = seeds, choose

    def __getitem__(self, span: slice) -> list[int]:
        return self._choose(range(len(self._seeds))[span], self._seeds[span])


def choose_labels(recipe: Recipe, seeds: Sequence[int], classes: str, names: Sequence[str]) -> LazyLabels:
    """The classes that --classes names, in turn, or one drawn per seed."""
    count = recipe.data.classes
    if not classes:
        return LazyLabels(seeds, lambda places, some: draw_labels(some, count, "random"))
    chosen = find_classes(recipe, classes, names)
    return LazyLabels(seeds, lambda places, some: [chosen[at % len(chosen)] for at in places])
