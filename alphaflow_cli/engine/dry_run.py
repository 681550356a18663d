"""What a run would be, without running it: --dry-run by arithmetic, --estimate by a few timed steps."""

from pathlib import Path
from typing import Any

from alphaflow_cli.engine.facts import facts, human, lines
from alphaflow_cli.engine.progress import duration, say
from alphaflow_cli.engine.split import split_batch
from alphaflow_cli.recipe import diff_recipes, load_recipe, shipped
from alphaflow_cli.recipe.schema import Recipe


def describe_run(
    recipe: Recipe, asked: str, folder: Path, *, processes: int, micro_batch: int | None
) -> tuple[dict[str, Any], list[str]]:
    """(machine-readable, lines): split, network, phases, disk, and what differs from the shipped recipe."""
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
    width = max(len(name) for name, _ in lines(recipe))
    text = [f"{name.ljust(width)}  {value}" for name, value in lines(recipe)]
    text.append(f"{'split'.ljust(width)}  {cut}")
    text.append(f"{'folder'.ljust(width)}  {folder}{', resumes' if (folder / 'state').exists() else ''}")
    for field, old, new in changes:
        text.append(f"{'changed'.ljust(width)}  {field}: {old} in the shipped {recipe.name}, {new} here")
    return document, text


def estimate_training(
    recipe: Recipe, micro_batch: int | None, processes: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """(per phase, lines): measured on this machine, one process, extrapolated."""
    from alphaflow_cli.engine.probe import measure_phases, micro_batch_that_fits
    from alphaflow_cli.engine.world import join_world

    world = join_world(allow_tf32=recipe.train.tf32)
    per_process = -(-recipe.train.batch // processes)
    if recipe.train.compile:
        say("compiling the blocks, as train.compile asks for: minutes on a CPU")
    rows = min(micro_batch or micro_batch_that_fits(recipe, world), per_process)
    measured = measure_phases(recipe, rows, per_process=per_process)
    total = sum(phase.seconds for phase in measured)
    document = [
        {"phase": p.kind, "steps": p.steps, "seconds_per_step": p.seconds_per_step, "memory_bytes": p.memory_bytes}
        for p in measured
    ]
    text = [
        f"{p.kind}: {p.steps:,} steps at {p.seconds_per_step:.3f} s = {duration(p.seconds)}"
        + (f", {human(p.memory_bytes)} of GPU memory" if p.memory_bytes else "")
        for p in measured
    ]
    seen = recipe.train.steps * recipe.train.batch
    text.append(f"together: {duration(total)} on this machine, {seen / max(total, 1e-9):,.0f} images/s")
    return document, text
