"""Data sets on the Hub: `hf://datasets/USER/NAME[@REVISION][:SPLIT]`.

Three forms are read. Picture files are fetched one by one as their turn comes, and nothing is kept. Parquet files are
read by parts, row group by row group, and nothing is kept either. Zip and tar archives are downloaded once into the
Hub's cache, and read there. Where a data set holds several forms, the one with the most bytes is its data. The commit
is looked up once and stands in the plan: a run that goes on reads the same pictures.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from alphaflow_cli.data.classes import choose_files
from alphaflow_cli.data.entries import is_hidden
from alphaflow_cli.data.pictures import CLASS_LIST, TABLES, Loose, Source, is_picture
from alphaflow_cli.data.shards import ARCHIVES, PARQUET, in_order, open_archives
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.remote.client import hub_api
from alphaflow_cli.remote.download import fetch_data
from alphaflow_cli.remote.faults import hub_faults
from alphaflow_cli.remote.ranges import RemoteFile, download
from alphaflow_cli.text import brief

ADDRESS = re.compile(r"hf://datasets/(?P<repo>[^/@:]+/[^/@:]+|[^/@:]+)(@(?P<revision>[^:]+))?(:(?P<split>[\w./-]+))?$")


@dataclass(frozen=True, kw_only=True)
class HubFiles(Loose):
    """Picture files of one data set at one commit."""

    repo: str
    commit: str
    kind: str = "hub files"

    def fetch(self, line: int) -> bytes:
        """Download a file when it is its turn, several at a time by the decoding threads."""
        return download(self.repo, self.commit, self.names[line])

    def read_aside(self, name: str) -> bytes:
        """Download a table of labels."""
        return download(self.repo, self.commit, name)

    def facts(self) -> dict[str, Any]:
        """The commit, which fixes every byte."""
        return {"revision": self.commit}


def open_hub(text: str, image_column: str = "") -> Source:
    """List the pictures of a data set on the Hub: its files, the rows of its parquet, or those in its archives."""
    match = ADDRESS.match(text)
    if match is None:
        raise AlphaflowError(f"{text}: should be hf://datasets/USER/NAME, then perhaps @REVISION and :SPLIT")
    repo, split = match["repo"], match["split"] or ""
    commit, sizes = _list(repo, match["revision"])
    name = f"hf://datasets/{repo}"
    chosen = choose_files(list(sizes), split) if split else list(sizes)
    asides = [file for file in chosen if file.rsplit("/", 1)[-1] in TABLES]
    forms = {
        "pictures": sorted(file for file in chosen if is_picture(file)),
        "parquet": [file for file in chosen if file.endswith(PARQUET) and not file.endswith("metadata.parquet")],
        "archives": [file for file in chosen if file.lower().endswith(ARCHIVES)],
    }
    form = max(forms, key=lambda each: (sum(sizes[file] for file in forms[each]), len(forms[each])))
    files = forms[form]
    if not files:
        what = f"no file of {split} there" if split else "no pictures, no parquet and no zip or tar archive there"
        raise AlphaflowError(f"{text}: {what} (it holds {brief(', '.join(sizes)) or 'nothing'})")
    given = download(repo, commit, CLASS_LIST) if form != "parquet" and CLASS_LIST in sizes else None
    loose = HubFiles(name=name, names=[], given_classes=given, asides=asides, repo=repo, commit=commit)
    if form == "pictures":
        return replace(loose, names=files)
    files = in_order(choose_files(files, split))
    if form == "archives":
        return open_archives(name, [fetch_data(repo, commit, file) for file in files], files, loose)
    from alphaflow_cli.data.parquet import open_parquet  # and pyarrow, which other sources do not need

    places = [RemoteFile(repo, commit, file, sizes[file]) for file in files]
    return open_parquet(name, places, image_column, {"revision": commit})


def _list(repo: str, revision: str | None) -> tuple[str, Mapping[str, int]]:
    """The commit that a revision means now, and the sizes of all its files that are not hidden."""
    with hub_faults(f"hf://datasets/{repo}: cannot be listed"):
        info = hub_api().dataset_info(repo, revision=revision)
        assert info.sha is not None, repo
        entries = hub_api().list_repo_tree(repo, repo_type="dataset", revision=info.sha, recursive=True)
        files = (entry for entry in entries if hasattr(entry, "size") and not is_hidden(entry.path))
        return info.sha, {file.path: file.size for file in files}
