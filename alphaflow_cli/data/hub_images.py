"""Data sets on the Hub: `hf://datasets/USER/NAME[@REVISION][:SPLIT]`.

Two forms are read. Picture files are fetched one by one as their turn comes, and nothing is kept. A zip or tar archive
is downloaded once into the Hub's cache, and read there. Parquet tables are not read; the error says what to do with
them. The commit is looked up once and stands in the plan: a run that goes on reads the same pictures.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphaflow_cli.data.archives import Archive, open_archive
from alphaflow_cli.data.pictures import Loose, is_picture
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.remote.cache import cache_folder
from alphaflow_cli.remote.client import hub_api, session
from alphaflow_cli.remote.faults import Distrusted, HubFault, hub_faults

ADDRESS = re.compile(r"hf://datasets/(?P<repo>[^/@:]+/[^/@:]+|[^/@:]+)(@(?P<revision>[^:]+))?(:(?P<split>[\w.-]+))?$")
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz")
REFUSED = (401, 403, 404)  # of one file: it is left out, or ends the run, as --bad says
TRIES, PAUSE = 4, 1.0  # of one picture, seconds before the second try; doubled each time


@dataclass(frozen=True, kw_only=True)
class HubFiles(Loose):
    """Picture files of one data set at one commit."""

    repo: str
    commit: str
    kind: str = "hub files"

    def fetch(self, line: int) -> bytes:
        """Download a file when it is its turn, several at a time by the decoding threads."""
        return download(self.repo, self.commit, self.names[line])

    def facts(self) -> dict[str, Any]:
        """The commit, which fixes every byte."""
        return {"revision": self.commit}


def open_hub(text: str) -> HubFiles | Archive:
    """List the pictures of a data set on the Hub: its files, or those in its one archive, which is downloaded."""
    match = ADDRESS.match(text)
    if match is None:
        raise AlphaflowError(f"{text}: should be hf://datasets/USER/NAME, then perhaps @REVISION and :SPLIT")
    repo, split = match["repo"], match["split"] or ""
    commit, files = _list(repo, match["revision"])
    files = [file for file in files if not split or split in re.split(r"[/._-]", file) or file == "classes.json"]
    names = sorted(file for file in files if is_picture(file))
    if names:
        given = download(repo, commit, "classes.json") if "classes.json" in files else None
        return HubFiles(name=f"hf://datasets/{repo}", names=names, given_classes=given, repo=repo, commit=commit)
    archives = [file for file in files if file.lower().endswith(ARCHIVES)]
    if len(archives) == 1:
        return open_archive(_cached(repo, commit, archives[0]))
    if archives:
        shown = ", ".join(archives[:5])
        raise AlphaflowError(
            f"{text}: holds {len(archives)} archives ({shown}); choose one with :SPLIT, or download one"
        )
    raise AlphaflowError(f"{text}: no pictures and no zip or tar archive in it{_about_parquet(files)}")


def download(repo: str, commit: str, file: str) -> bytes:
    """Download the bytes of one file. One that is not there is an OSError; a Hub that stays away ends the run."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    url = hf_hub_url(repo, file, repo_type="dataset", revision=commit)
    for attempt in range(TRIES):
        try:
            with hub_faults(url):
                answer = session().get(url, headers=build_hf_headers(), follow_redirects=True, timeout=60)
                if answer.status_code not in REFUSED:
                    hf_raise_for_status(answer)
                if answer.headers.get("Content-Type", "").startswith("text/html"):
                    raise Distrusted("a web page came instead (does this network show a login page?)")
        except HubFault:
            if attempt == TRIES - 1:
                raise
            time.sleep(PAUSE * 2**attempt)
            continue
        if answer.status_code in REFUSED:
            raise OSError(f"the Hub answers {answer.status_code}")
        return bytes(answer.content)
    raise AssertionError("unreachable")


def _list(repo: str, revision: str | None) -> tuple[str, list[str]]:
    """The commit that a revision means now, and all its files."""
    with hub_faults(f"hf://datasets/{repo}: cannot be listed"):
        info = hub_api().dataset_info(repo, revision=revision)
        assert info.sha is not None, repo
        return info.sha, hub_api().list_repo_files(repo, repo_type="dataset", revision=info.sha)


def _cached(repo: str, commit: str, file: str) -> Path:
    """Download an archive into the Hub's cache; a download that was cut off goes on, and one that is there stays."""
    with hub_faults(f"hf://datasets/{repo}: {file} cannot be downloaded"):
        folder = cache_folder()
        return Path(hub_api().hf_hub_download(repo, file, repo_type="dataset", revision=commit, cache_dir=folder))


def _about_parquet(files: Sequence[str]) -> str:
    if not any(file.endswith(".parquet") for file in files):
        return ""
    return " (it is parquet: export its image column to files, one folder per class, and give that folder)"
