"""From names of pictures to class labels.

The class of a picture is its folder, as a path below the folder that all pictures share. Class i is the i-th folder in
sorted order (ImageNet: sorted wnids, the order every published model uses), unless the source has a classes.json.
Where the shared folder holds the splits of a data set (train, val, test), train is taken.
"""

import json
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alphaflow_cli.errors import AlphaflowError

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval"}
_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Classes:
    """Folders and display names by index."""

    folders: list[str]
    names: list[str]

    @property
    def imagenet(self) -> bool:
        """The folders are ImageNet's."""
        return all(_WNID.fullmatch(folder) for folder in self.folders)

    def as_dict(self) -> dict[str, Any]:
        """As classes.json says it."""
        pairs = zip(self.folders, self.names, strict=True)
        return {folder: {"index": index, "name": name} for index, (folder, name) in enumerate(pairs)}


def choose_split(names: Sequence[str]) -> tuple[list[int], str]:
    """Lines of the pictures to take, and the prefix of their names that says nothing (it ends with / or is empty)."""
    shared = _shared_folder(names)
    below = {name[len(shared) :].split("/")[0] for name in names if "/" in name[len(shared) :]}
    train = next((part for part in below if part.lower() in ("train", "training")), None)
    if train is None or not {part.lower() for part in below} <= SPLITS:
        return list(range(len(names))), shared
    kept = [line for line, name in enumerate(names) if name.startswith(f"{shared}{train}/")]
    prefix = f"{shared}{train}/"
    return kept, prefix if len(below) > 1 else _shared_folder([names[line] for line in kept])


def folders_of(names: Sequence[str], prefix: str) -> list[str]:
    """The class folder of each name; '' for pictures directly under the prefix."""
    folders = [posixpath.dirname(name[len(prefix) :]) for name in names]
    loose = [name for name, folder in zip(names, folders, strict=True) if not folder]
    if loose and len(loose) < len(names):
        raise AlphaflowError(
            f"{len(loose)} pictures lie beside the class folders (the first: {loose[0]!r}); move them into one, or away"
        )
    return folders


def read_classes(folders: Sequence[str], given: bytes | None, order: Sequence[str] | None) -> Classes:
    """All classes: from classes.json, from the source's own order, or sorted."""
    found = sorted(set(folders))
    if order is not None:
        return Classes(list(order), list(order))
    if given is None:
        return Classes(found, [folder or "all" for folder in found])
    classes = _parse(given)
    missing = [folder for folder in found if folder not in classes.folders]
    if missing:
        raise AlphaflowError(f"classes.json: has no entry for the folder {missing[0]!r} ({len(missing)} missing)")
    return classes


def _parse(given: bytes) -> Classes:
    """A list of folders, {folder: index}, or {folder: {"index": i, "name": ...}}."""
    try:
        document = json.loads(given)
        if isinstance(document, list):
            document = {folder: index for index, folder in enumerate(document)}
        rows = sorted(_row(folder, entry) for folder, entry in document.items())
    except (ValueError, AttributeError, KeyError, TypeError) as fault:
        raise AlphaflowError(f"classes.json: should be {{folder: index}} or a list of folders ({fault})") from fault
    if [index for index, _, _ in rows] != list(range(len(rows))):
        raise AlphaflowError("classes.json: the indices should be 0, 1, 2, … without gaps or repeats")
    return Classes([folder for _, folder, _ in rows], [name for _, _, name in rows])


def _row(folder: str, entry: int | Mapping[str, Any]) -> tuple[int, str, str]:
    if isinstance(entry, Mapping):
        return int(entry["index"]), folder, str(entry.get("name", folder))
    return int(entry), folder, folder


def _shared_folder(names: Sequence[str]) -> str:
    """The longest folder that all names lie in, with its slash."""
    if not names:
        return ""
    first, last = min(names), max(names)
    parts = []
    for a, b in zip(first.split("/")[:-1], last.split("/")[:-1], strict=False):
        if a != b:
            break
        parts.append(a)
    return "".join(part + "/" for part in parts)
