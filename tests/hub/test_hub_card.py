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
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import save_file
from small_models import pixel_checkpoint
from snapshots import published_snapshot, tiny_autoencoder

import alphaflow_cli
from alphaflow_cli.cli import run
from alphaflow_cli.convert import ConvertOptions, convert
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.hub.card import CardFacts, model_card, scrub
from alphaflow_cli.hub.stage import open_publication, stage
from alphaflow_cli.model.checkpoint import load_checkpoint, save_checkpoint
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
    opened = open_publication(source, with_results=True)
    stage(opened, tmp_path / "hub", **({"repo": "me/tiny", "licence": "unknown"} | options))
    return tmp_path / "hub"


def test_the_metadata_is_what_the_hub_reads(finished, tmp_path):
    card = ModelCard.load(staged(finished, tmp_path, licence="apache-2.0") / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "alphaflow"
    (score,) = card.data.eval_results
    assert (score.metric_type, score.metric_name, score.metric_value) == ("fd-tiny", "FD-tiny-2k", 3.14159)
    said = score.metric_args["protocol"]
    assert all(
        word in said for word in ("tiny abababab", "reference glyphs (", "cdcdcdcd)", "2,000 pictures", "balanced")
    )


def test_the_card_tells_the_weights_the_recipe_and_the_scores(finished, tmp_path):
    text = (staged(finished, tmp_path) / "README.md").read_text()
    parameters = sum(value.numel() for value in load_checkpoint(finished / "model.safetensors").weights.values())
    assert f"{parameters:,} parameters" in text
    assert "the exponential average at step 100" in text
    assert "| FD-tiny-2k | 3.14 |" in text
    assert "alpha goes from 1 to 0 (sigmoid" in text
    recipe = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1]
    assert yaml.safe_load(recipe)["model"]["dim"] == 32
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert width(tmp_path / "hub" / picture) > 100


def test_the_card_bears_the_runs_name_and_says_by_which_recipe(finished, tmp_path, capsys):
    mine = finished.rename(tmp_path / "mine")
    assert run(["push", str(mine), "--dry-run", "--out", str(tmp_path / "hub")]) == 0
    assert "nothing was sent" in capsys.readouterr().err
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.text.strip().startswith("# mine\n")
    assert card.data.model_name == "mine"
    assert "Recipe `tiny`: 100 steps of 8 pictures; 800 pictures seen." in card.text
    assert "alphaflow sample user/mine " in card.text


def test_a_dry_run_ends_with_the_command_that_sends_the_same(finished, tmp_path, capsys):
    line = ["push", str(finished), "me/run", "--private", "--license", "mit", "--dry-run"]
    assert run([*line, "--out", str(tmp_path / "hub")]) == 0
    whole = f"to send it: alphaflow push {finished} me/run --private --license mit\n"
    assert whole in capsys.readouterr().err


@pytest.mark.parametrize(("step", "known"), [(40, True), (100, False)])
def test_the_card_of_an_unfinished_run_says_so(step, known, tmp_path):
    text = (staged(write_checkpoint(tmp_path / "m.safetensors", step=step), tmp_path) / "README.md").read_text()
    assert ("**The training is not finished: these are the weights of step 40 of 100.**" in text) == known
    assert ("100 steps of 8 pictures, of which this is step 40 of 100" in text) == known


@pytest.mark.parametrize("classes", [0, 1, 3])
def test_the_card_says_no_word_of_what_the_model_has_not(classes, tmp_path):
    model = write_checkpoint(tmp_path / "m.safetensors", sets=[f"data.classes={classes}"], class_names=["cat"])
    card = ModelCard.load(staged(model, tmp_path) / "README.md")
    assert "atents" not in card.text.partition("```yaml")[0] + card.text.partition("</details>")[2]
    assert "autoencoder" not in card.text.partition("</details>")[2]
    tasks = [tag for tag in card.data.tags if tag.endswith("conditional-image-generation")]
    assert tasks == ["class-conditional-image-generation" if classes > 1 else "unconditional-image-generation"]
    assert card.data.pipeline_tag == (None if classes > 1 else tasks[0])
    assert ("classes=[" in card.text) == (classes > 1)
    assert ("All pictures are of one class: cat." in card.text) == (classes == 1)


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
    assert names["pictures"].array.shape == (8, 16, 16, 3)
    assert width("grid.png") > 100


@pytest.mark.parametrize("classes", [0, 1, 3, 30])
def test_the_card_names_as_many_classes_as_there_are_and_its_python_runs(classes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"kind {i}" for i in range(classes)]
    path = pixel_checkpoint(tmp_path / "m.safetensors", classes=classes)
    opened = load_checkpoint(path)
    origin = opened.origin | {"class_names": names}
    text = model_card(CardFacts(str(path), opened.recipe, origin, 1, None, "unknown"))
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], found := {})
    assert len(found["pictures"].images) == 8
    assert ("## Classes" in text) == (classes > 0)
    assert [name for name in names if name not in text] == []
    assert ("<summary>All 30 names" in text) == (classes == 30)
    assert "pip install alphaflow-cli" in text


def test_results_of_other_weights_are_refused(finished, tmp_path):
    write_results(finished / "results.json", "00" * 32)
    with pytest.raises(AlphaflowError, match="FD-tiny-2k was measured on other weights"):
        staged(finished, tmp_path)
    stage(open_publication(finished, with_results=False), tmp_path / "hub", repo="me/tiny", licence="unknown")
    assert not (tmp_path / "hub" / "results.json").exists()
    assert "Not measured yet" in (tmp_path / "hub" / "README.md").read_text()


def test_results_that_do_not_say_whose_they_are_are_refused(finished, tmp_path):
    results = results_of("")
    (finished / "results.json").write_text(json.dumps(results))
    with pytest.raises(AlphaflowError, match=r"was measured on other weights \(unknown\) than model.safetensors holds"):
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
    f"from {HOME}/My Secret Plans/a (copy)/set.zip on Monday": "from set.zip on Monday",
    "C:\\Users\\Jane Doe\\x y\\z.zip now": "z.zip now",
    f"from {HOME}/data see https://a.b/c/d": "from data see https://a.b/c/d",
    "../private/x/set": "set",
    "in ./a/b now": "in b now",
    "--data ~jane/x/y": "--data y",
    "projects/secret/runs/b2/model.safetensors": "model.safetensors",
    "user/repo/sub@abc": "user/repo/sub@abc",
    "https://jane:pw@host/a/b?token=x#y": "https://host/a/b",
    "see https://jane:p/w@host/a, or s3://KEY:SECRET@bucket/x": "see https://host/a, or s3://bucket/x",
    "https://ghp@host:80/a": "https://host:80/a",
    "https://host/a@v1": "https://host/a@v1",
    "hf://datasets/me/x@v1:train": "hf://datasets/me/x@v1:train",
    "logged in with hf_abcdefghijklmnopqrstuvwxyz": "logged in with hf_…",
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
    convert(tmp_path / "alphaflow-B-2.pt", tmp_path / "b2.safetensors", ConvertOptions())
    assert run(["push", str(tmp_path / "b2.safetensors"), "me/b2"]) == 0
    assert {"autoencoder/config.json", "autoencoder/diffusion_pytorch_model.safetensors"} <= set(hub.files("me/b2"))
    local = alphaflow_cli.load(tmp_path / "b2.safetensors").sample(seeds=[0, 1], classes=3)
    remote = alphaflow_cli.load("me/b2").sample(seeds=[0, 1], classes=3)
    assert torch.equal(local.tensor, remote.tensor)
    card = hub.files("me/b2")["README.md"].decode()
    assert "Converted from `alphaflow-B-2.pt`" in card
    assert "b2 (the file's name)" in card


SECRETS = [b"s3cret", b"jane", b"Secret Plans", b"hf_abcdefghij", b"X-Amz"]
PLACE = f"{HOME}/Secret Plans/latents"
SIGNED = "https://jane:s3cret@host/set?X-Amz-Signature=s3cret"


def rewritten(path, *, metadata, tensors=None):
    """The same file with other metadata or further tensors."""
    with safe_open(path, framework="pt") as file:
        held, old = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(held | (tensors or {}), path, metadata=old | metadata(old))
    write_results(path.parent / "results.json", hashlib.sha256(path.read_bytes()).hexdigest())


def test_no_secret_stands_in_any_published_byte(finished, tmp_path):
    path = finished / "model.safetensors"
    old = load_checkpoint(path)
    data = replace(old.recipe.data, store=SIGNED)
    recipe = replace(old.recipe, data=data, eval=replace(old.recipe.eval, reference=f"refs/../../jane/{SIGNED}"))
    origin = old.origin | {"init_from": "../jane/teacher", "note": [f"from {PLACE} and {SIGNED}", {PLACE: SIGNED}]}
    save_checkpoint(path, replace(old, recipe=recipe, origin=origin | {"versions": {"x": "hf_abcdefghijklmnopqrst"}}))
    results = results_of(hashlib.sha256(path.read_bytes()).hexdigest())
    (row,) = results["evaluations"][0]["rows"]
    row |= {"label": f"pictures of {PLACE}/a b.zip", "notes": [f"see {SIGNED}"], "settings": {PLACE: SIGNED}}
    row["reference"]["name"] = SIGNED
    (finished / "results.json").write_text(json.dumps(results))
    drawn = finished / "samples" / "step-00000100.png"
    drawn.parent.mkdir()
    notes = PngInfo()
    notes.add_text("Comment", PLACE)
    Image.new("RGB", (200, 200)).save(drawn, pnginfo=notes)
    for file in staged(finished, tmp_path).rglob("*"):
        for secret in SECRETS:
            assert secret not in file.read_bytes(), (file.name, secret)


@pytest.mark.parametrize(
    ("metadata", "tensors"),
    [
        (lambda old: {"note": PLACE}, None),
        (lambda old: {"recipe": old["recipe"] + f"# {PLACE}\n"}, None),
        (lambda old: {}, {"optimizer.jane": torch.zeros(3)}),
    ],
)
def test_only_what_is_read_of_the_weights_is_published(finished, tmp_path, metadata, tensors):
    rewritten(finished / "model.safetensors", metadata=metadata, tensors=tensors)
    published = (staged(finished, tmp_path) / "model.safetensors").read_bytes()
    assert b"jane" not in published
    row = json.loads((tmp_path / "hub" / "results.json").read_text())["evaluations"][0]["rows"][0]
    assert row["pictures"]["checkpoint_sha256"] == hashlib.sha256(published).hexdigest()


@pytest.mark.parametrize("name", ["samples/step-00000100.png", "results.json", "model.safetensors"])
def test_a_link_that_leads_out_of_the_run_is_not_published(finished, tmp_path, capsys, name):
    outside = tmp_path / "secret"
    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    place = finished / name
    place.parent.mkdir(exist_ok=True)
    (place if place.exists() else picture).rename(outside)
    place.symlink_to(outside)
    assert run(["push", str(finished), "--dry-run", "--out", str(tmp_path / "hub")]) == 1
    said = capsys.readouterr().err
    assert f"{place}: not a file of this run, but a link that leads out of it" in said
    assert not (tmp_path / "hub" / "samples.png").exists()


def test_a_file_that_only_calls_itself_a_picture_is_not_published(finished, tmp_path, capsys):
    (finished / "samples").mkdir()
    (finished / "samples" / "step-00000100.png").write_bytes(b"my private key")
    assert run(["push", str(finished), "--dry-run", "--out", str(tmp_path / "hub")]) == 1
    assert "not a PNG picture" in capsys.readouterr().err


# What others wrote cannot take the card over.

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "a | b\n# heading\n\n---\n",
    "x\n```\n<script>alert(1)</script>\n```",
    "\x1b[2J\u202e",
    "`code` **bold** ![x](https://example.com/spy)",
]


@pytest.mark.parametrize("words", HOSTILE)
def test_foreign_words_stay_words_in_the_card(finished, words):
    path = finished / "model.safetensors"
    old = load_checkpoint(path)
    recipe = replace(old.recipe, name=words, data=replace(old.recipe.data, source=words))
    plain = CardFacts("me/tiny", old.recipe, old.origin, 9, results_of("ab"), "unknown")
    converted = {"file": words, "from": words, "sha256": words, "filled": {words: words}}
    results = results_of("ab")
    (row,) = results["evaluations"][0]["rows"]
    row |= {"name": words, "label": words, "notes": [words], "settings": {words: words}}
    row["reference"] |= {"name": words, "sha256": words}
    row["space"] |= {"network": words, "weights_sha256": words}
    for origin in (old.origin | {"versions": {words: words}, "class_names": [words]}, {"converted": converted}):
        card = model_card(CardFacts("me/tiny", recipe, origin, 9, results, "unknown"))
        head, body = card.split("\n---\n", 1)
        assert ModelCard(card).data.to_dict()["model-index"]
        assert all(line.isprintable() for line in card.splitlines())
        outside = re.sub(r"(`{3,})yaml\n.*?\n\1\n|(`)[^`\n]*\2", "", body, flags=re.DOTALL)
        allowed = set(re.findall(r"<[^>]*>", model_card(plain).split("\n---\n", 1)[1]))
        assert set(re.findall(r"<[^>]*>", outside)) <= allowed
        assert not re.search(
            r"(?<!\\)\]\((?!https://arxiv.org|https://pypi.org|samples.png|alpha.png|recipe.yaml)", outside
        )
        heads = [line for line in outside.splitlines() if line.startswith("#")]
        assert [line for line in heads if line.startswith("# ")] == heads[:1]
        assert len(heads) == 7 + ("class_names" in origin)
        table = [line for line in outside.splitlines() if line.startswith("|")]
        assert len(table) == 3
        assert len(re.findall(r"(?<!\\)\|", table[2])) == 4
        assert head.count("\n---") == 0


@pytest.mark.parametrize("begun", ["runs/base", "teachers/base"])
def test_a_run_of_this_machine_that_it_began_with_is_no_model_of_the_hub(finished, tmp_path, monkeypatch, begun):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teachers" / "base").mkdir(parents=True)
    old = load_checkpoint(finished / "model.safetensors")
    save_checkpoint(tmp_path / "m.safetensors", replace(old, origin=old.origin | {"init_from": begun}))
    folder = staged(tmp_path / "m.safetensors", tmp_path)
    assert load_checkpoint(folder / "model.safetensors").origin["init_from"] == "base"
    assert "base_model" not in ModelCard.load(folder / "README.md").data.to_dict()


@pytest.mark.parametrize(
    ("begun", "base"),
    [("user/b2@v1", "user/b2"), ("hf://user/b2", "user/b2"), ("model.safetensors", None), (None, None)],
)
def test_the_metadata_name_the_papers_and_the_model_that_it_began_with(finished, begun, base):
    opened = load_checkpoint(finished / "model.safetensors")
    facts = CardFacts("me/tiny", opened.recipe, opened.origin | {"init_from": begun}, 1, None, "unknown")
    head = ModelCard(model_card(facts)).data.to_dict()
    assert head.get("base_model") == base
    assert {"arxiv:2510.20771", "arxiv:2505.13447"} <= set(head["tags"])
    assert "datasets" not in head
    data = replace(opened.recipe.data, source="hf://datasets/user/cats:train")
    head = ModelCard(model_card(replace(facts, recipe=replace(opened.recipe, data=data)))).data.to_dict()
    assert head["datasets"] == ["user/cats"]


def test_the_card_shows_onnx_always_and_diffusers_where_its_pipeline_is(finished, tmp_path, monkeypatch):
    plain = ModelCard.load(staged(finished, tmp_path) / "README.md")
    assert "alphaflow export me/tiny --to onnx -o model.onnx" in plain.text
    assert "DiffusionPipeline" not in plain.text
    folder = staged(finished, tmp_path, repo="me/tiny", diffusers=True)
    text = (folder / "README.md").read_text()
    assert "diffusers" in ModelCard(text).data.tags
    snippet = re.search(r"```py\n(.*?)```", text, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(snippet.replace("me/tiny", str(folder)), {})
    assert width("picture.png") == 16
