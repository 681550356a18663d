"""Pictures in parquet files: on this disk, or on the Hub, whose Image and ClassLabel columns are known by the schema.

A row is a picture; its name is FILE#ROW. The footers are read first: they say the columns, the classes' names and how
many rows each row group has. Labels are read then, a column of small numbers. Pictures come one row group at a time,
when it is their turn, with one more being fetched ahead; so memory holds two row groups, and a run goes on at any row.

pyarrow reads the files (the extra `parquet`). It is imported when a parquet file is opened.
"""

import posixpath
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from alphaflow_cli.data.columns import LabelColumn, Layout, choice_of, layout_of, parquet_library
from alphaflow_cli.data.pictures import Fetch, Labels, Source, fetch_now
from alphaflow_cli.data.tables import label_of
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import MAX_BYTES, Stamp, changed, path_and_stamp, read_file, stamp_of
from alphaflow_cli.remote.ranges import LEADS_OUT, Ranges
from alphaflow_cli.text import brief

MOST_OF_A_GROUP = 2 << 30  # bytes of pictures in one row group, unpacked: two of them lie in memory
READERS = 16  # threads that read footers and labels: on the Hub they wait for answers
BATCH = 256  # rows that are unpacked by one call


class TableFile(Protocol):
    """A file on this disk or on the Hub."""

    @property
    def name(self) -> str:
        """Its path in the data set."""

    @property
    def where(self) -> str:
        """The name by which messages call the file."""

    def open(self) -> AbstractContextManager[Any]:
        """Open it for reading by one thread; each thread has its own place in it."""

    def check(self) -> None:
        """End the run where its bytes are no longer those of the listing."""

    def stamp(self) -> list[Any]:
        """Plain values that change whenever its bytes may have changed."""

    def beside(self, path: str) -> bytes:
        """A file that a row names instead of holding it."""


@dataclass(frozen=True)
class LocalFile:
    """A parquet file on this disk, as it was when it was listed."""

    name: str
    path: Path
    at_listing: Stamp

    @property
    def where(self) -> str:
        """The path, for messages."""
        return str(self.path)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open it; one that is gone since its listing ends the run."""
        try:
            file = self.path.open("rb")
        except OSError as fault:
            raise AlphaflowError(f"{self.path}: cannot be read ({fault.strerror}); try again later") from fault
        with file:
            yield file

    def check(self) -> None:
        """End the run where the file was written to since its listing."""
        try:
            same = stamp_of(self.path) == self.at_listing
        except OSError:
            same = False
        if not same:
            raise changed(self.path)

    def stamp(self) -> list[Any]:
        """Path, size and time of the file."""
        return path_and_stamp(self.path)

    def beside(self, path: str) -> bytes:
        """Read a picture that lies below the file's folder; any other path is none of the data set's."""
        try:
            target = (self.path.parent / path).resolve()
        except RuntimeError as fault:  # Python 3.13 leaves it to `read_file`
            raise OSError("its path leads nowhere (a circle of links)") from fault
        if not target.is_relative_to(self.path.parent.resolve()):
            raise OSError(LEADS_OUT)
        return read_file(target)


@dataclass(frozen=True)
class Group:
    """One row group: the line of its first row in the list of all pictures, and how many rows it has."""

    file: int
    number: int
    first: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Parquet(Source):
    """The rows of parquet files, in the order of the files."""

    files: Sequence[TableFile]
    groups: Sequence[Group]
    layout: Layout
    given_facts: dict[str, Any] = field(default_factory=dict)
    kind: str = "parquet"

    @property
    def paths(self) -> Sequence[str]:
        """The names without the files' folders, which are no classes."""
        return [name.rpartition("/")[2] for name in self.names]

    def facts(self) -> dict[str, Any]:
        """The commit on the Hub, or the size of all files here; the column of the pictures, where one was chosen."""
        return self.given_facts

    def stamps(self, lines: Sequence[int]) -> list[Any]:
        """Of each file, what changes whenever its bytes may have changed."""
        return [place.stamp() for place in self.files]

    def labels(self, column: str) -> Labels | None:
        """The class of every row, where there is a column of classes."""
        label = self.layout.label(column, self.files[0].where)
        if label is None:
            return None
        with ThreadPoolExecutor(READERS) as pool:
            parts = pool.map(partial(_labels_of, label), self.files)
            return Labels([key for part in parts for key in part], label.order)

    @contextmanager
    def reading(self, lines: Sequence[int]) -> Iterator[Iterator[tuple[int, Fetch]]]:
        """Read the row groups of these lines one after the other, one ahead; the fetches only take from memory."""
        with _Reader(self) as reader, ExitStack() as held:
            ahead = held.enter_context(ThreadPoolExecutor(1, "row-groups"))
            held.callback(ahead.shutdown, cancel_futures=True)
            held.callback(reader.stop)
            yield self._walk(lines, lambda group, rows: ahead.submit(reader.read, group, rows))

    def _walk(
        self, lines: Sequence[int], fetch: Callable[[Group, list[int]], "Future[list[Fetch]]"]
    ) -> Iterator[tuple[int, Fetch]]:
        pending: list[tuple[list[int], Future[list[Fetch]]]] = []
        for group, wanted in self._parts(lines):
            pending.append((wanted, fetch(group, [line - group.first for line in wanted])))
            if len(pending) == 2:
                here, pictures = pending.pop(0)
                yield from zip(here, pictures.result(), strict=True)
        for here, pictures in pending:
            yield from zip(here, pictures.result(), strict=True)

    def _parts(self, lines: Sequence[int]) -> Iterator[tuple[Group, list[int]]]:
        """Cut the lines where one row group ends and the next begins."""
        starts = [group.first for group in self.groups]
        for index, same in groupby(lines, key=lambda line: bisect(starts, line) - 1):
            yield self.groups[index], list(same)


@dataclass(frozen=True)
class _Opened:
    """A file that is open, and pyarrow's view of it."""

    file: Any
    table: Any


class _Reader:
    """Reads row groups, and keeps the file of the last one open."""

    def __init__(self, source: Parquet) -> None:
        self.source, self.held = source, ExitStack()
        self.index, self.opened = -1, _Opened(None, None)

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *fault: object) -> None:
        self.held.close()

    def stop(self) -> None:
        """Give up what is being fetched from the Hub, so that an interruption need not wait for it."""
        if isinstance(self.opened.file, Ranges):
            self.opened.file.stop()

    def read(self, group: Group, rows: list[int]) -> list[Fetch]:
        """Some rows of a row group, each as a function that gives the picture's bytes."""
        place, layout = self.source.files[group.file], self.source.layout
        if group.file != self.index:
            self.held.close()
            self.index, self.opened = group.file, _opened(place, self.held, layout)
        what = f"row group {group.number}, rows {group.first:,} to {group.first + group.rows - 1:,} of all,"
        fetches: list[Fetch] = []
        with _readable(place, what):
            wanted, at = iter([*rows, -1]), 0
            row = next(wanted)
            for batch in self.opened.table.iter_batches(BATCH, row_groups=[group.number], columns=[layout.image]):
                cells = batch.column(layout.image)
                while 0 <= row < at + len(cells):
                    fetch: Fetch = partial(_picture, cells, row - at, place)
                    fetches.append(fetch if 2 * len(rows) > group.rows else fetch_now(fetch))
                    row = next(wanted)
                at += len(cells)
            if at != group.rows:
                raise EOFError(f"{at:,} rows instead of {group.rows:,}")
        return fetches


def open_parquet(name: str, files: Sequence[TableFile], image_column: str, facts: dict[str, Any]) -> Parquet:
    """List the rows of these files; their footers alone are read."""
    parquet_library(files[0].where)
    with ThreadPoolExecutor(READERS) as pool:
        footers = list(pool.map(_footer, files))
    layout = layout_of(footers[0][0], files[0].where, image_column)
    facts = facts | choice_of(footers[0][0], files[0].where, image_column)
    groups: list[Group] = []
    names: list[str] = []
    for index, (place, (schema, sizes)) in enumerate(zip(files, footers, strict=True)):
        if layout_of(schema, place.where, image_column) != layout:
            raise AlphaflowError(
                f"{place.where}: its columns or classes differ from those of {files[0].where}. Give one set of files, "
                "or on the Hub one part with :NAME"
            )
        start = len(names)
        for number, (rows, size) in enumerate(sizes):
            if size > MOST_OF_A_GROUP:
                raise AlphaflowError(
                    f"{place.where}: row group {number} has {size:,} bytes, at most {MOST_OF_A_GROUP:,} are read at "
                    "once. Write it again with smaller row groups"
                )
            groups.append(Group(index, number, len(names), rows))
            names += [f"{place.name}#{row}" for row in range(len(names) - start, len(names) - start + rows)]
    groups = [group for group in groups if group.rows]
    notes = [f"columns {brief(', '.join(layout.others))}"]
    return Parquet(name=name, names=names, notes=notes, files=files, groups=groups, layout=layout, given_facts=facts)


def local_parquet(name: str, paths: Sequence[Path], root: Path, image_column: str) -> Parquet:
    """List the rows of parquet files on this disk; their names are relative to `root`."""
    files = [LocalFile(posixpath.join(*path.relative_to(root).parts), path, stamp_of(path)) for path in paths]
    return open_parquet(name, files, image_column, {"bytes": sum(file.at_listing.size for file in files)})


def _footer(place: TableFile) -> tuple[Any, list[tuple[int, int]]]:
    """The schema of a file; of each row group its rows, and its bytes in memory."""
    with ExitStack() as held, _readable(place, "its end"):
        metadata = _opened(place, held).table.metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        return metadata.schema.to_arrow_schema(), [(group.num_rows, group.total_byte_size) for group in groups]


def _labels_of(label: LabelColumn, place: TableFile) -> list[str | None]:
    """The labels of all rows of a file."""
    with ExitStack() as held:
        with _readable(place, f"its column {label.name}"):
            opened = _opened(place, held, texts=[label.name] if label.holds_texts else [])
            cells = opened.table.read(columns=[label.name]).column(label.name).to_pylist()
        return [None if cell is None else _key(cell, label, place, row) for row, cell in enumerate(cells)]


def _key(cell: object, label: LabelColumn, place: TableFile, row: int) -> str:
    where = f"{place.where}: row {row:,}"
    if label.holds_texts:
        return label_of(cell, where)
    assert isinstance(cell, int), label
    most = len(label.order) if label.order is not None else None
    if cell < 0 or (most is not None and cell >= most):
        known = f"0 … {most - 1:,}, as the file names {most:,} classes" if most is not None else "0 and above"
        raise AlphaflowError(
            f"{where}: its {label.name} is {cell:,}, out of range ({known}). Mend it, or take another --label-column, "
            "or --unlabelled"
        )
    return label.order[cell] if label.order is not None else str(cell)


def _opened(place: TableFile, held: ExitStack, layout: Layout | None = None, texts: Sequence[str] = ()) -> _Opened:
    """Open a file with pyarrow. Bytes are kept as a dictionary: one huge value in many rows is in memory once."""
    shared = [layout.bytes_column] if layout else list(texts)
    file = held.enter_context(place.open())
    with _readable(place, "its end"):
        library = parquet_library(place.where)
        options: dict[str, Any] = {"page_checksum_verification": True, "pre_buffer": True}
        return _Opened(file, library.parquet.ParquetFile(file, read_dictionary=shared, **options))


@contextmanager
def _readable(place: TableFile, what: str) -> Iterator[None]:
    """Turn damage into one line that names the file and the part of it."""
    library = parquet_library(place.where)
    try:
        yield
        place.check()
    except (library.lib.ArrowException, OSError, EOFError, OverflowError, UnicodeDecodeError) as fault:
        place.check()
        raise AlphaflowError(
            f"{place.where}: {what} cannot be read, so this is no whole parquet file ({brief(fault).rstrip('.')}). "
            "Fetch or write it again"
        ) from fault


def _picture(cells: Any, row: int, place: TableFile) -> bytes:
    """The bytes of one picture; a row without one is an OSError, as a file that is gone."""
    cell = cells[row]
    path = None
    if cells.type.num_fields:  # a struct of bytes and path
        cell, path = (cell["bytes"], cell.get("path")) if cell.is_valid else (cell, None)
    if not cell.is_valid and path is not None and path.is_valid:
        return place.beside(_path(path))
    if not cell.is_valid:
        raise OSError("there is no picture in this row")
    data = cell.as_py()
    if len(data) > MAX_BYTES:
        raise OSError(f"{len(data):,} bytes, the limit is {MAX_BYTES:,}")
    return bytes(data)


def _path(cell: Any) -> str:
    try:
        path = str(cell.as_py())
    except UnicodeDecodeError as fault:
        raise OSError("its path is no text") from fault
    if "\0" in path:
        raise OSError("its path holds a null byte")
    return path
