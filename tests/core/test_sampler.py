"""Samplers: exact fields, closed forms, orders of convergence, fresh noise and guidance."""

from itertools import pairwise
from typing import get_args

import pytest
import torch
from exact_fields import Decay, batch, gaussian
from golden_data import arrays, labels, network, tensor

from alphaflow_cli.core import sampler
from alphaflow_cli.recipe.schema import Sampler

FIELDS = {"decay": Decay(), "gaussian": gaussian()}


def no_noise():
    raise AssertionError("this sampler needs no fresh noise")


def walk(net, kind, grid, noise=None, fresh_noise=no_noise):
    z, _, _, y = batch()
    return sampler.sample(net, z if noise is None else noise, y, grid=grid, sampler=kind, fresh_noise=fresh_noise)


def error_after(net, kind, steps):
    z, _, _, _ = batch()
    rows = torch.ones(len(z), dtype=torch.float64)
    return (walk(net, kind, sampler.time_grid(steps)) - net.flow(z, rows, 0 * rows)).norm().item()


def test_every_sampler_of_the_recipe_has_a_step():
    assert set(sampler.STEPS) == set(get_args(Sampler))


def test_the_grid_falls_from_one_to_zero_in_equal_steps():
    assert sampler.time_grid(1) == [1.0, 0.0]
    assert sampler.time_grid(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    for steps in range(1, 60):
        assert sampler.time_grid(steps) == [left / steps for left in range(steps, -1, -1)]


@pytest.mark.parametrize("name", FIELDS)
def test_on_an_exact_field_one_two_and_seven_steps_agree(name):
    for steps in (1, 2, 7):
        assert error_after(FIELDS[name], "trajectory", steps) < 1e-12


@pytest.mark.parametrize("name", FIELDS)
def test_a_custom_grid_reaches_the_same_data(name):
    out = walk(FIELDS[name], "trajectory", [1.0, 0.9, 0.55, 0.05, 0.0])
    torch.testing.assert_close(out, walk(FIELDS[name], "trajectory", [1.0, 0.0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize(("kind", "order"), [("flow", 1), ("heun", 2)])
def test_plain_flow_steps_converge_with_their_order(name, kind, order):
    errors = [error_after(FIELDS[name], kind, steps) for steps in (32, 64, 128)]
    for coarse, fine in pairwise(errors):
        assert 0.85 * 2**order < coarse / fine < 1.15 * 2**order


def test_euler_and_heun_on_decay_are_their_closed_forms():
    z, _, _, _ = batch()
    h = 0.25
    assert torch.allclose(walk(Decay(), "flow", sampler.time_grid(4)), z * (1 + h) ** 4, rtol=1e-13)
    heun = z * (1 + h + h * h / 2) ** 3 * (1 + h)  # plain Euler on the step that ends at 0
    assert torch.allclose(walk(Decay(), "heun", sampler.time_grid(4)), heun, rtol=1e-13)


@pytest.mark.parametrize("kind", get_args(Sampler))
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_promised_number_of_evaluations_is_made(kind, steps):
    calls = []

    def net(z, t, r, y):
        calls.append((t[0].item(), r[0].item()))
        return torch.zeros_like(z)

    walk(net, kind, sampler.time_grid(steps), fresh_noise=lambda: torch.zeros(6, 2, 3, 3, dtype=torch.float64))
    assert len(calls) == sampler.grid_evaluations(kind, steps)
    assert calls[0] == {"trajectory": (1.0, 1 - 1 / steps), "consistency": (1.0, 0.0)}.get(kind, (1.0, 1.0))


def test_consistency_sampling_renoises_between_steps_and_not_after_the_last():
    z, _, _, _ = batch()
    draws = [torch.full_like(z, 3.0), torch.full_like(z, 1e6)]
    drawn = iter(draws)
    out = walk(Decay(), "consistency", [1.0, 0.55, 0.0], fresh_noise=lambda: next(drawn))
    expected = (0.45 * z * torch.e + 0.55 * draws[0]) * torch.exp(torch.tensor(0.55, dtype=torch.float64))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert next(drawn, None) is None  # one draw per step, the last one unused


@pytest.mark.parametrize("name", ["traj1", "traj2", "traj_custom_055", "cons2", "fm8"])
def test_every_single_step_is_the_published_one(name):
    kind = {"tra": "trajectory", "con": "consistency", "fm8": "flow"}[name[:3]]
    y, net = labels(tensor("sampler_f64.npz", "label"), "M"), network("M")
    x = tensor("sampler_f64.npz", "noise_init")
    steps = sum(key.startswith(f"{name}/step") and key.endswith("x_next") for key in arrays("sampler_f64.npz"))
    grid = [1.0, float(torch.tensor(0.55)), 0.0] if "055" in name else sampler.time_grid(steps)
    for i in range(steps):
        noise = tensor("sampler_f64.npz", f"cons2/noise_step{min(i, 1)}")
        with torch.no_grad():
            x = sampler.STEPS[kind](x, sampler.SamplerStep(net, y, grid[i], grid[i + 1], lambda noise=noise: noise))
        expected = tensor("sampler_f64.npz", f"{name}/step{i}/x_next")
        torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


def test_the_state_is_float64_whatever_the_network_returns():
    z, _, _, _ = batch()
    scale = torch.ones((), requires_grad=True)
    out = walk(lambda z, t, r, y: (scale * z).bfloat16(), "trajectory", [1.0, 0.0], noise=z.float())
    assert out.dtype == torch.float64
    assert not out.requires_grad


def labelled(z, t, r, y):
    """A network whose velocity tells its label and its times."""
    return z * (1.0 + y[:, None, None, None]) + t[:, None, None, None] - 0.5 * r[:, None, None, None]


def test_guidance_at_sampling_extrapolates_from_the_null_label():
    z, t, r, _ = batch()
    y = torch.arange(6)
    u_y, u_null = labelled(z, t, r, y), labelled(z, t, r, torch.full_like(y, 9))
    for scale, expected in ((0.0, u_null), (1.0, u_y), (2.5, u_null + 2.5 * (u_y - u_null))):
        ours = sampler.guided_net(labelled, 9, scale, channels=None)(z, t, r, y)
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)


def test_guidance_of_some_channels_leaves_the_others_to_the_label():
    """DiT's sampler: the first three channels are guided, the fourth is that of the label."""
    z, t, r, _ = batch()
    y = torch.arange(6)
    u_y, u_null = labelled(z, t, r, y), labelled(z, t, r, torch.full_like(y, 9))
    guided = u_null + 2.5 * (u_y - u_null)
    for channels in range(1, z.shape[1] + 1):
        ours = sampler.guided_net(labelled, 9, 2.5, channels=channels)(z, t, r, y)
        assert torch.equal(ours[:, :channels], guided[:, :channels])
        assert torch.equal(ours[:, channels:], u_y[:, channels:])


def test_guidance_at_sampling_makes_one_call_for_both_halves():
    sizes = []

    def net(z, t, r, y):
        sizes.append(len(z))
        return labelled(z, t, r, y)

    walk(sampler.guided_net(net, 9, 2.0, channels=None), "trajectory", sampler.time_grid(2))
    assert sizes == [12, 12]


@pytest.mark.parametrize("kind", get_args(Sampler))
def test_a_row_does_not_depend_on_its_neighbours(kind):
    z, _, _, y = batch()
    field, noise = gaussian(), torch.ones_like(z)

    def walked(rows):
        return sampler.sample(
            field, z[rows], y[rows], grid=[1.0, 0.6, 0.0], sampler=kind, fresh_noise=lambda: noise[rows]
        )

    order = torch.tensor([4, 1, 3])
    torch.testing.assert_close(walked(order), walked(torch.arange(6))[order], rtol=1e-14, atol=1e-14)
