"""`ema`: averages that a run did not keep, made of those that it did, sampled and scored in one table.

Every average of a run is a sum of its weights over the steps, with the shares of its profile (core/ema.py). Of what the
run kept, the command takes the sum that is expected to be nearest to the wanted average. Three things decide that: the
profiles, how far and how straight the weights move from step to step, and what rounding left in the kept averages. How
near that is, the table says in two ways:

    expected   the expected distance from the wanted average, relative to the weights' size
    check      of an average that the run kept: it is made of all the others, and its weights are compared
"""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alphaflow_cli.core.ema import Decay, factors, momentum_tail, power_of_width, power_profile, with_momentum
from alphaflow_cli.errors import AlphaflowError, blamed_on
from alphaflow_cli.evaluate.evaluate import EvalRequest, evaluate_checkpoint
from alphaflow_cli.evaluate.results import Evaluation
from alphaflow_cli.files import make_folder, write_whole
from alphaflow_cli.model.checkpoint import Checkpoint, load_checkpoint, read_origin, save_checkpoint
from alphaflow_cli.model.find import check_run, checkpoint_folders, step_name, step_of
from alphaflow_cli.recipe import load_recipe
from alphaflow_cli.recipe.schema import Metric, Recipe
from alphaflow_cli.runtime.lock import hold
from alphaflow_cli.runtime.processes import Processes
from alphaflow_cli.runtime.progress import Progress, say
from alphaflow_cli.sample.generator import open_generator, pictures
from alphaflow_cli.sample.grid import grid_by_walk
from alphaflow_cli.sample.walk import draw_labels, plan_walk
from alphaflow_cli.train.run import texts_apart

BLOCK = 1 << 16  # steps of all profiles at once: a run of a million steps takes no more memory
COARSE = 1e-3  # expected error above which a line warns: rounding to bf16 changes the weights as much
NOTHING = 1e-12  # a smaller factor adds less than a float32 can show
SEEDS = 8  # pictures of each average in the grid
Profile = Callable[[range], Tensor]


@dataclass(frozen=True)
class EmaRequest:
    """What the command line says; empty or None: as the recipe says."""

    run: Path
    half_lives: tuple[float, ...]  # steps
    widths: tuple[float, ...]  # σ of power functions
    merges: tuple[tuple[int, float], ...]  # (earlier step, factor of the change since then)
    step: int | None  # whose averages; None: the newest checkpoint's
    scored: bool
    metrics: tuple[Metric, ...]
    nfe: tuple[int, ...]
    images: int | None
    reference: str | None
    out: Path | None


@dataclass(frozen=True)
class Snapshot:
    """A file of weights that the run kept."""

    path: Path
    step: int
    half_life: float  # 0: the weights themselves


@dataclass(frozen=True)
class Average:
    """One line of the table: an average that the run kept, or one that is made of those."""

    name: str
    path: Path
    half_life: float | None = None  # steps; None: it is no exponential average
    is_kept: bool = False  # whether the run kept it
    expected_error: float | None = None  # relative to its size; None: there is nothing to make it of, or to measure by
    check: float | None = None  # of a kept one: how far what the others make of it is from it, relative to its size
    factors: tuple[tuple[str, float], ...] = ()
    evaluations: Sequence[Evaluation] = ()


def average_again(request: EmaRequest, processes: Processes) -> tuple[list[Average], Path, int] | None:
    """Make, sample and score the averages; they, their folder and the step, on the first process."""
    check_run(request.run)
    recipe = load_recipe(str(request.run / "recipe.yaml"))
    metrics = request.metrics or recipe.eval.quick_metrics
    if request.scored and not (request.reference or recipe.eval.reference) and set(metrics) != {"is"}:
        advice = "Give --reference FILE|SOURCE, or leave the scores out: --no-scores"
        raise AlphaflowError(f"{request.run}: nothing to compare with. {advice}")
    step, snapshots = snapshots_of(request)
    folder = request.out or request.run / "averages" / step_name(step)
    with nullcontext() if processes.rank else hold(folder, "ema"):
        make_folder(folder)
        averages = plan_averages(request, recipe, step, snapshots, folder)
        if processes.rank == 0:
            warn_of_ramp(request.half_lives, recipe.ema.ramp, step)
            warn_of_coarse(averages)
            averages = write_averages(averages, snapshots, step)
        processes.wait()
        if request.scored:
            averages = [
                replace(each, evaluations=_scores(each, request, recipe, processes, folder)) for each in averages
            ]
        if processes.rank:
            return None
        if request.scored:
            write_whole(folder / "grid.png", _grid(averages, recipe, request, processes.device))
        write_whole(folder / "averages.json", json.dumps(_document(averages, step, folder), indent=1) + "\n")
    return averages, folder, step


def snapshots_of(request: EmaRequest) -> tuple[int, list[Snapshot]]:
    """The step whose averages are wanted, and every file of weights that the run kept up to it."""
    folders = checkpoint_folders(request.run)
    steps = [step_of(folder) for folder in folders]
    if not steps or (request.step is not None and request.step not in steps):
        there = ", ".join(f"{step:,}" for step in steps[-10:]) or "none"
        what = "no checkpoints" if request.step is None else f"no checkpoint of step {request.step:,}"
        raise AlphaflowError(f"{request.run / 'checkpoints'}: {what}; there are: {there}.")
    last = request.step or steps[-1]
    files = [file for folder in folders if step_of(folder) <= last for file in sorted(folder.glob("*.safetensors"))]
    return last, [_snapshot(file) for file in files]


def _snapshot(path: Path) -> Snapshot:
    with _opened(path) as file:
        origin = read_origin((file.metadata() or {}).get("origin", "{}"), path)
    step, half_life = origin.get("step"), origin.get("half_life")
    if step != step_of(path.parent) or half_life is None or origin.get("weights") not in ("ema", "raw"):
        raise AlphaflowError(f"{path}: does not say of which step and half-life its weights are. Move it away.")
    return Snapshot(path, step, float(half_life))


def plan_averages(
    request: EmaRequest, recipe: Recipe, step: int, snapshots: list[Snapshot], folder: Path
) -> list[Average]:
    """Find the factors of every average: of those kept at this step, made of the others, then of the wanted ones."""
    kept = [j for j, each in enumerate(snapshots) if each.step == step and each.half_life > 0]
    lives = [life for life in request.half_lives if life not in [snapshots[j].half_life for j in kept]]
    decay = {
        life: Decay.of(step, half_life=life, ramp=recipe.ema.ramp, every=recipe.ema.every)
        for life in {*lives, *(each.half_life for each in snapshots if each.half_life)}
    }
    columns = [_column(each, decay) for each in snapshots]
    columns += [partial(decay[life].profile, step) for life in lives]
    columns += [partial(power_profile, power_of_width(width), step) for width in request.widths]
    momentum, roundings = recipe.optim.betas[0], rounding_rows(snapshots, decay, len(columns))
    motion = motion_of(snapshots, columns, step, momentum)
    triangle = triangle_of(columns, torch.ones(step + 1) if motion is None else motion, momentum, roundings)
    targets = [*kept, *range(len(snapshots), len(columns))]
    named = zip(lives, texts_apart(lives), strict=True)
    made = [Average(f"half-life {snapshots[j].half_life:g}, kept", snapshots[j].path, is_kept=True) for j in kept]
    made += [Average(f"half-life {text}", folder / f"ema-{text}.safetensors", life) for life, text in named]
    made += [Average(f"power {text}", folder / f"power-{text}.safetensors") for text in texts_apart(request.widths)]
    made = [_made_of(each, snapshots, triangle, target) for each, target in zip(made, targets, strict=True)]
    if motion is None:
        made = [replace(each, expected_error=None) for each in made]
    return made + [_merged(snapshots, step, *each, folder) for each in request.merges]


def _merged(snapshots: list[Snapshot], step: int, earlier: int, factor: float, folder: Path) -> Average:
    """The run's first average, moved on by `factor` times its change since an earlier checkpoint; below 0, back."""
    first = {each.step: str(each.path) for each in snapshots if each.path.name == "model.safetensors"}
    if earlier not in first or earlier == step:
        there = ", ".join(f"{at:,}" for at in sorted(first) if at != step) or "none"
        raise AlphaflowError(f"--merge {earlier}:{factor:g}: no earlier checkpoint of that step; there are: {there}.")
    path = folder / f"merge-{earlier}-{factor:g}.safetensors"
    factors = ((first[step], 1 + factor), (first[earlier], -factor))
    return Average(f"merge {earlier}:{factor:g}", path, factors=factors)


def _made_of(average: Average, snapshots: list[Snapshot], triangle: Tensor, target: int) -> Average:
    """The average with its factors; a kept one, whose column is its own, is made without any of its own half-life."""
    own = snapshots[target].half_life if target < len(snapshots) else None
    others = [j for j, each in enumerate(snapshots) if each.half_life != own]
    if not others:
        return average
    chosen = factors(triangle, others, target)
    gap = triangle[:, others] @ chosen - triangle[:, target]
    listed = tuple((str(snapshots[j].path), float(c)) for j, c in zip(others, chosen, strict=True))
    return replace(average, expected_error=float(gap.norm()), factors=listed)


def _column(snapshot: Snapshot, decay: dict[float, Decay]) -> Profile:
    if snapshot.half_life:
        return partial(decay[snapshot.half_life].profile, snapshot.step)
    last = snapshot.step - 1
    return lambda places: (torch.arange(places.start, places.stop) == last).double()


def rounding_rows(snapshots: list[Snapshot], decay: dict[float, Decay], width: int) -> Tensor:
    """What rounding left in each kept average, as rows of the least squares; the weights themselves are exact."""
    rows = [torch.zeros((0, width), dtype=torch.float64)]
    for half_life in sorted({each.half_life for each in snapshots} - {0.0}):
        of_it = [j for j, each in enumerate(snapshots) if each.half_life == half_life]
        block = torch.zeros((len(of_it), width), dtype=torch.float64)
        block[:, of_it] = decay[half_life].roundings([snapshots[j].step for j in of_it])
        rows.append(block)
    return torch.cat(rows)


def motion_of(snapshots: list[Snapshot], columns: Sequence[Profile], step: int, momentum: float) -> Tensor | None:
    """How far each step moves the weights, relative to their size: as between the kept weights around it.

    Where those of one step only were kept, it is measured between two of the averages. None: there is one file alone.
    """
    kept = [j for j, each in enumerate(snapshots) if each.half_life == 0] or [0]
    pairs = list(pairwise(kept)) or [(0, len(snapshots) - 1)] * (len(snapshots) > 1)
    if not pairs:
        return None
    lengths = distances([(snapshots[i].path, snapshots[j].path) for i, j in pairs])
    motion, places, done = torch.zeros(step + 1, dtype=torch.float64), range(-1, step), 0
    for (i, j), length in zip(pairs, lengths, strict=True):
        shares = (columns[j](places) - columns[i](places)).cumsum(0)[:, None]
        moved = with_momentum(shares, torch.zeros((1, 1), dtype=torch.float64), momentum)
        apart = torch.cat([moved, momentum_tail(moved[-1:], momentum)]).norm()
        motion[done:] = length / max(float(apart), NOTHING)
        done = snapshots[j].step
    return motion


def distances(pairs: Sequence[tuple[Path, Path]]) -> list[float]:
    """How far the weights of each two files are apart, relative to the size of the last file's."""
    lengths, size = [], 0.0
    with Progress("compare", len(pairs), unit="pair") as bar:
        for paths in pairs:
            with _opened(paths[0]) as before, _opened(paths[1]) as after:
                names = [name for name in after.keys() if name.startswith("net.")]  # noqa: SIM118 (it is no mapping)
                apart = size = 0.0
                for name in names:
                    here = after.get_tensor(name).double()
                    there = _part(before, paths[0], name, here)
                    apart += float((here - there).square().sum())
                    size += float(here.square().sum())
            lengths.append(math.sqrt(apart))
            bar.advance(1)
    return [length / math.sqrt(size) for length in lengths]


def triangle_of(columns: Sequence[Profile], motion: Tensor, momentum: float, roundings: Tensor) -> Tensor:
    """R of the QR decomposition of what each column adds to the error, block by block: it has all inner products."""
    triangle, steps = roundings, len(motion) - 1
    shares = moved = torch.zeros((1, len(columns)), dtype=torch.float64)
    for first in range(-1, steps, BLOCK):
        places = range(first, min(first + BLOCK, steps))
        sums = shares + torch.stack([column(places) for column in columns], dim=1).cumsum(0)
        rows = with_momentum(sums * motion[places.start + 1 : places.stop + 1, None], moved, momentum)
        shares, moved = sums[-1:], rows[-1:]
        tail = [momentum_tail(moved, momentum)] if places.stop == steps else []
        triangle = torch.linalg.qr(torch.cat([triangle, rows, *tail]), mode="r").R
    return triangle


def warn_of_ramp(half_lives: Sequence[float], ramp: float, step: int) -> None:
    """Say which wanted half-lives the ramp shortens throughout, so that all of them are one average."""
    most = ramp * step
    long = [f"{life:g}" for life in half_lives if 0 < most < life]
    if long:
        say(
            f"beware: half-life {', '.join(long)}: the run's ema.ramp ({ramp:g}) lets none be longer than {most:g} "
            f"steps up to step {step:,}, so this is the average of half-life {most:g}"
        )


def warn_of_coarse(averages: list[Average]) -> None:
    """Say which of the new averages are far from what was wanted."""
    for average in averages:
        if not average.is_kept and average.expected_error is not None and average.expected_error > COARSE:
            say(
                f"beware: {average.name}: its weights are expected to be {average.expected_error:.1%} of their size "
                f"away from the true average, made of the {len(average.factors)} files that the run kept. Keep more "
                "of them next time: train.keep, train.milestone_every, ema.half_lives"
            )


def write_averages(averages: list[Average], snapshots: list[Snapshot], step: int) -> list[Average]:
    """Write the wanted averages as checkpoints, and compare what is made of the others with those that were kept."""
    own = next(each for each in snapshots if each.step == step)
    template, done = load_checkpoint(own.path), []
    with ExitStack() as opened, Progress("average", len(averages), unit="average") as bar:
        files = {str(each.path): opened.enter_context(_opened(each.path)) for each in snapshots}
        for average in averages:
            done.append(_write_average(average, template, files) if average.factors else average)
            bar.advance(1)
    return done


def _opened(path: Path) -> Any:
    with blamed_on(path, "a checkpoint", SafetensorError):
        return safe_open(str(path), framework="pt")


def _part(file: Any, path: str | Path, name: str, like: Tensor) -> Tensor:
    with blamed_on(Path(path), f"a checkpoint of this run: {name} is not in it", SafetensorError):
        part: Tensor = file.get_tensor(name)
    if part.shape != like.shape:
        raise AlphaflowError(f"{path}: {name} has another shape than in the run's other checkpoints.")
    return part.double()


def _write_average(average: Average, template: Checkpoint, files: dict[str, Any]) -> Average:
    kept = files.get(str(average.path))
    apart = size = 0.0
    weights: dict[str, Tensor] = {}
    for name, like in template.weights.items():
        total = torch.zeros_like(like, dtype=torch.float64)
        for path, factor in average.factors:
            if abs(factor) < NOTHING:
                continue
            total += factor * _part(files[path], path, f"net.{name}", like)
        if kept is not None:
            true = _part(kept, average.path, f"net.{name}", like)
            apart += float((total.float().double() - true).square().sum())
            size += float(true.square().sum())
        weights[name] = total.float()
    if kept is not None:
        return replace(average, check=math.sqrt(apart / size))
    made = {"name": average.name, "files": len(average.factors), "expected_error": average.expected_error}
    origin = template.origin | {"weights": "ema", "half_life": average.half_life, "averaged_again": made}
    save_checkpoint(average.path, replace(template, weights=weights, origin=origin))
    return average


def _scores(
    average: Average, request: EmaRequest, recipe: Recipe, processes: Processes, folder: Path
) -> Sequence[Evaluation]:
    """Measure one average as `eval` does; empty on all processes but the first."""
    quick = recipe.eval
    wanted = EvalRequest(
        str(average.path), nfe=request.nfe or quick.quick_nfe, metrics=request.metrics or quick.quick_metrics,
        reference=request.reference, images=request.images or quick.quick_images, batch=64, out=folder / "evals",
    )  # fmt: skip
    report = evaluate_checkpoint(wanted, processes)
    return report.evaluations if report else ()


def _grid(averages: list[Average], recipe: Recipe, request: EmaRequest, device: torch.device) -> bytes:
    """The same seeds by every average, one below the other."""
    nfe, seeds = (request.nfe or recipe.eval.quick_nfe)[0], list(range(SEEDS))
    labels = draw_labels(seeds, recipe.data.classes, "balanced")
    walk, rows = plan_walk(recipe, nfe=nfe), []
    for average in averages:
        generator = open_generator(str(average.path), device=device)
        rows.append(
            (average.name, [picture for _, _, picture in pictures(generator, seeds, labels, walk, batch=SEEDS)])
        )
    names = [generator.class_names[label] if label < len(generator.class_names) else "" for label in labels]
    return grid_by_walk(rows, SEEDS, names)


def _document(averages: list[Average], step: int, folder: Path) -> dict[str, Any]:
    return {
        "schema": "alphaflow-averages/1",
        "step": step,
        "averages": [
            {
                "name": each.name,
                "file": each.path.name,
                "expected_error": each.expected_error,
                "check": each.check,
                "factors": [[f"{Path(path).parent.name}/{Path(path).name}", factor] for path, factor in each.factors],
                "evaluations": [evaluation.as_dict() for evaluation in each.evaluations],
            }
            for each in averages
        ],
    }
