"""What may be named as a checkpoint, where its autoencoder is found, and what the Python API refuses."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hub_fixtures import hub, write_checkpoint  # noqa: F401 (a fixture)
from latent_models import latent_models
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_autoencoders import tiny_kl

import alphaflow_cli
from alphaflow_cli import cli
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.hub.stage import open_publication, stage
from alphaflow_cli.model.build import build_network
from alphaflow_cli.model.checkpoint import OLDER, load_checkpoint, save_checkpoint
from alphaflow_cli.model.find import find_checkpoint, is_checkpoint
from alphaflow_cli.recipe import load_recipe
from alphaflow_cli.sample.generator import open_generator

ADDRESSES = ("me/tiny", "me/tiny@main", "me/tiny:model.safetensors", "me/tiny@main:model.safetensors")
LONG = ("hf://me/tiny", "hf://me/tiny@main", "hf://me/tiny@main/model.safetensors")


def test_every_form_of_an_address_is_a_checkpoint(hub, tmp_path):  # noqa: F811
    model = write_checkpoint(tmp_path / "m.safetensors")
    stage(open_publication(model, with_results=False), tmp_path / "hub", repo="me/tiny", licence="unknown")
    hub.add("me/tiny", {path.name: path.read_bytes() for path in (tmp_path / "hub").iterdir()})
    published = (tmp_path / "hub" / "model.safetensors").read_bytes()
    for address in (*ADDRESSES, *LONG):
        assert is_checkpoint(address), address
        assert find_checkpoint(address).read_bytes() == published, address


def test_pictures_on_the_hub_are_no_checkpoint():
    assert not is_checkpoint("hf://datasets/me/pictures")


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = write_checkpoint(tmp_path / "m.safetensors")
    assert find_checkpoint("~/m.safetensors") == model
    assert is_checkpoint("~/m.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Latent models whose store was made with a local autoencoder: they know its bare name."""
    return latent_models(tmp_path_factory.mktemp("latent"))


@pytest.fixture
def lonely(folder, tmp_path):
    """The same model somewhere else; its recipe says where the autoencoder is."""

    def make(said):
        checkpoint = load_checkpoint(folder / "fp32.safetensors")
        recipe = replace(checkpoint.recipe, data=replace(checkpoint.recipe.data, autoencoder=said))
        save_checkpoint(tmp_path / "lonely.safetensors", replace(checkpoint, recipe=recipe))
        return str(tmp_path / "lonely.safetensors")

    return make


def test_an_autoencoder_known_by_its_bare_name_is_found_by_the_recipe(folder, lonely):
    moved = alphaflow_cli.load(lonely(str(folder / "tiny-kl")), device="cpu")
    beside = alphaflow_cli.load(folder / "fp32.safetensors", device="cpu")
    assert torch.equal(moved.sample(3).tensor, beside.sample(3).tensor)


def test_the_recipes_autoencoder_must_be_the_one_that_made_the_latents(lonely, tmp_path):
    tiny_kl(tmp_path / "other")
    weights = load_file(tmp_path / "other" / "diffusion_pytorch_model.safetensors")
    save_file(
        {name: 2 * value for name, value in weights.items()}, tmp_path / "other" / "diffusion_pytorch_model.safetensors"
    )
    generator = open_generator(lonely(str(tmp_path / "other")), device=torch.device("cpu"))
    with pytest.raises(AlphaflowError, match="the latents were made"):
        _ = generator.autoencoder


def test_eval_decodes_with_the_autoencoder_that_it_is_given(folder, lonely, tmp_path, capsys):
    pictures = np.random.default_rng(0).integers(0, 255, (100, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=pictures)
    checkpoint = lonely("nobody/there")
    line = ["eval", checkpoint, "--metrics", "fd-tiny", "--nfe", "1", "--images", "100", "--json"]
    line += ["--reference", str(tmp_path / "real.npz"), "--out", str(tmp_path / "e")]
    assert cli.run([*line, "--autoencoder", str(folder / "tiny-kl")]) == 0
    assert json.loads(capsys.readouterr().out)
    shutil.rmtree(tmp_path / "e")
    assert cli.run(["eval", str(tmp_path / "real.npz"), "--autoencoder", "x"]) == 2
    assert "--autoencoder and --decoder are for checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"sampler": "foo"}, "sampler 'foo': there are auto, trajectory"),
        ({"batch": 0}, "batch 0: at least one picture"),
        ({"nfe": 2, "times": (1.0, 0.5, 0.0)}, "nfe or times, not both"),
        ({"classes": [10]}, "classes 10: not a class of this model: 0 to 9"),
    ],
)
def test_the_api_refuses_in_one_line(tmp_path, wrong, said):
    model = alphaflow_cli.load(write_checkpoint(tmp_path / "m.safetensors"), device="cpu")
    with pytest.raises(AlphaflowError, match=said):
        model.sample(1, **wrong)


def test_the_api_takes_one_class_as_a_number_of_numpy_too(tmp_path):
    model = alphaflow_cli.load(write_checkpoint(tmp_path / "m.safetensors"), device="cpu")
    assert torch.equal(model.sample(2, classes=np.int64(3)).tensor, model.sample(2, classes=[3, 3]).tensor)
    with pytest.raises(AlphaflowError, match="weights 'foo': there are ema and raw"):
        alphaflow_cli.load(tmp_path / "m.safetensors", weights="foo")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("alphaflow/3", r"made by a newer alphaflow \(format 3, this one reads up to 1\): update it"),
        ("alphaflow/0", "not an alphaflow checkpoint"),
        ("alphaflow/one", "not an alphaflow checkpoint"),
        ("pt", "not an alphaflow checkpoint"),
    ],
)
def test_a_checkpoint_of_another_format_is_refused(stated, message, tmp_path):
    path = with_metadata(write_checkpoint(tmp_path / "m.safetensors"), format=stated)
    with pytest.raises(AlphaflowError, match=message):
        load_checkpoint(path)


def test_a_checkpoint_of_another_form_is_sent_to_convert(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "SiT.pt")
    with pytest.raises(AlphaflowError, match=r"A checkpoint of another system: alphaflow convert"):
        load_checkpoint(tmp_path / "SiT.pt")


def test_what_a_strange_file_says_of_itself_is_one_bounded_line(tmp_path):
    path = tmp_path / "m.safetensors"
    header = json.dumps({"x": {"dtype": "a\nerror: b", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(AlphaflowError, match=r"unknown variant `a\\nerror: b`") as refused:
        load_checkpoint(path)
    assert "\n" not in str(refused.value)
    write_checkpoint(path)
    with pytest.raises(AlphaflowError, match="not an alphaflow checkpoint") as refused:
        load_checkpoint(with_metadata(path, format="alphaflow/1" + "é 0\n" * 2000))
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("std", lambda std: 0.0 * std, "not finite and positive"),
        ("std", lambda std: std * torch.inf, "not finite and positive"),
        ("mean", lambda mean: mean * torch.nan, "not finite and positive"),
        ("std", lambda std: std[:2], r"have the shapes \(3, 1, 1\) and \(2, 1, 1\)"),
        ("mean", lambda mean: mean.flatten(), r"have the shapes \(3,\) and \(3, 1, 1\)"),
    ],
)
def test_a_normalisation_that_cannot_be_is_refused(name, change, message, tmp_path):
    """Latents would all be one, or not finite, and so would the pictures."""
    path = write_checkpoint(tmp_path / "m.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file({**tensors, f"latents.{name}": change(tensors[f"latents.{name}"]).clone()}, path, metadata)
    with pytest.raises(AlphaflowError, match=message):
        load_checkpoint(path)


def test_a_checkpoint_of_a_newer_recipe_is_refused_as_newer(tmp_path):
    path = with_metadata(write_checkpoint(tmp_path / "m.safetensors"), recipe="format: 7\nmodel: {rotary: true}")
    with pytest.raises(AlphaflowError, match=r"\(its recipe\):1: made by a newer alphaflow \(format 7, .*update it"):
        load_checkpoint(path)


def test_an_older_checkpoint_is_read_through_its_migration(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "m.safetensors")
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    centre = tensors.pop("latents.mean")
    save_file({**tensors, "latents.centre": centre}, path, metadata)

    def centre_became_mean(contents):
        old, words = contents
        return {name.replace("centre", "mean"): tensor for name, tensor in old.items()}, words

    with pytest.raises(AlphaflowError, match=r"lacks 'latents.mean'"):
        load_checkpoint(path)
    monkeypatch.setitem(OLDER, 1, centre_became_mean)
    assert torch.equal(load_checkpoint(path).mean, centre)


def with_metadata(path, **changed):
    """The same file with other words in its header."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, path, {**metadata, **changed})
    return path


def test_the_shapes_of_a_network_are_known_without_its_weights_and_without_a_compiler():
    script = (
        "import sys; from dataclasses import replace; from alphaflow_cli.recipe import load_recipe\n"
        "from alphaflow_cli.model.build import build_network, network_shapes\n"
        "plain = load_recipe('quickstart'); noise = replace(plain, model=replace(plain.model, prediction='noise'))\n"
        "shapes, compiler = [network_shapes(plain), network_shapes(noise)], 'torch._dynamo' in sys.modules\n"
        "states = [build_network(recipe).state_dict() for recipe in (plain, noise)]\n"
        "real = [[(name, tuple(value.shape)) for name, value in state.items()] for state in states]\n"
        "sys.exit(compiler or [list(some.items()) for some in shapes] != real)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_building_a_network_leaves_all_global_randomness_as_it_was(monkeypatch):
    def seed_gpus(seed):
        raise AssertionError("a program that loads a model keeps the randomness of its own GPU")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", seed_gpus)
    before = torch.random.get_rng_state()
    build_network(load_recipe("quickstart"))
    assert torch.equal(torch.random.get_rng_state(), before)
