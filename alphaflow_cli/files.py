"""Files that are never half there: written under a temporary name, synced, renamed. And files that may be read at all.

Everything that the program writes goes through `write_whole` (text or bytes), `write_pieces` (a stream of them) or
`write_by` (a library's own writer): a kill, a full disk or a power cut leaves the old file or the new one.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from alphaflow_cli.errors import AlphaflowError

MAX_BYTES = 1 << 30  # of one file that is read as a whole
MAX_DOCUMENT = 10_000_000  # bytes of one that people may have edited
BESIDE = 1 << 20  # bytes of a piece from which a thread pays that hashes it while it is written
TORCH_WRITER = "inline_container"  # torch.save's writer names itself so in the RuntimeError of a full disk


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a small file; what stood there stays until it is whole and on the disk. Names in it may be no UTF-8."""
    try:
        with _replacing(path) as temporary:
            temporary.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
    except OSError as error:
        raise _not_written(path, error.strerror or str(error)) from error


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview], *, sealed: bool = False) -> tuple[int, str]:
    """Write a file piece by piece; gives its size and sha256. An OSError passes: the caller knows what is kept.

    A sealed file ends with the 32 bytes of the sha256 of all that stands before them.
    """
    digest, size = hashlib.sha256(), 0
    with _replacing(path) as temporary, temporary.open("wb") as file, ThreadPoolExecutor(1) as beside:
        for piece in pieces:
            if large := len(piece) >= BESIDE:
                hashed = beside.submit(digest.update, piece)  # while it is written: the two cost the longer one's time
            else:
                digest.update(piece)
            file.write(piece)
            if large:
                hashed.result()
            size += len(piece)
        if sealed:
            size += file.write(digest.digest())
    return size, digest.hexdigest()


def write_by(path: Path, write: Callable[[Path], object]) -> None:
    """Let a library write the file: `write` gets the temporary name, and its word for a full disk is known."""
    from safetensors import SafetensorError

    try:
        with _replacing(path) as temporary:
            write(temporary)
            temporary.chmod(0o644)  # safetensors writes 0600
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and TORCH_WRITER not in str(error):
            raise
        full = "the file did not take all its bytes; is the disk full?" if isinstance(error, RuntimeError) else error
        raise _not_written(path, getattr(error, "strerror", None) or str(full)) from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name of this process beside `path`; the file takes the name when all went well.

    Where a pipe or a device stands, nothing is written: root would put a file in the place of /dev/null.
    """
    if not path.is_dir():  # a folder is no file's to replace; the system says so itself
        check_regular(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        temporary.unlink(missing_ok=True)  # of two links to one file, the system leaves both
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # a read-only file system refuses even this
            temporary.unlink(missing_ok=True)  # a full disk: give the room back at once
        raise


def _not_written(path: Path, reason: str) -> AlphaflowError:
    return AlphaflowError(f"{path}: cannot be written: {reason}. What was there is kept.")


def check_regular(path: Path) -> None:
    """Refuse what is no file: a folder cannot be read, and opening a named pipe waits for ever."""
    with contextlib.suppress(OSError):  # that there is none, or that it is closed to us, the reader says better
        if not stat.S_ISREG(path.stat().st_mode):
            raise AlphaflowError(f"{path}: is a folder, a pipe or a device, not a file. Move it away.")


def read_document(path: Path) -> str:
    """Read the text of a small file that people may have edited."""
    check_regular(path)
    try:
        if path.stat().st_size > MAX_DOCUMENT:
            raise AlphaflowError(
                f"{path}: has more than {MAX_DOCUMENT:,} bytes, so it is not the file that belongs here. Move it away."
            )
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise AlphaflowError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise AlphaflowError(f"{path}: is not text (byte {error.start} is not UTF-8). Move it away.") from error


def append(path: Path, text: str, *, kept: str) -> None:
    """Add whole lines at the end in one write, so that those of two commands stand one after the other.

    `kept` says in the error what is not lost, and how to go on. Names in it may be no UTF-8.
    """
    check_regular(path)
    data = text.encode(errors="backslashreplace")
    try:
        with path.open("ab", buffering=0) as file:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, "the file did not take all its bytes; is the disk full?")
    except OSError as error:
        raise AlphaflowError(f"{path}: cannot be written: {error.strerror}. {kept}") from error


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_json(value: object) -> bytes:
    """Write a value as JSON so that equal values give equal bytes; undecodable file names survive as escapes."""
    return json.dumps(value, indent=1, ensure_ascii=True).encode() + b"\n"


@dataclass(frozen=True)
class Stamp:
    """What an open file looks like from outside: it differs after every write, and after every truncation.

    The inode is no part of it: some network file systems number a file anew whenever it is opened.
    """

    size: int
    modified: int  # nanoseconds


def stamp_of(file: int | Path) -> Stamp:
    """The stamp of an open file, or of the file that stands at a path now."""
    status = file.stat() if isinstance(file, Path) else os.fstat(file)
    return Stamp(status.st_size, status.st_mtime_ns)


def path_and_stamp(path: Path) -> list[str | int]:
    """The path of a file with its size and time, as plain values; of one that is gone the path alone."""
    there = [*vars(stamp_of(path)).values()] if is_there(path) else []  # gone: whoever reads it says so
    return [str(path.absolute()), *there]


def changed(path: Path) -> AlphaflowError:
    """The error for a file that was written to while it was read."""
    return AlphaflowError(
        f"{path}: was changed or replaced while it was read. Leave it alone, and run the same command again: "
        "it checks every byte"
    )


def user_path(text: str | Path) -> Path:
    """The path that a user's text names: `~` at its start is the home folder, `~name` that of a user who is known here.

    Of any other name it is a path like others, which leads nowhere; whoever opens it says so.
    """
    path = Path(text)
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def is_there(path: Path) -> bool:
    """Whether something stands there that can be reached; a path that cannot be walked is not there."""
    try:
        path.stat()
    except (OSError, ValueError):  # no permission, not a folder, too long, a zero byte
        return False
    return True


def free_bytes(folder: Path) -> int:
    """The free bytes of the disk that holds, or will hold, a folder."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if is_there(place))
    return shutil.disk_usage(existing).free


def read_file(path: Path) -> bytes:
    """Read a whole regular file of sane size; a pipe or a device would block for ever."""
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
    """Compute the checksum of a file, read in large pieces."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
    except OSError as fault:
        raise AlphaflowError(f"{path}: cannot be read ({fault.strerror})") from fault
    return digest.hexdigest()


def sha256_of_all(paths: list[Path]) -> list[str]:
    """Compute the checksums of many files on every core (hashing releases the interpreter's lock)."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(sha256_of, paths))


def check_new(path: Path) -> None:
    """Refuse a file that exists already, where none is ever overwritten."""
    if path.exists():
        raise AlphaflowError(f"{path}: exists already, and is not overwritten. Choose another name or remove it.")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; one that is there stays."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise AlphaflowError(f"{folder}: cannot be made ({fault.strerror}); name another folder") from fault
