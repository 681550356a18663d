"""Files from the Hub: into its cache, checked, and out of it into a folder.

The cache of huggingface_hub names a file's content by its checksum (sha256 of a large file, git's sha1 of a small one);
what was downloaded is hashed again and compared. Offline, what is in the cache is used.

A folder that a published model is written into (pull -o, push --dry-run) is new, empty, or from an earlier push or
pull. Any other is refused.
"""

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from alphaflow_cli.documents import Anything, Table, Text, read_json
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import make_folder, sha256_of, write_by
from alphaflow_cli.remote.address import Repo, parse_address
from alphaflow_cli.remote.cache import cache_folder
from alphaflow_cli.remote.client import hub_api
from alphaflow_cli.remote.faults import HubFault, NoConnection, NotThere, hub_faults

MODEL = "model.safetensors"
AUTOENCODER = "autoencoder"  # the folder of one that is none of the Hub's
CONFIG_FILE = "config.json"
PIPELINE_FILES = ("model_index.json", "pipeline_alphaflow.py")  # of a pipeline for diffusers
PIPELINE_FOLDERS = ("transformer", "scheduler", "vae")
OURS = (
    *(MODEL, CONFIG_FILE, "recipe.yaml", "README.md", "results.json", "samples.png", "alpha.png", AUTOENCODER),
    *(*PIPELINE_FILES, *PIPELINE_FOLDERS),
)
FOR_SAMPLING = [CONFIG_FILE, "recipe.yaml", f"{AUTOENCODER}/*"]  # beside the weights, enough to sample
PUBLISHED_FILES = [MODEL, *FOR_SAMPLING, "README.md", "results.json", "samples.png", "alpha.png"]
FIRST_ANSWER = 20.0  # seconds for the first answer of the Hub
OUR_CONFIG = Table(
    {"model_type": Text(one_of=("alphaflow",)), "format": Text(100, form="alphaflow/.+")}, others=Anything()
)
NOT_ALWAYS = (  # removed where the new version has none
    *("results.json", f"{AUTOENCODER}/*", *PIPELINE_FILES),
    *(f"{folder}/*" for folder in PIPELINE_FOLDERS),
)


def prepare_folder(folder: Path, *, also: Iterable[str] = ()) -> None:
    """Make the folder. One that holds something else is refused; `also` names files that may be there beside ours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    except OSError as fault:
        raise AlphaflowError(f"{folder}: this folder cannot be made ({fault.strerror}). Give another.") from fault
    foreign = sorted(names - {*OURS, *also})
    if names and (foreign or not is_published(folder / CONFIG_FILE)):
        raise AlphaflowError(
            f"{folder}: holds {', '.join((foreign or sorted(names))[:3])}, so not only push or pull wrote here. "
            "Nothing was overwritten; give a new or an empty folder."
        )


def remove_stale(folder: Path, kept: Iterable[str] = ()) -> None:
    """Remove results, autoencoder and pipeline of an earlier version; `kept` names those that the new one has."""
    left = set(kept)
    for path in [path for pattern in NOT_ALWAYS for path in folder.glob(pattern)]:
        if path.is_file() and path.relative_to(folder).as_posix() not in left:
            path.unlink()


def is_published(config: Path) -> bool:
    """Whether an earlier push wrote this config.json: of any other, nothing is relied on."""
    try:
        read_json(config, OUR_CONFIG, limit=1 << 20)
    except AlphaflowError:
        return False
    return True


@dataclass(frozen=True)
class Pulled:
    """A repository's files at one commit, in the cache or copied out of it."""

    folder: Path
    repo: str
    commit: str


def resolve_checkpoint(address: str) -> Path:
    """Find the checkpoint's file: a path, or a repository's weights from the cache or the Hub; prints the commit."""
    place = parse_address(address)
    if isinstance(place, Path):
        return place
    name = place.file or MODEL
    with _perhaps_a_path(address):
        pulled = fetch(place, [name, *FOR_SAMPLING], wanted=name)
    _tell(f"{pulled.repo}@{pulled.commit}")
    return pulled.folder / name


def resolve_file(address: str) -> Path:
    """One file: a path as it is, or hf://user/repo/file (user/repo:file) downloaded."""
    place = parse_address(address)
    if isinstance(place, Path):
        return place
    if not place.file:
        raise AlphaflowError(f"{address}: say which file of the repository: hf://{place.id}/FILE")
    with _perhaps_a_path(address):
        return fetch(place, [place.file], wanted=place.file).folder / place.file


def pull(address: str, out: Path | None) -> Pulled:
    """A published model, into the cache; with `out` a copy of it there."""
    place = parse_address(address)
    if isinstance(place, Path):
        raise AlphaflowError(f"{address}: not a repository. The form is user/repo or user/repo@revision.")
    if out is not None:
        prepare_folder(out, also=[place.file.split("/")[0]] if place.file else [])
    patterns = [place.file, *FOR_SAMPLING] if place.file else PUBLISHED_FILES
    pulled = fetch(place, patterns, wanted=place.file or MODEL)
    if out is None:
        return pulled
    _copy(pulled.folder, out, patterns)
    return Pulled(out, pulled.repo, pulled.commit)


def fetch_data(repo: str, commit: str, file: str) -> Path:
    """A file of a data set, in the cache; one that had to be downloaded is compared with the Hub's checksum, once.

    A download that was cut off goes on.
    """
    from huggingface_hub import try_to_load_from_cache

    where, folder = f"hf://datasets/{repo}: {file}", cache_folder()
    with hub_faults(f"{where} cannot be downloaded"):
        kept = try_to_load_from_cache(repo, file, cache_dir=folder, revision=commit, repo_type="dataset")
        got = hub_api().hf_hub_download(repo, file, repo_type="dataset", revision=commit, cache_dir=folder)
    if not isinstance(kept, str) and not _is_whole(Path(got)):
        raise AlphaflowError(f"{where} came damaged (not the Hub's checksum). Removed; run the same command again.")
    return Path(got)


def _copy(folder: Path, out: Path, patterns: list[str]) -> None:
    """Copy what matches, for the cache may have more; config.json first: it marks a copy that broke off as ours."""
    there = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    names = [name for name in there if any(fnmatchcase(name, pattern) for pattern in patterns)]
    remove_stale(out, names)
    for name in sorted(names, key=lambda name: (name != CONFIG_FILE, name)):
        target = out / name
        make_folder(target.parent)
        write_by(target, partial(shutil.copyfile, folder / name))


@contextlib.contextmanager
def _perhaps_a_path(address: str) -> Iterator[None]:
    """Say first that no such folder is here: user/repo may be the misspelt path of a run."""
    try:
        yield
    except (NotThere, NoConnection) as fault:
        if "@" in address or ":" in address:
            raise
        raise HubFault(address, f"no such folder here, and {fault.why}") from fault


def fetch(repo: Repo, patterns: list[str], *, wanted: str) -> Pulled:
    """The files that match, at one commit, each compared with the Hub's checksum; `wanted` must be among them."""
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
    """Ask the Hub for the commit; if it does not answer, take what the cache has and say so. A refusal is an error."""
    try:
        with hub_faults(str(repo)):
            commit = _commit(repo)
            if commit is None:
                return _snapshot(repo, repo.revision, patterns, cached=True)
            folder = _snapshot(repo, repo.revision, patterns, cached=False)  # under its name, to be found offline
            return folder if folder.name == commit else _snapshot(repo, commit, patterns, cached=False)
    except NoConnection as fault:
        kept = _kept(repo, patterns)
        if kept is None:
            raise
        _tell(f"{repo}: {fault.summary}; using the cache, commit {kept.name}")
        return kept


def _tell(line: str) -> None:
    """A line on stderr; of many processes, which all ask the Hub, one says it."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def _commit(repo: Repo) -> str | None:
    """Ask the Hub what the revision is; None where HF_HUB_OFFLINE forbids requests."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        return str(hub_api().repo_info(repo.id, revision=repo.revision, timeout=FIRST_ANSWER).sha)
    except OfflineModeIsEnabled:
        return None


def _snapshot(repo: Repo, revision: str | None, patterns: list[str], *, cached: bool) -> Path:
    return Path(
        hub_api().snapshot_download(
            repo.id, revision=revision, allow_patterns=patterns, cache_dir=cache_folder(), local_files_only=cached
        )
    )


def _kept(repo: Repo, patterns: list[str]) -> Path | None:
    """The copy that the cache keeps of these files, or None where it lacks one of them."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _snapshot(repo, repo.revision, patterns, cached=True)
    except LocalEntryNotFoundError:
        return None


def _others(repo: Repo, commit: str) -> str:
    """What the repository has instead of the file that was wanted, for the end of a message."""
    with hub_faults(str(repo)):
        files = [name for name in hub_api().list_repo_files(repo.id, revision=commit) if not name.startswith(".")]
    foreign = [name for name in files if name.endswith((".pt", ".pth", ".ckpt"))]
    if foreign:
        return f". A checkpoint of another system: alphaflow convert hf://{repo.id}/{foreign[0]} -o FILE.safetensors"
    return f"; it holds {', '.join(files[:5]) or 'nothing'}" + (" …" if len(files) > 5 else "")


def _is_whole(path: Path) -> bool:
    """Compare the bytes with the checksum that names them in the cache; remove damaged files.

    A file there is a link to blobs/CHECKSUM. Of huggingface_hub 2.4 that may be a link, too: to what several
    repositories share, whose name is Xet's hash and no checksum.
    """
    if not path.is_symlink():
        return True  # a cache without links keeps no checksum
    from huggingface_hub.utils.sha import git_hash

    blob = path.parent / path.readlink()
    expected = blob.name
    if re.fullmatch(r"[0-9a-f]{64}", expected):
        digest = sha256_of(blob)
    elif re.fullmatch(r"[0-9a-f]{40}", expected):
        digest = git_hash(blob.read_bytes())
    else:
        return True
    if digest == expected:
        return True
    for each in (blob.resolve(), blob, path):
        each.unlink(missing_ok=True)  # another command may have found it, too
    return False
