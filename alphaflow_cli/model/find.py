"""Where checkpoints lie: their names in a run folder, the newest of a run, the file that an address means.

And which class of a checkpoint a word means. Nothing here needs torch, so that a slip is answered at once.
"""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from shlex import quote

from alphaflow_cli.documents import Anything, ListOf, Maybe, Table, Text, parse_json
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import is_there, user_path
from alphaflow_cli.recipe import recipe_from_text
from alphaflow_cli.recipe.plan import label_rows
from alphaflow_cli.recipe.schema import Recipe
from alphaflow_cli.remote.address import Repo, parse_address
from alphaflow_cli.text import shorten

MOST_LOOKED_AT, LIKENESS = 1000, 0.75  # names of a folder, and how alike two are before one is taken for a slip
MOST_NAMED = 5  # runs in a message


def step_name(step: int) -> str:
    """The name of what belongs to a step, such as `step-00001000`: names sort as their steps do."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step that such a name tells, the inverse of step_name."""
    return int(path.stem.removeprefix("step-"))


def saved_steps(folder: Path, suffix: str = "") -> list[Path]:
    """What we saved in this folder, by step. Copies that somebody made (`step-00000100 (1)`) are left alone."""
    named = [path for path in folder.glob(f"step-*{suffix}") if path.stem[5:].isdecimal() and path.suffix == suffix]
    return sorted((path for path in named if path.stem == step_name(step_of(path))), key=step_of)


def best_name(nfe: int) -> str:
    """The file at the top of a run that keeps its best checkpoint at so many evaluations: best-nfe1.safetensors."""
    return f"best-nfe{nfe}.safetensors"


def nfe_of_best(path: Path) -> int | None:
    """The number of evaluations that such a name tells, the inverse of best_name; None for any other file."""
    match = re.fullmatch(r"best-nfe([1-9][0-9]{0,5})\.safetensors", path.name)
    return int(match[1]) if match else None


def checkpoint_folders(run: Path) -> list[Path]:
    """The checkpoints that a run kept, by step."""
    return [path for path in saved_steps(run / "checkpoints") if path.is_dir()]


def nearby(path: Path) -> str:
    """A run or checkpoint here whose path is nearly this one, for a message; empty where there is none."""
    folders = [path.parent]
    if not path.parent.is_dir():
        folders = [path.parent.with_name(name) for name in alike(path.parent.name, path.parent.parent)]
    elif path.parent == Path():
        folders = [Path(), Path("runs")]
    places = (folder / name for folder in folders for name in alike(path.name, folder))
    models = (place for place in places if place.suffix == ".safetensors" or (place / "recipe.yaml").is_file())
    return str(next(models, ""))


def runs_in(folder: Path) -> list[str]:
    """The runs in a folder such as ./runs, the newest first, as many as a message takes."""
    try:
        runs = [path for path in islice(folder.iterdir(), MOST_LOOKED_AT) if (path / "recipe.yaml").is_file()]
        return [str(path) for path in sorted(runs, key=lambda path: path.stat().st_mtime, reverse=True)[:MOST_NAMED]]
    except OSError:
        return []


def instead_of(folder: Path) -> str:
    """What to do where a folder is no run with weights: the run that it is a part of, the runs in it, or to train."""
    parts_of = [above for above in folder.parents if (above / "recipe.yaml").is_file()]
    if parts_of and (parts_of[0] / "checkpoints").is_dir():
        return f"It is a part of the run {parts_of[0]}: give that."
    if runs := runs_in(folder):
        return f"Runs in it: {', '.join(runs)}"
    has_others = folder.is_dir() and any(folder.iterdir()) and not (folder / "recipe.yaml").is_file()
    return f"Make one: alphaflow train RECIPE --out {'RUN' if has_others else quote(str(folder))}"


def alike(name: str, folder: Path, *, likeness: float = LIKENESS) -> list[str]:
    """The names in a folder that this one may be a slip of, the likeliest first."""
    try:
        there = [entry.name for entry in islice(folder.iterdir(), MOST_LOOKED_AT)]
    except OSError:
        return []
    return get_close_matches(name, there, cutoff=likeness)


def check_address(address: str) -> None:
    """Refuse a path that leads nowhere, without loading anything; a slip is answered before the Hub is asked."""
    place = parse_address(address)
    if isinstance(place, Path) and is_there(place):
        if place.is_dir():
            find_checkpoint(address)  # it says what is missing
        return
    slip = "" if any(mark in address for mark in "@:") else nearby(user_path(address))
    if slip:
        hub = f" (A model of that name on the Hub: hf://{address})" if isinstance(place, Repo) else ""
        raise AlphaflowError(f"{address}: no such run or checkpoint here. Did you mean {slip}?{hub}")
    if isinstance(place, Path):
        raise AlphaflowError(f"{address}: no such checkpoint. Give a run folder, a .safetensors file, or user/repo.")


def check_named_classes(address: str, classes: str) -> None:
    """Refuse classes that a checkpoint on this machine does not have, by its header alone."""
    path = user_path(address)
    if not classes or not path.exists():
        return
    from alphaflow_cli.tensors import open_tensors  # numpy comes with it

    file = find_checkpoint(address) if path.is_dir() else path
    metadata = open_tensors(file).metadata
    if {"recipe", "origin"} <= metadata.keys():  # else it is no checkpoint of ours, and its reader says so
        named = Table(optional={"class_names": Maybe(ListOf(Text(1000)))}, others=Anything())
        where, advice = f"{file} (its origin)", "It was not written by alphaflow."
        origin = parse_json(metadata["origin"], where, named, advice=advice)
        recipe = recipe_from_text(metadata["recipe"], f"{file} (its recipe)")
        find_classes(recipe, classes, origin.get("class_names") or [])


def find_classes(recipe: Recipe, text: str, names: Sequence[str]) -> list[int]:
    """The numbers of the classes that `--classes` names."""
    if label_rows(recipe) == 0:
        raise AlphaflowError("--classes: this model was trained without labels.")
    return [find_class(part.strip(), names, recipe.data.classes) for part in text.split(",")]


def find_class(text: str, names: Sequence[str], count: int, *, where: str = "--classes") -> int:
    """A class by its number, or by its name or one of its names; `where` is what an error names."""
    if text.isdecimal() and len(text) < 20 and int(text) < count:
        return int(text)
    matches = [i for i, name in enumerate(names) if text.lower() in (part.strip().lower() for part in name.split(","))]
    if len(matches) == 1:
        return matches[0]
    if matches:
        listed = ", ".join(map(str, matches[:12])) + (", …" if len(matches) > 12 else "")
        raise AlphaflowError(f"{where} {shorten(text, 100)}: the name of several classes: {listed}. Give a number.")
    known = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    raise AlphaflowError(
        f"{where} {shorten(text, 100)}: not a class of this model: 0 to {count - 1}" + (f", {known}" if names else "")
    )


def check_run(run: Path) -> None:
    """Refuse a folder that is no run, without loading anything."""
    if not (run / "recipe.yaml").exists():
        slip = nearby(run)
        advice = f"Did you mean {slip}?" if slip else instead_of(run)
        raise AlphaflowError(f"{run}: not a run folder (no recipe.yaml in it). {advice}")


def is_checkpoint(text: str) -> bool:
    """Whether the text names a weights file, a run folder or a model on the Hub, and not a source of pictures."""
    path = user_path(text)
    if path.is_dir():
        begun = path / "recipe.yaml"  # a run, whose first checkpoint may be hours away
        return begun.is_file() or (path / "model.safetensors").is_file() or (path / "checkpoints").is_dir()
    if text.startswith("hf://"):
        return not text.startswith("hf://datasets/")
    if path.exists() or ":" in text:
        return path.suffix == ".safetensors"
    return path.suffix == ".safetensors" or (text.count("/") == 1 and not text.startswith((".", "/", "~")))


def model_name(address: str, recipe: Recipe, *, unnamed: str = "checkpoint") -> str:
    """What to call a model: as its run's folder, for several runs may be of one recipe; else as its recipe."""
    run = run_folder(address)
    return run.resolve().name if run else recipe.name or unnamed


def default_grid(address: str) -> Path:
    """Where a grid goes when nobody says where: into the run; beside a checkpoint file; else here."""
    path = user_path(address)
    if run := run_folder(address):
        return run / "grid.png"
    if path.exists():
        return path / "grid.png" if path.is_dir() else path.with_name(f"{path.stem}-grid.png")
    return Path(f"{re.split('[@:]', address.removeprefix('hf://'))[0].split('/')[-1]}-grid.png")


def find_checkpoint(address: str, *, weights: str = "ema") -> Path:
    """A file, a run folder (its newest), or an address on the Hub."""
    path = user_path(address)
    if path.is_dir():
        name = "model.safetensors" if weights == "ema" else "raw.safetensors"
        files = [*(folder / name for folder in checkpoint_folders(path)), path / name]
        there = [file for file in files if file.exists()]
        if not there:
            raise AlphaflowError(f"{path}: no checkpoint in this folder yet. {instead_of(path)}")
        return there[-1]
    check_address(address)
    from alphaflow_cli.remote.download import resolve_checkpoint

    return resolve_checkpoint(address)


def run_folder(address: str) -> Path | None:
    """The run that a checkpoint belongs to: RUN, RUN/model.safetensors, RUN/checkpoints/step-N/model.safetensors."""
    path = user_path(address)
    folder = path if path.is_dir() else path.parent
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    return run if path.exists() and (run / "recipe.yaml").is_file() else None
