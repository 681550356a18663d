"""Where checkpoints lie: their names in a run folder, the newest of a run, the file that an address means."""

from pathlib import Path

from alphaflow_cli.errors import AlphaflowError


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


def checkpoint_folders(run: Path) -> list[Path]:
    """The checkpoints that a run kept, by step."""
    return [path for path in saved_steps(run / "checkpoints") if path.is_dir()]


def find_checkpoint(address: str, *, weights: str = "ema") -> Path:
    """A file, a run folder (its newest), or an address on the Hub."""
    path = Path(address).expanduser()
    if path.is_dir():
        if weights == "ema" and (path / "model.safetensors").exists():
            return path / "model.safetensors"
        name = "model.safetensors" if weights == "ema" else "raw.safetensors"
        kept = [folder / name for folder in checkpoint_folders(path) if (folder / name).exists()]
        checkpoints = [path / name] if (path / name).exists() else kept
        if not checkpoints:
            raise AlphaflowError(
                f"{path}: no checkpoint in this folder yet. Train one: alphaflow train RECIPE --out {path}"
            )
        return checkpoints[-1]
    from alphaflow_cli.remote.download import resolve_checkpoint

    return resolve_checkpoint(address)


def run_folder(address: str) -> Path | None:
    """The run that a checkpoint belongs to: RUN, RUN/model.safetensors, RUN/checkpoints/step-N/model.safetensors."""
    path = Path(address).expanduser()
    folder = path if path.is_dir() else path.parent
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    return run if path.exists() and (run / "recipe.yaml").is_file() else None
