"""Many zips or tars as one source: the shards of a WebDataset, or a data set that was packed in parts.

The archives are read one after the other, in the order of their names (numbers in them as numbers). The name of a
picture is ARCHIVE/NAME. Each archive is opened when its turn comes, and closed when its last picture was fetched.
"""

import re
import threading
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from alphaflow_cli.data.archives import Archive, open_archive
from alphaflow_cli.data.classes import WNID
from alphaflow_cli.data.pictures import Fetch, Labels, Source
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.text import brief, counted

BRACES = re.compile(r"\{(\d{1,12})\.\.(\d{1,12})\}")
MOST_FILES = 1_000_000  # of a pattern
PARQUET = ".parquet"
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz")


@dataclass(frozen=True, kw_only=True)
class Archives(Source):
    """The pictures of several archives, one archive after the other."""

    titles: Sequence[str]  # of the archives: their paths in the data set
    archives: Sequence[Archive]

    @cached_property
    def starts(self) -> list[int]:
        """The line of the first picture of each archive, and the number of all pictures."""
        starts = [0]
        for archive in self.archives:
            starts.append(starts[-1] + len(archive.names))
        return starts

    @cached_property
    def paths(self) -> Sequence[str]:
        """The names in the archives; where each archive is one class of ImageNet, below that class."""
        stems = [title.rpartition("/")[2].partition(".")[0] for title in self.titles]
        tops = [f"{stem}/" for stem in stems] if all(WNID.fullmatch(stem) for stem in stems) else [""] * len(stems)
        parts = zip(tops, self.archives, strict=True)
        return [f"{top}{name}" for top, archive in parts for name in archive.names]

    def facts(self) -> dict[str, Any]:
        """The size of all archives together."""
        return {"bytes": sum(archive.stamp.size for archive in self.archives)}

    def stamps(self, lines: Sequence[int]) -> list[Any]:
        """Path, size and time of each archive."""
        return [stamp for archive in self.archives for stamp in archive.stamps(())]

    def labels(self, column: str) -> Labels | None:
        """The classes that stand beside the pictures; an archive without any has none for its pictures."""
        parts = [archive.labels(column) for archive in self.archives]
        if not any(parts):
            return None
        nothing = ([None] * len(archive.names) for archive in self.archives)
        return Labels(
            [key for part, none in zip(parts, nothing, strict=True) for key in (part.of_each if part else none)]
        )

    def classes_json(self) -> bytes | None:
        """The class list of the first archive that has one, else the one in the folder where they lie."""
        lists = (given for archive in self.archives if (given := archive.classes_json()) is not None)
        return next(lists, self.given_classes)

    @contextmanager
    def reading(self, lines: Sequence[int]) -> Iterator[Iterator[tuple[int, Fetch]]]:
        """Walk through the archives; the fetches work until the context ends, each of them once."""
        opened: list[_Open] = []
        try:
            yield self._walk(lines, opened)
        finally:
            for each in opened:
                each.close()

    def _walk(self, lines: Sequence[int], opened: "list[_Open]") -> Iterator[tuple[int, Fetch]]:
        for index, same in groupby(lines, key=lambda line: bisect(self.starts, line) - 1):
            start = self.starts[index]
            here = [line - start for line in same]
            one = _Open(self.archives[index].reading(here), len(here))
            opened[:] = [each for each in opened if each.left] + [one]
            for line, fetch in one.fetches:
                yield start + line, one.counted(fetch)


class _Open:
    """An archive that is open until all its fetches have returned: as many archives as are needed, and no more."""

    def __init__(self, context: "AbstractContextManager[Iterator[tuple[int, Fetch]]]", count: int) -> None:
        self.context, self.left, self.lock = context, count, threading.Lock()
        self.fetches = context.__enter__()

    def counted(self, fetch: Fetch) -> Callable[[], bytes | Image.Image]:
        def fetched() -> bytes | Image.Image:
            try:
                return fetch()
            finally:
                with self.lock:
                    self.left -= 1
                    if not self.left:
                        self.context.__exit__(None, None, None)

        return fetched

    def close(self) -> None:
        with self.lock:
            if self.left:
                self.left = 0
                self.context.__exit__(None, None, None)


def open_archives(name: str, paths: Sequence[Path], titles: Sequence[str], folder: Source | None = None) -> Source:
    """List the pictures of these archives; a single one is a source as if it alone had been given.

    What lies beside them in `folder` may say their classes: tables, and a class list.
    """
    around, given = ([folder], folder.classes_json()) if folder else ([], None)
    if len(paths) == 1:
        return replace(open_archive(paths[0]), beside=around, given_classes=given)
    archives = [open_archive(path) for path in paths]
    kind = " and ".join(sorted({archive.kind for archive in archives})) + " shards"
    names = [f"{title}/{name}" for title, archive in zip(titles, archives, strict=True) for name in archive.names]
    notes = [counted(len(archives), "archive")]
    notes += [f"{title}: {note}" for title, archive in zip(titles, archives, strict=True) for note in archive.notes][:5]
    return Archives(
        kind=kind, name=name, names=names, notes=notes, titles=titles, archives=archives,
        beside=[*archives, *around], given_classes=given,
    )  # fmt: skip


def in_order(names: Sequence[str]) -> list[str]:
    """Sort names so that the numbers in them are in order: part-2 before part-10."""
    return sorted(names, key=lambda name: ([int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", name)], name))


def is_pattern(text: str) -> bool:
    """Whether a path names several files: part-{000..146}.tar, part-*.tar."""
    return bool(BRACES.search(text)) or any(mark in text for mark in "*?[")


def files_of(pattern: Path) -> list[Path]:
    """The files that a pattern names: all numbers between braces must be there; of * and ? those that are.

    As in a shell, * names no hidden file, and ** is *.
    """
    braces = BRACES.search(pattern.name)
    if braces is None:
        may_be_hidden = pattern.name.startswith(".")
        matching = pattern.parent.glob(re.sub(r"\*+", "*", pattern.name))
        there = [path for path in matching if may_be_hidden or not path.name.startswith(".")]
        paths = [path for path in there if path.is_file()]
        if not paths:
            folder = is_pattern(str(pattern.parent)) and not pattern.parent.exists()
            what = "only the last part of a path may be a pattern" if folder else "no such file"
            raise AlphaflowError(f"{brief(pattern)}: {what}. Put a pattern in quotes, and check the path")
        return [pattern.parent / name for name in in_order([path.name for path in paths])]
    first, last = braces[1], braces[2]
    if not 0 <= int(last) - int(first) < MOST_FILES:
        raise AlphaflowError(f"{brief(pattern)}: should count upwards, to at most {MOST_FILES:,} files")
    start, end = pattern.name[: braces.start()], pattern.name[braces.end() :]
    paths = [pattern.parent / f"{start}{n:0{len(first)}d}{end}" for n in range(int(first), int(last) + 1)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise AlphaflowError(f"{missing[0]}: is not there ({len(missing):,} of the {len(paths):,} files are missing)")
    return paths
