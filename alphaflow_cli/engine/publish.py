"""From a run or a checkpoint to the folder that goes to the Hub: no secret, no optimiser state, no machine's path."""

import json
import re
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from alphaflow_cli.charts.draw import to_png
from alphaflow_cli.engine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from alphaflow_cli.engine.curves import recipe_chart
from alphaflow_cli.engine.files import write_atomically
from alphaflow_cli.engine.generate import best_device, check_autoencoder, find_checkpoint, open_generator
from alphaflow_cli.engine.plan import parameter_count
from alphaflow_cli.engine.results import read_results
from alphaflow_cli.engine.state import step_name
from alphaflow_cli.engine.walk import plan_walk
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.hub.address import is_repository
from alphaflow_cli.hub.card import CardFacts, model_card, result_rows
from alphaflow_cli.hub.config import config_json
from alphaflow_cli.hub.folder import AUTOENCODER, CONFIG, MODEL, prepare_folder, remove_stale
from alphaflow_cli.hub.scrub import last_part, scrub
from alphaflow_cli.nn.autoencoder import load_autoencoder
from alphaflow_cli.nn.weights import sha256_of
from alphaflow_cli.recipe import dump_recipe
from alphaflow_cli.report.grid import grid_in_rows, plain_png

HUB_ID = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*){1,2}(?:@\S+)?")  # user/repo or user/repo/subfolder
GRID = (4, 8)  # rows and columns of a sample grid drawn for the card


@dataclass(frozen=True)
class Publication:
    """What is to be published, read and found sound."""

    run: Path | None  # its run folder, where it is one
    path: Path
    sha256: str  # of the file, when it was read
    checkpoint: Checkpoint
    results: dict[str, Any] | None

    @property
    def name(self) -> str:
        """The repository's default name."""
        return self.checkpoint.recipe.name or self.path.stem

    @property
    def title(self) -> str:
        """For the commit."""
        step = self.checkpoint.origin.get("step")
        return f"{self.name} at step {step:,}" if isinstance(step, int) else self.name


def newest_run(root: Path = Path("runs")) -> Path:
    """The run folder whose weights are newest."""
    found = sorted(root.glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise AlphaflowError(f"{root}/: no run with weights to push. Train one, or name it: alphaflow push RUN")
    return found[-1].parent


def open_publication(address: Path, *, with_results: bool) -> Publication:
    """A run folder or a checkpoint; results that belong to other weights are refused here, before anything is sent."""
    path = find_checkpoint(str(address))
    run = address if address.is_dir() else None
    if run is not None:
        see_own(run, path)
    sha256, checkpoint = sha256_of(path), load_checkpoint(path)
    _see_same(path, sha256, path)
    return Publication(run, path, sha256, checkpoint, _results(run, path, sha256) if run and with_results else None)


def see_own(run: Path, path: Path) -> None:
    """Of a run folder only its own regular files are published: a link may lead to anything on this machine."""
    if not path.is_file() or not path.resolve().is_relative_to(run.resolve()):
        raise AlphaflowError(
            f"{path}: not a file of this run, but a link that leads out of it. Nothing was published; put the file "
            "itself there, or remove the link."
        )


def _see_same(path: Path, sha256: str, original: Path) -> None:
    """A run that still trains replaces its weights: steps and scores of others must not be told of these."""
    if sha256_of(path) != sha256:
        raise AlphaflowError(f"{original}: changed while it was read; is it training? Run the same command again.")


def stage(
    source: Publication, folder: Path, *, repo: str, licence: str, autoencoder: Path | None = None
) -> dict[str, int]:
    """Fill `folder` for the repository user/repo, with the autoencoder given or found; returns its files' sizes."""
    if folder.resolve() == source.path.parent.resolve():
        raise AlphaflowError(f"{folder}: the weights to publish lie there. Give another folder.")
    if not is_repository(repo):  # made of the recipe's name, perhaps
        raise AlphaflowError(f"{repo}: not a name the Hub takes. Give one: alphaflow push RUN user/name")
    decoder = local_autoencoder(source, autoencoder)
    prepare_folder(folder)
    remove_stale(folder)
    clean = _clean(source.checkpoint, packaged=decoder is not None)
    recipe, parameters = clean.recipe, parameter_count(clean.recipe)
    _write(folder / CONFIG, config_json(recipe, clean.origin, parameters))  # first: by it the folder is known as ours
    if decoder is not None:
        _package_autoencoder(decoder, folder / AUTOENCODER, source)
    sha256 = _write_model(source, clean, folder / MODEL)
    _write(folder / "recipe.yaml", dump_recipe(recipe))
    results = scrub(source.results)
    if results:
        text = json.dumps(results, indent=1, ensure_ascii=False).replace(source.sha256, sha256)
        _write(folder / "results.json", text + "\n")
    _write(folder / "alpha.png", to_png(recipe_chart(recipe)))
    _write(folder / "samples.png", _samples(source, folder / MODEL))
    facts = CardFacts(repo, recipe, clean.origin, parameters, results, licence)
    _write(folder / "README.md", model_card(facts))
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}


def _write_model(source: Publication, clean: Checkpoint, model: Path) -> str:
    """The file as it is where nothing is private, else the cleaned one; returns its sha256."""
    same = (clean.recipe, clean.origin) == (source.checkpoint.recipe, source.checkpoint.origin)
    if not same or not _is_bare(source):
        save_checkpoint(model, clean)
        return sha256_of(model)
    write_atomically(model, partial(shutil.copyfile, source.path))
    try:
        _see_same(model, source.sha256, source.path)
    except AlphaflowError:
        model.unlink()
        raise
    return source.sha256


def _is_bare(source: Publication) -> bool:
    """Whether the file holds nothing but what was read of it: no other metadata or tensor, no comment in the recipe."""
    with safe_open(source.path, framework="pt") as file:
        metadata, names = file.metadata() or {}, set(file.keys())
    wanted = {f"net.{name}" for name in source.checkpoint.weights} | {"latents.mean", "latents.std"}
    recipe = dump_recipe(source.checkpoint.recipe)
    return set(metadata) == {"format", "recipe", "origin"} and metadata["recipe"] == recipe and names == wanted


def _write(path: Path, content: str | bytes) -> None:
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content  # names may be no UTF-8
    write_atomically(path, partial(_put, data))


def _put(data: bytes, path: Path) -> None:
    path.write_bytes(data)


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
    recipe = replace(recipe, name=scrub(recipe.name), data=data, eval=evaluation)
    begun = str(origin.get("init_from") or "")
    if begun and not is_repository(begun.partition("@")[0].partition(":")[0]):
        origin = origin | {"init_from": last_part(begun)}
    return replace(checkpoint, recipe=recipe, origin=origin)


def _autoencoder_record(checkpoint: Checkpoint) -> dict[str, Any]:
    record, said = checkpoint.origin.get("autoencoder") or {}, checkpoint.recipe.data.autoencoder
    return record | {"id": str(record.get("id") or said)}


def local_autoencoder(source: Publication, given: Path | None) -> Path | None:
    """The autoencoder that has to go along: the one given, else beside the checkpoint, else from here. None: it is the
    Hub's, or there is none."""
    name, said = _autoencoder_record(source.checkpoint)["id"], source.checkpoint.recipe.data.autoencoder
    if name == "none":
        if given:
            raise AlphaflowError(f"--autoencoder {given}: this model makes pixels without a decoder; leave it out.")
        return None
    on_hub = HUB_ID.fullmatch(name)
    names = [name] if on_hub or said == "none" else [name, said]
    places = [place for each in names for place in (source.path.parent / each, Path(each).expanduser())]
    found = given or next((place for place in places if place.is_file() or (place / CONFIG).is_file()), None)
    if found is None and not on_hub:
        raise AlphaflowError(
            f"{source.path}: its latents are of the autoencoder {Path(name).name}, which is none of the Hub's and not "
            "found here. It has to go along: --autoencoder DIR (or its weights file)."
        )
    return found


def _package_autoencoder(place: Path, target: Path, source: Publication) -> None:
    """Any form of it becomes a folder of safetensors; its weights are those that made the latents."""
    found = load_autoencoder(str(place), device=torch.device("cpu"))
    check_autoencoder(found, _autoencoder_record(source.checkpoint))
    module: Any = found.module
    module.save_pretrained(target, safe_serialization=True)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)  # the folder it was loaded from
    _write(target / "config.json", json.dumps(scrub(config), indent=2) + "\n")


def _results(run: Path, checkpoint: Path, ours: str) -> dict[str, Any] | None:
    """results.json, if its numbers were measured on these very weights."""
    path = run / "results.json"
    if not path.is_file():
        return None
    see_own(run, path)
    results = read_results(path, advice=f"Measure again: alphaflow eval {run}; or push --without-results")
    rows = result_rows(results)
    for row in rows:
        theirs = str((row.get("pictures") or {}).get("checkpoint_sha256") or "")
        if theirs != ours:
            raise AlphaflowError(
                f"{path}: {row.get('name')} was measured on other weights ({theirs[:12] or 'not said which'}) than "
                f"{checkpoint.name} holds ({ours[:12]}). Measure again: alphaflow eval {run}; or push --without-results"
            )
    return results if rows else None


def _samples(source: Publication, model: Path) -> bytes:
    """The run's own grid of these weights, else one by the file that is published."""
    recipe, step = source.checkpoint.recipe, source.checkpoint.origin.get("step")
    if source.run is not None and isinstance(step, int):
        drawn = source.run / "samples" / f"{step_name(step)}.png"
        if drawn.exists():
            see_own(source.run, drawn)
            return plain_png(drawn)
    generator = open_generator(str(model), device=best_device())
    rows, columns = GRID
    seeds, classes = list(range(rows * columns)), recipe.data.classes
    labels = [seed % classes if classes else 0 for seed in seeds]
    walk = plan_walk(recipe, nfe=recipe.sample.nfe)
    pictures = generator.images(seeds, labels, walk).permute(0, 2, 3, 1).cpu().numpy()
    return grid_in_rows(list(pictures), columns)
