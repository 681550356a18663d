"""Where drawn pictures go: a folder of PNG files, or rows of one file that is unfinished until the last one is there.

    DIR/seed-000012-class-3.png      written whole or not at all; the file that is there is the picture that is done
    DIR/.sample.json                 what decides a picture's bytes: another request into the folder is refused
    FILE.part                        rows at their final places, written in any order by any process
    FILE.part.state                  one line that says what decides the rows, then a byte per row: 1 is done

Nothing is held but the batch in hand. Rows are read and written at their places, not mapped: mapped pages would count
as this process's memory.
"""

import errno
import glob
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import read_document, sync, write_whole
from alphaflow_cli.sample.generator import Drawn, spans_of
from alphaflow_cli.sample.grid import picture_png
from alphaflow_cli.text import shorten

Record = dict[str, str]  # what decides a picture's bytes: sha256 of the checkpoint, walk, precision, …
RECORD_FILE = ".sample.json"
PIECE = 1 << 22  # bytes that are read at once
MEMBER = "arr_0.npy"
ZIP_HEADER = 30 + len(MEMBER) + 20  # bytes before an .npz's first array: the entry, its name, its sizes in 64 bits


class Sink(Protocol):
    """One of the things that `sample` writes; every process has its own view of it."""

    def begin(self) -> bool:
        """Make it ready, or find it begun; the first process calls this alone. Returns whether anything is there."""
        ...

    def has(self, walk: int, span: slice) -> bool:
        """Whether all pictures of this span are there already."""
        ...

    def put(self, walk: int, drawn: Drawn) -> None:
        """Take a batch; when this returns, its pictures are on the disk."""
        ...

    def finish(self) -> None:
        """All is there; the first process calls this alone."""
        ...


def check_record(wanted: Record, there: Record, target: Path, advice: str) -> None:
    """Refuse to mix pictures of two requests; what differs is named."""
    names = [name for name in wanted | there if wanted.get(name) != there.get(name)]
    if names:
        differing = "; ".join(
            f"{name} {shorten(there.get(name, 'unknown'), 80)} there, {shorten(wanted.get(name, 'unknown'), 80)} here"
            for name in names
        )
        raise AlphaflowError(f"{target}: holds pictures of another request ({differing}). {advice}")


def record_in(text: str) -> Record | None:
    """A record as it was written; None where a line is damaged or something else."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(record, dict) and all(isinstance(value, str) for value in record.values())
    return record if is_record else None


class PictureFolder:
    """PNG files in a folder, with the seed and the label in their names."""

    def __init__(self, folder: Path, record: Record, name: Callable[[int, int, int], str], spans: "Spans") -> None:
        """`name` of walk, seed and label; `spans` finds the seeds and labels of a span again."""
        self.folder, self._record, self._name, self._spans = folder, record, name, spans

    def begin(self) -> bool:
        """Read the record, or write it; pictures of before there was one are not taken for this request's."""
        path = self.folder / RECORD_FILE
        remove_leftovers(self.folder, ".seed-*", ".nfe-*", f".{RECORD_FILE}.*")
        if path.exists():
            there = record_in(read_document(path))
            advice = "Name another --out, or remove that folder."
            check_record(self._record, there or {"record": "damaged"}, self.folder, advice)
            return True
        self.folder.mkdir(parents=True, exist_ok=True)
        if next(self.folder.glob("*.png"), None) is not None:
            for walk, span in self._spans:
                for file in self._files(walk, span):
                    file.unlink(missing_ok=True)
        write_whole(path, json.dumps(self._record, indent=1) + "\n")
        return False

    def _files(self, walk: int, span: slice) -> Iterator[Path]:
        for seed, label in zip(self._spans.seeds[span], self._spans.labels[span], strict=True):
            yield self.folder / self._name(walk, seed, label)

    def has(self, walk: int, span: slice) -> bool:
        """Whether every file of the span is there; each was written whole or not at all."""
        return all(file.exists() for file in self._files(walk, span))

    def put(self, walk: int, drawn: Drawn) -> None:
        """Write each picture that is not there yet."""
        for seed, label, picture in zip(drawn.seeds, drawn.labels, drawn.arrays(), strict=True):
            file = self.folder / self._name(walk, seed, label)
            if not file.exists():
                write_whole(file, picture_png(picture))

    def finish(self) -> None:
        """Nothing is left to do: the record stays, so that another request is told apart."""


class Spans:
    """All batches of a request, walk by walk, in order."""

    def __init__(self, seeds: Sequence[int], labels: Sequence[int], *, walks: int, batch: int) -> None:
        self.seeds, self.labels, self.walks, self.batch = seeds, labels, walks, batch

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        for walk in range(self.walks):
            yield from ((walk, span) for span in spans_of(len(self.seeds), self.batch))


class RowFile:
    """Rows of one shape and type at their final places in FILE.part; a subclass says what stands around them."""

    def __init__(self, target: Path, record: Record, shape: tuple[int, ...], dtype: str) -> None:
        self.target, self.shape, self.dtype = target, shape, np.dtype(dtype)
        self.part = target.with_name(f"{target.name}.part")
        self.state = target.with_name(f"{target.name}.part.state")
        self.row = int(np.prod(shape[1:])) * self.dtype.itemsize
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
        self.header = header.getvalue()
        self._line = json.dumps(record).encode() + b"\n"
        self._record = record

    before = 0  # bytes that stand before numpy's own header

    @property
    def data(self) -> int:
        """Where the first row begins."""
        return self.before + len(self.header)

    def rows_of(self, drawn: Drawn) -> np.ndarray:
        """What of a batch this file holds."""
        return drawn.arrays()

    def place(self, walk: int, span: slice) -> range:
        """The rows that a span of a walk fills."""
        return range(span.start, span.stop)

    def begin(self) -> bool:
        """Go on with the unfinished file, or begin one of full length: a disk that is too small shows at once."""
        remove_leftovers(self.target.parent, f".{glob.escape(self.target.name)}.*")
        with self._writing():
            size = self.data + self.shape[0] * self.row
            if self.state.exists() and self.part.exists() and self.part.stat().st_size >= size:
                with self.state.open("rb") as file:
                    there = record_in(file.readline(100_000).decode(errors="replace"))
                self.check(there or {"record": "damaged"})
                if there == self._record:
                    return True
            self.state.unlink(missing_ok=True)
            with self.part.open("wb") as file:
                reserve(file.fileno(), size)
                file.write(bytes(self.before) + self.header)
                file.flush()
                os.fsync(file.fileno())
            write_whole(self.state, self._line)
        return False

    def check(self, there: Record) -> None:
        """What to do about an unfinished file of another request: refuse, for it may be hours of work."""
        check_record(self._record, there, self.part, f"Name another file, or remove {self.part.name}.")

    def has(self, walk: int, span: slice) -> bool:
        """Whether the marks of all rows of the span are set."""
        rows = self.place(walk, span)
        with self.state.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), len(rows), len(self._line) + rows.start) == b"\1" * len(rows)

    def put(self, walk: int, drawn: Drawn) -> None:
        """Write the rows, sync them, and only then mark them as done."""
        rows = self.place(walk, drawn.span)
        if not rows:
            return
        content = np.ascontiguousarray(self.rows_of(drawn)[: len(rows)], self.dtype)
        with self._writing():
            with self.part.open("r+b", buffering=0) as file:
                write_at(file.fileno(), content.tobytes(), self.data + rows.start * self.row)
                os.fsync(file.fileno())
            with self.state.open("r+b", buffering=0) as file:
                write_at(file.fileno(), b"\1" * len(rows), len(self._line) + rows.start)

    def finish(self) -> None:
        """Close the file, give it its name, forget the marks."""
        with self._writing():
            self.close()
            sync(self.part)
            self.part.replace(self.target)
            sync(self.target.parent)
            self.state.unlink()

    def close(self) -> None:
        """An .npy file is whole with its last row."""

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise AlphaflowError(
                f"{self.target}: cannot be written ({error.strerror or error}). What is drawn is kept in "
                f"{self.part.name}; the same command goes on there."
            ) from error


class NpzFile(RowFile):
    """Pictures as the one array `arr_0` of an .npz, uint8 (n, H, W, 3), as other evaluators read them."""

    before = ZIP_HEADER

    def close(self) -> None:
        """Walk over the array once for its checksum, and write what a zip has around it.

        zipfile writes every byte where it stands already, so that a kill leaves rows as they were.
        """
        end = self.data + self.shape[0] * self.row
        with (
            self.part.open("rb") as rows,
            self.part.open("r+b") as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        ):
            rows.seek(self.before)
            with archive.open(zipfile.ZipInfo(MEMBER), "w", force_zip64=True) as member:
                assert file.tell() == self.before, file.tell()
                while piece := rows.read(min(PIECE, end - rows.tell())):
                    member.write(piece)
            archive.close()
            file.truncate()


class LatentsFile(RowFile):
    """The network's own, normalised latents as one .npy, float64 (n, C, h, w)."""

    def rows_of(self, drawn: Drawn) -> np.ndarray:
        """The latents of a batch, in the network's own normalisation."""
        latents: np.ndarray = drawn.latents.cpu().numpy()
        return latents


class GridFile(RowFile):
    """The first pictures of each walk, kept until they become one PNG."""

    def __init__(
        self,
        target: Path,
        record: Record,
        shape: tuple[int, ...],
        *,
        shown: int,
        compose: Callable[[np.ndarray], bytes],
    ) -> None:
        """`shown` of each walk; `compose` makes the PNG of all rows."""
        super().__init__(target, record, shape, "|u1")
        self.shown, self._compose = shown, compose

    def check(self, there: Record) -> None:
        """An unfinished grid is no great loss: another request begins its own."""

    def place(self, walk: int, span: slice) -> range:
        """The first `shown` of each walk have a row."""
        stop = min(span.stop, self.shown)
        return range(walk * self.shown + min(span.start, stop), walk * self.shown + stop)

    def finish(self) -> None:
        """Lay the pictures out, and forget them."""
        with self.part.open("rb") as file:
            file.seek(self.data)
            pictures = np.frombuffer(file.read(self.shape[0] * self.row), np.uint8).reshape(self.shape)
        write_whole(self.target, self._compose(pictures))
        self.part.unlink()
        self.state.unlink()


def remove_leftovers(folder: Path, *patterns: str) -> None:
    """Remove what a kill left of files that were being written under temporary names; the place is held by us."""
    for pattern in patterns:
        for left in folder.glob(f"{pattern}.tmp"):
            left.unlink(missing_ok=True)


def reserve(file: int, size: int) -> None:
    """Give a file its full length, with room on the disk where the file system can promise it."""
    try:
        os.posix_fallocate(file, 0, size)
    except (AttributeError, OSError) as error:  # not every system has it, nor every file system
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(file, size)


def write_at(file: int, content: bytes, place: int) -> None:
    """Write all of it at a place; a full disk takes a part at first, and then says why."""
    view = memoryview(content)
    while view:
        count = os.pwrite(file, view, place)
        view, place = view[count:], place + count
