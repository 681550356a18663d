"""The rungs of improved MeanFlow's ladder, in every combination: derivative, heads, rows beside, recomputing."""

from dataclasses import replace

import pytest
import torch
from tangent_nets import CORNERS, DESIGNS, design, random_guide, random_inputs, random_net, relative

from alphaflow_cli.core.objective import jvp_derivative
from alphaflow_cli.model.compiling import compile_blocks
from alphaflow_cli.nn.clean import CleanDiT
from alphaflow_cli.nn.dit import DiT
from alphaflow_cli.nn.noise import NoiseDiT
from alphaflow_cli.nn.tangent import Beside, Dual

SOME_AND_ALL = [name if name in CORNERS else pytest.param(name, marks=pytest.mark.slow) for name in DESIGNS]
WITH_HEAD = [name for name in DESIGNS if "head None" not in name]


def net_of(name, dtype=torch.float64, *, kind=DiT, **config):
    net = random_net(dtype, kind=kind, design=design(name, config.get("label_rows", 11)), **config)
    if isinstance(net, CleanDiT):
        net.t_floor = 0.3
    return net, random_guide(net, dtype)


def others(guide, rows=5):
    """Rows beside, of other inputs than random_inputs'."""
    torch.manual_seed(2)
    t = torch.rand(rows, dtype=torch.float64)
    z = torch.randn(rows, 4, 8, 8, dtype=torch.float64)
    return z, t, t, torch.arange(rows), None if guide is None else guide.flip(0)[:rows]


def call(net, rows, **more):
    z, t, r, y, guide = rows
    return net(z, t, r, y, guide=guide, **more)


def gradients(net, outputs):
    return torch.autograd.grad(sum(x.square().sum() for x in outputs), list(net.parameters()), allow_unused=True)


def forward_mode(net, z, t, r, y, v, first, guide):
    rest = None if guide is None else guide[first:]

    def math(z, t, r, y):
        return net(z, t, r, y, "math", guide=rest)

    return jvp_derivative(math, z[first:], v, t=t[first:], r=r[first:], y=y[first:])


@pytest.mark.parametrize("name", DESIGNS)
def test_the_riding_tangent_is_the_forward_mode_derivative(name):
    (net, guide), (z, t, r, y, v) = net_of(name), random_inputs(2)
    out = net(z, t, r, y, tangent=v, first=2, guide=guide)
    assert isinstance(out, Dual)
    assert not out.tangent.requires_grad
    assert relative(out.tangent, forward_mode(net, z, t, r, y, v, 2, guide)) < 1e-12


@pytest.mark.parametrize(("name", "kind"), [
    *((name, CleanDiT) for name in CORNERS), *((name, NoiseDiT) for name in CORNERS if "adaln" in name),
    ("scale+interval, adaln, dit, head 2", NoiseDiT),
])  # fmt: skip
def test_it_is_for_networks_that_predict_something_else(name, kind):
    (net, guide), (z, t, r, y, v) = net_of(name, kind=kind), random_inputs(2)
    u, v_hat, du = net(z, t, r, y, tangent=v, first=2, guide=guide, heads="both")
    assert relative(du, forward_mode(net, z, t, r, y, v, 2, guide)) < 1e-12
    assert torch.equal(u, net(z, t, r, y, guide=guide))
    assert torch.equal(v_hat, net(z, t, r, y, guide=guide, heads="velocity"))
    twin = others(guide)
    first, second, theirs = net(z, t, r, y, guide=guide, heads="both", beside=twin)
    assert torch.equal(first, u)
    assert torch.equal(second, v_hat)
    assert torch.equal(theirs, call(net, twin, heads="velocity"))


@pytest.mark.parametrize("label_rows", [0, 11])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CORNERS)
def test_values_and_gradients_are_bit_identical_with_and_without_it(name, checkpointing, label_rows):
    options = {"gradient_checkpointing": checkpointing, "label_rows": label_rows}
    (net, guide), (z, t, r, y, v) = net_of(name, torch.float32, **options), random_inputs(2, torch.float32)
    alone = net(z, t, r, y, guide=guide, heads="both")
    *values, du = net(z, t, r, y, tangent=v, first=2, guide=guide, heads="both")
    assert du.shape == v.shape
    assert len(values) == len(alone) == 2
    for a, b in zip([*values, *gradients(net, values)], [*alone, *gradients(net, alone)], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", SOME_AND_ALL)
def test_rows_beside_give_the_velocity_that_a_call_of_their_own_would(name, checkpointing):
    (net, guide), (z, t, r, y, _) = net_of(name, gradient_checkpointing=checkpointing), random_inputs(2)
    beside = others(guide)
    with torch.no_grad():
        theirs = call(net, beside, heads="velocity")
    for heads in ("u", "velocity", "both") if "None" not in name else ("u",):
        alone = net(z, t, r, y, guide=guide, heads=heads)
        *values, given = net(z, t, r, y, guide=guide, heads=heads, beside=beside)
        alone = alone if heads == "both" else (alone,)
        assert torch.equal(given, theirs)
        assert not given.requires_grad
        ours, expected = gradients(net, values), gradients(net, alone)
        for a, b in zip([*values, *ours], [*alone, *expected], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("name", CORNERS)
def test_recomputing_changes_no_gradient(name):
    found = []
    for checkpointing in (False, True):
        (net, guide), (z, t, r, y, v) = net_of(name, gradient_checkpointing=checkpointing), random_inputs(2)
        found.append(gradients(net, net(z, t, r, y, tangent=v, first=2, guide=guide, heads="both")[:2]))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [name for name in WITH_HEAD if "scale," in name])
def test_a_velocity_with_the_weights_of_u_is_u_and_leaves_the_gradients_of_u(name):
    (net, guide), (z, t, r, y, _) = net_of(name), random_inputs(2)
    own = net.blocks[len(net.blocks) - len(net.velocity_blocks) :]
    net.velocity_blocks.load_state_dict(own.state_dict())
    net.velocity_final.load_state_dict(net.final.state_dict())
    u, v = net(z, t, r, y, guide=guide, heads="both")
    assert torch.equal(u, v)
    mine = [*own.parameters(), *net.final.parameters()]
    alone = net(z, t, r, y, guide=guide)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), mine) for x in (u, alone)), strict=True):
        assert torch.equal(a, b)


def test_the_velocitys_blocks_are_not_run_for_u_alone_nor_those_of_u_for_the_velocity():
    (net, guide), (z, t, r, y, _), ran = net_of("scale+interval, tokens, modern, head 2"), random_inputs(2), []
    for name, module in net.named_modules():
        if name.startswith(("blocks.", "velocity_blocks.")) and name.count(".") == 1:
            module.register_forward_hook(lambda module, inputs, output, name=name: ran.append(name))
    net(z, t, r, y, guide=guide)
    net(z, t, r, y, guide=guide, heads="velocity")
    shared, own, twins = ["blocks.0"], ["blocks.1", "blocks.2"], ["velocity_blocks.0", "velocity_blocks.1"]
    assert ran == [*shared, *own, *shared, *twins]


@pytest.mark.parametrize("name", ["scale, adaln, dit, head None", "scale+interval, tokens, modern, head 2"])
def test_every_input_matters_and_a_column_that_is_no_input_does_not(name):
    (net, guide), (z, t, r, y, _) = net_of(name), random_inputs(2)
    u = net(z, t, r, y, guide=guide)
    for column in range(3):
        other = guide.clone()
        other[:, column] *= 1.1
        is_input = column == 0 or "interval" in net.inputs
        assert torch.equal(net(z, t, r, y, guide=other), u) != is_input
    assert torch.isfinite(net(z, t, r, y, guide=guide.clamp(max=1.0))).all(), "w = 1 is an input like others"


@pytest.mark.parametrize(("name", "given"), [("no inputs, adaln, dit, head 2", True), (CORNERS[2], False)])
def test_a_guide_where_there_is_no_input_and_none_where_there_is_are_refused(name, given):
    (net, _), (z, t, r, y, _) = net_of(name), random_inputs(2)
    with pytest.raises(AssertionError):
        net(z, t, r, y, guide=torch.ones(6, 3, dtype=torch.float64) if given else None)


def test_heads_that_are_not_there_are_refused():
    (net, _), (z, t, r, y, v) = net_of("no inputs, adaln, dit, head None"), random_inputs(2)
    assert torch.equal(net(z, t, r, y, heads="velocity"), net(z, t, r, y)), "without a head u is the velocity"
    with pytest.raises(AssertionError):
        net(z, t, r, y, heads="both")
    (net, _) = net_of("no inputs, adaln, dit, head 2")
    with pytest.raises(AssertionError):
        net(z, t, r, y, heads="velocity", tangent=v, first=2)


def test_an_interval_whose_embedding_is_zero_changes_nothing():
    (plain, guide), (z, t, r, y, _) = net_of("scale, adaln, dit, head 2"), random_inputs(2)
    (net, _) = net_of("scale+interval, adaln, dit, head 2")
    with torch.no_grad():
        for embedder in (net.low_embed, net.high_embed):
            for weight in embedder.parameters():
                weight.zero_()
    net.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(net(z, t, r, y, guide=guide), plain(z, t, r, y, guide=guide))


def test_a_trained_network_with_new_inputs_is_still_the_same_function():
    form = design("scale+interval, adaln, dit, head None")
    (plain, _), (z, t, r, y, _) = net_of("no inputs, adaln, dit, head None"), random_inputs(2)
    net = DiT(
        latent_size=8, channels=4, patch=2, dim=48, depth=3, heads=4, mlp_ratio=4.0, label_rows=11, qk_norm=False,
        second_time="t-r", gradient_checkpointing=False, design=form,
    ).double()  # fmt: skip
    net.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(net(z, t, r, y, guide=random_guide(net)), plain(z, t, r, y))


def test_tokens_are_told_no_time_but_the_interval():
    (net, guide), (z, t, r, y, _) = net_of("scale, tokens, dit, head 0"), random_inputs(0)
    moved = net(z, t + 0.125, r + 0.125, y, guide=guide)
    assert relative(moved, net(z, t, r, y, guide=guide)) < 1e-12
    assert relative(net(z, t + 0.125, r, y, guide=guide), moved) > 1e-3


def test_the_patches_of_the_modern_block_know_their_places():
    (net, _), (z, t, r, y, _) = net_of("no inputs, adaln, modern, head 3"), random_inputs(0)
    assert net.pos_embed is None
    assert relative(net(z.roll(2, 3), t, r, y), net(z, t, r, y).roll(2, 3)) > 1e-3


@pytest.mark.parametrize("name", CORNERS)
def test_at_the_start_it_predicts_zero_and_every_weight_then_learns(name):
    form = design(name)
    torch.manual_seed(0)
    net = DiT(
        latent_size=8, channels=4, patch=2, dim=48, depth=3, heads=4, mlp_ratio=4.0, label_rows=11, qk_norm=False,
        second_time="t-r", gradient_checkpointing=False, design=form,
    )  # fmt: skip
    z, t, r, y, _ = random_inputs(2, torch.float32)
    guide, optimiser = random_guide(net, torch.float32), torch.optim.SGD(net.parameters(), lr=0.1)
    assert all((x == 0).all() for x in net(z, t, r, y, guide=guide, heads="both"))
    for _ in range(5):
        optimiser.zero_grad()
        sum((x - z).square().mean() for x in net(z, t, r, y, guide=guide, heads="both")).backward()
        optimiser.step()
    assert all(weight.grad.abs().max() > 0 for weight in net.parameters())


@pytest.mark.parametrize("name", CORNERS)
def test_under_bf16_values_are_untouched_and_the_tangent_no_worse_than_forward_mode(name):
    (net, guide), (z, t, r, y, v) = net_of(name, torch.float32), random_inputs(2, torch.float32)
    exact = net(z, t, r, y, tangent=v, first=2, guide=guide)[1]
    with torch.autocast("cpu", torch.bfloat16):
        alone = net(z, t, r, y, guide=guide, heads="both")
        *values, du = net(z, t, r, y, tangent=v, first=2, guide=guide, heads="both")
        forward = forward_mode(net, z, t, r, y, v, 2, guide)
    assert all(torch.equal(a, b) for a, b in zip(values, alone, strict=True))
    assert relative(du.float(), exact) < 1.3 * relative(forward.float(), exact) < 0.1
    sum(x.float().square().sum() for x in values).backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in net.parameters())


def test_checkpointing_recomputes_the_values_only():
    (net, guide), (z, t, r, y, v) = net_of(CORNERS[2], gradient_checkpointing=True), random_inputs(2)
    for more, kind in (({"tangent": v, "first": 2}, Dual), ({"beside": others(guide)}, Beside)):
        seen = []
        hooks = [
            block.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(type(inputs[0])))
            for block in (net.blocks[0], net.velocity_blocks[1])
        ]
        sum(x.sum() for x in net(z, t, r, y, guide=guide, heads="both", **more)[:2]).backward()
        for hook in hooks:
            hook.remove()
        in_head = torch.Tensor if kind is Dual else kind
        assert seen == [kind, in_head, torch.Tensor, torch.Tensor]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of dynamo itself
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CORNERS)
def test_compiled_blocks_give_the_same(name, checkpointing):
    """Traced and differentiated ahead of time but not lowered: seconds instead of minutes on a CPU."""
    torch._dynamo.reset()
    z, t, r, y, v = random_inputs(2)
    results = []
    for compiled in (False, True):
        net, guide = net_of(name, gradient_checkpointing=checkpointing)
        net = compile_blocks(net, backend="aot_eager") if compiled else net
        riding = net(z, t, r, y, tangent=v, first=2, guide=guide, heads="both")
        asking = net(z, t, r, y, beside=others(guide), guide=guide, heads="both")
        results.append([*riding, *asking, *gradients(net, riding[:2]), *gradients(net, asking[:2])])
    for a, b in zip(*results, strict=True):
        assert relative(b.detach(), a.detach()) < 1e-12


def test_a_design_at_its_defaults_is_the_published_network():
    torch.manual_seed(0)
    plain = random_net(torch.float32)
    torch.manual_seed(0)
    again = random_net(torch.float32, design=replace(design("no inputs, adaln, dit, head None")))
    assert plain.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), again.parameters(), strict=True))
