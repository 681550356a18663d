"""Rows that go along without gradient: they are what a call of their own would say, and leave the others alone."""

import pytest
import torch
from tangent_nets import CONFIGS, random_inputs, random_net, relative

from alphaflow_cli.model.compiling import compile_blocks
from alphaflow_cli.nn.dit import DiT
from alphaflow_cli.nn.noise import NoiseDiT
from alphaflow_cli.nn.tangent import Beside

NAMES = [str(i) for i in range(len(CONFIGS))]


def others(dtype=torch.float64, rows=5):
    torch.manual_seed(2)
    t = torch.rand(rows, dtype=dtype)
    return torch.randn(rows, 4, 8, 8, dtype=dtype), t, t, torch.arange(rows)


def gradients(u, net):
    return torch.autograd.grad(u.square().sum(), list(net.parameters()))


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_both_are_what_two_calls_would_say_bit_for_bit(config):
    net, (z, t, r, y, _), beside = random_net(torch.float32, **config), random_inputs(2, torch.float32), others()
    beside = tuple(value.float() if value.is_floating_point() else value for value in beside)
    alone = net(z, t, r, y)
    with torch.no_grad():
        theirs = net(*beside)
    both = net(z, t, r, y, beside=beside)
    assert isinstance(both, Beside)
    assert both.value.requires_grad
    assert not both.others.requires_grad
    assert torch.equal(both.value, alone)
    assert torch.equal(both.others, theirs)
    for a, b in zip(gradients(both.value, net), gradients(alone, net), strict=True):
        assert torch.equal(a, b)


def test_a_network_that_predicts_noise_takes_them_too():
    config = CONFIGS[0]
    torch.manual_seed(0)
    net = NoiseDiT(latent_size=8, channels=4, dim=48, depth=2, heads=4, mlp_ratio=4.0, **config).double()
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.15 * torch.randn_like(weight))
    z, t, r, y, _ = random_inputs(2)
    value, theirs = net(z, t, r, y, beside=others())
    assert torch.equal(value, net(z, t, r, y))
    assert torch.equal(theirs, net(*others()))


def test_a_block_is_called_once_and_recomputes_the_graded_rows_only():
    net, (z, t, r, y, _) = random_net(gradient_checkpointing=True), random_inputs(2)
    seen = []
    net.blocks[1].register_forward_pre_hook(lambda module, inputs: seen.append(isinstance(inputs[0], Beside)))
    net(z, t, r, y, beside=others()).value.sum().backward()
    assert seen == [True, False]


def test_a_compiled_block_computes_them_in_a_call_of_their_own_and_never_again():
    net, (z, t, r, y, _) = random_net(gradient_checkpointing=True), random_inputs(2)
    net.compiled, seen = True, []  # as if: a block that is compiled in earnest cannot be looked into
    net.blocks[1].register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    net(z, t, r, y, beside=others()).value.sum().backward()
    assert seen == [len(z), len(others()[0]), len(z)]


def test_autocast_leaves_every_weight_its_gradient():
    net, (z, t, r, y, _) = random_net(torch.float32), random_inputs(2, torch.float32)
    beside = tuple(value.float() if value.is_floating_point() else value for value in others())
    with torch.autocast("cpu", torch.bfloat16):
        both = net(z, t, r, y, beside=beside)
        alone = net(z, t, r, y)
    assert torch.equal(both.value, alone)
    both.value.float().square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in net.parameters())


@pytest.mark.parametrize("kind", [DiT, NoiseDiT])
def test_they_and_a_tangent_exclude_each_other(kind):
    net = kind(latent_size=8, channels=4, dim=48, depth=2, heads=4, mlp_ratio=4.0, **CONFIGS[0]).double()
    z, t, r, y, v = random_inputs(2)
    with pytest.raises(AssertionError):
        net(z, t, r, y, tangent=v, first=2, beside=others())


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of dynamo itself
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_take_them_too(checkpointing):
    torch._dynamo.reset()
    net, (z, t, r, y, _) = random_net(gradient_checkpointing=checkpointing), random_inputs(2)
    compiled = compile_blocks(random_net(gradient_checkpointing=checkpointing), backend="aot_eager")
    results = []
    for each in (net, compiled):
        both = each(z, t, r, y, beside=others())
        results.append([*both, *gradients(both.value, each)])
    for a, b in zip(*results, strict=True):
        assert relative(b.detach(), a.detach()) < 1e-12
