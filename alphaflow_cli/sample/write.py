"""`alphaflow sample`: pictures, grids and latents in files, by one process or several.

    batch b of the pictures  →  every sink that lacks them   (process r of w draws the batches with b % w == r)

    DIR/seed-000012-class-3.png      written whole or not at all; the file that is there is the picture that is done
    DIR/.sample.json                 what decides a picture's bytes: another request into the folder is refused
    FILE.part                        rows at their final places, written in any order by any process
    FILE.part.state                  one line that says what decides the rows, then a byte per row: 1 is done
    FILE.npz                         finished; that line is the comment of the zip

A batch that is there is not drawn again, so the same command goes on where it stopped. Nothing is held but the batch in
hand: rows are read and written at their places, not mapped, for mapped pages would count as this process's memory.
"""

import errno
import glob
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import numpy as np

from alphaflow_cli.data.pictures import is_picture
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import read_document, sync, write_whole
from alphaflow_cli.recipe.plan import label_rows
from alphaflow_cli.runtime.lock import check_lock, hold
from alphaflow_cli.runtime.processes import Processes, smaller_batch_if_full
from alphaflow_cli.runtime.progress import Progress, say
from alphaflow_cli.sample.generator import Drawn
from alphaflow_cli.sample.grid import even_columns, grid_by_walk, grid_form, grid_in_rows, most_in_rows, picture_png
from alphaflow_cli.sample.plan import Plan, Record, SampleRequest, plan_sampling, summary
from alphaflow_cli.text import brief, shorten

COLUMNS = 10  # of a grid
MOST_SHOWN = 1000  # pictures of a grid, which is laid out in memory
RECORD_FILE = ".sample.json"
PIECE = 1 << 22  # bytes that are read at once
MEMBER = "arr_0.npy"
ZIP_HEADER = 30 + len(MEMBER) + 20  # bytes before an .npz's first array: the entry, its name, its sizes in 64 bits


def sample_to_files(request: SampleRequest, processes: Processes) -> list[Path]:
    """Draw what is missing; returns what was written, the file or folder a user looks at first last.

    The first process holds the places and says what there is to say; the others have nothing to return.
    """
    plan = plan_sampling(request, processes)
    sinks, first, begun = make_sinks(plan), processes.rank == 0, False
    with ExitStack() as held:
        if first:
            say(summary(plan))
            for sink in sinks:
                held.enter_context(hold(sink.target, "sample", is_file=sink.is_file))
            begun = True in [sink.begin() for sink in sinks]
        processes.wait()
        try:
            draw_missing(plan, sinks, begun)
        except (KeyboardInterrupt, SystemExit):
            if first:
                say("interrupted; what is drawn is kept, the same command goes on from there")
            raise
        if first:
            for sink in sinks:
                sink.finish()
    return [sink.target for sink in sinks] if first else []


def make_sinks(plan: Plan) -> "list[PictureFolder | RowFile]":
    """Everything that is to be written, each process with its own view of it."""
    request, side = plan.request, plan.generator.recipe.data.image_size
    sinks: list[PictureFolder | RowFile] = []
    if request.latents is not None:  # the network's own, normalised
        sinks.append(RowFile(plan, request.latents, plan.generator.shape, "<f8"))
    if request.out is not None and request.out.suffix == ".npz":
        sinks.append(NpzFile(plan, request.out, (side, side, 3)))
    elif request.out is not None:
        sinks.append(PictureFolder(plan, request.out))
    if request.grid is not None:
        count, fitting = len(request.seeds), most_in_rows(COLUMNS, side, grid_form(request.grid))
        shown = min(count, *((MOST_SHOWN, fitting) if len(plan.walks) == 1 else (2 * COLUMNS,)))
        if shown < count and plan.processes.rank == 0:
            each = "" if len(plan.walks) == 1 else ", a row for each number of evaluations"
            say(f"{request.grid}: shows the first {shown:,} of {count:,} pictures{each}")
        sinks.append(GridFile(plan, request.grid, (side, side, 3), shown=shown))
    return sinks


def draw_missing(plan: Plan, sinks: "Sequence[PictureFolder | RowFile]", begun: bool) -> None:
    """Draw this process's batches that a sink lacks; the first process shows the progress of all."""
    request, processes = plan.request, plan.processes

    def is_done(walk: int, span: slice) -> bool:
        return all(sink.has(walk, span) for sink in sinks)

    total = len(request.seeds) * len(plan.walks)
    done = sum(span.stop - span.start for walk, span in plan.spans() if is_done(walk, span)) if begun else 0
    if done:
        say(f"{done:,} of {total:,} pictures were drawn before: going on")
    decoded = request.out is not None or request.grid is not None
    with Progress("sampling", total, unit="img", done=done, shown=processes.rank == 0) as bar:
        for walk, span in islice(plan.spans(), processes.rank, None, processes.size):
            if is_done(walk, span):
                continue
            with smaller_batch_if_full(request.batch):
                stream = plan.generator.stream(request.seeds, plan.labels, plan.walks[walk], [span], decoded=decoded)
                (drawn,) = stream
            for sink in sinks:
                check_lock(sink.target, is_file=sink.is_file)
                sink.put(walk, drawn)
            bar.advance(min(len(drawn.seeds) * processes.size, total - bar.done))
        processes.wait()
        bar.advance(total - bar.done)


def check_record(text: str, wanted: Record, target: Path, advice: str) -> None:
    """Refuse to mix pictures of two requests; what differs is named."""
    try:
        there = json.loads(text)
    except (ValueError, RecursionError):
        there = None
    if not isinstance(there, dict) or not all(isinstance(value, str) for value in there.values()):
        there = {"record": "damaged"}
    names = [name for name in wanted | there if wanted.get(name) != there.get(name)]
    if names:
        differing = "; ".join(
            f"{name} {shorten(there.get(name, 'unknown'), 80)} there, {shorten(wanted.get(name, 'unknown'), 80)} here"
            for name in names
        )
        raise AlphaflowError(f"{target}: holds pictures of another request ({differing}). {advice}")


def is_foreign(path: Path) -> bool:
    """Whether it is a folder or a picture that `sample` did not write; hidden ones and other files may stay."""
    ours = re.fullmatch(r"(nfe-\d+-)?seed-\d+(-class-\d+)?\.png", path.name)
    return not ours and not path.name.startswith(".") and (path.is_dir() or is_picture(path.name))


class PictureFolder:
    """PNG files in a folder, with the seed and the label in their names; each is written whole or not at all."""

    is_file = False

    def __init__(self, plan: Plan, target: Path) -> None:
        self.plan, self.target, self.record = plan, target, plan.record()

    def begin(self) -> bool:
        """Read the record, or write it; pictures without a record do not count as this request's.

        Returns whether anything may be there. The first process calls this alone.
        """
        path = self.target / RECORD_FILE
        remove_leftovers(self.target, ".seed-*", ".nfe-*", f".{RECORD_FILE}.*")
        if path.exists():
            advice = "Name another --out, or remove that folder."
            check_record(read_document(path), self.record, self.target, advice)
            return True
        self.target.mkdir(parents=True, exist_ok=True)
        if foreign := next(filter(is_foreign, sorted(self.target.iterdir())), None):
            raise AlphaflowError(
                f"{self.target}: holds {brief(foreign.name)}, which is not of alphaflow sample: its pictures and ours "
                "would be mixed. Give a new or an empty folder: --out DIR"
            )
        if next(self.target.glob("*.png"), None) is not None:
            for walk, span in self.plan.spans():
                for file in self._files(walk, span):
                    file.unlink(missing_ok=True)
        write_whole(path, json.dumps(self.record, indent=1) + "\n")
        return False

    def _files(self, walk: int, span: slice) -> Iterator[Path]:
        """DIR/seed-000012-class-3.png; the NFE in front where there are several walks."""
        plan = self.plan
        front = f"nfe-{plan.walks[walk].nfe}-" if len(plan.walks) > 1 else ""
        for seed, label in zip(plan.request.seeds[span], plan.labels[span], strict=True):
            name = f"{front}seed-{seed:06d}" + (f"-class-{label}" if label_rows(plan.generator.recipe) else "")
            yield self.target / f"{name}.png"

    def has(self, walk: int, span: slice) -> bool:
        """Whether every file of the span is there."""
        return all(file.exists() for file in self._files(walk, span))

    def put(self, walk: int, drawn: Drawn) -> None:
        """Write each picture that is not there yet."""
        for file, picture in zip(self._files(walk, drawn.span), drawn.arrays(), strict=True):
            if not file.exists():
                write_whole(file, picture_png(picture))

    def finish(self) -> None:
        """Keep the record, so that another request is recognised; nothing else is left to do."""


class RowFile:
    """Rows of one shape and type at their final places in FILE.part; as it stands, an .npy file.

    A file of rows must know whose rows they are: the seeds and classes are part of its record.
    """

    is_file = True
    before = 0  # bytes that stand before numpy's own header

    def __init__(
        self, plan: Plan, target: Path, row: tuple[int, ...], dtype: str = "|u1", *, shown: int | None = None
    ) -> None:
        """The first `shown` pictures of each walk have a row; None: all of them."""
        request, self.plan, self.target, self.dtype = plan.request, plan, target, np.dtype(dtype)
        count = len(request.seeds)
        self.shown = count if shown is None else shown
        self.shape = (self.shown * len(plan.walks), *row)
        self.part = target.with_name(f"{target.name}.part")
        self.state = target.with_name(f"{target.name}.part.state")
        self.row = int(np.prod(row)) * self.dtype.itemsize
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": self.shape})
        self.header = bytes(self.before) + header.getvalue()
        seeds, classes = f"{count:,}: {request.seeds}", request.classes or "drawn per seed"
        self.record = {**plan.record(), "seeds": seeds, "classes": classes}
        self.line = json.dumps(self.record).encode() + b"\n"

    @property
    def end(self) -> int:
        """The length in bytes of the header and all rows."""
        return len(self.header) + self.shape[0] * self.row

    def _rows(self, walk: int, span: slice) -> range:
        """The rows that a span of a walk fills."""
        stop = min(span.stop, self.shown)
        return range(walk * self.shown + min(span.start, stop), walk * self.shown + stop)

    def begin(self) -> bool:
        """Go on with the unfinished file, or begin one of full length: a disk that is too small shows at once."""
        remove_leftovers(self.target.parent, f".{glob.escape(self.target.name)}.*")
        if self.is_finished():
            self.state.unlink(missing_ok=True)  # a kill came between the file's name and this
            return True
        with self._writing():
            if self.state.exists() and self.part.exists():
                with self.state.open("rb") as file:
                    line = file.readline(100_000)
                if self.goes_on(line) and self.part.stat().st_size >= self.end:
                    return True
            self.state.unlink(missing_ok=True)
            with self.part.open("wb") as file:
                reserve(file.fileno(), self.end)
                file.write(self.header)
                file.flush()
                os.fsync(file.fileno())
            write_whole(self.state, self.line)
        return False

    def goes_on(self, line: bytes) -> bool:
        """Whether the unfinished file is of this request; another's is refused, for it may be hours of work."""
        advice = f"Name another file, or remove {self.part.name}."
        check_record(line.decode(errors="replace"), self.record, self.part, advice)
        return True

    def is_finished(self) -> bool:
        """Whether the file is there, says that it is this request's, and is not being written again."""
        return False

    def has(self, walk: int, span: slice) -> bool:
        """Whether the marks of all rows of the span are set; a finished file has no marks any more."""
        if self.is_finished():
            return True
        rows = self._rows(walk, span)
        with self.state.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), len(rows), len(self.line) + rows.start) == b"\1" * len(rows)

    def put(self, walk: int, drawn: Drawn) -> None:
        """Write the rows, sync them, and only then mark them as done."""
        rows = self._rows(walk, drawn.span)
        if not rows or self.is_finished():
            return
        batch = drawn.latent_arrays() if self.dtype.kind == "f" else drawn.arrays()
        content = np.ascontiguousarray(batch[: len(rows)], self.dtype)
        with self._writing():
            with self.part.open("r+b", buffering=0) as file:
                write_at(file.fileno(), content.tobytes(), len(self.header) + rows.start * self.row)
                os.fsync(file.fileno())
            with self.state.open("r+b", buffering=0) as file:
                write_at(file.fileno(), b"\1" * len(rows), len(self.line) + rows.start)

    def finish(self) -> None:
        """Give the file its name, and forget the marks."""
        with self._writing():
            sync(self.part)
            self.part.replace(self.target)
            sync(self.target.parent)
            self.state.unlink()

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

    def is_finished(self) -> bool:
        """Whether nothing is unfinished, and the zip's comment is the record of this request."""
        if self.part.exists():
            return False
        try:
            with zipfile.ZipFile(self.target) as archive:
                return archive.comment == self.line[: zipfile.ZIP_MAX_COMMENT]
        except (OSError, zipfile.BadZipFile):
            return False

    def finish(self) -> None:
        """Walk over the array once for its checksum, and write what a zip has around it.

        zipfile writes every byte where it stands already, so that a kill leaves rows as they were.
        """
        if self.is_finished():
            return
        with (
            self._writing(),
            self.part.open("rb") as rows,
            self.part.open("r+b") as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        ):
            rows.seek(self.before)
            with archive.open(zipfile.ZipInfo(MEMBER), "w", force_zip64=True) as member:
                assert file.tell() == self.before, file.tell()
                while piece := rows.read(min(PIECE, self.end - rows.tell())):
                    member.write(piece)
            archive.comment = self.line[: zipfile.ZIP_MAX_COMMENT]
            archive.close()
            file.truncate()
        super().finish()


class GridFile(RowFile):
    """The first pictures of each walk, kept until they become one picture."""

    def goes_on(self, line: bytes) -> bool:
        """Begin anew: an unfinished grid is no great loss."""
        return line == self.line

    def finish(self) -> None:
        """Lay the pictures out, and forget them."""
        with self.part.open("rb") as file:
            file.seek(len(self.header))
            pictures = np.frombuffer(file.read(self.end - len(self.header)), np.uint8).reshape(self.shape)
        write_whole(self.target, self.compose(pictures))
        self.part.unlink()
        self.state.unlink()

    def compose(self, pictures: np.ndarray) -> bytes:
        """One walk: pictures in reading order. Several: the same seeds in rows, a walk per row."""
        generator, walks = self.plan.generator, self.plan.walks
        rows, known, labels = pictures.reshape(len(walks), -1, *self.shape[1:]), generator.class_names, []
        if label_rows(generator.recipe):
            labels = self.plan.labels[: self.shown]
        names = [known[label] if label < len(known) else str(label) for label in labels]
        form = grid_form(self.target)
        if len(walks) == 1:
            return grid_in_rows(list(rows[0]), even_columns(rows.shape[1], COLUMNS), names, form)
        drawn = [(f"{walk.nfe} NFE", list(each)) for walk, each in zip(walks, rows, strict=True)]
        return grid_by_walk(drawn, 2 * COLUMNS, names, form)


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
