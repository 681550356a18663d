"""To the Hub: which run, whose login, may this name be taken, and the commit.

Interrupted, the same command sends what is missing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.remote.cache import cache_folder
from alphaflow_cli.remote.client import hub_api
from alphaflow_cli.remote.download import NOT_ALWAYS, is_published
from alphaflow_cli.remote.faults import NotThere, hub_faults

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def newest_run() -> Path:
    """The run folder in runs/ whose weights are newest."""
    models = sorted(Path("runs").glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not models:
        raise AlphaflowError("runs/: no run with weights to push. Train one, or name it: alphaflow push RUN")
    return models[-1].parent


@dataclass(frozen=True)
class Target:
    """The repository to publish to, and in which way."""

    repo: str  # user/repo
    private: bool
    pull_request: bool


def check_login() -> str:
    """The user's name on the Hub; without a token a message says what to do."""
    with hub_faults("push"):
        return str(hub_api().whoami()["name"])


def upload(folder: Path, target: Target, *, message: str) -> str:
    """Create the repository if need be and commit the folder, without leaving old scores beside new weights."""
    api = hub_api()
    if not target.pull_request:
        with hub_faults(target.repo):
            api.create_repo(target.repo, private=target.private or None, exist_ok=True)
    with hub_faults(target.repo, sending=True):
        commit = api.upload_folder(
            repo_id=target.repo,
            folder_path=folder,
            commit_message=message,
            create_pr=target.pull_request,
            ignore_patterns=[".*", "*.tmp"],
            delete_patterns=list(NOT_ALWAYS),
        )
    return str(commit.pr_url) if target.pull_request and commit.pr_url else f"{api.endpoint}/{target.repo}"


def check_name(target: Target) -> None:
    """Refuse a repository that holds something else, and a public one with --private. Makes nothing on the Hub."""
    api = hub_api()
    try:
        with hub_faults(target.repo):
            info = api.model_info(target.repo)
    except NotThere:
        if target.pull_request:
            raise
        return
    if target.private and not target.pull_request and info.private is False:
        raise AlphaflowError(
            f"{target.repo}: exists already and is public; --private would not hide it. "
            "Make it private on its settings page, or choose another name."
        )
    files = [entry.rfilename for entry in info.siblings or [] if not entry.rfilename.startswith(".git")]
    if files and not _is_ours(api, target.repo, files):
        raise AlphaflowError(
            f"{target.repo}: this name is taken by something else (it holds {', '.join(sorted(files)[:3])}). "
            "Choose another: alphaflow push RUN user/name."
        )


def _is_ours(api: "HfApi", repo: str, files: list[str]) -> bool:
    """Whether a repository holds an alphaflow model, by its config.json, or nothing but a README."""
    if "config.json" not in files:
        return set(files) <= {"README.md"}
    with hub_faults(repo):
        config = Path(api.hf_hub_download(repo, "config.json", cache_dir=cache_folder()))
    return is_published(config)
