"""The recipe, the folder and the latents of a run: what a recipe takes over from the latents, and where they clash.

A shipped recipe describes the data that it was written for. Given other latents with `--data`, it yields to them in
every field that says what the data are. A file of one's own does so in the fields that it leaves out; `--set` always
holds. The run's recipe.yaml keeps the outcome and the store's path, so that the run needs no `--data` again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from alphaflow_cli.data.manifest import StorePlan, read_manifest
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import is_there, read_document, user_path
from alphaflow_cli.model.find import saved_steps
from alphaflow_cli.recipe import load_recipe, recipe_from_text, shipped
from alphaflow_cli.recipe.loader import flatten, load_for_data, set_text
from alphaflow_cli.recipe.schema import Recipe

SHAPE = tuple(f"data.{name}" for name in ("autoencoder", "image_size", "channels", "latent_size", "classes"))
CONSTANTS = ("data.channel_mean", "data.channel_std")
CONTENT = (*(f"data.{name}" for name in ("flips", "source", "normalise", "scale", "shift")), *CONSTANTS)
YIELDING = (*SHAPE, *CONTENT, "data.crop", "model.patch", "eval.reference", "eval.images", "expected")
OWN_SIDE = 32  # of the user's own pictures on a shipped recipe of pixels, as docs/your-own-pictures.md begins with
PREPARED = {  # field → the option of prep-latents that decides it in a store; two follow from the others
    "data.autoencoder": "--autoencoder {}",
    "data.image_size": "--size {}",
    "data.channels": "",
    "data.latent_size": "",
    "data.flips": "--flips",
    "data.crop": "--crop {}",
}


@dataclass(frozen=True)
class Resolved:
    """What a command line of `train` means: the recipe, the run's folder, and what has to be said about them."""

    recipe: Recipe
    folder: Path
    notes: tuple[str, ...] = ()


def resolve_run(name: str, sets: Sequence[str], *, data: Path | None, out: Path | None) -> Resolved:
    """Find the recipe and the folder. The recipe takes over what the folder's run has, else what the store has.

    A shipped recipe on data of another shape is a run of its own, named after both.
    """
    if data is not None:
        check_is_store(data, name)
    if data is None or not is_there(data / "manifest.json"):
        recipe = load_recipe(name, sets)
        folder = out or Path("runs") / recipe.name
        return Resolved(recipe if data else as_remembered(name, sets, recipe, folder), folder)
    recipe, changes = recipe_for(name, sets, data)
    is_other = name in shipped() and any(field in SHAPE for field, _, _ in changes)
    folder = out or Path("runs") / (f"{recipe.name}-{data.resolve().name}" if is_other else recipe.name)
    if there := recipe_of_run(folder):
        return Resolved(with_store(as_begun(name, sets, there, folder), data), folder)
    taken = ", ".join(f"{field}: {set_text(value)}" for field, _, value in changes if field != "expected")
    notes = (f"{recipe.name} takes over from {data}: {taken}",) if taken else ()
    return Resolved(with_store(recipe, data), folder, notes)


def check_is_store(data: Path, name: str) -> None:
    """Refuse pictures where their latents are due, with the command that makes them; other faults show up later."""
    if is_there(data) and not any(is_there(data / f"{name}.json") for name in ("manifest", "plan")):
        made, wanted = quote(f"latents/{data.resolve().stem}"), load_recipe(name).data
        side = max(wanted.image_size, OWN_SIDE) if name in shipped() else wanted.image_size
        pixels = f" --size {side} --autoencoder none" if wanted.autoencoder == "none" else ""
        raise AlphaflowError(
            f"{data}: no latent store. If these are pictures, make one of them: "
            f"alphaflow prep-latents {quote(str(data))}{pixels} --out {made}, then train with --data {made}"
        )


def recipe_for(name: str, sets: Sequence[str], data: Path) -> tuple[Recipe, list[tuple[str, Any, Any]]]:
    """The recipe with what it takes over from a store, and what that changed: (field, before, now)."""
    manifest = read_manifest(data)
    return load_for_data(name, sets, lambda before: described(manifest.plan, manifest.count, before), str(data))


def recipe_of_run(folder: Path) -> Recipe | None:
    """The recipe that a run folder holds; None where no run was begun."""
    path = folder / "recipe.yaml"
    return recipe_from_text(read_document(path), str(path)) if is_there(path) else None


def trained_recipe(folder: Path) -> Recipe | None:
    """The recipe by which a run's newest state was trained, as its checkpoint has it; None where that is not there."""
    from alphaflow_cli.tensors import open_tensors  # here: it loads numpy, for which a slip does not wait

    states = saved_steps(folder / "state", ".safetensors")
    path = folder / "checkpoints" / states[-1].stem / "model.safetensors" if states else None
    if path is None or not path.is_file():
        return None
    try:
        return recipe_from_text(open_tensors(path).metadata["recipe"], f"{path} (its recipe)")
    except (AlphaflowError, KeyError):  # who reads its weights says so
        return None


def as_remembered(name: str, sets: Sequence[str], recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the data of the folder's run, where that was begun with `--data`."""
    there = recipe_of_run(folder)
    stated = stated_store(there) if there else None
    is_said = any(text.partition("=")[0].strip() == "data.store" for text in sets)
    if not there or there.data.store == recipe.data.store or not stated or is_said:
        return recipe
    if not is_there(stated / "manifest.json"):
        if recipe.data.store:
            return recipe
        raise AlphaflowError(
            f"{folder}: its latents are not in {there.data.store} any more. Say where they are now: --data DIR; "
            "or take another folder: --out RUN"
        )
    return with_store(as_begun(name, sets, there, folder), Path(there.data.store))


def as_begun(name: str, sets: Sequence[str], there: Recipe, folder: Path) -> Recipe:
    """The recipe with what the folder's run has in the fields that describe the data."""
    kept = {field: value for field, value in flatten(there).items() if field in YIELDING}
    return load_for_data(name, sets, lambda _: kept, str(folder / "recipe.yaml"))[0]


def with_store(recipe: Recipe, store: Path) -> Recipe:
    """The recipe with the path of its latents."""
    return replace(recipe, data=replace(recipe.data, store=str(store)))


def described(plan: StorePlan, count: int, before: Recipe) -> dict[str, Any]:
    """The recipe's fields as a store of `count` pictures has them; those left out by --bad skip do not count."""
    source, kind = str(plan.source.get("name")), str(plan.source.get("kind"))
    embedded = source if source.startswith(f"{kind}:") else ""
    fields = {**facts_of(plan), "data.source": embedded}
    if _same(plan.autoencoder.id, before.data.autoencoder):
        fields["data.autoencoder"] = before.data.autoencoder  # as it is spelt: it may be a folder
    elif before.data.channel_mean or before.data.channel_std:
        fields |= dict.fromkeys(CONSTANTS)  # of other latents: estimated on the store instead
    elif before.data.normalise == "scale":
        fields |= {"data.scale": plan.autoencoder.scale, "data.shift": plan.autoencoder.shift}
    elif before.data.normalise == "position" and plan.kind == "pixels":
        fields["data.normalise"] = "channel"  # a pixel that is white in every picture has no deviation of its own
    if fields["data.latent_size"] % before.model.patch:
        fields["model.patch"] = fitting_patch(fields["data.latent_size"], before)
    values = flatten(before)
    if before.data.crop is None:  # either will do, and so it stays
        del fields["data.crop"]
    others = source != before.data.source if embedded or before.data.source else False
    if others or any(fields[field] != values[field] for field in SHAPE):
        fields["eval.reference"] = ""  # of other pictures, as the expected scores are
        fields |= {"expected": ()} if before.expected else {}
    if not fields.get("eval.reference", before.eval.reference):
        fields["eval.images"] = min(before.eval.images, count)  # no more than there are to compare with
    return fields


def fitting_patch(side: int, recipe: Recipe) -> int:
    """The patch that divides a side into tokens whose number comes nearest to the recipe's own."""
    tokens = recipe.data.latent_size / recipe.model.patch
    divisors = (patch for patch in range(1, side + 1) if side % patch == 0)
    return min(divisors, key=lambda patch: abs(side / patch - tokens))


def facts_of(plan: StorePlan) -> dict[str, Any]:
    """What a store is, under the names that a recipe has for it."""
    channels, side, _ = plan.latent
    values = (plan.autoencoder.id, plan.image_size, channels, side, plan.classes)
    return {**dict(zip(SHAPE, values, strict=True)), "data.flips": plan.flips, "data.crop": plan.crop}


def stated_store(recipe: Recipe) -> Path | None:
    """The folder of latents that the recipe names; `~` in it is the home folder."""
    return user_path(recipe.data.store) if recipe.data.store else None


def store_of(recipe: Recipe, *, data: Path | None, out: Path) -> Path:
    """The folder where the recipe's latents are, or will be made; --data comes first."""
    if store := data or stated_store(recipe):
        return store
    if recipe.data.source:
        return out / "latents"
    raise AlphaflowError(
        f"recipe {recipe.name}: no latents named. Make them: alphaflow prep-latents SOURCE --out DIR, "
        "then give --data DIR (or data.store in the recipe)."
    )


def check_store(recipe: Recipe, store: Path, run: Path | None = None, *, given: bool = True) -> None:
    """Refuse a store that contradicts the recipe, with the lines to change; `run`: its folder, once begun.

    `given`: whether the store was given by --data, to which a shipped recipe yields.
    """
    from alphaflow_cli.data.store import open_store  # torch comes with it

    clashes = disagreements(open_store(store, "sizes").manifest.plan, recipe)
    listed = "".join(
        f"\n  {field}: {set_text(there)} in the store, {set_text(here)} in the recipe" for field, there, here in clashes
    )
    if clashes and run is not None:
        raise AlphaflowError(
            f"{run}: was begun with other data than {store} has:{listed}\nTake another folder: --out RUN"
        )
    if clashes:
        advice = _advice(recipe, store, clashes, given=given)
        raise AlphaflowError(f"{store}: not what recipe {recipe.name} says:{listed}\n{advice}.")


def _advice(recipe: Recipe, store: Path, clashes: list[tuple[str, Any, Any]], *, given: bool) -> str:
    """What to change where recipe and store clash; preparing again only where it would help."""
    sets = " ".join(f"--set {field}={quote(set_text(there))}" for field, there, _ in clashes)
    advice = f"Say in the recipe what the store says: {sets}"
    if recipe.name in shipped() and not given:
        advice += f", or give the store by --data {quote(str(store))}: the recipe takes all of it over"
    if all(field in PREPARED for field, _, _ in clashes):
        options = [PREPARED[field].format(quote(str(here))) for field, _, here in clashes if PREPARED[field]]
        command = " ".join(["alphaflow prep-latents SOURCE", *options, "--out DIR"])
        advice += f". Or make latents as the recipe wants them: {command}"
    return advice


def disagreements(plan: StorePlan, recipe: Recipe) -> list[tuple[str, Any, Any]]:
    """Every field in which the recipe wants what the store is not: (field, in the store, in the recipe)."""
    wanted, free = flatten(recipe), set()
    if not recipe.data.classes:
        free.add("data.classes")  # it trains without labels: any labels will do
    if not recipe.data.flips:
        free.add("data.flips")  # a store with mirror images serves a recipe without
    if recipe.data.crop is None:
        free.add("data.crop")
    facts = facts_of(plan)
    return [
        (field, facts[field], wanted[field])
        for field in facts
        if field not in free and not _same(facts[field], wanted[field])
    ]


def autoencoder_key(name: str) -> str:
    """The part of an autoencoder's name by which two are taken for the same: the last one of an id, folder or file.

    So a local copy of stabilityai/sd-vae-ft-ema is the same autoencoder.
    """
    last = Path(name.split("@")[0].rstrip("/")).name
    return last.removesuffix(".pt").removesuffix(".safetensors").replace("_", "-").lower()


def _same(there: object, here: object) -> bool:
    if isinstance(there, str) and isinstance(here, str):
        return autoencoder_key(there) == autoencoder_key(here)
    return there == here
