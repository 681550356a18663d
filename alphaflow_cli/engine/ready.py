"""Before a run: everything that can be wrong, found before any process starts, each fault with what to do."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from alphaflow_cli.data.store import disagreements, open_store
from alphaflow_cli.engine import split
from alphaflow_cli.engine.files import read_document, write_atomically
from alphaflow_cli.engine.launch import has_parent, is_worker
from alphaflow_cli.engine.lock import hold
from alphaflow_cli.engine.prepare import prepare_latents
from alphaflow_cli.engine.processes import processes_here
from alphaflow_cli.engine.progress import say
from alphaflow_cli.engine.trackers import check_trackers
from alphaflow_cli.engine.world import World
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe import diff_recipes, dump_recipe, recipe_from_text
from alphaflow_cli.recipe.schema import Recipe

ADJUSTABLE = {  # what a run may change when it goes on: none of it changes what is learnt, beyond rounding
    "data.store",
    *(f"train.{name}" for name in ("strategy", "compile", "gradient_checkpointing", "tf32", "trackers", "keep")),
    *(f"train.{name}_every" for name in ("save", "milestone", "log", "sample")),
}


@dataclass(frozen=True)
class TrainOptions:
    """What the command line says: the machine and the destination."""

    out: Path
    data: Path | None = None
    micro_batch: int | None = None  # None: as many rows as fit
    init_from: str = ""
    verify: bool = True  # read the whole store against its checksums before the first step


def store_of(recipe: Recipe, options: TrainOptions) -> Path:
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
        raise AlphaflowError(
            f"{store}: not what recipe {recipe.name} wants:\n{listed}\nRun: alphaflow prep-latents again"
        )


def check_folder(out: Path) -> None:
    """The run folder can be written."""
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
    """A run folder belongs to one recipe; another one is refused with the differences. Returns what may change."""
    path = out / "recipe.yaml"
    there = recipe_from_text(read_document(path), str(path)) if path.exists() else recipe
    changes = [row for row in diff_recipes(there, recipe) if row[0] != "name"]
    if any(field not in ADJUSTABLE for field, _, _ in changes):
        listed = "\n".join(f"  {field}: {old} there, {new} asked for" for field, old, new in changes)
        raise AlphaflowError(
            f"{out}: holds a run of another recipe:\n{listed}\nResume it with its own recipe: alphaflow train {path} "
            f"--out {out}, or choose another folder: --out RUN"
        )
    return changes


def prepare_run(recipe: Recipe, options: TrainOptions) -> Path:
    """Everything that can be wrong, found before any process starts; makes the store of an embedded set."""
    check_trackers(recipe)
    check_folder(options.out)
    changes = check_recipe(recipe, options.out)
    store = store_of(recipe, options)
    data = recipe.data
    if data.source and options.data is None and not (store / "manifest.json").exists():
        say(f"preparing {data.source} in {store}")
        prepare_latents(data.source, store, size=data.image_size, autoencoder=data.autoencoder, flips=data.flips)
    check_store(recipe, store)
    path = options.out / "recipe.yaml"
    for field, old, new in changes:
        say(f"{options.out}: {field} was {old}, and is {new} from here on")
    if changes or not path.exists():
        write_atomically(path, lambda temporary: _write_text(temporary, dump_recipe(recipe)))
    return store


def count_processes(recipe: Recipe, asked: int | None) -> int:
    """What was asked for, else one per GPU; more than rows of a batch is refused before anything starts."""
    count = processes_here(asked)
    count_rows(recipe, count)
    return count


def count_rows(recipe: Recipe, processes: int) -> None:
    """Every process needs a row of the batch."""
    split.split_batch(recipe.train.batch, processes=processes, micro_batch=None)


@contextmanager
def one_owner(recipe: Recipe, options: TrainOptions, world: World) -> Iterator[None]:
    """The run folder is ours: the first process holds it for all, and does what a parent of ours would have done."""
    fault: AlphaflowError | None = None
    alone = is_worker() and not has_parent()
    with ExitStack() as held:
        if world.is_main:
            try:
                held.enter_context(hold(options.out, "train"))
                if alone:
                    count_rows(recipe, world.size)
                    prepare_run(recipe, options)
            except AlphaflowError as found:
                fault = found
        if world.agree(fault is not None):
            raise fault or SystemExit(1)  # one message is enough
        if alone and not (options.out / "recipe.yaml").exists():
            raise AlphaflowError(
                f"{options.out}: process {world.rank} on {socket.gethostname()} does not see what process 0 wrote "
                "there. All machines need the run folder and the latents on a shared file system."
            )
        yield


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
