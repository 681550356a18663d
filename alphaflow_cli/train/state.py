"""A run folder's files: what is published, what resumes it, and the order that survives a kill at any moment.

    checkpoints/step-N/model.safetensors   the first average; ema-H.safetensors the others, raw.safetensors the weights
    state/step-N.safetensors               everything a resumed run needs, in one file, with its own checksum
    model.safetensors                      the newest checkpoint's model; best-nfeN.safetensors that of a best score

The checkpoint is renamed into place before the state that counts on it, the state before older ones go, and folders
are renamed away before they are deleted. So the newest readable state always belongs to a whole checkpoint.
"""

import json
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import check_regular, sync, write_by
from alphaflow_cli.model.checkpoint import Checkpoint, save_checkpoint
from alphaflow_cli.model.find import checkpoint_folders, saved_steps, step_name, step_of
from alphaflow_cli.runtime.progress import say
from alphaflow_cli.tensors import SEAL, save_tensors, seal_holds
from alphaflow_cli.text import for_terminal

STATE_FORMAT = "alphaflow-state/2"
WITHOUT_CHECKSUM = "alphaflow-state/1"  # read for ever, with a line that says so
OWN_NAMES = ("model.safetensors", "best-nfe*.safetensors", "recipe.yaml", "metrics.jsonl", "write")
OWN_FILES = tuple(f".{name}.*tmp" for name in OWN_NAMES)  # of training


@dataclass(frozen=True)
class StateFacts:
    """What a state records beside its tensors."""

    step: int
    retries: int  # rolls back so far
    accumulation: int  # micro-batches of a step
    processes: int
    store: str  # the latent store's digest
    init_from: str  # the checkpoint whose weights the run began with, if any
    compiled: bool | None = None  # what train.compile: auto has decided; None where the recipe decides
    graphs: bool | None = None  # the same of train.graphs; None in states of earlier versions too: launched
    threads: int | None = None  # that compute on a CPU; None on a GPU, and in states of earlier versions


def state_file(run: Path, step: int) -> Path:
    """Where the state of a step lies: state/step-N.safetensors."""
    return run / "state" / f"{step_name(step)}.safetensors"


def sweep(run: Path) -> None:
    """Remove what an interrupted save or deletion of this run left behind; other commands' files are theirs."""
    ours = [left for name in ("checkpoints", "state", "samples") for left in (run / name).glob(".*")]
    leftovers = [left for left in ours if left.name.endswith(".tmp") or left.name.startswith(".trash-")]
    for leftover in leftovers + [left for pattern in OWN_FILES for left in run.glob(pattern)]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def save_models(run: Path, step: int, models: dict[str, Checkpoint]) -> None:
    """Write checkpoints/step-N/ with its files, all at once; then put the newest model at the top of the run."""
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


def publish(run: Path, model: Path, name: str = "model.safetensors") -> None:
    """Make RUN/model.safetensors, or another name, this file: a hard link where the file system has them, or a copy."""

    def link(target: Path) -> None:
        target.unlink(missing_ok=True)
        try:
            target.hardlink_to(model)
        except OSError:
            shutil.copyfile(model, target)

    write_by(run / name, link)


def save_state(run: Path, tensors: dict[str, Tensor], facts: StateFacts) -> None:
    """Write state/step-N.safetensors; older states go once it is there."""
    path = state_file(run, facts.step)
    path.parent.mkdir(exist_ok=True)
    metadata = {"format": STATE_FORMAT, "facts": json.dumps(asdict(facts), sort_keys=True)}
    save_tensors(path, tensors, metadata, sealed=True)
    for old in saved_steps(path.parent, ".safetensors"):
        if old != path and old.is_file():
            old.unlink()


def prune(run: Path, step: int, *, keep: int, milestone_every: int) -> None:
    """Remove all checkpoints but the newest `keep` up to this step and the milestones, one every so many steps.

    Later ones belong to work that was lost, and stay until the run comes to them: counted, they would push out its own.
    """
    for folder in [each for each in checkpoint_folders(run) if step_of(each) <= step][: -keep or None]:
        if not (milestone_every and step_of(folder) % milestone_every == 0):
            discard(folder)


def discard(folder: Path) -> None:
    """Rename away, then delete: a kill in between leaves no half a checkpoint.

    On a network's file system a file that a reader holds open cannot be deleted: it goes at the run's next start.
    """
    if folder.exists():
        trash = folder.with_name(f".trash-{folder.name}")
        shutil.rmtree(trash, ignore_errors=True)
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def newest_state(run: Path) -> Path | None:
    """The newest sound state, None before the first save; a damaged one is named, and an older one taken."""
    fault = None
    for path in reversed(saved_steps(run / "state", ".safetensors")):
        try:
            check_state(path)
        except AlphaflowError as error:
            say(f"warning: {error}")
            fault = fault or error
            continue
        if fault is not None:
            say(f"warning: {run}: going on from the older state of step {step_of(path):,}")
        return path
    if fault is not None:  # beginning anew would throw the journal away
        raise AlphaflowError(
            f"{fault} There is no other to resume from. Go on from the weights: --init-from {run} with another --out, "
            f"or remove {run / 'state'} to begin anew."
        )
    return None


def check_state(path: Path) -> None:
    """Refuse a state whose bytes are not those of its checksum; one of former versions has none, and a line says so."""
    facts = read_facts(path)
    with open_state(path) as file:
        sealed = SEAL in file.keys()  # noqa: SIM118 (safe_open is no mapping)
        former = (file.metadata() or {}).get("format") == WITHOUT_CHECKSUM
    if former and not sealed:
        if facts.step != step_of(path):
            raise AlphaflowError(f"{path}: damaged: by the facts stored in it, it belongs to step {facts.step:,}.")
        say(f"{path}: an earlier version saved it without a checksum, so its bytes cannot be checked")
    elif not (sealed and seal_holds(path)):
        raise AlphaflowError(f"{path}: damaged: its bytes changed since it was written (checksum).")


def open_state(path: Path) -> safe_open:
    """Open a state's file; refuse one that is truncated or something else."""
    check_regular(path)
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise AlphaflowError(f"{path}: truncated or not a state of a run: {for_terminal(error)}.") from error


def read_facts(path: Path) -> StateFacts:
    """Read what a state records of itself, without its tensors."""
    with open_state(path) as file:
        metadata = file.metadata() or {}
    if metadata.get("format") not in (STATE_FORMAT, WITHOUT_CHECKSUM):
        raise AlphaflowError(f"{path}: not a state of a run (format {metadata.get('format')!r}).")
    try:
        written = json.loads(metadata.get("facts", ""))
    except (ValueError, RecursionError):
        written = None
    kinds: dict[str, tuple[Any, ...]] = {each.name: (each.type,) for each in fields(StateFacts)}
    kinds |= {"compiled": (bool, type(None)), "graphs": (bool, type(None)), "threads": (int, type(None))}
    if not isinstance(written, dict) or any(type(written.get(name)) not in kind for name, kind in kinds.items()):
        raise AlphaflowError(f"{path}: damaged: what it says of itself cannot be read.")
    values: dict[str, Any] = {name: written.get(name) for name in kinds}
    return StateFacts(**values)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a state, without its seal."""
    with open_state(path) as file:
        return {name: file.get_tensor(name) for name in file.keys() if name != SEAL}  # noqa: SIM118
