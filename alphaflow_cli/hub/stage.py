"""From a run or a checkpoint to a folder that may leave this machine: no secret, no optimiser state, no path of it."""

import json
import re
import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from safetensors import safe_open

from alphaflow_cli.charts.draw import to_png
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.evaluate.results import RESULTS_SCHEMA, read_results
from alphaflow_cli.export.diffusers import export_diffusers
from alphaflow_cli.export.graph import open_exported
from alphaflow_cli.files import is_there, sha256_of, user_path, write_by, write_whole
from alphaflow_cli.hub.card import CardFacts, last_part, model_card, result_rows, scrub
from alphaflow_cli.model.checkpoint import (
    CHECKPOINT_FORMAT,
    Checkpoint,
    check_autoencoder,
    load_checkpoint,
    save_checkpoint,
)
from alphaflow_cli.model.find import best_name, check_run, find_checkpoint, nfe_of_best, run_folder, step_name
from alphaflow_cli.nn.autoencoder import load_autoencoder
from alphaflow_cli.recipe import Recipe, dump_recipe, load_recipe
from alphaflow_cli.recipe.plan import draws_scale, effective_scale, has_null_label, parameter_count
from alphaflow_cli.remote.address import is_repository
from alphaflow_cli.remote.download import AUTOENCODER, CONFIG_FILE, MODEL, prepare_folder, remove_stale
from alphaflow_cli.runtime.progress import say
from alphaflow_cli.sample.generator import open_generator, pictures
from alphaflow_cli.sample.grid import grid_in_rows, plain_png
from alphaflow_cli.sample.walk import plan_walk
from alphaflow_cli.train.curves import recipe_chart
from alphaflow_cli.train.scores import why_best

HUB_ID = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*){1,2}(?:@\S+)?")  # user/repo or user/repo/subfolder
GRID = (4, 8)  # rows and columns of a sample grid drawn for the card


@dataclass(frozen=True)
class Publication:
    """A checkpoint to publish, read and checked, with the results that belong to its weights."""

    run: Path | None  # its run folder, where it is one
    path: Path
    sha256: str  # of the file, when it was read
    checkpoint: Checkpoint
    results: dict[str, Any] | None
    chosen: str = ""  # by which score it was chosen, where it is a run's best checkpoint

    @property
    def name(self) -> str:
        """The repository's name where none is given: the run's, for several runs may be of one recipe."""
        return self.run.resolve().name if self.run else self.checkpoint.recipe.name or self.path.stem

    @property
    def title(self) -> str:
        """What the commit says: the name, and the step of the weights."""
        step = self.checkpoint.origin.get("step")
        return f"{self.name} at step {step:,}" if isinstance(step, int) else self.name


def open_publication(address: Path, *, with_results: bool, best: bool = False) -> Publication:
    """Read a run folder, the best checkpoint of one, or a checkpoint.

    Results of other weights are refused here, before anything is sent.
    """
    path = best_of(address) if best else find_checkpoint(str(address))
    run = address if address.is_dir() else None
    nfe = nfe_of_best(path)
    if nfe is not None:  # named by its file, perhaps
        run = run or run_folder(str(path))
    if run is not None:
        see_own(run, path)
    sha256, checkpoint = sha256_of(path), load_checkpoint(path)
    _see_same(path, sha256, path)
    if run is None or nfe is None:
        return Publication(run, path, sha256, checkpoint, _results(run, path, sha256) if run and with_results else None)
    results = _results_of_best(run, sha256) if with_results else None
    return Publication(run, path, sha256, checkpoint, results, why_best(run, nfe, checkpoint))


def best_of(run: Path) -> Path:
    """The best checkpoint that a run kept, at the number of evaluations that its recipe samples with."""
    if not run.is_dir():
        raise AlphaflowError(f"{run}: --best is about a run folder, and this is a file. Leave it out.")
    check_run(run)
    path = run / best_name(load_recipe(str(run / "recipe.yaml")).sample.nfe)
    if not path.exists():
        others = ", ".join(sorted(each.name for each in run.glob("best-nfe*.safetensors")))
        advice = f"Name one that is here: {others}" if others else "Train with scores: --set eval.every=1000"
        raise AlphaflowError(f"{path}: no best checkpoint was kept. {advice}")
    return path


def _results_of_best(run: Path, sha256: str) -> dict[str, Any] | None:
    """All that was measured of these weights, while the run trained and afterwards."""
    evaluations = []
    newest = [path for path in (run / "results.json",) if path.is_file()]  # the best may be the newest, too
    for path in [*newest, *sorted(run.glob("evals/*/results.json"))]:
        see_own(run, path)
        results = read_results(path, advice="Move it away; or push --without-results")
        same = (each for each in results["evaluations"] if _is_of(each, sha256))
        evaluations += [{"environment": results.get("environment", {}), **each} for each in same]
    return {"schema": RESULTS_SCHEMA, "evaluations": evaluations} if evaluations else None


def _is_of(evaluation: dict[str, Any], sha256: str) -> bool:
    rows = evaluation["rows"]
    return bool(rows) and all(row["pictures"].get("checkpoint_sha256") == sha256 for row in rows)


def see_own(run: Path, path: Path) -> None:
    """Refuse a link that leads out of the run folder: it may lead to anything on this machine."""
    if not path.is_file() or not path.resolve().is_relative_to(run.resolve()):
        raise AlphaflowError(
            f"{path}: not a file of this run, but a link that leads out of it. Nothing was published; put the file "
            "itself there, or remove the link."
        )


def _see_same(path: Path, sha256: str, original: Path) -> None:
    """Refuse a file that was replaced meanwhile, as a run that still trains does: its scores are of other weights."""
    if sha256_of(path) != sha256:
        raise AlphaflowError(f"{original}: changed while it was read; is it training? Run the same command again.")


def stage(
    source: Publication,
    folder: Path,
    *,
    repo: str,
    licence: str,
    autoencoder: Path | None = None,
    diffusers: bool = False,
) -> dict[str, int]:
    """Fill `folder` for the repository user/repo, with the autoencoder given or found; returns its files' sizes."""
    if folder.resolve() == source.path.parent.resolve():
        raise AlphaflowError(f"{folder}: the weights to publish lie there. Give another folder.")
    if not is_repository(repo):  # made of the run's name, perhaps
        raise AlphaflowError(f"{repo}: the Hub does not accept this name. Give another: alphaflow push RUN user/name")
    decoder = local_autoencoder(source, autoencoder)
    if decoder is not None and decoder.resolve().is_relative_to(folder.resolve()):
        raise AlphaflowError(f"{decoder}: lies in {folder}, which is written anew. Copy it, or give another folder.")
    prepare_folder(folder)
    remove_stale(folder)
    clean = _clean(source.checkpoint, packaged=decoder is not None)
    recipe, parameters = clean.recipe, parameter_count(clean.recipe)
    # config.json first: by it the folder is known as ours
    write_whole(folder / CONFIG_FILE, config_json(recipe, clean.origin, parameters))
    if decoder is not None:
        _package_autoencoder(decoder, folder / AUTOENCODER, source)
    sha256 = _write_model(source, clean, folder / MODEL)
    write_whole(folder / "recipe.yaml", dump_recipe(recipe))
    if diffusers:
        say(f"pipeline for diffusers: {export_diffusers(open_exported(str(folder / MODEL)), folder)}")
    results = scrub(source.results)
    if results:
        text = json.dumps(results, indent=1, ensure_ascii=False).replace(source.sha256, sha256)
        write_whole(folder / "results.json", text + "\n")
    write_whole(folder / "alpha.png", to_png(recipe_chart(recipe)))
    write_whole(folder / "samples.png", _samples(source, folder / MODEL))
    facts = CardFacts(repo, recipe, clean.origin, parameters, results, licence, source.chosen, diffusers)
    write_whole(folder / "README.md", model_card(facts))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def config_json(recipe: Recipe, origin: dict[str, Any], parameters: int) -> str:
    """Write config.json of a published model: what other programs need to know, without reading a recipe."""
    data, mix = recipe.data, recipe.guidance
    model = asdict(recipe.model)
    content = {
        "model_type": "alphaflow",
        "format": CHECKPOINT_FORMAT,
        "library_name": "alphaflow",
        "architecture": model | {"parameters": parameters},
        "convention": "t = 0 data, t = 1 noise; z_r = z_t - (t - r) u(z_t, r, t)",
        "latents": {
            "autoencoder": data.autoencoder,
            "shape": [data.channels, data.latent_size, data.latent_size],
            "normalise": data.normalise,
            "image_size": data.image_size,
        },
        "classes": data.classes,
        "guidance": {
            "baked": None if draws_scale(recipe) else effective_scale(mix.omega, mix.kappa),
            "null_label": has_null_label(recipe),
        },
        "sample": {name: getattr(recipe.sample, name) for name in recipe.sample.__dataclass_fields__},
        "weights": {key: origin.get(key) for key in ("weights", "step", "images_seen", "half_life")},
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _write_model(source: Publication, clean: Checkpoint, model: Path) -> str:
    """Write the checkpoint: as it is where nothing in it is private, else cleaned; returns its sha256."""
    same = (clean.recipe, clean.origin) == (source.checkpoint.recipe, source.checkpoint.origin)
    if not same or not _is_bare(source):
        save_checkpoint(model, clean)
        return sha256_of(model)
    write_by(model, partial(shutil.copyfile, source.path))
    try:
        _see_same(model, source.sha256, source.path)
    except AlphaflowError:
        model.unlink()
        raise
    return source.sha256


def _is_bare(source: Publication) -> bool:
    """Whether the file holds only what we read from it: no other metadata or tensor, no comment in the recipe."""
    with safe_open(source.path, framework="pt") as file:
        metadata, names = file.metadata() or {}, set(file.keys())
    wanted = {f"net.{name}" for name in source.checkpoint.weights} | {"latents.mean", "latents.std"}
    recipe = dump_recipe(source.checkpoint.recipe)
    return set(metadata) == {"format", "recipe", "origin"} and metadata["recipe"] == recipe and names == wanted


def _clean(checkpoint: Checkpoint, *, packaged: bool) -> Checkpoint:
    """The same weights; recipe and origin without paths, a packaged autoencoder under its name in the repository."""
    recipe, origin = checkpoint.recipe, scrub(checkpoint.origin)
    if packaged:
        recipe = replace(recipe, data=replace(recipe.data, autoencoder=AUTOENCODER))
        origin = origin | {"autoencoder": (origin.get("autoencoder") or {}) | {"id": AUTOENCODER, "revision": ""}}
    data = replace(
        recipe.data,
        store=last_part(recipe.data.store),
        source=scrub(recipe.data.source),
        autoencoder=scrub(recipe.data.autoencoder),
    )
    evaluation = replace(recipe.eval, reference=last_part(recipe.eval.reference))
    expected = tuple(replace(score, source=scrub(score.source)) for score in recipe.expected)
    recipe = replace(recipe, name=scrub(recipe.name), data=data, eval=evaluation, expected=expected)
    begun = str(origin.get("init_from") or "")
    is_run = begun.startswith("runs/") or is_there(user_path(begun))  # of this machine, though it looks like user/repo
    if begun and (is_run or not is_repository(begun.partition("@")[0].partition(":")[0])):
        origin = origin | {"init_from": last_part(begun)}
    return replace(checkpoint, recipe=recipe, origin=origin)


def _autoencoder_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the checkpoint records of its autoencoder; `id` is the recipe's where it records none."""
    record = checkpoint.origin.get("autoencoder") or {}
    return record | {"id": str(record.get("id") or checkpoint.recipe.data.autoencoder)}


def local_autoencoder(source: Publication, given: Path | None) -> Path | None:
    """Find the autoencoder to publish: the one given, else beside the checkpoint, else on this machine.

    None where it is on the Hub, or where there is none.
    """
    name, in_recipe = _autoencoder_record(source.checkpoint)["id"], source.checkpoint.recipe.data.autoencoder
    if name == "none":
        if given:
            raise AlphaflowError(f"--autoencoder {given}: this model makes pixels without a decoder; leave it out.")
        return None
    on_hub = HUB_ID.fullmatch(name)
    names = [name] if on_hub or in_recipe == "none" else [name, in_recipe]
    places = [place for each in names for place in (source.path.parent / each, user_path(each))]
    here = given or next((place for place in places if place.is_file() or (place / CONFIG_FILE).is_file()), None)
    if here is None and not on_hub:
        raise AlphaflowError(
            f"{source.path}: its latents were made by the autoencoder {Path(name).name}, which is not on the Hub and "
            "was not found here. Publish it too: --autoencoder DIR (or its weights file)."
        )
    return here


def _package_autoencoder(place: Path, target: Path, source: Publication) -> None:
    """Write an autoencoder of any form as a folder of safetensors; it must be the one that made the latents."""
    autoencoder = load_autoencoder(str(place), device=torch.device("cpu"))
    check_autoencoder(autoencoder, _autoencoder_record(source.checkpoint))
    module: Any = autoencoder.module  # of diffusers
    module.save_pretrained(target, safe_serialization=True)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)  # the folder it was loaded from
    write_whole(target / "config.json", json.dumps(scrub(config), indent=2) + "\n")


def _results(run: Path, checkpoint: Path, ours: str) -> dict[str, Any] | None:
    """The run's results.json; refused where its numbers were measured on other weights."""
    path = run / "results.json"
    if not path.is_file():
        return None
    see_own(run, path)
    again = f"Measure again: alphaflow eval {quote(str(run))}; or push --without-results"
    results = read_results(path, advice=again)
    rows = result_rows(results)
    for row in rows:
        theirs = str((row.get("pictures") or {}).get("checkpoint_sha256") or "")
        if theirs != ours:
            raise AlphaflowError(
                f"{path}: {row.get('name')} was measured on other weights ({theirs[:12] or 'unknown'}) than "
                f"{checkpoint.name} holds ({ours[:12]}). {again}"
            )
    return results if rows else None


def _samples(source: Publication, model: Path) -> bytes:
    """A grid of samples as PNG: the run's own of these weights, else one drawn by the file that is published."""
    recipe, step = source.checkpoint.recipe, source.checkpoint.origin.get("step")
    if source.run is not None and isinstance(step, int):
        drawn = source.run / "samples" / f"{step_name(step)}.png"
        if drawn.exists():
            see_own(source.run, drawn)
            return plain_png(drawn)
    generator = open_generator(str(model))
    rows, columns = GRID
    seeds, classes = list(range(rows * columns)), recipe.data.classes
    labels = [seed % classes if classes else 0 for seed in seeds]
    walk = plan_walk(recipe, nfe=recipe.sample.nfe)
    samples = [picture for _, _, picture in pictures(generator, seeds, labels, walk, batch=len(seeds))]
    return grid_in_rows(samples, columns)
