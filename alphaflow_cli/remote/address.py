"""What a user may write for a checkpoint: a path, `hf://user/repo@revision/file`, or `user/repo@revision:file`.

An existing path wins. A name that ends like a file of ours is never a repository, nor is one that starts with `.`, `/`
or `~`: names on the Hub do not.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import is_there, user_path

FILE_ENDINGS = (".safetensors", ".yaml", ".yml", ".pt", ".pth", ".ckpt", ".json", ".npz")
PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?"  # a name on the Hub
REVISION = r"refs/(?:pr|convert|heads)/[^/@:]+|[^@:\s]+"
SHORT = re.compile(rf"(?P<repo>{PART}/{PART})(?:@(?P<revision>{REVISION}))?(?::(?P<file>.+))?")
LONG = re.compile(
    rf"hf://(?:models/)?(?P<repo>{PART}/{PART})(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/@]+))?(?:/(?P<file>.+))?"
)


@dataclass(frozen=True)
class Repo:
    """A repository on the Hub, at a revision, perhaps one file of it."""

    id: str  # user/repo
    revision: str | None
    file: str | None

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.id}{at}" + (f":{self.file}" if self.file else "")


def is_repository(text: str) -> bool:
    """Whether it is user/repo, as the Hub spells names."""
    return bool(re.fullmatch(f"{PART}/{PART}", text)) and ".." not in text and "--" not in text


def parse_address(text: str) -> Path | Repo:
    """A path or a repository; what is neither is said to be a missing path."""
    if text.startswith("hf://"):
        return _repo(LONG.fullmatch(text), text)
    path = user_path(text)
    if is_there(path) or (text.endswith(FILE_ENDINGS) and ":" not in text):
        return path
    match = SHORT.fullmatch(text)
    return _repo(match, text) if match else path


def _repo(match: re.Match[str] | None, text: str) -> Repo:
    if match is None or ".." in match["repo"] or "--" in match["repo"]:
        raise AlphaflowError(f"{text}: not an address on the Hub. The form is user/repo, user/repo@revision, or hf://…")
    revision, file = match["revision"], match["file"]
    if file and (file.startswith("/") or ".." in Path(file).parts):
        raise AlphaflowError(f"{text}: {file!r} is not a file inside a repository.")
    return Repo(match["repo"], unquote(revision) if revision else None, file)
