"""Whether a run is compiled, and whether its steps are CUDA graphs: decided once, and made ready before the first step.

`train.compile: auto` compiles where every process has a GPU that can, and where the whole run is so long that it pays
(recipe/speed.py). `train.graphs: auto` captures the steps of a small network on one GPU (train/graphs.py), and keeps
the graphs where a replayed step is plainly faster than a launched one. Each decision is saved with the state and kept
by a resume, whatever is left of the run. Where compiling or capturing fails, one line says so and the run goes on
without: it computes the same, up to rounding.
"""

import time
from collections.abc import Iterator

import torch

from alphaflow_cli.core.alpha import equal_rows
from alphaflow_cli.model.compiling import (
    EAGERLY,
    can_compile,
    compile_faults,
    keep_compiled_code,
    plain_blocks,
    why_not,
)
from alphaflow_cli.nn.dit import DiT
from alphaflow_cli.recipe.plan import is_precise, phases, stretches
from alphaflow_cli.recipe.schema import Recipe
from alphaflow_cli.recipe.speed import compiling_pays, graphs_may_pay
from alphaflow_cli.runtime.precision import has_bf16
from alphaflow_cli.runtime.processes import World
from alphaflow_cli.runtime.progress import Progress, say
from alphaflow_cli.train.graphs import MOST_GRAPHS, StepGraphs, is_capture_fault
from alphaflow_cli.train.parallel import Split
from alphaflow_cli.train.run import Run
from alphaflow_cli.train.state import StateFacts
from alphaflow_cli.train.step import random_rows, training_step

GAIN = 1.25  # times as fast a replayed step has to be: below, it is not worth what rounds otherwise


def choose_compile(recipe: Recipe, world: World, saved: bool | None, processes: int) -> bool:
    """Whether the run is compiled: as the recipe says; with auto as it was before, else where it can be and pays."""
    choice = recipe.train.compile
    if choice != "auto":
        return choice
    wanted = compiling_pays(recipe, processes) if saved is None else saved
    if not wanted:
        return False
    able = can_compile(world.device) and (recipe.train.precision != "bf16" or has_bf16(world.device))
    unable = world.agree(not able)
    if unable and saved and world.is_main:
        say("compiled so far, the run goes on eagerly: here torch.compile lacks a GPU, bf16, Triton or a C compiler")
    elif unable and world.device.type == "cuda" and world.is_main:
        say(f"beware: {EAGERLY}")
    return not unable


def compile_forms(run: Run) -> None:
    """Compile every form that the run's steps take, by a step of each that changes nothing; all processes call it."""
    assert isinstance(run.net, DiT)
    if not run.net.compiled or run.step >= run.recipe.train.steps:
        return
    began, fault = time.monotonic(), ""
    listed = list(_forms(run))
    with Progress("compile", len(listed), unit="form", shown=run.world.is_main) as bar:
        for alpha, turn, n_equal in listed:
            try:
                _step_for_nothing(run, alpha, turn, n_equal)
            except torch.OutOfMemoryError:
                break  # the first step meets it too, and takes smaller micro-batches or says what to do
            except compile_faults() as error:
                fault = why_not(error)
                break
            bar.advance(1)
    run.net.zero_grad()  # to None: DDP has not taken them into its buckets yet, and they would lie beside these
    if run.world.agree(bool(fault)):
        plain_blocks(run.net)
        if fault:
            say(f"torch.compile failed, so the run goes on eagerly: {fault}")
    elif run.world.is_main and bar.done == len(listed):
        seconds = time.monotonic() - began
        say(f"compiled in {seconds:.0f} s, for the whole run; the code is kept in {keep_compiled_code()}")


def _forms(run: Run) -> Iterator[tuple[float, int, int]]:
    """α, micro-batch and r = t rows of a first and a last step of each stretch ahead: each form that differs, once.

    All processes list the same ones, though their rows may differ: a sharded network is called on all of them.
    """
    seen = set()
    for stretch in stretches(run.recipe):
        if stretch.until <= run.step:
            continue
        for step in (stretch.first, stretch.until - 1):
            alpha, n_equal = run.alpha_at(step), equal_rows(run.recipe.train.batch, run.equal_share_at(step))
            for turn in range(run.split.accumulation):
                sizes = [_sizes(run, rank, turn, n_equal) for rank in range(run.world.size)]
                if (form := (stretch.kind, is_precise(run.recipe, alpha), *sizes)) not in seen:
                    seen.add(form)
                    yield alpha, turn, n_equal


def _sizes(run: Run, rank: int, turn: int, n_equal: int) -> tuple[int, int]:
    """The rows of a micro-batch, and how many of them are r = t rows."""
    place = run.split.rows(rank, turn)
    return len(range(*place.indices(run.split.batch))), run.split.equal_rows(rank, turn, n_equal)


def _step_for_nothing(run: Run, alpha: float, turn: int, n_equal: int) -> None:
    """Forward and backward on random rows; nothing is exchanged, and the gradient is forgotten."""
    count, equal = _sizes(run, run.world.rank, turn, n_equal)
    rows = random_rows(run.recipe, count, equal, run.world.device)
    with run.world.accelerator.no_sync(run.wrapped):
        result = training_step(run.wrapped, run.net, rows, alpha=alpha, objective=run.objective)
        result.loss.backward()  # type: ignore[no-untyped-call]


def choose_graphs(recipe: Recipe, world: World, split: Split, saved: StateFacts | None) -> bool | None:
    """Whether steps are CUDA graphs: as the recipe says; with auto as before; None: as `prepare_graphs` measures.

    A run that goes on from a state of an earlier version, which says nothing of them, goes on as it was.
    """
    choice = recipe.train.graphs
    wanted = choice if choice != "auto" else None if saved is None else bool(saved.graphs)
    if wanted is False:
        return False
    unable = why_launched(recipe, world, split)
    if unable and wanted and world.is_main:
        so_far = "each step was one CUDA graph so far, and now" if choice == "auto" else "train.graphs: true, but"
        say(f"{so_far} every operator of a step is launched: {unable}")
    return False if unable or (wanted is None and not graphs_may_pay(recipe, world.size)) else wanted


def why_launched(recipe: Recipe, world: World, split: Split) -> str:
    """Why the steps of this run cannot be CUDA graphs; empty where they can."""
    if world.device.type != "cuda":
        return f"the run computes on {world.device.type}"
    if world.size > 1:
        return "several processes exchange their gradients within a step"
    if split.accumulation > 1:
        return "its batch is cut into micro-batches"
    return "" if recipe.optim.kind == "adam" else f"optim.kind {recipe.optim.kind} asks the host whether it may step"


def prepare_graphs(run: Run) -> None:
    """Capture the forms of the steps ahead, where graphs are wanted, or turn out to be faster; a line says which."""
    if run.graphed is False or run.step >= run.recipe.train.steps:
        return
    graphs = StepGraphs(run.recipe, net=run.net, wrapped=run.wrapped, optimiser=run.optimiser, sums=run.sums)
    try:
        each_form = [times for one in _steps_ahead(run) if (times := graphs.prepare(*one))]
    except RuntimeError as error:
        if not is_capture_fault(error):
            raise
        say(f"CUDA graphs failed, so every operator of a step is launched: {why_not(error)}")
        return
    kept = run.graphed or graphs_pay(each_form)
    run.graphs = graphs if kept else None
    verb = "each step is one CUDA graph" if kept else "every operator of a step is launched"
    launched, replayed = (1000 * sum(each) / len(each_form) for each in zip(*each_form, strict=True))
    say(f"{verb}: {launched:.3g} ms launched, {replayed:.3g} ms as a graph")


def graphs_pay(each_form: list[tuple[float, float]]) -> bool:
    """Whether replayed steps are plainly faster, by the seconds of each form, launched and replayed."""
    launched, replayed = (sum(each) for each in zip(*each_form, strict=True))
    return bool(launched > GAIN * replayed)


def _steps_ahead(run: Run) -> list[tuple[int, int, float]]:
    """The first and the last step of each phase ahead, with their r = t rows and α: a few, of all forms if they may."""
    ahead = [phase for phase in phases(run.recipe) if phase.until > run.step]
    steps = [step for phase in ahead for step in (max(phase.first, run.step), phase.until - 1)][:MOST_GRAPHS]
    batch = run.recipe.train.batch
    return [(step, equal_rows(batch, run.equal_share_at(step)), run.alpha_at(step)) for step in steps]
