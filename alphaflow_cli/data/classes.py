"""From names of pictures to class labels.

The class of a picture is its folder, as a path below the folder that all pictures share. Class i is the i-th folder in
sorted order (ImageNet: sorted wnids, the order every published model uses; folders whose names are all whole numbers
are sorted as numbers), unless the source has a classes.json.
Where the shared folder holds the splits of a data set (train, val, test), train is taken.
"""

import posixpath
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alphaflow_cli.data.manifest import AGAIN
from alphaflow_cli.documents import Anything, ListOf, Table, Text, check_shape, parse_json, read_json
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.text import brief, for_terminal

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval"}
AS_NUMBERS = "sorted as numbers"
FORM = "It should be {folder: index} or a list of folders."
WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Classes:
    """The classes' folders and display names by index, and in a few words why they stand in this order."""

    folders: list[str]
    names: list[str]
    order: str

    @property
    def imagenet(self) -> bool:
        """Whether the folders are named like ImageNet's."""
        return all(WNID.fullmatch(folder) for folder in self.folders)

    def summary(self) -> str:
        """Say how many classes there are, in which order, and which are the first and the last.

        Their numbers are what the network will know them by.
        """
        count = len(self.folders)
        what = f"1 class{f' ({self.order})' if self.folders == [''] else ''}"
        if count > 1:
            what = f"{count:,} classes{' (ImageNet)' if self.imagenet else ''}, {self.order}"
        shown = [
            f"{index} = {for_terminal(self.names[index], limit=200)}"
            for index in range(count)
            if index < 3 or index == count - 1
        ]
        return f"{what}: {', '.join([*shown[:3], *(['…'] if count > 4 else []), *shown[3:]])}"

    def as_dict(self) -> dict[str, Any]:
        """The content of a classes.json that gives these classes."""
        pairs = zip(self.folders, self.names, strict=True)
        return {folder: {"index": index, "name": name} for index, (folder, name) in enumerate(pairs)}


def choose_split(names: Sequence[str]) -> tuple[list[int], str]:
    """The lines of the pictures to take, and the prefix that all their names share (it ends with / or is empty)."""
    shared = _shared_folder(names)
    below = {name[len(shared) :].split("/")[0] for name in names if "/" in name[len(shared) :]}
    training = [part for part in below if part.lower() in ("train", "training")]
    train = min(training, key=lambda part: (part != "train", part), default=None)  # a set has no order of its own
    if train is None or not {part.lower() for part in below} <= SPLITS:
        return list(range(len(names))), shared
    kept = [line for line, name in enumerate(names) if name.startswith(f"{shared}{train}/")]
    prefix = f"{shared}{train}/"
    return kept, prefix if len(below) > 1 else _shared_folder([names[line] for line in kept])


def choose_files(files: Sequence[str], split: str = "") -> list[str]:
    """Of files that hold many pictures each, those of a named split, else of `train` where all names tell splits.

    A split is a part of a file's path: `train` of data/train-00000.parquet; `digits/train` needs both parts.
    """
    parts = {file: {*re.split(r"[/._-]", file), *file.split("/")} for file in files}
    if split:
        return [file for file in files if parts[file] >= set(split.split("/"))]
    splits = {file: {part.lower() for part in parts[file]} & SPLITS for file in files}
    training = [file for file in files if splits[file] & {"train", "training"}]
    return training if training and all(splits.values()) else list(files)


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
    """Number all classes: by classes.json, by the source's own order, or sorted."""
    ordered = sort_folders(set(folders))
    if order is not None:
        return Classes(list(order), list(order), "in the source's order")
    if given is None:
        way = AS_NUMBERS if _are_numbers(ordered) else "sorted by name"
        return Classes(ordered, [folder or "all" for folder in ordered], way)
    classes = parse_classes(given, "classes.json")
    missing = [folder for folder in ordered if folder not in classes.folders]
    if missing:
        raise AlphaflowError(f"classes.json: has no entry for the folder {missing[0]!r} ({len(missing)} missing)")
    return classes


def sort_folders(folders: Collection[str]) -> list[str]:
    """Sort folders by name; where all names are whole numbers, as numbers: folder 10 is class 10 and not class 2."""
    if _are_numbers(folders):
        return sorted(folders, key=lambda folder: (len(folder.lstrip("0")), folder.lstrip("0"), folder))
    return sorted(folders)


def reordered(classes: Classes, store: Classes) -> Classes | None:
    """The classes in the order of a store that was begun with another one; it keeps what was decided then.

    Numbers were once sorted as words. None where the store holds other classes, or the same order.
    """
    if store.folders == classes.folders or store.folders != sorted(classes.folders):
        return None
    return replace(store, order="in the order that this store was begun with: sorted as words, not as numbers")


def parse_classes(given: bytes, where: str) -> Classes:
    """Read a classes.json: a list of folders, {folder: index}, or {folder: {"index": i, "name": ...}}."""
    return _classes_of(parse_json(given, where, Anything(), advice=FORM), where)


def read_class_file(path: Path) -> Classes:
    """Read the classes.json of a store."""
    return _classes_of(read_json(path, Anything(), advice=f"{AGAIN}."), str(path))


def _classes_of(document: Any, where: str) -> Classes:
    if isinstance(document, list):
        check_shape(document, where, ListOf(Text()), advice=FORM)
        rows = [(index, folder, folder) for index, folder in enumerate(document)]
    else:
        check_shape(document, where, Table(others=Anything()), advice=FORM)
        rows = sorted(_row(folder, entry, where) for folder, entry in document.items())
    if len({folder for _, folder, _ in rows}) < len(rows):
        raise AlphaflowError(f"{where}: a folder is named twice. {FORM}")
    if [index for index, _, _ in rows] != list(range(len(rows))):
        raise AlphaflowError(f"{where}: the indices should be 0, 1, 2, … without gaps or repeats")
    return Classes([folder for _, folder, _ in rows], [name for _, _, name in rows], "in the order of classes.json")


def _row(folder: str, entry: object, where: str) -> tuple[int, str, str]:
    """Read index, folder and display name of one entry; the index may stand in quotes."""
    given = entry if isinstance(entry, dict) else {"index": entry}
    index, name = given.get("index"), given.get("name", folder)
    if isinstance(index, bool) or not re.fullmatch(r"-?\d{1,9}", str(index)) or not isinstance(name, str):
        raise AlphaflowError(
            f"{where}: {brief(folder)!r} needs a whole number as its index, and a text as its name. {FORM}"
        )
    return int(str(index)), folder, name


def _are_numbers(folders: Collection[str]) -> bool:
    return bool(folders) and all(folder.isascii() and folder.isdigit() for folder in folders)


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
