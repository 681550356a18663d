"""Pictures in one zip or tar file, read where they lie: nothing is unpacked to disk.

A zip and an uncompressed tar are read at any place. A compressed tar can only be read from its beginning, so its
pictures keep the archive's order and every process walks through it once.
"""

import lzma
import os
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from alphaflow_cli.data.pictures import MAX_BYTES
from alphaflow_cli.data.sources import Fetch, is_picture
from alphaflow_cli.errors import AlphaflowError

BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class Archive:
    """A zip or tar of pictures."""

    path: Path
    names: Sequence[str]
    places: dict[str, tuple[int, int]]  # offset and length in an uncompressed tar
    notes: list[str]
    kind: str
    given_classes: bytes | None = None
    facts_given: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.path.name

    def fetches(self, lines: Sequence[int]) -> Iterator[tuple[int, Fetch]]:
        """In the way this kind of archive is read."""
        ways = {"zip": self._from_zip, "tar": self._from_tar, "compressed tar": self._from_stream}
        return ways[self.kind](lines)

    def facts(self) -> dict[str, Any]:
        """Its size: the cheapest sign of another content."""
        return {"bytes": self.path.stat().st_size, **self.facts_given}

    def classes_json(self) -> bytes | None:
        """The shallowest in the archive."""
        return self.given_classes

    def class_order(self) -> Sequence[str] | None:
        """Sorted."""
        return None

    def _from_zip(self, lines: Sequence[int]) -> Iterator[tuple[int, Fetch]]:
        with zipfile.ZipFile(self.path) as archive:
            lock = threading.Lock()  # one file position for all threads
            for line in lines:
                yield line, partial(_member_of_zip, archive, lock, self.names[line])

    def _from_tar(self, lines: Sequence[int]) -> Iterator[tuple[int, Fetch]]:
        handle = os.open(self.path, os.O_RDONLY)
        try:
            for line in lines:
                yield line, partial(_member_of_tar, handle, *self.places[self.names[line]])
        finally:
            os.close(handle)

    def _from_stream(self, lines: Sequence[int]) -> Iterator[tuple[int, Fetch]]:
        wanted = {self.names[line]: line for line in lines}
        with tarfile.open(self.path, "r|*") as archive:
            for member in archive:
                line = wanted.pop(member.name, None)
                if line is not None:
                    yield line, partial(_same, _read_limited(archive, member))
                if not wanted:
                    return


def _same(data: bytes) -> bytes:
    return data


def _read_limited(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member) if member.size <= MAX_BYTES else None
    return file.read() if file else b""


def _member_of_zip(archive: zipfile.ZipFile, lock: threading.Lock, name: str) -> bytes:
    if archive.getinfo(name).file_size > MAX_BYTES:
        raise OSError(f"{archive.getinfo(name).file_size:,} bytes, the limit is {MAX_BYTES:,}")
    try:
        with lock:
            return archive.read(name)
    except BROKEN as fault:
        raise OSError(str(fault)) from fault


def _member_of_tar(handle: int, offset: int, length: int) -> bytes:
    data = os.pread(handle, length, offset)
    if len(data) < length:
        raise OSError("the archive ends in the middle of it")
    return data


def open_archive(path: Path) -> Archive:
    """List a zip or tar; which one it is is read from its bytes, not its name."""
    try:
        return _open_zip(path) if zipfile.is_zipfile(path) else _open_tar(path)
    except (*BROKEN, OSError) as fault:
        raise AlphaflowError(f"{path}: not a whole zip or tar archive ({fault})") from fault


def _open_zip(path: Path) -> Archive:
    with zipfile.ZipFile(path) as archive:
        files = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
        given = _shallowest(files)
        classes = archive.read(given) if given else None
    names, notes = _pictures(files)
    return Archive(path, sorted(names), {}, notes, "zip", classes)


def _open_tar(path: Path) -> Archive:
    files, places, classes, depth = [], {}, None, 99
    with tarfile.open(path) as archive:
        for member in archive:
            if not member.isreg():
                continue
            files.append(member.name)
            places[member.name] = (member.offset_data, member.size)
            if _is_class_list(member.name) and member.name.count("/") < depth:
                classes, depth = _read_limited(archive, member), member.name.count("/")
    names, notes = _pictures(files)
    if _compressed(path):
        return Archive(path, names, {}, notes, "compressed tar", classes)
    return Archive(path, sorted(names), {name: places[name] for name in names}, notes, "tar", classes)


def _pictures(files: Sequence[str]) -> tuple[list[str], list[str]]:
    names = list(dict.fromkeys(name for name in files if is_picture(name) and not _hidden(name)))
    aside = len(set(files)) - len(names) - sum(map(_is_class_list, files))
    return names, [f"{aside} other files left aside"] if aside > 0 else []


def _hidden(name: str) -> bool:
    parts = [part for part in name.split("/") if part not in (".", "..")]
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _is_class_list(name: str) -> bool:
    return name.rsplit("/", 1)[-1] == "classes.json"


def _shallowest(files: Sequence[str]) -> str:
    found = sorted((name for name in files if _is_class_list(name)), key=lambda name: name.count("/"))
    return found[0] if found else ""


def _compressed(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:"):
            return False
    except tarfile.ReadError:
        return True
