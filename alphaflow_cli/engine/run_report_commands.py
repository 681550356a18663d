"""What a reader types to make a run again, for its page."""

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from alphaflow_cli.recipe import shipped
from alphaflow_cli.recipe.schema import Recipe
from alphaflow_cli.text import for_terminal


def commands_of(recipe: Recipe, run: Path, changes: Sequence[tuple[str, Any, Any]], init_from: str) -> list[str]:
    """Prepare, train, look, measure; `changes`: (field, there, here) against the shipped recipe of this name."""
    is_shipped, file = recipe.name in shipped(), f"{recipe.name or 'recipe'}.yaml"
    sets = [f"--set {name}={quote(shown(here))}" for name, _, here in changes if name != "name"] if is_shipped else []
    train = ["alphaflow train", recipe.name if is_shipped else quote(file), *sets]
    train += [f"--init-from {quote(init_from)}"] if init_from else []
    folder = quote(f"runs/{recipe.name or run.name}")
    prepare = []
    if not recipe.data.source:
        flips = " --flips" if recipe.data.flips else ""
        size, autoencoder = recipe.data.image_size, quote(recipe.data.autoencoder)
        prepare = [f"alphaflow prep-latents SOURCE --size {size} --autoencoder {autoencoder}{flips} --out DIR"]
        train.append("--data DIR")
    return [
        *([] if is_shipped else [f"# save the recipe above as {for_terminal(file)}"]),
        *prepare,
        " ".join(train),
        f"alphaflow sample {folder} --grid grid.png",
        f"alphaflow analyze {folder} --batches 100" + (" --data DIR" if prepare else ""),
        f"alphaflow report {folder}",
    ]


def shown(value: Any) -> str:
    """A recipe's value as `--set` takes it."""
    if isinstance(value, tuple):
        return "[" + ", ".join(shown(item) for item in value) + "]"
    plain = {None: "null", True: "true", False: "false"} if value is None or isinstance(value, bool) else {}
    return plain.get(value, str(value)) if plain else str(value) or '""'
