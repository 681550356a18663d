"""The trainer's whole step as one CUDA graph, beside the same step launched one operator after the other.

    python benchmarks/bench_graph.py --device cuda
    python benchmarks/bench_graph.py --device cuda --recipe imf-b2 --set model.dim=64 --set train.batch=64

Per phase of a recipe: milliseconds of a step as a graph (train/graphs.py), of the same lines launched, and of a plain
launched step as a run without graphs takes it; the batch is random and lies on the device, so the draws and the data
are not in it. Whether weights, moments, averages, counters and sums after all steps are the same in the first two, bit
for bit; and how far the third is from them: it asks about the same rows, but rounds the rate and 1 − α otherwise. On a
CPU nothing is captured: a graph is then its own launched step.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from record import record
from torch import Tensor

from alphaflow_cli.core.alpha import equal_rows
from alphaflow_cli.model.build import DTYPES, build_network
from alphaflow_cli.model.compiling import compile_blocks, forget_compiled
from alphaflow_cli.recipe import load_recipe
from alphaflow_cli.recipe.plan import alpha_at, equal_share_at, phases
from alphaflow_cli.recipe.schema import Recipe
from alphaflow_cli.train.graphs import Capturing, StepGraphs, on_own_stream
from alphaflow_cli.train.journal import Sums
from alphaflow_cli.train.optimise import Optimiser
from alphaflow_cli.train.step import Rows, random_rows, row_factor, training_step

FORMS = ("graph", "launched", "plain")
WARM_UP = 3  # plain steps that are not timed


def built(recipe: Recipe, form: str, options: argparse.Namespace) -> StepGraphs:
    """A network with random weights and all that its steps change; the same for every form."""
    torch.manual_seed(0)
    net = build_network(recipe)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    net = net.to(options.device, DTYPES[recipe.train.precision])
    if options.compile:
        forget_compiled()
        compile_blocks(net)
    optimiser = Optimiser(net, recipe)
    sums = Sums(torch.device(options.device), has_head=recipe.model.velocity_head is not None)
    capture = Capturing() if form == "graph" and options.device == "cuda" else lambda work: work
    return StepGraphs(recipe, net=net, wrapped=net, optimiser=optimiser, sums=sums, capture=capture)


def plain_step(steps: StepGraphs, step: int, rows: Rows, alpha: float) -> None:
    """A step of a run without graphs; guidance asks about every row, as in a graph."""
    factor = row_factor(rows.t, rows.r, rows.n_equal, steps.objective, progress=step / steps.recipe.train.steps)
    rows = replace(rows, factor=factor)
    result = training_step(steps.net, steps.net, rows, alpha=alpha, objective=steps.objective)
    (result.loss * (1 / len(rows.t))).backward()  # type: ignore[no-untyped-call]
    steps.sums.add(result.terms, rows.t, rows.r, rows.n_equal)
    steps.optimiser.step(step)


def trained(recipe: Recipe, form: str, at: int, options: argparse.Namespace) -> tuple[list[Tensor], float]:
    """All that the steps have changed, on the host, and milliseconds of a step."""
    steps, alpha = built(recipe, form, options), alpha_at(recipe)(at)
    n_equal, device = equal_rows(recipe.train.batch, equal_share_at(recipe)(at)), torch.device(options.device)
    rows = random_rows(recipe, recipe.train.batch, n_equal, torch.device("cpu"))
    there = {"x": rows.x.to(device), "noise": rows.noise.to(device), "y": rows.y.to(device)}
    rows = replace(rows, **there)
    if form == "plain":
        guide = None if rows.guide is None else rows.guide.to(device)
        times = {name: getattr(rows, name).to(device) for name in ("t", "r", "uniforms")}
        rows = replace(rows, **times, guide=guide)
    take: Callable[[int, Rows, float], None] = steps.take
    if form == "plain":
        take = lambda step, rows, alpha: plain_step(steps, step, rows, alpha)  # noqa: E731
    elif form == "graph":
        steps.prepare(at, n_equal, alpha)
    began = 0.0
    for step in range(options.steps):
        if step == WARM_UP:
            wait(options.device)
            began = time.perf_counter()
        take(at + step, rows, alpha)
    wait(options.device)
    seconds = (time.perf_counter() - began) / (options.steps - WARM_UP)
    left = [*steps.optimiser.changed(), steps.sums.values]
    return [value.detach().double().cpu() for value in left], 1000 * seconds


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def compare(kind: str, options: argparse.Namespace) -> dict[str, object]:
    """The three forms of a step of one phase, from the same weights."""
    recipe = load_recipe(options.recipe, options.set)
    phase = next(each for each in phases(recipe) if each.kind == kind)
    left, ms = {}, {}
    with on_own_stream(options.device == "cuda"):
        for form in FORMS:
            left[form], ms[form] = trained(recipe, form, (phase.first + phase.until) // 2, options)
    same = all(torch.equal(a, b) for a, b in zip(left["graph"], left["launched"], strict=True))
    apart, plain = (_apart(left["graph"], left[form]) for form in ("launched", "plain"))
    times = {f"ms_{form}": ms[form] for form in FORMS}
    return {"phase": kind, **times, "same_bits": same, "largest_difference": apart, "from_plain": plain}


def _apart(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change the recipe")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """A JSON line per phase."""
    options = arguments(words)
    for phase in phases(load_recipe(options.recipe, options.set)):
        setup = {"recipe": options.recipe, "set": options.set, "steps": options.steps, "compiled": options.compile}
        record("graph", options.device, **setup, **compare(phase.kind, options))


if __name__ == "__main__":
    main()
