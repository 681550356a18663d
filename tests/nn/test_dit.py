"""The network: sizes, names, initialisation, options; its numbers are pinned by the golden vectors."""

import warnings

import pytest
import torch

from alphaflow_cli.convert.shape import from_published, to_published
from alphaflow_cli.nn.dit import DiT
from alphaflow_cli.recipe.plan import parameter_count
from alphaflow_cli.recipe.schema import Data, Guidance, Model, Recipe

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
PUBLISHED = [  # size, patch, null row, parameters with the table
    ("B", 2, False, 131_287_312),
    ("B", 2, True, 131_288_080),
    ("B", 4, False, 131_213_632),
    ("L", 2, True, 459_399_184),
    ("XL", 2, True, 676_735_504),
]


def build(*, dim=32, depth=2, heads=4, patch=2, latent_size=8, channels=3, label_rows=5, **options):
    torch.manual_seed(0)
    defaults = {"mlp_ratio": 4.0, "qk_norm": False, "second_time": "t-r", "gradient_checkpointing": False}
    return DiT(
        latent_size=latent_size, channels=channels, patch=patch, dim=dim, depth=depth, heads=heads,
        label_rows=label_rows, **(defaults | options),
    )  # fmt: skip


def awake(dtype=torch.float64, **options):
    """A network whose zero-initialised layers are random too."""
    net = build(**options).to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def inputs(rows=3, *, channels=3, size=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(rows, channels, size, size, generator=generator, dtype=dtype)
    t = torch.linspace(0.3, 0.9, rows, dtype=dtype)
    return z, t, t * 0.4, torch.arange(rows) % 4


def count(net):
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(("size", "patch", "null_row", "expected"), PUBLISHED)
def test_the_built_networks_have_the_published_parameter_counts(size, patch, null_row, expected):
    dim, depth, heads = SIZES[size]
    shape = {"dim": dim, "depth": depth, "heads": heads, "patch": patch}
    with torch.device("meta"):
        net = build(latent_size=32, channels=4, label_rows=1000 + null_row, **shape)
    recipe = Recipe(model=Model(**shape), guidance=Guidance(label_dropout=0.1 * null_row))
    assert count(net) == parameter_count(recipe) == expected


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_the_recipes_formula_counts_every_size_and_option(size, patch):
    dim, depth, heads = SIZES[size]
    shape = {"dim": dim, "depth": depth, "heads": heads, "patch": patch, "mlp_ratio": 3.0, "qk_norm": True}
    with torch.device("meta"):
        net = build(latent_size=16, channels=3, label_rows=0, **shape)
    data = Data(channels=3, latent_size=16, classes=0)
    assert count(net) == parameter_count(Recipe(model=Model(**shape), data=data))


def test_names_survive_the_round_trip_and_are_all_different():
    names = list(build().state_dict())
    published = [to_published(name) for name in names]
    assert [from_published(name) for name in published] == names
    assert len(set(published)) == len(names)
    assert "blocks.1.adaLN_modulation.1.weight" in published
    assert "final_layer.adaLN_modulation.1.bias" in published
    assert "noise_labels_next_embedder.mlp.2.weight" in published


@pytest.mark.parametrize("name", ["optimizer.state", "encoder.conv.weight"])
def test_a_name_of_neither_system_is_refused(name):
    with pytest.raises(KeyError):
        to_published(name)
    with pytest.raises(KeyError):
        from_published(name)


def test_at_initialisation_the_network_predicts_zero():
    net = build().double()
    assert (net(*inputs()) == 0).all()


def test_initialisation_follows_the_published_laws():
    net = build(dim=256, heads=4, label_rows=101)
    for linear in (net.blocks[0].attn.qkv, net.blocks[1].mlp.fc1, net.blocks[0].attn.proj):
        bound = (6 / (linear.in_features + linear.out_features)) ** 0.5
        assert 0.99 * bound < linear.weight.abs().max() <= bound
        assert (linear.bias == 0).all()
    patches = net.patch_embed.proj.weight.flatten(1)
    assert 0.95 < patches.abs().max() / (6 / sum(patches.shape)) ** 0.5 <= 1
    for weight in (net.time_embed.mlp[0].weight, net.second_embed.mlp[2].weight, net.label_embed.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert (net.patch_embed.proj.bias == 0).all()
    for linear in (net.final.linear, net.final.modulation.linear, net.blocks[0].modulation.linear):
        assert (linear.weight == 0).all()
        assert (linear.bias == 0).all()


def test_the_positional_table_is_trained():
    assert build().pos_embed.requires_grad


@pytest.mark.parametrize("attend", ["fused", "math"])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"second_time": "r"}, {"patch": 4}, {"label_rows": 0}])
def test_every_option_predicts_a_velocity_of_the_latents_shape(attend, options):
    net, (z, t, r, y) = awake(**options), inputs()
    u = net(z, t, r, y, attend)
    assert u.shape == z.shape
    torch.testing.assert_close(u, net(z, t, r, y, "math"), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(u, awake()(z, t, r, y)) or options == {}


def test_latents_of_another_shape_are_refused():
    z, t, r, y = inputs(size=10)
    with pytest.raises(AssertionError):
        build()(z.float(), t.float(), r.float(), y)


def test_a_network_without_labels_ignores_them():
    net, (z, t, r, y) = awake(label_rows=0), inputs()
    assert not any("label" in name for name in net.state_dict())
    assert torch.equal(net(z, t, r, y), net(z, t, r, y + 1000))


def test_labels_times_and_places_all_matter():
    net, (z, t, r, y) = awake(), inputs()
    u = net(z, t, r, y)
    for other in ((z, t, r, y + 1), (z, t, r * 0.9, y), (z, t * 1.01, r, y), (z.roll(2, 3), t, r, y)):
        assert not torch.allclose(u, net(*other))
    assert not torch.allclose(u.roll(2, 3), net(z.roll(2, 3), t, r, y))  # the table breaks the shift symmetry


def test_the_interval_network_sees_t_minus_r_and_the_other_sees_r():
    z, t, r, y = inputs()
    for second_time, fed in (("t-r", t - r), ("r", r)):
        net, seen = awake(second_time=second_time), []
        net.second_embed.register_forward_hook(lambda module, args, output, seen=seen: seen.append(args[0]))
        net(z, t, r, y)
        assert torch.equal(seen[0], fed)


@pytest.mark.parametrize("second_time", ["t-r", "r"])
def test_the_derivative_holds_r_still_whichever_second_time_is_fed(second_time):
    from alphaflow_cli.core.objective import jvp_derivative

    net, (z, t, r, y) = awake(second_time=second_time), inputs()
    v, h = z.flip(0), 1e-5
    du = jvp_derivative(lambda z, t, r, y: net(z, t, r, y, "math"), z, v, t=t, r=r, y=y)
    with torch.no_grad():
        difference = (net(z + h * v, t + h, r, y) - net(z - h * v, t - h, r, y)) / (2 * h)
    torch.testing.assert_close(du, difference, rtol=1e-6, atol=1e-7)


def test_rows_do_not_mix():
    net, (z, t, r, y) = awake(), inputs(4)
    order = torch.tensor([2, 0, 3])
    torch.testing.assert_close(net(z, t, r, y)[order], net(z[order], t[order], r[order], y[order]), rtol=1e-10, atol=0)


def test_qk_norm_makes_attention_blind_to_the_scale_of_the_queries():
    net, (z, t, r, y) = awake(qk_norm=True), inputs()
    u = net(z, t, r, y)
    with torch.no_grad():
        for block in net.blocks:
            block.attn.qkv.weight[:32] *= 3  # the first D outputs are the queries
            block.attn.qkv.bias[:32] *= 3
    torch.testing.assert_close(net(z, t, r, y), u, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}])
def test_gradient_checkpointing_changes_no_gradient(options):
    z, t, r, y = inputs()
    grads = []
    for checkpointing in (False, True):
        net = awake(gradient_checkpointing=checkpointing, **options)
        net(z, t, r, y).square().mean().backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize(("checkpointing", "runs"), [(False, 1), (True, 2)])
def test_gradient_checkpointing_runs_every_block_again_in_the_backward_pass(checkpointing, runs):
    net, calls = awake(gradient_checkpointing=checkpointing), []
    for block in net.blocks:
        block.register_forward_pre_hook(lambda module, args: calls.append(module))
    with torch.no_grad():
        net(*inputs())
    assert len(calls) == 2
    net(*inputs()).sum().backward()
    assert len(calls) == 2 + 2 * runs


def test_under_bf16_autocast_the_network_runs_and_stays_close():
    net, (z, t, r, y) = awake(torch.float32), inputs(dtype=torch.float32)
    u = net(z, t, r, y)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(z, t, r, y)
    rough.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())
    assert 0 < (rough.float() - u).norm() / u.norm() < 0.05


def test_importing_the_network_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build()
