"""What a run would be, without running it: --dry-run by arithmetic, --estimate by a few timed steps of each phase.

The steps are also how training finds out how many rows fit the memory (--micro-batch auto). What is measured is what
will run: the recipe's network, with compiled blocks where the run has them, and as graphs where its steps are.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alphaflow_cli.core.alpha import equal_rows
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.model.build import DTYPES, build_network
from alphaflow_cli.model.compiling import compile_blocks, compile_faults, forget_compiled, why_not
from alphaflow_cli.recipe import diff_recipes, load_recipe, shipped
from alphaflow_cli.recipe.facts import facts, human, lines
from alphaflow_cli.recipe.loader import set_text
from alphaflow_cli.recipe.plan import alpha_at, equal_share_at, is_precise, stretches
from alphaflow_cli.recipe.schema import Recipe
from alphaflow_cli.runtime.processes import World, join_world
from alphaflow_cli.runtime.progress import Progress, duration, say
from alphaflow_cli.runtime.transfer import wait_for_gpu
from alphaflow_cli.text import counted
from alphaflow_cli.train.compiling import choose_compile, choose_graphs, graphs_pay
from alphaflow_cli.train.graphs import StepGraphs, is_capture_fault, on_own_stream
from alphaflow_cli.train.journal import Sums
from alphaflow_cli.train.optimise import Optimiser
from alphaflow_cli.train.parallel import has_buckets, largest_that_fits, rows_above, split_batch
from alphaflow_cli.train.step import Objective, random_rows, training_step

TIMED_STEPS = 5  # of which the median counts
LONG = 4.0  # seconds of timed steps in a phase after which no other is begun
LEAST_ROWS = 4  # of a timed step on a slow CPU


def micro_batch_that_fits(recipe: Recipe, world: World, *, compiled: bool) -> int:
    """The rows of a micro-batch: halved until a step of every phase fits the GPU's memory; on a CPU, all of them."""
    rows = -(-recipe.train.batch // world.size)
    if world.device.type != "cuda":
        return rows
    try:
        fits = _rows_that_fit(recipe, world.device, rows, compiled=compiled, processes=world.size)
    except (torch.OutOfMemoryError, AlphaflowError) as error:
        if recipe.train.strategy != "fsdp2" or world.size == 1:
            raise
        raise AlphaflowError(
            "train.strategy fsdp2: how many rows fit is tried with the whole network on one GPU, and it does not fit. "
            "Say how many rows each process computes at once, such as --micro-batch 1"
        ) from error
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()  # the journal tells what the run takes, not what was tried
    return -int(world.largest(-fits))  # the fewest that fit anywhere


def _rows_that_fit(recipe: Recipe, device: torch.device, rows: int, *, compiled: bool, processes: int) -> int:
    """Try without compiled blocks first, then the rows that fitted with them."""
    fits = largest_that_fits(rows, Trial(recipe, device, compiled=False, processes=processes).phases)
    if not compiled:
        return fits
    try:  # not at once: compiling takes a minute for each number of rows
        make = partial(Trial, recipe, device, compiled=True, processes=processes)
        fits = largest_that_fits(fits, lambda count: make().phases(count))
    except compile_faults():  # the run meets the same fault, says so, and goes on eagerly
        pass
    forget_compiled()
    return fits


class Trial:
    """A network and an optimiser for steps that are only measured; both are thrown away afterwards.

    Its gradients take memory as those of a run of so many `processes`.
    """

    def __init__(self, recipe: Recipe, device: torch.device, *, compiled: bool, processes: int = 1) -> None:
        self.recipe, self.device, self.objective = recipe, device, Objective.of(recipe)
        self.net = build_network(recipe).to(device, DTYPES[recipe.train.precision])
        if compiled:
            forget_compiled()
            compile_blocks(self.net)
        self.optimiser = Optimiser(self.net, recipe, in_buckets=has_buckets(recipe.train.strategy, processes))

    def phases(self, count: int) -> None:
        """Take one step of every stretch on `count` rows, where the stretch has the most r < t rows."""
        self.optimiser_step()  # so the first one already has beside it what all but a run's first step have
        for phase in stretches(self.recipe):
            self.step(count, min(phase.first, phase.until - 1, key=equal_share_at(self.recipe)))

    def step(self, count: int, at: int) -> None:
        """Take one step on `count` rows as step `at` of the run would be: forward, backward, optimiser."""
        alpha, n_equal = alpha_at(self.recipe)(at), equal_rows(count, equal_share_at(self.recipe)(at))
        rows = random_rows(self.recipe, count, n_equal, self.device)
        training_step(self.net, self.net, rows, alpha=alpha, objective=self.objective).loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step(1)

    def optimiser_step(self) -> None:
        """Take the optimiser's step alone, by gradients of zero: it makes Adam's moments, and DDP's memory."""
        for weight in self.optimiser.trained:
            weight.grad = torch.zeros_like(weight)
        self.optimiser.step(1)


@dataclass(frozen=True)
class PhaseTime:
    """A phase of the run, or its part of one precision, and what a step of it took on this machine."""

    kind: str
    steps: int
    seconds_per_step: float
    memory_bytes: int
    graphed: bool = False  # whether it was replayed as a CUDA graph, without the draws and the data of a step
    precise: bool = False  # whether it is in fp32, in a run in bf16

    @property
    def seconds(self) -> float:
        """Seconds that the whole phase will take."""
        return self.steps * self.seconds_per_step


def measure_phases(
    recipe: Recipe,
    micro_batch: int,
    rows: int,
    *,
    per_process: int,
    device: torch.device,
    compiled: bool,
    graphed: bool | None,
    processes: int,
) -> list[PhaseTime]:
    """Time a few steps of every phase, on `rows` rows of a micro-batch, on this machine; the median counts.

    `graphed` is what `choose_graphs` says.
    """
    trial = Trial(recipe, device, compiled=compiled, processes=processes)
    times, all_phases, alpha = [], stretches(recipe), alpha_at(recipe)
    turns = -(-per_process // micro_batch) * micro_batch / rows
    with Progress("timing", len(all_phases) * (1 + TIMED_STEPS), unit="step") as bar:
        for phase in all_phases:
            middle = (phase.first + phase.until) // 2
            step = partial(trial.step, rows, middle)
            step()  # warm up, and compile
            bar.advance(1, phase.kind)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = _some_seconds(step, bar, phase.kind)
            memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
            # a part of the rows pays the optimiser in full
            fixed = min(timed(trial.optimiser_step), min(seconds)) if rows < micro_batch else 0.0
            each = fixed + (statistics.median(seconds) - fixed) * turns
            precise = is_precise(recipe, alpha(middle))
            times.append(PhaseTime(phase.kind, phase.until - phase.first, each, memory, precise=precise))
    if graphed is not False:
        times = _as_graphs(trial, times, wanted=bool(graphed))
    if compiled:
        forget_compiled()
    return times


def _some_seconds(step: Callable[[], None], bar: Progress, kind: str) -> list[float]:
    """Seconds of a few steps, each; of slow ones fewer."""
    seconds: list[float] = []
    while len(seconds) < TIMED_STEPS and sum(seconds) < LONG:
        seconds.append(timed(step))
        bar.advance(1, kind)
    bar.advance(TIMED_STEPS - len(seconds), kind)
    return seconds


def _as_graphs(trial: Trial, times: list[PhaseTime], *, wanted: bool) -> list[PhaseTime]:
    """The times of replayed steps, where graphs are wanted or pay, and can be captured; else those that are given."""
    recipe = trial.recipe
    sums = Sums(trial.device, has_head=recipe.model.velocity_head is not None)
    steps = StepGraphs(recipe, net=trial.net, wrapped=trial.net, optimiser=trial.optimiser, sums=sums)
    alpha, share, pairs = alpha_at(recipe), equal_share_at(recipe), []
    try:
        for phase in stretches(recipe):
            middle = (phase.first + phase.until) // 2
            pairs.append(steps.prepare(middle, equal_rows(recipe.train.batch, share(middle)), alpha(middle)))
    except RuntimeError as error:  # the run meets it too, says so, and goes on with launched steps
        if not is_capture_fault(error):
            raise
        return times
    each = [pair or (time.seconds_per_step, time.seconds_per_step) for pair, time in zip(pairs, times, strict=True)]
    if not (wanted or graphs_pay(each)):
        return times
    return [
        replace(time, seconds_per_step=replayed, graphed=True) for time, (_, replayed) in zip(times, each, strict=True)
    ]


def _rows_to_time(recipe: Recipe, rows: int, device: torch.device) -> int:
    """The rows of a timed step: all of a micro-batch, or on a CPU where that takes long, a part of them."""
    if device.type != "cpu" or rows <= LEAST_ROWS:
        return rows
    step = partial(Trial(recipe, device, compiled=False).step, LEAST_ROWS, recipe.train.steps - 1)
    step()  # the first step of a program also loads what later ones have
    fit = int(LEAST_ROWS * LONG / 2 / timed(step))
    if fit >= rows:
        return rows
    part = max(LEAST_ROWS, fit)
    say(f"steps of {rows} rows take long here: steps of {part} are timed, and their time is multiplied")
    return part


def _measure(measure: Callable[..., list[PhaseTime]], *, compiled: bool) -> tuple[list[PhaseTime], bool]:
    """The phases' times, and whether they are of compiled blocks; where compiling fails, eagerly, as the run would."""
    try:
        return measure(compiled=compiled), compiled
    except compile_faults() as error:
        say(f"torch.compile failed, so the steps are measured eagerly: {why_not(error)}")
    return measure(compiled=False), False


def timed(work: Callable[[], None]) -> float:
    """Seconds until the work is done, on the device too."""
    started = time.perf_counter()
    work()
    wait_for_gpu()
    return time.perf_counter() - started


def describe_run(
    recipe: Recipe, folder: Path, *, processes: int, micro_batch: int | None
) -> tuple[dict[str, Any], list[str]]:
    """Describe a run, for JSON and in lines: split, network, phases, disk, what differs from the shipped recipe."""
    batch = recipe.train.batch
    cut = split_batch(batch, processes=processes, micro_batch=micro_batch)
    changes = diff_recipes(load_recipe(recipe.name), recipe) if recipe.name in shipped() else []
    split = {
        "processes": processes,
        "micro_batch": cut.micro_batch,
        "accumulation": cut.accumulation,
        "batch": batch,
    }
    document = {"run": str(folder), "split": split, "changes": changes} | facts(recipe)
    document["warnings"] += rows_above(cut, micro_batch)
    width = max(len(name) for name, _ in lines(recipe))
    text = [f"{name.ljust(width)}  {value}" for name, value in lines(recipe)]
    text.append(f"{'split'.ljust(width)}  {cut}")
    text += [f"{'beware'.ljust(width)}  {doubt}" for doubt in rows_above(cut, micro_batch)]
    text.append(f"{'folder'.ljust(width)}  {folder}{', where a run was begun' if (folder / 'state').exists() else ''}")
    for field, old, new in changes:
        both = f"{_value_text(field, old)} in the shipped {recipe.name}, {_value_text(field, new)} here"
        text.append(f"{'changed'.ljust(width)}  {field}: {both}")
    return document, text


def _value_text(field: str, value: Any) -> str:
    """A value as --set takes it; expected scores, which it does not take, by their number."""
    return counted(len(value), "score") if field == "expected" else set_text(value)


def measure_run(
    recipe: Recipe,
    micro_batch: int | None,
    processes: int,
    device: str | None,
    *,
    ready: Callable[[World, int], object],
) -> tuple[list[PhaseTime], bool]:
    """Time the phases on this machine, in one process, after `ready`; also returns whether they are compiled."""
    world = join_world(allow_tf32=recipe.train.tf32, device=device)
    per_process = -(-recipe.train.batch // processes)
    compiled = choose_compile(recipe, world, None, processes)
    if compiled:
        say("compiling the blocks: up to 20 s per phase on a GPU, minutes on a CPU")
    fits = micro_batch or micro_batch_that_fits(recipe, world, compiled=compiled)
    split = split_batch(recipe.train.batch, processes=processes, micro_batch=fits)
    rows = split.micro_batch  # the parts are as equal as can be, so they may be smaller than what fits
    timed_rows = rows if compiled else _rows_to_time(recipe, rows, world.device)
    ready(world, timed_rows)
    graphed = choose_graphs(recipe, world, split, None) if processes == 1 else False
    measure = partial(measure_phases, recipe, rows, timed_rows, per_process=per_process, device=world.device)
    with on_own_stream(graphed is not False):
        return _measure(partial(measure, graphed=graphed, processes=processes), compiled=compiled)


def estimate_training(
    recipe: Recipe, measured: list[PhaseTime], *, compiled: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Extrapolate from measured steps to the whole run; returns JSON objects and lines."""
    total = sum(phase.seconds for phase in measured)
    document = [
        {
            "phase": p.kind,
            "steps": p.steps,
            "seconds_per_step": p.seconds_per_step,
            "memory_bytes": p.memory_bytes,
            "compiled": compiled,
            "graph": p.graphed,
            "precise": p.precise,
        }
        for p in measured
    ]
    wide = " in TF32" if recipe.train.tf32 else " in fp32"
    text = [
        f"{p.kind}{wide if p.precise else ''}: {counted(p.steps, 'step')} at {p.seconds_per_step:.3f} s"
        + f" = {duration(p.seconds)}"
        + (f", {human(p.memory_bytes)} of GPU memory" if p.memory_bytes else "")
        for p in measured
    ]
    seen = recipe.train.steps * recipe.train.batch
    text.append(f"together: {duration(total)} on this machine, {seen / max(total, 1e-9):,.0f} images/s")
    graphed = ", each step one CUDA graph" if any(p.graphed for p in measured) else ""
    text.append(f"{'' if compiled else 'not '}compiled{graphed}, as the run will be")
    return document, text
