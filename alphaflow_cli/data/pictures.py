"""One picture file becomes one square RGB array, whatever it was: the rules of manifest.TRANSFORMS."""

import errno
import posixpath
import re
import struct
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from alphaflow_cli.data.manifest import Crop
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.tensors import Array
from alphaflow_cli.text import brief, counted, shorten

Image.MAX_IMAGE_PIXELS = None  # Pillow's guard warns, then raises; ours is one limit, and names the file
MAX_PIXELS = 200_000_000  # a picture claiming more is taken for a bomb: decoding it needs 3 bytes per pixel and more

FORMATS = (  # the decoders that may see a picture: each reads its bytes itself. Pillow has others that start a program
    *("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PPM", "PNG", "TIFF", "WEBP", "AVIF"),
    "TGA",  # it has no mark at its beginning, and takes what nobody else wants
)
_JPEG, _PORTABLE = (".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k"), (".ppm", ".pgm", ".pbm", ".pnm")
SUFFIXES = (*_JPEG, *_PORTABLE, ".png", ".apng", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".tga", ".avif")
CLASS_LIST = "classes.json"
PACKERS_TABLE = "dataset.json"  # that StyleGAN's and EDM's tools write
TABLES = ("labels.csv", "metadata.csv", "metadata.jsonl", PACKERS_TABLE)  # of files and their classes
OF_ONE_PICTURE = (".cls", ".json")  # beside a picture of a WebDataset's tar: its class
OBJECT_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")  # of an object; it differs from run to run
SOURCE_DOWN = {  # no fault of the picture: a disk that fails, a mount that is gone, a machine without room
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.ENODEV),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
}
Bad = Literal["stop", "skip"]  # what is done about a bad picture: the work ends, or it is left out and counted
Fetch = Callable[[], bytes | Image.Image]  # a picture of a source, read or drawn when it is called


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """A list of pictures; picklable, because every process opens its own."""

    kind: str  # for the manifest: folder, zip, tar, …
    name: str  # without the machine's folders, because it goes into the manifest
    names: Sequence[str]  # of all pictures, with / between folders
    notes: list[str] = field(default_factory=list)  # what was left aside at the listing, in lines for people
    given_classes: bytes | None = None
    asides: Collection[str] = ()  # files beside the pictures that may say their classes: tables, notes of one picture
    beside: Sequence["Source"] = ()  # others, whose tables may say the classes: the archives, the folder they lie in

    @property
    def paths(self) -> Sequence[str]:
        """The names as folders tell classes and splits apart: of many archives without the archive's own name."""
        return self.names

    @abstractmethod
    def reading(self, lines: Sequence[int]) -> AbstractContextManager[Iterator[tuple[int, Fetch]]]:
        """Open the source for one pass over these pictures, in order; the fetches work until the context ends."""

    def facts(self) -> dict[str, Any]:
        """Whatever identifies the content besides the names, such as a commit on the Hub."""
        return {}

    def classes_json(self) -> bytes | None:
        """The bytes of the source's own class list, if it has one."""
        return self.given_classes

    def class_order(self) -> Sequence[str] | None:
        """The folders in the order of their classes, where the source fixes it; None: sorted."""
        return None

    def read_aside(self, name: str) -> bytes:
        """Read one of `asides`; a source that has some says how."""
        raise AssertionError(name)

    def labels(self, column: str) -> "Labels | None":
        """The class of each picture, where the source itself says it; None: its folder, or a table, does."""
        return None

    def stamps(self, lines: Sequence[int]) -> list[Any]:
        """Plain values that change whenever the files of these pictures may have changed; nothing is opened."""
        return []


@dataclass(frozen=True)
class Labels:
    """The class of each picture as a text, None where there is none; and all classes in order, where that is fixed."""

    of_each: Sequence[str | None]
    order: Sequence[str] | None = None


def fetch_now(fetch: Fetch) -> Fetch:
    """Fetch at once, because a stream moves on, or to keep one picture and not its neighbours in memory.

    The caller gets the bytes, or the fault, later.
    """
    try:
        data = fetch()
    except OSError as fault:
        return partial(_raise, fault)
    return lambda: data


def _raise(fault: OSError) -> bytes:
    raise fault


class Loose(Source):
    """Pictures that are fetched one by one, each on its own: nothing has to be open for them."""

    def reading(self, lines: Sequence[int]) -> AbstractContextManager[Iterator[tuple[int, Fetch]]]:
        return nullcontext((line, partial(self.fetch, line)) for line in lines)

    @abstractmethod
    def fetch(self, line: int) -> bytes | Image.Image:
        """Read one picture's bytes, or draw it where the set is embedded."""


class BadPicture(Exception):
    """A file that is not a whole picture, and why: the same words for the same bytes, they stand in a manifest."""


def read_picture(fetch: Fetch, decoded: Callable[[bytes | Image.Image], Array]) -> Array:
    """Fetch a picture and decode it; raises BadPicture, and where the source itself is at fault another error."""
    try:
        return decoded(fetch())
    except OSError as fault:  # removed while we run, no permission, a link to nowhere
        if fault.errno == errno.EBADF:  # a file that we closed: never a fault of the picture
            raise
        if fault.errno in SOURCE_DOWN:
            raise AlphaflowError(f"the source cannot be read any more ({fault}); try again later") from fault
        raise BadPicture(f"cannot be read ({fault.strerror or fault})") from fault


def is_picture(name: str) -> bool:
    """Whether a file of this name is taken for a picture: its suffix decides, in capitals or not."""
    return name.lower().endswith(SUFFIXES)


def left_aside(endings: Counter[str]) -> list[str]:
    """What to say of the files that are no pictures: how many there are, and which endings most of them have."""
    known = [shorten(ending, 20) for ending, _ in endings.most_common() if ending]
    shown = ", ".join([*known[:3], *(["…"] if len(known) > 3 else [])])
    total = counted(endings.total(), "other file")
    return [f"{total} left aside{f' ({shown})' if shown else ''}"] if endings else []


def ending_of(name: str) -> str:
    """The ending of a file's name, in small letters; empty where it has none."""
    return posixpath.splitext(name)[1].lower()


def tells_classes(name: str) -> bool:
    """Whether a file of this name may say the classes of pictures: a class list, a table, or a note of one picture."""
    return name.rsplit("/", 1)[-1] in (CLASS_LIST, *TABLES) or name.endswith(OF_ONE_PICTURE)


def open_picture(file: Path | BinaryIO) -> Image.Image:
    """The one place of the package where Pillow opens a file, with the decoders of FORMATS only.

    Left to choose, Pillow looks at the bytes alone, and gives PostScript called holiday.jpg to Ghostscript.
    """
    Image.init()
    return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def decode(data: bytes | Image.Image, size: int, max_pixels: int, crop: Crop = "square") -> Array:
    """Decode a picture to (3, size, size) uint8; raises BadPicture."""
    image = _rgb(_open(data, max_pixels)) if isinstance(data, bytes) else data
    if crop == "adm":
        _check_enlarged(image, size, max(max_pixels, MAX_PIXELS))
    return np.ascontiguousarray(np.asarray(CROPS[crop](image, size)).transpose(2, 0, 1))


def decode_whole(data: bytes | Image.Image, max_pixels: int) -> Array:
    """Decode a picture to (3, H, W) uint8, neither cropped nor resized; raises BadPicture."""
    image = _rgb(_open(data, max_pixels)) if isinstance(data, bytes) else data
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def square(image: Image.Image, size: int) -> Image.Image:
    """Cut out the largest centred square, and resize it by Lanczos (as published for ImageNet at 256)."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return image if side == size else image.resize((size, size), Image.Resampling.LANCZOS)


def adm_square(image: Image.Image, size: int) -> Image.Image:
    """Halve by box while the short side has 2 · size pixels, bring it to size by bicubic, cut out the centred square.

    That is ADM's way for ImageNet, and that of SoFlow and improved MeanFlow.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _check_enlarged(image: Image.Image, size: int, most: int) -> None:
    """Refuse a thread of pixels: enlarged as a whole, as ADM does before it cuts, it would fill the memory."""
    enlarged = size**2 * max(image.size) // min(image.size)
    if enlarged > most:
        raise BadPicture(
            f"{image.width} x {image.height} pixels, which ADM's crop would enlarge to {enlarged / 1e6:.0f} million, "
            f"the limit is {most / 1e6:g} million"
        )


CROPS: dict[Crop, Callable[[Image.Image, int], Image.Image]] = {"square": square, "adm": adm_square}


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise BadPicture("an empty file")
    try:
        image = open_picture(BytesIO(data))
        if image.width * image.height > max_pixels:
            raise BadPicture(f"{image.width} x {image.height} pixels, the limit is {max_pixels / 1e6:g} million")
        image.load()  # the first frame of an animation
        return _upright(image)
    except (BadPicture, MemoryError):  # memory is the machine's: no picture is left out for it
        raise
    except UnidentifiedImageError as fault:  # its own words hold an address in memory
        raise BadPicture("not a whole picture (not of a form that is read here: JPEG, PNG, WebP, TIFF, …)") from fault
    except Exception as fault:  # decoders raise anything on broken data: OSError, SyntaxError, struct.error, ...
        reason = brief(OBJECT_ADDRESS.sub("", str(fault)).strip() or type(fault).__name__)
        raise BadPicture(f"not a whole picture ({reason})") from fault


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error, ZeroDivisionError):
        return image  # broken EXIF in a sound picture: there is no orientation to apply


def _rgb(image: Image.Image) -> Image.Image:
    """Turn any picture into 8-bit RGB: 16-bit grey is scaled down, transparency laid over white."""
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        grey = np.clip(np.asarray(image, np.int64), 0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return _from_float(image)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, _rgba(image)).convert("RGB")
    return image.convert("RGB")


def _rgba(image: Image.Image) -> Image.Image:
    return image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")


def _from_float(image: Image.Image) -> Image.Image:
    values = np.asarray(image, np.float64)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        raise BadPicture("floating-point values outside 0 … 1")
    return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")
