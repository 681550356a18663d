"""What push and pull refuse, replace and remove: no score beside other weights, no file of the user's overwritten."""

import json

import pytest
from hub_fixtures import alphaflow, hub, project_run, scored, sha256, write_checkpoint, write_results  # noqa: F401

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.hub import stage as stage_file
from alphaflow_cli.hub.stage import open_publication, stage

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
HOME = "/".join(["", "home", "jane"])  # a path of a machine, which no file here may spell out


# Old scores and autoencoders go.


def add_stale(hub):  # noqa: F811
    files = hub.files("me/tiny") | {"autoencoder/config.json": b"{}", "autoencoder/old.safetensors": b"x", "mine": b"1"}
    return hub.repos["me/tiny"].commit(files)


def test_a_push_leaves_no_score_or_autoencoder_of_other_weights(hub, project_run, capsys):  # noqa: F811
    assert alphaflow("push", "runs/tiny", capsys=capsys)[0] == 0
    add_stale(hub)
    write_checkpoint(project_run / "model.safetensors", seed=1)
    assert alphaflow("push", "runs/tiny", "--without-results", capsys=capsys)[0] == 0
    names = {"README.md", "config.json", "recipe.yaml", "model.safetensors", "samples.png", "alpha.png"}
    assert set(hub.files("me/tiny")) == names | {".gitattributes", "mine"}


def test_scores_that_still_hold_stay(hub, project_run, capsys):  # noqa: F811
    for seed in (0, 1):
        scored(project_run, seed)
        assert alphaflow("push", "runs/tiny", capsys=capsys)[0] == 0
        assert json.loads(hub.files("me/tiny")["results.json"]) == json.loads(
            (project_run / "results.json").read_text()
        )


def test_a_staging_leaves_no_score_or_autoencoder_of_other_weights(project_run, capsys):  # noqa: F811
    assert alphaflow("push", "runs/tiny", "--dry-run", capsys=capsys)[0] == 0
    (project_run / "hub" / "autoencoder").mkdir()
    (project_run / "hub" / "autoencoder" / "config.json").write_text("{}")
    write_checkpoint(project_run / "model.safetensors", seed=1)
    assert alphaflow("push", "runs/tiny", "--dry-run", "--without-results", capsys=capsys)[0] == 0
    assert not (project_run / "hub" / "results.json").exists()
    assert not (project_run / "hub" / "autoencoder" / "config.json").exists()


def test_a_pull_leaves_no_score_or_autoencoder_of_other_weights(hub, project_run, capsys):  # noqa: F811
    alphaflow("push", "runs/tiny", capsys=capsys)
    full = add_stale(hub)
    assert alphaflow("pull", f"me/tiny@{full}", "-o", "got", capsys=capsys)[0] == 0
    assert (project_run.parent.parent / "got" / "autoencoder" / "config.json").is_file()
    write_checkpoint(project_run / "model.safetensors", seed=1)
    alphaflow("push", "runs/tiny", "--without-results", capsys=capsys)
    assert alphaflow("pull", "me/tiny", "-o", "got", capsys=capsys)[0] == 0
    folder = project_run.parent.parent / "got"
    assert not (folder / "results.json").exists()
    assert not (folder / "autoencoder" / "config.json").exists()
    assert (folder / "model.safetensors").read_bytes() == (project_run / "model.safetensors").read_bytes()


# Only what lies here is published.


@pytest.mark.parametrize("source", ["me/tiny", "hf://me/tiny", "runs/tinny"])
def test_a_push_takes_no_address_of_the_hub(hub, project_run, capsys, source):  # noqa: F811
    alphaflow("push", "runs/tiny", capsys=capsys)
    before, asked = hub.repos["me/tiny"].at("main"), len(hub.requests)
    code, said = alphaflow("push", source, capsys=capsys)
    assert code == 2
    assert "say the run: alphaflow push runs/NAME" in said
    assert ("runs/NAME me/tiny" in said) == (source == "me/tiny")
    assert hub.repos["me/tiny"].at("main") == before
    assert len(hub.requests) == asked


# Folders.


def test_a_pull_does_not_write_into_a_run(hub, project_run, capsys):  # noqa: F811
    alphaflow("push", "runs/tiny", capsys=capsys)
    write_checkpoint(project_run / "model.safetensors", seed=1)
    (project_run / "results.json").unlink()
    before = (project_run / "model.safetensors").read_bytes()
    code, said = alphaflow("pull", "me/tiny", "-o", "runs/tiny", capsys=capsys)
    assert code == 1
    assert "holds model.safetensors, so not only push or pull wrote here" in said
    assert (project_run / "model.safetensors").read_bytes() == before
    assert [path.name for path in project_run.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("name", ["README.md", "notes.txt"])
def test_a_staging_does_not_write_over_a_project(project_run, capsys, name):  # noqa: F811
    project = project_run.parent.parent / "project"
    project.mkdir()
    (project / name).write_text("mine")
    code, said = alphaflow("push", "runs/tiny", "--dry-run", "--out", "project", capsys=capsys)
    assert code == 1
    assert f"holds {name}" in said
    assert [path.name for path in project.iterdir()] == [name]
    assert (project / name).read_text() == "mine"


def test_a_staged_folder_with_a_file_of_the_users_is_left_alone(project_run, capsys):  # noqa: F811
    alphaflow("push", "runs/tiny", "--dry-run", capsys=capsys)
    (project_run / "hub" / "notes.txt").write_text("mine")
    code, said = alphaflow("push", "runs/tiny", "--dry-run", capsys=capsys)
    assert code == 1
    assert "holds notes.txt" in said


def test_a_pulled_folder_is_not_staged_onto_itself(project_run, capsys):  # noqa: F811
    alphaflow("push", "runs/tiny", "--dry-run", "--out", "here", capsys=capsys)
    code, said = alphaflow("push", "here", "--dry-run", "--out", "here", capsys=capsys)
    assert code == 1
    assert "the weights to publish lie there" in said


@pytest.mark.parametrize("args", [("pull", "me/tiny", "-o"), ("push", "runs/tiny", "--dry-run", "--out")])
def test_a_folder_below_a_file_is_one_clear_line(hub, project_run, capsys, args):  # noqa: F811
    (project_run.parent.parent / "file").write_text("x")
    code, said = alphaflow(*args, "file/x", capsys=capsys)
    assert code == 1
    assert "file/x: cannot be written (" in said


# A run that still trains.


def test_weights_replaced_after_they_were_read_are_not_published(project_run, tmp_path):  # noqa: F811
    source = open_publication(project_run, with_results=True)
    write_checkpoint(project_run / "model.safetensors", seed=1, step=200)
    with pytest.raises(AlphaflowError, match=r"changed while it was read; is it training\? Run the same command again"):
        stage(source, tmp_path / "hub", repo="me/tiny", licence="unknown")
    assert not (tmp_path / "hub" / "model.safetensors").exists()


def test_weights_replaced_while_they_are_read_are_not_published(project_run, monkeypatch):  # noqa: F811
    read = stage_file.load_checkpoint

    def replaced_meanwhile(path):
        write_checkpoint(path, seed=1, step=200)
        return read(path)

    monkeypatch.setattr(stage_file, "load_checkpoint", replaced_meanwhile)
    with pytest.raises(AlphaflowError, match="changed while it was read"):
        open_publication(project_run, with_results=True)


def test_scores_follow_the_weights_that_were_read(project_run, tmp_path):  # noqa: F811
    path = write_checkpoint(project_run / "model.safetensors", sets=[f"data.store={HOME}/latents"])  # will be cleaned
    write_results(project_run / "results.json", sha256(path.read_bytes()))
    source = open_publication(project_run, with_results=True)
    write_checkpoint(path, seed=1, step=200)
    stage(source, tmp_path / "hub", repo="me/tiny", licence="unknown")
    (row,) = json.loads((tmp_path / "hub" / "results.json").read_text())["evaluations"][0]["rows"]
    assert row["pictures"]["checkpoint_sha256"] == sha256((tmp_path / "hub" / "model.safetensors").read_bytes())
