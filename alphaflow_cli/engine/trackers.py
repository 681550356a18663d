"""TensorBoard, Weights & Biases and trackio, through Accelerate, beside metrics.jsonl. Only the first process writes.

What they write lies in RUN/trackers. A resumed run goes on in the same W&B or trackio run: its id is kept there.
"""

import os
import secrets
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from alphaflow_cli.engine.files import read_document
from alphaflow_cli.engine.measure import make_folder
from alphaflow_cli.engine.world import World
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe.schema import Recipe


def check_trackers(recipe: Recipe) -> None:
    """A package that is missing is named; Accelerate would only warn and track nothing."""
    missing = [name for name in recipe.train.trackers if find_spec(name) is None]
    if missing:
        raise AlphaflowError(
            f"train.trackers: {', '.join(missing)} cannot be imported. "
            f"Run: pip install 'alphaflow[{','.join(missing)}]', or do without: --set train.trackers=[]"
        )


class Trackers:
    """The recipe's trackers, if any; `join_world` has told Accelerate their names."""

    def __init__(self, recipe: Recipe, world: World, folder: Path, step: int) -> None:
        self.world, self.names = world, recipe.train.trackers if world.is_main else ()
        if not self.names:
            return
        home = folder / "trackers"
        make_folder(home)
        os.environ.setdefault("TRACKIO_DIR", str(home.resolve() / "trackio"))
        run = {"name": folder.name, "resume": "allow"}
        options = {
            "tensorboard": {"purge_step": step + 1},  # rows past the step where we resume are forgotten
            "wandb": {**run, "id": _run_id(home / "id"), "dir": str(home)},
            "trackio": run,
        }
        config = None if step else flat(asdict(recipe))
        world.accelerator.init_trackers("alphaflow", config, {name: options[name] for name in self.names})

    def log(self, row: dict[str, Any]) -> None:
        """The numbers of a journal row."""
        if self.names:
            numbers = {name: value for name, value in flat(row).items() if isinstance(value, int | float)}
            self.world.accelerator.log(numbers, step=row["step"])

    def close(self) -> None:
        """Flush; the process group stays."""
        for tracker in self.world.accelerator.trackers if self.names else ():
            tracker.finish()


def flat(tree: dict[str, Any], head: str = "") -> dict[str, Any]:
    """Nested names joined by dots, list items numbered; values that are no number, truth or text as text."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, list) and head == "" and not isinstance(value, str):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, dict):
            found |= flat(value, f"{head}{name}.")
        elif value is not None:
            found[head + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


def _run_id(path: Path) -> str:
    """Drawn once per run."""
    if not path.exists():
        path.write_text(secrets.token_hex(8), encoding="utf-8")
    return read_document(path).strip()
