"""Improved MeanFlow's checkpoints are ours under other names: the same function, sampled as published."""

import json

import pytest
import torch
from golden_data import FOLDER, arrays, assert_close, tensor
from imf_nets import AT_INFERENCE, SIZES, guide_of, recipe_of, to_imf

from alphaflow_cli.cli import run
from alphaflow_cli.convert import ConvertOptions, convert
from alphaflow_cli.convert.imf import imf_names
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.model.build import network_shapes
from alphaflow_cli.model.checkpoint import load_checkpoint
from alphaflow_cli.sample.generator import load_network
from alphaflow_cli.sample.walk import plan_walk

SIDE = ("data.latent_size=8", "data.image_size=64")  # of the golden network; released ones are for 32
SETS = (*SIDE, "sample.scale=7.5", "sample.interval=[0.4, 0.65]")
FILE = "imf_model_A_f64.npz"
MEAN, STD = (0.86488, -0.27787343, 0.21616915, 0.3738409), (4.85503674, 5.31922414, 3.93725398, 3.9870003)


def released(*, velocity=False):
    """The golden network as a released file has it: without the velocity's blocks, but with its last layer."""
    state = {name: torch.tensor(value) for name, value in arrays("imf_state_A.npz").items()}
    return {name: value for name, value in state.items() if velocity or not name.startswith("net.v_heads.")}


def of_fd_loss(table):
    renamed = {name.replace("._flax_linear.", ".linear.").replace("._flax_embedding.", ".embedding."): value
               for name, value in table.items()}  # fmt: skip
    return {name: value for name, value in renamed.items() if not name.startswith("net.v_")}


def converted(tmp_path, tree, sets=SETS, **options):
    source, out = tmp_path / "theirs.pth", tmp_path / "ours.safetensors"
    torch.save(tree, source)
    outcome = convert(source, out, ConvertOptions(sets=sets, **options))
    checkpoint = load_checkpoint(out)
    return outcome, checkpoint, load_network(checkpoint)


@torch.no_grad()
@pytest.mark.parametrize("form", ["released", "with the velocity's blocks", "fd-loss", "fd-loss, a bare table"])
def test_a_converted_imf_is_the_published_function(tmp_path, form):
    theirs = of_fd_loss(released())
    tree = {
        "released": released(),
        "with the velocity's blocks": released(velocity=True),
        "fd-loss": {"model": {name: value + 1 for name, value in theirs.items()}, "model_ema": theirs},
        "fd-loss, a bare table": theirs,
    }[form]
    outcome, checkpoint, net = converted(tmp_path, tree)
    z, h = tensor(FILE, "z"), tensor(FILE, "h")
    y, guide = torch.tensor(arrays(FILE)["y"]), guide_of(FILE)
    u = net.double()(z, h, torch.zeros_like(h), y, guide=guide)
    assert_close(u, tensor(FILE, "u"))
    assert (outcome.family, outcome.weights) == ("imf", "ema")
    recipe = checkpoint.recipe
    assert recipe.model.velocity_head == (2 if "blocks" in form else None)
    if "blocks" in form:
        assert_close(net(z, h, torch.zeros_like(h), y, guide=guide, heads="velocity"), tensor(FILE, "v"))
    assert len(outcome.unread) == (3 if form == "released" else 0), "the velocity's last layer, without its blocks"
    assert (recipe.data.classes, recipe.guidance.label_dropout) == (10, 0.1)
    assert (recipe.model.heads, recipe.model.inputs) == (4, ("scale", "interval"))
    assert (recipe.sample.scale, recipe.sample.interval) == (7.5, (0.4, 0.65))


def test_the_latents_constants_are_in_the_recipe_and_in_the_file(tmp_path):
    _, checkpoint, _ = converted(tmp_path, released())
    data = checkpoint.recipe.data
    assert (data.normalise, data.channel_mean, data.channel_std) == ("channel", MEAN, STD)
    assert (tuple(checkpoint.mean.flatten().tolist()), tuple(checkpoint.std.flatten().tolist())) == (MEAN, STD)
    assert data.autoencoder == "stabilityai/sd-vae-ft-mse"
    (tmp_path / "ours.safetensors").unlink()
    _, checkpoint, _ = converted(tmp_path, released(), latents="scale:0.18215")
    assert (checkpoint.recipe.data.normalise, checkpoint.recipe.data.channel_mean) == ("scale", None)


def test_the_raw_weights_are_taken_when_wanted(tmp_path):
    theirs = of_fd_loss(released())
    tree = {"model": {name: value + 1 for name, value in theirs.items()}, "model_ema": theirs}
    _, checkpoint, _ = converted(tmp_path, tree, weights="raw")
    assert torch.equal(checkpoint.weights["final.linear.bias"], theirs["net.u_final_layer.linear.linear.bias"] + 1)


def test_the_guidance_of_a_size_that_was_not_published_is_asked_for(tmp_path):
    with pytest.raises(AlphaflowError, match=r"--set sample\.scale=8 --set sample\.interval=\[0\.4,0\.65\]"):
        converted(tmp_path, released(), SIDE)
    assert not (tmp_path / "ours.safetensors").exists()
    _, checkpoint, _ = converted(tmp_path, released(), SIDE, recipe="imf-xl2")
    assert (checkpoint.recipe.sample.scale, checkpoint.recipe.sample.interval) == (8.0, (0.42, 0.62))


@pytest.mark.parametrize(("change", "reason"), [
    ({"net.shared_blocks.0.attn.k_proj._flax_linear.weight": None}, "lacks 'shared_blocks.0.attn.k_proj.weight'"),
    ({"net.pos_embed": torch.zeros(1, 16, 40)}, "has 'pos_embed', which no iMF has"),
    ({"net.u_heads.7.norm1.weight": torch.ones(40)}, "has 'u_heads.7.norm1.weight', which no iMF has"),
    ({"net.time_tokens": torch.zeros(5, 40)}, "and \\[8, 4, 2, 2, 5\\] tokens before them"),
    ({"net.x_embedder.proj.weight": None}, "no whole improved MeanFlow"),
    ({"net.h_embedder.mlp.0._flax_linear.weight": torch.zeros(40, 128)}, "not the weights of the network"),
    ({"net.shared_blocks.1.attn.k_proj._flax_linear.weight": torch.zeros(40, 41)}, "Sizes of tensors must match"),
    ({"net.y_embedder.embedding_table._flax_embedding.weight": torch.zeros(())}, "no whole improved MeanFlow"),
    ({"net.y_embedder.embedding_table._flax_embedding.weight": torch.zeros(0, 40)}, "data.classes is 0"),
    ({"net.time_tokens": torch.full((4, 40), float("nan"))}, "not finite"),
])  # fmt: skip
def test_a_table_that_is_no_whole_imf_is_refused(tmp_path, change, reason):
    tree = {name: value for name, value in (released() | change).items() if value is not None}
    with pytest.raises(AlphaflowError, match=reason):
        converted(tmp_path, tree)
    assert not (tmp_path / "ours.safetensors").exists()


@pytest.mark.parametrize("size", SIZES)
def test_a_released_file_of_every_size_is_our_network_and_the_velocitys_last_layer(size):
    """By the number of tables and of values; and by names and shapes, which are listed for B."""
    keys = json.loads((FOLDER / "imf_keys.json").read_text())[size]
    blocks, recipe = keys["blocks"], recipe_of(size, velocity_head=0)
    shapes = network_shapes(recipe)
    names = imf_names(blocks["shared_blocks"], blocks["u_heads"], velocity=0)
    assert names.keys() == shapes.keys()
    theirs = to_imf({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, names)
    assert (len(theirs), sum(value.numel() for value in theirs.values())) == (keys["tensors"], AT_INFERENCE[size])
    for name, listed in keys["names"].items() if size == "B" else ():
        bare = name.removeprefix("net.").replace("._flax_linear.", ".").replace("._flax_embedding.", ".")
        assert list(theirs[bare].shape) == listed["shape"], name


def test_it_is_sampled_with_its_guidance(tmp_path):
    _, checkpoint, _ = converted(tmp_path, released())
    for nfe in (1, 2):
        assert plan_walk(checkpoint.recipe, nfe=nfe).guide == (7.5, 0.4, 0.65)
        assert plan_walk(checkpoint.recipe, nfe=nfe).nfe == nfe, "one evaluation per step"


def test_it_has_no_published_form_of_alpha_flow(tmp_path, capsys):
    converted(tmp_path, released())
    assert run(["convert", str(tmp_path / "ours.safetensors"), "--to", "alphaflow", "-o", str(tmp_path / "b.pt")]) == 1
    err = capsys.readouterr().err
    assert "has another network than the published system's (model.inputs, model.conditioning, model.block)" in err
