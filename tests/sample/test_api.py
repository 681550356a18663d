"""The Python API: a model says what it is, and what it draws shows itself, in every form that people want."""

import inspect
import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from places import ROOT
from small_models import pixel_checkpoint

import alphaflow_cli
from alphaflow_cli import AlphaflowError
from alphaflow_cli.model.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return pixel_checkpoint(tmp_path_factory.mktemp("model") / "m.safetensors")


@pytest.fixture(scope="module")
def model(path):
    return alphaflow_cli.load(path, device="cpu")


@pytest.fixture(scope="module")
def without_classes(path, tmp_path_factory):
    there = load_checkpoint(path)
    recipe = replace(
        there.recipe,
        data=replace(there.recipe.data, classes=0),
        guidance=replace(there.recipe.guidance, label_dropout=0.0),
    )
    weights = {name: value for name, value in there.weights.items() if not name.startswith("label")}
    plain = tmp_path_factory.mktemp("plain") / "m.safetensors"
    save_checkpoint(plain, replace(there, recipe=recipe, weights=weights, origin={**there.origin, "class_names": []}))
    return alphaflow_cli.load(plain, device="cpu")


def test_pictures_come_as_pil_numpy_and_torch_and_are_the_same(model):
    pictures = model.sample(3)
    assert (pictures.array.shape, pictures.array.dtype) == ((3, 8, 8, 3), np.uint8)
    assert (pictures.tensor.shape, pictures.tensor.dtype) == ((3, 3, 8, 8), torch.uint8)
    assert np.array_equal(np.stack([np.asarray(image) for image in pictures.images]), pictures.array)
    assert np.array_equal(pictures.tensor.permute(0, 2, 3, 1).numpy(), pictures.array)
    assert len(pictures) == 3
    assert pictures[1].tobytes() == list(pictures)[1].tobytes()


def test_a_number_of_pictures_means_the_first_seeds(model):
    assert model.sample(3).seeds == [0, 1, 2]
    assert len(model.sample()) == 16
    few = model.sample(seeds=np.array([2]), classes=model.sample(3).labels[2])
    assert torch.equal(few.tensor[0], model.sample(3).tensor[2])


def test_seeds_may_come_in_any_kind_of_list(model):
    wanted = model.sample(seeds=[0, 2**64 - 1])
    for seeds in ((0, 2**64 - 1), (seed for seed in (0, 2**64 - 1)), np.array([0, 2**64 - 1], np.uint64)):
        assert torch.equal(model.sample(seeds=seeds).tensor, wanted.tensor)
    assert model.sample(seeds=torch.arange(2)).seeds == [0, 1]


def test_classes_go_by_name_and_by_number(model):
    by_name = model.sample(3, classes=["class 4", "class 7"])
    assert by_name.names == ["class 4", "class 7", "class 4"]
    assert torch.equal(by_name.tensor, model.sample(3, classes=[4, 7]).tensor)
    assert model.sample(2, classes="class 4").labels == [4, 4]


def test_a_model_without_classes_draws_and_says_so(without_classes):
    assert without_classes.classes == []
    assert without_classes.sample(2).names == ["", ""]
    assert "no classes" in repr(without_classes)
    with pytest.raises(AlphaflowError, match="this model has no classes"):
        without_classes.sample(2, classes=0)


def test_a_notebook_shows_an_even_grid(model):
    image = Image.open(io.BytesIO(model.sample(16)._repr_png_()))
    assert image.format == "PNG"
    assert image.width == 8 * 66 + 2


def test_a_grid_is_saved_in_the_form_of_its_suffix(model, tmp_path):
    pictures = model.sample(2)
    for name, form in (("g.png", "PNG"), ("g.jpg", "JPEG"), ("g.webp", "WEBP")):
        assert Image.open(io.BytesIO(pictures.save(tmp_path / name).read_bytes())).format == form
    with pytest.raises(AlphaflowError, match=r"g\.gif: a grid is a picture\. Give it a name that ends in \.png"):
        pictures.save(tmp_path / "g.gif")


def test_a_folder_gets_one_file_per_picture(model, tmp_path):
    pictures = model.sample(seeds=[3, 5], classes=[1])
    names = sorted(file.name for file in pictures.save(tmp_path / "folder").iterdir())
    assert names == ["seed-000003-class-1.png", "seed-000005-class-1.png"]
    assert np.array_equal(
        np.asarray(Image.open(io.BytesIO((tmp_path / "folder" / names[0]).read_bytes()))), pictures.array[0]
    )


def test_a_model_says_what_it_is(model):
    shown = repr(model)
    for words in (
        "golden",
        "2 blocks × 32, patch 2",
        "parameters",
        "8 × 8 px",
        "10 classes (class 0, class 1, class 2, …)",
    ):
        assert words in shown
    assert "trained without guidance, can be guided; ema weights of step 7; on cpu" in shown
    assert repr(model.sample(2, classes=3)) == "<2 pictures of 8 × 8 px: class 3>"
    assert repr(model.sample(1, classes=3)) == "<1 picture of 8 × 8 px: class 3>"


def test_progress_is_shown_on_request_only(model, capsys):
    model.sample(2)
    assert capsys.readouterr().err == ""
    model.sample(2, progress=True)
    assert "sampling 2/2 img" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"count": [1, 2]}, r"a number of pictures; seeds are a list: sample\(seeds=\[3, 7\]\)"),
        ({"seeds": 3}, "seeds are a list"),
        ({"count": 2, "seeds": [1]}, "not both"),
        ({"count": 0}, "at least one picture is needed"),
        ({"seeds": [3, 1.5]}, "seed 1.5: a seed is a whole number from 0 to 2\\^64 − 1"),
        ({"seeds": [-1]}, "seed -1: a seed is a whole number"),
        ({"seeds": [2**64]}, "seed 18446744073709551616: a seed is a whole number"),
        ({"seeds": "12"}, "seeds are a list"),
        ({"guidance": float("nan")}, "sample: guidance nan: it is a number"),
        ({"guidance": "2"}, "sample: guidance 2: it is a number"),
        ({"guidance_channels": 1.5}, "sample: guidance_channels 1.5: it is a whole number"),
        ({"interval": 3}, "sample: interval 3: it is two times"),
        ({"interval": (0.4,)}, r"sample: interval \(0.4,\): it is two times"),
        ({"times": "1,0.5,0"}, "sample: times '1,0.5,0': they are a list of numbers from 1 to 0"),
        ({"times": [1, "half", 0]}, "they are a list of numbers"),
        ({"times": 1}, "sample: times 1: they are a list"),
        ({"nfe": [1, 2]}, "nfe and batch are whole numbers; call it once for each nfe"),
        ({"batch": 2.5}, "nfe and batch are whole numbers"),
        ({"classes": []}, "classes is empty"),
        ({"classes": "cat"}, "classes cat: not a class of this model: 0 to 9, class 0"),
    ],
)
def test_a_wrong_call_is_answered_in_one_line(model, wrong, message):
    with pytest.raises(AlphaflowError, match=message):
        model.sample(**wrong)


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "device 'gpu': there are cpu, cuda and mps"), ("meta", "there are cpu"), ("cuda", "torch sees no NVIDIA")],
)
def test_a_device_that_is_not_here_is_refused(path, device, message):
    with pytest.raises(AlphaflowError, match=message):
        alphaflow_cli.load(path, device=device)


def test_every_public_part_says_in_words_what_it_does():
    assert set(dir(alphaflow_cli)) == set(alphaflow_cli.__all__)
    for thing in (alphaflow_cli.Model, alphaflow_cli.Pictures):
        parts = [part for name, part in vars(thing).items() if not name.startswith("_") and hasattr(part, "__doc__")]
        assert all(inspect.getdoc(part) for part in parts), thing
    arguments = set(inspect.signature(alphaflow_cli.Model.sample).parameters) - {"self", "count"}
    assert all(name in alphaflow_cli.Model.sample.__doc__ for name in arguments)


def test_types_are_there_for_others():
    assert (ROOT / "alphaflow_cli" / "py.typed").is_file()


def test_loading_and_sampling_import_nothing_that_they_do_not_use(path):
    script = (
        "import sys, alphaflow_cli\n"
        f"alphaflow_cli.load({str(path)!r}, device='cpu').sample(2)\n"
        "slow = {'accelerate', 'timm', 'torchvision', 'torch_fidelity', 'diffusers', 'matplotlib', 'sympy'}\n"
        "slow |= {'torch._dynamo', 'torch._inductor', 'torch.distributed.tensor', 'huggingface_hub'}\n"
        "sys.exit(', '.join(sorted(slow & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# The doors to training and evaluation.


def test_train_evaluate_and_load_recipe_are_doors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sets = ["train.steps=2", "train.batch=4", "model.dim=16", "alpha.unfinished=true", "data.source=shapes:40"]
    assert alphaflow_cli.load_recipe("quickstart", sets).train.steps == 2
    model = alphaflow_cli.train("quickstart", sets=sets, out="run", device="cpu")
    assert model.origin["step"] == 2
    monkeypatch.setenv("HOME", str(tmp_path))
    again = alphaflow_cli.train("quickstart", sets=sets, out="~/run", device="cpu")  # finished: nothing is trained
    assert torch.equal(model.sample(2).tensor, again.sample(2).tensor)
    (row,) = alphaflow_cli.evaluate("run", images=100, nfe=[2], reference="shapes:100", device="cpu", out="~/scores")
    assert any((tmp_path / "scores").iterdir())
    assert not Path("~").exists()
    assert row.name == "FD-tiny-100"
    assert row.value > 0
    assert "100 pictures: run, 2 NFE" in row.protocol()


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: alphaflow_cli.evaluate("x.safetensors", metrics=["fdi"]), "evaluate: metrics 'fdi': there are fid, "),
        (lambda: alphaflow_cli.evaluate("shapes:100", nfe=[1]), "shapes:100 is a source of pictures"),
        (lambda: alphaflow_cli.evaluate("shapes:100", metrics="fid"), r'lists: metrics=\["fid"\], nfe=\[1, 2\]'),
        (lambda: alphaflow_cli.evaluate("x.safetensors", nfe=1), r'lists: metrics=\["fid"\], nfe=\[1, 2\]'),
        (lambda: alphaflow_cli.evaluate("x.safetensors", images=0), "images and batch are numbers from 1"),
        (lambda: alphaflow_cli.evaluate("x.safetensors", batch=0), "images and batch are numbers from 1"),
        (lambda: alphaflow_cli.evaluate("x.safetensors", images="100"), "images and batch are numbers from 1"),
        (lambda: alphaflow_cli.evaluate("x.safetensors", nfe=["1"]), "metrics and nfe are lists"),
        (lambda: alphaflow_cli.evaluate("x.safetensors", draw="balance"), "'balance': there are random, balanced"),
        (lambda: alphaflow_cli.evaluate("x.safetensors", guidance="2"), "evaluate: guidance '2': it is a number"),
        (lambda: alphaflow_cli.train("quickstart", sets="train.steps=2"), r'a list: sets=\["train.steps=2000"\]'),
        (lambda: alphaflow_cli.train("quickstart", sets={"train.steps": 2}), "sets is a list"),
        (lambda: alphaflow_cli.load_recipe("quickstart", "train.steps=2"), r'a list: sets=\["train.steps=2000"\]'),
        (lambda: alphaflow_cli.load_recipe("quickstart", {"train.steps": 2}), "sets is a list"),
        (lambda: alphaflow_cli.load_recipe(Path("own.yaml")), "own.yaml: no such file"),
        (lambda: alphaflow_cli.train("quickstart", micro_batch=0, data="nowhere"), "micro_batch is a number from 1"),
        (lambda: alphaflow_cli.train("quickstart", micro_batch="auto"), "micro_batch is a number from 1; without it"),
        (lambda: alphaflow_cli.train("quikstart"), "quickstart"),
        (lambda: alphaflow_cli.train("quickstart", data="nowhere"), "nowhere: no latent store here"),
    ],
)
def test_a_wrong_value_at_a_door_is_one_line(call, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AlphaflowError, match=line):
        call()


def test_the_rooms_behind_the_doors_are_still_modules():
    import alphaflow_cli.train.store as store

    assert inspect.ismodule(alphaflow_cli.train)
    assert alphaflow_cli.train.store is store
    assert callable(alphaflow_cli.evaluate)
