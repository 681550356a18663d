"""Files that are never half there: written to a temporary name, synced, renamed. And files that may be read at all."""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.tensors import write_tensors

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


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, sealed: bool = False
) -> None:
    """A safetensors file, atomically: equal content gives equal bytes. A sealed one carries its own checksum."""
    arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}
    try:
        write_tensors(path, arrays, metadata, sealed=sealed)
    except OSError as error:
        raise AlphaflowError(f"{path}: cannot be written: {error.strerror}. What was there is kept.") from error


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
