"""`alphaflow train`: a recipe becomes a run. Running it again resumes."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import click

from alphaflow_cli.commands.common import (
    begin,
    check_checkpoint,
    command_line,
    complete_path,
    device_option,
    examples,
    json_option,
    print_json,
    recipe_argument,
    set_option,
    tell,
)
from alphaflow_cli.commands.values import BATCH, PROCESSES, THREADS, Destination, NumberOrAuto, NumberWithin, UserPath
from alphaflow_cli.errors import AlphaflowError, LostOutput
from alphaflow_cli.recipe.schema import Recipe
from alphaflow_cli.runtime.launch import check_requeue, first_of_launched

if TYPE_CHECKING:
    from alphaflow_cli.train.start import TrainOptions
    from alphaflow_cli.train.store import Resolved

EXAMPLES = examples(
    "alphaflow train quickstart",
    "alphaflow train b2 --data latents/imagenet --out runs/b2 --processes 8",
    "alphaflow train b2 --set train.steps=200000 --dry-run",
)


@click.command("train", epilog=EXAMPLES)
@recipe_argument
@click.option("--data", type=UserPath(), help="Latent store. A shipped recipe is fitted to it.")
@click.option(
    "--out",
    type=Destination(is_folder=True, holds_weights=True),
    help="Run folder. Default: runs/<recipe name>, or with -<store> where the data have another shape.",
)
@set_option
@click.option("--processes", type=PROCESSES, help="Processes to start on this machine. Default: one per GPU.")
@device_option
@click.option(
    "--threads",
    type=NumberOrAuto(THREADS),
    default="auto",
    help="Threads that compute on a CPU. auto: a few timed steps choose; a resumed run keeps its number.",
)
@click.option(
    "--micro-batch", type=NumberOrAuto(BATCH), default="auto", help="Rows a process computes at once, or auto."
)
@click.option(
    "--init-from",
    default="",
    metavar="CKPT",
    shell_complete=complete_path,
    help="Begin with the weights of this checkpoint.",
)
@click.option("--verify/--no-verify", default=True, help="Check the whole store before the first step (about 1 s/GB).")
@click.option("--requeue", is_flag=True, help="In a Slurm job: after its warning (USR1), save, and ask for it again.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--estimate", is_flag=True, help="Time a few steps of every phase, extrapolate, and stop.")
@click.option(
    "--hours",
    type=NumberWithin(0, 100_000, open_below=True),
    help="Print what fits into so many hours on this machine, as --set values, and stop.",
)
@json_option
def command(
    recipe: str,
    data: Path | None,
    out: Path | None,
    sets: tuple[str, ...],
    processes: int | None,
    device: str | None,
    threads: int,
    micro_batch: int,
    init_from: str,
    verify: bool,
    requeue: bool,
    dry_run: bool,
    estimate: bool,
    hours: float | None,
    as_json: bool,
) -> None:
    """Train RECIPE, a file or the name of a shipped recipe. Running the same command again resumes.

    Inside torchrun, accelerate launch or Slurm it joins the processes that are there.
    """
    from alphaflow_cli.train.store import resolve_run

    plans = bool(dry_run or estimate or hours)
    if (launched := first_of_launched() if plans else 0) is None:
        return None
    resolved = resolve_run(recipe, sets, data=data, out=out)
    check_inputs(data, init_from, plans=plans, requeue=requeue)
    if not plans:
        begin(f"train {resolved.recipe.name} in {resolved.folder}")
    from alphaflow_cli.train.start import TrainOptions

    options = TrainOptions(
        out=resolved.folder, data=data, micro_batch=micro_batch or None, init_from=init_from, verify=verify,
        device=device, notes=resolved.notes, threads=threads or None, requeue=requeue,
    )  # fmt: skip
    if plans:
        wanted = PlanRequest(whole=dry_run or estimate, estimate=estimate, hours=hours, as_json=as_json)
        return show_plan(resolved, options, processes or launched, wanted)
    return start(resolved.recipe, options, processes, as_json=as_json)


def start(recipe: Recipe, options: "TrainOptions", processes: int | None, *, as_json: bool) -> None:
    """Train here or in N processes, and say where the run is."""
    from alphaflow_cli.runtime.processes import run_shared
    from alphaflow_cli.train.start import count_processes

    code = run_shared(
        lambda: join(recipe, options, as_json=as_json),
        command_line(),
        requested=processes,
        count=lambda requested: count_processes(recipe, requested, options.device),
        prepared=prepared(recipe, options),
    )
    if code:
        sys.exit(code)
    finish(options.out, as_json=as_json)


def check_inputs(data: Path | None, init_from: str, *, plans: bool, requeue: bool) -> None:
    """Refuse a store or a checkpoint that is not there, and --requeue outside Slurm, before anything is loaded.

    A plan wants a whole store.
    """
    if data is not None and not any((data / name).is_file() for name in ("manifest.json", "plan.json")):
        raise AlphaflowError(
            f"{data}: no latent store here (no manifest.json). "
            f"Run: alphaflow prep-latents SOURCE --out {quote(str(data))}"
        )
    if plans and data is not None and not (data / "manifest.json").is_file():
        raise AlphaflowError(
            f"{data}: unfinished. First run the command that began it again, prep-latents or import-latents"
        )
    if init_from:
        check_checkpoint(init_from)
    check_requeue(requeue and not plans)


def join(recipe: Recipe, options: "TrainOptions", *, as_json: bool) -> int:
    """Train, alone or as one of several; under a launcher of others the first process has the last word."""
    from alphaflow_cli.runtime.launch import has_parent, is_worker
    from alphaflow_cli.train.start import train

    code = train(recipe, options)
    if code == 0 and is_worker() and not has_parent() and os.environ["RANK"] == "0":
        with contextlib.suppress(OSError):  # the run is whole, whether or not its last words can be written
            finish(options.out, as_json=as_json)
    return code


@contextlib.contextmanager
def prepared(recipe: Recipe, options: "TrainOptions") -> Iterator[None]:
    """Hold the run folder, check everything and get the latents ready, before any process is started."""
    from alphaflow_cli.runtime.lock import hand_on, hold
    from alphaflow_cli.train.start import prepare_run

    with hold(options.out, "train"):
        prepare_run(recipe, options)
        handed = hand_on(options.out)
        os.environ |= handed
        try:
            yield
        finally:
            for name in handed:
                os.environ.pop(name, None)


def finish(folder: Path, *, as_json: bool) -> None:
    """Print where the run is and what to do with it. It is saved: a stdout that is full or gone does not undo that."""
    samples, model = folder / "samples", str(folder / "model.safetensors")
    best = [str(path) for path in sorted(folder.glob("best-nfe*.safetensors"))]
    lines = [f"Look at it:  {samples}", f"Sample it:   alphaflow sample {quote(str(folder))} --grid grid.png"]
    lines += [f"Best so far: {path}" for path in best]
    try:
        if as_json:
            print_json({"run": str(folder), "samples": str(samples), "best": best, "path": model})
        else:
            click.echo("\n".join([*lines, model]))
    except LostOutput as lost:
        click.echo(f"{lost} The run is finished and saved: {folder}", err=True)


@dataclass(frozen=True)
class PlanRequest:
    """What is printed of a run before it begins."""

    whole: bool  # all that the run would be; --hours alone prints what fits
    estimate: bool
    hours: float | None
    as_json: bool


def show_plan(resolved: "Resolved", options: "TrainOptions", requested: int, plan: PlanRequest) -> None:
    """Print what the run would be: by arithmetic for --dry-run, by timed steps too for --estimate and --hours."""
    if plan.estimate or plan.hours:
        begin(f"timing a few steps of each phase of {resolved.recipe.name} on this machine")
    from alphaflow_cli.train.estimate import describe_run, estimate_training
    from alphaflow_cli.train.hours import fit_hours, measure_phases_of
    from alphaflow_cli.train.start import count_processes, doubts, why_refused
    from alphaflow_cli.train.store import check_store, stated_store

    recipe = resolved.recipe
    processes = requested or count_processes(recipe, None, options.device)  # a plan may be for another machine
    if (stated := stated_store(recipe)) and (stated / "manifest.json").is_file():
        check_store(recipe, stated)
    began = time.monotonic()
    document, lines = describe_run(recipe, resolved.folder, processes=processes, micro_batch=options.micro_batch)
    more = [text for text in doubts(recipe, device=options.device) if text not in document["warnings"]]
    more += why_refused(recipe, resolved.folder)
    document["warnings"] += more
    lines = [*resolved.notes, *lines, *(f"beware: {text}" for text in more)] if plan.whole else []
    if plan.estimate or plan.hours:
        measured, compiled = measure_phases_of(recipe, options, processes)
        times, texts = estimate_training(recipe, measured, compiled=compiled)
        document, lines = document | {"estimate": times}, [*lines, *texts] if plan.estimate else lines
    if plan.hours:
        fit = fit_hours(recipe, plan.hours, measured, start=time.monotonic() - began)
        document, lines = document | {"hours": fit.document()}, [*lines, *fit.lines()]
    if plan.as_json:
        print_json(document)
        return
    for line in lines:
        tell(line)
