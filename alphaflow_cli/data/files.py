"""Files of a store: written whole or not at all, tensors in the safetensors layout.

The layout is eight bytes (length of the header, little endian), a JSON header, the tensors' bytes. It is written here
rather than by the library because equal content must give equal bytes (the library may shuffle the metadata), the
checksum is taken on the way to the disk, and files get the user's own mode instead of 0600.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alphaflow_cli.errors import AlphaflowError

Array = npt.NDArray[Any]
DTYPES = {"F64": "<f8", "I64": "<i8", "F32": "<f4", "F16": "<f2", "U8": "|u1"}  # widest first: keeps them aligned
SEAL, SEAL_BYTES = "checksum", 32  # name and size of a sealed file's last tensor
_NAMES = {np.dtype(code): name for name, code in DTYPES.items()}
_WIDTH = {name: -np.dtype(code).itemsize for name, code in DTYPES.items()}


def write_atomic(path: Path, pieces: Iterable[bytes | memoryview], *, sealed: bool = False) -> tuple[int, str]:
    """Write, sync, rename; returns size and sha256. A kill leaves the old file or the new one, never half of one.

    A sealed file ends with the 32 bytes of the sha256 of all that stands before them.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # a worker that outlives its killed parent meets
    #                                                                the next run here; both write the same bytes
    digest, size = hashlib.sha256(), 0
    try:
        with temporary.open("wb") as file, ThreadPoolExecutor(1) as beside:
            for piece in pieces:
                hashed = beside.submit(digest.update, piece)  # while it is written: the two cost the longer one's time
                file.write(piece)
                hashed.result()
                size += len(piece)
            if sealed:
                size += file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk: give the room back at once
        raise
    sync_folder(path.parent)
    return size, digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_json(value: object) -> bytes:
    """Equal values, equal bytes; undecodable file names survive as escaped surrogates."""
    return json.dumps(value, indent=1, ensure_ascii=True).encode() + b"\n"


def write_tensors(
    path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str], *, sealed: bool = False
) -> tuple[int, str]:
    """One safetensors file, atomically; returns size and sha256. The seal is its last tensor, SEAL."""
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
    return write_atomic(path, _pieces(text, [tensors[name] for name in order]), sealed=sealed)


def seal_holds(path: Path) -> bool:
    """Whether a sealed file still has the bytes that were written."""
    digest, left = hashlib.sha256(), path.stat().st_size - SEAL_BYTES
    with path.open("rb") as file:
        while left > 0 and (piece := file.read(min(left, 1 << 22))):
            digest.update(piece)
            left -= len(piece)
        return left == 0 and file.read() == digest.digest()


def _pieces(header: bytes, arrays: list[Array]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for array in arrays:
        if array.size:
            yield memoryview(np.ascontiguousarray(array)).cast("B")  # type: ignore[arg-type]


@dataclass(frozen=True)
class TensorFile:
    """A memory-mapped safetensors file."""

    tensors: dict[str, Array]
    metadata: dict[str, str]
    mapping: mmap.mmap
    starts: dict[str, int]  # first byte of each tensor in the file

    def will_need(self, name: str, row: int, rows: int = 1) -> None:
        """Ask the system to fetch these rows in the background: many requests in flight instead of one fault each."""
        width = self.tensors[name].strides[0]
        first = self.starts[name] + row * width
        page = first - first % mmap.PAGESIZE
        self.mapping.madvise(mmap.MADV_WILLNEED, page, first + rows * width - page)


def open_tensors(path: Path) -> TensorFile:
    """Map a safetensors file; anything wrong with its shape is an error that names it."""
    try:
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as fault:
        raise AlphaflowError(f"{path}: cannot be read ({fault})") from fault
    try:
        return _parse(mapping)
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise AlphaflowError(f"{path}: not a whole safetensors file ({fault})") from fault


def _parse(mapping: mmap.mmap) -> TensorFile:
    length = int.from_bytes(mapping[:8], "little")
    if length > len(mapping) - 8:
        raise ValueError(f"its header should have {length} bytes, the file has {len(mapping)}")
    header = json.loads(mapping[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    tensors, starts = {}, {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        if end > len(mapping):
            raise ValueError(f"{name} should end at byte {end}, the file at {len(mapping)}")
        code, shape = DTYPES[entry["dtype"]], entry["shape"]
        tensors[name] = np.frombuffer(mapping, code, int(np.prod(shape)), start).reshape(shape)
        starts[name] = start
    return TensorFile(tensors, metadata, mapping, starts)


def sha256_of(path: Path) -> str:
    """The checksum of a file, read in large pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def sha256_of_all(paths: list[Path]) -> list[str]:
    """Checksums of many files, on every core (hashing releases the interpreter's lock)."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(sha256_of, paths))
