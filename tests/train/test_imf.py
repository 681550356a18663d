"""Improved MeanFlow's numbers, through the trainer's own draws, step, optimiser and samplers, in float64.

The vectors (tests/golden/README.md) were made by its published system. The recipe is the shipped `imf-b2`, made small.
"""

import json

import pytest
import torch
from golden_data import FOLDER, arrays, assert_close, tensor
from imf_nets import to_imf

from alphaflow_cli.convert.imf import bare_names, from_imf, imf_names
from alphaflow_cli.core import guidance, sampler
from alphaflow_cli.core.draws import StepDraws
from alphaflow_cli.core.times import sample_times
from alphaflow_cli.model.build import build_network
from alphaflow_cli.recipe import load_recipe
from alphaflow_cli.train.optimise import Optimiser
from alphaflow_cli.train.questions import ask
from alphaflow_cli.train.step import Objective, Rows, guide_of, row_draws, time_laws, training_step

META = json.loads((FOLDER / "imf_loss_meta.json").read_text())
SAMPLERS = json.loads((FOLDER / "imf_sampler_meta.json").read_text())
TRAINED = json.loads((FOLDER / "imf_train_cases.json").read_text())
NAMES = imf_names(2, 2, velocity=2)
SMALL = (
    "model.dim=40", "model.depth=4", "model.heads=4", "model.velocity_head=2", "data.image_size=64",
    "data.latent_size=8", "data.classes=10", "train.precision=fp64",
)  # fmt: skip


def small(*sets):
    return load_recipe("imf-b2", [*SMALL, *sets])


def network(recipe):
    net = build_network(recipe).double()
    stored = {name: torch.tensor(value).double() for name, value in arrays("imf_state_A.npz").items()}
    net.load_state_dict(from_imf(bare_names(stored), NAMES))
    return net


def theirs(values):
    """Our tables under their names."""
    return to_imf(values, NAMES)


def bare(name):
    return next(iter(bare_names({name: None, "net.x._flax_linear.weight": None})))


class Case:
    """One case: the rows that its draws make, their step, and what the network was asked on the way."""

    def __init__(self, name, net=None, *, every_row=False):
        self.name, self.meta = name, META[name]
        meta, sets = self.meta, (f"guidance.scale_beta={META[name]['cfg_beta']}",)
        self.recipe = small(*sets, "guidance.drop=interval")
        self.k = meta["n_equal"]
        x, noise, self.label = (self.given(key) for key in ("x", "noise", "label"))
        normals = torch.stack([self.given("normal_1"), self.given("normal_1"), self.given("normal_2")])
        t, r = sample_times(normals, self.k, time_laws(self.recipe.times))
        told = torch.stack([self.given(f"uniform_{key}") for key in ("omega", "t_min", "t_max")])
        gone = self.golden("y") == 10  # they drop the first rows, as many as uniforms lie below the rate
        draws = StepDraws(noise, normals, torch.where(gone, 0.0, 1.0).double(), told)
        drawn = row_draws(t, r, draws, self.k, self.recipe.guidance)
        mix, self.guide = self.recipe.guidance, guide_of(drawn)
        question = ask(t, drawn[2], self.k, mix, t.device, guide=self.guide, tangent=True)
        some = None if every_row else question
        self.rows = Rows(x, noise, t, r, self.label, drawn[2], self.k, some, guide=self.guide)
        self.net, self.question = net or network(self.recipe), question
        self.objective, self.calls = Objective.of(self.recipe), []

    def step(self):
        hook = self.net.register_forward_hook(lambda module, inputs, output: self.calls.append(output))
        self.result = training_step(self.net, self.net, self.rows, alpha=0.0, objective=self.objective)
        hook.remove()
        self.velocities, (self.u, self.v_hat, self.du) = self.calls
        return self.result

    def given(self, key):
        return tensor("imf_loss_inputs.npz", f"{self.name}/{key}")

    def golden(self, key):
        return tensor("imf_loss_f64.npz", f"{self.name}/{key}")


@pytest.fixture(scope="module", params=META)
def case(request):
    case = Case(request.param)
    case.step()
    return case


def test_scales_and_intervals_and_times_are_the_published_draws():
    file, mix = "imf_draws.npz", small().guidance
    first, second = (tensor(file, f"normal_{i}") for i in (1, 2))
    uniforms = torch.stack([tensor(file, f"uniform_{key}") for key in ("omega", "t_min", "t_max")])
    for beta in ("0.5", "1", "2"):
        ours = guidance.scales(uniforms[0], most=mix.scale_max, beta=float(beta))
        assert_close(ours, tensor(file, f"omega/beta{beta}_max8"))
    for ours, key in zip(guidance.intervals(uniforms[1], uniforms[2], 4), ("t_min", "t_max"), strict=True):
        assert_close(ours, tensor(file, f"interval/n_equal4_{key}"))
    for share in ("0.5", "0.3"):
        n_equal = int(16 * float(share))
        t, r = sample_times(torch.stack([first * 0, first, second]), n_equal, time_laws(small().times))
        assert_close(t, tensor(file, f"times/share{share}_t"))
        assert_close(r, tensor(file, f"times/share{share}_r"))
        assert tensor(file, f"times/share{share}_is_equal").tolist() == [i < n_equal for i in range(16)]


def test_what_each_row_draws_is_published(case):
    assert_close(case.rows.t, case.golden("t"))
    assert_close(case.rows.r, case.golden("r"))
    for column, key in zip(case.guide.T, ("omega", "t_min", "t_max"), strict=True):
        assert_close(column, case.golden(key))
    inside = guidance.in_own_interval(case.rows.t, case.guide[:, 1], case.guide[:, 2])
    assert inside.tolist() == case.meta["inside"]


def test_every_velocity_that_was_asked_for_is_the_published_one(case):
    question = case.question
    null, own = case.velocities[: question.n_null], case.velocities[question.n_null :]
    assert_close(null, case.golden("v_u")[question.places[: question.n_null]])
    assert_close(own, case.golden("v_c")[question.places[question.n_null :]])


def test_prediction_derivative_and_target_of_every_row_are_the_published_ones(case):
    assert_close(case.u.detach(), case.golden("u"))
    assert_close(case.v_hat.detach(), case.golden("v_head"))
    assert_close(case.du, case.golden("du_dt")[case.k :])
    assert_close(case.result.v_guided, case.golden("v_guided"))
    h = (case.rows.t - case.rows.r)[:, None, None, None]
    target = case.golden("v_guided") - h * case.golden("du_dt")
    assert_close(case.result.target, target)
    assert_close(case.u.detach() - target, case.golden("V") - case.golden("v_guided"))


def test_the_losses_are_the_published_ones(case):
    values, terms = 4 * 8 * 8, case.result.terms
    assert_close(terms.error * values, case.golden("loss_u_raw"))
    assert_close(terms.head * values, case.golden("loss_v_raw"))
    for key, term in (("metric_loss_u", terms.error), ("metric_loss_v", terms.head)):
        assert term.mean().item() == pytest.approx(case.meta[key], rel=1e-9)
    assert case.result.loss.item() / 8 == pytest.approx(case.meta["total"], rel=1e-9)


def test_each_row_has_its_two_published_losses_each_with_a_weight_of_its_own(case):
    expected, keys = case.golden("loss_u") + case.golden("loss_v"), ("x", "noise", "t", "r", "y", "uniforms", "guide")
    for row in range(8):
        parts = {key: getattr(case.rows, key)[row : row + 1] for key in keys}
        rows = Rows(**parts, n_equal=int(row < case.k))
        loss = training_step(case.net, case.net, rows, alpha=0.0, objective=case.objective).loss.item()
        assert loss == pytest.approx(expected[row].item(), rel=1e-9)


@pytest.mark.parametrize(("name", "every_row"), [*((name, False) for name in META), ("base", True), ("drop3", True)])
def test_the_gradients_are_the_published_ones(name, every_row):
    case = Case(name, every_row=every_row)
    case.net.zero_grad()
    (case.step().loss / 8).backward()
    ours = theirs({key: weight.grad for key, weight in case.net.named_parameters()})
    stored = [key for key in arrays("imf_loss_f64.npz") if key.startswith(f"{name}/grad/")]
    assert len(stored) > 10
    for key in stored:
        weight, _, rows = key.removeprefix(f"{name}/grad/").partition("[:")
        expected = tensor("imf_loss_f64.npz", key)
        grad = ours[bare(weight)]
        grad = grad[: int(rows.rstrip("]"))] if rows else grad
        assert (grad - expected).abs().max() < 1e-9 * expected.abs().max(), weight
    for weight, norm in case.meta["grad_norm"].items():
        assert ours[bare(weight)].norm().item() == pytest.approx(norm, rel=1e-9), weight
    whole = torch.cat([grad.flatten() for grad in ours.values()]).norm()
    assert whole.item() == pytest.approx(case.meta["grad_norm_total"], rel=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_sampler_walks_the_published_way(name):
    from alphaflow_cli.sample.walk import plan_walk

    meta, recipe = SAMPLERS[name], small()
    interval = (meta["t_min"], meta["t_max"])
    walk = plan_walk(recipe, nfe=meta["steps"], guidance=meta["omega"], interval=interval)
    assert list(walk.grid) == meta["times"]
    assert walk.nfe == meta["steps"], "asked once per step"
    net, guide = network(recipe), torch.tensor(walk.guide, dtype=torch.float64)

    def told(z, t, r, y):
        return net(z, t, r, y, guide=guide.expand(len(z), 3))

    noise, y = (tensor("imf_sampler_f64.npz", f"{name}/{key}") for key in ("noise", "y"))
    x = noise
    for i, (t, to) in enumerate(zip(walk.grid, walk.grid[1:], strict=False)):
        with torch.no_grad():
            x = sampler.STEPS[walk.sampler](x, sampler.SamplerStep(told, y, t, to, torch.Tensor))
        assert_close(x, tensor("imf_sampler_f64.npz", f"{name}/after_step{i}"))
    out = sampler.sample(told, noise, y, grid=walk.grid, sampler=walk.sampler, fresh_noise=torch.Tensor)
    assert_close(out, tensor("imf_sampler_f64.npz", f"{name}/out"))


def test_the_learning_rate_is_the_published_one():
    from alphaflow_cli.recipe.plan import learning_rate_at

    stored = arrays("imf_train_f64.npz")
    rate = learning_rate_at(load_recipe("imf-b2"))
    ours = [rate(int(step)) for step in stored["lr_step"]]
    assert ours == pytest.approx(stored["lr"].tolist(), rel=1e-12, abs=1e-18)
    assert ours[0] == 0.0


def test_whole_steps_leave_the_published_weights_and_averages():
    file, rate = "imf_train_f64.npz", ("optim.lr=1e-3", "optim.warmup_steps=2")
    recipe = small(*rate, "ema.half_lives=[6.578813478960585]", "train.steps=100")  # 0.9 = 0.5^(1/6.58)
    net = network(recipe)
    optimiser = Optimiser(net, recipe)
    for step, name in enumerate(TRAINED):
        case = Case(name, net)
        loss = case.step().loss / 8
        assert loss.item() == pytest.approx(float(arrays(file)[f"step{step}/total"]), rel=1e-9)
        assert optimiser.rate_at(step) == pytest.approx(float(arrays(file)[f"step{step}/lr"]), rel=1e-12)
        loss.backward()
        optimiser.step(step)
        kept = {"param": theirs(optimiser.raw()), "ema": theirs(optimiser.average())}
        stored = [key for key in arrays(file) if key.startswith((f"step{step}/param", f"step{step}/ema"))]
        assert stored
        for key in stored:
            _, kind, weight = key.split("/")
            weight, _, rows = weight.partition("[:")
            value = kept[kind][bare(weight)].detach()
            value = value[: int(rows.rstrip("]"))] if rows else value
            assert_close(value, tensor(file, key), 1e-8)


def test_the_average_is_the_published_one():
    from alphaflow_cli.core.ema import ema_beta

    settings = load_recipe("imf-b2").ema
    beta = ema_beta(0, half_life=settings.half_lives[0], ramp=settings.ramp, every=settings.every)
    assert beta == pytest.approx(0.9999, rel=1e-12)
