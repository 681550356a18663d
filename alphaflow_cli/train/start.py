"""From a recipe and a folder to a finished run: check everything, begin or resume, train.

`prepare_run` finds what is wrong before any process starts, each fault with what to do, and makes the store of an
embedded set. `train` is what every process then does: take the folder, open the run where it was left, train it.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

import torch

from alphaflow_cli.data.batches import LatentStream
from alphaflow_cli.data.manifest import BEWARE, read_manifest
from alphaflow_cli.data.store import Verify
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import write_whole
from alphaflow_cli.latents.encode import StoreRequest
from alphaflow_cli.latents.prepare import prepare_store
from alphaflow_cli.model.find import saved_steps
from alphaflow_cli.recipe import diff_recipes, dump_recipe
from alphaflow_cli.recipe.facts import lines
from alphaflow_cli.recipe.loader import set_text
from alphaflow_cli.recipe.plan import schedules_of, warnings_of
from alphaflow_cli.recipe.schema import Recipe, Schedule, resolve_step
from alphaflow_cli.runtime.launch import WARNING, StopFlag, has_parent, is_worker, requeue
from alphaflow_cli.runtime.lock import NAME as LOCK
from alphaflow_cli.runtime.lock import hold
from alphaflow_cli.runtime.precision import has_bf16
from alphaflow_cli.runtime.processes import (
    Processes,
    World,
    all_or_none,
    check_seen,
    choose_device,
    join_world,
    processes_here,
)
from alphaflow_cli.runtime.progress import say
from alphaflow_cli.runtime.threads import threads_kept
from alphaflow_cli.train import state
from alphaflow_cli.train.compiling import choose_compile, choose_graphs, compile_forms, prepare_graphs
from alphaflow_cli.train.estimate import micro_batch_that_fits
from alphaflow_cli.train.graphs import on_own_stream
from alphaflow_cli.train.journal import Journal, Trackers, check_trackers, peak_of
from alphaflow_cli.train.loop import train_steps
from alphaflow_cli.train.parallel import Split, check_sharding, rows_above, split_batch
from alphaflow_cli.train.run import Run, build_run, check_start, newest_for_all, start_from
from alphaflow_cli.train.samples import SampleGrids
from alphaflow_cli.train.scores import Scores, check_quick
from alphaflow_cli.train.store import check_store, recipe_of_run, stated_store, store_of, trained_recipe
from alphaflow_cli.train.threads import choose_threads

ADJUSTABLE = {  # what a run may change when it goes on: none of it changes what is learnt, beyond rounding
    "data.store",
    "data.crop",  # it is compared with the store and read by nothing else
    *(f"train.{name}" for name in ("strategy", "compile", "graphs", "gradient_checkpointing", "tf32")),
    *(f"train.{name}" for name in ("trackers", "keep")),
    *(f"train.{name}_every" for name in ("save", "milestone", "log", "sample")),
    *(f"eval.{name}" for name in ("every", "quick_metrics", "quick_images", "quick_nfe", "best_by", "reference")),
    "expected",
}
RESIDENT_SHARE = 0.25  # of a GPU's free memory that the latents may take


@dataclass(frozen=True)
class TrainOptions:
    """The command line's half of a run, the machine and the destination; the recipe is the other half."""

    out: Path
    data: Path | None = None
    micro_batch: int | None = None  # None: as many rows as fit
    init_from: str = ""
    verify: bool = True  # read the whole store against its checksums before the first step
    device: str | None = None  # cpu, cuda or mps; None: a GPU where CUDA has one
    notes: tuple[str, ...] = ()  # what a new run says before it begins
    threads: int | None = None  # that compute on a CPU; None: chosen by a few steps
    requeue: bool = False  # whether Slurm is asked for the job again after its warning


def make_run_folder(out: Path) -> None:
    """Make the run folder, and refuse one that cannot be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".write.{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise AlphaflowError(
            f"{out}: cannot be written ({error.strerror}). Choose another folder: --out RUN"
        ) from error


def check_recipe(recipe: Recipe, out: Path) -> list[tuple[str, str, str]]:
    """Refuse to train another recipe in a run's folder; returns the changes that a run may make when it goes on."""
    own = f"Resume it with its own recipe: alphaflow train {quote(str(out / 'recipe.yaml'))} --out {quote(str(out))}"
    changes = allowed_changes(recipe_of_run(out) or recipe, recipe, out, f"{own}, or choose another folder: --out RUN")
    if (trained := trained_recipe(out)) is not None:  # recipe.yaml may have been edited, or be gone
        again = f"Put these values back in {out / 'recipe.yaml'}, or begin another run from its weights"
        learnt = replace(trained, sample=recipe.sample, eval=recipe.eval)
        allowed_changes(learnt, recipe, out, f"{again}: add --init-from {quote(str(out))} --out RUN")
    return changes


def allowed_changes(there: Recipe, recipe: Recipe, out: Path, advice: str) -> list[tuple[str, str, str]]:
    """What differs of the recipe that a run has; what would change what is learnt is refused, with this advice."""
    changes = [row for row in diff_recipes(there, recipe) if row[0] != "name"]
    others = {field for field, _, _ in changes} - ADJUSTABLE
    if others == {"train.steps"} and recipe.train.steps > there.train.steps:
        check_longer(there, recipe, out)
    elif others:
        rows = [(field, set_text(old), set_text(new)) for field, old, new in changes if field != "expected"]
        listed = "\n".join(f"  {field}: {old} there, {new} requested" for field, old, new in rows)
        raise AlphaflowError(f"{out}: holds a run of another recipe:\n{listed}\n{advice}")
    return changes


def why_refused(recipe: Recipe, out: Path) -> list[str]:
    """Why a folder would not take this run, for its plan; empty where it would, or where there is none yet."""
    try:
        check_recipe(recipe, out)
    except AlphaflowError as fault:
        return [str(fault)]
    return []


def check_longer(there: Recipe, longer: Recipe, out: Path) -> None:
    """Refuse more steps where what follows the share of the run that is done would have gone another way."""
    moved = [path for path, here in schedules_of(longer) if ends_of(here, longer) != ends_of(here, there)]
    moved += ["the learning rate"] if longer.optim.final_lr is not None else []
    moved += ["loss.short_first"] if longer.loss.short_first else []
    if moved:
        raise AlphaflowError(
            f"{out}: this run is planned for {there.train.steps:,} steps, and cannot be made longer: with "
            f"{longer.train.steps:,} {' and '.join(moved)} would have gone another way from the first step on. "
            f"Begin another run from its weights: add --init-from {out} --out RUN"
        )


def ends_of(schedule: Schedule, recipe: Recipe) -> tuple[int, ...]:
    """The steps between which a schedule changes in a run; none for a constant one."""
    if schedule.kind == "constant":
        return ()
    ends = (schedule.start,) if schedule.kind == "step" else (schedule.start, schedule.end)
    return tuple(resolve_step(step, recipe.train.steps) for step in ends)


def prepare_run(recipe: Recipe, options: TrainOptions) -> Path:
    """Check all that can be wrong before any process starts, make the store of an embedded set; returns the store."""
    choose_device(options.device)
    check_trackers(recipe)
    check_quick(recipe)
    make_run_folder(options.out)
    changes = check_recipe(recipe, options.out)
    store = store_of(recipe, data=options.data, out=options.out)
    data = recipe.data
    is_new = not saved_steps(options.out / "state", ".safetensors")
    if options.init_from and is_new:
        check_start(recipe, options.init_from)
    if data.source and options.data is None and not (store / "manifest.json").exists():
        say(f"preparing {data.source} in {store}")
        wanted = StoreRequest(data.source, data.image_size, data.autoencoder, flips=data.flips)
        prepare_store(wanted, store, Processes(choose_device(options.device, apple=False)))
    begun = options.out if recipe_of_run(options.out) else None
    check_store(recipe, store, begun, given=options.data is not None)
    for line in beforehand(recipe, options, store) if is_new else ():
        say(line)
    for field, old, new in changes:
        say(f"{options.out}: {field} was {set_text(old)}, and is {set_text(new)} from here on")
    return store


def beforehand(recipe: Recipe, options: TrainOptions, store: Path) -> list[str]:
    """What a new run says before it begins: what it took over, the guidance that it builds in, and doubts."""
    guidance = dict(lines(recipe))["guidance"]
    built_in = [] if guidance == "none" else [f"guidance: {guidance}"]
    return [*options.notes, *built_in, *(f"beware: {text}" for text in doubts(recipe, store, options.device))]


def doubts(recipe: Recipe, store: Path | None = None, device: str | None = None) -> list[str]:
    """What a run does although it might not be meant: by its recipe, on this machine, with this many pictures."""
    on_cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
    texts = warnings_of(recipe, on_cpu=on_cpu)
    store = store or stated_store(recipe)
    manifest = read_manifest(store) if store is not None and (store / "manifest.json").is_file() else None
    if manifest and (beware := BEWARE.get(manifest.plan.autoencoder.kind or "")):
        texts.append(beware)
    images = manifest.count if manifest and not recipe.eval.reference else recipe.eval.images
    if images < recipe.eval.images:
        texts.append(
            f"alphaflow eval would draw {recipe.eval.images:,} pictures, and there are {images:,} to compare them "
            f"with: --set eval.images={images}"
        )
    return texts


def keep_recipe(recipe: Recipe, out: Path) -> None:
    """Write the recipe into the run folder, where it is not there or was changed."""
    if recipe_of_run(out) != recipe:
        write_whole(out / "recipe.yaml", dump_recipe(recipe))


def count_processes(recipe: Recipe, requested: int | None, device: str | None = None) -> int:
    """The number of processes requested, else one per GPU; more than the batch has rows are refused."""
    count = processes_here(requested, device)
    check_process_count(recipe, count)
    return count


def check_process_count(recipe: Recipe, processes: int) -> None:
    """Refuse more processes than the batch has rows."""
    split_batch(recipe.train.batch, processes=processes, micro_batch=None)


def train(recipe: Recipe, options: TrainOptions) -> int:
    """Train in this process (one of several, perhaps); 0 when finished, 130, 138 or 143 when stopped and saved."""
    train, device = recipe.train, options.device
    world = join_world(allow_tf32=train.tf32, device=device, trackers=train.trackers, folder=options.out)
    with one_owner(recipe, options, world), threads_kept():
        if world.is_main:
            state.sweep(options.out)
        world.wait()
        run = open_run(recipe, options, world)
        Scores(run).prepare()
        if world.is_main:
            keep_recipe(recipe, options.out)  # not before: what was refused is no run
            say_where(run, options)
        with on_own_stream(run.graphed is not False):
            compile_forms(run)
            prepare_graphs(run)
            return train_run(run, open_journal(run), requeues=options.requeue)


@contextmanager
def one_owner(recipe: Recipe, options: TrainOptions, world: World) -> Iterator[None]:
    """Hold the run folder: the first process holds it for all, and prepares the run where no parent of ours did."""
    alone = is_worker() and not has_parent()
    with ExitStack() as held:

        def take() -> None:
            if world.is_main:
                held.enter_context(hold(options.out, "train"))
                if alone:
                    check_process_count(recipe, world.size)
                    prepare_run(recipe, options)

        all_or_none(world, take)
        if alone:
            check_seen(options.out / LOCK, world, "the run folder and the latents")
        yield


def open_run(recipe: Recipe, options: TrainOptions, world: World) -> Run:
    """Make the run in memory, at the step where it was left; the first time with the weights of --init-from."""
    store = store_of(recipe, data=options.data, out=options.out)
    newest = newest_for_all(options.out, world)
    saved = state.read_facts(newest) if newest else None
    # the main process reads every byte against its checksum; the others trust it
    stream = open_stream(recipe, store, world, verify=options.verify and world.is_main)
    world.wait()
    compiled = choose_compile(recipe, world, saved.compiled if saved else None, world.size)
    split = choose_batch_split(recipe, options, world, saved, compiled=compiled)
    threads = choose_threads(recipe, world, split.micro_batch, options.threads, saved)
    run = build_run(recipe, options.out, world=world, stream=stream, split=split, compiled=compiled)
    run.threads = threads
    run.graphed = choose_graphs(recipe, world, split, saved)
    run.may_shrink = options.micro_batch is None
    if newest is not None:
        run.restore(newest)
    elif options.init_from:
        for line in start_from(run, options.init_from):
            if world.is_main:
                say(line)
    return run


def open_stream(recipe: Recipe, store: Path, world: World, *, verify: bool) -> LatentStream:
    """Open the recipe's stream of latents; a store that fits a quarter of the GPU's free memory is kept there."""
    resident = fits_on_device(store, recipe.data.flips, world.device)
    if resident and world.is_main:
        say(f"{store}: kept in the GPU's memory")
    train = recipe.train
    check: Verify = "full" if verify else "sizes"
    return recipe_stream(
        recipe, store, batch=train.batch, seed=train.seed, device=world.device, resident=resident, verify=check
    )


def recipe_stream(
    recipe: Recipe, store: Path, *, batch: int, seed: int, device: torch.device, resident: bool, verify: Verify
) -> LatentStream:
    """Open a store as the recipe reads it: its posterior, flips and normalisation; batch and seed may be others."""
    data = recipe.data
    constants = None if data.channel_mean is None or data.channel_std is None else (data.channel_mean, data.channel_std)
    return LatentStream(
        store,
        batch=batch,
        seed=seed,
        posterior=data.posterior,
        flips=data.flips,
        normalise=data.normalise,
        scale=data.scale,
        shift=data.shift,
        stats_images=data.stats_images,
        constants=constants,
        device=device,
        resident=resident,
        verify=verify,
    )


def fits_on_device(store: Path, flips: bool, device: torch.device) -> bool:
    """Whether a GPU can hold all latents and still has three quarters of its free memory for the training."""
    if device.type != "cuda":
        return False
    manifest = read_manifest(store)
    halves = 2 if manifest.plan.stores_flips and not flips else 1  # mirror images that are not used stay on disk
    return manifest.count * manifest.plan.sample_bytes / halves <= torch.cuda.mem_get_info(device)[0] * RESIDENT_SHARE


def choose_batch_split(
    recipe: Recipe, options: TrainOptions, world: World, saved: state.StateFacts | None, *, compiled: bool
) -> Split:
    """Cut the batch by --micro-batch, else as the run was cut before, else so that it fits the memory."""
    batch, processes = recipe.train.batch, world.size
    if options.micro_batch is None and saved is not None and saved.processes == processes:
        chosen = Split(batch, processes, saved.accumulation)
    else:
        micro_batch = options.micro_batch or micro_batch_that_fits(recipe, world, compiled=compiled)
        chosen = split_batch(batch, processes=processes, micro_batch=micro_batch)
        for text in rows_above(chosen, options.micro_batch) if world.is_main else []:
            say(f"beware: {text}")
    check_sharding(recipe, chosen)
    return chosen


def open_journal(run: Run) -> Journal:
    """Open metrics.jsonl; rows past the step where the run goes on are removed."""
    world = run.world
    is_gpu = world.device.type == "cuda"
    peak = peak_of(torch.cuda.get_device_name(), run.recipe.train.precision) if is_gpu else None
    flops = peak and peak * world.size
    return Journal(run.folder / "metrics.jsonl", run.step, writes=world.is_main, device_flops=flops)


def train_run(run: Run, journal: Journal, *, requeues: bool) -> int:
    """Train with trackers, sample grids and scores, to the last step or to a signal; returns the exit code."""
    world = run.world
    trackers, grids = Trackers(run.recipe, world, run.folder, run.step), SampleGrids()
    scores = Scores(run)
    if run.step and world.agree(world.is_main and grids.is_due(run) and not grids.path(run).exists()):
        grids.draw(run)  # a kill came between the save and its pictures

    def after_save(now: Run) -> bool:
        if grids.is_due(now):
            grids.draw(now)
        return scores.is_due(now.step) and not scores.measure(stop, journal, trackers)

    with StopFlag() as stop:
        done = scores.catch_up(stop, journal, trackers)
        finished = done and train_steps(run, journal, stop, trackers=trackers, after_save=after_save)
    run.graphs = None  # their memory goes now, not when another run in this process captures its own
    run.stream.close()
    trackers.close()
    world.wait()
    if finished:
        return 0
    number = int(world.largest(stop.signal)) or signal.SIGTERM  # one process may have got it, and not the first
    if world.is_main:
        again = requeues and number == WARNING
        say(f"stopped and saved at step {run.step:,}. " + ("" if again else "To go on, run the same command again."))
        if again:
            say(requeue())
    return 128 + number


def say_where(run: Run, options: TrainOptions) -> None:
    """Say in one line how the batch is cut, and where the run begins or goes on."""
    steps = run.recipe.train.steps
    if run.step >= steps:
        say(f"{run.folder}: the run is finished, {run.step:,} steps of {steps:,}")
    elif run.step:
        unused = ", --init-from is not needed any more" if options.init_from else ""
        say(f"resuming {run.folder} at step {run.step:,} of {steps:,}; {run.split}{unused}")
    else:
        say(f"training {run.folder}: {steps:,} steps; {run.split}")
        device = run.world.device
        if device.type == "cuda" and run.recipe.train.precision == "bf16" and not has_bf16(device):
            say(f"beware: {torch.cuda.get_device_name(device)} imitates bf16, slowly: --set train.precision=fp32")
