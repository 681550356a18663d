"""Files that are never half there: written to a temporary name, synced, renamed."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from alphaflow_cli.errors import AlphaflowError

TORCH_WRITER = "inline_container"  # torch.save's writer names itself so in the RuntimeError of a full disk


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write` fills a temporary file beside `path`; it takes the name only when it is whole and on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
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


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
