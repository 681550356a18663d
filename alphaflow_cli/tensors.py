"""Tensors in files of the safetensors layout, written whole or not at all, read by position.

The layout is eight bytes (length of the header, little endian), a JSON header, the tensors' bytes. It is written here
and not by the library, for three reasons. Equal content must give equal bytes, but the library may shuffle the
metadata. The checksum is taken on the way to the disk. And files get the user's own mode instead of 0600.
"""

import hashlib
import json
import math
import os
import pickle
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import Stamp, changed, stamp_of, write_pieces
from alphaflow_cli.text import brief

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
NEW_NUMPY = int(np.__version__.split(".")[0]) >= 2
MAX_HEADER = 100_000_000  # bytes; the safetensors library's own bound
TENSOR_DTYPES = {"F64": "<f8", "I64": "<i8", "F32": "<f4", "F16": "<f2", "U8": "|u1"}
SEAL, SEAL_BYTES = "checksum", 32  # name and size of a sealed file's last tensor
_NAMES = {np.dtype(code): name for name, code in TENSOR_DTYPES.items()}
_WIDTH = {name: -np.dtype(code).itemsize for name, code in TENSOR_DTYPES.items()}


def write_tensors(
    path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str], *, sealed: bool = False
) -> tuple[int, str]:
    """Write one safetensors file, whole or not at all; gives its size and sha256. A sealed one ends with its
    checksum.
    """
    order = sorted(tensors, key=lambda name: (_WIDTH[_NAMES[tensors[name].dtype]], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name in order:
        end = start + tensors[name].nbytes
        kind = _NAMES[tensors[name].dtype]
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
        start = end
    if sealed:
        header[SEAL] = {"dtype": "U8", "shape": [SEAL_BYTES], "data_offsets": [start, start + SEAL_BYTES]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return write_pieces(path, _pieces(text, [tensors[name] for name in order]), sealed=sealed)


def _pieces(header: bytes, arrays: list[Array]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for array in arrays:
        if array.size:
            yield memoryview(np.ascontiguousarray(array)).cast("B")  # type: ignore[arg-type]


def save_tensors(
    path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str], *, sealed: bool = False
) -> None:
    """Write torch's tensors as a safetensors file, whole or not at all: equal content gives equal bytes."""
    arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}
    try:
        write_tensors(path, arrays, metadata, sealed=sealed)
    except OSError as error:
        raise AlphaflowError(f"{path}: cannot be written: {error.strerror}. What was there is kept.") from error


def seal_holds(path: Path) -> bool:
    """Whether a sealed file still has the bytes that were written."""
    digest, left = hashlib.sha256(), path.stat().st_size - SEAL_BYTES
    with path.open("rb") as file:
        while left > 0 and (piece := file.read(min(left, 1 << 22))):
            digest.update(piece)
            left -= len(piece)
        return left == 0 and file.read() == digest.digest()


@dataclass(frozen=True)
class TensorPlace:
    """Where one tensor lies in its file, and what it is."""

    dtype: Any
    shape: tuple[int, ...]
    start: int  # first byte in the file

    @property
    def row_bytes(self) -> int:
        """The bytes of one row: of everything behind the first axis."""
        return int(np.dtype(self.dtype).itemsize * math.prod(self.shape[1:]))


@dataclass(frozen=True)
class TensorFile:
    """An open safetensors file, read by position.

    It is not memory-mapped: a mapped file that another program cuts short ends the process by SIGBUS, without a line.
    A read answers a missing byte with an error, and ends with a look at the file's size and time. So rows that were
    written over after the checksums are never trained on. Per row this costs as much as copying it.
    """

    path: Path
    handle: int
    stamp: Stamp
    places: dict[str, TensorPlace]
    metadata: dict[str, str]

    def read(self, name: str) -> Array:
        """Read a whole tensor from the disk, as a numpy array of its own."""
        place = self.places[name]
        array = np.empty(place.shape, place.dtype)
        if array.size:
            self._fill(memoryview(array.reshape(-1)).cast("B"), place.start)  # type: ignore[arg-type]
        self.check_unchanged()
        return array

    def read_rows(self, name: str, rows: Sequence[int], out: Array, places: Sequence[int]) -> None:
        """out[places[i]] = row rows[i] of tensor `name`; `out` is contiguous."""
        place = self.places[name]
        width, target = place.row_bytes, memoryview(out.reshape(-1)).cast("B")  # type: ignore[arg-type]
        for row, at in zip(rows, places, strict=True):
            self._fill(target[at * width : (at + 1) * width], place.start + row * width)
        self.check_unchanged()

    def will_need(self, name: str, row: int) -> None:
        """Ask the system to fetch a row in the background: many requests in flight instead of one after the other."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            place = self.places[name]
            start = place.start + row * place.row_bytes
            os.posix_fadvise(self.handle, start, place.row_bytes, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        """Raise an error where somebody wrote to the file since it was opened."""
        if stamp_of(self.handle) != self.stamp:
            raise changed(self.path)

    def _fill(self, target: memoryview, start: int) -> None:
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self.handle, [target[done:]], start + done)
            except OSError as fault:
                raise AlphaflowError(f"{self.path}: cannot be read any more ({fault.strerror})") from fault
            if not count:
                raise changed(self.path)
            done += count


def open_tensors(path: Path) -> TensorFile:
    """Open a safetensors file; anything wrong with its shape is an error that names it."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as fault:
        raise AlphaflowError(f"{path}: cannot be read ({fault.strerror})") from fault
    try:
        stamp = stamp_of(handle)
        places, metadata = _parse(handle, stamp.size)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as fault:
        os.close(handle)
        raise AlphaflowError(f"{path}: not a whole safetensors file ({brief(fault)})") from fault
    file = TensorFile(path, handle, stamp, places, metadata)
    weakref.finalize(file, os.close, handle)
    return file


def _parse(handle: int, size: int) -> tuple[dict[str, TensorPlace], dict[str, str]]:
    length = int.from_bytes(os.pread(handle, 8, 0), "little")
    if length > min(size - 8, MAX_HEADER):
        raise ValueError(f"its header should have {length} bytes, the file has {size}")
    header = json.loads(os.pread(handle, length, 8))
    metadata = header.pop("__metadata__", {})
    places = {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        if end > size:
            raise ValueError(f"{name} should end at byte {end}, the file at {size}")
        code, shape = TENSOR_DTYPES[entry["dtype"]], tuple(entry["shape"])
        wanted = np.dtype(code).itemsize * math.prod(shape)
        if start < 8 + length or end - start != wanted or any(type(n) is not int or n < 0 for n in shape):
            raise ValueError(f"{name} has {end - start} bytes for a shape of {list(shape)}")
        places[name] = TensorPlace(np.dtype(code), shape, start)
    return places, metadata


class NumpyUnpickler(pickle.Unpickler):
    """Builds numpy arrays and plain containers; any other name in the file is refused."""

    ALLOWED = frozenset(
        [(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")]
        + [(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")]
        + [("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"), ("collections", "OrderedDict")]
    )

    def find_class(self, module: str, name: str) -> Any:
        """Give what is allowed and refuse the rest; the StyleGAN family's attribute dictionaries become plain ones."""
        if module.startswith("dnnlib") and name == "EasyDict":
            return dict
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it wants to import {module}.{name}, which an array does not need")
        return super().find_class(module.replace("numpy.core", "numpy._core") if NEW_NUMPY else module, name)
