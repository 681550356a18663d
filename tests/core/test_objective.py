"""Targets, weights and logged terms: identities and closed forms, beside the golden vectors."""

from itertools import pairwise
from typing import get_args

import pytest
import torch
from exact_fields import Decay, Straight, batch, gaussian

from alphaflow_cli.core import objective, path
from alphaflow_cli.recipe.schema import Reduction, Weight

FIELDS = {"decay": Decay(), "gaussian": gaussian()}
ALPHAS = [0.9, 0.5, 0.1, 0.01]


def later_target(field, alpha, velocity, z, t, r, y):
    """The target of r < t rows, by the function of its kind."""
    v = field(z, t, t, y)
    if alpha == 1.0:
        return v
    if alpha == 0.0:
        return objective.mean_target(v, objective.jvp_derivative(field, z, v, t=t, r=r, y=y), t, r)
    if velocity == "network":
        return objective.shortcut_target(field, z, v, t=t, r=r, y=y, alpha=alpha)
    return objective.between_target(field, z, v, v, t=t, r=r, y=y, alpha=alpha)


def assert_same(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_every_weight_and_reduction_of_the_recipe_has_a_function():
    assert set(objective.WEIGHTS) == set(get_args(Weight))
    assert set(objective.REDUCTIONS) == set(get_args(Reduction))


@pytest.mark.parametrize("name", FIELDS)
def test_the_exact_average_velocity_is_a_fixed_point_of_meanflow(name):
    z, t, r, y = batch()
    assert_same(later_target(FIELDS[name], 0.0, "data", z, t, r, y), FIELDS[name](z, t, r, y))


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_exact_average_velocity_is_a_fixed_point_of_the_shortcut_target(name, alpha):
    z, t, r, y = batch()
    assert_same(later_target(FIELDS[name], alpha, "network", z, t, r, y), FIELDS[name](z, t, r, y))


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_with_the_average_velocity_of_its_own_part_the_between_target_is_exact(name, alpha):
    field, (z, t, r, y) = FIELDS[name], batch()
    own = field(z, t, objective.intermediate_time(t, r, alpha), y)
    assert_same(objective.between_target(field, z, own, own, t=t, r=r, y=y, alpha=alpha), field(z, t, r, y))


@pytest.mark.parametrize("name", FIELDS)
def test_on_a_curved_field_the_between_target_is_off_by_order_alpha_squared(name):
    field, (z, t, r, y) = FIELDS[name], batch()
    errors = []
    for alpha in (0.04, 0.02, 0.01, 0.005):
        errors.append((later_target(field, alpha, "data", z, t, r, y) - field(z, t, r, y)).norm().item())
    ratios = [a / b for a, b in pairwise(errors)]
    assert all(3.7 < ratio < 4.3 for ratio in ratios), ratios


@pytest.mark.parametrize("alpha", [1.0, *ALPHAS, 0.0])
@pytest.mark.parametrize("velocity", ["data", "network"])
def test_on_straight_lines_the_target_is_exact_at_every_alpha(alpha, velocity):
    field, (z, t, r, y) = Straight(torch.full((2, 3, 3), 0.7, dtype=torch.float64)), batch()
    assert_same(later_target(field, alpha, velocity, z, t, r, y), field(z, t, r, y))


def test_alpha_one_is_trajectory_flow_matching_and_calls_no_network():
    z, t, r, y = batch()
    x, noise = z, z.flip(0)
    target = later_target(lambda *_: path.velocity(x, noise), 1.0, "data", z, t, r, y)
    assert torch.equal(target, noise - x)


def test_the_between_target_sees_the_point_the_time_and_the_interval_of_the_paper():
    z, t, r, y = batch()
    v, seen = z + 1, []

    def net(*inputs):
        seen.append(inputs)
        return torch.zeros_like(z)

    target = objective.between_target(net, z, v, v, t=t, r=r, y=y, alpha=0.25)
    ((z_s, s, r_seen, y_seen),) = seen
    assert_same(s, t - 0.25 * (t - r), 1e-15)
    assert_same(z_s, z - path.expand(t - s, z) * v, 1e-15)
    assert torch.equal(r_seen, r)
    assert torch.equal(y_seen, y)
    assert torch.equal(target, 0.25 * v)


def test_targets_carry_no_gradient_and_the_network_builds_no_graph_for_them():
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    graded = []

    def net(z, t, r, y):
        graded.append(torch.is_grad_enabled())
        return scale * Decay()(z, t, r, y)

    z, t, r, y = batch()
    v = torch.zeros_like(z)
    targets = [
        objective.between_target(net, z, v, v, t=t, r=r, y=y, alpha=0.5),
        objective.shortcut_target(net, z, v, t=t, r=r, y=y, alpha=0.5),
        objective.jvp_derivative(net, z, v, t=t, r=r, y=y),
    ]
    assert not any(target.requires_grad for target in targets)
    assert graded == [False] * 4


@pytest.mark.parametrize("velocity", ["data", "network"])
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.01, 0.0])
def test_shuffling_the_rows_shuffles_targets_losses_and_weights(alpha, velocity):
    field, (z, t, r, y) = gaussian(), batch(8)
    r[3] = t[3]  # a tie among them

    def run(order):
        rows = [value[order] for value in (z, t, r, y)]
        target = objective.clamp_target(later_target(field, alpha, velocity, *rows), 0, bound=4.0, alpha=alpha)
        error = objective.squared_error(rows[0], target, "mean")
        return (
            target,
            error,
            objective.loss_weight(error, 0, alpha=alpha, kind="adaptive", c=1e-3, power=1.0, later=1.0),
        )

    order = torch.tensor([5, 2, 7, 0, 1, 3, 6, 4])
    for plain, shuffled in zip(run(torch.arange(8)), run(order), strict=True):
        assert_same(shuffled, plain[order], 1e-13)


def test_meanflows_target_on_a_tie_is_the_velocity_itself():
    t = torch.tensor([0.5, 0.5, 0.5, 0.0, 1.0], dtype=torch.float64)
    r = t - torch.tensor([0.0, 5.0e-6, 5.1e-6, 0.0, 1.0], dtype=torch.float64)
    assert objective.is_tie(t, r).tolist() == [True, True, False, True, False]
    v = torch.ones(5, 1, 2, 2, dtype=torch.float64)
    target = objective.mean_target(v, torch.full_like(v, 1e3), t, r)
    assert (target == v).flatten(1).all(1).tolist() == [True, True, False, True, False]
    assert torch.isfinite(objective.mean_target(v, torch.full_like(v, torch.inf), t, r)[[0, 1, 3]]).all()


@pytest.mark.parametrize("alpha", [1.0, 0.99, 0.5, 0.01, 0.0])
@pytest.mark.parametrize("velocity", ["data", "network"])
def test_edges_of_time_are_safe_in_float32(alpha, velocity):
    tiny = 2.0**-20
    t = torch.tensor([0.0, 1.0, 1.0, 0.5, 0.5, 1.0, tiny], dtype=torch.float64)
    r = torch.tensor([0.0, 1.0, 0.0, 0.5, 0.5 - tiny, 1.0 - tiny, 0.0], dtype=torch.float64)
    z, _, _, y = batch(len(t))
    field = Wavy()
    exact = later_target(field, alpha, velocity, z, t, r, y)
    rounded = later_target(field, alpha, velocity, z.float(), t.float(), r.float(), y)
    assert rounded.dtype == torch.float32
    assert (rounded.double() - exact).abs().max() < 2e-5
    error = objective.squared_error(torch.zeros_like(rounded), rounded, "mean")
    weight = objective.loss_weight(error, 0, alpha=alpha, kind="adaptive", c=1e-3, power=1.0, later=1.0)
    assert torch.isfinite(weight * error).all()


class Wavy:
    """A smooth function of all its inputs, of no special form."""

    def __call__(self, z, t, r, y):
        return torch.sin(2 * z + path.expand(3 * t - r, z)) + path.expand((t - r).cos(), z) * z


def test_the_clamp_spares_equal_rows_and_meanflow():
    target = torch.tensor([-9.0, 9.0, -9.0, 9.0, 4.5])[:, None]

    def clamped(alpha, bound=4.0, n_equal=2):
        return objective.clamp_target(target, n_equal, bound=bound, alpha=alpha)[:, 0].tolist()

    assert clamped(1.0) == clamped(0.005) == [-9.0, 9.0, -4.0, 4.0, 4.0]
    assert clamped(0.0) == clamped(0.5, bound=0.0) == target[:, 0].tolist()
    assert clamped(0.5, n_equal=5) == target[:, 0].tolist()
    assert clamped(0.5, n_equal=0) == [-4.0, 4.0, -4.0, 4.0, 4.0]
    assert target[0] == -9.0


def test_the_error_is_a_mean_or_a_sum_over_all_but_the_rows():
    u, target = torch.ones(2, 4, 8, 8), torch.zeros(2, 4, 8, 8)
    target[1] = -1
    assert objective.squared_error(u, target, "mean").tolist() == [1.0, 4.0]
    assert objective.squared_error(u, target, "sum").tolist() == [256.0, 1024.0]


@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.0])
def test_each_weight_is_its_formula(alpha):
    error, c = torch.tensor([0.5, 2.0, 0.25, 4.0], requires_grad=True), 1e-3
    a = torch.tensor([1.0, 1.0, alpha or 1.0, alpha or 1.0])
    expected = {"adaptive": a / (error + c), "converging": a / (error + a**2 * c), "none": 1 / a}
    for kind, weight in expected.items():
        ours = objective.loss_weight(error, 2, alpha=alpha, kind=kind, c=c, power=1.0, later=1.0)
        torch.testing.assert_close(ours, weight.detach(), rtol=1e-6, atol=0)
        assert not ours.requires_grad


def test_a_gap_gives_each_row_its_own_alpha_between_that_of_the_schedule_and_1():
    t, r, gap = torch.tensor([0.9, 0.5, 0.5, 0.5]), torch.tensor([0.1, 0.498, 0.499, 0.49901]), 1e-3
    alpha = objective.row_alpha(0.2, t, r, gap)
    torch.testing.assert_close(alpha, torch.tensor([0.2, 0.5, 1.0, 1.0]), rtol=1e-4, atol=0)
    assert alpha.max() <= 1.0, "t − r may be rounded to less than the gap"
    assert objective.row_alpha(0.0, t, r, gap) == 0.0, "the phase of the derivative stays"
    assert objective.row_alpha(0.2, t, r, 0.0) == 0.2


def test_what_is_logged_keeps_no_graph():
    u = torch.ones(2, 1, 2, 2, requires_grad=True)
    terms = objective.loss_terms(u, torch.zeros_like(u), torch.zeros_like(u))
    assert not any(term.requires_grad for term in (terms.error, terms.trajectory, terms.consistency))


def test_bins_hold_the_sums_and_counts_of_r_below_t_rows_only():
    t = torch.tensor([0.5, 0.25, 0.26, 1.0, 0.9, 0.5])
    r = torch.tensor([0.5, 0.00, 0.00, 0.0, 0.8, 0.5])
    values = torch.tensor([1e9, 1.0, 2.0, 4.0, 8.0, float("nan")])
    sums, counts = objective.interval_bins(t, r, values, 4)
    assert sums.tolist() == [9.0, 2.0, 0.0, 4.0]
    assert counts.tolist() == [2.0, 1.0, 0.0, 1.0]
