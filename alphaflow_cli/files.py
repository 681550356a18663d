"""Files that are never half there: written to a temporary name, synced, renamed. And files that may be read at all."""

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from alphaflow_cli.errors import AlphaflowError

TORCH_WRITER = "inline_container"  # torch.save's writer names itself so in the RuntimeError of a full disk


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write` fills a temporary file beside `path`; it takes the name only when it is whole and on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two writers of one name do not meet
    try:
        write(temporary)
        temporary.chmod(0o644)  # safetensors writes 0600
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError, RuntimeError) as error:  # each writer wraps a full disk in its own error
        with contextlib.suppress(OSError):  # a read-only file system refuses even this
            temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and TORCH_WRITER not in str(error):
            raise
        full = "the file did not take all its bytes; is the disk full?" if isinstance(error, RuntimeError) else error
        reason = getattr(error, "strerror", None) or full
        raise AlphaflowError(f"{path}: cannot be written: {reason}. What was there is kept.") from error


def check_regular(path: Path) -> None:
    """Refuse what is no file: a folder cannot be read, and opening a named pipe waits for ever."""
    with contextlib.suppress(OSError):  # that there is none, or that it is closed to us, the reader says better
        if not stat.S_ISREG(path.stat().st_mode):
            raise AlphaflowError(f"{path}: is a folder, a pipe or a device, not a file. Move it away.")


def read_document(path: Path, *, largest: int = 10_000_000) -> str:
    """The text of a small file that people may have edited."""
    check_regular(path)
    try:
        if path.stat().st_size > largest:
            raise AlphaflowError(
                f"{path}: has more than {largest:,} bytes, it cannot be what it should be. Move it away."
            )
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise AlphaflowError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise AlphaflowError(f"{path}: is not text (byte {error.start} is not UTF-8). Move it away.") from error


def append(path: Path, text: str) -> None:
    """Add whole lines at the end in one write, so that those of two commands stand one after the other."""
    check_regular(path)
    with path.open("ab", buffering=0) as file:
        data = text.encode()
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, "the file did not take all its bytes; is the disk full?")


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


MAX_BYTES = 1 << 30  # of one file that is read as a whole


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


@dataclass(frozen=True)
class Stamp:
    """What an open file looks like from outside: it differs after every write, and after every truncation.

    The inode is no part of it: some network file systems number a file anew whenever it is opened.
    """

    size: int
    modified: int  # nanoseconds


def stamp_of(file: int | Path) -> Stamp:
    """Of an open file, or of the file that stands at a path now."""
    status = file.stat() if isinstance(file, Path) else os.fstat(file)
    return Stamp(status.st_size, status.st_mtime_ns)


def changed(path: Path) -> AlphaflowError:
    """The one line about a file that was written to while it was read."""
    return AlphaflowError(
        f"{path}: was changed or replaced while it was read. Leave it alone, and run the same command again: "
        "it checks every byte"
    )


def is_there(path: Path) -> bool:
    """Whether something stands there that can be reached; a path that cannot be walked is not there."""
    try:
        path.stat()
    except (OSError, ValueError):  # no permission, not a folder, too long, a zero byte
        return False
    return True


def read_file(path: Path) -> bytes:
    """A whole regular file of sane size; a pipe or device would block for ever."""
    with open(path, "rb", opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        if status.st_size > MAX_BYTES:
            raise OSError(f"{status.st_size:,} bytes, the limit is {MAX_BYTES:,}")
        return file.read()


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def sha256_of(path: Path) -> str:
    """The checksum of a file, read in large pieces."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
    except OSError as fault:
        raise AlphaflowError(f"{path}: cannot be read ({fault.strerror})") from fault
    return digest.hexdigest()


def sha256_of_all(paths: list[Path]) -> list[str]:
    """Checksums of many files, on every core (hashing releases the interpreter's lock)."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(sha256_of, paths))
