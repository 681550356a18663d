"""Where pictures come from. A source lists names first; the bytes of one are fetched when it is its turn.

A path leads to a folder of pictures, to an archive of them or a parquet file, or to a folder of such; a pattern
(`part-{000..146}.tar`, `part-*.tar`) names several. What is no path is an address on the Hub, or an embedded set.

`with source.reading(lines) as fetches` opens what has to be open for one pass. `fetches` yields (line, fetch) in the
order given, which is increasing: fetch() returns the file's bytes or the picture itself, may run in another thread, and
raises OSError where the file is gone. Whoever reads holds the context until the last fetch has returned.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from alphaflow_cli.data.classes import SPLITS, choose_files, choose_split
from alphaflow_cli.data.glyphs import GLYPHS, draw_glyph, draw_shape
from alphaflow_cli.data.pictures import CLASS_LIST, TABLES, Loose, Source, ending_of, is_picture, left_aside
from alphaflow_cli.data.shards import ARCHIVES, PARQUET, files_of, in_order, is_pattern, open_archives
from alphaflow_cli.errors import AlphaflowError, no_such_source
from alphaflow_cli.files import path_and_stamp, read_file, user_path
from alphaflow_cli.text import brief, counted

Identity = tuple[int, int]  # of a folder: its device and inode
MAX_WAYS = 1000  # see open_folder
PARQUET_MAGIC = b"PAR1"
PACKED = (*ARCHIVES, PARQUET)
DRAWERS = {"glyphs": draw_glyph, "shapes": draw_shape}  # of the embedded sets, by name


def open_source(text: str, image_column: str = "") -> Source:
    """List the pictures of any source; no picture is read. `image_column` is that of parquet files."""
    if is_embedded(text):
        return parse_embedded(text)
    if text.startswith("hf://"):
        from alphaflow_cli.data.hub_images import open_hub  # the Hub's client, which other sources do not need

        return open_hub(text, image_column)
    try:
        path = user_path(text)
        is_folder, is_file = path.is_dir(), path.is_file()
        path = path.resolve()
    except (OSError, RuntimeError) as fault:  # no permission, too long, links in circles
        raise AlphaflowError(f"{brief(text)}: cannot be opened ({getattr(fault, 'strerror', '') or fault})") from fault
    if is_folder:
        return _below(open_folder(path), image_column)
    if is_file:
        return _of_files(path.name, path.parent, [path], image_column)
    if is_pattern(text):
        paths = files_of(path)
        return _of_files(path.name, path.parent, paths, image_column)
    raise no_such_source(text)


def _below(folder: "Folder", image_column: str) -> Source:
    """The folder, or what is packed in it where it has no picture of its own."""
    if folder.names or not folder.packed:
        return folder
    titles = in_order(choose_files(folder.packed))
    source = _of_files(folder.name, folder.root, [folder.root / title for title in titles], image_column, folder)
    left = len(folder.packed) - len(titles)
    notes = [*source.notes, f"{counted(left, 'file')} of other splits left aside"] if left else source.notes
    return replace(source, notes=notes)


def _of_files(
    name: str, root: Path, paths: Sequence[Path], image_column: str, folder: "Folder | None" = None
) -> Source:
    """Parquet files, or archives; which of the two is read from their bytes."""
    tables = [path for path in paths if _is_parquet(path)]
    if tables and len(tables) < len(paths):
        other = next(path for path in paths if path not in set(tables))
        raise AlphaflowError(
            f"{root}: holds parquet files ({tables[0].name}) and archives ({other.name}); name those of one kind, "
            "as NAME-*.parquet"
        )
    if tables:
        from alphaflow_cli.data.parquet import local_parquet  # and pyarrow, which other sources do not need

        given = folder.classes_json() if folder else None
        return replace(local_parquet(name, tables, root, image_column), given_classes=given)
    return open_archives(name, paths, [path.relative_to(root).as_posix() for path in paths], folder)


def _is_parquet(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC or path.name.endswith(PARQUET)
    except OSError as fault:
        raise AlphaflowError(f"{path}: cannot be read ({fault.strerror or fault})") from fault


@dataclass(frozen=True, kw_only=True)
class Folder(Loose):
    """Pictures under a folder, at any depth."""

    root: Path
    packed: Sequence[str] = ()  # archives and parquet files, which count where there are no pictures
    lists: Sequence[str] = ()  # files called classes.json
    kind: str = "folder"

    def fetch(self, line: int) -> bytes:
        """Read a picture. One that is gone is a bad one; a folder that is gone (unmounted) is the end of the run."""
        try:
            return read_file(self.root / self.names[line])
        except FileNotFoundError as fault:
            if not self.root.is_dir():
                raise AlphaflowError(f"{self.root}: the folder is gone") from fault
            raise

    def stamps(self, lines: Sequence[int]) -> list[Any]:
        """Path, size and time of each picture."""
        return [path_and_stamp(self.root / self.names[line]) for line in lines]

    def read_aside(self, name: str) -> bytes:
        """Read a table of labels that lies in the folder."""
        try:
            return read_file(self.root / name)
        except OSError as fault:
            raise AlphaflowError(f"{self.root / name}: cannot be read ({fault.strerror or fault})") from fault

    def classes_json(self) -> bytes | None:
        """The class list in the folder, or on the way from there to the one that all pictures share (`train`)."""
        shared = choose_split(self.names)[1] if self.lists else ""
        on_the_way = [name for name in self.lists if shared.startswith(name.removesuffix(CLASS_LIST))]
        if not on_the_way:
            return None
        path = self.root / min(on_the_way, key=len)
        try:
            return read_file(path)
        except OSError as fault:
            raise AlphaflowError(f"{path}: cannot be read ({fault.strerror or fault}). Mend or remove it") from fault


@dataclass(frozen=True, kw_only=True)
class Embedded(Loose):
    """Pictures that the program draws itself, to try things out without a data set. Its kind is a key of DRAWERS."""

    def fetch(self, line: int) -> Image.Image:
        return DRAWERS[self.kind](line)

    def class_order(self) -> Sequence[str] | None:
        """The outlines' own order: class i is outline i."""
        return GLYPHS


def open_folder(root: Path) -> Folder:
    """List a folder: links are followed, but not round in circles; hidden files and other suffixes are left aside.

    Folders that link to each other can be walked in more ways than anybody waits for: eight of them in 100,000. One
    that is reached by MAX_WAYS chains of two links and more is refused. Links side by side may be as many as you like.
    """
    try:
        return _walk(root)
    except OSError as fault:
        where, reason = brief(fault.filename or root), fault.strerror or fault
        raise AlphaflowError(f"{where}: cannot be listed ({reason}). Make it readable, or move it away") from fault


def _walk(root: Path) -> Folder:
    names, asides, packed, lists, loops = [], [], [], [], 0
    aside: Counter[str] = Counter()
    ways: Counter[Identity] = Counter()
    pending = [_Below("", frozenset([_identity(root)]), 0)]
    while pending:
        here = pending.pop()
        entries = _entries(root, here.path)
        aside[""] += entries is None
        for entry in entries or []:
            name = f"{here.path}{entry.name}"
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                aside[""] += 1
            elif _is_folder(entry):
                identity, links = _identity(entry), here.links + entry.is_symlink()
                ways[identity] += links > 1
                if ways[identity] > MAX_WAYS:
                    raise AlphaflowError(
                        f"{root}: links lead to {brief(entry.path)} in more than {MAX_WAYS:,} ways. Remove such links"
                    )
                loops += identity in here.above
                if identity not in here.above:
                    pending.append(_Below(f"{name}/", here.above | {identity}, links))
            elif is_picture(name):
                names.append(name)
            elif entry.name in TABLES:
                asides.append(name)
            elif name.lower().endswith(PACKED):
                packed.append(name)
            elif entry.name == CLASS_LIST:
                lists.append(name)
            else:
                aside[ending_of(name)] += 1
    aside.update(ending_of(name) for name in packed if names)
    notes = left_aside(+aside)
    notes += [f"{loops} links that lead back to their own folder not followed"] if loops else []
    above = root.parent.name
    name = f"{above}/{root.name}" if root.name.lower() in SPLITS and above else root.name
    return Folder(root=root, name=name, names=sorted(names), notes=notes, asides=asides, packed=packed, lists=lists)


@dataclass(frozen=True)
class _Below:
    """A folder that is still to be listed, and the way that led to it."""

    path: str  # below the root, with a slash at its end
    above: frozenset[Identity]  # the folders on the way here, itself included
    links: int  # followed on the way here


def _entries(root: Path, below: str) -> "list[os.DirEntry[str]] | None":
    """The entries of a folder, sorted; None for lost+found, which only root may read."""
    try:
        with os.scandir(root / below) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except PermissionError:
        if below.endswith("lost+found/"):
            return None
        raise


def is_embedded(text: str) -> bool:
    """Whether a source is written like an embedded set: shapes:4000, glyphs:4000."""
    return ":" in text and text.partition(":")[0] in DRAWERS


def parse_embedded(text: str) -> Embedded:
    """Read `shapes:N`, the first N pictures of an embedded set; their names (disc/3, heart/4) say the class."""
    kind, _, count = text.partition(":")
    if not (count.isascii() and count.isdigit() and len(count) < 20 and 0 < int(count) <= 10_000_000):
        raise AlphaflowError(f"{brief(text)}: should be {kind}:N with N from 1 to 10,000,000")
    names = [f"{GLYPHS[index % len(GLYPHS)]}/{index}" for index in range(int(count))]
    return Embedded(kind=kind, name=f"{kind}:{int(count)}", names=names)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: listed as a file, and named as bad when it is read
        return False


def _identity(path: "Path | os.DirEntry[str]") -> Identity:
    status = path.stat()
    return status.st_dev, status.st_ino
