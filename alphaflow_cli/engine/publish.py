"""From a run or a checkpoint to the folder that goes to the Hub: no secret, no optimiser state, no machine's path."""

import json
import re
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from alphaflow_cli.engine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from alphaflow_cli.engine.curves import recipe_chart
from alphaflow_cli.engine.files import write_atomically
from alphaflow_cli.engine.generate import best_device, find_checkpoint, open_generator
from alphaflow_cli.engine.plan import parameter_count
from alphaflow_cli.engine.state import step_name
from alphaflow_cli.engine.walk import plan_walk
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.hub.card import CardFacts, model_card, result_rows
from alphaflow_cli.hub.config import config_json
from alphaflow_cli.nn.weights import sha256_of
from alphaflow_cli.recipe import Recipe, dump_recipe
from alphaflow_cli.report.grid import grid_png
from alphaflow_cli.report.png import to_png

AUTOENCODER = "autoencoder"  # its folder in the repository, where it is not one of the Hub's
AUTOENCODER_FILES = ("config.json", "*.safetensors")
GRID = (4, 8)  # rows and columns of a sample grid drawn for the card
LOCAL_PATH = re.compile(r"(?<![\w/:.<>])(?:~|[A-Za-z]:\\|/(?=[\w.]))[^\s\"',;:()]*")


@dataclass(frozen=True)
class Source:
    """What is to be published, read and found sound."""

    run: Path | None  # its run folder, where it is one
    path: Path
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


def open_source(address: Path, *, with_results: bool) -> Source:
    """A run folder or a checkpoint; results that belong to other weights are refused here, before anything is sent."""
    path = find_checkpoint(str(address))
    checkpoint = load_checkpoint(path)
    run = address if address.is_dir() else None
    return Source(run, path, checkpoint, _results(run, path) if run and with_results else None)


def stage(source: Source, folder: Path, *, repo: str, licence: str) -> dict[str, int]:
    """Fill `folder` for the repository user/repo; returns its files' sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    clean = _clean(source.checkpoint, source.path, folder)
    recipe, parameters, model = clean.recipe, parameter_count(clean.recipe), folder / "model.safetensors"
    if (clean.recipe, clean.origin) == (source.checkpoint.recipe, source.checkpoint.origin):
        shutil.copyfile(source.path, model)
    else:
        save_checkpoint(model, clean)
    _write(folder / "recipe.yaml", dump_recipe(recipe))
    _write(folder / "config.json", config_json(recipe, clean.origin, parameters))
    results = scrub(source.results)
    if results:
        text = json.dumps(results, indent=1, ensure_ascii=False).replace(sha256_of(source.path), sha256_of(model))
        _write(folder / "results.json", text + "\n")
    _write(folder / "alpha.png", to_png(recipe_chart(recipe)))
    _write(folder / "samples.png", _samples(source))
    facts = CardFacts(repo, recipe, clean.origin, parameters, results, licence)
    _write(folder / "README.md", model_card(facts))
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}


def _write(path: Path, content: str | bytes) -> None:
    data = content.encode() if isinstance(content, str) else content
    write_atomically(path, partial(_put, data))


def _put(data: bytes, path: Path) -> None:
    path.write_bytes(data)


def scrub(value: Any) -> Any:
    """Every path of this machine becomes its last part, wherever it stands in a tree of plain values."""
    if isinstance(value, dict):
        return {scrub(key): scrub(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrub(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~")):
        return Path(value).name
    for known in sorted({str(Path.home()), str(Path.cwd())} - {"/"}, key=len, reverse=True):
        value = value.replace(known + "/", "")
    return LOCAL_PATH.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], value)


def _clean(checkpoint: Checkpoint, path: Path, folder: Path) -> Checkpoint:
    """The same weights; recipe and origin without paths, a local autoencoder under its name in the repository."""
    recipe, origin = checkpoint.recipe, scrub(checkpoint.origin)
    beside = local_autoencoder(recipe, path)
    if beside is not None:
        _copy_autoencoder(beside, folder / AUTOENCODER)
        recipe = replace(recipe, data=replace(recipe.data, autoencoder=AUTOENCODER))
        origin = origin | {"autoencoder": (origin.get("autoencoder") or {}) | {"id": AUTOENCODER, "revision": ""}}
    data = replace(recipe.data, store=scrub(recipe.data.store), autoencoder=scrub(recipe.data.autoencoder))
    recipe = replace(recipe, data=data, eval=replace(recipe.eval, reference=scrub(recipe.eval.reference)))
    return replace(checkpoint, recipe=recipe, origin=origin)


def local_autoencoder(recipe: Recipe, checkpoint: Path) -> Path | None:
    """The folder of an autoencoder that is none of the Hub's: beside the checkpoint, else from here."""
    name = recipe.data.autoencoder
    if name == "none":
        return None
    places = [checkpoint.parent / name, Path(name).expanduser()]
    return next((place for place in places if place.is_dir()), None)


def _copy_autoencoder(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for path in (path for pattern in AUTOENCODER_FILES for path in source.glob(pattern)):
        shutil.copyfile(path, target / path.name)


def _results(run: Path, checkpoint: Path) -> dict[str, Any] | None:
    """results.json, if its numbers were measured on these very weights."""
    path = run / "results.json"
    if not path.is_file():
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        rows = result_rows(results)
    except (ValueError, AttributeError) as error:
        raise AlphaflowError(f"{path}: cannot be read ({error}). Measure again: alphaflow eval {run}") from error
    ours = sha256_of(checkpoint)
    for row in rows:
        theirs = str((row.get("pictures") or {}).get("checkpoint_sha256") or "")
        if theirs != ours:
            raise AlphaflowError(
                f"{path}: {row.get('name')} was measured on other weights ({theirs[:12] or 'not said which'}) than "
                f"{checkpoint.name} holds ({ours[:12]}). Measure again: alphaflow eval {run}; or push --without-results"
            )
    return results if isinstance(results, dict) and rows else None


def _samples(source: Source) -> bytes:
    """The run's own grid of these weights, else a new one."""
    recipe, step = source.checkpoint.recipe, source.checkpoint.origin.get("step")
    if source.run is not None and isinstance(step, int):
        drawn = source.run / "samples" / f"{step_name(step)}.png"
        if drawn.is_file():
            return drawn.read_bytes()
    generator = open_generator(str(source.path), device=best_device())
    rows, columns = GRID
    seeds, classes = list(range(rows * columns)), recipe.data.classes
    labels = [seed % classes if classes else 0 for seed in seeds]
    walk = plan_walk(recipe, nfe=recipe.sample.nfe)
    pictures = generator.images(seeds, labels, walk).permute(0, 2, 3, 1).cpu().numpy()
    return grid_png([list(pictures[i * columns : (i + 1) * columns]) for i in range(rows)])
