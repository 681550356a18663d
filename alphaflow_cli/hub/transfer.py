"""Down and up: files from the Hub into its cache, each checked against the Hub's own checksum; folders to the Hub.

The cache of huggingface_hub names a file's content by its checksum (sha256 of a large file, git's sha1 of a small one);
what was downloaded is hashed again and compared. Offline, what is in the cache is used.
"""

import hashlib
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.hub.address import Repo, parse_address
from alphaflow_cli.hub.client import cache_folder, hub_api
from alphaflow_cli.hub.faults import NoConnection, hub_faults

MODEL = "model.safetensors"
NEEDED = ["config.json", "recipe.yaml", "autoencoder/*"]  # beside the weights, enough to sample
PUBLISHED = [MODEL, *NEEDED, "README.md", "results.json", "samples.png", "alpha.png"]


@dataclass(frozen=True)
class Pulled:
    """A repository's files at one commit, in the cache or copied out of it."""

    folder: Path
    repo: str
    commit: str


def resolve_checkpoint(address: str) -> Path:
    """The checkpoint's file: a path as it is, a repository's weights from the cache or the Hub; the commit is said."""
    found = parse_address(address)
    if isinstance(found, Path):
        return found
    name = found.file or MODEL
    pulled = _fetch(found, [name, *NEEDED], wanted=name)
    print(f"{pulled.repo}@{pulled.commit}", file=sys.stderr)
    return pulled.folder / name


def resolve_file(address: str) -> Path:
    """One file: a path as it is, or hf://user/repo/file (user/repo:file) downloaded."""
    found = parse_address(address)
    if isinstance(found, Path):
        return found
    if not found.file:
        raise AlphaflowError(f"{address}: say which file of the repository: hf://{found.id}/FILE")
    return _fetch(found, [found.file], wanted=found.file).folder / found.file


def pull(address: str, out: Path | None) -> Pulled:
    """A published model, into the cache; with `out` a copy of it there."""
    found = parse_address(address)
    if isinstance(found, Path):
        raise AlphaflowError(f"{address}: not a repository. The form is user/repo or user/repo@revision.")
    pulled = _fetch(found, PUBLISHED if not found.file else [found.file, *NEEDED], wanted=found.file or MODEL)
    if out is None:
        return pulled
    for path in sorted(path for path in pulled.folder.rglob("*") if path.is_file()):
        target = out / path.relative_to(pulled.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.part")
        shutil.copyfile(path, partial)
        partial.replace(target)
    return Pulled(out, pulled.repo, pulled.commit)


def _fetch(repo: Repo, patterns: list[str], *, wanted: str) -> Pulled:
    """The files that match, at one commit, verified."""
    folder = _download(repo, patterns)
    damaged = [path.name for path in sorted(folder.rglob("*")) if path.is_file() and not _is_whole(path)]
    if damaged:
        raise AlphaflowError(
            f"{repo}: {', '.join(damaged)} came damaged (not the Hub's checksum). Removed; run the same command again."
        )
    if not (folder / wanted).is_file():
        raise AlphaflowError(f"{repo.id}@{folder.name[:8]}: no {wanted} there{_others(repo, folder.name)}")
    return Pulled(folder, repo.id, folder.name)


def _download(repo: Repo, patterns: list[str]) -> Path:
    """From the Hub; where the connection breaks, what the cache has, and that is said."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    api, cache = hub_api(), cache_folder()
    try:
        with hub_faults(str(repo)):
            return Path(
                api.snapshot_download(repo.id, revision=repo.revision, allow_patterns=patterns, cache_dir=cache)
            )
    except NoConnection:
        try:
            kept = Path(
                api.snapshot_download(
                    repo.id, revision=repo.revision, allow_patterns=patterns, cache_dir=cache, local_files_only=True
                )
            )
        except LocalEntryNotFoundError:
            kept = None
        if kept is None:
            raise
        print(f"{repo}: no connection to the Hub; using the cache, commit {kept.name}", file=sys.stderr)
        return kept


def _others(repo: Repo, commit: str) -> str:
    """What the repository has instead."""
    with hub_faults(str(repo)):
        files = [name for name in hub_api().list_repo_files(repo.id, revision=commit) if not name.startswith(".")]
    foreign = [name for name in files if name.endswith((".pt", ".pth", ".ckpt"))]
    if foreign:
        return f". A checkpoint of another system: alphaflow convert hf://{repo.id}/{foreign[0]} -o FILE.safetensors"
    return f"; it holds {', '.join(files[:5]) or 'nothing'}" + (" …" if len(files) > 5 else "")


def _is_whole(path: Path) -> bool:
    """The bytes against the checksum that names them in the cache; damaged ones are removed."""
    blob = path.resolve()
    expected = blob.name
    if re.fullmatch(r"[0-9a-f]{64}", expected):
        digest = hashlib.sha256()
    elif re.fullmatch(r"[0-9a-f]{40}", expected):
        digest = hashlib.sha1(f"blob {blob.stat().st_size}\0".encode(), usedforsecurity=False)
    else:
        return True  # a cache without links keeps no checksum
    with blob.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    if digest.hexdigest() == expected:
        return True
    blob.unlink()
    path.unlink(missing_ok=True)
    return False
