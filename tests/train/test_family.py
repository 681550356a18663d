"""The keys of the family: at their defaults a run is what it was; switched on, each does what it says in a real run.

`OldRun` is the trainer as it was before there were such keys, formula by formula: one law for all draws, one α for all
rows, one way to guide, Adam and an average at every step. Five shipped recipes, made small, must give its weights.
"""

from dataclasses import replace

import pytest
import torch
from train_helpers import MEMBERS, make_recipe, make_store, row_values, train

from alphaflow_cli.core import times
from alphaflow_cli.core.alpha import equal_rows
from alphaflow_cli.core.draws import step_draws
from alphaflow_cli.core.objective import is_tie, short_first
from alphaflow_cli.model.build import build_network
from alphaflow_cli.model.checkpoint import load_checkpoint
from alphaflow_cli.model.compiling import compile_blocks
from alphaflow_cli.recipe import load_recipe
from alphaflow_cli.runtime.processes import join_world
from alphaflow_cli.train import start
from alphaflow_cli.train.estimate import random_rows
from alphaflow_cli.train.loop import one_step
from alphaflow_cli.train.optimise import Optimiser
from alphaflow_cli.train.questions import ask
from alphaflow_cli.train.step import Objective, time_laws, training_step

TOY = (
    "model.dim=32", "model.depth=2", "model.heads=2", "model.patch=2", "data.image_size=32", "data.channels=4",
    "data.latent_size=4", "data.classes=10", "data.autoencoder=x", "data.stats_images=0", "data.flips=false",
    'data.source=""', 'data.store=""', "train.steps=20", "train.batch=16", "train.precision=fp32",
    "train.sample_every=0", "train.log_every=20", "train.save_every=20", "train.milestone_every=0",
    "optim.warmup_steps=4",
)  # fmt: skip
OLD_RECIPES = {
    "b2-cfg": (),
    "xl2-cfg": ("alpha.start=5", "alpha.end=15"),
    "meanflow-b2": (),
    "shortcut-b2": (),
    "quickstart": (),
}
FIGURES = {  # `probe` of the weights after 20 steps in float64, then its second number for their average; measured on
    # the version before guidance became an input (5de9387)
    "b2-cfg": (53.46107558765686, 45.34657311919668, 45.34266945617996),
    "xl2-cfg": (53.461048131966464, 45.29124760610033, 45.2902564152691),
    "meanflow-b2": (53.47079469927872, 48.47565395182596, 48.484974213591215),
    "shortcut-b2": (53.47077526697279, 48.460577919964976, 48.47129724631861),
    "quickstart": (52.555989076437946, 18.53808429691687, 18.536616999222286),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("latents") / "store")


def awake(net):
    """Published networks begin with zero modulations, through which no gradient flows: give every weight a value."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))


def cube(t):
    return t[:, None, None, None]


class OldRun:
    """A run of a recipe as the trainer computed it before the keys of the family, step by step."""

    def __init__(self, run):
        self.recipe, self.stream, self.net = run.recipe, run.stream, build_network(run.recipe)
        awake(self.net)
        self.alpha_at, self.share_at, optim = run.alpha_at, run.equal_share_at, run.recipe.optim
        weights, self.rate_at = list(self.net.parameters()), run.optimiser.rate_at
        decay = {"betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
        self.adam = torch.optim.AdamW(weights, lr=optim.lr, fused=True, **decay)
        self.ema = [weight.detach().clone() for weight in weights]
        self.y_null = run.objective.y_null

    def step(self, step):
        recipe, law = self.recipe, self.recipe.times
        n_equal = equal_rows(recipe.train.batch, self.share_at(step))
        draws = step_draws(0, step, batch=16, shape=self.stream.shape, device=torch.device("cpu"))
        own, first, second = (times.LAWS[law.law](row, mean=law.mean, std=law.std) for row in draws.normals)
        t, r = times.ORDERS[law.order](first, second)
        equal = torch.arange(16) < n_equal
        t, r = torch.where(equal, own, t), torch.where(equal, own, r)
        batch = self.stream.batch_at(step, slice(0, 16, 1))
        self.loss(batch.latents, batch.y, draws.noise, t, r, draws.uniforms, n_equal, self.alpha_at(step)).backward()
        weights = list(self.net.parameters())
        grads = [weight.grad for weight in weights]
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        if recipe.optim.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(weights, recipe.optim.clip_norm, norm, foreach=True)
        for group in self.adam.param_groups:
            group["lr"] = self.rate_at(step)
        self.adam.step()
        torch._foreach_zero_(grads)
        beta = 0.5 ** (1.0 / max(min(recipe.ema.half_lives[0], recipe.ema.ramp * step), 1e-8))
        torch._foreach_lerp_(self.ema, [weight.detach() for weight in weights], 1.0 - beta)

    def loss(self, x, y, noise, t, r, uniforms, k, alpha):
        mix, settings, v = self.recipe.guidance, self.recipe.loss, noise - x
        z_t = (1 - cube(t)) * x + cube(t) * noise
        inside = (t > mix.t_min) & (t < mix.t_max)
        if mix.label_dropout:
            y = torch.where((uniforms < mix.label_dropout) & inside, self.y_null, y)
        question = None
        if (mix.omega, mix.kappa) != (1.0, 0.0):
            question = ask(t, uniforms, k, mix, torch.device("cpu"))
            asked = question.inputs(z_t, t, y, self.y_null)[:4]
        if alpha == 0.0:
            velocities = self.quietly(*asked) if question else None
            v_later = self.guided(v[k:], question, velocities, t[k:], None, k)
            u, du = self.net(z_t, t, r, y, tangent=v_later, first=k)
            later = v_later - cube(t[k:] - r[k:]) * du
            later = torch.where(cube(is_tie(t[k:], r[k:])), v_later, later)
        else:
            both = self.net(z_t, t, r, y, beside=asked) if question else (self.net(z_t, t, r, y), None)
            u, velocities = both
            v_later = self.guided(v[k:], question, velocities, t[k:], None, k)
            later = self.between(z_t[k:], v_later, t[k:], r[k:], y[k:], alpha) if alpha < 1.0 else v_later
        v_equal = self.guided(v[:k], question, velocities, t[:k], u[:k].detach(), k)
        if settings.clamp > 0.0 and alpha > 0.0:
            later = later.clamp(-settings.clamp, settings.clamp)
        error = (u - torch.cat([v_equal, later]).detach()).square().flatten(1)
        error = error.mean(1) if settings.reduction == "mean" else error.sum(1)
        ratio = torch.ones_like(error)
        ratio[k:] = alpha if alpha > 0.0 else 1.0
        weight = 1.0 / ratio if settings.weight == "none" else ratio / (error.detach() + settings.c)
        return (weight * error).sum() * (1 / 16)

    @torch.no_grad()
    def quietly(self, *inputs):
        return self.net(*inputs)

    def between(self, z, v, t, r, y, alpha):
        s = t - alpha * (t - r)
        v = self.quietly(z, t, s, y) if self.recipe.loss.velocity == "network" else v
        return alpha * v + (1.0 - alpha) * self.quietly(z - cube(t - s) * v, s, r, y)

    def guided(self, v, question, velocities, t, u, k):
        if question is None:
            return v
        mix, n = self.recipe.guidance, question.n_null
        null = velocities.new_zeros((16, *velocities.shape[1:]))
        null = null.index_copy(0, question.places[:n], velocities[:n])
        if u is None:
            u_y, u_null = null.index_copy(0, question.places[n:], velocities[n:])[k:], null[k:]
        else:
            m = question.n_null_equal
            u_y, u_null = u, u.index_copy(0, question.places[:m], velocities[:m])
        mixed = mix.omega * v
        mixed = mixed + mix.kappa * u_y if mix.kappa != 0.0 else mixed
        weight = 1.0 - mix.omega - mix.kappa
        mixed = mixed + weight * u_null if abs(weight) > 1e-12 else mixed
        return torch.where(cube((t > mix.t_min) & (t < mix.t_max)), mixed, v)


@pytest.mark.parametrize("name", OLD_RECIPES)
def test_twenty_steps_of_a_shipped_recipe_are_bit_for_bit_what_they_were(name, store, tmp_path):
    recipe = load_recipe(name, [*TOY, *OLD_RECIPES[name]])
    run = start.open_run(recipe, start.TrainOptions(tmp_path / "run", store), join_world())
    old = OldRun(run)
    awake(run.net)
    assert all(torch.equal(a, b) for a, b in zip(run.net.parameters(), old.net.parameters(), strict=True))
    for step in range(20):
        one_step(run, step)
        old.step(step)
    pairs = [(run.optimiser.weights, list(old.net.parameters())), (run.optimiser.emas[0], old.ema)]
    for ours, theirs in pairs:
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    moved = build_network(recipe)
    awake(moved)
    assert not any(torch.equal(a, b) for a, b in zip(run.optimiser.weights, moved.parameters(), strict=True))


def probe(values):
    """Norm, and the product with cosines of the places, which no two weights share."""
    flat = torch.cat([value.detach().flatten().double() for value in values])
    return float(flat.norm()), float(flat @ torch.arange(len(flat)).double().cos())


@pytest.mark.parametrize("name", FIGURES)
def test_twenty_steps_of_a_shipped_recipe_give_the_figures_of_the_version_before(name, store, tmp_path):
    """In float64, but times, noise and first weights are drawn in float32, whose last digit differs among processors.

    Twenty steps carry that on in proportion to their size. A tenth of the times moved by the last digit changes the
    second number by up to 2e-9 at the rate 1e-4, and by 5e-8 at the quickstart's 5e-3. A clamp of 3.99 instead of 4
    changes it, where there is one, by 2e-7 or more, and by 6e-2.
    """
    recipe = load_recipe(name, [*TOY, *OLD_RECIPES[name], "train.precision=fp64"])
    run = start.open_run(recipe, start.TrainOptions(tmp_path / "run", store), join_world())
    awake(run.net)
    for step in range(20):
        one_step(run, step)
    ours = (*probe(run.optimiser.weights), probe(run.optimiser.emas[0])[1])
    assert ours == pytest.approx(FIGURES[name], rel=1e-4 * recipe.optim.lr)


# Short intervals first.


@pytest.mark.parametrize("name", ["b2", "soflow-b4", "cifar10-soflow"])
def test_the_mean_interval_is_that_of_the_recipes_draws(name):
    laws = time_laws(load_recipe(name).times)
    t, r = times.sample_times(torch.randn(3, 200_000, generator=torch.Generator().manual_seed(0)), 0, laws)
    assert times.mean_interval(laws) == pytest.approx(float((t - r).mean()), rel=0.01)


@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
def test_short_intervals_count_more_at_first_and_all_count_1_in_the_mean(progress):
    laws = time_laws(load_recipe("b2").times)
    t, r = times.sample_times(torch.randn(3, 100_000, generator=torch.Generator().manual_seed(1)), 50_000, laws)
    weight = short_first(t, r, 50_000, progress=progress, mean_interval=times.mean_interval(laws))
    assert (weight[:50_000] == 1).all(), "r = t rows"
    later, interval = weight[50_000:], (t - r)[50_000:]
    assert float(later.mean()) == pytest.approx(1.0, abs=0.005)
    if progress == 1.0:
        assert (later == 1).all()
    else:
        falls = torch.corrcoef(torch.stack([later, interval]))[0, 1]
        assert falls == pytest.approx(-1.0, abs=1e-4), "linear in t − r"
    p, mean = 1 - progress, times.mean_interval(laws)
    torch.testing.assert_close(later[:5], 1 - p + p / (1 - mean) * (1 - interval[:5]))


def test_a_run_multiplies_each_rows_loss_by_that_weight(store, tmp_path):
    """One step at progress 0: its gradient is that of the plain step with each r < t row's loss multiplied."""
    recipe = make_recipe(tmp_path, "loss.short_first=true", "train.precision=fp64", "alpha=0.5")
    run = start.open_run(recipe, start.TrainOptions(tmp_path / "run", store), join_world())
    awake(run.net)
    from alphaflow_cli.train.loop import gradients, rows_at

    gradients(run, 0)
    ours = [weight.grad.clone() for weight in run.net.parameters()]
    draws = step_draws(0, 0, batch=16, shape=run.stream.shape, device=torch.device("cpu"))
    laws = time_laws(recipe.times)
    t, r = times.sample_times(draws.normals, 4, laws)
    stacked = torch.stack([t, r, draws.uniforms]).double()
    rows = rows_at(run, 0, slice(None), noise=draws.noise, drawn=stacked, n_equal=4)
    factor = (1 - (rows.t - rows.r)) / (1 - times.mean_interval(laws))
    factor[:4] = 1.0
    torch.testing.assert_close(rows.factor, factor)
    run.optimiser.forget_gradients()
    for i in range(16):
        one = {name: getattr(rows, name)[i : i + 1] for name in ("x", "noise", "t", "r", "y", "uniforms")}
        single = type(rows)(**one, n_equal=int(i < 4))
        loss = training_step(run.net, run.net, single, alpha=0.5, objective=run.objective).loss
        (factor[i] * loss / 16).backward()
    for a, weight in zip(ours, run.net.parameters(), strict=True):
        torch.testing.assert_close(a, weight.grad, rtol=1e-9, atol=1e-12)


# The network, the optimiser, the averages, the latents.


def test_a_fixed_table_stays_what_it_is_and_lies_in_every_file(store, tmp_path):
    recipe = make_recipe(tmp_path, *MEMBERS["soflow"])
    out = train(recipe, store, tmp_path / "run", processes=2)
    table = build_network(recipe).pos_embed.detach()
    assert not build_network(recipe).pos_embed.requires_grad
    for path in (out / "model.safetensors", *(out / "checkpoints").rglob("*.safetensors")):
        weights = load_checkpoint(path).weights
        assert torch.equal(weights["pos_embed"], table), path
        assert not torch.equal(weights["final.linear.weight"], torch.zeros_like(weights["final.linear.weight"]))
    assert row_values(out, "phase") == ["between"] * 7


def test_radam_steps_as_torchs_and_skips_a_step_whose_gradient_is_not_finite(tmp_path):
    recipe = make_recipe(tmp_path, *MEMBERS["soflow"], "optim.clip_norm=0", "optim.warmup_steps=0", "ema.every=1")
    net, other = build_network(recipe), build_network(recipe)
    optimiser = Optimiser(net, recipe)
    trained = [weight for weight in other.parameters() if weight.requires_grad]
    plain = torch.optim.RAdam(trained, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        grads = [torch.randn(weight.shape, generator=generator) for weight in trained]
        mine = [weight for weight in net.parameters() if weight.requires_grad]
        for weight, twin, grad in zip(mine, trained, grads, strict=True):
            weight.grad, twin.grad = grad.clone(), grad.clone()
        if step == 7:
            mine[0].grad[0] = float("nan")
        optimiser.step(step)
        if step != 7:
            plain.step()
    for weight, twin in zip(mine, trained, strict=True):
        torch.testing.assert_close(weight, twin, rtol=1e-6, atol=1e-8)
    assert optimiser.counters.tolist()[0] == 11
    assert optimiser.counters.tolist()[3] == 1


def test_a_resumed_radam_counts_its_steps_on_the_host_as_torch_does(tmp_path):
    """It reads the count of every weight at every step: on a GPU the host would wait as often."""
    recipe = make_recipe(tmp_path, *MEMBERS["soflow"])
    saved, resumed = Optimiser(build_network(recipe), recipe), Optimiser(build_network(recipe).to("meta"), recipe)
    for weight in saved.trained:
        weight.grad = torch.zeros_like(weight)
    saved.step(0)
    resumed.load(saved.tensors())
    places = [(each["step"].device.type, each["exp_avg"].device.type) for each in resumed.adam.state.values() if each]
    assert places == [("cpu", "meta")] * len(resumed.trained)


def test_given_constants_normalise_the_latents_and_travel_with_the_weights(store, tmp_path):
    given = ("data.normalise=channel", "data.channel_mean=[1, 2, 3, 4]", "data.channel_std=[2, 2, 2, 4]")
    recipe = make_recipe(tmp_path, *given, "train.steps=2", "alpha.start=0", "alpha.end=2")
    out = train(recipe, store, tmp_path / "run")
    checkpoint = load_checkpoint(out / "model.safetensors")
    assert checkpoint.mean.flatten().tolist() == [1, 2, 3, 4]
    assert checkpoint.std.flatten().tolist() == [2, 2, 2, 4]
    plain = make_recipe(tmp_path, "data.normalise=scale")
    streams = [start.open_run(each, start.TrainOptions(tmp_path / name, store), join_world()).stream
               for name, each in (("a", recipe), ("b", plain))]  # fmt: skip
    ours, raw = (stream.batch_at(0, slice(None)).latents for stream in streams)
    mean, std = torch.tensor([1.0, 2, 3, 4])[:, None, None], torch.tensor([2.0, 2, 2, 4])[:, None, None]
    torch.testing.assert_close(ours, (raw - mean) / std)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of dynamo itself
@pytest.mark.slow
@pytest.mark.parametrize(("member", "alpha"), [
    ("soflow", 0.3), ("boundary", 0.3), ("boundary", 0.0), ("imf", 1.0), ("imf", 0.3), ("imf", 0.0), ("scale", 0.0),
])  # fmt: skip
def test_compiled_blocks_give_the_gradients_of_plain_ones(member, alpha, tmp_path):
    recipe = make_recipe(tmp_path, *MEMBERS[member])
    found = []
    for compiled in (False, True):
        net = build_network(recipe)
        awake(net)
        net = compile_blocks(net, backend="aot_eager") if compiled else net
        rows = random_rows(recipe, 8, 2, torch.device("cpu"))
        generator = torch.Generator().manual_seed(4)
        x, noise = (torch.randn(rows.x.shape, generator=generator) for _ in range(2))
        rows = replace(rows, x=x, noise=noise)
        loss = training_step(net, net, rows, alpha=alpha, objective=Objective.of(recipe)).loss
        found.append(torch.autograd.grad(loss, [w for w in net.parameters() if w.requires_grad]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-7)


def test_the_boundary_tangent_asks_nothing_while_alpha_is_1(tmp_path):
    recipe = make_recipe(tmp_path, *MEMBERS["boundary"], "guidance.omega=1")
    net, objective, calls = build_network(recipe), Objective.of(recipe), []
    net.register_forward_pre_hook(lambda module, inputs, kwargs: calls.append(kwargs.get("beside")), with_kwargs=True)
    rows = random_rows(recipe, 8, 2, torch.device("cpu"))
    training_step(net, net, rows, alpha=1.0, objective=objective)
    assert calls == [None]
    training_step(net, net, rows, alpha=0.3, objective=objective)
    assert [len(beside[0]) if beside else 0 for beside in calls[1:]] == [6, 0], "one row beside for each r < t row"
