"""A folder that a published model is written into: new, empty, or from an earlier push or pull. Nothing else."""

from collections.abc import Iterable
from pathlib import Path

from alphaflow_cli.documents import Anything, Table, Text, read_json
from alphaflow_cli.errors import AlphaflowError

MODEL = "model.safetensors"
AUTOENCODER = "autoencoder"  # the folder of one that is none of the Hub's
CONFIG = "config.json"
OURS = (MODEL, CONFIG, "recipe.yaml", "README.md", "results.json", "samples.png", "alpha.png", AUTOENCODER)
OUR_CONFIG = Table(
    {"model_type": Text(one_of=("alphaflow",)), "format": Text(100, form="alphaflow/.+")}, others=Anything()
)
NOT_ALWAYS = ("results.json", f"{AUTOENCODER}/*")  # removed where the new version has none


def prepare_folder(folder: Path, *, also: Iterable[str] = ()) -> None:
    """Make it. One that holds something else is refused; `also` names files that may be there beside ours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    except OSError as fault:
        raise AlphaflowError(f"{folder}: cannot be made a folder ({fault.strerror}). Give another.") from fault
    foreign = sorted(names - {*OURS, *also})
    if names and (foreign or not is_published(folder / CONFIG)):
        raise AlphaflowError(
            f"{folder}: holds {', '.join((foreign or sorted(names))[:3])}, not only what a push or pull wrote. "
            "Nothing was overwritten; give a new or an empty folder."
        )


def remove_stale(folder: Path, kept: Iterable[str] = ()) -> None:
    """Results and an autoencoder of an earlier version go; `kept` names those that the new one has."""
    left = set(kept)
    for path in [path for pattern in NOT_ALWAYS for path in folder.glob(pattern)]:
        if path.is_file() and path.relative_to(folder).as_posix() not in left:
            path.unlink()


def is_published(config: Path) -> bool:
    """Whether an earlier push wrote this config.json: of any other, nothing is relied on."""
    try:
        read_json(config, OUR_CONFIG, limit=1 << 20)
    except AlphaflowError:
        return False
    return True
