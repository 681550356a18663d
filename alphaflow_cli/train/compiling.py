"""Whether a run is compiled, decided once, and all of its forms compiled before the first step.

`train.compile: auto` compiles where every process has a GPU that can, and where the whole run is so long that it pays
(recipe/speed.py). The decision is saved with the state and kept by a resume, whatever is left of the run. Where
compiling fails, one line says so and the run goes on eagerly: it computes the same, up to rounding.
"""

import time
from collections.abc import Iterator

import torch

from alphaflow_cli.core.alpha import equal_rows
from alphaflow_cli.model.compiling import can_compile, compile_faults, keep_compiled_code, plain_blocks, why_not
from alphaflow_cli.nn.dit import DiT
from alphaflow_cli.recipe.plan import phases
from alphaflow_cli.recipe.schema import Recipe
from alphaflow_cli.recipe.speed import compiling_pays
from alphaflow_cli.runtime.processes import World
from alphaflow_cli.runtime.progress import Progress, say
from alphaflow_cli.train.run import Run
from alphaflow_cli.train.step import random_rows, training_step


def choose_compile(recipe: Recipe, world: World, saved: bool | None, processes: int) -> bool:
    """Whether the run is compiled: as the recipe says; with auto as it was before, else where it can be and pays."""
    choice = recipe.train.compile
    if choice != "auto":
        return choice
    wanted = compiling_pays(recipe, processes) if saved is None else saved
    if not wanted:
        return False
    unable = world.agree(not can_compile(world.device))
    if unable and saved and world.is_main:
        say("compiled so far, the run goes on eagerly: here torch.compile lacks a GPU, Triton or a C compiler")
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
    run.optimiser.forget_gradients()
    if run.world.agree(bool(fault)):
        plain_blocks(run.net)
        if fault:
            say(f"torch.compile failed, so the run goes on eagerly: {fault}")
    elif run.world.is_main and bar.done == len(listed):
        seconds = time.monotonic() - began
        say(f"compiled in {seconds:.0f} s, for the whole run; the code is kept in {keep_compiled_code()}")


def _forms(run: Run) -> Iterator[tuple[float, int, int]]:
    """α, micro-batch and r = t rows of a first and a last step of each phase: each form that differs, once.

    All processes list the same ones, though their rows may differ: a sharded network is called on all of them.
    """
    seen = set()
    for phase in phases(run.recipe):
        for step in (phase.first, phase.until - 1):
            n_equal = equal_rows(run.recipe.train.batch, run.equal_share_at(step))
            for turn in range(run.split.accumulation):
                sizes = [_sizes(run, rank, turn, n_equal) for rank in range(run.world.size)]
                if (form := (phase.kind, *sizes)) not in seen:
                    seen.add(form)
                    yield run.alpha_at(step), turn, n_equal


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
