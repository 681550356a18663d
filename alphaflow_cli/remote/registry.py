"""One file from the npm registry, which must be the very file that was meant: its sha512 is part of the program.

`npm_config_registry` names another registry, as it does for npm itself. What was fetched is kept in the user's cache
and checked again whenever it is read.
"""

import base64
import hashlib
import os
import urllib.request
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import make_folder, read_file, user_path, write_whole
from alphaflow_cli.remote import client
from alphaflow_cli.remote.faults import Distrusted
from alphaflow_cli.text import for_terminal

REGISTRY = "https://registry.npmjs.org"
LARGEST = 128 << 20  # bytes of a package
PIECE = 64 << 10  # bytes that are read at once


@dataclass(frozen=True)
class NpmPackage:
    """One version of a package, by the checksum that the registry publishes for it."""

    name: str
    version: str
    sha512: str  # base64, as npm writes it

    @property
    def file(self) -> str:
        """The name of its archive."""
        return f"{self.name}-{self.version}.tgz"

    def is_this(self, content: bytes) -> bool:
        """Whether these bytes are the package's."""
        return base64.b64encode(hashlib.sha512(content).digest()).decode() == self.sha512


def fetch_package(package: NpmPackage, given: Path | None) -> bytes:
    """The archive of a package: the file given, else the copy in the cache, else from the registry into the cache."""
    if given is not None:
        try:
            content = read_file(given)
        except OSError as fault:
            raise AlphaflowError(f"{given}: cannot be read ({fault.strerror or fault}). {_by_hand(package)}") from fault
        if not package.is_this(content):
            raise AlphaflowError(f"{given}: not {package.file}, whose checksum is known. {_by_hand(package)}")
        return content
    kept = _cache() / package.file
    if kept.is_file() and package.is_this(content := read_file(kept)):
        return content
    content = _download(package)
    make_folder(kept.parent)
    write_whole(kept, content)
    return content


def _cache() -> Path:
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "alphaflow" / "npm"


def _by_hand(package: NpmPackage) -> str:
    return f"Get it where there is a network: npm pack {package.name}@{package.version}"


def _download(package: NpmPackage) -> bytes:
    """The bytes from the registry, bounded in length and time, and checked."""
    registry = (os.environ.get("npm_config_registry") or REGISTRY).rstrip("/")  # noqa: SIM112 (npm's own name)
    address = f"{registry}/{package.name}/-/{package.file}"
    if not address.startswith(("https://", "http://")):
        raise AlphaflowError(f"npm_config_registry {for_terminal(registry, limit=200)}: not a web address.")
    try:
        ask = partial(urllib.request.urlopen, address, timeout=client.PATIENCE)
        with client.within(client.PATIENCE, ask) as answer:
            pieces = iter(partial(answer.read1, PIECE), b"")
            content = b"".join(client.Limits(LARGEST, "the answer", has_length=True).watch(pieces))
    except (OSError, HTTPException, ValueError, Distrusted) as fault:  # nothing, half an answer, or a slow one
        reason = for_terminal(getattr(fault, "reason", None) or fault, limit=200)
        advice = f"{_by_hand(package)}; then export with --runtime {package.file}"
        raise AlphaflowError(f"{for_terminal(address, limit=200)}: cannot be fetched ({reason}). {advice}") from fault
    if not package.is_this(content):
        raise AlphaflowError(
            f"{for_terminal(address, limit=200)}: sent another file than {package.file}; nothing of it was kept. "
            f"{_by_hand(package)}; then export with --runtime {package.file}"
        )
    return content
