"""Pictures to be measured, addressable by index: `count`, `images(start, stop)`, and a description for the protocol.

Pictures are measured as they are: those of a reference may be cropped and resized, those of a model never. A checkpoint
is one more source: its picture i is that of seed i, read from the stream that `sample` writes.
"""

import hashlib
import json
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor

from alphaflow_cli.core.pixels import refuse_bad
from alphaflow_cli.data.classes import choose_split
from alphaflow_cli.data.manifest import Crop
from alphaflow_cli.data.pictures import (
    MAX_PIXELS,
    Bad,
    BadPicture,
    Fetch,
    Source,
    decode,
    decode_whole,
    read_picture,
)
from alphaflow_cli.data.sources import open_source
from alphaflow_cli.errors import DAMAGE, AlphaflowError
from alphaflow_cli.files import path_and_stamp, user_path
from alphaflow_cli.runtime.transfer import Arriving, Laps
from alphaflow_cli.sample.generator import Generator
from alphaflow_cli.sample.walk import LazyLabels, Walk, draw_labels
from alphaflow_cli.tensors import Array
from alphaflow_cli.text import brief

READERS = 8  # threads that fetch and decode
FIRST_SEED = 0  # published evaluations use seeds 0 … 49,999
WAYS: dict[Crop, str] = {"square": "centre crop, Lanczos", "adm": "halved by box, bicubic, centre crop"}
BROKEN = (EOFError, RuntimeError, OverflowError, MemoryError, struct.error, zipfile.BadZipFile, zlib.error)  # of zips


@dataclass(frozen=True)
class LeftOut:
    """A bad picture that was left out, and why."""

    name: str
    why: str


class ImageSource(ABC):
    """Pictures 0 … count − 1, any range of them at any time."""

    count: int
    size: tuple[int, int]  # height and width, the same for all pictures
    label: str  # what the pictures are, in a few words for a row of a table
    seconds: dict[str, float]  # spent on pictures so far, by part; may be empty
    crop: Crop | None = None  # by which the pictures that a model has learnt from became square, where that is known
    task = "features"  # what is done with them, for the bar
    leaves_out = False  # whether bad pictures are left out; else they end the pass

    @abstractmethod
    def images(self, start: int, stop: int) -> Tensor:
        """Pictures start … stop − 1 as uint8 (stop − start, 3, H, W); a GPU may not have made them yet.

        There are fewer where bad ones are left out.
        """

    def left_out(self) -> list[LeftOut]:
        """The bad pictures among those that `images` was asked for last."""
        return []

    def arrived(self) -> int:
        """Look at what `images` gave, in the same order, now that the device has made it: refuse what is broken.

        The number of values that lay beyond ±1.2 before they became bytes; 0 where bytes are all there is.
        """
        return 0

    def close(self) -> None:  # noqa: B027 (most sources have nothing open)
        """Close what is open; it is opened again when the next picture is wanted."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Everything that a protocol says about the pictures, as plain values."""

    def identity(self) -> Any:
        """Plain values that change whenever the pictures may have changed; nothing is opened."""
        return self.describe()

    def fingerprint(self) -> str:
        """A hash of the identity; it names the folder of unfinished work."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def open_pictures(
    text: str,
    *,
    size: int | None,
    limit: int | None,
    crop: Crop = "square",
    image_column: str = "",
    bad: Bad | None = None,
) -> ImageSource:
    """Open what a user may point at: a folder, archives, parquet, hf://…, shapes:N, or a .npz of pictures.

    `bad`: of real pictures, what is done about a bad one; None: of pictures that are to be scored none is left out.
    """
    if text.endswith(".npz"):
        return PictureArray(user_path(text), limit=limit)
    return PictureFiles(open_source(text, image_column), size=size, limit=limit, crop=crop, bad=bad)


class PictureFiles(ImageSource):
    """The pictures of a folder, a zip, a tar, a Hub dataset or an embedded set, sorted by name."""

    def __init__(
        self, source: Source, *, size: int | None, limit: int | None, crop: Crop = "square", bad: Bad | None = None
    ) -> None:
        """`size` None leaves them as they are, and they must be of one size; `crop` says how they become square."""
        self._source, self._size, self._crop, self.seconds = source, size, crop, dict[str, float]()
        self._bad, self._left_out, self.leaves_out = bad, list[LeftOut](), bad == "skip"
        lines: Sequence[int] = range(len(source.names))
        self.label = source.name  # and the split that is taken of it
        if size is not None:  # a reference is built from the training split, as latents are
            lines, prefix = choose_split(source.paths)
            self.label += f"/{prefix.rstrip('/')}" if prefix else ""
        self._lines, self._of = _spread(lines, limit), len(lines)
        self._open = ExitStack()  # holds the source open while it is walked through
        self._walk: Iterator[tuple[int, Fetch]] = iter(())
        self._reached = len(self._lines)  # where the walk stands; a compressed tar can only be walked forward
        self.count = len(self._lines)
        if not self.count:
            why = ", ".join(source.notes) or "it is empty"
            raise AlphaflowError(
                f"{source.name}: there are no pictures in it ({why}). Give a folder or archive of some"
            )
        height, width = (size, size) if size is not None else self._first_size()
        self.size = int(height), int(width)

    def _first_size(self) -> tuple[int, int]:
        """The height and width of the first picture that is not left out."""
        for place in range(self.count):
            picture = self._read(place, place + 1)[0]
            if not isinstance(picture, LeftOut):
                return picture.shape[1:]
        raise AlphaflowError(f"{self._source.name}: none of its {self.count:,} pictures is whole")

    def images(self, start: int, stop: int) -> Tensor:
        """Fetch and decode pictures in threads, in order; all must be of one size."""
        decoded = self._read(start, stop)
        self._left_out = [each for each in decoded if isinstance(each, LeftOut)]
        pictures = [np.zeros((0, 3, *self.size), np.uint8)]
        for line, picture in zip(self._lines[start:stop], decoded, strict=True):
            if isinstance(picture, LeftOut):
                continue
            if picture.shape[1:] != self.size:
                here, first = picture.shape[1:], self._source.names[self._lines[0]]
                raise AlphaflowError(
                    f"{self._source.name}: {self._source.names[line]} has {here[0]}×{here[1]} px, {first} has "
                    f"{self.size[0]}×{self.size[1]}. Measured pictures must be of one size, and are never resized."
                )
            pictures.append(picture[None])
        return torch.from_numpy(np.concatenate(pictures))

    def left_out(self) -> list[LeftOut]:
        """The bad pictures of the last span."""
        return self._left_out

    def _read(self, start: int, stop: int) -> "list[Array | LeftOut]":
        if start < self._reached:
            self.close()
            self._walk = self._open.enter_context(self._source.reading(self._lines[start:]))
            self._reached = start
        taken = list(islice(self._walk, start - self._reached, stop - self._reached))
        self._reached = stop
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(lambda each: self._decode(*each), taken))

    def close(self) -> None:
        """End the walk; the next picture begins another one."""
        self._reached = len(self._lines)
        self._open.close()

    def _decode(self, line: int, fetch: Fetch) -> "Array | LeftOut":
        whole = partial(decode_whole, max_pixels=MAX_PIXELS)
        square = partial(decode, size=self._size or 0, max_pixels=MAX_PIXELS, crop=self._crop)
        try:
            return read_picture(fetch, whole if self._size is None else square)
        except BadPicture as fault:
            name = f"{self._source.name}/{self._source.names[line]}"
            if self.leaves_out:
                return LeftOut(self._source.names[line], str(fault))
            advice = "Replace or remove it; nothing was measured without it."
            if self._bad is not None:
                advice = "Mend or remove it, or leave such pictures out: alphaflow reference SOURCE --bad skip -o FILE"
            raise AlphaflowError(f"{name}: {fault}. {advice}") from fault

    def describe(self) -> dict[str, Any]:
        """Source, count and preparation; the hash of the content is taken during the pass."""
        prepared = "as they are" if self._size is None else f"{WAYS[self._crop]} to {self._size} px"
        facts = {"kind": self._source.kind, "name": self.label, "count": self.count, "of": self._of}
        return {**facts, "prepared": prepared, **self._source.facts()}

    def identity(self) -> Any:
        """Names, sizes and times of the files."""
        facts: list[Any] = [self.describe(), [self._source.names[line] for line in self._lines]]
        return [*facts, *self._source.stamps(self._lines)]


class PictureArray(ImageSource):
    """Pictures of a .npz: its array `arr_0`, uint8 (N, H, W, 3), as ADM's evaluator takes them."""

    def __init__(self, path: Path, *, limit: int | None) -> None:
        self._path, self.seconds = path, dict[str, float]()
        try:
            names, held = read_npz(path, ("arr_0",))
            if "arr_0" not in held:
                raise ValueError(f"it holds {', '.join(names) or 'nothing'}")
        except ValueError as fault:
            raise AlphaflowError(f"{path}: no array arr_0 of pictures in it ({fault})") from fault
        array = held["arr_0"]
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
            advice = "Write them so" if array.dtype == np.uint8 else "Round them first"
            raise AlphaflowError(
                f"{path}: arr_0 is {array.dtype} {array.shape}; pictures are uint8 (N, H, W, 3). {advice}."
            )
        self._array = array[_spread(range(len(array)), limit)] if limit else array
        self._of = len(array)
        self.count = len(self._array)
        self.size = (int(array.shape[1]), int(array.shape[2]))
        self.label = path.name

    def images(self, start: int, stop: int) -> Tensor:
        """Some of the array's pictures, channels first."""
        return torch.from_numpy(np.ascontiguousarray(self._array[start:stop].transpose(0, 3, 1, 2)))

    def describe(self) -> dict[str, Any]:
        """The file's name and how many pictures it holds."""
        prepared = "as they are"
        return {"kind": "npz", "name": self.label, "count": self.count, "of": self._of, "prepared": prepared}

    def identity(self) -> Any:
        """The name, size and time of the file."""
        return [self.describe(), path_and_stamp(self._path)]


def crop_of(prepared: str) -> Crop | None:
    """The crop that a reference's words about its pictures name; None where they name none."""
    return next((name for name, way in WAYS.items() if prepared.startswith(f"{way} to")), None)


def _spread(lines: Sequence[int], limit: int | None) -> Sequence[int]:
    """Take `limit` lines evenly: the first ones of a sorted source are all of one class."""
    if limit is None or limit >= len(lines):
        return lines
    return [lines[i * len(lines) // limit] for i in range(limit)]


class GeneratedImages(ImageSource):
    """The pictures that a checkpoint draws by one walk through time, one for each seed from the first one on."""

    def __init__(
        self, generator: Generator, walk: Walk, *, count: int, draw: str, name: str = "", first: int = FIRST_SEED
    ) -> None:
        """`first`: the seed of picture 0."""
        self._generator, self._walk, self._draw = generator, walk, draw
        self.count, self.seconds = count, {"network": 0.0, "decoder": 0.0}
        side, learnt = generator.recipe.data.image_size, generator.origin.get("crop") or generator.recipe.data.crop
        self.crop = next((name for name in WAYS if name == learnt), None)
        self.size = (side, side)
        self._seeds = range(first, first + count)
        classes = generator.recipe.data.classes
        self._labels = LazyLabels(self._seeds, lambda places, seeds: draw_labels(seeds, classes, draw))
        self.label = f"{name or generator.recipe.name or 'checkpoint'}, {walk.nfe} NFE, {walk}"
        self.label += f", seeds {first:,} to {first + count - 1:,}" if first != FIRST_SEED else ""
        self.task = f"{walk.nfe} NFE: sampling, features"
        self._queued = deque[tuple[Arriving, Laps]]()

    def images(self, start: int, stop: int) -> Tensor:
        """The stream's pictures of this span, on the generator's device, not looked at yet."""
        (drawn,) = self._generator.stream(self._seeds, self._labels, self._walk, [slice(start, stop)])
        assert drawn.unchecked is not None
        assert drawn.bad is not None
        assert drawn.far is not None
        self._queued.append((Arriving({"bad": drawn.bad, "far": drawn.far}), drawn.laps))
        return drawn.unchecked

    def arrived(self) -> int:
        """Refuse values that are not finite; what the pictures took is added to `seconds`."""
        flags, laps = self._queued.popleft()
        seen = flags.fetch()
        refuse_bad(seen["bad"])
        for part, spent in laps.seconds().items():
            self.seconds[part] += spent
        return int(seen["far"].sum())

    def close(self) -> None:
        """Forget what was queued: a pass that failed left it behind."""
        self._queued.clear()

    def describe(self) -> dict[str, Any]:
        """Everything that decides the pictures, for the protocol: weights, walk, labels, seeds, precision."""
        origin, recipe = self._generator.origin, self._generator.recipe
        channels = self._walk.guidance_channels  # only where it is not all: earlier numbers keep their fingerprint
        partly: dict[str, Any] = {} if channels is None else {"guidance_channels": channels}
        if self._generator.named_decoder:
            partly["autoencoder_sha256"] = self._generator.named_decoder
        if self._walk.scale is not None:
            mix = recipe.guidance
            partly |= {"guidance_scale": self._walk.scale, "guidance_interval": self._walk.interval}
            partly |= {"scales_in_training": {"most": mix.scale_max, "beta": mix.scale_beta, "interval": mix.interval}}
        return partly | {
            "kind": "checkpoint",
            "name": recipe.name,
            "count": self.count,
            "checkpoint_sha256": self._generator.digest,
            "step": origin.get("step"),
            "weights": origin.get("weights"),
            "half_life": origin.get("half_life"),
            "sampler": self._walk.sampler,
            "times": list(self._walk.grid),
            "nfe": self._walk.nfe,
            "guidance_at_sampling": self._walk.guidance,
            "guidance_in_training": {"omega": recipe.guidance.omega, "kappa": recipe.guidance.kappa},
            "labels": self._draw if recipe.data.classes else "none",
            "seeds": [self._seeds[0], self._seeds[-1]],
            "noise": "torch.Generator on the CPU, one per seed",
            "pixels": recipe.data.pixels,
            "precision": self._generator.precision,
            "autoencoder": (origin.get("autoencoder") or {}).get("id"),
        }


def read_npz(path: Path, wanted: Iterable[str]) -> tuple[list[str], dict[str, Any]]:
    """The names of all arrays in an .npz, and those arrays of the wanted ones that it has.

    Any damage is a ValueError. (Of an empty file numpy makes an EOFError, which click takes for Ctrl-D.)
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if not isinstance(archive, NpzFile):
                raise ValueError("it is one array, as .npy files are")
            return archive.files, {name: archive[name] for name in wanted if name in archive.files}
    except (*DAMAGE, *BROKEN) as fault:
        raise ValueError(brief(fault)) from fault
