"""From a recipe and a folder to a finished run: check everything, then resume or begin, then train."""

from dataclasses import dataclass
from pathlib import Path

import torch

from alphaflow_cli.data.batches import LatentStream
from alphaflow_cli.data.store import disagreements, open_store
from alphaflow_cli.engine import journal, split, state
from alphaflow_cli.engine.files import write_atomically
from alphaflow_cli.engine.initial import start_from
from alphaflow_cli.engine.prepare import prepare_latents
from alphaflow_cli.engine.probe import micro_batch_that_fits
from alphaflow_cli.engine.progress import say
from alphaflow_cli.engine.run import Run, build_run
from alphaflow_cli.engine.samples import SampleGrids
from alphaflow_cli.engine.signals import StopFlag
from alphaflow_cli.engine.train import train_steps
from alphaflow_cli.engine.world import World, join_world
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe import diff_recipes, dump_recipe, recipe_from_text
from alphaflow_cli.recipe.schema import Recipe


@dataclass(frozen=True)
class Options:
    """What the command line says: the machine and the destination."""

    out: Path
    data: Path | None = None
    micro_batch: int | None = None  # None: as many rows as fit
    init_from: str = ""
    verify: bool = True  # read the whole store against its checksums before the first step


def store_of(recipe: Recipe, options: Options) -> Path:
    """Where the latents are, or will be made."""
    if options.data is not None:
        return options.data
    if recipe.data.store:
        return Path(recipe.data.store)
    if recipe.data.source:
        return options.out / "latents"
    raise AlphaflowError(
        f"recipe {recipe.name}: no latents named. Make them: alphaflow prep-latents SOURCE --out DIR, "
        "then give --data DIR (or data.store in the recipe)."
    )


def check_store(recipe: Recipe, store: Path) -> None:
    """Refuse a store that the recipe was not written for, both sides printed."""
    data = recipe.data
    faults = disagreements(
        open_store(store, "sizes").manifest,
        autoencoder=data.autoencoder,
        image_size=data.image_size,
        channels=data.channels,
        latent_size=data.latent_size,
        classes=data.classes,
        flips=data.flips,
    )
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults)
        raise AlphaflowError(f"{store}: not what recipe {recipe.name} wants:\n{listed}\nRun: alphaflow prep-latents again")


def check_folder(recipe: Recipe, out: Path) -> None:
    """A run folder belongs to one recipe; another one is refused with the differences."""
    path = out / "recipe.yaml"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".write.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise AlphaflowError(f"{out}: cannot be written ({error.strerror}). Choose another folder: --out RUN") from error
    if not path.exists():
        return
    there = recipe_from_text(path.read_text(encoding="utf-8"), str(path))
    changes = [row for row in diff_recipes(there, recipe) if row[0] != "name"]
    if changes:
        listed = "\n".join(f"  {field}: {old} there, {new} asked for" for field, old, new in changes)
        raise AlphaflowError(
            f"{out}: holds a run of another recipe:\n{listed}\nResume it with its own recipe: alphaflow train {path} "
            f"--out {out}, or choose another folder: --out RUN"
        )


def prepare(recipe: Recipe, options: Options) -> Path:
    """Everything that can be wrong, found before any process starts; makes the store of an embedded set."""
    check_folder(recipe, options.out)
    store = store_of(recipe, options)
    data = recipe.data
    if data.source and options.data is None and not (store / "manifest.json").exists():
        say(f"preparing {data.source} in {store}")
        prepare_latents(data.source, store, size=data.image_size, autoencoder=data.autoencoder, flips=data.flips)
    check_store(recipe, store)
    recipe_path = options.out / "recipe.yaml"
    if not recipe_path.exists():
        text = dump_recipe(recipe)
        write_atomically(recipe_path, lambda temporary: _write_text(temporary, text))
    return store


def open_run(recipe: Recipe, options: Options, world: World) -> Run:
    """The run, at the step where it was left."""
    store = store_of(recipe, options)
    newest = state.newest_state(options.out)
    saved = state.read_facts(newest) if newest else {}
    # the main process reads every byte against its checksum; the others trust it
    stream = open_stream(recipe, store, world, verify=options.verify and world.is_main)
    world.wait()
    run = build_run(
        recipe, options.out, world=world, stream=stream, split=choose_split(recipe, options, world, saved)
    )
    if newest is not None:
        run.restore(newest)
    elif options.init_from:
        for line in start_from(run, options.init_from):
            if world.is_main:
                say(line)
    return run


def open_stream(recipe: Recipe, store: Path, world: World, *, verify: bool) -> LatentStream:
    """The recipe's stream; a store that fits an eighth of a GPU's memory lives there."""
    data = recipe.data
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
        verify="full" if verify else "sizes",
    )


def choose_split(recipe: Recipe, options: Options, world: World, saved: dict[str, int]) -> split.Split:
    """What was asked for, else what the run had, else what fits."""
    batch, processes = recipe.train.batch, world.size
    if options.micro_batch is None and saved.get("processes") == processes:
        return split.Split(batch, processes, saved["accumulation"])
    micro_batch = options.micro_batch or micro_batch_that_fits(recipe, world)
    return split.split_batch(batch, processes=processes, micro_batch=micro_batch)


def count_processes(recipe: Recipe, asked: int | None) -> int:
    """What was asked for, else one per GPU; more than rows of a batch is refused before anything starts."""
    gpus = torch.cuda.device_count()
    count = asked or max(1, gpus)
    if gpus and count > gpus:
        raise AlphaflowError(f"--processes {count}: this machine has {gpus} GPUs.")
    split.split_batch(recipe.train.batch, processes=count, micro_batch=None)
    return count


def train(recipe: Recipe, options: Options) -> int:
    """Train in this process (one of several, perhaps); 0 when finished, 130 or 143 when stopped and saved."""
    world = join_world(allow_tf32=recipe.train.tf32)
    if world.is_main:
        state.sweep(options.out)
    world.wait()
    run = open_run(recipe, options, world)
    if world.is_main and run.step:
        say(f"resuming {options.out} at step {run.step:,} of {recipe.train.steps:,}")
    book = journal.Journal(options.out / "metrics.jsonl", run.step, writes=world.is_main)
    grids = SampleGrids()

    def pictures(now: Run) -> None:
        every = recipe.train.sample_every
        if world.is_main and every and (now.step % every == 0 or now.step == recipe.train.steps):
            grids.draw(now)

    with StopFlag() as stop:
        finished = train_steps(run, book, stop, pictures)
    run.stream.close()
    world.wait()
    if not finished and world.is_main:
        say(f"stopped and saved at step {run.step:,}. To go on, run the same command again.")
    return 0 if finished else 128 + (stop.signal or 15)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
