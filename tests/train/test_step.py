"""The fast step is the published step: same gradients, same curve, its golden numbers; and it wastes nothing."""

import json
import math
from dataclasses import replace

import pytest
import torch
from golden_data import FOLDER, LABEL_ROWS, LOSS_META, arrays, assert_close, golden_case, labels, network, tensor
from reference_step import reference_step
from workload import CLASSES, Size, asking, build, draw

from alphaflow_cli.convert.shape import to_published
from alphaflow_cli.core.alpha import schedule_value
from alphaflow_cli.model.compiling import compile_blocks
from alphaflow_cli.recipe.schema import Guidance, Loss
from alphaflow_cli.train.questions import ask
from alphaflow_cli.train.step import Objective, Rows, training_step

TINY = Size(dim=32, depth=2, heads=4, latent=8)
BOUNDARY_META = json.loads((FOLDER / "imf_boundary_meta.json").read_text())
GUIDANCE = {
    "none": Guidance(),
    "b2": Guidance(omega=1.0, kappa=0.5),
    "xl2": Guidance(0.2, 0.92, 0.0, 0.75),
    "no null": Guidance(0.4, 0.6, 0.2, 0.8),  # 1 − ω − κ = 0
    "null only": Guidance(1.5, 0.0),
}


def tiny_net(dtype=torch.float64):
    return build(TINY, seed=0, device="cpu", dtype=dtype)


def tiny_rows(share, dtype=torch.float64, seed=0, batch=8):
    return draw(TINY, batch, share, seed=seed, device="cpu", dtype=dtype)


def objective_of(guidance, **loss):
    return Objective(loss=Loss(**loss), guidance=guidance, y_null=CLASSES, has_labels=True, bf16=False)


def gradients(net, loss):
    return torch.autograd.grad(loss, list(net.parameters()))


def largest_difference(a, b):
    """Of two lists of gradients, relative to the whole gradient."""
    return max((p - q).abs().max() for p, q in zip(a, b, strict=True)) / torch.cat([q.flatten() for q in b]).abs().max()


@pytest.mark.parametrize(("dropout", "asked"), [(0.0, "all"), (0.3, "all"), (0.0, "needed"), (0.3, "needed")])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("mix", list(GUIDANCE))
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_gradients_equal_those_of_the_published_way(alpha, mix, share, dropout, asked):
    net, rows = tiny_net(), tiny_rows(share)
    rows.r[-1] = rows.t[-1]  # a tie among the r < t rows
    objective = objective_of(replace(GUIDANCE[mix], label_dropout=dropout))
    rows = asking(rows, objective) if asked == "needed" else rows
    fast = training_step(net, net, rows, alpha=alpha, objective=objective).loss
    slow = reference_step(net, rows, alpha=alpha, objective=objective)
    assert fast.item() == pytest.approx(slow.item(), rel=1e-13)
    assert largest_difference(gradients(net, fast), gradients(net, slow)) < 1e-12


def test_guidance_asks_about_no_row_that_need_not_be_asked():
    """4 r = t rows, 4 others; the interval is (.2, .8), and a label is dropped below .3."""
    t = torch.tensor([0.5, 0.5, 0.1, 0.5, 0.5, 0.5, 0.9, 0.5])
    uniforms = torch.tensor([0.1, 0.9, 0.1, 0.9, 0.1, 0.9, 0.9, 0.9])
    for mix, null, own in (
        (Guidance(1.0, 0.5, 0.2, 0.8, 0.3), [1, 3, 4, 5, 7], [5, 7]),
        (Guidance(0.4, 0.6, 0.2, 0.8, 0.3), [], [4, 5, 7]),
        (Guidance(1.5, 0.0, 0.2, 0.8, 0.3), [1, 3, 4, 5, 7], []),
    ):
        question = ask(t, uniforms, 4, mix, torch.device("cpu"))
        assert question.places.tolist() == null + own, mix
        assert (question.n_null, question.n_null_equal) == (len(null), len([row for row in null if row < 4]))
    outside = ask(torch.full((8,), 0.1), uniforms, 4, Guidance(1.0, 0.5, 0.2, 0.8, 0.3), torch.device("cpu"))
    assert outside.places.tolist() == [0], "never none: sharded networks are called on every process"


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_gradients_are_equal_where_all_rows_are_of_one_kind(alpha, share):
    net, rows, objective = tiny_net(), tiny_rows(share), objective_of(GUIDANCE["b2"], reduction="sum", c=1.0)
    fast = training_step(net, net, rows, alpha=alpha, objective=objective).loss
    slow = reference_step(net, rows, alpha=alpha, objective=objective)
    assert largest_difference(gradients(net, fast), gradients(net, slow)) < 1e-12


def curve(step, steps):
    """Losses of a run whose α goes from 1 to 0, with the trainer's optimiser."""
    net, objective = tiny_net(), objective_of(replace(GUIDANCE["b2"], label_dropout=0.3))
    adam = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    losses = []
    for i in range(steps):
        p = i / steps
        alpha = 1.0 if p < 0.3 else 0.0 if p > 0.7 else (0.7 - p) / 0.4
        loss = step(net, tiny_rows(0.25, seed=i), alpha, objective) / 8
        losses.append(loss.item())
        adam.zero_grad(set_to_none=False)
        loss.backward()
        adam.step()
    return torch.tensor(losses, dtype=torch.float64)


def fast_step(net, rows, alpha, objective):
    return training_step(net, net, rows, alpha=alpha, objective=objective).loss


def asking_step(net, rows, alpha, objective):
    return fast_step(net, asking(rows, objective), alpha, objective)


def slow_step(net, rows, alpha, objective):
    return reference_step(net, rows, alpha=alpha, objective=objective)


def test_the_loss_curve_of_200_steps_is_the_published_ways_to_rounding():
    fast, slow = curve(asking_step, 200), curve(slow_step, 200)
    assert fast.std() > 1e-3
    assert (fast - slow).abs().max() < 1e-9


def test_fused_adam_and_the_step_are_bit_reproducible():
    assert torch.equal(curve(fast_step, 12), curve(fast_step, 12))


@pytest.mark.parametrize("case", sorted(LOSS_META))
def test_the_step_gives_the_published_losses_and_gradients(case):
    which, meta, rows, objective = golden_case(case)
    net = network(which)
    result = training_step(net, net, rows, alpha=meta["alpha"], objective=objective)
    total = result.loss / len(rows.t)
    assert total.item() == pytest.approx(meta["total_loss"], rel=1e-9, abs=1e-9)
    assert_close(result.target, tensor("loss_f64.npz", f"{case}/target"))
    for name, value in {
        "velocity_cfg": result.v_guided,
        "loss_unscaled": result.terms.error,
        "loss_tfm": result.terms.trajectory,
        "loss_tcc": result.terms.consistency,
    }.items():
        if f"{case}/{name}" in arrays("loss_f64.npz"):
            assert_close(value, tensor("loss_f64.npz", f"{case}/{name}").reshape(value.shape))
    total.backward()
    check_gradients(net, case, meta)


@pytest.mark.parametrize("asked", ["all", "needed"])
@pytest.mark.parametrize("case", sorted(BOUNDARY_META))
def test_the_step_with_the_boundary_tangent_gives_the_reference_losses_and_gradients(case, asked):
    file, meta = "imf_boundary_f64.npz", BOUNDARY_META[case]
    x, noise, t, r, uniforms = (tensor("loss_inputs.npz", name) for name in ("x", "noise", "t", "r", "label_rand"))
    mix = Guidance(**{key: meta[key] for key in ("omega", "kappa", "t_min", "t_max", "label_dropout")})
    loss = Loss(tangent="network", clamp=meta["clamp"], c=meta["c"], reduction=meta["reduction"])
    objective = Objective(loss=loss, guidance=mix, y_null=LABEL_ROWS["M"] - 1, has_labels=True, bf16=False)
    y = labels(torch.tensor(arrays("loss_inputs.npz")["label"]), "M")
    question = ask(t, uniforms, meta["n_fm"], mix, t.device, tangent=True) if asked == "needed" else None
    net, rows = network("M"), Rows(x, noise, t, r, y, uniforms, meta["n_fm"], question)
    result = training_step(net, net, rows, alpha=meta["alpha"], objective=objective)
    total = result.loss / len(t)
    assert total.item() == pytest.approx(meta["total_loss"], rel=1e-9)
    ours = {
        "target": result.target, "velocity_cfg": result.v_guided, "loss_tfm": result.terms.trajectory,
        "loss_tcc": result.terms.consistency,
    }  # fmt: skip
    for name in (name for name in ours if f"{case}/{name}" in arrays(file)):
        assert_close(ours[name], tensor(file, f"{case}/{name}").reshape(ours[name].shape))
    total.backward()
    check_gradients(net, case, meta, file)


def check_gradients(net, case, meta, file="loss_f64.npz"):
    ours = {f"model.{to_published(name)}": weight.grad for name, weight in net.named_parameters()}
    prefix = f"{case}/grad/"
    stored = [name.removeprefix(prefix) for name in arrays(file) if name.startswith(prefix)]
    assert len(stored) > 10
    for name in stored:
        key, _, rows = name.partition("[:")
        grad = ours[key] if not rows else ours[key][: int(rows.rstrip("]"))]
        assert_close(grad, tensor(file, prefix + name).reshape(grad.shape))
    for key, norm in meta["grad_norm"].items():
        assert ours[key].norm().item() == pytest.approx(norm, rel=1e-9, abs=1e-12), key


@pytest.mark.parametrize("case", [case for case in sorted(LOSS_META) if f"{case}/weight" in arrays("loss_f64.npz")])
def test_the_weight_of_each_row_is_the_published_one(case):
    which, meta, rows, objective = golden_case(case)
    net = network(which)
    weights = []
    for i in range(len(rows.t)):  # one row at a time: loss of the row ÷ its error is its weight
        row = {name: getattr(rows, name)[i : i + 1] for name in ("x", "noise", "t", "r", "y", "uniforms")}
        one = Rows(**row, n_equal=int(i < rows.n_equal))
        result = training_step(net, net, one, alpha=meta["alpha"], objective=objective)
        weights.append(result.loss.detach() / result.terms.error)
    assert_close(torch.cat(weights), tensor("loss_f64.npz", f"{case}/weight").flatten())


@pytest.mark.parametrize(("alpha", "guided", "expected"), [
    (1.0, False, [True]), (1.0, True, [True]), (0.5, False, [True, False]),
    (0.5, True, [True, False]), (0.0, False, [True]), (0.0, True, [False, True]),
])  # fmt: skip
def test_there_is_one_graded_call_and_at_most_one_other(alpha, guided, expected):
    """Of the network as a whole; whether it had a gradient, in order."""
    net, calls = tiny_net(), []
    net.register_forward_pre_hook(lambda module, inputs: calls.append(torch.is_grad_enabled()))
    training_step(net, net, tiny_rows(0.25), alpha=alpha, objective=objective_of(GUIDANCE["b2" if guided else "none"]))
    assert calls == expected


@pytest.mark.parametrize("weight", ["adaptive", "converging", "none"])
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_an_infinite_error_of_one_row_makes_every_gradient_nan(alpha, weight):
    """Its weight alone, 1/∞, would make the row's gradient 0, and all others would look well."""
    net, objective = tiny_net(torch.float32), objective_of(GUIDANCE["none"], weight=weight, clamp=0.0)
    torch.nn.init.normal_(net.final.linear.weight, std=0.1)
    fine = tiny_rows(0.5, torch.float32)
    far = replace(fine, x=torch.cat([fine.x[:1] * 1e30, fine.x[1:]]), t=torch.cat([torch.ones(1), fine.t[1:]]))
    far.r[0] = 1.0  # z_t is the noise there, and u finite, but not (u − v)²
    for rows, is_finite in ((fine, True), (far, False)):
        result = training_step(net, net, rows, alpha=alpha, objective=objective)
        assert result.terms.error.isfinite().all() == is_finite
        grads = gradients(net, result.loss)
        assert all(grad.isfinite().all() == is_finite for grad in grads), "the optimiser would take the step"


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_a_bf16_step_gives_every_weight_its_gradient(alpha):
    net = tiny_net(torch.float32)
    objective = objective_of(GUIDANCE["b2"])
    exact = gradients(net, fast_step(net, tiny_rows(0.5, torch.float32), alpha, objective))
    close = gradients(net, fast_step(net, tiny_rows(0.5, torch.float32), alpha, replace(objective, bf16=True)))
    assert all(grad.dtype == torch.float32 for grad in close)
    assert math.sqrt(sum((a - b).square().sum() for a, b in zip(close, exact, strict=True))) < 0.1 * math.sqrt(
        sum(b.square().sum() for b in exact)
    )


@pytest.mark.parametrize(("alpha", "is_precise"), [(1.0, False), (0.05, False), (0.04, True), (0.0, False)])
def test_below_this_alpha_a_bf16_step_is_an_fp32_step_to_the_bit(alpha, is_precise):
    net, rows = tiny_net(torch.float32), tiny_rows(0.5, torch.float32)
    fp32 = objective_of(GUIDANCE["b2"])
    rounded = replace(fp32, bf16=True)
    here, exact, close = (
        gradients(net, fast_step(net, rows, alpha, objective))
        for objective in (replace(rounded, precise_below=0.05), fp32, rounded)
    )
    assert all(torch.equal(a, b) for a, b in zip(here, exact if is_precise else close, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(exact, close, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of dynamo itself
def test_nothing_is_recompiled_while_alpha_moves():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    net = compile_blocks(tiny_net(torch.float32), backend="aot_eager")
    ramp = {"kind": "sigmoid", "initial": 1.0, "final": 0.0, "start": 0, "end": 60, "gamma": 25.0, "clamp": 0.005}
    graphs, alphas = {}, [schedule_value(step, **ramp) for step in range(61)]
    for step, alpha in enumerate(alphas):
        loss = fast_step(net, tiny_rows(0.25, torch.float32, seed=step), alpha, objective_of(GUIDANCE["b2"]))
        loss.backward()
        phase = "one" if alpha == 1.0 else "zero" if alpha == 0.0 else "between"
        graphs.setdefault(phase, set()).add(counters["stats"]["unique_graphs"])
    assert len(set(alphas)) > 20
    assert graphs == {"one": {2}, "between": {4}, "zero": {8}}  # two parts (block, final) of each form
    for alpha in (1.0, 0.5, 0.0):  # another number of rows: new forms, for which there is room
        fast_step(net, tiny_rows(0.25, torch.float32, batch=12), alpha, objective_of(GUIDANCE["b2"])).backward()
    assert counters["stats"]["unique_graphs"] == 16
    assert not counters["graph_break"]
