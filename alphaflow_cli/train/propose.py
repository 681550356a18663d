"""A recipe for a store: what the latents say, what the number of pictures says, and why, line by line.

It begins as a shipped recipe (or a file) and takes over whatever the store decides. How long to train follows from the
number of pictures: the shipped recipe's own number of pictures gives back its own numbers, and

    pictures seen = those of the recipe · (pictures here / pictures there)^¾

The exponent is ours, a rule of thumb: it leads from the 240 epochs of ImageNet in b2-cfg to the 512 of CIFAR-10 in
cifar10. With `hours` the steps follow from timed ones instead.
"""

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from alphaflow_cli.data.manifest import BEWARE, Manifest, StorePlan, read_manifest
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import is_there
from alphaflow_cli.recipe import load_recipe, recipe_from_text, shipped
from alphaflow_cli.recipe.facts import human
from alphaflow_cli.recipe.loader import find_recipe, flatten, to_dict
from alphaflow_cli.recipe.migrations import FORMAT_KEY, current_format
from alphaflow_cli.recipe.plan import (
    FEWEST_PICTURES,
    IMAGENET_TRAIN,
    activation_bytes,
    is_guided,
    parameter_count,
    schedules_of,
    state_bytes,
    tokens,
)
from alphaflow_cli.recipe.schema import Guidance, Recipe, resolve_step
from alphaflow_cli.recipe.source import read_text
from alphaflow_cli.recipe.speed import pace
from alphaflow_cli.text import counted, for_terminal
from alphaflow_cli.train.store import described

GROWTH = 0.75
CIFAR_TRAIN = 50_000  # pictures of a recipe that names no embedded set and has fewer classes than ImageNet
LEAST_STEPS, FEWEST_STEPS = 1000, 10  # by the number of pictures; by --hours
LEAST_BATCH, BATCHES_AN_EPOCH = 32, 8
TENTH = 10  # of the run is the warm-up at most, and the half-life of an average
FEW_PICTURES = 10_000  # below, single pictures are repeated (docs/your-own-pictures.md)
STATED_FROM = 2_048  # pictures that a mean and std of every position want, as published
LARGE_ON_A_CPU = 10_000_000  # parameters; quickstart has 1.5 million
SMALL_PIXELS = 64  # px, up to which recipes for pixels are meant
USABLE, ROWS_WANTED = 0.9, 8  # of a GPU's memory; rows at once below which blocks are computed twice instead
WIDTH = 118  # of a comment
Choices = dict[str, tuple[Any, str]]  # field → value, and why


@dataclass(frozen=True)
class RecipeRequest:
    """What `recipe new` is called with."""

    store: Path
    out: Path
    like: str = ""  # a shipped recipe or a file; empty: by the store and the machine
    sets: tuple[str, ...] = ()
    hours: float | None = None  # that the run may take, by steps timed on this machine
    memory: float | None = None  # bytes of the GPU that it is meant for
    has_gpu: bool = False  # whether this machine has one


@dataclass(frozen=True)
class Proposal:
    """The recipe, as the text of its file and as it loads, and what has to be said beside it."""

    text: str
    recipe: Recipe
    notes: list[str] = field(default_factory=list)


def propose_recipe(request: RecipeRequest) -> Proposal:
    """Write the recipe for a store: it loads as it stands, and `train` takes it without another word."""
    manifest = _manifest_of(request.store)
    plan, count = manifest.plan, manifest.count
    name, why = (request.like, "--like") if request.like else _like(request, plan)
    like = load_recipe(name)
    steps, batch, why_steps = of_count(count, like)
    choices = _of_store(request.store, plan, count, like) | batch
    choices |= _of_machine(request, name, _assembled(request, name, choices | of_steps(steps, "", like)))
    if request.hours is not None:
        steps, why_steps = _of_hours(request, name, choices, like, steps)
    choices |= of_steps(steps, why_steps, like)
    recipe = _assembled(request, name, choices)
    text = _header(request, name, why, recipe, manifest) + _body(recipe, choices)
    assert recipe_from_text(text, str(request.out), name=request.out.stem) == recipe
    return Proposal(text, recipe, _notes(request, plan, count, recipe))


def _manifest_of(store: Path) -> Manifest:
    where = for_terminal(store)
    if is_there(store / "manifest.json"):
        return read_manifest(store)
    if is_there(store / "plan.json"):
        raise AlphaflowError(
            f"{where}: unfinished. First run the command that began it again, prep-latents or import-latents"
        )
    raise AlphaflowError(
        f"{where}: no latent store here (no manifest.json). "
        f"Make one first: alphaflow prep-latents SOURCE --out {quote(where)}"
    )


def _like(request: RecipeRequest, plan: StorePlan) -> tuple[str, str]:
    """The shipped recipe to begin with."""
    if plan.kind != "pixels":
        return ("b2-cfg", "for latents") if plan.classes > 1 else ("b2", "for latents of one class")
    if request.has_gpu or request.memory:
        return "cifar10", "for pixels, on a GPU"
    return "quickstart", "for pixels, on a machine without a GPU"


def _assembled(request: RecipeRequest, name: str, choices: Choices) -> Recipe:
    """The recipe with all choices in it, and then every --set."""
    path = find_recipe(name)
    texts = [f"{key}={json.dumps(value)}" for key, (value, _) in {**choices, "name": ("", "")}.items()]
    return recipe_from_text(read_text(path), str(path), [*texts, *request.sets], name=request.out.stem)


def _of_store(store: Path, plan: StorePlan, count: int, like: Recipe) -> Choices:
    """What the latents decide: size, channels, classes, patch, autoencoder, normalisation."""
    fields = described(plan, count, like)
    channels, side, _ = plan.latent
    what = "pixels" if plan.kind == "pixels" else f"{plan.kind} of {plan.image_size} px"
    reasons = {
        "data.image_size": "px, of the store",
        "data.channels": f"{channels}×{side}×{side} {what}",
        "data.latent_size": "its side",
        "data.classes": "of the store",
        "data.flips": "the store has mirror images" if plan.flips else "the store has no mirror images",
        "data.autoencoder": _about(fields["data.autoencoder"]),
    }
    choices = {key: (value, reasons.get(key, "")) for key, value in fields.items()}
    choices["data.store"] = (str(store), "--data gives another one")
    choices["data.crop"] = (plan.crop, "of the store; references are made with the same --crop")
    patch = fields.get("model.patch", like.model.patch)
    per_side = side // patch
    choices["model.patch"] = (patch, f"{per_side}×{per_side} = {per_side**2} tokens; {tokens(like):,} in {like.name}")
    normalise = fields.get("data.normalise", like.data.normalise)
    record = plan.autoencoder
    if record.channel_mean and record.channel_std:
        normalise, why = "channel", "by the mean and std per channel that the autoencoder states"
        stated: Choices = {"data.channel_mean": (record.channel_mean, ""), "data.channel_std": (record.channel_std, "")}
        choices |= {"data.normalise": (normalise, why), "data.scale": (1.0, ""), "data.shift": (0.0, ""), **stated}
    elif normalise == "position" and count < STATED_FROM:
        why = f"per position wants {STATED_FROM:,} pictures, here are {count:,}"
        choices["data.normalise"] = ("channel", why)
    if normalise != "scale" and like.data.normalise == "scale":
        choices |= {"data.scale": (1.0, ""), "data.shift": (0.0, "")}
    if plan.classes < 2:
        choices |= _without_labels(like)
    return choices


def _about(autoencoder: str) -> str:
    if autoencoder == "none":
        return "pixels, no autoencoder"
    local = "; a local one: write its folder here, or give --autoencoder to sample and eval"
    return "that made the latents" + ("" if "/" in autoencoder else local)


def _without_labels(like: Recipe) -> Choices:
    """One class tells the network nothing, and guidance would lead from it to itself."""
    guided = is_guided(like.guidance.omega, like.guidance.kappa)
    why = "one class: no labels" + (", and so no guidance" if guided else "")
    plain = to_dict(Guidance())
    choices: Choices = {f"guidance.{key}": (value, "") for key, value in plain.items()}
    if like.model.inputs:  # the network is not told what there is not
        choices |= {"model.inputs": ([], why), "sample.scale": (None, ""), "sample.interval": (None, "")}
    return choices | {"data.classes": (0, why), "sample.guidance": (1.0, ""), "eval.draw": ("random", "")}


def written_for(recipe: Recipe) -> int:
    """How many pictures a recipe was written for: of a file of one's own, those of its store, where that is here."""
    if recipe.data.source:
        return int(recipe.data.source.partition(":")[2])
    store = Path(recipe.data.store)
    if recipe.data.store and recipe.name not in shipped() and is_there(store / "manifest.json"):
        return read_manifest(store).count
    return IMAGENET_TRAIN if recipe.data.classes == 1000 else CIFAR_TRAIN


def of_count(count: int, like: Recipe) -> tuple[int, Choices, str]:
    """What the number of pictures decides: the steps, the batch with what goes with it, and why so many steps."""
    there = written_for(like)
    seen = like.train.steps * like.train.batch * (count / there) ** GROWTH
    batch = like.train.batch
    while batch > LEAST_BATCH and count < BATCHES_AN_EPOCH * batch:
        batch //= 2
    least = min(LEAST_STEPS, like.train.steps)
    steps = like.train.steps if count == there else max(rounded(seen / batch), least)
    times = f"{(count / there) ** GROWTH:.2g} = ({count:,} / {there:,})^{GROWTH:g} times what {like.name} sees"
    short = f"; no fewer than {least:,} steps" if steps == least and seen < least * batch else ""
    why = f"{steps * batch / count:,.0f} epochs: {times}{short}"
    batches = counted(round(count / batch), "batch", "batches") if count >= batch else "less than one batch"
    small = f"an epoch of {counted(count, 'picture')} has {batches}"
    choices: Choices = {"train.batch": (batch, small if batch < like.train.batch else f"as {like.name}")}
    images = min(like.eval.images, count)
    if images < like.eval.images:
        choices["eval.images"] = (images, "as many as there are to compare them with")
    return steps, choices, why


def of_steps(steps: int, why: str, like: Recipe) -> Choices:
    """The length of the run, and what follows from it."""
    choices: Choices = {"train.steps": (steps, why)}
    warm, lives = like.optim.warmup_steps, like.ema.half_lives
    if warm > steps // TENTH:
        choices["optim.warmup_steps"] = (steps // TENTH, f"a tenth of the run; {warm:,} in {like.name}")
    most = steps / TENTH
    if max(lives) > most:
        shorter = tuple(max(1.0, float(rounded(life * most / max(lives)))) for life in lives)
        choices["ema.half_lives"] = (list(dict.fromkeys(shorter)), "steps, a tenth of the run")
    for path, schedule in schedules_of(like):
        for end in ("start", "end") if schedule.kind != "constant" else ():
            step = getattr(schedule, end)
            if isinstance(step, int) and step:
                share = 100 * resolve_step(step, like.train.steps) / like.train.steps
                choices[f"{path}.{end}"] = (f"{share:g}%", f"step {step:,} of {like.train.steps:,} in {like.name}")
    for key, part in {"save_every": 5, "sample_every": 5, "log_every": 50}.items():
        before = getattr(like.train, key)
        if before > steps // part and steps < like.train.steps:
            choices[f"train.{key}"] = (max(1, steps // part), "")
    return choices


def rounded(value: float) -> int:
    """A whole number with three digits that count, not above the value."""
    whole = int(value + 1e-6)
    unit = 10 ** max(0, len(str(whole)) - 3)
    return int(whole // unit * unit)


def _of_machine(request: RecipeRequest, name: str, recipe: Recipe) -> Choices:
    """What the GPU decides, or that there is none."""
    if request.memory is None:
        if request.has_gpu or recipe.train.precision != "bf16":
            return {}
        return {"train.precision": ("fp32", "no GPU here; write bf16 where there is one")}
    rows = (USABLE * request.memory - state_bytes(recipe)) / activation_bytes(recipe)
    memory = human(request.memory)
    if rows >= min(ROWS_WANTED, recipe.train.batch):
        at_once = f"at most {min(int(rows), recipe.train.batch):,} rows at once in {memory}, by arithmetic"
        return {"train.gradient_checkpointing": (recipe.train.gradient_checkpointing, at_once)}
    if USABLE * request.memory > state_bytes(recipe):
        why = f"{human(activation_bytes(recipe))} per row do not go into {memory} otherwise; about 30% slower"
        return {"train.gradient_checkpointing": (True, why)}
    raise AlphaflowError(
        f"recipe {name}: weights, averages and optimiser alone take {human(state_bytes(recipe))}, and the GPU "
        f"has {memory}. Begin with a smaller network: --like b2, --like cifar10, or --set model.dim=384"
    )


def _of_hours(request: RecipeRequest, name: str, choices: Choices, like: Recipe, steps: int) -> tuple[int, str]:
    """The steps that fit into the hours, and why: by steps timed here, or by arithmetic where the GPU is elsewhere."""
    assert request.hours is not None
    elsewhere, why = request.memory is not None and not request.has_gpu, ""
    for _ in range(2 if request.has_gpu else 1):  # whether blocks are compiled may follow from the number of steps
        recipe = _assembled(request, name, choices | of_steps(steps, "", like))
        hours, why = _on_an_h100(recipe) if elsewhere else _timed(recipe)
        steps = rounded(steps * request.hours / hours)
        if steps < FEWEST_STEPS:
            raise AlphaflowError(
                f"--hours {request.hours:g}: makes {counted(steps, 'step')} of this recipe ({why}). Give more hours, "
                "or a smaller network: --like quickstart, or --set model.depth=…"
            )
    return steps, f"--hours {request.hours:g}: {why}"


def _timed(recipe: Recipe) -> tuple[float, str]:
    """The hours of a run, as `train --estimate` measures them on this machine."""
    from alphaflow_cli.train.hours import measure_phases_of
    from alphaflow_cli.train.start import TrainOptions, count_processes

    processes = count_processes(recipe, None)
    phases, _ = measure_phases_of(recipe, TrainOptions(Path()), processes)
    seconds = sum(phase.seconds for phase in phases)
    each = seconds / recipe.train.steps
    crew = counted(processes, "process", "processes")
    return seconds / 3600, f"a step takes {each:.3g} s on the machine that made this file, {crew}"


def _on_an_h100(recipe: Recipe) -> tuple[float, str]:
    there = pace(recipe)
    if there is None:
        raise AlphaflowError(
            f"--hours: nothing is known of the speed of {recipe.train.precision} on a GPU that is not here. Run this "
            "command on the machine that trains, without --gpu"
        )
    return there.hours, f"{there.images_per_second:,.0f} pictures/s on one H100, by arithmetic; other GPUs are slower"


def _notes(request: RecipeRequest, plan: StorePlan, count: int, recipe: Recipe) -> list[str]:
    notes = []
    if count < FEW_PICTURES:
        notes.append(f"only {counted(count, 'picture')}: the network may learn to repeat single ones")
    if count < FEWEST_PICTURES:
        notes.append(f"alphaflow eval needs {FEWEST_PICTURES} real pictures, and the store has {count}")
    if plan.kind == "pixels" and plan.image_size > SMALL_PIXELS:
        notes.append(
            f"pixels of {plan.image_size} px: an autoencoder makes better pictures (prep-latents without none)"
        )
    if not request.has_gpu and request.memory is None and parameter_count(recipe) > LARGE_ON_A_CPU:
        large = f"{parameter_count(recipe):,} parameters are many for a machine without a GPU"
        notes.append(f"{large}: add --estimate to the train command first, or begin with --like quickstart")
    if beware := BEWARE.get(plan.autoencoder.kind or ""):
        notes.append(beware)
    if request.hours is not None and request.memory is not None and not request.has_gpu:
        notes.append("the hours are those of an H100; on the machine that trains, add --estimate to the train command")
    return notes


def _header(request: RecipeRequest, name: str, why: str, recipe: Recipe, manifest: Manifest) -> str:
    """What the file is, the commands, and where its numbers come from."""
    stem, store = for_terminal(request.out.stem), for_terminal(request.store)
    pictures = counted(manifest.count, "picture")
    hours = f"{request.hours:g} h requested" if request.hours is not None else "add --estimate to the train command"
    images = recipe.train.steps * recipe.train.batch
    lines = [
        f"The recipe {for_terminal(name)} ({why}), made to fit {store}: {pictures} of {manifest.plan.image_size} px",
        "",
        f"  alphaflow train {quote(for_terminal(request.out))}",
        f"  alphaflow sample {quote(f'runs/{stem}')} --grid {quote(f'{stem}.png')}",
        f"  alphaflow eval {quote(f'runs/{stem}')} --reference PICTURES",
        "",
        f"Hardware and hours: not measured; {hours}",
        "Expected FID: not measured.",
        f"{images:,} pictures are seen in all. What has no remark is as in {for_terminal(name)}. The length of the run",
        "by the number of pictures is a rule of thumb of ours. Change what you like: the file is yours.",
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines) + "\n"


def _body(recipe: Recipe, choices: Choices) -> str:
    values = flatten(recipe)
    kept = {key: why for key, (value, why) in choices.items() if json.dumps(values[key]) == json.dumps(value)}
    reasons = {key: kept.get(key, "--set") for key, (_, why) in choices.items() if why or key not in kept}
    plain = {FORMAT_KEY: current_format(), **to_dict(recipe)}
    plain.pop("name")
    return "\n".join(_lines(plain, to_dict(Recipe()), reasons, "")) + "\n"


def _lines(section: dict[str, Any], default: Any, reasons: dict[str, str], prefix: str) -> Iterator[str]:
    """The lines of a section: what differs from the default, and what there is a reason to show, with it."""
    indent, usual = "  " * prefix.count("."), default if isinstance(default, dict) else {}
    for key, value in section.items():
        path = prefix + key
        if isinstance(value, dict):
            if inner := list(_lines(value, usual.get(key), reasons, f"{path}.")):
                yield f"{indent}{key}:"
                yield from inner
        elif path in reasons or key not in usual or value != usual[key]:
            line, why = f"{indent}{key}: {json.dumps(value, ensure_ascii=False)}", reasons.get(path, "")
            if why and len(line) + len(why) + 4 > WIDTH:
                yield from (f"{indent}# {piece}" for piece in textwrap.wrap(why, WIDTH - len(indent) - 2))
                why = ""
            yield f"{line}  # {why}" if why else line
