"""Models that take the guidance scale, and the interval, as inputs: asked once per step, by default as published."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import PIXELS, checkpoint_m

import alphaflow_cli
from alphaflow_cli.cli import run
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.hub.card import config_json
from alphaflow_cli.model.build import build_network
from alphaflow_cli.model.checkpoint import load_checkpoint, save_checkpoint
from alphaflow_cli.recipe import load_recipe
from alphaflow_cli.sample.generator import Generator
from alphaflow_cli.sample.walk import plan_walk

TOY = (
    "data.autoencoder=none", "data.image_size=16", "data.latent_size=16", "data.channels=3", "data.classes=10",
    "data.normalise=scale", "data.channel_mean=null", "data.channel_std=null", "model.dim=32", "model.depth=2",
    "model.heads=2", "model.patch=4", "model.velocity_head=1", "train.precision=fp64",
)  # fmt: skip
FIXED = ("guidance.interval=fixed", "model.inputs=[scale]", "sample.interval=null")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make(tmp_path_factory.mktemp("imf") / "model.safetensors")


def make(path, *sets):
    recipe = load_recipe("imf-b2", [*TOY, *sets])
    net, generator = build_network(recipe), torch.Generator().manual_seed(1)
    weights = {name: torch.randn(w.shape, generator=generator) * 0.2 for name, w in net.named_parameters()}
    save_checkpoint(path, replace(checkpoint_m(recipe, weights), origin={"step": 7, "autoencoder": PIXELS}))
    return path


def drawn(model, tmp_path, *options):
    """The latents of a command."""
    out = tmp_path / f"{len(list(tmp_path.iterdir()))}.npy"
    assert run(["sample", str(model), "--seeds", "0-3", "--latents", str(out), *options]) == 0
    return np.load(out)


def test_a_walk_is_told_what_the_recipe_publishes_unless_asked_otherwise(model):
    recipe = load_checkpoint(model).recipe
    for nfe in (1, 2, 4):
        walk = plan_walk(recipe, nfe=nfe)
        assert walk.guide == (8.0, 0.4, 0.65)
        assert (walk.nfe, walk.guidance) == (nfe, 1.0), "one evaluation per step"
    assert str(plan_walk(recipe, nfe=1)) == "trajectory on 1, 0, guidance 8 in [0.4, 0.65]"
    assert plan_walk(recipe, nfe=1, guidance=1.0).guide == (1.0, 0.4, 0.65)
    assert plan_walk(recipe, nfe=1, guidance=10.5, interval=(0.0, 1.0)).guide == (10.5, 0.0, 1.0)


def test_without_a_published_setting_a_model_is_not_guided(tmp_path):
    recipe = load_recipe("imf-b2", [*TOY, "sample.scale=null", "sample.interval=null"])
    assert plan_walk(recipe, nfe=1).guide == (1.0, 0.0, 1.0)


def test_the_pictures_are_the_networks_at_these_inputs_and_the_velocity_stack_is_not_run(model):
    checkpoint = load_checkpoint(model)
    generator = Generator(checkpoint, device=torch.device("cpu"))
    ran = []
    generator.net.velocity_blocks[0].register_forward_hook(lambda *each: ran.append(each))
    latents = generator.latents([5], [4], plan_walk(checkpoint.recipe, nfe=1, guidance=3.0, interval=(0.2, 0.9)))
    assert not ran
    noise = torch.randn((3, 16, 16), generator=torch.Generator().manual_seed(5)).double()[None]
    guide, one = torch.tensor([[3.0, 0.2, 0.9]], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    with torch.no_grad():
        net = generator.net.double()
        expected = noise - net(noise, one, 0 * one, torch.tensor([4]), guide=guide)
    torch.testing.assert_close(latents, expected, rtol=1e-12, atol=1e-12)


def test_the_command_line_fills_the_inputs_and_its_default_is_the_recipes(model, tmp_path):
    default = drawn(model, tmp_path)
    assert np.array_equal(default, drawn(model, tmp_path, "--guidance", "8", "--interval", "0.4,0.65"))
    stronger, whole = drawn(model, tmp_path, "--guidance", "2"), drawn(model, tmp_path, "--interval", "0,1")
    assert not np.array_equal(default, stronger)
    assert not np.array_equal(default, whole)
    out = ["sample", str(model), "--seeds", "0-1", "--out", str(tmp_path / "pictures")]
    assert run(out) == 0
    assert run(out) == 0
    assert run([*out, "--guidance", "2"]) == 1, "pictures of another scale are pictures of another request"


def test_a_measurement_says_the_scale_and_the_interval(model, tmp_path, capsys):
    line = ["eval", str(model), "--metrics", "fd-tiny", "--reference", "glyphs:100", "--images", "100", "--json"]
    assert run([*line, "--guidance", "2", "--interval", "0.2,0.8", "--out", str(tmp_path)]) == 0
    (each,) = json.loads(capsys.readouterr().out)["evaluations"][:1]
    pictures = each["rows"][0]["pictures"]
    assert (pictures["guidance_scale"], pictures["guidance_interval"]) == (2.0, [0.2, 0.8])
    assert pictures["nfe"] == 1
    assert "guidance 2 in [0.2, 0.8]" in each["rows"][0]["label"]


def test_python_users_choose_them_too(model):
    loaded = alphaflow_cli.load(model)
    assert "guidance 1 to 8 as an input" in repr(loaded)
    default, same = loaded.sample(2), loaded.sample(2, guidance=8.0, interval=(0.4, 0.65))
    assert torch.equal(default.tensor, same.tensor)
    assert not torch.equal(default.tensor, loaded.sample(2, guidance=2.0).tensor)
    with pytest.raises(AlphaflowError, match="a smaller one than 1 means nothing"):
        loaded.sample(2, guidance=0.5)
    with pytest.raises(AlphaflowError, match="it runs from LO to HI"):
        loaded.sample(2, interval=(0.7, 0.7))


def test_programs_read_that_no_guidance_is_built_in(model):
    config = json.loads(config_json(load_checkpoint(model).recipe, {}, 0))
    assert config["guidance"] == {"baked": None, "null_label": True}
    assert (config["sample"]["scale"], config["sample"]["interval"]) == (8.0, [0.4, 0.65])


@pytest.mark.parametrize(("options", "message"), [
    (("--guidance", "0.5"), "a smaller one than 1 means nothing to it"),
    (("--guidance", "-2"), "a smaller one than 1 means nothing to it"),
    (("--guidance-channels", "2"), "this model guides itself, on all channels"),
])  # fmt: skip
def test_what_the_inputs_cannot_be_is_refused(options, message, model, tmp_path, capsys):
    assert run(["sample", str(model), "--grid", str(tmp_path / "g.png"), *options]) == 1
    assert message in capsys.readouterr().err


def test_an_interval_is_refused_where_it_is_built_in_or_is_no_input(tmp_path, capsys):
    built_in = make(tmp_path / "built-in.safetensors", *FIXED, "guidance.t_max=0.8")
    assert run(["sample", str(built_in), "--interval", "0.4,0.6", "--grid", str(tmp_path / "g.png")]) == 1
    assert (
        "--interval 0.4,0.6: the interval of this model's guidance is built in (0 < t < 0.8)" in capsys.readouterr().err
    )
    assert str(plan_walk(load_checkpoint(built_in).recipe, nfe=1)) == "trajectory on 1, 0, guidance 8"
    with pytest.raises(AlphaflowError, match="does not take the interval of its guidance as an input"):
        plan_walk(load_recipe("b2-cfg"), nfe=1, interval=(0.4, 0.6))


@pytest.mark.parametrize(
    "text", ["0.4", "0.6,0.4", "0.4,0.4", "-0.1,0.5", "0.4,1.1", "a,b", "0.1,0.2,0.3", "nan,1", ","]
)
def test_an_interval_that_is_none_is_a_fault_of_the_command_line(text, model, capsys):
    assert run(["sample", str(model), "--interval", text]) == 2
    assert "an interval is two times, 0 ≤ LO < HI ≤ 1, such as 0.4,0.65" in capsys.readouterr().err
