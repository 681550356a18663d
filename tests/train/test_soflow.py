"""SoFlow's recipe, through the trainer's own step, network, optimiser and averages, gives what the published code does.

The recipe is the shipped one, made small; a case changes only what its settings say. Where the published loss is no
square (−mean(u q) / (mean q² + c)^p, q = (target − u) / α), its value is computed here from the step's u and target.
"""

import json

import numpy as np
import pytest
import torch
from golden_data import FOLDER, arrays, assert_close, tensor

from alphaflow_cli.convert.shape import to_our_names, to_published
from alphaflow_cli.core import ema, guidance, objective, sampler
from alphaflow_cli.core.alpha import schedule_value
from alphaflow_cli.core.pixels import to_uint8
from alphaflow_cli.core.times import sample_times
from alphaflow_cli.model.build import build_network
from alphaflow_cli.nn.tangent import Beside
from alphaflow_cli.recipe import load_recipe, plan
from alphaflow_cli.train.optimise import Optimiser
from alphaflow_cli.train.questions import ask
from alphaflow_cli.train.step import Objective, Rows, time_laws, training_step

META = json.loads((FOLDER / "soflow_loss_meta.json").read_text())
RECIPES = json.loads((FOLDER / "soflow_recipes.json").read_text())
SMALL = (
    "model.dim=64", "model.depth=2", "model.heads=4", "model.patch=2", "data.image_size=64", "data.latent_size=8",
    "data.classes=10", "data.channels=4", "data.autoencoder=tiny", "train.precision=fp64", "train.tf32=false",
)  # fmt: skip
CIFAR = ("model.second_init=xavier", "guidance.omega=1", "guidance.kappa=0", "guidance.dropped=guided")


def small(name, *sets):
    return load_recipe(name, [*SMALL, *sets])


def of_model(which):
    """Model A has a null row; B has none, and knows no guidance."""
    if which == "A":
        return small("soflow-b4")
    plain = ("guidance.omega=1", "guidance.kappa=0", "guidance.dropped=guided", "guidance.fade_from=null")
    return small("soflow-b4", *plain, "guidance.label_dropout=0")


def network(which, recipe):
    """The recipe's network with the golden weights A or B."""
    net = build_network(recipe).double()
    state = {name.removeprefix("network."): torch.tensor(v) for name, v in arrays(f"soflow_state_{which}.npz").items()}
    net.load_state_dict(to_our_names(state, which, second="s_embedder."))
    return net


def their_name(name):
    """A parameter's name in the published code."""
    spelled = to_published(name).replace("noise_labels_next_embedder", "s_embedder")
    return "network." + spelled.replace("noise_labels_embedder", "t_embedder")


def case_recipe(meta):
    """The shipped recipe with what the case's settings say: kind of α, guidance, share; labels none: the null label."""
    alpha = [f"alpha.kind={meta['kind']}", f"alpha.initial={meta['a0'] if meta['kind'] != 'constant' else meta['a1']}"]
    sets = [*alpha, f"alpha.final={meta['a1']}", f"times.equal_share={meta['equal_share']}"]
    sets.append(f"train.steps={meta['total_steps']}")
    if not meta["labels"]:
        return small("cifar10-soflow", *sets, *CIFAR)
    w, m = meta["w"], meta["m"]
    sets += [f"guidance.omega={m * w}", f"guidance.kappa={1 - m}", f"guidance.label_dropout={meta['dropout']}"]
    if w == 1:
        sets += ["guidance.fade_from=null", "guidance.dropped=guided"]
    else:
        sets.append(f"guidance.fade_from={meta['T']}")
    return small("soflow-b4", *sets)


class Case:
    """A step of a golden case: what the trainer computed, and the calls of the network in between."""

    def __init__(self, name):
        self.name, self.meta = name, META[name]
        recipe = case_recipe(self.meta)
        self.net, self.objective = network(self.meta["model"], recipe), Objective.of(recipe)
        normals = torch.stack([self.golden(f"z_{kind}") for kind in ("equal", "first", "second")])
        self.k, step = self.meta["n_equal"], self.meta["step"]
        self.t, self.r = sample_times(normals, self.k, time_laws(recipe.times))
        self.alpha = plan.alpha_at(recipe)(step)
        labelled = self.meta["labels"]
        x, noise = (tensor("soflow_loss_inputs.npz", key) for key in ("x" if labelled else "x_cifar", "noise"))
        y = tensor("soflow_loss_inputs.npz", "y") if labelled else torch.full((12,), self.objective.y_null)
        self.uniforms = tensor("soflow_loss_inputs.npz", self.meta["uniforms"])
        question = None
        if self.objective.is_guided:
            question = ask(self.t, self.uniforms, self.k, self.objective.guidance, torch.device("cpu"))
        self.rows = Rows(x, noise, self.t, self.r, y, self.uniforms, self.k, question)
        self.calls = []
        hook = self.net.register_forward_hook(lambda module, inputs, output: self.calls.append(output))
        self.result = training_step(self.net, self.net, self.rows, alpha=self.alpha, objective=self.objective)
        hook.remove()
        first = self.calls[0]
        self.u = (first.value if isinstance(first, Beside) else first).detach()
        self.ratio = torch.as_tensor(
            objective.row_alpha(self.alpha, self.t[self.k :], self.r[self.k :], recipe.times.gap)
        )

    def golden(self, key):
        return tensor("soflow_loss_f64.npz", f"{self.name}/{key}")


@pytest.fixture(scope="module", params=META)
def case(request):
    return Case(request.param)


def test_the_times_and_the_ratio_of_every_row_are_the_published_ones(case):
    assert case.alpha == pytest.approx(case.meta["a"], rel=1e-12)
    assert_close(case.t, case.golden("t"))
    assert_close(case.r, case.golden("r"))
    assert_close(case.ratio, case.golden("alpha_row"))
    s = objective.intermediate_time(case.t[case.k :], case.r[case.k :], case.ratio)
    assert_close(torch.cat([case.t[: case.k], s]), case.golden("s"))


def test_prediction_velocity_target_and_error_of_every_row_are_the_published_ones(case):
    assert_close(case.u, case.golden("u"))
    assert_close(case.result.v_guided, case.golden("v_guided"))
    assert_close(case.result.target, case.golden("target"))
    assert_close(case.result.terms.error, case.golden("l"))
    if case.alpha < 1:
        assert_close(case.calls[-1], case.golden("u_s"))


def test_the_labels_that_are_dropped_are_the_published_ones(case):
    if case.objective.has_labels and case.objective.guidance.label_dropout and case.meta["labels"]:
        dropped = case.uniforms < case.objective.guidance.label_dropout
        assert torch.equal(dropped, case.golden("dropped").bool())


def test_the_published_losses_follow_from_the_target(case):
    meta, k, c, p = case.meta, case.k, case.meta["c"], case.meta["p"]
    target, error = case.result.target, case.result.terms.error
    equal = error[:k] / (error[:k] + c) ** p
    q = (target[k:] - case.u[k:]) / case.ratio[:, None, None, None]
    q2 = q.square().flatten(1).mean(1)
    later = -(case.u[k:] * q).flatten(1).mean(1) / (q2 + c) ** p
    weight = torch.cat([(error[:k] + c) ** -p, (q2 + c) ** -p])
    assert_close(weight, case.golden("weight_published"))
    assert later.mean().item() == pytest.approx(meta["later_loss"], rel=1e-9)
    assert q2.mean().item() == pytest.approx(meta["later_mean_q2"], rel=1e-9)
    assert torch.cat([equal, later]).mean().item() == pytest.approx(meta["total_loss"], rel=1e-9)


def test_the_weights_are_the_published_ones_times_alpha_and_half_of_that_on_later_rows(case):
    weights, one_rows = [], ("x", "noise", "t", "r", "y", "uniforms")
    for i in range(12):  # one row at a time: loss of the row ÷ its error is its weight
        one = Rows(**{name: getattr(case.rows, name)[i : i + 1] for name in one_rows}, n_equal=int(i < case.k))
        result = training_step(case.net, case.net, one, alpha=case.alpha, objective=case.objective)
        weights.append((result.loss / result.terms.error).detach())
    factor = torch.cat([torch.ones(case.k), 0.5 / case.ratio])
    assert_close(torch.stack(weights).flatten(), factor * case.golden("weight_published"))


def test_the_gradients_are_the_published_ones(case):
    case.net.zero_grad()
    loss = training_step(case.net, case.net, case.rows, alpha=case.alpha, objective=case.objective).loss / 12
    loss.backward()
    ours = {their_name(name): weight.grad for name, weight in case.net.named_parameters()}
    assert ours["network.pos_embed"] is None
    stored = [name for name in arrays("soflow_loss_f64.npz") if name.startswith(f"{case.name}/grad/")]
    assert len(stored) > 10
    for name in stored:
        key, _, rows = name.removeprefix(f"{case.name}/grad/").partition("[:")
        expected = tensor("soflow_loss_f64.npz", name)
        grad = ours[key] if not rows else ours[key][: int(rows.rstrip("]"))]
        assert (grad - expected).abs().max() < 1e-9 * expected.abs().max(), key
    for key, norm in case.meta["grad_norms"].items():
        assert norm is None or ours[key].norm().item() == pytest.approx(norm, rel=1e-9), key
    whole = torch.cat([grad.flatten() for grad in ours.values() if grad is not None]).norm()
    assert whole.item() == pytest.approx(case.meta["grad_norm"], rel=1e-9)


def test_every_stored_array_of_a_case_is_compared(case):
    stored = {key.split("/")[1] for key in arrays("soflow_loss_f64.npz") if key.startswith(f"{case.name}/")}
    inputs, compared = {"z_equal", "z_first", "z_second"}, {"t", "r", "s", "dropped", "u", "v_guided", "target", "l"}
    assert stored <= inputs | compared | {"weight_published", "alpha_row", "u_s", "grad"}


@pytest.mark.parametrize("which", ["A", "B"])
@torch.no_grad()
def test_the_network_predicts_the_published_average_velocity(which):
    z, t, r = (tensor("soflow_net_f64.npz", name) for name in ("z", "t", "r"))
    net = network(which, of_model(which))
    y = tensor("soflow_net_f64.npz", "y").clamp(max=10 if which == "A" else 9)
    u = net(z, t, r, y)
    assert_close(u, tensor("soflow_net_f64.npz", f"{which}/u"))
    assert_close(z - (t - r)[:, None, None, None] * u, tensor("soflow_net_f64.npz", f"{which}/f"))
    assert_close(net(z, t, t, y), tensor("soflow_net_f64.npz", f"{which}/u_t_t"))
    if which == "A":
        assert_close(net(z, t, r, torch.full_like(y, 10)), tensor("soflow_net_f64.npz", "A/u_label_none"))
    seen, parts = {}, {
        "x_embed": net.patch_embed, "t_embed": net.time_embed, "s_embed": net.second_embed, "y_embed": net.label_embed,
        "block0": net.blocks[0], "block1": net.blocks[1], "final_tokens": net.final,
    }  # fmt: skip
    for name, module in parts.items():
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.__setitem__(name, output))
    net(z[:4], t[:4], r[:4], y[:4])
    seen["c"] = net.condition(t[:4], r[:4], y[:4])
    for name, value in seen.items():
        assert_close(value, tensor("soflow_net_f64.npz", f"{which}/act/{name}"))


@pytest.mark.parametrize("name", ["b4", "cifar"])
def test_times_come_from_the_normals_as_published(name):
    laws = time_laws(load_recipe({"b4": "soflow-b4", "cifar": "cifar10-soflow"}[name]).times)
    normals = tensor("soflow_times_f64.npz", "normals")
    t, r = sample_times(normals, 0, laws)
    assert_close(t, tensor("soflow_times_f64.npz", f"{name}/t"))
    assert_close(r, tensor("soflow_times_f64.npz", f"{name}/r"))
    alpha = 0.1 if name == "b4" else 0.0003125**0.5
    ratio = objective.row_alpha(alpha, t, r, laws.gap)
    assert_close(objective.intermediate_time(t, r, ratio), tensor("soflow_times_f64.npz", f"{name}/s"))
    if name == "b4":
        assert_close(sample_times(normals, len(t), laws)[0], tensor("soflow_times_f64.npz", "b4/t_equal"))


def test_guidance_fades_as_published():
    t = tensor("soflow_guidance_f64.npz", "t")
    for start in ("0.8", "1"):
        ours = guidance.fade(t, start=float(start), rate=0.025)
        assert_close(ours, tensor("soflow_guidance_f64.npz", f"d_{start}"))


@pytest.mark.parametrize("name", json.loads((FOLDER / "soflow_schedules.json").read_text()))
def test_alpha_follows_the_published_schedules(name):
    stored = json.loads((FOLDER / "soflow_schedules.json").read_text())[name]
    total = stored["total_steps"]
    ends = {"initial": stored["a0"], "final": stored["a1"], "start": 0, "end": total, "gamma": 1.0, "clamp": 0.0}
    ours = [schedule_value(step, kind=stored["kind"], **ends) for step in stored["steps"]]
    assert ours == pytest.approx(stored["a"], rel=1e-12)


@pytest.mark.parametrize("name", ["nfe1", "nfe2", "nfe1_B"])
def test_the_recipes_sampler_walks_the_published_way(name):
    times = json.loads((FOLDER / "soflow_sampler_meta.json").read_text())[name]["times"]
    recipe = of_model("B" if name.endswith("_B") else "A")
    net = network("B" if name.endswith("_B") else "A", recipe)
    noise, y = (tensor("soflow_sampler_f64.npz", key) for key in ("noise", "y"))
    two = len(times) == 2
    grid = recipe.sample.two_step_times if two else sampler.time_grid(1)
    kind = recipe.sample.two_step_sampler if two else recipe.sample.sampler
    assert [pair[0] for pair in times] == list(grid[:-1])
    fresh = tensor("soflow_sampler_f64.npz", "fresh")
    draws = iter([*fresh, torch.zeros_like(noise)])  # the last step's is not used
    out = sampler.sample(net, noise, y.clamp(max=9), grid=grid, sampler=kind, fresh_noise=lambda: next(draws))
    assert_close(out, tensor("soflow_sampler_f64.npz", f"{name}/out"))


def test_the_average_is_the_published_one():
    weights, expected = (tensor("soflow_ema_f64.npz", f"imagenet/{key}") for key in ("weights", "ema"))
    settings = load_recipe("soflow-b4").ema
    average = weights[0].clone()
    for step, row in enumerate(expected):
        beta = ema.ema_beta(step, half_life=settings.half_lives[0], ramp=settings.ramp, every=settings.every)
        ema.update_ema([average], [weights[step + 1]], beta)
        assert_close(average, row)


def test_the_average_of_every_16_steps_moves_as_far_as_16_averages():
    settings = load_recipe("cifar10-soflow").ema
    betas = [ema.ema_beta(s, half_life=settings.half_lives[0], ramp=settings.ramp, every=16) for s in range(17)]
    assert betas[0] == betas[16] == pytest.approx(0.9999**16, rel=1e-13)
    assert betas[1:16] == [1.0] * 15


def test_six_whole_steps_leave_the_published_weights_and_averages():
    recipe = small("soflow-b4", "train.steps=6", "train.batch=16")
    net = network("A", recipe)
    optimiser, settings = Optimiser(net, recipe), Objective.of(recipe)
    inputs = {name: tensor("soflow_run_b4_f64.npz", name) for name in
              ("moments", "posterior", "noise", "z_equal", "z_first", "z_second", "uniforms", "y")}  # fmt: skip
    for step in range(6):
        now = {name: value[step] for name, value in inputs.items()}
        mean, std = now["moments"].chunk(2, dim=1)
        x = (mean + std * now["posterior"] - recipe.data.shift) * recipe.data.scale
        normals = torch.stack([now["z_equal"], now["z_first"], now["z_second"]])
        t, r = sample_times(normals, 12, time_laws(recipe.times))
        rows = Rows(x, now["noise"], t, r, now["y"], now["uniforms"], 12)
        result = training_step(net, net, rows, alpha=plan.alpha_at(recipe)(step), objective=settings)
        (result.loss / 16).backward()
        norm = torch.nn.utils.get_total_norm([w.grad for w in net.parameters() if w.grad is not None])
        stats = tensor("soflow_run_b4_f64.npz", "stats")[step]
        assert norm.item() == pytest.approx(float(stats[3]), rel=1e-9)
        optimiser.step(step)
        kept = {"raw": optimiser.raw(), "ema": optimiser.average()}
        for key in (k for k in arrays("soflow_run_b4_f64.npz") if k.startswith(f"step{step}/")):
            _, kind, name = key.split("/")
            ours = {their_name(n): value for n, value in kept[kind].items()}
            part, _, rows_kept = name.partition("[:")
            value = ours[part] if not rows_kept else ours[part][: int(rows_kept.rstrip("]"))]
            assert_close(value, tensor("soflow_run_b4_f64.npz", key))


def test_bytes_are_the_published_ones_but_for_exact_halves():
    stored = arrays("soflow_pixels.npz")
    x, byte = torch.tensor(stored["x"]), stored["byte"].astype(int)
    ours = to_uint8(x.reshape(1, 1, 1, -1), load_recipe("soflow-b4").data.pixels).flatten().numpy().astype(int)
    scaled = np.clip((stored["x"].astype(np.float64) + 1) * 127.5, 0, 255).flatten()
    half = np.abs(scaled - np.floor(scaled) - 0.5) < 1e-4
    assert (ours == byte.flatten())[~half].all()
    assert np.abs(ours - byte.flatten()).max() <= 1


def test_initialisation_has_the_published_statistics():
    stats = json.loads((FOLDER / "soflow_init_stats.json").read_text())
    sizes = ("model.dim=256", "data.classes=1000")
    net = build_network(small("soflow-b4", *sizes))
    ours = {their_name(name).removeprefix("network."): weight for name, weight in net.named_parameters()}
    assert set(ours) == set(stats)
    for name, weight in ours.items():
        expected, value = stats[name], weight.detach()
        assert (list(value.shape), weight.requires_grad) == (expected["shape"], expected["trained"]), name
        if expected["absmax"] == 0.0 or not expected["trained"]:
            assert value.abs().max().item() == pytest.approx(expected["absmax"]), name
        else:  # random: the same law within four standard errors
            assert value.std().item() == pytest.approx(expected["std"], rel=4 / value.numel() ** 0.5 + 0.02), name
            assert abs(value.mean().item()) < 5 * expected["std"] / value.numel() ** 0.5, name


def test_the_shipped_recipes_are_the_published_ones():
    for ours, theirs in (("soflow-b4", RECIPES["b4"]), ("cifar10-soflow", RECIPES["cifar"])):
        recipe = load_recipe(ours)
        laws = time_laws(recipe.times)
        draws = {"time_first": laws.first, "time_second": laws.second} | (
            {"time_equal": laws.equal} if "b4" in ours else {}
        )
        for key, draw in draws.items():
            assert (draw.law, draw.mean, draw.std) == tuple(theirs[key][part] for part in ("law", "mean", "std")), key
        assert (laws.gap, laws.order, recipe.times.equal_share.initial) == tuple(
            theirs[key] for key in ("gap", "order", "equal_share")
        )
        alpha, loss, optim = recipe.alpha, recipe.loss, recipe.optim
        assert [alpha.kind, alpha.initial, alpha.final, alpha.clamp] == list(theirs["alpha"].values())
        assert (loss.power, loss.c, loss.reduction, loss.later) == tuple(
            theirs["loss"][key] for key in ("p", "c", "reduction", "later")
        )
        assert (list(optim.betas), optim.eps, optim.warmup_steps, optim.clip_norm) == (
            theirs["optimiser"]["betas"], 1e-8, 0, 0,
        )  # fmt: skip
        assert recipe.ema.half_lives == (6931.125226233421,)


@pytest.mark.parametrize(("name", "size"), [
    ("soflow-b4", "B/4 guided"), ("soflow-b2", "B/2 guided"), ("soflow-xl2", "XL/2 guided"),
])  # fmt: skip
def test_the_shipped_networks_have_the_published_sizes(name, size):
    sizes = json.loads((FOLDER / "soflow_sizes.json").read_text())
    assert plan.parameter_count(load_recipe(name)) == sizes[size]
