"""Improved MeanFlow's network, built by recipe keys, is the published one: values, derivative, parts, sizes, start."""

import json

import pytest
import torch
from golden_data import FOLDER, arrays, assert_close, tensor
from imf_nets import AT_INFERENCE, NAMES_A, SIZES, TRAINED, guide_of, network_a, recipe_a, recipe_of, to_imf

from alphaflow_cli.convert.imf import bare_names
from alphaflow_cli.model.build import build_network, network_shapes
from alphaflow_cli.nn.layers import time_features, time_features_speed
from alphaflow_cli.nn.modern import turned, turns
from alphaflow_cli.nn.tangent import Dual, each, through
from alphaflow_cli.recipe.plan import parameter_count

FILE, RULES = "imf_model_A_f64.npz", "imf_rules_f64.npz"


def inputs():
    z, dz, h = (tensor(FILE, name) for name in ("z", "dz", "h"))
    return z, dz, h, torch.zeros_like(h), torch.tensor(arrays(FILE)["y"])


@pytest.mark.parametrize("attend", ["fused", "math"])
def test_both_outputs_and_the_riding_derivative_are_the_published_ones(attend):
    z, dz, t, r, y = inputs()
    u, v, du = network_a()(z, t, r, y, attend, dz, 0, guide=guide_of(FILE), heads="both")
    assert_close(u, tensor(FILE, "u"))
    assert_close(v, tensor(FILE, "v"))
    assert_close(du, tensor(FILE, "du"))


def test_the_velocitys_derivative_by_forward_mode_is_the_published_one():
    z, dz, t, r, y = inputs()
    net = network_a()
    dv = torch.func.jvp(
        lambda z, t: net(z, t, r, y, "math", guide=guide_of(FILE), heads="velocity"), (z, t), (dz, torch.ones_like(t))
    )[1]
    assert_close(dv, tensor(FILE, "dv"))


def test_only_the_interval_between_the_times_is_seen():
    z, _, t, r, y = inputs()
    assert_close(network_a()(z, t + 0.25, r + 0.25, y, guide=guide_of(FILE)), tensor(FILE, "u"))


def test_every_activation_is_the_published_one():
    z, _, t, r, y = inputs()
    net, seen = network_a(), {}
    modules = {
        "x_embedder": net.patch_embed, "h_embedder": net.second_embed, "omega_embedder": net.scale_embed,
        "cfg_t_start_embedder": net.low_embed, "cfg_t_end_embedder": net.high_embed, "y_embedder": net.label_embed,
        "u_final_layer": net.final, "v_final_layer": net.velocity_final, "shared_blocks.0": net.blocks[0],
        "shared_blocks.1": net.blocks[1], "u_heads.0": net.blocks[2], "u_heads.1": net.blocks[3],
        "v_heads.0": net.velocity_blocks[0], "v_heads.1": net.velocity_blocks[1],
        "shared_blocks.0.norm1": net.blocks[0].norm1, "shared_blocks.0.norm2": net.blocks[0].norm2,
        "shared_blocks.0.attn": net.blocks[0].attn, "shared_blocks.0.mlp": net.blocks[0].mlp,
        "shared_blocks.0.attn.q_norm": net.blocks[0].attn.q_norm,
        "shared_blocks.0.attn.k_norm": net.blocks[0].attn.k_norm,
        "u_heads.0.attn": net.blocks[2].attn, "u_heads.0.mlp": net.blocks[2].mlp,
    }  # fmt: skip
    for name, module in modules.items():
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.__setitem__(name, output))
    with torch.no_grad():
        net(z, t, r, y, guide=guide_of(FILE), heads="both")
    published = {name.removeprefix("act/net."): value for name, value in arrays(FILE).items() if "act/" in name}
    assert seen.keys() == published.keys()
    for name, value in seen.items():
        value = value.transpose(1, 2) if name.endswith(("q_norm", "k_norm")) else value
        assert_close(value[1:2], torch.tensor(published[name]))


@pytest.mark.parametrize("rule", ["rmsnorm", "swiglu", "block", "h_embedder"])
def test_every_rule_is_that_of_the_published_module(rule):
    net = network_a()
    block, x = net.blocks[0], Dual(tensor(RULES, f"{rule}/x"), tensor(RULES, f"{rule}/dx"))
    turn = turns(36, 10, x.value)
    y, dy = {
        "rmsnorm": lambda: through(block.norm1, x),
        "swiglu": lambda: block.mlp(x),
        "block": lambda: block(x, None, "fused", turn),
        "h_embedder": lambda: net.second_embed(x),
    }[rule]()
    assert_close(y, tensor(RULES, f"{rule}/y"))
    assert_close(dy, tensor(RULES, f"{rule}/dy"))


def test_places_turn_as_published():
    x = Dual(tensor(RULES, "rope/x"), tensor(RULES, "rope/dx"))
    turn = turns(36, 10, x.value)
    y, dy = each(lambda a: turned(a.transpose(1, 2), turn).transpose(1, 2), x)
    assert_close(y, tensor(RULES, "rope/y"))
    assert_close(dy, tensor(RULES, "rope/dy"))
    torch.testing.assert_close(y.norm(dim=-1), x.value.norm(dim=-1), rtol=1e-12, atol=0)


def test_features_of_a_time_are_published_ones():
    s = tensor(RULES, "features/x")
    assert_close(time_features(s), tensor(RULES, "features/y"))
    assert_close(time_features_speed(s) * tensor(RULES, "features/dx")[:, None], tensor(RULES, "features/dy"))


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_the_published_parameters(size):
    """Released files hold the velocity's last layer besides, which is of no use without its blocks."""
    trained, published = recipe_of(size, velocity_head=8), recipe_of(size, velocity_head=None)
    dim = trained.model.dim
    unused = dim + 16 * dim + 16
    for recipe, count in ((trained, TRAINED[size]), (published, AT_INFERENCE[size] - unused)):
        shapes = network_shapes(recipe)
        assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameter_count(recipe) == count


def test_the_first_weights_follow_the_published_laws():
    stats = json.loads((FOLDER / "imf_init_stats.json").read_text())
    ours = to_imf(build_network(recipe_a("fp32")).state_dict(), NAMES_A)
    expected = bare_names(stats)
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        law = expected[name]
        assert list(value.shape) == law["shape"], name
        if law["std"] == 0.0:
            assert (value == law["mean"]).all(), name
        else:  # random: the same law within four standard errors
            assert value.std().item() == pytest.approx(law["std"], rel=4 / value.numel() ** 0.5 + 0.02), name
            assert abs(value.mean().item()) < 5 * law["std"] / value.numel() ** 0.5, name
