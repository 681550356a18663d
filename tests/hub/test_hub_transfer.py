"""push and pull against a real server: what arrives is what was sent, and every fault has its line."""

import hashlib
import json
import os
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_fixtures import hub, write_checkpoint, write_results  # noqa: F401 (a fixture)
from hub_server import Fault

import alphaflow_cli
from alphaflow_cli.cli import run
from alphaflow_cli.hub.stage import open_publication, stage
from alphaflow_cli.model.checkpoint import load_checkpoint
from alphaflow_cli.remote.download import pull, resolve_checkpoint, resolve_file

# huggingface_hub 2.x hands its HTTP library bytes in a way that library no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
LAYOUT = {"README.md", "config.json", "recipe.yaml", "model.safetensors", "results.json", "samples.png", "alpha.png"}


@pytest.fixture
def finished(tmp_path):
    """A run folder with weights, results that belong to them, a state and a grid."""
    folder = tmp_path / "runs" / "tiny"
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "optimizer.pt").write_bytes(b"secret momentum")
    model = write_checkpoint(folder / "model.safetensors")
    write_results(folder / "results.json", hashlib.sha256(model.read_bytes()).hexdigest())
    return folder


def push(*args, capsys):
    code = run(["push", *map(str, args)])
    return code, capsys.readouterr()


def test_a_pushed_run_sampled_from_the_hub_gives_the_same_pictures(hub, finished, capsys):  # noqa: F811
    code, out = push(finished, capsys=capsys)
    assert code == 0, out.err
    assert out.out.splitlines()[-1] == f"{hub.url}/me/tiny"
    assert set(hub.files("me/tiny")) - {".gitattributes"} == LAYOUT
    local = alphaflow_cli.load(finished).sample(seeds=range(6), nfe=2).tensor
    remote = alphaflow_cli.load("me/tiny").sample(seeds=range(6), nfe=2).tensor
    assert torch.equal(local, remote)
    assert local.float().std() > 10  # pictures, not a flat grey


def test_the_same_bytes_are_published_where_nothing_is_private(hub, finished, capsys):  # noqa: F811
    push(finished, capsys=capsys)
    assert hub.files("me/tiny")["model.safetensors"] == (finished / "model.safetensors").read_bytes()


def test_a_second_push_sends_nothing_again(hub, finished, capsys):  # noqa: F811
    push(finished, capsys=capsys)
    sent = hub.count("PUT", "/lfs/")
    assert push(finished, capsys=capsys)[0] == 0
    assert hub.count("PUT", "/lfs/") == sent > 0


def test_an_interrupted_upload_goes_on_where_it_stopped(hub, finished, capsys, monkeypatch):  # noqa: F811
    hub.faults["POST", "/commit/"] = Fault(status=0, times=1)  # all large files are there, the commit is lost
    code, out = push(finished, capsys=capsys)
    assert code == 1
    assert "the connection to the Hub broke" in out.err
    assert "Run the same command again" in out.err
    sent = hub.count("PUT", "/lfs/")
    code, out = push(finished, capsys=capsys)
    assert code == 0, out.err
    assert hub.count("PUT", "/lfs/") == sent
    assert set(hub.files("me/tiny")) - {".gitattributes"} == LAYOUT


FAULTS = {  # what goes wrong → (request, fault, what is said)
    "401": (("GET", "/whoami"), Fault(401), "does not accept the token"),
    "403": (("POST", "/repos/create"), Fault(403), "no right to make it"),
    "403 on writing": (("POST", "/preupload/"), Fault(403), "no right to do this"),
    "404": (("POST", "/preupload/"), Fault(404, code="RepoNotFound"), "no such repository on the Hub"),
    "409": (("POST", "/commit/"), Fault(409), "somebody else changed it"),
    "412": (("POST", "/commit/"), Fault(412), "somebody else changed it"),
    "429": (("POST", "/commit/"), Fault(429, headers={"Retry-After": "7"}), "too many requests"),
    "500": (("POST", "/repos/create"), Fault(500), "the Hub is in trouble (HTTP 500)"),
    "dropped": (("POST", "/repos/create"), Fault(0), "the connection to the Hub broke"),
    "403 on a large file": (("PUT", "/lfs/"), Fault(403), "no right to do this"),
    "a licence that it does not know": (
        ("POST", "/validate-yaml"),
        Fault(400, body=b'{"errors": [{"message": "\\"license\\" must be one of [mit]"}], "warnings": []}'),
        'does not accept the card ("license" must be one of [mit]). --license chooses',
    ),
}


@pytest.mark.parametrize("what", FAULTS)
def test_every_fault_of_a_push_has_its_line(hub, finished, capsys, what):  # noqa: F811
    request, fault, said = FAULTS[what]
    hub.faults[request] = Fault(**vars(fault))
    code, out = push(finished, capsys=capsys)
    assert code == 1
    assert said in out.err
    lines = [line for line in out.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "Traceback" not in out.err


def test_nobody_logged_in_is_said_before_anything_is_made(hub, finished, capsys, monkeypatch):  # noqa: F811
    monkeypatch.delenv("HF_TOKEN")
    code, out = push(finished, capsys=capsys)
    assert code == 1
    assert "not logged in" in out.err
    assert "hf auth login" in out.err
    assert hub.requests == []


def test_a_name_taken_by_something_else_is_not_overwritten(hub, finished, capsys):  # noqa: F811
    hub.add("me/tiny", {"pytorch_model.bin": b"x", "config.json": b'{"model_type": "bert"}'})
    code, out = push(finished, capsys=capsys)
    assert code == 1
    assert "taken by something else" in out.err
    assert set(hub.files("me/tiny")) == {"pytorch_model.bin", "config.json"}


@pytest.fixture
def begun_there(hub, monkeypatch):  # noqa: F811
    """The endpoint as huggingface_hub reads it once, when a process begins."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)


def test_another_users_repository_may_not_be_written(hub, finished, capsys, begun_there):  # noqa: F811
    hub.add("you/tiny", {"README.md": b"soon"})
    code, out = push(finished, "you/tiny", capsys=capsys)
    assert code == 1
    assert "no right to do this" in out.err
    assert "or offer it with --pr" in out.err


def test_what_does_not_exist_and_may_not_be_made_cannot_be_offered_a_pull_request(hub, finished, capsys):  # noqa: F811
    code, out = push(finished, "you/tiny", capsys=capsys)
    assert code == 1
    assert "no right to make it (HTTP 403)" in out.err
    assert "--pr" not in out.err
    assert "a name of your own" in out.err


def test_a_space_of_another_user_takes_no_pull_request(hub, finished, capsys, begun_there):  # noqa: F811
    hub.add("you/show.space", {"README.md": b"soon"})
    code, out = push(finished, "--space=you/show", capsys=capsys)
    assert code == 1
    assert "no right to do this" in out.err
    assert "--pr" not in out.err


def test_private_is_private_and_a_public_one_is_not_claimed_to_be(hub, finished, capsys):  # noqa: F811
    assert push(finished, "--private", capsys=capsys)[0] == 0
    assert hub.repos["me/tiny"].private
    hub.repos["me/tiny"].private = False
    code, out = push(finished, "--private", capsys=capsys)
    assert code == 1
    assert "is public" in out.err


def test_a_pull_request_leaves_main_alone(hub, finished, capsys):  # noqa: F811
    push(finished, capsys=capsys)
    write_checkpoint(finished / "model.safetensors", seed=9)
    before = hub.repos["me/tiny"].at("main")[0]
    code, out = push(finished, "me/tiny", "--pr", "--without-results", capsys=capsys)
    assert code == 0, out.err
    assert out.out.splitlines()[-1] == f"{hub.url}/me/tiny/discussions/1"
    assert hub.repos["me/tiny"].at("main")[0] == before
    proposed = resolve_checkpoint("me/tiny@refs/pr/1")
    assert proposed.read_bytes() == (finished / "model.safetensors").read_bytes()


def test_nothing_to_push_is_said(hub, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    code, out = push(capsys=capsys)
    assert code == 1
    assert "no run with weights to push" in out.err
    (tmp_path / "empty").mkdir()
    code, out = push("empty", capsys=capsys)
    assert code == 1
    assert "no checkpoint in this folder" in out.err


def test_without_arguments_the_newest_run_goes(hub, finished, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(finished.parent.parent)
    code, out = push(capsys=capsys)
    assert code == 0, out.err
    assert "me/tiny" in hub.repos


def test_a_dry_run_writes_and_lists_and_sends_nothing(hub, finished, capsys):  # noqa: F811
    code, out = push(finished, "--dry-run", capsys=capsys)
    assert code == 0
    assert hub.requests == []
    assert out.out.splitlines()[-1] == str(finished / "hub")
    assert {path.name for path in (finished / "hub").iterdir()} == LAYOUT
    size = (finished / "hub" / "model.safetensors").stat().st_size
    assert f"model.safetensors  {size:,} bytes" in out.out


def test_a_large_file_that_fails_once_is_sent_again(hub, finished, capsys):  # noqa: F811
    hub.faults["PUT", "/lfs/"] = Fault(500, times=1)
    assert push(finished, capsys=capsys)[0] == 0
    assert set(hub.files("me/tiny")) - {".gitattributes"} == LAYOUT


# Down.


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """Two versions of a published folder: path → bytes, in order."""
    versions = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp(f"version{seed}")
        source = open_publication(write_checkpoint(folder / "m.safetensors", seed=seed), with_results=False)
        stage(source, folder / "hub", repo="me/tiny", licence="unknown")
        versions.append({path.name: path.read_bytes() for path in (folder / "hub").iterdir()})
    return versions


@pytest.fixture
def published(hub, staged):  # noqa: F811
    """me/tiny with two commits; returns their ids."""
    return [hub.add("me/tiny", staged[0]), hub.repos["me/tiny"].commit(staged[1])]


def test_a_pinned_revision_is_that_very_model_and_the_commit_is_said(hub, published, staged, capsys):  # noqa: F811
    first, second = published
    capsys.readouterr()
    assert resolve_checkpoint(f"me/tiny@{first}").read_bytes() == staged[0]["model.safetensors"]
    assert resolve_checkpoint("me/tiny").read_bytes() == staged[1]["model.safetensors"]
    assert [line.split("@")[1] for line in capsys.readouterr().err.splitlines()] == [first, second]
    assert pull("me/tiny", None).commit == second


def test_only_what_is_needed_is_downloaded(hub, published):  # noqa: F811
    folder = resolve_checkpoint("me/tiny").parent
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "recipe.yaml"}


def test_pull_copies_the_published_files_and_names_the_commit(hub, published, tmp_path, capsys):  # noqa: F811
    assert run(["pull", "me/tiny", "-o", str(tmp_path / "here")]) == 0
    out = capsys.readouterr()
    assert out.out.splitlines() == [str(tmp_path / "here")]
    assert f"me/tiny@{published[1]}" in out.err
    assert {path.name for path in (tmp_path / "here").iterdir()} == LAYOUT - {"results.json"}
    assert load_checkpoint(tmp_path / "here" / "model.safetensors").recipe.name == "tiny"


def test_pull_copies_nothing_else_that_the_cache_has_of_the_model(hub, published, staged, tmp_path, capsys):  # noqa: F811
    hub.repos["me/tiny"].commit(staged[1] | {"raw.safetensors": b"weights", "notes/a.txt": b"notes"})
    huggingface_hub.snapshot_download("me/tiny", cache_dir=os.environ["HF_HUB_CACHE"], endpoint=hub.url)
    for _ in range(2):  # the second one finds the folder of the first, and knows it
        assert run(["pull", "me/tiny", "-o", str(tmp_path / "here")]) == 0, capsys.readouterr().err
    assert {path.name for path in (tmp_path / "here").iterdir()} == LAYOUT - {"results.json"}


def test_offline_the_cache_serves_and_that_is_said(hub, published, capsys):  # noqa: F811
    online = resolve_checkpoint("me/tiny").read_bytes()
    hub.faults["GET", "/"] = Fault(0)
    hub.faults["HEAD", "/"] = Fault(0)
    assert resolve_checkpoint("me/tiny").read_bytes() == online
    assert f"using the cache, commit {published[1]}" in capsys.readouterr().err


def test_a_file_that_the_cache_shares_among_repositories_has_the_checksum_of_its_link(hub, published, capsys):  # noqa: F811
    model = resolve_checkpoint("me/tiny")
    good, blob, shared = model.read_bytes(), model.resolve(), Path(os.environ["HF_HUB_CACHE"], "blobs", "ab", "ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)  # as huggingface_hub 2.4 does with what came by Xet
    blob.symlink_to(shared)
    assert resolve_checkpoint("me/tiny").read_bytes() == good
    shared.write_bytes(bytes(len(good)))
    assert run(["pull", "me/tiny"]) == 1
    assert "model.safetensors came damaged" in capsys.readouterr().err
    assert not shared.exists()
    assert resolve_checkpoint("me/tiny").read_bytes() == good


def test_a_damaged_download_is_found_removed_and_fetched_again(hub, published, capsys):  # noqa: F811
    hub.faults["GET", "/resolve/"] = Fault(200, corrupt=True)
    code = run(["pull", "me/tiny"])
    out = capsys.readouterr()
    assert code == 1
    assert "came damaged" in out.err
    hub.faults.clear()
    good = resolve_checkpoint("me/tiny").read_bytes()
    assert hashlib.sha256(good).hexdigest() == hashlib.sha256(hub.files("me/tiny")["model.safetensors"]).hexdigest()


DOWN_FAULTS = {
    "401": (Fault(401), "the Hub does not accept the token"),
    "403": (Fault(403), "may not read this"),
    "404": (Fault(404, code="RepoNotFound"), "no such repository on the Hub"),
    "gated": (Fault(403, code="GatedRepo"), "gated"),
    "429": (Fault(429), "too many requests"),
    "500": (Fault(500), "the Hub is in trouble"),
    "dropped": (Fault(0), "the connection to the Hub broke"),
}


@pytest.mark.parametrize("what", DOWN_FAULTS)
def test_every_fault_of_a_pull_has_its_line(hub, published, capsys, what, tmp_path, monkeypatch):  # noqa: F811
    fault, said = DOWN_FAULTS[what]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty-cache"))
    hub.faults["GET", "/api/models/"] = Fault(**vars(fault))
    assert run(["pull", "me/tiny"]) == 1
    out = capsys.readouterr()
    assert said in out.err
    assert out.err.count("error:") == 1


def test_a_revision_or_file_that_is_not_there_is_named(hub, published, capsys):  # noqa: F811
    assert run(["pull", "me/tiny@v9"]) == 1
    assert "no such revision" in capsys.readouterr().err
    assert run(["pull", "me/nothing"]) == 1
    assert "no such repository" in capsys.readouterr().err


def test_a_repository_of_another_system_points_to_convert(hub, capsys):  # noqa: F811
    hub.add("lab/other", {"alphaflow-B-2.pt": b"x" * 2000, "README.md": b"---\n---\n"})
    assert run(["sample", "lab/other", "--grid", "x.png"]) == 1
    assert "alphaflow convert hf://lab/other/alphaflow-B-2.pt" in capsys.readouterr().err
    assert resolve_file("hf://lab/other/alphaflow-B-2.pt").read_bytes() == b"x" * 2000


def test_a_private_model_of_another_is_not_there(hub, published, capsys, monkeypatch):  # noqa: F811
    hub.repos["me/tiny"].private = True
    monkeypatch.setenv("HF_TOKEN", "token-reader")
    assert run(["pull", "me/tiny"]) == 1
    assert "no such repository on the Hub, or it is private" in capsys.readouterr().err


def test_config_json_says_what_a_program_needs(hub, published):  # noqa: F811
    config = json.loads(hub.files("me/tiny")["config.json"])
    assert config["model_type"] == "alphaflow"
    assert config["latents"] == {"autoencoder": "none", "shape": [3, 16, 16], "normalise": "channel", "image_size": 16}
    assert config["guidance"] == {"baked": 1.0, "null_label": False}
