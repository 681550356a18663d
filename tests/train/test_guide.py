"""Guidance as an input, and the velocity head: each rung's limits are what the trainer computed before."""

from dataclasses import replace

import pytest
import torch
from golden_data import assert_close, golden_case, network
from tangent_nets import design, random_net

from alphaflow_cli.core import guidance
from alphaflow_cli.core.draws import step_draws
from alphaflow_cli.core.times import sample_times
from alphaflow_cli.nn.blocks import Design
from alphaflow_cli.nn.dit import DiT
from alphaflow_cli.recipe import load_recipe, speed
from alphaflow_cli.recipe.schema import Guidance, Loss
from alphaflow_cli.train import conflict
from alphaflow_cli.train.journal import mean_asked_rows, mean_step_flops
from alphaflow_cli.train.questions import ask
from alphaflow_cli.train.step import Objective, Rows, guide_of, row_draws, time_laws, training_step

DRAWN = Guidance(scale="drawn", interval="drawn", label_dropout=0.25, drop="equal")
SCALE = replace(DRAWN, interval="fixed")
HOST = torch.device("cpu")


def golden_net(inputs):
    """The golden network M, told something that it does not heed: the last layer of each new embedder is 0."""
    plain = network("M")
    net = DiT(
        latent_size=8, channels=4, patch=2, dim=64, depth=2, heads=4, mlp_ratio=4.0, label_rows=11, qk_norm=False,
        second_time="t-r", gradient_checkpointing=False, design=Design(inputs=inputs),
    ).double()  # fmt: skip
    missing = net.load_state_dict(plain.state_dict(), strict=False).missing_keys
    for name in missing:
        if ".mlp.2." in name:
            torch.nn.init.zeros_(net.get_parameter(name))
    assert {name.split(".")[0] for name in missing} <= {"scale_embed", "low_embed", "high_embed"}
    return plain, net


def guide(rows, scale, low=0.0, high=1.0):
    return torch.tensor([scale, low, high], dtype=torch.float64).repeat(len(rows.t), 1)


def objective_of(mix, *, has_head=False, **loss):
    settings = Loss(**({"tangent": "network", "clamp": 0.0} | loss))
    return Objective(loss=settings, guidance=mix, y_null=10, has_labels=True, bf16=False, has_head=has_head)


def random_rows(mix, n_equal=4, count=8):
    """Rows as the trainer draws them."""
    draws = step_draws(3, 0, batch=count, shape=(4, 8, 8), device=HOST)
    t, r = sample_times(draws.normals, n_equal, time_laws(load_recipe("imf-b2").times))
    drawn = row_draws(t, r, draws, n_equal, mix).double()
    x = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    rows = Rows(x, draws.noise.double(), drawn[0], drawn[1], torch.arange(count), drawn[2], n_equal)
    return replace(rows, guide=guide_of(drawn))


def asking(rows, mix, *, tangent):
    question = ask(rows.t, rows.uniforms, rows.n_equal, mix, HOST, guide=rows.guide, tangent=tangent)
    return replace(rows, question=question)


def gradients(net, rows, alpha, objective, names=None):
    result = training_step(net, net, rows, alpha=alpha, objective=objective)
    wanted = [weight for name, weight in net.named_parameters() if names is None or name in names]
    return result, torch.autograd.grad(result.loss, wanted, materialize_grads=True)


@pytest.mark.parametrize("interval", ["fixed", "drawn"])
@pytest.mark.parametrize("case", ["a1_b2cfg", "a05_b2cfg", "a0_b2cfg"])
def test_a_scale_of_2_on_every_row_that_is_not_heeded_is_the_published_kappa_of_a_half(case, interval):
    _, meta, rows, fixed = golden_case(case)
    plain, net = golden_net(("scale", "interval") if interval == "drawn" else ("scale",))
    mix = replace(fixed.guidance, omega=1.0, kappa=0.0, scale="drawn", interval=interval)
    # drawn ends are inside, those of (0, 1) are not; with a drawn interval labels are dropped at t = 0 as well
    rows = replace(rows, uniforms=torch.where(rows.t > 0, rows.uniforms, 1.0))
    told = replace(rows, guide=guide(rows, 2.0, 1e-9, 1 - 1e-9))
    names = [name for name, _ in plain.named_parameters()]
    expected, theirs = gradients(plain, rows, meta["alpha"], fixed)
    result, ours = gradients(net, told, meta["alpha"], replace(fixed, guidance=mix), names)
    assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    assert_close(result.target, expected.target, 1e-12)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_a_scale_of_1_is_no_guidance_and_asks_for_the_tangent_alone(alpha):
    _, _, rows, fixed = golden_case("a0_b2cfg")
    plain, net = golden_net(("scale",))
    unguided = objective_of(replace(fixed.guidance, omega=1.0, kappa=0.0))
    drawn = objective_of(replace(fixed.guidance, omega=1.0, kappa=0.0, scale="drawn"))
    names = [name for name, _ in plain.named_parameters()]
    told = asking(replace(rows, guide=guide(rows, 1.0)), drawn.guidance, tangent=alpha < 1)
    assert told.question.n_null == int(alpha == 1.0), "of nothing, one row all the same"
    assert len(told.question.places) == (1 if alpha == 1.0 else 5)
    expected, theirs = gradients(plain, rows, alpha, unguided)
    result, ours = gradients(net, told, alpha, drawn, names)
    assert_close(result.target, expected.target, 1e-12)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_drawn_intervals_that_all_are_whole_are_the_scale_alone(alpha):
    (_, one), (_, both) = golden_net(("scale",)), golden_net(("scale", "interval"))
    both.load_state_dict(one.state_dict(), strict=False)
    rows = random_rows(SCALE)
    assert (rows.guide[:, 1:] == torch.tensor([0.0, 1.0])).all()
    names = [name for name, _ in one.named_parameters()]
    expected, theirs = gradients(one, rows, alpha, objective_of(SCALE))
    result, ours = gradients(both, rows, alpha, objective_of(DRAWN), names)
    assert_close(result.target, expected.target, 1e-12)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("mix", [DRAWN, SCALE, Guidance(1.0, 0.5, 0.2, 0.8, 0.3), Guidance(0.2, 0.92, 0.0, 0.75, 0.3)])
def test_asking_about_the_needed_rows_only_changes_no_gradient(mix, alpha):
    inputs = "scale+interval" if mix.interval == "drawn" else "scale" if mix.scale == "drawn" else "no inputs"
    net, objective = random_net(design=design(f"{inputs}, tokens, modern, head 2")), objective_of(mix, has_head=True)
    rows = random_rows(mix)
    some, every = asking(rows, mix, tangent=alpha < 1), rows
    assert len(some.question.places) < 12
    for a, b in zip(gradients(net, some, alpha, objective)[1], gradients(net, every, alpha, objective)[1], strict=True):
        assert_close(a, b, 1e-10)


# The velocity head.


def with_copies():
    """A network, and the same with a head whose blocks and last layer are copies of those that lead to u."""
    plain, net = (random_net(design=design(f"no inputs, adaln, dit, head {head}")) for head in ("None", "2"))
    net.load_state_dict(plain.state_dict(), strict=False)
    for block, twin in zip(net.velocity_blocks, list(plain.blocks)[-2:], strict=True):
        block.load_state_dict(twin.state_dict())
    net.velocity_final.load_state_dict(plain.final.state_dict())
    return plain, net


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_a_head_with_us_own_weights_leaves_target_and_gradient_of_us_own_blocks(alpha):
    mix = Guidance(1.0, 0.5, 0.0, 1.0, 0.25)
    rows, (plain, net) = random_rows(mix), with_copies()
    with torch.no_grad():
        u, v_hat = net(rows.x, rows.t, rows.r, rows.y, heads="both")
        assert torch.equal(u, v_hat)
    expected, theirs = gradients(plain, rows, alpha, objective_of(mix))
    names = [name for name, _ in plain.named_parameters()]
    result, ours = gradients(net, rows, alpha, objective_of(mix, has_head=True), names)
    assert_close(result.target, expected.target, 1e-12)
    own = [i for i, name in enumerate(names) if name.startswith(("blocks.1", "blocks.2", "final"))]
    assert len(own) > 20
    for i in own:
        assert_close(ours[i], theirs[i], 1e-12)
    shared = names.index("blocks.0.mlp.fc1.weight")
    assert (ours[shared] - theirs[shared]).abs().max() > 1e-6, "the head teaches what is shared too"


def test_the_head_learns_the_guided_velocity_on_every_row_whatever_alpha():
    net, rows = random_net(design=design("no inputs, adaln, dit, head 2")), random_rows(Guidance())
    expected = None
    for alpha in (1.0, 0.5, 0.0):
        objective = objective_of(Guidance(), has_head=True, later=0.3, tangent="data")
        result = training_step(net, net, rows, alpha=alpha, objective=objective)
        v_hat = net(rows.x * (1 - rows.t)[:, None, None, None] + rows.t[:, None, None, None] * rows.noise,
                    rows.t, rows.r, rows.y, heads="both")[1]  # fmt: skip
        error = (v_hat - (rows.noise - rows.x)).square().flatten(1).mean(1)
        assert_close(result.terms.head, error.detach(), 1e-12)
        names = {name for name, _ in net.named_parameters() if name.startswith("velocity")}
        grads = gradients(net, rows, alpha, objective, names)[1]
        weighted = torch.autograd.grad(
            (error / (error.detach() + 1e-3)).sum(), [w for name, w in net.named_parameters() if name in names]
        )
        for a, b in zip(grads, weighted, strict=True):
            assert_close(a, b, 1e-12)
        assert expected is None or all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True)) or alpha == 0.0
        expected = grads


# What has no published numbers: the curriculum of α with these inputs.


def test_as_alpha_falls_the_gradient_tends_to_improved_meanflows():
    net = random_net(design=design("scale+interval, tokens, modern, head 2"))
    rows, objective = random_rows(DRAWN), objective_of(DRAWN, has_head=True, weight="none")
    limit = torch.cat([grad.flatten() for grad in gradients(net, rows, 0.0, objective)[1]])
    errors = []
    for alpha in (0.02, 0.01, 0.005):
        here = torch.cat([grad.flatten() for grad in gradients(net, rows, alpha, objective)[1]])
        errors.append(((here - limit).norm() / limit.norm()).item())
    assert errors[0] < 0.5
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.15)


def test_between_the_point_z_s_lies_along_the_networks_velocity_and_is_told_what_the_row_is_told():
    net, calls = random_net(design=design("scale+interval, tokens, modern, head 2")), []
    net.register_forward_pre_hook(
        lambda module, inputs, named: calls.append((inputs, named)), with_kwargs=True, prepend=True
    )
    rows = random_rows(DRAWN)
    result = training_step(net, net, rows, alpha=0.25, objective=objective_of(DRAWN, has_head=True))
    _, ((z_s, s, r, _), named) = calls
    assert torch.equal(named["guide"], rows.guide[4:])
    assert named.get("heads", "u") == "u"
    t = rows.t[4:]
    assert_close(s, t - 0.25 * (t - r), 1e-12)
    acts = guidance.in_own_interval(t, rows.guide[4:, 1], rows.guide[4:, 2]) & (rows.guide[4:, 0] > 1)
    scale = torch.where(acts, rows.guide[4:, 0], 1.0)
    told = torch.stack([scale, 0 * scale, 0 * scale + 1], 1)
    t4 = rows.t[4:, None, None, None]
    z_t = (1 - t4) * rows.x[4:] + t4 * rows.noise[4:]
    with torch.no_grad():
        along = net(z_t, t, t, rows.y[4:], guide=told, heads="velocity")
        u_s = net(z_s, s, r, rows.y[4:], guide=rows.guide[4:])
    assert_close(z_s, z_t - (t - s)[:, None, None, None] * along, 1e-10)
    assert_close(result.target[4:], 0.25 * result.v_guided[4:] + 0.75 * u_s, 1e-10)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_a_bf16_step_gives_every_weight_nearly_its_gradient(alpha):
    net = random_net(torch.float32, design=design("scale+interval, tokens, modern, head 2"))
    rows, objective = random_rows(DRAWN), objective_of(DRAWN, has_head=True)
    names = ("x", "noise", "t", "r", "uniforms", "guide")
    rows = replace(rows, **{name: getattr(rows, name).float() for name in names})
    exact = torch.cat([grad.flatten() for grad in gradients(net, rows, alpha, objective)[1]])
    grads = gradients(net, rows, alpha, replace(objective, bf16=True))[1]
    assert all(grad.dtype == torch.float32 for grad in grads)
    assert (torch.cat([grad.flatten() for grad in grads]) - exact).norm() < 0.1 * exact.norm()


def test_the_conflict_is_measured_with_what_each_row_is_told_and_without_the_heads_loss():
    recipe = load_recipe("imf-b2", [
        "model.dim=48", "model.depth=3", "model.heads=4", "model.velocity_head=2", "data.image_size=64",
        "data.latent_size=8", "data.classes=10", "train.precision=fp64",
    ])  # fmt: skip
    net, objective = random_net(design=design("scale+interval, tokens, modern, head 2")), Objective.of(recipe)
    x = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    rows = conflict.conflict_rows(recipe, x, torch.arange(12) % 10, seed=1, index=3)
    assert rows.n_equal == 0
    assert len(rows.guide.unique(dim=0)) == 12
    assert not (rows.uniforms < 1).any(), "labels are dropped on r = t rows only"
    later = conflict.prepare_rows(net, rows, objective)
    assert torch.equal(later.guide, rows.guide)
    assert torch.equal(later.y, rows.y)
    result = training_step(net, net, rows, alpha=0.0, objective=objective)
    assert_close(later.v_guided, result.v_guided, 1e-10)
    h = (later.t - later.r)[:, None, None, None]
    assert_close(later.v_guided - h * later.du, result.target, 1e-10)
    sizes = conflict.sizes_over_alpha(net, rows, objective, [0.002, 0.0])["converging"]
    assert sizes[0]["cosine"] == pytest.approx(1.0, abs=0.01), "of u's loss alone"
    assert sizes[0]["size"] == pytest.approx(1.0, abs=0.05)


# What it costs.


def test_the_velocity_is_asked_of_a_row_and_a_quarter_per_row_in_the_mean():
    recipe = load_recipe("imf-b2")
    each = mean_asked_rows(recipe, 512, compiled=False, tangent=True) / 1024
    kept = 0.5 * (1 - 0.1 / 0.5)  # r = t rows with a label: ∅
    inside = 0.5 * 0.698  # r < t rows inside their interval: ∅; every r < t row: its own at w'
    assert each == pytest.approx(kept + inside + 0.5, abs=0.01)
    assert each == pytest.approx(1.25, abs=0.01)
    assert mean_asked_rows(recipe, 512, compiled=True, tangent=True) / 1024 == 1.5, "compiled: all that could be"
    counted = mean_step_flops(recipe, 0.0, 512, compiled=False)
    units = (3 + each + speed.TANGENT * 0.5) * speed.forward_flops(recipe) + 3 * speed.velocity_flops(recipe)
    assert counted == pytest.approx(1024 * units, rel=1e-12)


def test_no_velocity_is_asked_twice():
    mix, rows = DRAWN, random_rows(DRAWN, count=400, n_equal=200)
    question = ask(rows.t, rows.uniforms, 200, mix, HOST, guide=rows.guide, tangent=True)
    null, own = question.places[: question.n_null].tolist(), question.places[question.n_null :].tolist()
    dropped = (rows.uniforms < mix.label_dropout).nonzero().flatten().tolist()
    assert len(set(null)) == len(null)
    assert own == list(range(200, 400)), "each r < t row once, for its tangent"
    assert set(null[: question.n_null_equal]) == set(range(200)) - set(dropped)
    inside = guidance.in_own_interval(rows.t, rows.guide[:, 1], rows.guide[:, 2]).nonzero().flatten().tolist()
    assert set(null[question.n_null_equal :]) == set(range(200, 400)) & set(inside)
    assert max(dropped) < 200


@pytest.mark.parametrize("n_equal", [100, 1000])
def test_labels_are_dropped_on_equal_rows_only_and_as_often_in_all(n_equal):
    uniforms = torch.rand(2000, generator=torch.Generator().manual_seed(1))
    dropped = guidance.only_equal_rows(uniforms, n_equal) < 0.04
    assert not dropped[n_equal:].any()
    assert dropped.float().mean().item() == pytest.approx(0.04, abs=0.01)
    assert not (guidance.only_equal_rows(uniforms, 0) < 0.99).any()
