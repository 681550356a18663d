"""Where pictures come from. A source lists names first; the bytes of one are fetched when it is its turn.

`with source.reading(lines) as fetches` opens what has to be open for one pass. `fetches` yields (line, fetch) in the
order given, which is increasing: fetch() returns the file's bytes or the picture itself, may run in another thread, and
raises OSError where the file is gone. Whoever reads holds the context until the last fetch has returned.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from alphaflow_cli.data.archives import open_archive
from alphaflow_cli.data.classes import SPLITS
from alphaflow_cli.data.glyphs import GLYPHS, draw_glyph, draw_shape
from alphaflow_cli.data.pictures import Fetch, is_picture
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import read_file
from alphaflow_cli.text import brief

Identity = tuple[int, int]  # of a folder: its device and inode
MAX_WAYS = 1000  # see open_folder


class Source(Protocol):
    """A list of pictures; picklable, because every process opens its own."""

    @property
    def kind(self) -> str:
        """What sort of source it is, for the manifest: folder, zip, tar, …"""
        ...

    @property
    def name(self) -> str:
        """A short name without the machine's folders, because it goes into the manifest."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """The names of all pictures, with / between folders."""
        ...

    @property
    def notes(self) -> list[str]:
        """What was left aside at the listing, in lines for people."""
        ...

    def reading(self, lines: Sequence[int]) -> AbstractContextManager[Iterator[tuple[int, Fetch]]]:
        """Open the source for one pass over these pictures, in order; the fetches work until the context ends."""
        ...

    def facts(self) -> dict[str, Any]:
        """Whatever identifies the content besides the names, such as a commit on the Hub."""
        ...

    def classes_json(self) -> bytes | None:
        """The bytes of the source's own class list, if it has one."""
        ...

    def class_order(self) -> Sequence[str] | None:
        """The folders in the order of their classes, where the source fixes it; None: sorted."""
        ...


def open_source(text: str) -> Source:
    """List the pictures of a folder, a zip or tar file, hf://datasets/NAME, or an embedded set; no picture is read."""
    if is_embedded(text):
        return parse_embedded(text)
    if text.startswith("hf://"):
        from alphaflow_cli.data.hub_images import open_hub  # the Hub's client, which other sources do not need

        return open_hub(text)
    try:
        path = Path(text).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
        path = path.resolve()
    except (OSError, RuntimeError) as fault:  # no permission, too long; no home folder of that name, links in circles
        raise AlphaflowError(f"{brief(text)}: cannot be opened ({getattr(fault, 'strerror', '') or fault})") from fault
    if is_folder:
        return open_folder(path)
    if is_file:
        return open_archive(path)
    raise AlphaflowError(f"{brief(text)}: no such folder or archive. Others: hf://datasets/USER/NAME, shapes:4000")


@dataclass(frozen=True)
class Folder:
    """Pictures under a folder, at any depth."""

    root: Path
    names: Sequence[str]
    notes: list[str] = field(default_factory=list)
    kind: str = "folder"

    @property
    def name(self) -> str:
        """The folder's own name; for a split such as train/, the name of the folder above stands before it."""
        own, above = self.root.name, self.root.parent.name
        return f"{above}/{own}" if own.lower() in SPLITS and above else own

    def reading(self, lines: Sequence[int]) -> AbstractContextManager[Iterator[tuple[int, Fetch]]]:
        """Open each file when it is fetched."""
        return nullcontext((line, partial(_read_below, self.root, self.names[line])) for line in lines)

    def facts(self) -> dict[str, Any]:
        return {}

    def classes_json(self) -> bytes | None:
        """The bytes of the classes.json in the folder, if there is one."""
        path = self.root / "classes.json"
        try:
            return read_file(path) if path.exists() else None
        except OSError as fault:
            raise AlphaflowError(f"{path}: cannot be read ({fault.strerror or fault}). Mend or remove it") from fault

    def class_order(self) -> Sequence[str] | None:
        return None


DRAWERS = {"glyphs": draw_glyph, "shapes": draw_shape}  # of the embedded sets, by name


@dataclass(frozen=True)
class Embedded:
    """Pictures that the program draws itself, to try things out without a data set."""

    kind: str  # a key of DRAWERS
    count: int
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.count}"

    @cached_property
    def names(self) -> Sequence[str]:
        """Names such as disc/3 and heart/4: the glyph is the class."""
        return [f"{GLYPHS[index % len(GLYPHS)]}/{index}" for index in range(self.count)]

    def reading(self, lines: Sequence[int]) -> AbstractContextManager[Iterator[tuple[int, Fetch]]]:
        """Draw each picture when it is fetched."""
        return nullcontext((line, partial(DRAWERS[self.kind], line)) for line in lines)

    def facts(self) -> dict[str, Any]:
        return {}

    def classes_json(self) -> bytes | None:
        return None

    def class_order(self) -> Sequence[str] | None:
        """The glyphs' own order: class i is glyph i."""
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
    names, aside, loops = [], 0, 0
    ways: Counter[Identity] = Counter()
    pending = [_Below("", frozenset([_identity(root)]), 0)]
    while pending:
        here = pending.pop()
        entries = _entries(root, here.path)
        aside += entries is None
        for entry in entries or []:
            name = f"{here.path}{entry.name}"
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                aside += 1
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
            elif name != "classes.json":
                aside += 1
    notes = [f"{aside} other files left aside"] if aside else []
    notes += [f"{loops} links that lead back to their own folder not followed"] if loops else []
    return Folder(root, sorted(names), notes)


@dataclass(frozen=True)
class _Below:
    """A folder that is still to be listed, and the way that led to it."""

    path: str  # below the root, with a slash at its end
    above: frozenset[Identity]  # the folders on the way here, itself included
    links: int  # followed on the way here


def _entries(root: Path, below: str) -> "list[os.DirEntry[str]] | None":
    """The entries of a folder, sorted; None for a folder of the file system's own repairs, which only root may read."""
    try:
        with os.scandir(root / below) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except PermissionError:
        if below.endswith("lost+found/"):
            return None
        raise


def _read_below(root: Path, name: str) -> bytes:
    """Read a picture. One that is gone is a bad picture; a folder that is gone (unmounted) is the end of the run."""
    try:
        return read_file(root / name)
    except FileNotFoundError as fault:
        if not root.is_dir():
            raise AlphaflowError(f"{root}: the folder is gone") from fault
        raise


def is_embedded(text: str) -> bool:
    """Whether a source is written like an embedded set: shapes:4000, glyphs:4000."""
    return text.partition(":")[0] in DRAWERS and ":" in text


def parse_embedded(text: str) -> Embedded:
    """Read `shapes:N` or `glyphs:N`, which names the first N pictures of an embedded set."""
    kind, _, count = text.partition(":")
    if not (count.isascii() and count.isdigit() and len(count) < 20 and 0 < int(count) <= 10_000_000):
        raise AlphaflowError(f"{brief(text)}: should be {kind}:N with N from 1 to 10,000,000")
    return Embedded(kind, int(count))


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: listed as a file, and named as bad when it is read
        return False


def _identity(path: "Path | os.DirEntry[str]") -> Identity:
    status = path.stat()
    return status.st_dev, status.st_ino
