"""What fits into so many hours: `alphaflow train RECIPE --hours 8` prints the values of the recipe that would change.

A few timed steps of each phase tell what a step takes on this machine. The longest run that fits is looked for by
bisection: with its start, its saves, its sample grids and its measurements of the conflict. Whatever the recipe counts
in steps keeps its share of the run: warm-up, half-lives, measurements, and the ends of schedules that are numbers. A
batch and a learning rate stay as they are.
"""

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe.loader import set_text
from alphaflow_cli.recipe.plan import alpha_at, is_precise, saved_state_bytes, schedules_of, stretches
from alphaflow_cli.recipe.schema import Recipe, StepOrShare
from alphaflow_cli.recipe.speed import TRAINER
from alphaflow_cli.runtime.progress import duration
from alphaflow_cli.runtime.threads import threads_kept
from alphaflow_cli.train.estimate import PhaseTime, measure_run
from alphaflow_cli.train.samples import COLUMNS, ROWS
from alphaflow_cli.train.start import TrainOptions
from alphaflow_cli.train.threads import choose_threads

GRID_FORWARDS = 3  # of each picture of a sample grid: 1 and 2 evaluations
GRID_SECONDS = 0.3  # that a grid takes besides
CONFLICT_FORWARDS = 16  # of each row of a measured conflict, at most: four gradients, a tangent, guidance's velocities
DISK = 200e6  # bytes per second of a slow disk
LEAST_SAVES, LEAST_ROWS = 10, 50  # of a shortened run: saves and sample grids, and rows of its journal
LITTLE = 0.02  # the share of a recipe's steps below which a line warns


def measure_phases_of(recipe: Recipe, options: TrainOptions, processes: int) -> tuple[list[PhaseTime], bool]:
    """Time a few steps of each phase as the run would compute them, its number of threads included."""

    def ready(world: Any, rows: int) -> None:
        choose_threads(recipe, world, rows, options.threads, None)

    with threads_kept():
        return measure_run(recipe, options.micro_batch, processes, options.device, ready=ready)


@dataclass(frozen=True)
class Fit:
    """The run that fits, beside the recipe's own."""

    recipe: Recipe
    hours: float
    steps: int
    seconds: float
    sets: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """The figures and values that --json prints."""
        return {"hours": self.hours, "steps": self.steps, "seconds": self.seconds, "sets": self.sets}

    def lines(self) -> list[str]:
        """The lines that are printed without --json."""
        steps, limit = self.recipe.train.steps, duration(self.hours * 3600)
        if not self.sets:
            return [f"{limit} on this machine: the whole run fits, {steps:,} steps in {duration(self.seconds)}"]
        share = self.steps / steps
        lines = [
            f"{limit} on this machine: {self.steps:,} of the recipe's {steps:,} steps fit ({share:.2g} of it), in "
            f"{duration(self.seconds)}",
            "nothing was changed; add to the command:",
            *(f"  --set {shlex.quote(f'{key}={set_text(value)}')}" for key, value in self.sets.items()),
        ]
        if self.recipe.eval.every:
            lines.append("beware: scores while training (eval.every) come on top: their time is not known before one")
        if share < LITTLE:
            lines.append(
                f"beware: {share:.2g} of the steps teach little of what the recipe is for. A smaller network or "
                "picture learns more in that time: alphaflow recipe ls"
            )
        return lines


def fit_hours(recipe: Recipe, hours: float, measured: list[PhaseTime], *, start: float) -> Fit:
    """The longest run of this recipe that fits, by what was measured; `start` seconds pass before its first step."""

    def seconds(steps: int) -> float:
        return start + run_seconds(recipe, steps, measured)

    most, limit = recipe.train.steps, hours * 3600
    if seconds(1) > limit:
        longest = max(phase.seconds_per_step for phase in measured)
        raise AlphaflowError(
            f"--hours {hours:g}: nothing fits. The start takes about {start:.0f} s here, and a step "
            f"{longest:.3g} s. Give more hours, or a smaller recipe: alphaflow recipe ls"
        )
    low, high = (most, most + 1) if seconds(most) <= limit else (1, most)  # low fits
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if seconds(middle) <= limit else (low, middle)
    return Fit(recipe, hours, low, seconds(low), changes(recipe, low))


def run_seconds(recipe: Recipe, steps: int, measured: Sequence[PhaseTime]) -> float:
    """Seconds of a run of so many steps, by those of a step of each phase; a phase that was not met costs the most."""
    each = {(phase.kind, phase.precise): phase.seconds_per_step for phase in measured}
    short, dearest = shortened(recipe, steps), max(each.values())
    train, alpha = short.train, alpha_at(short)
    stepping = TRAINER * sum(
        (part.until - part.first) * each.get((part.kind, is_precise(short, alpha(part.first))), dearest)
        for part in stretches(short)
    )
    saves = -(-steps // train.save_every)
    grids = -(-steps // train.sample_every) if train.sample_every else 0
    forward = min(each.values()) / 3 / train.batch  # of one row: a step of flow matching is three
    one_grid = GRID_SECONDS + GRID_FORWARDS * COLUMNS * ROWS * forward
    conflicts = -(-steps // max(train.conflict_every, train.log_every)) if train.conflict_every else 0
    looking = grids * one_grid + conflicts * CONFLICT_FORWARDS * train.batch * forward
    return stepping + saves * saved_state_bytes(short) / DISK + looking


def changes(recipe: Recipe, steps: int) -> dict[str, Any]:
    """The values of the recipe that a run of so many steps changes, by their names."""
    if steps == recipe.train.steps:
        return {}
    share, train, optim = steps / recipe.train.steps, recipe.train, recipe.optim
    warm = round(optim.warmup_steps * share) or min(1, optim.warmup_steps)  # a warm-up from zero is refused without
    changed: dict[str, Any] = {"train.steps": steps, "optim.warmup_steps": warm}
    changed["ema.half_lives"] = tuple(float(f"{life * share:.3g}") for life in recipe.ema.half_lives)
    changed["train.save_every"] = min(train.save_every, max(1, steps // LEAST_SAVES))
    changed["train.sample_every"] = min(train.sample_every, max(1, steps // LEAST_SAVES))
    changed["train.log_every"] = min(train.log_every, max(1, steps // LEAST_ROWS))
    if recipe.eval.every:
        changed["eval.every"] = max(1, round(recipe.eval.every * share))
    if train.conflict_every:
        changed["train.conflict_every"] = max(1, round(train.conflict_every * share))
    for name, schedule in schedules_of(recipe):
        if schedule.kind != "constant":
            changed |= {
                f"{name}.start": part_of_run(schedule.start, share),
                f"{name}.end": part_of_run(schedule.end, share),
            }
    return {name: value for name, value in changed.items() if value != attrgetter(name)(recipe)}


def part_of_run(step: StepOrShare, share: float) -> StepOrShare:
    """A step of the whole run as one of a part of it; a percentage stays."""
    return round(step * share) if isinstance(step, int) else step


def shortened(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with the changes of a run of so many steps."""
    for name, value in changes(recipe, steps).items():
        recipe = _replaced(recipe, name.split("."), value)
    return recipe


def _replaced(section: Any, names: list[str], value: Any) -> Any:
    inner = value if len(names) == 1 else _replaced(getattr(section, names[0]), names[1:], value)
    return dataclasses.replace(section, **{names[0]: inner})
