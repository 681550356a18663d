"""Files of data sets on the Hub that are not kept on this disk: one as a whole, or any part of a large one.

A part is requested in pieces, and a piece that does not come is requested again; so a connection that drops costs one
piece. The Hub sends us on to where a large file lies. That address is kept for the next piece, because the Hub counts
how often it is asked, and it is looked up anew when it has expired.
"""

import io
import posixpath
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from alphaflow_cli.remote.client import endpoint, session
from alphaflow_cli.remote.faults import Distrusted, HubFault, hub_faults

LEADS_OUT = "its path leads out of the folder of the parquet file"
GONE = 404
REFUSED = (401, 403, GONE)  # final: to ask again does not help
TRIES, PAUSE = 4, 1.0  # of one answer, seconds before the second try; doubled each time
PIECE = 8 << 20  # bytes of one request


def download(repo: str, commit: str, file: str) -> bytes:
    """Download the bytes of one file. One that is not there is an OSError; a Hub that stays away ends the run."""
    url = _address(repo, commit, file)
    for attempt in range(TRIES):
        status = 0
        try:
            with hub_faults(url):
                answer = _get(url, {})
                status = answer.status_code
                if status != GONE:
                    _raise_for_status(answer)
                if answer.headers.get("Content-Type", "").startswith("text/html"):
                    raise Distrusted("a web page came instead (does this network show a login page?)")
        except HubFault:
            if attempt == TRIES - 1 or status in REFUSED:
                raise
            time.sleep(PAUSE * 2**attempt)
            continue
        if status == GONE:
            raise OSError(f"the Hub answers {GONE}")
        return bytes(answer.content)
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a data set at one commit, to be read in parts."""

    repo: str
    commit: str
    name: str
    size: int

    @property
    def where(self) -> str:
        """The file's address, for messages."""
        return f"hf://datasets/{self.repo}: {self.name}"

    @contextmanager
    def open(self) -> Iterator["Ranges"]:
        """Open it for one thread; nothing is requested before the first byte is wanted."""
        yield Ranges(self)

    def check(self) -> None:
        """Nothing to check: the bytes of a commit never change."""

    def stamp(self) -> list[Any]:
        """Plain values that identify the bytes: the commit does."""
        return [self.name, self.size, self.commit]

    def beside(self, path: str) -> bytes:
        """Download a picture that lies below the file's folder; any other path is none of the data set's."""
        folder = posixpath.dirname(self.name)
        target = posixpath.normpath(posixpath.join(folder, path))
        if path.startswith("/") or target.startswith("../") or not target.startswith(f"{folder}/" * bool(folder)):
            raise OSError(LEADS_OUT)
        return download(self.repo, self.commit, target)


class Ranges(io.RawIOBase):
    """A remote file that is read like one on this disk, part by part."""

    def __init__(self, file: RemoteFile) -> None:
        self.file, self.position, self.stopped = file, 0, False
        self.origin = self.address = _address(file.repo, file.commit, file.name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.file.size}[whence]
        self.position = start + offset
        return self.position

    def read(self, size: int | None = -1) -> bytes:
        """Read so many bytes, or all that are left; in pieces, each of which is tried several times."""
        left = max(0, self.file.size - self.position)
        stop = self.position + (left if size is None or size < 0 else min(size, left))
        data = b"".join(self._piece(start, min(start + PIECE, stop)) for start in range(self.position, stop, PIECE))
        self.position = stop
        return data

    def stop(self) -> None:
        """Give up what is being read in another thread: nobody waits for it any more."""
        self.stopped = True

    def _piece(self, start: int, stop: int) -> bytes:
        for attempt in range(TRIES):
            if self.stopped:
                raise OSError("given up")
            try:
                with hub_faults(self.file.where):
                    return self._request(start, stop)
            except HubFault as fault:
                status = getattr(getattr(fault.__cause__, "response", None), "status_code", None)
                if attempt == TRIES - 1 or (status in REFUSED and self.address == self.origin):
                    raise
            self.address = self.origin
            time.sleep(PAUSE * 2**attempt)
        raise AssertionError("unreachable")

    def _request(self, start: int, stop: int) -> bytes:
        answer = _get(self.address, {"Range": f"bytes={start}-{stop - 1}"})
        _raise_for_status(answer)
        span = answer.headers.get("Content-Range", "")
        if answer.status_code != 206 or span != f"bytes {start}-{stop - 1}/{self.file.size}":
            raise Distrusted(f"bytes {start:,} to {stop:,} were wanted, and others came (HTTP {answer.status_code})")
        if len(answer.content) != stop - start:
            raise Distrusted(f"{stop - start:,} bytes were wanted, and {len(answer.content):,} came")
        self.address = str(answer.url)
        return bytes(answer.content)


def _address(repo: str, commit: str, file: str) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repo, file, repo_type="dataset", revision=commit, endpoint=endpoint())


def _get(address: str, headers: dict[str, str]) -> Any:
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    return session().get(address, headers={**build_hf_headers(), **headers}, follow_redirects=True, timeout=60)


def _raise_for_status(answer: Any) -> None:
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    hf_raise_for_status(answer)
