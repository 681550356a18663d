"""The two published crops: each stands in stores, models and references, and they are never mixed."""

import io
import shlex
import zipfile

import numpy as np
import pytest
from PIL import Image

from alphaflow_cli.cli import run as cli
from alphaflow_cli.data.manifest import read_manifest
from alphaflow_cli.evaluate.evaluate import find_reference
from alphaflow_cli.evaluate.pictures import WAYS, crop_of, open_pictures
from alphaflow_cli.evaluate.reference import Reference, check_crop
from alphaflow_cli.model.checkpoint import load_checkpoint
from alphaflow_cli.recipe import load_recipe

TINY = "--set model.dim=16 --set model.depth=1 --set model.heads=2 --set train.steps=2 --set train.batch=4"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """100 tall pictures, a store and a reference of each crop, and a run on ADM's."""
    folder, rng = tmp_path_factory.mktemp("crops"), np.random.default_rng(0)
    with zipfile.ZipFile(folder / "tall.zip", "w") as archive:
        for i in range(100):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (70, 40, 3), np.uint8)).save(file, "PNG")
            archive.writestr(f"{i % 2}/{i}.png", file.getvalue())
    source = folder / "tall.zip"
    for crop in ("square", "adm"):
        for line in (
            f"prep-latents {source} --size 16 --autoencoder none --crop {crop} --out {folder}/{crop}",
            f"reference {source} --size 16 --crop {crop} --metrics fd-tiny --work {folder}/work "
            f"-o {folder}/{crop}.safetensors",
        ):
            assert cli(shlex.split(line)) == 0
    for line in (
        f"recipe new {folder}/adm -o {folder}/mine.yaml",
        f"train {folder}/mine.yaml --out {folder}/run {TINY}",
    ):
        assert cli(shlex.split(line)) == 0
    return folder


def test_the_words_of_a_reference_name_its_crop():
    assert {crop: crop_of(f"{way} to 256 px") for crop, way in WAYS.items()} == {"square": "square", "adm": "adm"}
    assert crop_of("as they are") is crop_of("not stated") is None


def test_a_stores_crop_goes_into_its_recipe_and_its_models(place):
    assert read_manifest(place / "adm").plan.crop == "adm"
    assert load_recipe(str(place / "mine.yaml")).data.crop == "adm"
    assert load_checkpoint(place / "run" / "model.safetensors").origin["crop"] == "adm"


def evaluate(place, reference):
    line = f"eval {place}/run --reference {reference} --metrics fd-tiny --images 100 --nfe 1 --out {place}/evals"
    return cli(shlex.split(line))


def test_a_reference_of_the_other_crop_is_refused_with_the_command_that_makes_the_right_one(place, capsys):
    assert evaluate(place, place / "adm.safetensors") == 0
    assert evaluate(place, place / "square.safetensors") == 1
    error = capsys.readouterr().err
    assert "its pictures became square by --crop square, those that the model has learnt from by --crop adm" in error
    assert "alphaflow reference SOURCE --size 16 --crop adm -o FILE" in error


def test_a_reference_that_does_not_say_how_it_was_cropped_is_compared():
    check_crop(Reference({}, {"name": "of an unknown origin"}), "adm", (16, 16))


def test_pictures_are_cropped_as_the_models_were(place, capsys):
    assert evaluate(place, place / "tall.zip") == 0
    kept = list((place / "evals").glob("reference-*.safetensors"))
    assert len(kept) == 1
    prepared = open_pictures(str(place / "tall.zip"), size=16, limit=None, crop="adm").describe()["prepared"]
    assert find_reference(str(kept[0]), (16, 16), None).facts["prepared"] == prepared


@pytest.mark.parametrize("name", ["soflow-b2", "soflow-b4", "soflow-xl2"])
def test_recipes_published_with_adms_crop_say_so(name):
    assert load_recipe(name).data.crop == "adm"


def test_a_recipe_refuses_a_store_of_the_other_crop_and_a_shipped_one_says_that_it_yields(place, tmp_path, capsys):
    own = tmp_path / "own.yaml"
    own.write_text((place / "mine.yaml").read_text().replace(str(place / "adm"), str(place / "square")))
    assert cli(shlex.split(f"train {own} --out {tmp_path}/run {TINY}")) == 1
    error = capsys.readouterr().err
    assert "data.crop: square in the store, adm in the recipe" in error
    assert "alphaflow prep-latents SOURCE --crop adm --out DIR" in error
    assert cli(shlex.split(f"train soflow-b4 --data {place}/square --out {tmp_path}/other --dry-run")) == 0
    assert "data.crop: square" in capsys.readouterr().out
    assert cli(shlex.split(f"train b2 --data {place}/adm --out {tmp_path}/third --dry-run")) == 0
    assert "data.crop" not in capsys.readouterr().out
