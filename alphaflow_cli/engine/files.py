"""Files that are never half there: written to a temporary name, synced, renamed."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from alphaflow_cli.errors import AlphaflowError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write` fills a temporary file beside `path`; it takes the name only when it is whole and on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o644)  # safetensors writes 0600
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own error
        with contextlib.suppress(OSError):  # a read-only file system refuses even this
            temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        raise AlphaflowError(f"{path}: cannot be written: {reason}. What was there is kept.") from error


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
