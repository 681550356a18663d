"""The keys of the family: at their defaults a run is what it was; switched on, each does what it says in a real run.

`OldRun` is the trainer as it was before there were such keys, formula by formula: one law for all draws, one α for all
rows, one way to guide, Adam and an average at every step. Five shipped recipes, made small, must give its weights.
"""

import pytest
import torch
from train_helpers import make_store

from alphaflow_cli.core import times
from alphaflow_cli.core.alpha import equal_rows
from alphaflow_cli.core.draws import step_draws
from alphaflow_cli.core.objective import is_tie
from alphaflow_cli.model.build import build_network
from alphaflow_cli.recipe import load_recipe
from alphaflow_cli.runtime.processes import join_world
from alphaflow_cli.train import start
from alphaflow_cli.train.loop import one_step
from alphaflow_cli.train.step import ask

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
            asked = question.inputs(z_t, t, y, self.y_null)
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
