"""A network that predicts the data: its velocity, its derivative, and what it does in a step."""

import pytest
import torch
from tangent_nets import CONFIGS, random_inputs, random_net, relative
from train_helpers import make_recipe, make_store, train

from alphaflow_cli.core.objective import jvp_derivative
from alphaflow_cli.model.build import build_network
from alphaflow_cli.model.checkpoint import load_checkpoint
from alphaflow_cli.nn.clean import CleanDiT
from alphaflow_cli.recipe.schema import Guidance, Loss
from alphaflow_cli.sample.generator import load_network
from alphaflow_cli.train.step import Objective, Rows, training_step

FLOOR = 0.3  # so that some of the random times lie below it


def clean_net(dtype=torch.float64, **config):
    plain = random_net(dtype, **config)
    settings = {"patch": 2, "qk_norm": False, "second_time": "t-r", "label_rows": 11, "gradient_checkpointing": False}
    net = CleanDiT(latent_size=8, channels=4, dim=48, depth=3, heads=4, mlp_ratio=4.0, **{**settings, **config})
    net.load_state_dict(plain.state_dict())
    net.t_floor = FLOOR
    return net.to(dtype), plain


def cube(t):
    return t[:, None, None, None]


def test_the_velocity_leads_from_z_to_the_data_that_it_sees():
    (net, plain), (z, t, r, y, _) = clean_net(), random_inputs(2)
    assert float(t.min()) < FLOOR < float(t.max())
    x_hat, u = plain(z, t, r, y), net(z, t, r, y)
    torch.testing.assert_close(z - cube(t.clamp(min=FLOOR)) * u, x_hat, rtol=1e-12, atol=1e-12)
    assert u.abs().max() <= (z - x_hat).abs().max() / FLOOR


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("config", CONFIGS[:16:3], ids=lambda config: "-".join(map(str, config.values())))
def test_the_riding_tangent_is_the_forward_mode_derivative(config, first):
    (net, _), (z, t, r, y, v) = clean_net(**config), random_inputs(first)
    u, du = net(z, t, r, y, tangent=v, first=first)
    assert torch.equal(u, net(z, t, r, y))
    assert not du.requires_grad
    math = jvp_derivative(
        lambda z, t, r, y: net(z, t, r, y, "math"), z[first:], v, t=t[first:], r=r[first:], y=y[first:]
    )
    assert relative(du, math) < 1e-12


def test_rows_beside_are_what_a_call_of_their_own_gives():
    (net, _), (z, t, r, y, _) = clean_net(), random_inputs(2)
    others = (z.flip(0)[:4], t.flip(0)[:4], t.flip(0)[:4], y[:4])
    both = net(z, t, r, y, beside=others)
    assert torch.equal(both.value, net(z, t, r, y))
    assert torch.equal(both.others, net(*others))
    assert not both.others.requires_grad


@pytest.mark.parametrize("alpha", [1.0, 0.4, 0.0])
def test_a_network_that_sees_the_data_itself_has_no_loss(alpha):
    """It begins with x̂ = 0. Where all data are 0, z_t = t noise and u = noise, which all targets of the family are."""
    net = CleanDiT(
        latent_size=8, channels=4, patch=2, dim=48, depth=2, heads=4, mlp_ratio=4.0, label_rows=11, qk_norm=False,
        second_time="t-r", gradient_checkpointing=False,
    ).double()  # fmt: skip
    net.t_floor = 0.05
    noise, t, r, y, _ = random_inputs(2)
    t = t.clamp(min=0.1)
    r = torch.cat([t[:2], r[2:]])
    rows = Rows(torch.zeros_like(noise), noise, t, r, y, torch.ones_like(t), 2)
    objective = Objective(loss=Loss(clamp=0), guidance=Guidance(), y_null=10, has_labels=True, bf16=False)
    result = training_step(net, net, rows, alpha=alpha, objective=objective)
    torch.testing.assert_close(result.target, noise, rtol=1e-12, atol=1e-12)
    assert result.loss.item() < 1e-20


def test_a_run_trains_saves_and_samples_it(tmp_path):
    store = make_store(tmp_path / "store")
    recipe = make_recipe(tmp_path, "model.prediction=data", "model.t_floor=0.1")
    out = train(recipe, store, tmp_path / "run")
    checkpoint = load_checkpoint(out / "model.safetensors")
    net = load_network(checkpoint)
    assert isinstance(net, CleanDiT)
    assert net.t_floor == 0.1
    assert not torch.equal(checkpoint.weights["final.linear.weight"], build_network(recipe).final.linear.weight)
