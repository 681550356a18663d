"""What an archive holds, as unpacking it would leave it: where each file lies, and what links lead to."""

import posixpath
from collections import Counter
from dataclasses import dataclass

from alphaflow_cli.data.pictures import ending_of, is_picture, left_aside, tells_classes

HOPS = 40  # links behind links, as the kernel allows


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of a file lie: of a tar the data, of a zip the member's header. Equal places, equal bytes."""

    offset: int
    size: int
    parts: tuple[tuple[int, int], ...] | None = None  # of a sparse member: (offset in the file, bytes) of its data
    fault: str = ""  # why there is nothing to read


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link, and the path that it leads to."""

    target: str


Entry = Place | Link
NO_TARGET = Place(0, 0, fault="a link to what is not in the archive")


class Entries:
    """What an archive holds, by path as unpacked; a later member of the same path takes the place of an earlier one."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[str, Entry]] = {}  # the member's own spelling, and what it is
        self.repeats = 0

    def add(self, name: str, entry: Entry) -> None:
        path = posixpath.normpath(name)
        self.repeats += path in self.files
        self.files[path] = path if path == name else name, entry  # one text in memory, not two

    def at(self, name: str) -> Entry | None:
        """What stands under a name so far; None for nothing."""
        known = self.files.get(posixpath.normpath(name))
        return known[1] if known else None

    def pictures(self) -> tuple[dict[str, Place], dict[str, Place], list[str]]:
        """The pictures by name, the files that may say their classes, and what there is to say about the rest."""
        folders = self._folders()
        places: dict[str, Place] = {}
        asides: dict[str, Place] = {}
        aside: Counter[str] = Counter()
        linked = 0
        mixed = len({name.startswith("./") for name, _ in self.files.values()}) > 1  # else one class would be two
        for path, (spelled, entry) in self.files.items():
            name = path if mixed else spelled
            end, place = self._follow(path)
            if isinstance(entry, Link) and end in folders:
                linked += 1
            elif is_picture(name) and not is_hidden(name):
                places[name] = place
            elif tells_classes(name) and not is_hidden(name):
                asides[name] = place
            else:
                aside["" if is_hidden(name) else ending_of(name)] += 1
        notes = left_aside(aside)
        notes += [f"{self.repeats} names that occur again: the last copy is taken"] if self.repeats else []
        notes += [f"{linked} links to folders not followed (unpack it, and give the folder)"] if linked else []
        return places, asides, notes

    def _follow(self, path: str) -> tuple[str, Place]:
        """Follow a chain of links: the path where it ends, and what is there."""
        for _ in range(HOPS):
            _, entry = self.files.get(path, ("", None))
            if isinstance(entry, Place):
                return path, entry
            if entry is None:
                return path, NO_TARGET
            path = posixpath.normpath(posixpath.join(posixpath.dirname(path), entry.target))
        return "", NO_TARGET

    def _folders(self) -> set[str]:
        """All folders of the archive, where there is a link that may lead to one; else none but the root."""
        folders = {""}
        if any(isinstance(entry, Link) for _, entry in self.files.values()):
            for path in self.files:
                while (path := posixpath.dirname(path)) not in folders:
                    folders.add(path)
        return folders - {""} | {"."}


def is_hidden(name: str) -> bool:
    """Whether a path leads through what no source takes: hidden files and folders, and what a Mac adds to a zip."""
    parts = [part for part in name.split("/") if part not in (".", "..")]
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)
