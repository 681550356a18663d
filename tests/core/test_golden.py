"""The core and the DiT against the published system's numbers: float64 to 1e-9, float32 within the observed bands."""

import json

import numpy as np
import pytest
import torch
from golden_data import FOLDER, LABEL_ROWS, arrays, assert_close, labels, network, tensor

from alphaflow_cli.core import ema, guidance, objective, path, sampler, times
from alphaflow_cli.nn.layers import position_table, time_features

LOSS_META = json.loads((FOLDER / "loss_meta_f64.json").read_text())
SAMPLERS = json.loads((FOLDER / "sampler_meta_f64.json").read_text())


def model_inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    x, t, r = (tensor("model_f64.npz", name, dtype) for name in ("x", "t", "r"))
    return x, t, r, labels(tensor("model_f64.npz", "label"), "M")


@pytest.mark.parametrize("attend", ["fused", "math"])
def test_the_network_predicts_the_published_average_velocity(attend):
    x, t, r, y = model_inputs()
    net = network("M")
    with torch.no_grad():
        assert_close(net(x, t, r, y, attend), tensor("model_f64.npz", "M/u"))
        assert_close(net(x, t, t, y, attend), tensor("model_f64.npz", "M/u_t_t"))
        null = torch.full_like(y, LABEL_ROWS["M"] - 1)
        assert_close(net(x, t, r, null, attend), tensor("model_f64.npz", "M/u_cond_none"))
        assert_close(net(x, t, r, null, attend), tensor("model_f64.npz", "M/u_force_label_dropout"))
        assert_close(net(x, t, t, y, attend), tensor("model_f64.npz", "M/u_sigma_next_none"))


def test_the_network_in_float32_stays_in_the_published_band():
    x, t, r, y = model_inputs(torch.float32)
    with torch.no_grad():
        u = network("M", torch.float32)(x, t, r, y)
    assert (u.double() - tensor("model_f64.npz", "M/u")).abs().max() < 5e-6


def test_every_activation_is_the_published_one():
    x, t, r, y = (value[:4] for value in model_inputs())
    net = network("M")
    seen: dict[str, torch.Tensor] = {}

    def keep(name):
        return lambda module, inputs, output: seen.__setitem__(name, output)

    for name, module in {
        "x_embed": net.patch_embed, "t_embed": net.time_embed, "tmr_embed": net.second_embed,
        "y_embed": net.label_embed, "block0": net.blocks[0], "block1": net.blocks[1], "final_tokens": net.final,
    }.items():  # fmt: skip
        module.register_forward_hook(keep(name))
    with torch.no_grad():
        net(x, t, r, y)
        seen["c"] = net.condition(t, r, y)
    for name, value in seen.items():
        assert_close(value, tensor("model_f64.npz", f"M/act/{name}"))


def test_the_reference_derivative_is_the_published_jvp():
    x, t, r, y = model_inputs()
    net = network("M")
    tangent = tensor("model_f64.npz", "tangent_x")
    du = objective.jvp_derivative(lambda z, t, r, y: net(z, t, r, y, "math"), x, tangent, t=t, r=r, y=y)
    assert_close(du, tensor("model_f64.npz", "M/jvp"))
    assert_close(du, tensor("model_f64.npz", "M/jvp_func"))


class LossCase:
    """One case of loss_meta: everything from inputs to gradients, by the core's functions alone."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64) -> None:
        self.meta = LOSS_META[name]
        self.model = self.meta["model"]
        self.net = network(self.model, dtype)
        suffix = "pure_fm" if self.meta["pure_fm"] else "isclose" if name.endswith("isclose") else None
        self.x, self.noise = (tensor("loss_inputs.npz", key, dtype) for key in ("x", "noise"))
        self.t = tensor("loss_inputs.npz", f"t_{suffix}" if suffix else "t", dtype)
        if suffix is None:
            self.r = tensor("loss_inputs.npz", "r", dtype)
        else:
            self.r = self.t if suffix == "pure_fm" else tensor("loss_inputs.npz", "r_isclose", dtype)
        self.k = self.meta["n_fm"]
        self.alpha = self.meta["alpha"]
        mix = self.meta["cfg_params"]
        self.interval = {"t_min": mix["t_min"], "t_max": mix["t_max"]}
        self.mix = {"omega": mix["omega"], "kappa": mix["kappa"]}
        self.run()

    def run(self) -> None:
        null = LABEL_ROWS[self.model] - 1
        y = tensor("loss_inputs.npz", "label")
        uniforms = tensor("loss_inputs.npz", "label_rand", torch.float32)
        lost = guidance.dropped(self.t, uniforms, dropout=self.meta["label_dropout"], **self.interval)
        self.y = torch.where(lost, null, y)
        z_t = path.interpolate(self.x, self.noise, self.t)
        v = path.velocity(self.x, self.noise)
        with torch.no_grad():
            u_y = self.net(z_t, self.t, self.t, self.y)
            u_null = self.net(z_t, self.t, self.t, torch.full_like(y, null))
        acts = guidance.inside(self.t, **self.interval)
        null_weight = guidance.null_weight(**self.mix)
        self.v_guided = guidance.guided_velocity(v, u_y, u_null, acts, **self.mix, null=null_weight)
        later = self.later_target(z_t[self.k :])
        target = torch.cat([self.v_guided[: self.k], later])
        bound = self.meta["clamp_utgt"]
        self.target = objective.clamp_target(target, self.k, bound=bound, alpha=self.alpha)
        self.u = self.net(z_t, self.t, self.r, self.y)
        self.error = objective.squared_error(self.u, self.target, "mean")
        self.weight = objective.loss_weight(
            self.error, self.k, alpha=self.alpha, kind="adaptive", c=1e-3, power=1.0, later=1.0
        )
        self.total = (self.weight * self.error).mean()
        self.total.backward()

    def later_target(self, z: torch.Tensor) -> torch.Tensor:
        v, t, r, y = (value[self.k :] for value in (self.v_guided, self.t, self.r, self.y))
        if len(z) == 0 or self.alpha == 1:
            return v
        if self.alpha > 0:
            return objective.between_target(self.net, z, v, v, t=t, r=r, y=y, alpha=self.alpha)
        math = lambda z, t, r, y: self.net(z, t, r, y, "math")  # noqa: E731
        return objective.mean_target(v, objective.jvp_derivative(math, z, v, t=t, r=r, y=y), t, r)


@pytest.mark.parametrize("name", sorted(LOSS_META))
def test_a_loss_case_agrees_from_labels_to_gradients(name):
    case = LossCase(name)

    def golden(key):
        return tensor("loss_f64.npz", f"{name}/{key}")

    assert torch.equal(case.y, labels(golden("label_after_dropout"), case.model))
    terms = objective.loss_terms(case.u, case.target, case.v_guided)
    ours = {
        "velocity_cfg": case.v_guided, "target": case.target, "pred": case.u, "weight": case.weight,
        "loss_unscaled": case.error, "loss": case.weight * case.error,
        "loss_tfm": terms.trajectory, "loss_tcc": terms.consistency,
    }  # fmt: skip
    stored = {key.split("/")[1] for key in arrays("loss_f64.npz") if key.startswith(f"{name}/")}
    assert stored - {"grad", "label_after_dropout"} <= set(ours), "a stored vector that nothing compares"
    for key in stored & set(ours):
        assert_close(ours[key].detach(), golden(key))
    assert case.total.item() == pytest.approx(case.meta["total_loss"], rel=1e-9)


@pytest.mark.parametrize("name", sorted(LOSS_META))
def test_a_loss_case_has_the_published_gradients(name):
    from alphaflow_cli.convert.shape import to_published

    case = LossCase(name)
    grads = {f"model.{to_published(n)}": p.grad for n, p in case.net.named_parameters()}
    for key in (k for k in arrays("loss_f64.npz") if k.startswith(f"{name}/grad/")):
        parameter = key.removeprefix(f"{name}/grad/")
        rows = int(parameter.split("[:")[1].rstrip("]")) if "[:" in parameter else None
        assert_close(grads[parameter.split("[")[0]][:rows], tensor("loss_f64.npz", key))
    for parameter, norm in case.meta["grad_norm"].items():
        assert grads[parameter].norm().item() == pytest.approx(norm, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", ["a1_b2cfg", "a05_b2cfg", "a0_b2cfg", "fm_nocfg"])
def test_a_loss_case_in_float32_stays_in_the_published_band(name):
    case = LossCase(name, torch.float32)
    assert (case.error.double() - tensor("loss_f64.npz", f"{name}/loss_unscaled")).abs().max() < 6e-6
    assert (case.target.double() - tensor("loss_f64.npz", f"{name}/target")).abs().max() < 2e-5
    assert case.total.item() == pytest.approx(case.meta["total_loss"], rel=3e-7)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_sampler_walks_the_published_way(name):
    config = SAMPLERS[name]["cfg"]
    kind = {True: "consistency"}.get(config["enable_consistency_sampling"])
    kind = kind or ("trajectory" if config["enable_trajectory_sampling"] else "flow")
    custom = config["custom_t_steps"]
    grid = [float(np.float32(t)) for t in custom] if custom else sampler.time_grid(config["num_steps"])
    fresh = (
        iter(tensor("sampler_f64.npz", f"{name}/noise_step{i}") for i in range(len(grid) - 1))
        if kind == ("consistency")
        else iter(())
    )
    y = labels(tensor("sampler_f64.npz", "label"), "M")
    noise = tensor("sampler_f64.npz", "noise_init")
    out = sampler.sample(network("M"), noise, y, grid=grid, sampler=kind, fresh_noise=lambda: next(fresh))
    assert_close(out, tensor("sampler_f64.npz", f"{name}/out"))


@pytest.mark.parametrize("order", ["minmax", "min", "r_in_t_range"])
def test_times_come_from_the_normals_as_published(order):
    misc = arrays("misc.npz")
    n_equal = 16
    own, first, second = (torch.tensor(misc[f"time/{key}"]) for key in ("z_fm", "z1", "z2"))
    later = [torch.cat([torch.zeros(n_equal), draw[: 64 - n_equal]]) for draw in (first, second)]  # theirs start at 0
    normals = torch.stack([own, *later])
    t, r, dt = (misc[f"time/{order}/{key}"] for key in ("t", "r", "dt"))
    draw = times.Draw("logit_normal", -0.4, 1.0)
    ours = times.sample_times(normals, n_equal, times.TimeLaws(draw, draw, draw, order, 0.0, "own"))
    part = ours[0] - objective.intermediate_time(*ours, alpha=0.5)  # "dt" is t − s at α = ½
    for value, golden in zip((*ours, part), (t, r, dt), strict=True):
        torch.testing.assert_close(value, torch.tensor(golden), rtol=2e-7, atol=1e-7)


def test_ema_follows_the_published_average():
    misc = arrays("misc.npz")
    weights, expected = torch.tensor(misc["ema/net"]), misc["ema/ema"]
    average = torch.zeros(5)  # the stored averages were accumulated in float32; β in float64
    for step in range(30):
        beta = ema.ema_beta(step, half_life=6931.0, ramp=0.05, every=1)
        assert beta == pytest.approx(misc["ema/beta"][step], rel=1e-9, abs=1e-12)
        ema.update_ema([average], [weights[step].float()], beta)
        np.testing.assert_allclose(average.numpy(), expected[step], rtol=2e-7, atol=2e-7)
    for step, beta in zip(misc["ema/beta_steps"], misc["ema/beta_at_steps"], strict=True):
        assert ema.ema_beta(int(step), half_life=6931.0, ramp=0.05, every=1) == pytest.approx(beta, rel=1e-12)


def test_the_positional_table_and_the_time_features_are_published_ones():
    misc = arrays("misc.npz")
    assert np.array_equal(position_table(64, 4)[0].numpy(), misc["pos_embed/dim64_grid4"])
    big = position_table(1152, 16)[0].numpy()
    assert np.array_equal(big[[0, 1, 16, 255]], misc["pos_embed/dim1152_grid16"])
    features = time_features(torch.tensor(misc["temb/t"]))
    torch.testing.assert_close(features, torch.tensor(misc["temb/emb256"]), rtol=1e-6, atol=1e-6)


def test_initialisation_has_the_published_statistics():
    from alphaflow_cli.convert.shape import to_published
    from alphaflow_cli.nn.dit import DiT

    stats = json.loads((FOLDER / "init_stats.json").read_text())
    torch.manual_seed(0)
    net = DiT(
        latent_size=8, channels=4, patch=2, dim=64, depth=2, heads=4, mlp_ratio=4.0, label_rows=11,
        qk_norm=False, second_time="t-r", gradient_checkpointing=False,
    )  # fmt: skip
    ours = {f"model.{to_published(name)}": value for name, value in net.state_dict().items()}
    assert set(ours) == set(stats)
    for name, value in ours.items():
        expected = stats[name]
        assert list(value.shape) == expected["shape"], name
        if expected["absmax"] == 0.0 or name == "model.pos_embed":
            assert value.abs().max().item() == pytest.approx(expected["absmax"]), name
        else:  # random: the same law within four standard errors
            assert value.std().item() == pytest.approx(expected["std"], rel=4 / value.numel() ** 0.5 + 0.02), name
            assert abs(value.mean().item()) < 5 * expected["std"] / value.numel() ** 0.5, name


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_sampler_step_sees_the_published_guess_of_the_data(name):
    config = SAMPLERS[name]["cfg"]
    y, x = labels(tensor("sampler_f64.npz", "label"), "M"), tensor("sampler_f64.npz", "noise_init")
    net = network("M")
    for i, (t, to) in enumerate(SAMPLERS[name]["t_pairs"]):
        r = 0.0 if config["enable_consistency_sampling"] else to if config["enable_trajectory_sampling"] else t
        step = sampler.SamplerStep(net, y, t, to, fresh_noise=torch.Tensor)
        with torch.no_grad():
            assert_close(x - t * step.u(x, t, r), tensor("sampler_f64.npz", f"{name}/step{i}/x_denoised"))
        x = tensor("sampler_f64.npz", f"{name}/step{i}/x_next")
