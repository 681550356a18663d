"""From a recipe and a folder to a finished run: resume or begin, then train."""

from pathlib import Path
from typing import Any

import torch

from alphaflow_cli.data.batches import LatentStream
from alphaflow_cli.data.manifest import read_manifest
from alphaflow_cli.engine import journal, split, state
from alphaflow_cli.engine.initial import start_from
from alphaflow_cli.engine.probe import micro_batch_that_fits
from alphaflow_cli.engine.progress import say
from alphaflow_cli.engine.ready import TrainOptions, one_owner, store_of
from alphaflow_cli.engine.run import Run, build_run, newest_for_all
from alphaflow_cli.engine.samples import SampleGrids
from alphaflow_cli.engine.shards import check_sharding
from alphaflow_cli.engine.signals import StopFlag
from alphaflow_cli.engine.trackers import Trackers
from alphaflow_cli.engine.train import train_steps
from alphaflow_cli.engine.utilisation import peak_of
from alphaflow_cli.engine.world import World, join_world
from alphaflow_cli.recipe.schema import Recipe

RESIDENT_SHARE = 0.25  # of a GPU's memory that the latents may take


def open_run(recipe: Recipe, options: TrainOptions, world: World) -> Run:
    """The run, at the step where it was left."""
    store = store_of(recipe, options)
    newest = newest_for_all(options.out, world)
    saved = state.read_facts(newest) if newest else {}
    # the main process reads every byte against its checksum; the others trust it
    stream = open_stream(recipe, store, world, verify=options.verify and world.is_main)
    world.wait()
    run = build_run(
        recipe, options.out, world=world, stream=stream, split=choose_batch_split(recipe, options, world, saved)
    )
    run.may_shrink = options.micro_batch is None
    if newest is not None:
        run.restore(newest)
    elif options.init_from:
        for line in start_from(run, options.init_from):
            if world.is_main:
                say(line)
    return run


def open_stream(recipe: Recipe, store: Path, world: World, *, verify: bool) -> LatentStream:
    """The recipe's stream; a store that fits a quarter of a GPU's memory lives there."""
    data = recipe.data
    resident = fits_on_device(store, data.flips, world.device)
    if resident and world.is_main:
        say(f"{store}: kept in the GPU's memory")
    return LatentStream(
        store,
        batch=recipe.train.batch,
        seed=recipe.train.seed,
        posterior=data.posterior,
        flips=data.flips,
        normalise=data.normalise,
        scale=data.scale,
        shift=data.shift,
        stats_images=data.stats_images,
        device=world.device,
        resident=resident,
        verify="full" if verify else "sizes",
    )


def fits_on_device(store: Path, flips: bool, device: torch.device) -> bool:
    """Whether a GPU can hold all latents and still has three quarters of its memory for the training."""
    if device.type != "cuda":
        return False
    manifest = read_manifest(store)
    halves = 2 if manifest.plan.stores_flips and not flips else 1  # mirror images that are not asked for stay on disk
    return manifest.count * manifest.plan.sample_bytes / halves <= torch.cuda.mem_get_info(device)[1] * RESIDENT_SHARE


def choose_batch_split(recipe: Recipe, options: TrainOptions, world: World, saved: dict[str, Any]) -> split.Split:
    """What was asked for, else what the run had, else what fits."""
    batch, processes = recipe.train.batch, world.size
    if options.micro_batch is None and saved.get("processes") == processes:
        chosen = split.Split(batch, processes, saved["accumulation"])
    else:
        micro_batch = options.micro_batch or micro_batch_that_fits(recipe, world)
        chosen = split.split_batch(batch, processes=processes, micro_batch=micro_batch)
    check_sharding(recipe, chosen)
    return chosen


def train(recipe: Recipe, options: TrainOptions) -> int:
    """Train in this process (one of several, perhaps); 0 when finished, 130 or 143 when stopped and saved."""
    world = join_world(allow_tf32=recipe.train.tf32, trackers=recipe.train.trackers, folder=options.out)
    with one_owner(recipe, options, world):
        if world.is_main:
            state.sweep(options.out)
        world.wait()
        run = open_run(recipe, options, world)
        if world.is_main:
            say_where(run, options)
        return train_run(run, open_journal(run))


def open_journal(run: Run) -> journal.Journal:
    """metrics.jsonl, without rows past the step where the run goes on."""
    world = run.world
    is_gpu = world.device.type == "cuda"
    peak = peak_of(torch.cuda.get_device_name(), run.recipe.train.precision) if is_gpu else None
    flops = peak and peak * world.size
    return journal.Journal(run.folder / "metrics.jsonl", run.step, writes=world.is_main, device_flops=flops)


def train_run(run: Run, book: journal.Journal) -> int:
    """To the last step, or to a signal."""
    world = run.world
    trackers, grids = Trackers(run.recipe, world, run.folder, run.step), SampleGrids()
    if run.step and world.agree(world.is_main and grids.is_due(run) and not grids.path(run).exists()):
        grids.draw(run)  # a kill came between the save and its pictures

    def pictures(now: Run) -> None:
        if grids.is_due(now):
            grids.draw(now)

    with StopFlag() as stop:
        finished = train_steps(run, book, stop, trackers=trackers, after_save=pictures)
    run.stream.close()
    trackers.close()
    world.wait()
    if not finished and world.is_main:
        say(f"stopped and saved at step {run.step:,}. To go on, run the same command again.")
    return 0 if finished else 128 + (stop.signal or 15)


def say_where(run: Run, options: TrainOptions) -> None:
    """One line about the beginning: how the batch is cut, and where the run goes on."""
    steps = run.recipe.train.steps
    if run.step >= steps:
        say(f"{run.folder}: the run is finished, {run.step:,} steps of {steps:,}")
    elif run.step:
        unused = ", --init-from is not needed any more" if options.init_from else ""
        say(f"resuming {run.folder} at step {run.step:,} of {steps:,}; {run.split}{unused}")
    else:
        say(f"training {run.folder}: {steps:,} steps; {run.split}")
