"""Converted SiT, DiT and MeanFlow against their own architecture, rebuilt from the papers in foreign_nets."""

import argparse

import pytest
import torch
from foreign_nets import dit_alpha_bar, dit_noise, published_u, sit_velocity
from snapshots import CLASSES, HEADS, meanflow_weights, sit_weights

from alphaflow_cli.convert import ConvertOptions, convert
from alphaflow_cli.convert.imported import MEANFLOW_MEAN, MEANFLOW_STD
from alphaflow_cli.convert.sit import turn_time
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.model.checkpoint import load_checkpoint
from alphaflow_cli.sample.generator import load_network

HEADS_SET = (f"model.heads={HEADS}",)


def converted(tmp_path, tree, family, **options):
    source, out = tmp_path / "theirs.pt", tmp_path / "ours.safetensors"
    torch.save(tree, source)
    outcome = convert(source, out, ConvertOptions(family=family, sets=HEADS_SET, **options))
    checkpoint = load_checkpoint(out)
    return outcome, checkpoint, load_network(checkpoint)


def inputs(n=6, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(n, 4, 8, 8, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    y = torch.tensor([0, 3, 9, 10, 5, 1])[:n]
    t = torch.tensor([0.0, 0.1, 0.35, 0.5, 0.8, 1.0], dtype=dtype)[:n]
    return x, noise, t, y


@torch.no_grad()
def test_a_converted_sit_has_the_same_velocity_with_time_and_sign_turned(tmp_path):
    w = sit_weights()
    _, _, net = converted(tmp_path, {"ema": w, "model": sit_weights(22)}, "sit")
    x, noise, t, y = inputs()
    z = (1 - t)[:, None, None, None] * x + t[:, None, None, None] * noise
    ours = net(z, t, t, y)
    double = {name: value.double() for name, value in w.items()}
    theirs = sit_velocity(double, z.double(), 1 - t.double(), y, heads=HEADS)
    torch.testing.assert_close(ours.double(), -theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_converted_sit_does_not_depend_on_r(tmp_path):
    _, _, net = converted(tmp_path, {"ema": sit_weights()}, "sit")
    x, _, t, y = inputs()
    torch.testing.assert_close(net(x, t, t, y), net(x, t, 0.3 * t, y), rtol=0, atol=0)


def test_the_second_embedder_can_learn(tmp_path):
    _, checkpoint, net = converted(tmp_path, {"ema": sit_weights()}, "sit")
    x, _, t, y = inputs()
    net(x, t, 0.3 * t, y).square().mean().backward()
    grad = net.second_embed.mlp[2].weight.grad
    assert checkpoint.weights["second_embed.mlp.2.weight"].abs().max() == 0
    assert grad.abs().max() > 0


def test_turning_time_twice_gives_the_first_weights():
    g = torch.Generator().manual_seed(1)
    names = {"time_embed.mlp.0.weight": (5, 256), "final.linear.weight": (3, 5), "final.linear.bias": (3,)}
    weights = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in names.items()}
    twice = turn_time(turn_time(weights))
    assert all(torch.allclose(twice[name], weights[name], rtol=1e-12) for name in names)


@torch.no_grad()
@pytest.mark.parametrize("index", [0, 1, 250, 500, 750, 900, 990, 999])
def test_a_converted_dit_gives_the_velocity_of_its_noise_at_every_discrete_time(tmp_path, index):
    w = sit_weights()
    _, checkpoint, net = converted(tmp_path, w, "dit")
    assert checkpoint.recipe.model.prediction == "noise"
    kept = dit_alpha_bar()[index]
    data, share = kept.sqrt(), (1 - kept).sqrt()
    t = share / (data + share)
    x, noise, _, y = inputs(dtype=torch.float64)
    double = {name: value.double() for name, value in w.items()}
    predicted = dit_noise(double, data * x + share * noise, torch.full((6,), index), y, heads=HEADS)
    x_hat = (data * x + share * noise - share * predicted) / data
    z = (1 - t) * x + t * noise
    rows = torch.full((6,), float(t), dtype=torch.float64)
    torch.testing.assert_close(net.double()(z, rows, rows, y), predicted - x_hat, rtol=1e-5, atol=1e-5)
    u = net.float()(z.float(), rows.float(), rows.float(), y).double()
    size = float((predicted - x_hat).abs().max())  # up to 900: the noise divided by 1 − t
    torch.testing.assert_close(u, predicted - x_hat, rtol=0, atol=1e-5 * size)
    torch.testing.assert_close(z + (1 - t) * u, predicted, rtol=1e-5, atol=2e-5)


def test_the_riding_derivative_of_a_converted_dit_is_the_forward_mode_derivative(tmp_path):
    _, _, net = converted(tmp_path, sit_weights(), "dit")
    net = net.double()
    x, noise, t, y = inputs(dtype=torch.float64)
    r = 0.5 * t
    with torch.no_grad():
        u, du = torch.func.jvp(lambda z, s: net(z, s, r, y, "math"), (x, t), (noise, torch.ones_like(t)))
        rides = net(x, t, r, y, tangent=noise[2:], first=2)
    torch.testing.assert_close(rides.value, u, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rides.tangent, du[2:], rtol=1e-7, atol=1e-7)


@torch.no_grad()
def test_a_converted_meanflow_is_the_same_function(tmp_path):
    w = meanflow_weights()
    arguments = argparse.Namespace(cfg_omega=0.2, cfg_kappa=0.92, cfg_min_t=0.0, cfg_max_t=0.75, cfg_prob=0.1)
    tree = {"model": meanflow_weights(32), "ema": w, "args": arguments, "steps": 1234, "opt": {}}
    outcome, checkpoint, net = converted(tmp_path, tree, "auto")
    x, _, t, y = inputs()
    renamed = {
        n.replace("t_embedder", "noise_labels_embedder").replace("r_embedder", "noise_labels_next_embedder"): v
        for n, v in w.items()
    }
    theirs = published_u(
        {n: v.double() for n, v in renamed.items()}, x.double(), 0.4 * t.double(), t.double(), y, heads=6
    )
    torch.testing.assert_close(net(x, t, 0.4 * t, y).double(), theirs, rtol=1e-5, atol=1e-5)
    mix = checkpoint.recipe.guidance
    assert (mix.omega, mix.kappa, mix.t_max, checkpoint.origin["step"]) == (0.2, 0.92, 0.75, 1234)
    assert (float(1 / checkpoint.std), float(checkpoint.mean)) == (pytest.approx(0.18125), 0.0)
    assert outcome.family == "meanflow"
    assert "0.18125" in outcome.filled["latents"]


def test_the_first_two_days_of_zhuyus_meanflow_are_asked_for(tmp_path):
    arguments = argparse.Namespace(cfg_omega=1.0, cfg_kappa=0.0)
    tree = {"ema": meanflow_weights(), "args": arguments}
    _, checkpoint, _ = converted(tmp_path, tree, "auto", latents="meanflow")
    torch.testing.assert_close(checkpoint.mean.flatten(), torch.tensor(MEANFLOW_MEAN, dtype=torch.float64))
    torch.testing.assert_close(checkpoint.std.flatten(), 2 * torch.tensor(MEANFLOW_STD, dtype=torch.float64))


def test_raw_weights_are_taken_when_asked_for(tmp_path):
    first, second = sit_weights(21), sit_weights(22)
    _, checkpoint, _ = converted(tmp_path, {"ema": first, "model": second}, "sit", weights="raw")
    assert checkpoint.origin["weights"] == "raw"
    assert torch.equal(checkpoint.weights["label_embed.weight"], second["y_embedder.embedding_table.weight"])


def test_a_sit_is_known_by_its_arguments_and_asked_for_otherwise(tmp_path):
    arguments = argparse.Namespace(model="SiT-XL/2", path_type="Linear", prediction="velocity")
    outcome, checkpoint, _ = converted(tmp_path, {"ema": sit_weights(), "args": arguments}, "auto")
    assert outcome.family == "sit"
    assert checkpoint.recipe.data.classes == CLASSES
    (tmp_path / "ours.safetensors").unlink()
    with pytest.raises(AlphaflowError, match="--from sit, or --from dit"):
        converted(tmp_path, {"ema": sit_weights()}, "auto")


def test_what_is_filled_in_is_recorded(tmp_path):
    outcome, checkpoint, _ = converted(tmp_path, {"ema": sit_weights()}, "sit")
    record = checkpoint.origin["converted"]
    assert record["from"] == "sit"
    assert record["filled"].keys() >= {"recipe", "sampler", "labels", "latents"}
    assert record["filled"].items() >= outcome.filled.items()
    assert float(1 / checkpoint.std.flatten()[0]) == pytest.approx(0.18215)


BROKEN = {
    "a SiT on another path": (
        {"ema": sit_weights(), "args": argparse.Namespace(path_type="GVP")}, "sit", "path_type 'GVP'"
    ),
    "another family": ({"conv1.weight": torch.zeros(2)}, "auto", "another family .*'conv1.weight'"),
    "another family, forced": ({"conv1.weight": torch.zeros(2)}, "sit", "another family: it has 'conv1.weight'"),
    "MeanFlow without its guidance": ({"ema": meanflow_weights()}, "auto", "does not say with which guidance"),
    "only raw weights": ({"model": sit_weights()}, "sit", "no ema weights, only raw"),
    "a missing table": (
        {"ema": {n: v for n, v in sit_weights().items() if "fc2.bias" not in n}}, "sit", "2 missing, such as blocks.0"
    ),
    "not finite": ({"ema": sit_weights() | {"pos_embed": torch.full((1, 16, 96), float("nan"))}}, "sit", "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_converted_is_named(tmp_path, what):
    tree, family, message = BROKEN[what]
    with pytest.raises(AlphaflowError, match=message):
        converted(tmp_path, tree, family)
    assert not (tmp_path / "ours.safetensors").exists()


def test_heads_that_nobody_knows_are_asked_for(tmp_path):
    source = tmp_path / "theirs.pt"
    torch.save(sit_weights(), source)
    with pytest.raises(AlphaflowError, match="--set model"):
        convert(source, tmp_path / "ours.safetensors", ConvertOptions(family="sit"))


def test_nothing_is_overwritten(tmp_path):
    converted(tmp_path, sit_weights(), "sit")
    with pytest.raises(AlphaflowError, match="exists already"):
        converted(tmp_path, sit_weights(), "sit")
