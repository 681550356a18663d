"""`recipe new`: a recipe that fits a store, loads as it stands, trains, samples and is measured."""

import io
import json
import shlex
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from latent_stores import PIXELS, random_moments, write_store
from PIL import Image
from tiny_autoencoders import tiny_kl

from alphaflow_cli.cli import run as cli
from alphaflow_cli.data.manifest import read_manifest
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe import load_recipe, recipe_from_text, shipped
from alphaflow_cli.recipe.plan import warnings_of
from alphaflow_cli.train.estimate import PhaseTime
from alphaflow_cli.train.propose import RecipeRequest, of_count, of_steps, propose_recipe, rounded, written_for
from alphaflow_cli.train.store import disagreements

SMALL = "--set model.dim=16 --set model.depth=1 --set model.heads=2 --set train.steps=50 --set train.batch=16"


def pixels(path, count, side, classes):
    rows = np.random.default_rng(0).integers(0, 256, (count, 3, side, side), np.uint8)
    labels = np.arange(count) % classes
    return write_store(path, {"pixels": rows}, labels, kind="pixels", classes=classes, shard_size=500, record=PIXELS)


def latents(path, count, classes, side=4):
    labels = np.arange(count) % classes
    return write_store(path, {"moments": random_moments(count, side=side)}, labels, classes=classes, shard_size=500)


def prepared(place, options):
    assert cli(shlex.split(f"prep-latents {options} --out {place}/mine")) == 0
    return place / "mine"


def encoded(place):
    """Latents of 256 px, by a small random autoencoder, as the command makes them."""
    tiny_kl(place / "tiny-kl")
    return prepared(place, f"glyphs:24 --size 256 --autoencoder {place}/tiny-kl")


def one_class(place):
    """Latents of one class, by another small random autoencoder."""
    tiny_kl(place / "tiny-kl")
    with zipfile.ZipFile(place / "photos.zip", "w") as archive:
        for i in range(24):
            archive.writestr(f"{i}.png", png(np.full((64, 64, 3), 9 * i, np.uint8)))
    return prepared(place, f"{place}/photos.zip --size 64 --autoencoder {place}/tiny-kl")


def many_classes(place):
    store = pixels(place / "mine", 2000, 16, 1000)
    (store / "classes.json").write_text(json.dumps({f"class {i}": i for i in range(1000)}))
    return store


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


STORES = {
    "16 px": lambda place: prepared(place, "glyphs:120 --size 16"),
    "32 px": lambda place: prepared(place, "glyphs:120"),
    "64 px": lambda place: prepared(place, "shapes:120 --size 64"),
    "latents of 256 px": encoded,
    "one class": one_class,
    "1,000 classes": lambda place: many_classes(place),
}
QUICK = {
    "pixels": lambda place: pixels(place / "mine", 40, 16, 4),
    "latents of one class": lambda place: latents(place / "mine", 40, 1),
    "latents of 1,000 classes": lambda place: latents(place / "mine", 2000, 1000),
}


def proposal(store, **options):
    return propose_recipe(RecipeRequest(store, Path("mine.yaml"), **options))


@pytest.mark.parametrize("name", sorted(shipped()))
def test_the_recipes_own_number_of_pictures_gives_its_own_numbers_back(name):
    like = load_recipe(name)
    steps, batch, _ = of_count(written_for(like), like)
    assert steps == like.train.steps
    assert {key: value for key, (value, _) in batch.items()} == {"train.batch": like.train.batch} | (
        {"eval.images": written_for(like)} if written_for(like) < like.eval.images else {}
    )
    assert {key for key in of_steps(steps, "", like) if not key.startswith("alpha.")} == {"train.steps"}


@pytest.mark.parametrize("name", sorted(shipped()))
@pytest.mark.parametrize("steps", [10, 999, 20_000])
def test_whatever_the_length_nothing_in_the_recipe_is_in_vain(name, steps, tmp_path):
    like = load_recipe(name)
    sets = [f"{key}={json.dumps(value)}" for key, (value, _) in of_steps(steps, "", like).items()]
    text = Path(shipped()[name]).read_text()
    vain = [w for w in warnings_of(recipe_from_text(text, name, sets)) if "warm-up" in w or "average" in w]
    assert vain == []


def test_fewer_pictures_train_for_fewer_steps_and_more_epochs():
    like = load_recipe("b2-cfg")
    epochs = [of_count(count, like)[0] * 256 / count for count in (10_000, 100_000, 1_000_000)]
    assert epochs == sorted(epochs, reverse=True)
    assert [of_count(count, like)[0] for count in (10_000, 50_000)] == [31_500, 105_000]


@pytest.mark.parametrize(("count", "wanted"), [(20, "less than one batch"), (42, "1 batch"), (64, "2 batches")])
def test_the_remark_on_the_batch_counts_in_english(count, wanted):
    assert of_count(count, load_recipe("quickstart"))[1]["train.batch"] == (
        32,
        f"an epoch of {count} pictures has {wanted}",
    )


def test_a_recipe_of_ones_own_was_written_for_the_pictures_of_its_own_store(tmp_path, monkeypatch):
    """It was taken for one of 50,000 pictures, so that a second preparation of a set trained for a few steps only."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "again"):
        pixels(tmp_path / name, 400, 8, 2)
    small = shlex.split(SMALL.replace("train.steps=50", "train.steps=4000"))
    assert cli(["recipe", "new", "mine", *small]) == 0
    first = load_recipe("mine.yaml")
    assert cli(["recipe", "new", "again", "--like", "mine.yaml"]) == 0
    again = load_recipe("again.yaml")
    assert (again.train.steps, again.train.batch) == (first.train.steps, first.train.batch)
    assert written_for(load_recipe("b2")) == 1_281_167, "whatever lies at the place that a shipped recipe names"


@pytest.mark.parametrize("name", QUICK)
def test_any_recipe_fits_any_store(name, tmp_path):
    store = QUICK[name](tmp_path)
    for like in ("", *sorted(shipped())):
        given = proposal(store, like=like)
        assert given.recipe == recipe_from_text(given.text, "mine.yaml", name="mine")
        assert disagreements(read_manifest(store).plan, given.recipe) == []
        assert given.recipe.data.store == str(store)
        assert max(map(len, given.text.splitlines())) <= 120 + len(str(store))
        assert f"made to fit {store}" in given.text


def test_one_class_trains_without_labels_and_without_guidance(tmp_path):
    recipe = proposal(latents(tmp_path / "mine", 40, 1), like="b2-cfg").recipe
    assert recipe.data.classes == 0
    assert (recipe.guidance.omega, recipe.guidance.kappa, recipe.guidance.label_dropout) == (1, 0, 0)


def test_few_latents_are_normalised_per_channel_and_many_per_position(tmp_path):
    few, many = latents(tmp_path / "few", 64, 4), latents(tmp_path / "many", 2048, 4)
    assert proposal(few, like="b2").recipe.data.normalise == "channel"
    assert proposal(many, like="b2").recipe.data.normalise == "position"
    assert "per position wants 2,048 pictures, here are 64" in proposal(few, like="b2").text


def test_a_gpu_too_small_for_the_rows_computes_blocks_twice_and_one_too_small_for_the_weights_is_refused(tmp_path):
    store = latents(tmp_path / "mine", 40, 1, side=32)
    assert proposal(store, like="xl2-cfg", memory=80e9).recipe.train.gradient_checkpointing is False
    assert proposal(store, like="xl2-cfg", memory=17e9).recipe.train.gradient_checkpointing is True
    with pytest.raises(AlphaflowError, match=r"take 14\.9 GB, and the GPU has 12 GB\. Begin with a smaller network"):
        proposal(store, like="xl2-cfg", memory=12e9)


@pytest.mark.parametrize(("count", "expected"), [(99, True), (100, False)])
def test_pictures_too_few_for_a_score_are_remarked(count, expected, tmp_path):
    """The header names an evaluation, which was then refused."""
    notes = proposal(pixels(tmp_path / "mine", count, 16, 2), like="quickstart").notes
    assert ("alphaflow eval needs 100 real pictures, and the store has 99" in notes) is expected


def test_a_large_network_without_a_gpu_is_remarked(tmp_path):
    store = latents(tmp_path / "mine", 40, 1)
    for options, expected in (({}, True), ({"has_gpu": True}, False), ({"memory": 24e9}, False)):
        assert any("without a GPU" in note for note in proposal(store, like="b2", **options).notes) is expected


def test_absolute_steps_of_a_schedule_become_shares(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("alpha: {kind: linear, start: 1000, end: 3000}\ntrain: {steps: 4000, batch: 16}\nname: other\n")
    recipe = proposal(latents(tmp_path / "mine", 40, 1), like=str(own)).recipe
    assert (recipe.alpha.start, recipe.alpha.end, recipe.name) == ("25%", "75%", "mine")


def test_a_value_of_set_holds_and_has_no_reason_of_ours(tmp_path):
    given = proposal(latents(tmp_path / "mine", 40, 1), like="b2", sets=("train.steps=123", "optim.warmup_steps=1"))
    assert given.recipe.train.steps == 123
    assert "steps: 123  # --set" in given.text


def test_steps_keep_three_digits():
    assert [rounded(value) for value in (0.5, 9, 850.0000001, 1234, 105_341.7)] == [0, 9, 850, 1230, 105_000]


def test_hours_on_a_gpu_elsewhere_are_those_of_an_h100(tmp_path):
    store = latents(tmp_path / "mine", 40, 1)
    one, two = (proposal(store, like="b2", memory=24e9, hours=hours) for hours in (8, 16))
    assert two.recipe.train.steps == pytest.approx(2 * one.recipe.train.steps, rel=0.01)
    assert "on one H100, by arithmetic" in one.text
    assert any("H100" in note for note in one.notes)
    with pytest.raises(AlphaflowError, match="nothing is known of the speed of fp32 on a GPU that is not here"):
        proposal(store, like="soflow-b2", memory=24e9, hours=8)


def test_hours_are_those_of_as_many_processes_as_the_run_would_start(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    timed = []

    def measure(recipe, options, processes):
        timed.append(processes)
        return [PhaseTime("flow", recipe.train.steps, 1e-3, 0)], False

    monkeypatch.setattr("alphaflow_cli.train.hours.measure_phases_of", measure)
    store = pixels(tmp_path / "pixels", 300, 16, 4)
    assert "4 processes" in proposal(store, like="quickstart", hours=0.02).text
    assert timed == [4]


@pytest.mark.slow
def test_hours_and_the_estimate_of_the_recipe_agree(tmp_path, capsys, monkeypatch):
    """Within 30%, the median of three pairs, by the processor's clock: other programs take the cores now and then."""
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    store, ratios = pixels(tmp_path / "pixels", 300, 16, 4), []
    for turn in range(3):
        path = tmp_path / f"{turn}.yaml"
        assert cli(["recipe", "new", str(store), "-o", str(path), "--like", "quickstart", "--hours", "0.02"]) == 0
        capsys.readouterr()
        assert cli(["train", str(path), "--estimate", "--json"]) == 0
        phases = json.loads(capsys.readouterr().out)["estimate"]
        ratios.append(sum(phase["steps"] * phase["seconds_per_step"] for phase in phases) / 72)
    assert 0.7 < sorted(ratios)[1] < 1.3, ratios


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "one class" else pytest.mark.slow) for n in STORES])
def test_the_recipe_of_a_store_trains_samples_and_is_measured(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    STORES[name](tmp_path)
    for line in (
        "recipe new mine",
        "recipe check mine.yaml",
        f"train mine.yaml {SMALL} --set train.sample_every=0",
        "sample runs/mine --seeds 0-3 --grid grid.png",
        "eval runs/mine --reference glyphs:100 --metrics fd-tiny --images 100 --nfe 1",
    ):
        assert cli(shlex.split(line)) == 0, capfd.readouterr().err
    assert (tmp_path / "grid.png").is_file()
    assert json.loads((tmp_path / "runs/mine/results.json").read_text())


FAULTS = {
    "recipe new photos": "photos: no latent store here (no manifest.json). Make one first: alphaflow prep-latents",
    "recipe new mine -o mine.json": "'mine.json' must end in .yaml",
    "recipe new mine --gpu many": "'many' is no memory of a GPU, such as 24GB",
    "recipe new mine --gpu 0": "'0' is no memory of a GPU",
    "recipe new mine --hours 0": "'0' is not a number that is more than 0",
    "recipe new mine --hours nan": "is not a number that is more than 0",
    "recipe new mine --like b3": "'b3' is neither a file nor a shipped recipe. Did you mean 'b4'?",
    "recipe new mine --set train.stpes=3": "unknown key 'train.stpes'. Did you mean 'steps'?",
    "recipe new mine -o there.yaml": "there.yaml: exists already, and is not overwritten",
    "recipe new begun": "begun: unfinished. First run the command that began it again",
}


@pytest.mark.parametrize("line", FAULTS)
def test_what_cannot_be_is_one_line(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pixels(tmp_path / "mine", 20, 8, 2)
    (tmp_path / "photos").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "plan.json").write_text("{}")
    (tmp_path / "there.yaml").write_text("")
    assert cli(shlex.split(line)) in (1, 2)
    error = capsys.readouterr().err
    assert FAULTS[line] in error
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "mine", "photos", "there.yaml"]


@pytest.mark.parametrize("name", ["my latents: #1", "-dash", 'it\'s "x"', "ümläut"])
def test_a_store_of_any_name_makes_a_file_that_loads(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pixels(tmp_path / name, 20, 8, 2)
    assert cli(["recipe", "new", f"./{name}"]) == 0
    assert load_recipe(f"./{name}.yaml").data.store == str(Path(name))
    assert cli(["train", f"./{name}.yaml", "--dry-run"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", ["two\nlines", "a\x1b[31m"])
def test_a_name_that_no_recipe_can_hold_is_one_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pixels(tmp_path / name, 20, 8, 2)
    assert cli(["recipe", "new", f"./{name}", "-o", "mine.yaml"]) == 1
    assert "data.store wants text" in capsys.readouterr().err
    assert not Path("mine.yaml").exists()
