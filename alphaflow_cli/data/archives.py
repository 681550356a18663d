"""Pictures in one zip or tar file, read where they lie: nothing is unpacked to disk.

A zip and an uncompressed tar are read at any place. A compressed tar can only be read from its beginning, so its
pictures keep the archive's order and every process walks through it once.

What an archive holds is what unpacking it would give: of a name that occurs twice the last copy; a hard link is the
file that stood under its target's name when the link was written; a symbolic link is what it leads to in the end. A
link never leads out of the archive, and links to whole folders are not followed, but counted in a note.

The pictures are listed once. Every process opens the file anew for each pass over them (`reading`), and holds it open
until the last fetch of that pass is over. Its size and time must stay what they were at the listing.
"""

import bz2
import itertools
import lzma
import os
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from alphaflow_cli.data.entries import NO_TARGET, Entries, Entry, Link, Place
from alphaflow_cli.data.pictures import CLASS_LIST, Fetch, Labels, Source, fetch_now, is_picture
from alphaflow_cli.data.webdataset import labels_beside
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import MAX_BYTES, Stamp, changed, path_and_stamp, stamp_of
from alphaflow_cli.text import brief

_OF_THE_LIBRARIES = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error)
# RuntimeError: an encrypted member, an unknown compression, headers that name headers without end
BROKEN = (*_OF_THE_LIBRARIES, OSError, EOFError, ValueError, OverflowError, IndexError, RuntimeError)
ZIP_MAGIC = (b"PK\3\4", b"PK\5\6", b"PK\7\x08")
MAX_TARGET = 4096  # bytes of a link's target
PACKED_PIECE = 4096  # bytes that are unpacked at once of LZMA, which makes at most 7,000 of each
MAX_NAMING = 1 << 24  # bytes of a tar's header that only names another one
NAMING = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


@dataclass(frozen=True, kw_only=True)
class Archive(Source):
    """A zip or tar of pictures, listed once."""

    path: Path
    places: Mapping[str, Place]
    asides: Mapping[str, Place]
    stamp: Stamp  # of the file when it was listed

    @contextmanager
    def reading(self, lines: Sequence[int]) -> Iterator[Iterator[tuple[int, Fetch]]]:
        """Open the file for one pass over these pictures; the fetches work until the context ends."""
        ways = {"zip": _from_zip, "tar": _from_tar, "compressed tar": _from_stream}
        with _opened(self.path, self.stamp) as file:
            yield ways[self.kind](self, file, lines)

    def facts(self) -> dict[str, Any]:
        """The archive's size: the cheapest sign that its content is another one."""
        return {"bytes": self.stamp.size}

    def stamps(self, lines: Sequence[int]) -> list[Any]:
        """The path, size and time of the archive."""
        return [path_and_stamp(self.path)]

    def place(self, line: int) -> Place:
        return self.places[self.names[line]]

    def read_asides(self, names: Collection[str]) -> dict[str, bytes]:
        """Read some of the files beside the pictures, in one walk through the archive."""
        ordered = sorted(names, key=lambda name: self.asides[name].offset)
        alone, contents = replace(self, names=ordered, places=self.asides), {}
        with alone.reading(range(len(ordered))) as fetches:
            for line, fetch in fetches:
                try:
                    data = fetch()
                except OSError as fault:
                    raise AlphaflowError(f"{self.path}: its {ordered[line]} cannot be read ({fault})") from fault
                assert isinstance(data, bytes), ordered[line]
                contents[ordered[line]] = data
        return contents

    def read_aside(self, name: str) -> bytes:
        """Read one file beside the pictures."""
        return self.read_asides([name])[name]

    def labels(self, column: str) -> Labels | None:
        """The classes that stand beside the pictures, as in a tar of WebDataset."""
        return labels_beside(self.path, self.names, self.asides, self.read_asides, column)

    def classes_json(self) -> bytes | None:
        """The class list that lies in the fewest folders, if there is one; else the one beside the archive."""
        lists = [name for name in self.asides if name.rsplit("/", 1)[-1] == CLASS_LIST]
        return self.read_aside(min(lists, key=lambda name: name.count("/"))) if lists else self.given_classes

    def checked(self, file: BinaryIO, read: Callable[[Place], bytes], place: Place) -> bytes:
        """Read a place. A fault of the member is an OSError; an archive that was written to ends the run."""
        if place.fault or place.size > MAX_BYTES:
            raise OSError(place.fault or f"{place.size:,} bytes, the limit is {MAX_BYTES:,}")
        fault: Exception | None = None
        try:
            data = read(place)
        except BROKEN as error:
            fault = error
        if stamp_of(file.fileno()) != self.stamp:
            raise changed(self.path) from fault
        if fault:
            number = getattr(fault, "errno", None)  # of a disk that fails: no fault of the picture
            raise (OSError(number, brief(fault)) if number else OSError(brief(fault))) from fault
        return data


@contextmanager
def _opened(path: Path, stamp: Stamp) -> Iterator[BinaryIO]:
    try:
        file = path.open("rb")
    except OSError as fault:
        raise AlphaflowError(f"{path}: cannot be read any more ({fault.strerror}); try again later") from fault
    with file:
        if stamp_of(file.fileno()) != stamp:
            raise changed(path)
        yield file


def _from_zip(archive: Archive, file: BinaryIO, lines: Sequence[int]) -> Iterator[tuple[int, Fetch]]:
    with _named(archive.path):
        opened = zipfile.ZipFile(file)
    members = {member.header_offset: member for member in opened.infolist()}
    lock = threading.Lock()  # one file position for all threads

    def read(place: Place) -> bytes:
        with lock:
            return _unpacked(opened, members[place.offset])

    for line in lines:
        yield line, partial(archive.checked, file, read, archive.place(line))


def _unpacked(opened: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """The bytes of a member, without asking for more memory than it claims: `ZipFile.read` unpacks all that there is.

    Of bzip2 a few bytes may become gigabytes, and the library unpacks them in one go; so it gives them packed here.
    """
    if member.compress_type == zipfile.ZIP_BZIP2:
        packed = copy(member)
        packed.compress_type, packed.file_size = zipfile.ZIP_STORED, member.compress_size
        del packed.CRC  # of the unpacked bytes
        data = bz2.BZ2Decompressor().decompress(opened.read(packed), member.file_size + 1)
        if len(data) != member.file_size or zlib.crc32(data) != member.CRC:
            raise zipfile.BadZipFile(f"Bad CRC-32 for file {member.filename!r}")
        return data
    step = PACKED_PIECE if member.compress_type == zipfile.ZIP_LZMA else max(member.file_size, 1)
    with opened.open(member) as file:
        return b"".join(iter(partial(file.read, step), b""))


def _from_tar(archive: Archive, file: BinaryIO, lines: Sequence[int]) -> Iterator[tuple[int, Fetch]]:
    for line in lines:
        yield line, partial(archive.checked, file, partial(_dense, file), archive.place(line))


def _from_stream(archive: Archive, file: BinaryIO, lines: Sequence[int]) -> Iterator[tuple[int, Fetch]]:
    """Read a compressed tar once, from its beginning.

    The lines are in the order of their places; several names of one place are neighbours.
    """
    with _named(archive.path):
        opened = tarfile.open(fileobj=file, tarinfo=_Header)  # noqa: SIM115 (`file` is what has to be closed)
    members = _members(archive.path, opened)
    for place, same in itertools.groupby(lines, key=archive.place):
        fetch: Fetch = partial(archive.checked, file, partial(_dense, file), place)
        if not place.fault:
            member = next((each for each in members if each.offset_data == place.offset), None)
            if member is None:
                raise changed(archive.path)
            fetch = fetch_now(partial(archive.checked, file, partial(_streamed, opened, member), place))
        for line in same:
            yield line, fetch


def _dense(file: BinaryIO, place: Place) -> bytes:
    """Read a member's bytes; the holes of a sparse one are zeros."""
    if place.parts is None:
        return _exactly(file, place.offset, place.size)
    data, at = bytearray(place.size), place.offset
    for start, length in place.parts:
        data[start : start + length] = _exactly(file, at, length)
        at += length
    return bytes(data)


def _exactly(file: BinaryIO, offset: int, length: int) -> bytes:
    data = os.pread(file.fileno(), length, offset)
    if len(data) < length:
        raise OSError("the archive ends in the middle of it")
    return data


def _streamed(opened: tarfile.TarFile, member: tarfile.TarInfo, place: Place) -> bytes:
    file = opened.extractfile(member)
    return file.read() if file else b""


def open_archive(path: Path) -> Archive:
    """List the pictures of a zip or tar; which of the two it is is read from its bytes, not its name."""
    with _named(path), path.open("rb") as file:
        reader = _open_zip if _is_zip(file) else _open_tar
        return reader(path, file, stamp_of(file.fileno()))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn damage into one line that names the archive."""
    try:
        yield
    except BROKEN as fault:
        advice = ". If it is a picture, give its folder" if is_picture(path.name) else ""
        raise AlphaflowError(f"{path}: not a whole zip or tar archive ({brief(fault).rstrip(':')}){advice}") from fault


def _is_zip(file: BinaryIO) -> bool:
    """Tell a zip by its first bytes; a tar whose last picture is followed by a zip is still a tar."""
    begin = file.read(len(ZIP_MAGIC[0]))
    file.seek(0)
    if begin in ZIP_MAGIC:
        return True
    try:
        with tarfile.open(fileobj=file, tarinfo=_Header):
            return False
    except BROKEN:
        return zipfile.is_zipfile(file)  # behind a program that unpacks it
    finally:
        file.seek(0)


def _open_zip(path: Path, file: BinaryIO, stamp: Stamp) -> Archive:
    opened = zipfile.ZipFile(file)
    entries = Entries()
    for member in opened.infolist():
        entry: Entry = Place(member.header_offset, member.file_size)
        if member.compress_size > stamp.size:  # the library would ask for so much memory
            entry = Place(0, 0, fault="it claims more bytes than the archive has")
        elif stat.S_ISLNK(member.external_attr >> 16):
            is_sane = member.file_size <= MAX_TARGET
            entry = Link(_unpacked(opened, member).decode(errors="surrogateescape")) if is_sane else NO_TARGET
        if not (name := _path_in(member)).endswith("/"):  # a folder
            entries.add(name, entry)
    return _archive(entries, path, "zip", stamp)


def _path_in(member: zipfile.ZipInfo) -> str:
    """The path of a member. Older programs of Windows part it by backslashes, against the rule; unzip mends it, too."""
    is_of_windows = member.create_system == 0 and "/" not in member.filename
    return member.filename.replace("\\", "/") if is_of_windows else member.filename


def _open_tar(path: Path, file: BinaryIO, stamp: Stamp) -> Archive:
    opened = tarfile.open(fileobj=file, tarinfo=_Header)  # noqa: SIM115 (`file` is what has to be closed)
    kind, entries = "tar" if opened.fileobj is file else "compressed tar", Entries()
    for member in _members(path, opened):
        if not member.isdir():
            entries.add(member.name, _entry(member, entries))
    return _archive(entries, path, kind, stamp)


def _entry(member: tarfile.TarInfo, before: Entries) -> Entry:
    if member.issym():
        return Link(member.linkname)
    if member.islnk():
        return before.at(member.linkname) or NO_TARGET
    if not member.isreg():
        return Place(0, 0, fault="not a regular file")
    if not member.issparse():
        return Place(member.offset_data, member.size)
    holes: Any = member.sparse  # not as the library's types have it: [(offset in the file, bytes)] of what is no hole
    parts = tuple((int(start), int(length)) for start, length in holes)
    if any(start < 0 or length < 0 or start + length > member.size for start, length in parts):
        return Place(0, 0, fault="its map of holes is damaged")
    return Place(member.offset_data, member.size, parts)


def _members(path: Path, opened: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar one after the other. The library keeps them all, for which there is no memory."""
    watched, at = _Watched(opened.fileobj), -1
    opened.fileobj = watched  # type: ignore[assignment]
    while True:
        with _named(path):
            member = opened.next() if opened.offset else None  # it is 0 in an empty tar; Python 3.10 would fail
            if member is None:
                return watched.check_end()
        opened.members = []  # type: ignore[attr-defined]
        if member.size < 0 or opened.offset <= at:
            raise AlphaflowError(f"{path}: not a whole zip or tar archive (a member has a negative size)")
        at = opened.offset
        yield member


class _Header(tarfile.TarInfo):
    """A header of a tar. The library reads at once what names the next member, however long it claims to be."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        """Read a header, and refuse one that claims a name longer than any is."""
        header = super().frombuf(buf, encoding, errors)
        if header.type in NAMING and header.size > MAX_NAMING:
            raise tarfile.ReadError(f"a name of {header.size:,} bytes")
        return header


class _Watched:
    """What a tar is read from; it remembers the last block, because the library takes a damaged header, or the end of
    the file, for the end of the archive. Only a block of zeros is one."""

    def __init__(self, file: Any) -> None:
        self.seek, self.tell, self._read, self.last = file.seek, file.tell, file.read, bytes(tarfile.BLOCKSIZE)

    def read(self, size: int) -> bytes:
        data: bytes = self._read(size)
        self.last = data if size == tarfile.BLOCKSIZE else self.last
        return data

    def check_end(self) -> None:
        """Refuse a tar whose last header is not the mark that closes it."""
        if len(self.last) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it was cut off: the mark at its end is missing")
        if self.last.strip(b"\0"):
            raise tarfile.ReadError(f"a damaged header at byte {self.tell() - tarfile.BLOCKSIZE:,}")


def _archive(entries: Entries, path: Path, kind: str, stamp: Stamp) -> Archive:
    """The archive: its pictures sorted, but in the order of the data where it can only be read from its beginning."""
    places, asides, notes = entries.pictures()
    names = sorted(places)
    if kind == "compressed tar":
        names = sorted(places, key=lambda name: (bool(places[name].fault), places[name].offset))
    return Archive(
        kind=kind, name=path.name, names=names, notes=notes, path=path, places=places, asides=asides, stamp=stamp
    )
