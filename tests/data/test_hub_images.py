"""Pictures of a data set on the Hub, from a real server on loopback that speaks the Hub's protocol."""

import hashlib
import http.server
import io
import json
import threading
import urllib.parse
import zipfile

import numpy as np
import pytest
from awkward_pictures import encoded, gradient
from huggingface_hub import constants
from latent_stores import prepare_latents
from safetensors.numpy import load_file

from alphaflow_cli.data.sources import open_source
from alphaflow_cli.data.store import verify_store
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.remote import ranges

COMMIT = "c" * 40
PICTURE = encoded(gradient(size=(8, 8)), "PNG")


def zipped(names):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, PICTURE)
    return out.getvalue()


REPOS = {
    "user/files": {
        "README.md": b"#",
        "train/cat/0.png": PICTURE,
        "train/dog/1.png": PICTURE,
        "test/cat/2.png": PICTURE,
        "train/.ipynb_checkpoints/0-checkpoint.png": PICTURE,
        "train/cat/.0.png": PICTURE,
        "train/__MACOSX/0.png": PICTURE,
    },
    "user/zip": {"README.md": b"#", "data.zip": zipped(["b/0.png", "a/1.png"])},
    "user/two": {"train.zip": zipped(["a/0.png"]), "test.zip": zipped(["a/0.png"])},
    "user/parts": {"part-10.zip": zipped(["a/2.png"]), "part-2.zip": zipped(["b/0.png", "a/1.png"])},
    "user/teaser": {"assets/teaser.png": PICTURE, "data.zip": zipped([f"a/{i}.png" for i in range(9)])},
    "user/nothing-here": {"README.md": b"#"},
}


class Hub(http.server.BaseHTTPRequestHandler):
    """Facts, file lists and files of REPOS; `failures` answers `status` so many times first."""

    failures, status = 0, 503
    asked: tuple[str, ...] = ()

    def do_GET(self):
        path = urllib.parse.unquote(self.path.split("?")[0])
        type(self).asked = (*self.asked, path)
        for repo, files in REPOS.items():
            if path.startswith(f"/api/datasets/{repo}/tree/"):
                return self.answer(json.dumps([self.entry(*item) for item in files.items()]).encode())
            if path in (f"/api/datasets/{repo}", f"/api/datasets/{repo}/revision/v1"):
                return self.answer(json.dumps({"id": repo, "sha": COMMIT}).encode())
            start = f"/datasets/{repo}/resolve/{COMMIT}/"
            if path.startswith(start):
                return self.file(files.get(path.removeprefix(start)))
        return self.refuse(404)

    do_HEAD = do_GET

    def entry(self, name, data):
        return {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}

    def file(self, data):
        if type(self).failures:
            type(self).failures -= 1
            return self.refuse(type(self).status)
        return self.refuse(404) if data is None else self.answer(data)

    def refuse(self, code):
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, data):
        self.send_response(200)
        for key, value in {
            "Content-Length": len(data),
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
        }.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ranges, "PAUSE", 0.01)
    Hub.asked, Hub.failures, Hub.status = (), 0, 503
    yield Hub
    server.shutdown()
    server.server_close()


def test_picture_files_are_listed_at_one_commit_and_fetched_one_by_one(hub):
    source = open_source("hf://datasets/user/files")
    assert list(source.names) == ["test/cat/2.png", "train/cat/0.png", "train/dog/1.png"]
    assert source.facts() == {"revision": COMMIT}
    assert not any("resolve" in path for path in hub.asked)
    with source.reading([1]) as fetches:
        assert [(line, fetch()) for line, fetch in fetches] == [(1, PICTURE)]
    assert sum("resolve" in path for path in hub.asked) == 1


def test_a_data_set_becomes_a_store(hub, tmp_path):
    out = prepare_latents("hf://datasets/user/files", tmp_path / "s", size=8, autoencoder="none", shown=False)
    rows = load_file(out / "train-00000.safetensors")
    np.testing.assert_array_equal(rows["label"], [0, 1])
    np.testing.assert_array_equal(rows["pixels"][0], np.asarray(gradient(size=(8, 8))).transpose(2, 0, 1))
    assert json.loads((out / "plan.json").read_text())["source"]["revision"] == COMMIT
    assert verify_store(out) == []


def test_a_split_and_a_revision_can_be_named(hub):
    assert list(open_source("hf://datasets/user/files@v1:test").names) == ["test/cat/2.png"]


def test_a_zip_in_a_data_set_is_downloaded_once_and_read(hub):
    for _ in range(2):
        source = open_source("hf://datasets/user/zip")
        assert list(source.names) == ["a/1.png", "b/0.png"]
    with source.reading([0]) as fetches:
        assert [fetch() for _, fetch in fetches] == [PICTURE]
    assert sum(path.endswith("data.zip") for path in hub.asked) <= 3  # head and get, then at most a head


def test_of_several_archives_that_of_the_training_split_is_taken(hub):
    assert list(open_source("hf://datasets/user/two").names) == ["a/0.png"]
    assert open_source("hf://datasets/user/two").name == "train.zip"
    assert open_source("hf://datasets/user/two:test").name == "test.zip"


def test_a_repository_of_many_archives_is_read_in_the_order_of_their_numbers(hub):
    source = open_source("hf://datasets/user/parts")
    assert list(source.names) == ["part-2.zip/a/1.png", "part-2.zip/b/0.png", "part-10.zip/a/2.png"]
    assert source.kind == "zip shards"
    with source.reading([0, 2]) as fetches:
        assert [fetch() for _, fetch in fetches] == [PICTURE] * 2


def test_what_has_the_most_bytes_is_the_data(hub):
    assert open_source("hf://datasets/user/teaser").kind == "zip"
    with pytest.raises(
        AlphaflowError, match="user/nothing-here: no pictures, no parquet and no zip or tar archive there"
    ):
        open_source("hf://datasets/user/nothing-here")


def test_a_hub_that_stumbles_is_asked_again(hub):
    source = open_source("hf://datasets/user/files")
    hub.failures = 2
    with source.reading([0]) as fetches:
        assert [fetch() for _, fetch in fetches] == [PICTURE]


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (503, r"the Hub is in trouble \(HTTP 503\). Run the same command again"),
        (403, r"your token may not read this \(HTTP 403\)"),
        (401, r"the Hub does not accept the token \(HTTP 401\)"),
    ],
)
def test_a_hub_that_stays_down_or_refuses_ends_the_run_and_no_picture_counts_as_bad(hub, tmp_path, status, line):
    hub.failures, hub.status = 100, status
    where, options = "hf://datasets/user/files", {"size": 8, "autoencoder": "none", "bad": "skip", "shown": False}
    with pytest.raises(AlphaflowError, match=line):
        prepare_latents(where, tmp_path / "s", **options)
    hub.failures = 0
    assert verify_store(prepare_latents(where, tmp_path / "s", **options)) == []


def test_what_the_hub_refuses_is_asked_for_once(hub):
    hub.failures, hub.status = 100, 403
    with pytest.raises(AlphaflowError, match="HTTP 403"):
        ranges.download("user/files", COMMIT, "train/cat/0.png")
    assert hub.failures == 99


def test_an_unknown_data_set_is_one_clear_line(hub):
    with pytest.raises(AlphaflowError, match=r"hf://datasets/user/nothing: cannot be listed"):
        open_source("hf://datasets/user/nothing")


@pytest.mark.parametrize("text", ["hf://models/x", "hf://datasets/", "hf://datasets/a/b/c", "hf://datasets/a/b:c d"])
def test_a_wrong_address_shows_the_right_form(text):
    with pytest.raises(AlphaflowError, match="should be hf://datasets/USER/NAME"):
        open_source(text)
