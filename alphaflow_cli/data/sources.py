"""Where pictures come from. A source lists names first; the bytes of one are fetched when it is its turn.

`fetches(lines)` yields (line, fetch) in the order given, which is increasing: fetch() returns the file's bytes or the
picture itself, may run in another thread, and raises OSError where the file is gone.
"""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from alphaflow_cli.data.classes import SPLITS
from alphaflow_cli.data.glyphs import GLYPHS, draw_glyph
from alphaflow_cli.data.pictures import MAX_BYTES, SUFFIXES
from alphaflow_cli.errors import AlphaflowError

Fetch = Callable[[], bytes | Image.Image]


class Source(Protocol):
    """A list of pictures; picklable, because every process opens its own."""

    @property
    def kind(self) -> str:
        """Folder, zip, …"""
        ...

    @property
    def name(self) -> str:
        """Without the machine's folders: it goes into the manifest."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Of all pictures, with / between folders."""
        ...

    @property
    def notes(self) -> list[str]:
        """What was left aside, for people."""
        ...

    def fetches(self, lines: Sequence[int]) -> Iterator[tuple[int, Fetch]]:
        """The pictures on these lines, in order."""
        ...

    def facts(self) -> dict[str, Any]:
        """Whatever else identifies the content (a commit on the Hub)."""
        ...

    def classes_json(self) -> bytes | None:
        """The source's own class list, if it has one."""
        ...

    def class_order(self) -> Sequence[str] | None:
        """The order of the classes where the source fixes it."""
        ...


@dataclass(frozen=True)
class Folder:
    """Pictures under a folder, at any depth."""

    root: Path
    names: Sequence[str]
    notes: list[str] = field(default_factory=list)
    kind: str = "folder"

    @property
    def name(self) -> str:
        """The folder's own name; of a split the one above, too."""
        own, above = self.root.name, self.root.parent.name
        return f"{above}/{own}" if own.lower() in SPLITS and above else own

    def fetches(self, lines: Sequence[int]) -> Iterator[tuple[int, Fetch]]:
        """Each file, opened when it is fetched."""
        for line in lines:
            yield line, partial(_read_below, self.root, self.names[line])

    def facts(self) -> dict[str, Any]:
        """Nothing beyond the names."""
        return {}

    def classes_json(self) -> bytes | None:
        """In the root."""
        path = self.root / "classes.json"
        return path.read_bytes() if path.is_file() else None

    def class_order(self) -> Sequence[str] | None:
        """Sorted."""
        return None


@dataclass(frozen=True)
class Glyphs:
    """The embedded set."""

    count: int
    kind: str = "glyphs"
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As it is asked for."""
        return f"glyphs:{self.count}"

    @property
    def names(self) -> Sequence[str]:
        """disc/3, heart/4, …"""
        return [f"{GLYPHS[index % len(GLYPHS)]}/{index}" for index in range(self.count)]

    def fetches(self, lines: Sequence[int]) -> Iterator[tuple[int, Fetch]]:
        """Drawn on the spot."""
        for line in lines:
            yield line, partial(draw_glyph, line)

    def facts(self) -> dict[str, Any]:
        """Nothing beyond the names."""
        return {}

    def classes_json(self) -> bytes | None:
        """None."""
        return None

    def class_order(self) -> Sequence[str] | None:
        """Class i is glyph i."""
        return GLYPHS


def open_folder(root: Path) -> Folder:
    """List a folder: links are followed, but not round in circles; hidden files and other suffixes are left aside."""
    names, aside, loops = [], 0, 0
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset([_identity(root)]))]
    while pending:
        below, above = pending.pop()
        with os.scandir(root / below) as entries:
            for entry in sorted(entries, key=lambda found: found.name):
                name = f"{below}{entry.name}"
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    aside += 1
                elif _is_folder(entry):
                    identity = _identity(Path(entry.path))
                    loops += identity in above
                    if identity not in above:
                        pending.append((f"{name}/", above | {identity}))
                elif is_picture(name):
                    names.append(name)
                elif name != "classes.json":
                    aside += 1
    notes = [f"{aside} other files left aside"] if aside else []
    notes += [f"{loops} links that lead back to their own folder not followed"] if loops else []
    return Folder(root, sorted(names), notes)


def is_picture(name: str) -> bool:
    """By its suffix, in any case."""
    return name.lower().endswith(SUFFIXES)


def read_file(path: Path) -> bytes:
    """A whole regular file of sane size; a pipe or device would block for ever."""
    with open(path, "rb", opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        if status.st_size > MAX_BYTES:
            raise OSError(f"{status.st_size:,} bytes, the limit is {MAX_BYTES:,}")
        return file.read()


def _read_below(root: Path, name: str) -> bytes:
    """One picture that is gone is a bad picture; a folder that is gone (unmounted) is the end of the run."""
    try:
        return read_file(root / name)
    except FileNotFoundError as fault:
        if not root.is_dir():
            raise AlphaflowError(f"{root}: the folder is gone") from fault
        raise


def parse_glyphs(text: str) -> Glyphs:
    """`glyphs:N`."""
    count = text.removeprefix("glyphs:")
    if not count.isdecimal() or not 0 < int(count) <= 10_000_000:
        raise AlphaflowError(f"{text}: should be glyphs:N with N from 1 to 10,000,000")
    return Glyphs(int(count))


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: listed as a file, and named as bad when it is read
        return False


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
