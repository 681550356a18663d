"""The tangent that rides along equals the derivative, and leaves the value and its gradients alone, bit for bit."""

import pytest
import torch
from golden_data import arrays, assert_close, labels, network, tensor
from tangent_nets import CONFIGS, random_inputs, random_net, relative

from alphaflow_cli.core.objective import jvp_derivative
from alphaflow_cli.model.compiling import compile_blocks


def forward_mode(net, z, t, r, y, v, first):
    def math(z, t, r, y):
        return net(z, t, r, y, "math")

    return jvp_derivative(math, z[first:], v, t=t[first:], r=r[first:], y=y[first:])


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(map(str, config.values())))
def test_the_riding_tangent_is_the_forward_mode_derivative(config, first):
    net, (z, t, r, y, v) = random_net(**config), random_inputs(first)
    u, du = net(z, t, r, y, tangent=v, first=first)
    assert u.requires_grad
    assert not du.requires_grad
    assert relative(du, forward_mode(net, z, t, r, y, v, first)) < 1e-12


@pytest.mark.parametrize("attend", ["fused", "math"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(map(str, config.values())))
def test_value_and_gradients_are_bit_identical_with_and_without_it(config, attend):
    net, (z, t, r, y, v) = random_net(torch.float32, **config), random_inputs(2, torch.float32)
    alone = net(z, t, r, y, attend)
    u, _ = net(z, t, r, y, attend, tangent=v, first=2)
    assert torch.equal(u, alone)
    weights = list(net.parameters())
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), weights) for x in (u, alone)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("config", CONFIGS[:8], ids=lambda config: "-".join(map(str, config.values())))
def test_float32_stays_within_rounding(config):
    net, (z, t, r, y, v) = random_net(torch.float32, **config), random_inputs(2, torch.float32)
    _, du = net(z, t, r, y, tangent=v, first=2)
    exact = forward_mode(net.double(), z.double(), t.double(), r.double(), y, v.double(), 2)
    assert relative(du.double(), exact) < 5e-6


def test_it_is_the_published_derivative():
    net, names = network("M"), ("x", "t", "r", "tangent_x")
    z, t, r, v = (tensor("model_f64.npz", name) for name in names)
    y = labels(torch.tensor(arrays("model_f64.npz")["label"]), "M")
    for first in (0, 3):
        _, du = net(z, t, r, y, tangent=v[first:], first=first)
        assert_close(du, tensor("model_f64.npz", "M/jvp")[first:])


def test_it_is_the_limit_of_differences():
    net, (z, t, r, y, v), h = random_net(), random_inputs(0), 1e-4
    _, du = net(z, t, r, y, tangent=v, first=0)
    with torch.no_grad():
        central = (net(z + h * v, t + h, r, y) - net(z - h * v, t - h, r, y)) / (2 * h)
    assert relative(central, du) < 1e-5


def test_it_is_linear_in_the_direction_of_z():
    net, (z, t, r, y, v) = random_net(), random_inputs(0)
    du = [net(z, t, r, y, tangent=c * v, first=0)[1] for c in (0.0, 1.0, 3.0)]
    assert relative(du[2] - du[0], 3 * (du[1] - du[0])) < 1e-12


def test_a_row_has_the_same_tangent_in_any_company():
    net, (z, t, r, y, v) = random_net(), random_inputs(0)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    _, du = net(z, t, r, y, tangent=v, first=0)
    _, shuffled = net(z[order], t[order], r[order], y[order], tangent=v[order], first=0)
    assert relative(shuffled, du[order]) < 1e-14


def test_the_number_of_tangents_must_be_that_of_the_last_rows():
    net, (z, t, r, y, v) = random_net(), random_inputs(2)
    with pytest.raises(AssertionError, match=r"\(4, 6, 1\)"):
        net(z, t, r, y, tangent=v, first=1)


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3], CONFIGS[11]], ids=["plain", "checkpointed", "qk_norm"])
def test_under_bf16_the_value_is_untouched_and_the_tangent_no_worse_than_forward_mode(config):
    net, (z, t, r, y, v) = random_net(torch.float32, **config), random_inputs(2, torch.float32)
    _, exact = net(z, t, r, y, tangent=v, first=2)
    with torch.autocast("cpu", torch.bfloat16):
        alone = net(z, t, r, y)
        u, du = net(z, t, r, y, tangent=v, first=2)
        forward = forward_mode(net, z, t, r, y, v, 2)
    assert torch.equal(u, alone)
    assert relative(du.float(), exact) < 1.2 * relative(forward.float(), exact) < 0.1
    u.float().square().sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in net.parameters())


def test_checkpointing_recomputes_the_value_only():
    net, (z, t, r, y, v) = random_net(gradient_checkpointing=True), random_inputs(2)
    seen = []
    net.blocks[1].register_forward_pre_hook(lambda module, inputs: seen.append(isinstance(inputs[0], tuple)))
    u, _ = net(z, t, r, y, tangent=v, first=2)
    u.sum().backward()
    assert seen == [True, False]


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of dynamo itself
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_carry_it_too(checkpointing):
    """Traced and differentiated ahead of time but not lowered: seconds instead of minutes on a CPU."""
    torch._dynamo.reset()
    net, (z, t, r, y, v) = random_net(gradient_checkpointing=checkpointing), random_inputs(2)
    compiled = compile_blocks(random_net(gradient_checkpointing=checkpointing), backend="aot_eager")
    results = []
    for each in (net, compiled):
        u, du = each(z, t, r, y, tangent=v, first=2)
        results.append([u, du, *torch.autograd.grad(u.square().sum(), list(each.parameters()))])
    assert set(net.state_dict()) == set(compiled.state_dict())
    for a, b in zip(*results, strict=True):
        assert relative(b.detach(), a.detach()) < 1e-12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_lowered_blocks_carry_it_too():
    torch._dynamo.reset()
    net, (z, t, r, y, v) = random_net(torch.float32), random_inputs(2, torch.float32)
    u, du = compile_blocks(random_net(torch.float32))(z, t, r, y, tangent=v, first=2)
    expected = net(z, t, r, y, tangent=v, first=2)
    assert relative(u.detach(), expected[0].detach()) < 5e-6
    assert relative(du, expected[1]) < 5e-6
