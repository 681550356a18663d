"""A run folder's files: what is published, what resumes it, and the order that survives a kill at any moment.

    checkpoints/step-N/model.safetensors   the first average; ema-H.safetensors the others, raw.safetensors the weights
    state/step-N.safetensors               everything a resumed run needs, in one file
    model.safetensors                      the newest checkpoint's model

The checkpoint is renamed into place before the state that counts on it, the state before older ones go, and folders
are renamed away before they are deleted. So the newest readable state always belongs to a whole checkpoint.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from alphaflow_cli.engine.checkpoint import Checkpoint, save_checkpoint
from alphaflow_cli.engine.files import sync, write_atomically
from alphaflow_cli.engine.progress import say
from alphaflow_cli.errors import AlphaflowError

STATE_FORMAT = "alphaflow-state/1"


def step_name(step: int) -> str:
    """`step-00001000`: sorts as text."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step in a name."""
    return int(path.stem.removeprefix("step-"))


def sweep(run: Path) -> None:
    """Remove what an interrupted save or deletion left behind."""
    for leftover in [*run.glob(".*.tmp"), *run.glob("*/.*.tmp"), *run.glob("*/.trash-*")]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def save_models(run: Path, step: int, models: dict[str, Checkpoint]) -> None:
    """checkpoints/step-N/ with its files, all at once; then the newest model at the top of the run."""
    folder = run / "checkpoints" / step_name(step)
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise AlphaflowError(f"{folder}: cannot be written: {error.strerror}. What was there is kept.") from error
    try:
        for name, checkpoint in models.items():
            save_checkpoint(temporary / name, checkpoint)
    except AlphaflowError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(temporary)
    discard(folder)  # a step saved twice: after a roll back, or a state that was lost
    temporary.rename(folder)
    sync(folder.parent)
    publish(run, folder / "model.safetensors")


def publish(run: Path, model: Path) -> None:
    """RUN/model.safetensors becomes this file: a hard link where the file system has them, else a copy."""

    def link(target: Path) -> None:
        target.unlink(missing_ok=True)
        try:
            target.hardlink_to(model)
        except OSError:
            shutil.copyfile(model, target)

    write_atomically(run / "model.safetensors", link)


def save_state(run: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """state/step-N.safetensors; older states go once it is there."""
    folder = run / "state"
    folder.mkdir(exist_ok=True)
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": STATE_FORMAT, "facts": json.dumps(facts | {"step": step}, sort_keys=True)}
    path = folder / f"{step_name(step)}.safetensors"
    write_atomically(path, partial(save_file, ready, metadata=metadata))
    for old in folder.glob("step-*.safetensors"):
        if step_of(old) != step:
            old.unlink()


def prune(run: Path, *, keep: int, milestone_every: int) -> None:
    """Keep the newest checkpoints and the milestones."""
    folders = sorted((run / "checkpoints").glob("step-*"))
    for folder in folders[: -keep or None]:
        if not (milestone_every and step_of(folder) % milestone_every == 0):
            discard(folder)


def discard(folder: Path) -> None:
    """Rename away, then delete: a kill in between leaves no half a checkpoint."""
    if folder.exists():
        trash = folder.with_name(f".trash-{folder.name}")
        shutil.rmtree(trash, ignore_errors=True)
        folder.rename(trash)
        shutil.rmtree(trash)


def newest_state(run: Path) -> Path | None:
    """The newest state file, None before the first save; one that cannot be read is named, and an older one taken."""
    fault = None
    for path in sorted((run / "state").glob("step-*.safetensors"), reverse=True):
        try:
            read_facts(path)
        except AlphaflowError as error:
            say(f"warning: {error}")
            fault = fault or error
            continue
        return path
    if fault is not None:  # beginning anew would throw the journal away
        raise AlphaflowError(
            f"{fault} There is no other to resume from. Go on from the weights: --init-from {run} with another --out, "
            f"or remove {run / 'state'} to begin anew."
        )
    return None


def read_facts(path: Path) -> dict[str, Any]:
    """What a state says of itself, without its tensors; a truncated file is named."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise AlphaflowError(f"{path}: truncated or not a state of a run: {error}.") from error
    if metadata.get("format") != STATE_FORMAT:
        raise AlphaflowError(f"{path}: not a state of a run (format {metadata.get('format')!r}).")
    facts: dict[str, Any] = json.loads(metadata["facts"])
    return facts


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a state."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
