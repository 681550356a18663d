"""The model card: what it tells is true, its snippets run, and nothing of the machine leaves with it."""

import hashlib
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hub_fixtures import hub, results_of, write_checkpoint, write_results  # noqa: F401 (a fixture)
from huggingface_hub import ModelCard
from PIL import Image
from snapshots import published_snapshot, tiny_autoencoder

import alphaflow_cli
from alphaflow_cli.cli import run
from alphaflow_cli.convert import Options, convert
from alphaflow_cli.engine.checkpoint import load_checkpoint, save_checkpoint
from alphaflow_cli.engine.publish import open_source, stage
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.hub.scrub import scrub
from alphaflow_cli.recipe import load_recipe

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
HOME = "/".join(["", "home", "jane"])  # a path of a machine, which no file here may spell out


@pytest.fixture
def finished(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    model = write_checkpoint(folder / "model.safetensors")
    write_results(folder / "results.json", hashlib.sha256(model.read_bytes()).hexdigest())
    return folder


def width(path):
    with Image.open(path) as picture:
        return picture.size[0]


def staged(source, tmp_path, **options):
    opened = open_source(source, with_results=True)
    stage(opened, tmp_path / "hub", **({"repo": "me/tiny", "licence": "unknown"} | options))
    return tmp_path / "hub"


def test_the_metadata_is_what_the_hub_reads(finished, tmp_path):
    card = ModelCard.load(staged(finished, tmp_path, licence="apache-2.0") / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "alphaflow"
    (score,) = card.data.eval_results
    assert (score.metric_type, score.metric_name, score.metric_value) == ("fd-tiny", "FD-tiny-2k", 3.14159)
    said = score.metric_args["protocol"]
    assert all(word in said for word in ("tiny abababab", "glyphs (cdcdcdcd)", "2,000 pictures", "balanced"))


def test_the_card_tells_the_weights_the_recipe_and_the_scores(finished, tmp_path):
    text = (staged(finished, tmp_path) / "README.md").read_text()
    parameters = sum(value.numel() for value in load_checkpoint(finished / "model.safetensors").weights.values())
    assert f"{parameters:,} parameters" in text
    assert "the exponential average at step 100" in text
    assert "| FD-tiny-2k | 3.142 |" in text
    assert "alpha goes from 1 to 0 (sigmoid" in text
    recipe = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1]
    assert yaml.safe_load(recipe)["model"]["dim"] == 32
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert width(tmp_path / "hub" / picture) > 100


def test_the_recipe_beside_the_weights_loads(finished, tmp_path):
    folder = staged(finished, tmp_path)
    assert load_recipe(str(folder / "recipe.yaml")) == load_checkpoint(folder / "model.safetensors").recipe


def test_the_snippets_of_the_card_run(hub, finished, tmp_path, monkeypatch, capsys):  # noqa: F811
    assert run(["push", str(finished)]) == 0
    text = hub.files("me/tiny")["README.md"].decode()
    monkeypatch.chdir(tmp_path)
    shell, python = (re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL)[1] for kind in ("bash", "python"))
    lines = [line for line in shell.splitlines() if line.startswith("alphaflow ")]
    assert len(lines) == 2
    for line in lines:
        assert run(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    assert width("samples.png") > 100
    assert len(list(Path("pictures").glob("*.png"))) == 16
    names = {}
    exec(python, names)
    assert names["images"].shape == (4, 3, 16, 16)
    assert names["images"].dtype == torch.uint8


def test_results_of_other_weights_are_refused(finished, tmp_path):
    write_results(finished / "results.json", "00" * 32)
    with pytest.raises(AlphaflowError, match="FD-tiny-2k was measured on other weights"):
        staged(finished, tmp_path)
    stage(open_source(finished, with_results=False), tmp_path / "hub", repo="me/tiny", licence="unknown")
    assert not (tmp_path / "hub" / "results.json").exists()
    assert "Not measured yet" in (tmp_path / "hub" / "README.md").read_text()


def test_results_that_do_not_say_whose_they_are_are_refused(finished, tmp_path):
    results = results_of("")
    (finished / "results.json").write_text(json.dumps(results))
    with pytest.raises(AlphaflowError, match="not said which"):
        staged(finished, tmp_path)


# Nothing of the machine leaves.

PATHS = {
    f"{HOME}/latents/imagenet": "imagenet",
    f"made from {HOME}/a.zip on Monday": "made from a.zip on Monday",
    "~/latents/x": "x",
    "https://huggingface.co/a/b": "https://huggingface.co/a/b",
    "stabilityai/sd-vae-ft-ema": "stabilityai/sd-vae-ft-ema",
    "0.1 img/s, r/t": "0.1 img/s, r/t",
    "latents/glyphs": "latents/glyphs",
    f"file://{HOME}/x.pt": "x.pt",
    f"see file://{HOME}/x.pt": "see x.pt",
    "key:/data/a/b": "key:b",
    "D:/data/x": "x",
    "C:\\data\\x": "x",
    "\\\\srv\\share\\x": "x",
    "on \\\\srv\\share\\x now": "on x now",
    f"from /{HOME}/x": "from x",
    "hf://datasets/me/x": "hf://datasets/me/x",
    "http://127.0.0.1:80/a/b": "http://127.0.0.1:80/a/b",
    "me/b2:sub/x.safetensors": "me/b2:sub/x.safetensors",
    "ratio 3:1, ~50 of them": "ratio 3:1, ~50 of them",
}


@pytest.mark.parametrize("text", PATHS)
def test_a_path_becomes_its_last_part(text):
    assert scrub({"a": [text, 1, None]}) == {"a": [PATHS[text], 1, None]}


def test_names_of_classes_are_no_paths():
    assert scrub({"class_names": ["/m/01g317", "~x"], "store": f"{HOME}/x"}) == {
        "class_names": ["/m/01g317", "~x"],
        "store": "x",
    }


def test_no_path_no_state_and_no_secret_leaves(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    path = finished / "model.safetensors"
    old = load_checkpoint(path)
    recipe = replace(
        old.recipe,
        data=replace(old.recipe.data, store=f"{HOME}/latents/set"),
        eval=replace(old.recipe.eval, reference=f"{HOME}/refs/in256.safetensors"),
    )
    origin = old.origin | {"store": f"{HOME}/latents/set", "command": f"alphaflow train --data {HOME}/latents/set"}
    save_checkpoint(path, replace(old, recipe=recipe, origin=origin))
    write_results(finished / "results.json", hashlib.sha256(path.read_bytes()).hexdigest())
    (finished / "state").mkdir()
    (finished / "state" / "optimizer.safetensors").write_bytes(b"momentum")
    (finished / "raw.safetensors").write_bytes(b"raw")
    (finished / "metrics.jsonl").write_text("{}")
    folder = staged(finished, tmp_path)
    for file in folder.rglob("*"):
        content = file.read_bytes()
        for secret in (HOME.encode(), b"hf_verysecret", str(tmp_path).encode(), b"momentum"):
            assert secret not in content, (file.name, secret)
    names = {file.name for file in folder.iterdir()}
    assert not names & {"state", "raw.safetensors", "metrics.jsonl", "optimizer.safetensors"}
    new = load_checkpoint(folder / "model.safetensors")
    assert all(torch.equal(old.weights[name], new.weights[name]) for name in old.weights)
    (row,) = json.loads((folder / "results.json").read_text())["evaluations"][0]["rows"]
    published = (folder / "model.safetensors").read_bytes()
    assert row["pictures"]["checkpoint_sha256"] == hashlib.sha256(published).hexdigest()


def test_an_autoencoder_of_its_own_travels_along(hub, tmp_path):  # noqa: F811
    torch.save(published_snapshot(autoencoder=tiny_autoencoder()), tmp_path / "alphaflow-B-2.pt")
    convert(tmp_path / "alphaflow-B-2.pt", tmp_path / "b2.safetensors", Options())
    assert run(["push", str(tmp_path / "b2.safetensors"), "me/b2"]) == 0
    assert {"autoencoder/config.json", "autoencoder/diffusion_pytorch_model.safetensors"} <= set(hub.files("me/b2"))
    local = alphaflow_cli.load(tmp_path / "b2.safetensors").sample(seeds=[0, 1], classes=3)
    remote = alphaflow_cli.load("me/b2").sample(seeds=[0, 1], classes=3)
    assert torch.equal(local, remote)
    card = hub.files("me/b2")["README.md"].decode()
    assert "Converted from `alphaflow-B-2.pt`" in card
    assert "b2 (the file's name)" in card
